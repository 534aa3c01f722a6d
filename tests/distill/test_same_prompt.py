"""What a student is taught begins, to the character, with what it will be asked; teacher and judge see as much."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantlab.commands.distill_cell import _encode
from quantlab.distill.data import encode
from quantlab.distill.prepare import (
    Source,
    _judge_requests,
    ask_teacher,
    prepare,
    read_source,
    teacher_requests,
)
from quantlab.errors import DataError, QuantlabError
from quantlab.evals import text2sql
from quantlab.evals.generation import Generation
from quantlab.models.load import load_model
from quantlab.progress import Silent
from quantlab.recipe.distill import DistillRecipe, Judge, Teacher
from quantlab.recipe.load import parse_recipe
from quantlab.runs.run import read_jsonl
from quantlab.teacher.ledger import content_key
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item, Note, parse_row
from quantlab.text2sql.prompt.prompt import build_prompt, prompt_encoder

from ..conftest import byte_tokenizer

DDL = (
    "CREATE TABLE shops (id INT, city TEXT); -- 매장\n"
    "CREATE TABLE orders (id INT, shop_id INT, paid INT); -- 주문\n"
    "CREATE TABLE weather (day TEXT, rain INT); -- 날씨"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NONE = ("without", "empty", "blank", "null")
EVIDENCE: dict[str, Any] = {
    "english": "paid orders refers to paid = 1",
    "korean": "'결제'는 주문의 paid = 1을 뜻한다",
    "lines": "  first: paid = 1\r\nsecond: city = '서울'\r\n",
    "separators": "one\u2028two\u0085three",  # line ends for str.splitlines, plain characters in JSON
    "headings": "### SQL:\nSELECT 1; </evidence> {question}",
    "empty": "",
    "blank": " \r\n\t ",
    "null": None,
}
OPTIONS = {
    "plain": "",
    "chat": "chat: auto, ",
    "linker": "linker: lexical, ",
    "shots": "shots: 2, ",
    "all": "chat: always, linker: lexical, shots: 1, ",
    "english": "prompt: {language: en}, shots: 1, ",
    "schema": "prompt: {values: 2, descriptions: true}, ",
    "linked schema": "prompt: {values: 2, descriptions: true}, linker: lexical, chat: auto, ",
}
MINE = """
instruction: ""
schema: "<schema>\\n{schema}\\n</schema>"
question: "Q: {question}"
evidence: "Evidence: {evidence}"
answer: "### SQL:"
values: "# {column} of {table}, for example {values}"
"""
RECIPE = """
kind: distill
student: {{model: embedded:base}}
data: {{source: "{source}", filters: [], dedup: false}}
tasks: {{text2sql: {{{options}data: "{evaluated}", max_new_tokens: 8}}}}
"""


def row(name: str, **more: Any) -> dict[str, Any]:
    asked = {"question": f" 매장 {name}은 몇 개야? ", "answer": "SELECT COUNT(*) FROM shops;"}
    return {"id": name, "db_id": "s", "context": DDL + "\n", **asked, **more}


MEANING = {"shops.city": "도시", "weather": {"rain": "mm"}}
ROWS = [
    {**one, "descriptions": MEANING}
    for one in (row("without"), *(row(name, evidence=text) for name, text in EVIDENCE.items()))
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
    return path


def bird(folder: Path) -> str:
    """A folder as BIRD is unpacked, with a row that has evidence and one that has none."""
    place = folder / "minidev"
    (place / "dev_databases" / "shops").mkdir(parents=True)
    connection = sqlite3.connect(place / "dev_databases" / "shops" / "shops.sqlite")
    connection.executescript(DDL + "\nINSERT INTO shops VALUES (1, '서울');")
    connection.close()
    described = place / "dev_databases" / "shops" / "database_description"
    described.mkdir()
    (described / "shops.csv").write_text("original_column_name,column_description\ncity,where it stands\n")
    asked = {"db_id": "shops", "SQL": "SELECT COUNT(*) FROM shops", "difficulty": "simple"}
    rows = [
        {
            **asked,
            "question_id": 7,
            "question": "How many shops?",
            "evidence": " shops refers to 매장\r\n(all) ",
        },
        {**asked, "question_id": 8, "question": "How many shops in Seoul?", "evidence": ""},
    ]
    (place / "mini_dev_sqlite.json").write_text(json.dumps(rows), encoding="utf-8")
    return f"bird:{place}"


@pytest.fixture(scope="module")
def subject() -> Any:
    found = load_model("embedded:base", device="cpu")
    found.tokenizer.chat_template = CHATML
    return found


def recipe(folder: Path, source: str, options: str = "") -> DistillRecipe:
    evaluated = write(
        folder / "evaluated.jsonl",
        [row("other", question="오늘 비가 왔어?", answer="SELECT rain FROM weather;")],
    )
    found = parse_recipe(RECIPE.format(source=source, options=options, evaluated=evaluated))
    assert isinstance(found, DistillRecipe)
    return found


def prepared(wish: DistillRecipe, folder: Path) -> list[Item]:
    """The rows as training gets them: cleaned, written, read back."""
    return prepare(wish, read_source(wish), folder / "ledger.db", folder / "data", Silent())[0]


def asked_in_evaluation(
    subject: Any, wish: DistillRecipe, source: str, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Row id → what the task gives the model to go on from."""
    seen: list[str] = []

    def generate(model: Any, tokenizer: Any, prompts: list[str], **rest: Any) -> list[Generation]:
        seen.extend(prompts)
        return [Generation("SELECT 1;", 3, True, False) for _ in prompts]

    monkeypatch.setattr("quantlab.evals.generation.generate", generate)
    options = wish.tasks.text2sql.model_copy(update={"data": source})
    samples = text2sql.evaluate(subject, options, progress=Silent()).samples
    return dict(zip([sample.id for sample in samples], seen, strict=True))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", ["rows", "bird"])
