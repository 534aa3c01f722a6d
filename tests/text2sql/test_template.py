"""Wordings of the Text2SQL prompt: the bundled ones to the byte, files that are wrong, the choice by the script."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab.errors import DataError, RecipeError
from quantlab.recipe.load import parse_recipe
from quantlab.registry.tasks import PromptOptions, Text2SqlOptions
from quantlab.text2sql.data.dataset import digest, load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.prompt.for_model import as_asked, options_digest, template_of
from quantlab.text2sql.prompt.prompt import build_prompts, item_prompt
from quantlab.text2sql.prompt.template import (
    MAX_FILE,
    bundled_template,
    choose_template,
    hangul_share,
    read_template,
)

KOREAN = (
    "당신은 질문을 SQL로 옮기는 도우미입니다. "
    "아래 DDL에 정의된 테이블만 사용해서 Question에 답하는 SQL 쿼리 하나를 작성하세요."
    "\n\n### DDL:\nCREATE TABLE t (a INT);\n\n### Question:\n모두?\nEvidence: a는 나이\n\n### SQL:\n"
)
ENGLISH = (
    "You translate questions into SQL. Write one SQL query that answers the Question, using only the tables defined in "
    "the DDL below.\n\n### DDL:\nCREATE TABLE t (a INT);\n\n### Question:\nAll?\nEvidence: a is the age\n\n### SQL:\n"
)
MINE = """# mine
version: 3
instruction: Answer in SQL.
schema: |
  Tables {{as JSON}}:
  {schema}
