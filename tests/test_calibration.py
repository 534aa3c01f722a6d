"""Calibration rows: same seed, same rows; kinds of rows, mixtures, what is left out; clear messages for what will not
do."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.calibration import digest, drawing, read_texts, token_rows
from quantlab.calibration.describe import code_like, scripts
from quantlab.calibration.documents import Document, identities, read_documents
from quantlab.calibration.drawing import Wanted, draw
from quantlab.calibration.mixture import draw_mixture, notes, taking_turns
from quantlab.calibration.rendering import opening_ids, packed_ids, separate_ids
from quantlab.errors import DataError
from quantlab.models.load import load_tokenizer
from quantlab.models.safetensors.files import open_files
from quantlab.recipe.base import Calibration

from .conftest import byte_tokenizer

SMOL = Path(__file__).parents[2] / "smol" / "hf"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def chat() -> Any:
    """Bytes, a beginning-of-text token that encoding puts before a text, and a template that writes it too."""
    from tokenizers import processors

    found = byte_tokenizer()
    found.add_special_tokens({"bos_token": "<s>"})
    found.add_tokens(["<|user|>", "<|assistant|>", "<|end|>"], special_tokens=True)
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", found.bos_token_id)]
    )
    found.chat_template = TEMPLATE
    return found


def write(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(count: int, length: int = 60, seed: int = 0) -> list[dict[str, str]]:
    """Rows of random words, all different."""
    seeded = random.Random(seed)
    words = [f"{n}-{seeded.random()}" for n in range(count)]
    return [{"text": f"{word} " * (length // len(word) + 1)} for word in words]


def said(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def test_rows_follow_the_seed(tokenizer: Any) -> None:
    lines = [f"line {i} of some text" for i in range(200)]
    one, same, other = (token_rows(lines, tokenizer, rows=5, seq_len=32, seed=s) for s in (1, 1, 2))
    assert one.shape == (5, 32) and one.equal(same) and not one.equal(other)
    assert digest(one) == digest(same) != digest(other)


def test_rows_do_not_overlap(tokenizer: Any) -> None:
    rows = token_rows(
        ["".join(chr(33 + i % 90) for i in range(3200))], tokenizer, rows=100, seq_len=32, seed=0
    )
    assert rows.shape == (100, 32)  # all there are
    assert len({tuple(r) for r in rows.tolist()}) == 45  # the text repeats every 90 characters


@pytest.mark.parametrize(
    ("source", "model", "rows", "seq_len", "found"),
    [
        ("calib/general.jsonl", "embedded:base", 128, 512, "e0efd9f779387713"),
        ("calib/ko-text2sql.jsonl", "embedded:base", 128, 512, "b810a405d7365cec"),
        ("calib/en-prose.jsonl", "embedded:base", 128, 512, "811288fa4f973091"),
        (
            "calib/general.jsonl",
            "bytes",
            4,
            64,
            "f2f2d6ff1ea04b98",
        ),  # code, of which a row may be indentation
        ("calib/general.jsonl", str(SMOL), 128, 512, "b117a197b64b9854"),
    ],
)
def test_bundled_texts_give_the_rows_that_they_always_gave(
    tokenizer: Any, source: str, model: str, rows: int, seq_len: int, found: str
) -> None:
    if model == str(SMOL) and not SMOL.is_dir():
        pytest.skip("the real small model is not here")
    mine = tokenizer if model == "bytes" else load_tokenizer(open_files(model))
    mixture = draw_mixture(Calibration(source=source, rows=rows, seq_len=seq_len), mine)
    record = mixture.record()
    assert record["digest"] == found and not notes(record) and mixture.rows.shape == (rows, seq_len)
    assert digest(token_rows(read_texts(source), mine, rows=rows, seq_len=seq_len, seed=0)) == found


def test_jsonl_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n\n{"txt": "no"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 3: expected an object"):
        read_texts(str(path))
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_texts(str(path))
    path.write_text('{"text": "one"}\n{"text": "  "}\n')
    assert read_texts(str(path)) == ["one"]


def test_bundled_texts_are_found_and_misspelt_ones_named() -> None:
    assert len(read_texts("calib/ko-text2sql.jsonl")) > 100
    for read in (read_texts, read_documents):
        with pytest.raises(DataError) as caught:
            read("calib/ko-text2sq.jsonl")
        assert "calib/ko-text2sql.jsonl" in caught.value.hint


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xff\xfe\x00\x81")
    for read in (read_texts, read_documents):
        with pytest.raises(DataError, match="cannot read"):
            read(str(path))


# Kinds of rows


def test_kinds_are_told_row_by_row(tmp_path: Path) -> None:
    rows = [
        {"text": "a text", "messages": "of another column's form", "kind": "x"},
        {"messages": said("question?", "answer.")},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "in "}, {"text": "parts"}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
        {"instruction": "do", "input": "this", "output": "done"},
        {"instruction": "do", "input": "", "output": "done"},
        {"prompt": "one", "completion": "two", "input": "of no meaning here"},
        {"context": "CREATE TABLE t (a);", "question": "무엇?", "answer": "SELECT a FROM t;", "text": None},
        {"text": "  "},
    ]
    found = read_documents(write(tmp_path / "mixed.jsonl", rows))
    kinds = ["text", *["messages"] * 3, *["instruction"] * 4, "text"]
    assert [document.kind for document in found] == kinds
    assert found[2].messages[0]["content"] == "in parts" and found[3].messages[0]["content"] == ""
    assert [document.text for document in found[4:8]] == [
        "do\n\nthis\n\ndone", "do\n\ndone", "one\n\ntwo", "CREATE TABLE t (a);\n\n무엇?\n\nSELECT a FROM t;"
    ]  # fmt: skip
    assert found[7].messages[0] == {"role": "user", "content": "CREATE TABLE t (a);\n\n무엇?"}
    assert len(identities(found)) == len(set(identities(found))) == 8
    assert identities(read_documents("calib/general.jsonl")) == read_texts("calib/general.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "no"}, r'expected "text", "messages", "instruction" with "output" or .*; found \'txt\''),
        ({}, "found no columns"),
        ([1], "found list"),
        ("text", "found str"),
        ({"text": 5}, "found 'text'"),
        ({"instruction": "no answer"}, "found 'instruction'"),
        ({"prompt": [{"role": "user"}], "completion": "x"}, "prompt: expected text, found list"),
        ({"question": "q", "answer": ["a"]}, "answer: expected text, found list"),
        ({"messages": []}, "messages: expected a list of"),
        ({"messages": {"role": "user"}}, "messages: expected a list of"),
        ({"messages": ["hello"]}, r"messages\[0\]: expected a list of"),
        ({"messages": [*said("fine"), {"content": "x"}]}, r"messages\[1\]: expected a list of"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: content: expected text, found NoneType"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "content: expected text",
        ),
        ({"x" * 500: 1, **{str(n): n for n in range(500)}}, "found 'x{40}'"),
    ],
)
def test_a_row_of_no_known_kind_is_named(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "fine"}, row])
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: .*{message}") as caught:
        read_documents(path)
    assert len(str(caught.value)) < 600


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "ok \\ud83d"}]}\n')
    with pytest.raises(
        DataError, match=r"line 1: messages\[0\]: content: half of a surrogate pair at character 4"
    ):
        read_documents(str(path))


def test_a_dataset_of_the_hub_has_the_same_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = {
        "chat": datasets.Dataset.from_list([{"messages": said("a question", "an answer")}] * 2),
        "text": datasets.Dataset.from_dict({"text": ["one", None, " ", "two"]}),
        "strange": datasets.Dataset.from_dict({"label": [1]}),
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows[name.rpartition("/")[2]])
    found = read_documents("hf:me/chat:train")
    assert [d.kind for d in found] == ["messages"] * 2 and found[1].messages == tuple(
        said("a question", "an answer")
    )
    assert [d.text for d in read_documents("hf:me/text")] == ["one", "two"] == read_texts("hf:me/text")
    with pytest.raises(DataError, match=r"hf:me/strange, row 0: expected .*found 'label'"):
        read_documents("hf:me/strange")


# Rendering


def test_messages_give_the_ids_in_use(tmp_path: Path, chat: Any) -> None:
    conversations = [
        said("질문입니다", "answer one"),
        said("second question", "<s> is no beginning", "third"),
    ]
    found = read_documents(write(tmp_path / "c.jsonl", [{"messages": one} for one in conversations]))
    in_use = [chat.apply_chat_template(one, return_dict=False) for one in conversations]
    assert separate_ids(found, chat) == in_use and in_use[0][0] == chat.bos_token_id
    assert packed_ids(found, chat) == in_use[0] + in_use[1]


def test_messages_give_the_ids_in_use_of_a_real_model(tmp_path: Path) -> None:
    if not SMOL.is_dir():
        pytest.skip("the real small model is not here")
    mine = load_tokenizer(open_files(SMOL))
    conversations = [
        said("What is a cat?", "An animal."),
        [{"role": "system", "content": "Be brief."}, *said("Why?")],
    ]
    found = read_documents(write(tmp_path / "c.jsonl", [{"messages": one} for one in conversations]))
    assert separate_ids(found, mine) == [
        mine.apply_chat_template(c, return_dict=False) for c in conversations
    ]


def test_texts_between_conversations_are_joined_by_themselves(tmp_path: Path, chat: Any) -> None:
    rows = [{"text": "one"}, {"text": "two"}, {"messages": said("a?", "b.")}, {"text": "three"}]
    found = read_documents(write(tmp_path / "m.jsonl", rows))
    assert chat.decode(packed_ids(found, chat)) == "one\n\ntwo<s><|user|>a?<|end|><|assistant|>b.<|end|>three"


def test_instructions_go_through_the_template_where_there_is_one(
    tmp_path: Path, chat: Any, tokenizer: Any
) -> None:
    rows = [{"prompt": "add 1 and 2", "completion": "3"}, {"text": "and text"}]
    found = read_documents(write(tmp_path / "i.jsonl", rows))
    assert (
        chat.decode(packed_ids(found, chat)) == "<s><|user|>add 1 and 2<|end|><|assistant|>3<|end|>and text"
    )
    assert tokenizer.decode(packed_ids(found, tokenizer)) == "add 1 and 2\n\n3\n\nand text"


def test_a_model_without_template_and_a_template_that_refuses_name_the_row(
    tmp_path: Path, chat: Any, tokenizer: Any
) -> None:
    rows = [{"text": "fine"}, {"messages": [*said("a"), {"role": "tool", "content": "b"}]}]
    found = read_documents(write(tmp_path / "t.jsonl", rows))
    with pytest.raises(DataError, match=r"t\.jsonl, line 2: messages need a chat template"):
        packed_ids(found, tokenizer)
    with pytest.raises(DataError, match=r"t\.jsonl, line 2: the chat template refuses it: no tools here"):
        packed_ids(found, chat)


# Drawing


def test_rows_begin_as_texts_do_in_use(tmp_path: Path, chat: Any, tokenizer: Any) -> None:
    bos = chat.bos_token_id
    assert opening_ids(chat) == [bos] and opening_ids(tokenizer) == []
    source = write(tmp_path / "t.jsonl", texts(40))
    plain, opened = (
        draw_mixture(Calibration(source=source, rows=9, seq_len=32, special_tokens=on), chat)
        for on in (False, True)
    )
    assert opened.rows[:, 0].tolist() == [bos] * 9 and opened.rows[:, 1:].equal(plain.rows[:, :-1])
    assert bos not in plain.rows and (plain.special_share, opened.special_share) == (0, 1 / 32)
    assert opened.record()["opening"] == ["<s>"]
    # a template that writes the token itself: not twice
    source = write(tmp_path / "c.jsonl", [{"messages": said(row["text"], "yes")} for row in texts(9)])
    rows = draw_mixture(
        Calibration(source=source, rows=9, seq_len=32, special_tokens=True, pack=False), chat
    ).rows
    assert rows[:, 0].tolist() == [bos] * 9 and not (rows[:, 1:] == bos).any()


def test_what_is_there_twice_or_says_nothing_is_left_out_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    plain = texts(30)
    noisy = [
        plain[0], {"text": " \n"}, *plain[1:20], {"text": plain[3]["text"].replace(" ", "\n ")}, {"text": "a b c d"},
        *plain[20:], plain[7], plain[7],
    ]  # fmt: skip
    records = []
    for name, rows in (("plain", plain), ("noisy", noisy)):
        wish = Calibration(source=write(tmp_path / f"{name}.jsonl", rows), rows=20, seq_len=64)
        records.append(draw_mixture(wish, tokenizer).record())
    assert records[0]["digest"] == records[1]["digest"]
    (found,) = records[1]["sources"]
    assert (found["documents"], found["duplicates"], found["near_empty"]) == (35, 3, 2)
    assert notes(records[1]) == [f"{tmp_path}/noisy.jsonl: left out 3 duplicates, 2 near-empty documents"]


def test_conversations_that_differ_in_roles_alone_are_one(tmp_path: Path, chat: Any) -> None:
    rows = [{"messages": said("the same words", "here too")}, {"text": "the same words here  too"}]
    documents = read_documents(write(tmp_path / "r.jsonl", rows))
    assert draw(documents, chat, Wanted(1, 16, 0)).duplicates == 1


def test_windows_of_one_token_are_left_out_and_counted(tokenizer: Any) -> None:
    seeded = random.Random(5)
    blocks = ["".join(seeded.choice("abcdefghij") for _ in range(128)) for _ in range(6)]
    rule = "-" * 100 + "=" * 28
    documents = [Document("text", "".join([*blocks[:3], rule, *blocks[3:]]), (), "x", 1)]
    found = draw(documents, tokenizer, Wanted(6, 128, 0))
    assert found.repetitive == 1 and [tokenizer.decode(row) for row in found.rows] == blocks
    with pytest.raises(
        DataError, match=r"enough for 6 rows of 128, not 7 \(left out: 1 row of mostly one token\)"
    ):
        draw(documents, tokenizer, Wanted(7, 128, 0))


def test_a_row_may_be_the_beginning_of_a_document(tmp_path: Path, tokenizer: Any) -> None:
    rows = texts(20, length=80) + texts(200, length=10, seed=1)
    random.Random(2).shuffle(rows)
    source = write(tmp_path / "d.jsonl", rows)
    wish = Calibration(source=source, rows=15, seq_len=64, pack=False)
    mixture = draw_mixture(wish, tokenizer)
    beginnings = [row["text"][:64] for row in rows]
    places = [beginnings.index(tokenizer.decode(row)) for row in mixture.rows]
    assert places == sorted(set(places)) and draw_mixture(wish, tokenizer).rows.equal(mixture.rows)
    assert not mixture.rows.equal(draw_mixture(wish.model_copy(update={"seed": 1}), tokenizer).rows)
    (found,) = mixture.record()["sources"]
    assert found["too_short"] == (found["parts"] or 220) - 15
    with pytest.raises(DataError) as caught:
        draw_mixture(wish.model_copy(update={"rows": 25}), tokenizer)
    assert "d.jsonl: 20 of 220 documents have 64 tokens or more, not 25" in str(caught.value)
    assert "200 documents shorter than a row" in str(caught.value)
    length = int(caught.value.hint.partition("seq_len=")[2].partition(" ")[0])
    assert caught.value.hint.startswith("calibration.rows=20 or calibration.seq_len=")
    assert len(draw_mixture(wish.model_copy(update={"rows": 25, "seq_len": length}), tokenizer).rows) == 25


def test_of_a_long_document_the_beginning_is_tokenised(tokenizer: Any) -> None:
    long = Document("text", "a long document, " * 10_000, (), "x", 1)
    found = draw([long], tokenizer, Wanted(1, 64, 0, pack=False))
    assert tokenizer.decode(found.rows[0]) == long.text[:64] and found.tokens == found.characters == 64 * 64


def test_documents_are_drawn_evenly(tokenizer: Any) -> None:
    documents = [Document("text", f"document {n:02} " * 4, (), "x", n) for n in range(20)]
    counts: Counter[str] = Counter()
    for seed in range(200):
        drawn = draw(documents, tokenizer, Wanted(5, 16, seed, pack=False))
        counts.update(tokenizer.decode(row)[9:11] for row in drawn.rows)
    assert len(counts) == 20 and min(counts.values()) > 25 and max(counts.values()) < 80  # 50 ± 6 each


# Mixtures


def test_rows_come_in_proportion_and_take_turns(tmp_path: Path, tokenizer: Any) -> None:
    one, two = (write(tmp_path / f"{name}.jsonl", texts(60, seed=seed)) for seed, name in enumerate("ab"))
    mixture = draw_mixture(
        Calibration(source=[{"source": one, "weight": 3}, two], rows=10, seq_len=32),
        tokenizer,  # type: ignore[list-item]
    )
    alone = {
        source: draw_mixture(Calibration(source=source, rows=count, seq_len=32), tokenizer).rows.tolist()
        for source, count in ((one, 8), (two, 2))
    }
    origin = [next(s for s, rows in alone.items() if row in rows) for row in mixture.rows.tolist()]
    assert origin == [one, one, two, one, one, one, one, two, one, one]
    assert [row for row, s in zip(mixture.rows.tolist(), origin, strict=True) if s == one] == alone[one]
    record = mixture.record()
    assert record["source"] == f"{one} (3) + {two} (1)" and [s["rows"] for s in record["sources"]] == [8, 2]


def test_what_stands_in_two_sources_counts_once(tmp_path: Path, tokenizer: Any) -> None:
    rows = texts(60)
    one, two = write(tmp_path / "a.jsonl", rows[:40]), write(tmp_path / "b.jsonl", rows[30:])
    record = draw_mixture(Calibration(source=[one, two], rows=8, seq_len=32), tokenizer).record()
    assert [source["duplicates"] for source in record["sources"]] == [0, 10]


def test_a_short_source_says_how_many_rows_it_can_give(tmp_path: Path, tokenizer: Any) -> None:
    long, short = write(tmp_path / "a.jsonl", texts(200)), write(tmp_path / "short.jsonl", texts(3, seed=1))
    wish = Calibration(source=[long, short], rows=32, seq_len=32)
    with pytest.raises(
        DataError, match=r"short\.jsonl has \d+ tokens, enough for \d rows of 32, not 16"
    ) as caught:
        draw_mixture(wish, tokenizer)
    fewer = int(caught.value.hint.partition("rows=")[2].partition(",")[0])
    assert len(draw_mixture(wish.model_copy(update={"rows": fewer}), tokenizer).rows) == fewer
    with pytest.raises(DataError):
        draw_mixture(wish.model_copy(update={"rows": fewer + 2}), tokenizer)


def test_every_source_is_spread_evenly() -> None:
    assert taking_turns([3]) == [0, 1, 2]
    order = taking_turns([30, 10, 1])
    assert sorted(order) == list(range(41))
    assert all(sum(n < 30 for n in order[start : start + 4]) in (2, 3, 4) for start in range(38))


# Large sources


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LARGE", 4000), ("RUN", 500), ("PIECE", 500)):
        monkeypatch.setattr(drawing, name, value)


@pytest.mark.usefixtures("small_limits")
def test_of_a_large_source_a_random_part_is_tokenised(tokenizer: Any) -> None:
    documents = [Document("text", row["text"], (), "x", n) for n, row in enumerate(texts(400, length=100))]
    size = sum(len(document.text) for document in documents)
    few, same, other = (draw(documents, tokenizer, Wanted(2, 30, seed)) for seed in (0, 0, 1))
    assert few.rows.equal(same.rows) and not few.rows.equal(other.rows)
    assert 16 * 60 <= few.tokens < 16 * 60 + 700 and few.parts is not None and few.parts < 20
    assert few.characters < few.tokens < few.characters + 2 * few.parts and few.documents == 400
    many = draw(documents, tokenizer, Wanted(30, 30, 0))  # the source is not many times that
    assert many.parts is None and many.characters == size
    assert draw(documents[:30], tokenizer, Wanted(2, 30, 0)).parts is None


@pytest.mark.usefixtures("small_limits")
def test_rows_of_a_large_source_are_from_everywhere(tokenizer: Any) -> None:
    documents = [Document("text", f"{n // 100}" * 60 + f" {n}", (), "x", n) for n in range(400)]
    counts: Counter[str] = Counter()
    for seed in range(60):
        counts.update(
            tokenizer.decode(row)[10] for row in draw(documents, tokenizer, Wanted(4, 32, seed)).rows
        )
    assert all(30 < counts[part] < 90 for part in "0123")  # 60 each


@pytest.mark.usefixtures("small_limits")
def test_a_long_text_is_cut_into_pieces_at_ends_of_lines(tokenizer: Any) -> None:
    lines = [row["text"] for row in texts(400, length=100)]
    found = draw([Document("text", "\n".join(lines), (), "x", 1)], tokenizer, Wanted(8, 60, 0))
    assert found.parts is not None and 10 < found.parts < 20 and found.documents == 1
    assert 500 * found.parts <= found.characters < 700 * found.parts
    unbroken = "".join(random.Random(0).choice("abcdef") for _ in range(20_000))
    rows = draw([Document("text", unbroken, (), "x", 1)], tokenizer, Wanted(2, 30, 0)).rows
    assert all(tokenizer.decode(row) in unbroken for row in rows)


# Description


def test_scripts_are_told_apart() -> None:
    found = scripts("한글 ᄒᆞᆫ 漢字 かなカナ Latin é 123 ١ Жя ,.")
    letters = {"Hangul": 5, "Han": 2, "Kana": 4, "Latin": 6, "digits": 4, "other letters": 2, "signs": 2}
    assert found == {name: pytest.approx(count / 25) for name, count in letters.items()}
    assert sum(scripts("").values()) == 0


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("SELECT name FROM t;", "SQL"), ("  WHERE a = 1", "SQL"), ("  id INTEGER PRIMARY KEY,", "SQL"),
        ("select a from t where b", "SQL"), ("LEFT JOIN x ON y", "SQL"),
        ("def f(x):", "code"), ("    return x", "code"), ("int main() {", "code"), ("const a = 5", "code"),
        ("From the window she could see the sea.", ""), ("Where is it? With whom?", ""), ("고양이가 비를 본다.", ""),
        ("Please select a colour. It is from here.", ""), ("", ""),
    ],
)  # fmt: skip
def test_lines_of_code_are_told_from_prose(line: str, kind: str) -> None:
    assert code_like(line) == {name: float(name == kind) for name in ("SQL", "code")}


def test_the_record_says_everything_that_decides_the_rows(tmp_path: Path, chat: Any) -> None:
    source = write(tmp_path / "c.jsonl", [{"messages": said(row["text"], "yes")} for row in texts(30)])
    mixture = draw_mixture(Calibration(source=source, rows=4, seq_len=32, seed=7), chat)
    special = torch.isin(mixture.rows, torch.tensor([chat.bos_token_id, *range(258, 261), 0]))
    record = mixture.record()
    assert record["special_share"] == round(float(special.float().mean()), 6) > 0
    assert json.loads(json.dumps(record)) == record
    assert {
        "source",
        "rows",
        "seq_len",
        "digest",
        "seed",
        "pack",
        "special_tokens",
        "sources",
    } <= record.keys()
    assert record["sources"][0]["kinds"] == {"messages": 30} and record["sources"][0]["weight"] == 1