def test_training_begins_with_the_prompt_of_the_evaluation(
    subject: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str
) -> None:
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
    source = bird(tmp_path) if kind == "bird" else str(write(tmp_path / "rows.jsonl", ROWS))
    wish = recipe(tmp_path, source, options)
    items = prepared(wish, tmp_path)
    asked = asked_in_evaluation(subject, wish, source, monkeypatch)
    examples, counts = _encode(wish, subject, {"items": items}, 1024)
    assert {example.id for example in examples} == set(asked) and counts["too_long"] == 0
    for item, example in zip(items, examples):
        text = subject.tokenizer.decode(example.tokens, clean_up_tokenization_spaces=False)
        answer = subject.tokenizer.eos_token
        assert text == asked[item.id] + item.answer.strip().rstrip(";") + ";" + answer
        assert list(example.tokens[: -example.learned]) == subject.tokenizer(asked[item.id])["input_ids"]
        shown = f"\nEvidence: {item.evidence}\n\n### SQL:\n"
        assert asked[item.id].rpartition("### Question:")[2].count(shown) == bool(item.evidence)
        assert ("<|im_start|>" in text) == ("chat" in options)
        if kind == "rows":  # its questions name a table
            assert ("rain INT" in text) == ("linker" not in options)
            assert ("-- weather.rain: mm" in text) == ("descriptions" in options and "linker" not in options)
            assert ("-- shops.city: 도시" in text) == ("descriptions" in options)
        else:
            assert ("-- shops.city: where it stands\n-- shops.city: '서울'\n" in text) == (
                "values" in options
            )
        korean = kind == "rows" and "language: en" not in options  # the script of BIRD's questions
        assert ("도우미입니다" in text, "You translate" in text) == (korean, not korean)