question: "Q: {question}"
evidence: "Hint: {evidence}"
answer: "A:"
"""


def item(question: str = "All?", **more: object) -> Item:
    return Item("1", "d", "CREATE TABLE t (a INT);", question, "SELECT a FROM t", **more)  # type: ignore[arg-type]


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_bundled_ones_to_the_byte() -> None:
    """Students were trained on the Korean one: another wording needs another version."""
    found = bundled_template("ko"), bundled_template("en")
    assert [one.name for one in found] == ["ko-1", "en-1"]
    assert found[0].write(" CREATE TABLE t (a INT);\n", " 모두? ", "a는 나이\n") == KOREAN
    assert found[1].write("CREATE TABLE t (a INT);", "All?", "a is the age") == ENGLISH
    assert found[0].digest == "521ab31d92799800" and found[1].digest == "0362351d3f84f555"


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    found = read_template(write(tmp_path, MINE))
    assert found.write("CREATE TABLE t (a INT);", "All?", "x") == (
        "Answer in SQL.\n\nTables {as JSON}:\nCREATE TABLE t (a INT);\n\nQ: All?\nHint: x\n\nA:\n"
    )
    assert found.write("C", "All?").count("Hint") == 0
    assert found.name == f"mine.yaml#{found.digest[:8]}"
    # comments and versions change no prompt; every part does
    assert read_template(write(tmp_path, MINE.replace("# mine", "# ours"))).digest == found.digest
    for old, new in (
        ("in SQL", "in sql"),
        ("Q: ", "q: "),
        ("Hint", "hint"),
        ("A:", "B:"),
        ("Tables", "tables"),
    ):
        assert read_template(write(tmp_path, MINE.replace(old, new))).digest != found.digest


def test_an_instruction_may_be_empty(tmp_path: Path) -> None:
    found = read_template(write(tmp_path, MINE.replace("Answer in SQL.", '""')))
    assert found.write("C", "All?").startswith("Tables {as JSON}:\nC\n\n")


def test_what_is_put_in_is_never_a_template(tmp_path: Path) -> None:
    found = read_template(write(tmp_path, MINE))
    hostile = "{schema} {question} {{}} {0} {evidence}"
    assert found.write(hostile, hostile, hostile).count(hostile) == 3
    assert bundled_template("ko").write(hostile, hostile, hostile).count(hostile) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINE.replace("{schema}", "none"), r"mine.yaml:4: schema: lacks the placeholder \{schema\}"),
        (MINE.replace("{question}", "x"), r"mine.yaml:7: question: lacks the placeholder \{question\}"),
        (MINE.replace("{evidence}", "x"), r"mine.yaml:8: evidence: lacks the placeholder \{evidence\}"),
        (MINE + 'values: "{table} {values}"\n', r"mine.yaml:10: values: lacks the placeholder \{column\}"),
        (MINE.replace("A:", "A {answer}:"), r"mine.yaml:9: answer: unknown placeholder \{answer\}"),
        (MINE.replace("Q: {question}", "{question} {quesion}"), r"unknown placeholder \{quesion\}"),
        (MINE.replace("Hint", "{Hint"), r"mine.yaml:8: evidence: a single '\{'"),
        (MINE.replace("{{as", "{ as"), r"mine.yaml:4: schema: a single '\{'"),
        (MINE.replace("answer:", "anwser:"), r"mine.yaml:9: anwser: unknown key; did you mean 'answer'\?"),
        (MINE.replace('answer: "A:"\n', ""), r"mine.yaml:\d+: answer: missing"),
        (MINE.replace("Answer in SQL.", "[a, b]"), r"mine.yaml:3: instruction: expected text, found list"),
        (MINE.replace('"A:"', '" "'), r"mine.yaml:9: answer: is empty"),
        (MINE.replace('"A:"', "null"), r"mine.yaml:9: answer: expected text, found NoneType"),
        (MINE.replace("version: 3", "version: x"), r"mine.yaml:2: version: expected a whole number"),
        (MINE.replace('"A:"', '"\\e[0m"'), r"mine.yaml:9: answer: control character"),
        (MINE + "answer: B\n", r"mine.yaml:10: answer: key given twice"),
        (MINE.replace("Answer in SQL.", "x" * 20000), r"mine.yaml:3: instruction: 20,000 characters"),
        (MINE.replace("Answer in SQL.", "&a text").replace('"A:"', "*a"), r"mine.yaml:9: an alias"),
        (MINE.replace('"A:"', '"A:'), r"mine.yaml:\d+: not YAML"),
        (MINE + 'values: "{table}\\n{column} {values}"\n', r"mine.yaml:10: values: must be one line"),
        ("- a\n", r"mine.yaml: expected a mapping"),
        ("", r"mine.yaml: expected a mapping"),
        ("#" * (MAX_FILE + 1), r"65,537 bytes"),
    ],
)
def test_what_is_wrong_is_named_by_file_line_and_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_template(write(tmp_path, text))


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["instruction: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(DataError, match=r"mine.yaml:2: an alias"):
        read_template(write(tmp_path, "\n".join(lines)))


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (["길드 이름을 모두 보여줘"], "ko"),
        (["players 테이블에서 name 컬럼을 보여줘"], "ko"),
        (["Show all guilds"], "en"),
        (["How many shops are there in 서울?"], "en"),
        (["길드는 몇 개야?", "How many guilds are there in all of the servers?"], "en"),
        (["ㅋㅋ"], "ko"),
        (["길드"], "ko"),  # decomposed
        (["123 !?"], "en"),
        (["プレイヤーの名前"], "en"),
        ([], "en"),
    ],
)
def test_auto_goes_by_the_script(texts: list[str], language: str) -> None:
    assert choose_template("auto", None, texts) == bundled_template(language)


def test_every_bundled_question_is_korean() -> None:
    for split in ("test", "dev", "train"):
        items = load_items(f"ko_text2sql:{split}", 200)
        assert min(hangul_share([one.question]) for one in items) > 0.25
        assert template_of(PromptOptions(), items).name == "ko-1"


def test_digests(tmp_path: Path) -> None:
    """Korean data keep theirs; another wording is other data; a recipe's digest moves only where a key is used."""
    plain = Text2SqlOptions(data="ko_text2sql/test.jsonl", limit=5)
    rows = load_items("ko_text2sql/test.jsonl", 5)
    path = write(tmp_path, MINE)

    def asked(**prompt: object) -> str:
        return options_digest(plain.model_copy(update={"prompt": PromptOptions(**prompt)}))  # type: ignore[arg-type]

    assert options_digest(plain) == asked(language="ko") == digest(rows)
    others = {asked(language="en"), asked(file=str(path)), asked(values=2), asked(values=3)}
    write(tmp_path, MINE.replace("Q:", "q:"))
    others.add(asked(file=str(path)))
    assert len(others | {digest(rows)}) == 6
    hub = Text2SqlOptions(data="hf:owner/name:test")
    by_name = options_digest(hub)
    assert options_digest(hub.model_copy(update={"prompt": PromptOptions(language="en")})) != by_name
    base = parse_recipe("kind: evaluate\n").digest()
    assert parse_recipe("kind: evaluate\ntasks: {text2sql: {prompt: {language: auto}}}\n").digest() == base
    assert parse_recipe("kind: evaluate\ntasks: {text2sql: {prompt: {language: en}}}\n").digest() != base


def test_a_recipe_that_asks_for_two_wordings_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"prompt\.language: a file is a wording of its own"):
        parse_recipe("kind: evaluate\ntasks: {text2sql: {prompt: {language: en, file: x.yaml}}}\n")
    with pytest.raises(RecipeError, match="did you mean"):
        parse_recipe("kind: evaluate\ntasks: {text2sql: {prompt: {langauge: en}}}\n")
    with pytest.raises(DataError, match="no such file"):
        as_asked([item()], PromptOptions(file="nowhere.yaml"))


def test_examples_are_written_like_the_prompt(tmp_path: Path) -> None:
    found = read_template(write(tmp_path, MINE))
    (prompt,) = build_prompts([item()], shots=[item("First?")], template=found)
    assert prompt.text == (
        item_prompt(item("First?"), template=found)
        + "SELECT a FROM t;\n\n"
        + item_prompt(item(), template=found)
    )


def test_an_example_prompt_is_in_the_language_of_the_instruction() -> None:
    assert (
        "책 제목을" in bundled_template("ko").example()
        and "titles of all books" in bundled_template("en").example()
    )
