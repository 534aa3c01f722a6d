r"""Files of other people: JSON lines split at `\n` alone, byte-order marks, and what is told of other encodings."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantlab.calibration import read_texts
from quantlab.commands.planned_run import provenance
from quantlab.data.exclusions import read_rows
from quantlab.errors import DataError, QuantlabError, RecipeError
from quantlab.recipe.load import load_recipe
from quantlab.runs.run import read_jsonl, write_jsonl
from quantlab.teacher.local import load_recorded
from quantlab.teacher.prices import load_table
from quantlab.text2sql.data.benchmarks.files import csv_rows, json_rows, jsonl_rows
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.data.predictions import read_judge, read_predictions
from quantlab.textfile import json_lines, json_objects, parse_json_lines, read_json, read_text
from tests import command

ROOT = Path(__file__).resolve().parents[1]
DDL = "CREATE TABLE t (a INTEGER);"
ITEM = Item("1", "1", DDL, "?", "SELECT a FROM t;")
# Every character at which str.splitlines() breaks and JSON need not escape.
BREAKS = ("\u2028", "\u2029", "\x85", "\u2028\u2029\x85", "\x7f", "\u2028\\n\u2029")

Reader = Callable[[Path], list[str]]


def data_file(path: Path) -> list[str]:
    return [item.question for item in load_items(str(path))]


# What a line of each kind of file looks like around a text, and the texts that its reader finds.
READERS: dict[str, tuple[str, Reader]] = {
    "calibration": ('{{"text": "{}"}}', lambda path: read_texts(str(path))),
    "rows": ('{{"db_id": 1, "context": "' + DDL + '", "question": "{}", "answer": "SELECT 1"}}', data_file),
    "predictions": ('{{"prediction": "{}"}}', lambda path: read_predictions(path, [ITEM])),
    "judge": (
        '{{"id": "1", "answer": "yes", "why": "{}"}}',
        lambda path: [read_judge(path, [ITEM])["1"][1]],
    ),
    "samples": ('{{"text": "{}"}}', lambda path: [row["text"] for row in read_jsonl(path)]),
    "exclusions": ('{{"text": "{}"}}', lambda path: [row["text"] for row in read_rows(path)]),
    "recorded": (
        '{{"key": "k", "text": "{}"}}',
        lambda path: list(load_recorded(path).by_content.values()),
    ),
    "benchmark": ('{{"text": "{}"}}', lambda path: [row.value["text"] for row in jsonl_rows(path)]),
}


def quantlab(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    return command.quantlab(
        *arguments, cwd=cwd, code=code, environment={"QUANTLAB_CACHE": str(cwd / "cache")}
    )


# Lines


@pytest.mark.parametrize("inside", BREAKS, ids=ascii)
@pytest.mark.parametrize("kind", READERS)
def test_a_string_may_hold_what_ends_lines_elsewhere(tmp_path: Path, kind: str, inside: str) -> None:
    line, read = READERS[kind]
    path = tmp_path / "x.jsonl"
    path.write_text(line.format(f"앞{inside}뒤") + "\n", encoding="utf-8")
    assert read(path) == [json.loads(f'"앞{inside}뒤"')]


@pytest.mark.parametrize("inside", [r"\u000b", r"\u000c", r"\u001c\u001d\u001e", r"\u2028", r"a\ud800b"])
@pytest.mark.parametrize("kind", READERS)
def test_escaped_characters_stay_what_they_are(tmp_path: Path, kind: str, inside: str) -> None:
    line, read = READERS[kind]
    path = tmp_path / "x.jsonl"
    path.write_text(line.format(f"x{inside}y"), encoding="utf-8")  # nor does the last line need an end
    assert read(path) == [json.loads(f'"x{inside}y"')]


@pytest.mark.parametrize(
    "content",
    [
        "{}\n",
        "\ufeff{}\n",
        "\ufeff\ufeff{}\n",
        "\n\n{}\n",
        "{}\r\n",
        "\r\n{}\r\n\r\n",
        "  {}  \n",
        "\ufeff\n{}",
        "{}\r",
    ],
    ids=ascii,
)
@pytest.mark.parametrize("kind", READERS)
def test_marks_blank_lines_and_line_ends(tmp_path: Path, kind: str, content: str) -> None:
    line, read = READERS[kind]
    path = tmp_path / "x.jsonl"
    path.write_bytes(content.replace("{}", line.format("안녕")).encode())
    assert read(path) == ["안녕"]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "not JSON"),
        ('{"a": 1}{"a": 2}', "not JSON"),
        ('"가\u2028', "not JSON"),
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"n": ' + "9" * 10_000 + "}", "not JSON that can be read"),
        ('{"n": [-' + "1" * 5_000 + "]}", "not JSON that can be read"),
    ],
    ids=["open", "two", "unended", "brackets", "braces", "digits", "negative"],
)
@pytest.mark.parametrize("kind", READERS)
def test_a_bad_line_is_named(tmp_path: Path, kind: str, bad: str, words: str) -> None:
    line, read = READERS[kind]
    path = tmp_path / "x.jsonl"
    good = line.format("\u2028 and \x85")  # must not be counted as lines
    path.write_text(f"{good}\n\n{bad}\n", encoding="utf-8")
    with pytest.raises(DataError, match=words) as caught:
        read(path)
    place = f"{path}, line 3: " if kind == "calibration" else f"{path}:3: "
    assert str(caught.value).startswith(place)


def test_complaints_about_predictions_count_lines_not_rows(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prediction": "SELECT 1"}\n\n\n{"prediction": 3}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:4: 'prediction' must be text"):
        read_predictions(path, [ITEM, ITEM])
    path.write_text('\n{"id": "1", "prediction": ""}\n\n{"id": "nobody", "prediction": ""}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:4: the data have no question 'nobody'"):
        read_predictions(path, [ITEM])


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", r'"\ud800"'])
def test_what_python_reads_as_json_is_read(value: str) -> None:
    (found,) = parse_json_lines(f'{{"a": {value}}}', "x")
    assert repr(found) == repr((1, {"a": json.loads(value)}))


def test_rows_survive_writing_and_reading(tmp_path: Path) -> None:
    rng = random.Random(0)
    alphabet = [
        "\u2028",
        "\u2029",
        "\x85",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x1d",
        "\x1e",
        "\r",
        "\n",
        '"',
        "\\",
        "가",
        "😀",
    ]
    rows = [{"text": "".join(rng.choices(alphabet, k=rng.randint(0, 12)))} for _ in range(500)]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert read_jsonl(tmp_path / "x.jsonl") == rows


def test_lines_that_are_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('1\n"a\u2028b"\n[2]\n', encoding="utf-8")
    assert json_lines(path) == [(1, 1), (2, "a\u2028b"), (3, [2])]
    with pytest.raises(DataError, match=r"x\.jsonl:1: expected an object, found int"):
        json_objects(path)


def test_files_with_marks_that_were_joined(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"a": 1}\n\ufeff{"a": "\ufeff"}\n', encoding="utf-8")
    assert read_jsonl(path) == [{"a": 1}, {"a": "\ufeff"}]


def test_separators_through_the_command_line(tmp_path: Path) -> None:
    question = {
        "db_id": 1,
        "context": DDL,
        "question": "첫 줄\u2028둘째\x85끝?",
        "answer": "SELECT a FROM t;",
    }
    for name, row in (("d", question), ("p", {"prediction": "SELECT a -- \u2028 \u2029\nFROM t"})):
        text = json.dumps(row, ensure_ascii=False) + "\n"
        (tmp_path / f"{name}.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    arguments = ("evaluate", "--predictions", "p.jsonl", "--data", "d.jsonl", "--json")
    summary = json.loads(quantlab(*arguments, cwd=tmp_path, code=0).stdout)
    assert summary["metrics"]["n_ok"] == 1
    for bad in ("[" * 200_000, '{"n": ' + "9" * 10_000 + "}"):
        (tmp_path / "p.jsonl").write_text(f'\n{{"prediction": ""}}\n{bad}\n')
        done = quantlab(*arguments, cwd=tmp_path, code=4)
        assert "error: p.jsonl:3: not JSON that can be read" in done.stderr


# Byte-order marks


def test_a_mark_before_text_recipe_prices_and_others(tmp_path: Path) -> None:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
        return tmp_path / name

    assert read_texts(str(write("t.txt", "글\ufeff글\r\n"))) == ["글\ufeff글\n"]
    assert load_recipe(write("r.yaml", "kind: evaluate\nevaluate: [perplexity]\n")).kind == "evaluate"
    assert load_table(write("p.yaml", "m: {input: 1, output: 2, date: 2026-05-01}\n"))["m"].output == 2.0
    assert [row.value for row in csv_rows(write("c.csv", "a,b\n1,2\n"))] == [{"a": "1", "b": "2"}]
    assert [row.value for row in json_rows(write("j.json", '[{"a": 1}]'))] == [{"a": 1}]
    assert read_json(write("k.json", "{}")) == {}
    write("quantlab.json", '{"parent": "x"}')
    assert provenance(tmp_path) == {"parent": "x"}


# Other encodings

KOREAN = '{"text": "서울에서 가장 점수가 높은 선수의 이름은 무엇인가?"}\n'
JAPANESE = '{"text": "得点が一番高い選手の名前は何ですか。"}\n'
CHINESE = '{"text": "得分最高的球员叫什么名字？这是一个测试。"}\n'
FRENCH = '{"text": "L\'été, le café est là. Ça va très bien, merci."}\n'

ENCODED = [
    (KOREAN, "cp949", "CP949", "CP949 (EUC-KR)"),
    (KOREAN, "euc_kr", "CP949", "CP949 (EUC-KR)"),
    ('{"text": "질문"}\n', "cp949", "CP949", "CP949 (EUC-KR)"),
    ('{"text": "값"}\n', "cp949", "CP949", "CP949 (EUC-KR)"),
    ('{"text": "똠방각하와 펲시"}\n', "cp949", "CP949", "CP949 (EUC-KR)"),
    ('{"text": "ㅋㅋㅋㅋ 재밌다 ㅠㅠ"}\n', "cp949", "CP949", "CP949 (EUC-KR)"),
    ('{"text": "大韓民國 헌법 ①②"}\n', "cp949", "CP949", "CP949 (EUC-KR)"),
    ("a,b\n" * 300_000 + KOREAN, "cp949", "CP949", "CP949 (EUC-KR)"),
    (KOREAN, "utf-16", "UTF-16", "UTF-16 LE with a byte-order mark"),
    ("\ufeff" + KOREAN, "utf-16-be", "UTF-16", "UTF-16 BE with a byte-order mark"),
    (KOREAN, "utf-16-le", "UTF-16LE", "UTF-16 LE without a byte-order mark"),
    (KOREAN, "utf-16-be", "UTF-16BE", "UTF-16 BE without a byte-order mark"),
    ('{"text": "ascii only"}\n', "utf-16-le", "UTF-16LE", "UTF-16 LE without a byte-order mark"),
    ('{"text": "ascii only"}\n', "utf-16-be", "UTF-16BE", "UTF-16 BE without a byte-order mark"),
    ("가나다라마바사아자차카타파하", "utf-16-le", "UTF-16LE", "UTF-16 LE without a byte-order mark"),
    (KOREAN, "utf-32", "UTF-32", "UTF-32 LE with a byte-order mark"),
    (KOREAN, "utf-32-be", "UTF-32BE", "UTF-32 BE without a byte-order mark"),
    ('{"text": "ascii only"}\n', "utf-32-le", "UTF-32LE", "UTF-32 LE without a byte-order mark"),
    (JAPANESE, "cp932", "CP932", "Shift-JIS (CP932)"),
    (JAPANESE, "utf-16-le", "UTF-16LE", "UTF-16 LE without a byte-order mark"),
    (JAPANESE, "euc_jp", "EUC-JP", "EUC-JP"),
    (CHINESE, "gb18030", "GB18030", "GB18030 (GBK)"),
    (CHINESE, "utf-16-be", "UTF-16BE", "UTF-16 BE without a byte-order mark"),
    ('{"text": "這個球員的得分是最高的。"}\n', "big5", "BIG5", "Big5"),
    (FRENCH, "cp1252", "WINDOWS-1252", "Windows-1252"),
    ('{"text": "Ángel"}\n', "cp1252", "WINDOWS-1252", "Windows-1252"),
    ('{"text": "“quoted” – £5"}\n', "cp1252", "WINDOWS-1252", "Windows-1252"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "codec", "name", "label"), ENCODED)
def test_an_encoding_is_told_and_its_command_converts(
    tmp_path: Path, text: str, codec: str, name: str, label: str
) -> None:
    folder = tmp_path / "my data; 'old'"
    folder.mkdir()
    path = folder / "글 $1.jsonl"
    data = text.encode(codec)
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_text(path)
    said, hint = str(caught.value), caught.value.hint
    try:
        bad = len(data.decode("utf-8").partition("\x00")[0])
    except UnicodeDecodeError as error:
        bad = error.start
    line = data.count(b"\n", 0, bad) + 1
    assert said.startswith(f"cannot read {path}: not UTF-8, it looks like {label}")
    assert said.endswith(f"(byte 0x{data[bad]:02x} at offset {bad}, line {line})")
    assert hint.startswith(f"convert it: iconv -f {name} -t UTF-8 ")
    if shutil.which("iconv"):
        subprocess.run(["sh", "-c", hint.removeprefix("convert it: ")], check=True, timeout=60)
        assert read_text(folder / "글 $1.utf8.jsonl") == text.removeprefix("\ufeff")


def test_korean_of_any_length_is_told() -> None:
    """Lines of the bundled Korean text in four encodings: nearly all are told, however short."""
    from quantlab.text_encodings import guess

    lines = [
        line for line in read_texts("heldout.txt")[0].split("\n") if any("가" <= c <= "힣" for c in line)
    ]
    rng = random.Random(0)
    names = {"cp949": "CP949", "utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "utf-32-be": "UTF-32BE"}
    for codec, name in names.items():
        right = total = 0
        for line in rng.sample(lines, 300):
            data = line.encode(codec, "ignore")
            try:
                data.decode("utf-8")
            except UnicodeDecodeError as error:
                found = guess(data, error.start)
                right += found is not None and found.name == name
                total += 1
        assert total > 200
        assert right >= 0.99 * total, (codec, right, total)


@pytest.mark.parametrize("left", [1, 2])
@pytest.mark.parametrize(
    "before", ["", '{"text": "', "서울", '{"text": "서울에서\u2028', "é", "ascii\nsecond\n"]
)
def test_a_file_that_is_cut_is_told_as_that(tmp_path: Path, before: str, left: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(before.encode() + "값".encode()[:left])
    place = f"byte 0xea at offset {len(before.encode())}, line {before.count(chr(10)) + 1}"
    with pytest.raises(DataError, match="ends in the middle of a UTF-8 character") as caught:
        read_text(path)
    assert place in str(caught.value) and "looks like" not in str(caught.value)
    assert "iconv" not in caught.value.hint and "again" in caught.value.hint


@pytest.mark.parametrize(
    "data",
    [
        '{"text": "서울에서 가'.encode()[:-1] + b'"}\n' + KOREAN.encode(),  # a line cut by bytes
        KOREAN.encode() * 3
        + KOREAN.encode("cp949")
        + KOREAN.encode() * 3,  # a line appended by another program
        "été ".encode() * 20 + b"\xe9 " + "été ".encode() * 20,
        KOREAN.encode() + b"\xff\n",
        b"\xef\xbb\xbf" + KOREAN.encode() * 2 + b"\x80\n",
    ],
)
def test_a_few_bad_bytes_do_not_make_another_encoding(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(data)
    with pytest.raises(UnicodeDecodeError) as raw:
        data.decode("utf-8")
    with pytest.raises(DataError, match="cut, damaged or in another encoding") as caught:
        read_text(path)
    assert f"line {data.count(chr(10).encode(), 0, raw.value.start) + 1})" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x1f\x8b\x08\x00\xff\xff", "a gzip file"),
        (b"PK\x03\x04\x14\x00\xfe\xff", "a zip archive"),
        (b"SQLite format 3\x00\x10\x00\xff\x80", "a SQLite database"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x81", "nor an encoding that can be told"),
        (bytes(range(256)), "nor an encoding that can be told"),
    ],
)
def test_what_is_no_text(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=words) as caught:
        json_lines(path)
    assert "iconv" not in caught.value.hint


@pytest.mark.parametrize("text", ["a\x00b", "가나다\x00라마바", "", "\ufeff", "😀" * 9, "ㅋㅋㅋ", "\ufffd"])
def test_utf_8_is_utf_8(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.txt"
    path.write_text(text, encoding="utf-8")
    assert read_text(path) == text.removeprefix("\ufeff")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read .*gone: No such file"):
        read_text(tmp_path / "gone")
    with pytest.raises(DataError, match="cannot read .*: Is a directory"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        (DataError, lambda path: read_texts(str(path))),
        (DataError, lambda path: load_items(str(path))),
        (DataError, lambda path: read_predictions(path, [ITEM])),
        (DataError, lambda path: read_judge(path, [ITEM])),
        (DataError, read_rows),
        (DataError, load_recorded),
        (DataError, jsonl_rows),
        (DataError, load_table),
        (RecipeError, load_recipe),
    ],
)
def test_every_reader_tells_the_encoding(
    tmp_path: Path, kind: type[QuantlabError], read: Callable[[Path], Any]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(KOREAN.encode("cp949"))
    with pytest.raises(kind, match=r"cannot read .*x\.jsonl: not UTF-8, it looks like CP949") as caught:
        read(path)
    assert "iconv -f CP949 -t UTF-8" in caught.value.hint


def test_encodings_through_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prediction": "SELECT 1"}\n')
    (tmp_path / "my rows.jsonl").write_bytes(KOREAN.encode("cp949"))
    arguments = ("evaluate", "--predictions", "p.jsonl", "--data", "my rows.jsonl")
    said = quantlab(*arguments, cwd=tmp_path, code=4).stderr
    assert "error: cannot read my rows.jsonl: not UTF-8, it looks like CP949 (EUC-KR) (byte 0xbc at" in said
    assert "iconv -f CP949 -t UTF-8 'my rows.jsonl' > 'my rows.utf8.jsonl'" in said
    (tmp_path / "r.yaml").write_bytes("# 한국어 설명\nkind: evaluate\n".encode("cp949"))
    said = quantlab("quantize", "r.yaml", "--model", "embedded:base", cwd=tmp_path, code=2).stderr
    assert "error: cannot read recipe r.yaml: not UTF-8, it looks like CP949" in said