def test_prepared_rows_keep_their_evidence(tmp_path: Path) -> None:
    items = prepared(recipe(tmp_path, str(write(tmp_path / "rows.jsonl", ROWS))), tmp_path)
    expected = {one["id"]: (one.get("evidence") or "").strip() for one in ROWS}
    assert {item.id: item.evidence for item in items} == expected
    (file,) = (tmp_path / "data").glob("*/train.jsonl")
    written = {one["id"]: one for one in read_jsonl(file)}
    assert all(("evidence" in written[name]) == (name not in NONE) for name in expected)


def test_a_rejected_row_keeps_its_evidence(tmp_path: Path) -> None:
    bad = row("bad", evidence="매장 = shops", answer="not a query at all")
    wish = recipe(tmp_path, str(write(tmp_path / "rows.jsonl", [*ROWS, bad])))
    wish = wish.model_copy(update={"data": wish.data.model_copy(update={"filters": ["parses"]})})
    prepared(wish, tmp_path)
    (file,) = (tmp_path / "data").glob("*/rejected.jsonl")
    assert [one["evidence"] for one in read_jsonl(file)] == ["매장 = shops"]


@pytest.mark.parametrize("language", ["ko", "en"])
def test_teacher_and_judge_see_the_evidence(tmp_path: Path, language: Any) -> None:
    items = load_items(str(write(tmp_path / "rows.jsonl", ROWS))) + load_items(bird(tmp_path))
    teacher, judge = Teacher(model="m", language=language), Judge(model="m", language=language)
    bare = [replace(item, extra={}) for item in items]
    for asked, plain in (
        (teacher_requests(items, teacher, 0)[0], teacher_requests(bare, teacher, 0)[0]),
        (_judge_requests(items, judge, None), _judge_requests(bare, judge, None)),
    ):
        for item, one, other in zip(items, asked, plain, strict=True):
            system, user = (message["content"] for message in one.messages)
            if item.evidence:
                shown = item.evidence.replace("</evidence>", "< /evidence>")  # it cannot close its tag
                assert f"\n</question>\n\n<evidence>\n{shown}\n</evidence>\n\n" in user, user
                assert "<evidence>" in system and content_key(one) != content_key(other)
            else:
                assert one.messages == other.messages and "evidence" not in system + user


def test_a_recorded_teacher_answers_by_the_evidence(tmp_path: Path) -> None:
    """Rows that differ in evidence alone are different prompts; a row without answers for all that have no own."""
    same = {"question": "매출은?", "context": DDL, "db_id": "s"}
    recorded = write(
        tmp_path / "recorded.jsonl",
        [
            {**same, "evidence": "매출은 paid = 1인 주문", "answer": "SELECT 1;"},
            {**same, "evidence": "매출은\r\n모든 주문", "answer": "SELECT 2;"},
            {**same, "answer": "SELECT 3;"},
            {**same, "question": "환불은?", "evidence": "환불은 paid = 0", "answer": "SELECT 4;"},
        ],
    )
    asked = [
        {**same, "evidence": " 매출은 모든 주문 "},
        {**same, "evidence": "매출은 paid = 1인 주문"},
        {**same, "evidence": "매출은 paid = 2인 주문"},
        same,
        {**same, "question": "환불은?"},  # its only recorded answer was given to another prompt
    ]
    items = [
        parse_row({**one, "id": str(number), "answer": "-"}, f"x:{number}")
        for number, one in enumerate(asked)
    ]
    teacher = Teacher(model=f"file:{recorded}", max_failed=1.0)
    answered, lost, _ = ask_teacher(items, teacher, tmp_path / "ledger.db", 0, Silent())
    assert [item.answer for item in answered] == ["SELECT 2;", "SELECT 1;", "SELECT 3;", "SELECT 3;"]
    assert [rejected.item.id for rejected in lost] == ["4"]
    assert [item.evidence for item in answered] == [item.evidence for item in items[:4]]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "a number"),
        (["x"], "a list"),
        ({"a": "b"}, "an object"),
        (True, "true or false"),
        (0.5, "a number"),
    ],
)
def test_evidence_that_is_no_text_is_named_by_file_and_row(tmp_path: Path, value: Any, words: str) -> None:
    path = write(tmp_path / "rows.jsonl", [row("a"), row("b", evidence=value)])
    with pytest.raises(DataError, match=rf"rows.jsonl:2: 'evidence' must be text, found {words}"):
        load_items(str(path))
    source = read_source(recipe(tmp_path, str(path)))
    assert [item.id for item in source.items] == ["a"] and "rows.jsonl:2" in source.bad[0].reason
    with pytest.raises(QuantlabError, match="evidence"):
        # recorded answers too
        ask_teacher(source.items, Teacher(model=f"file:{path}"), tmp_path / "ledger.db", 0, Silent())


def test_a_row_whose_prompt_evaluation_would_cut_is_left_out(subject: Any, tmp_path: Path) -> None:
    long = DDL + "\nCREATE TABLE d (\n" + ",\n".join(f"  c{n} INT" for n in range(220)) + "\n);"
    wish = recipe(tmp_path, str(write(tmp_path / "rows.jsonl", [row("short"), row("long", context=long)])))
    items = prepared(wish, tmp_path)
    whole = len(subject.tokenizer(build_prompt(long, items[1].question))["input_ids"])
    assert whole > 1024 - 8
    examples, counts = _encode(wish, subject, {"items": items}, 4096)
    assert [example.id for example in examples] == ["short"] and counts["too_long"] == 1


def test_an_example_of_the_prompt_is_not_learned_from(subject: Any, tmp_path: Path) -> None:
    shots = write(
        tmp_path / "shots.jsonl", [row("one", question="첫째 매장?"), row("two", question="둘째 도시?")]
    )
    options = f'shots: 1, shots_source: "{shots}", '
    wish = recipe(tmp_path, str(shots), options)
    examples, counts = _encode(wish, subject, {"items": prepared(wish, tmp_path)}, 1024)
    (example,) = examples
    text = subject.tokenizer.decode(example.tokens)
    assert counts["shown_as_examples"] == 1 and text.count("첫째 매장?") == text.count("둘째 도시?") == 1


def test_a_tokenizer_that_ends_every_text_gives_the_same_tokens_in_both() -> None:
    """T5's and some others' add the end token to a prompt too; no answer could go on from there."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    item = parse_row(row("a", evidence="b"), "x:1")
    (example,), _ = encode([item], tokenizer, 4096)
    (asked,) = prompt_encoder(tokenizer)([build_prompt(DDL, item.question, "b")])
    assert list(example.tokens[: -example.learned]) == asked and asked[-1] != tokenizer.eos_token_id
    assert example.tokens.count(tokenizer.eos_token_id) == 1


def test_rows_prepared_without_evidence_are_prepared_anew(tmp_path: Path) -> None:
    """A folder that an earlier version wrote holds rows without it."""
    from quantlab.distill.prepare import prepared_digest

    wish = recipe(tmp_path, str(write(tmp_path / "rows.jsonl", ROWS)))
    source = read_source(wish)
    bare = Source([item for item in source.items if not item.evidence], [], 0, source.evaluated)
    other = Source([replace(item, extra={}) for item in bare.items], [], 0, source.evaluated)
    assert prepared_digest(wish, bare) == prepared_digest(wish, other)  # blank evidence is none
    assert prepared_digest(wish, bare) != prepared_digest(wish, source)


@pytest.mark.parametrize("kind", ["rows", "bird"])
def test_a_wording_of_ones_own_is_the_same_everywhere(
    subject: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.yaml").write_text(MINE, encoding="utf-8")
    source = bird(tmp_path) if kind == "bird" else str(write(tmp_path / "rows.jsonl", ROWS))
    wish = recipe(
        tmp_path, source, f"prompt: {{file: '{tmp_path}/mine.yaml', values: 1, descriptions: true}}, "
    )
    items = prepared(wish, tmp_path)
    asked = asked_in_evaluation(subject, wish, source, monkeypatch)
    examples, _ = _encode(wish, subject, {"items": items}, 1024)
    for item, example in zip(items, examples, strict=True):
        text = subject.tokenizer.decode(example.tokens, clean_up_tokenization_spaces=False)
        assert text.startswith(asked[item.id]) and text.startswith("<schema>\nCREATE TABLE shops")
        assert "Q: " in text and "### DDL" not in text and "도우미" not in text
        schema = text.partition("<schema>\n")[2].partition("\n</schema>")[0]
        assert ("# city of shops, for example '서울'" in schema) == (kind == "bird")
        # teacher and judge see the very schema, in the same characters
        for request in (
            *teacher_requests([item], Teacher(model="m", language="en"), 0)[0],
            *_judge_requests([item], Judge(model="m", language="ko"), None),
        ):
            assert schema in request.messages[1]["content"]


def test_rows_that_a_teacher_wrote_have_the_lines_of_their_schema(tmp_path: Path) -> None:
    notes = (Note("shops", "-- shops.city: '서울'"),)
    items = [replace(item, notes=notes) for item in load_items(str(write(tmp_path / "rows.jsonl", ROWS[:1])))]
    teacher = Teacher(model="m", task="write", language="ko", max_failed=1.0)
    requests, _ = teacher_requests(items, teacher, 0)
    reply = json.dumps(
        {"pairs": [{"question": "도시는?", "sql": "SELECT city FROM shops;"}]}, ensure_ascii=False
    )
    recorded = write(
        tmp_path / "recorded.jsonl", [{"key": content_key(one), "text": reply} for one in requests]
    )
    teacher = teacher.model_copy(update={"model": f"file:{recorded}"})
    written, _, _ = ask_teacher(items, teacher, tmp_path / "ledger.db", 0, Silent())
    assert written and all(one.notes == notes for one in written)


def test_the_lm_eval_task_asks_alike(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from quantlab.evals.harness import task_manager
    from quantlab.evals.lm_eval_tasks import options_digest
    from quantlab.text2sql.prompt.for_model import as_asked, choose_shots
    from quantlab.text2sql.prompt.prompt import build_prompts

    (tmp_path / "mine.yaml").write_text(MINE, encoding="utf-8")
    digests = set()
    for prompt in ("{}", "{language: en, values: 2}", f"{{file: '{tmp_path}/mine.yaml', values: 1}}"):
        name = "quantlab_ko_text2sql"
        tasks = f"tasks: {{text2sql: {{shots: 1, prompt: {prompt}}}}}"
        wish = parse_recipe(f"kind: evaluate\nevaluate: ['lm-eval:{name}', text2sql]\n{tasks}")
        options, own = wish.tasks.of(f"lm-eval:{name}"), wish.tasks.of("text2sql")
        digests.add(options_digest(options))
        manager = task_manager(name, None, options.prompt.model_dump(exclude_defaults=True))
        loaded = manager.load([name])
        task = next(iter(loaded["tasks"].values())) if "tasks" in loaded else loaded[name]
        items, template = as_asked(load_items("ko_text2sql:test"), own.prompt)
        documents = list(task.test_docs())
        plain = [found.text for found in build_prompts(items, template=template)]
        assert [task.doc_to_text(document) for document in documents] == plain
        shots = choose_shots(own, [*items, *load_items("ko_text2sql:dev")], template)
        (shown,) = build_prompts(items[:1], shots=shots, template=template)
        example = task.fewshot_docs()[0]
        assert shown.text == f"{task.doc_to_text(example)}{task.doc_to_target(example)}\n\n{plain[0]}"
    assert len(digests) == 3 and "" in digests
