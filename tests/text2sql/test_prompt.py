"""Prompts with the embedded model's tokenizer and the bundled questions."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantlab.errors import DataError, RecipeError
from quantlab.recipe.load import parse_recipe
from quantlab.registry.tasks import Text2SqlOptions
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.prompt.few_shot import select_shots
from quantlab.text2sql.prompt.prompt import build_prompt, build_prompts, shot_text, wants_chat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
WITH_START = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"
COMMENTED = "CREATE TABLE a (x INT, y TEXT); -- 회원\nCREATE TABLE b (x INT); -- 매장\nCREATE TABLE c (z INT); -- 주문"


@pytest.fixture
def tokenizer() -> Any:
    """A fresh one, so that a template set on it stays in the test."""
    pytest.importorskip("transformers")
    from quantlab.models.load import load_tokenizer
    from quantlab.models.safetensors.files import open_files

    return load_tokenizer(open_files("embedded:base"))


@pytest.fixture
def starting(tokenizer: Any) -> Any:
    """One that puts a beginning-of-sequence token before everything, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    start = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def evaluated() -> list[Item]:
    return load_items("ko_text2sql:test")


@pytest.fixture(scope="module")
def shots(evaluated: list[Item]) -> list[Item]:
    return select_shots(load_items("ko_text2sql:train"), 3, evaluated)


def count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def test_the_defaults_are_the_plain_prompt(tokenizer: Any, evaluated: list[Item]) -> None:
    made = build_prompts(evaluated, tokenizer=tokenizer, room=896)
    assert [prompt.text for prompt in made] == [
        build_prompt(item.context, item.question) for item in evaluated
    ]
    assert all(prompt.extra == {} for prompt in made)


def test_the_plain_prompt_to_the_character() -> None:
    assert build_prompt(" CREATE TABLE t (a INTEGER);\n", " 모두? ") == (
        "당신은 질문을 SQL로 옮기는 도우미입니다. 아래 DDL에 정의된 테이블만 사용해서 Question에 답하는 SQL 쿼리 "
        "하나를 작성하세요.\n\n### DDL:\nCREATE TABLE t (a INTEGER);\n\n### Question:\n모두?\n\n### SQL:\n"
    )


def test_evidence_follows_the_question(evaluated: list[Item]) -> None:
    item = replace(evaluated[0], extra={**evaluated[0].extra, "evidence": " 서버 = server "})
    (prompt,) = build_prompts([item])
    assert f"{item.question}\nEvidence: 서버 = server\n\n### SQL:\n" in prompt.text
    for nothing in ("", "  ", None, 3):
        (prompt,) = build_prompts([replace(item, extra={"evidence": nothing})])
        assert prompt.text == build_prompt(item.context, item.question)


def test_examples_stand_before_the_prompt(evaluated: list[Item], shots: list[Item]) -> None:
    (prompt,) = build_prompts(evaluated[:1], shots=shots)
    assert prompt.text == "".join(map(shot_text, shots)) + build_prompt(
        evaluated[0].context, evaluated[0].question
    )
    assert prompt.extra == {"prompt_shots": [shot.id for shot in shots]}
    assert prompt.text.count("### SQL:\n") == 4 and prompt.text.count(";\n\n당신은") == 3


def test_chat_is_one_user_message(tokenizer: Any, evaluated: list[Item], shots: list[Item]) -> None:
    tokenizer.chat_template = CHATML
    (plain,) = build_prompts(evaluated[:1], shots=shots)
    (prompt,) = build_prompts(evaluated[:1], shots=shots, chat="auto", tokenizer=tokenizer)
    thought = "<think>\n\n</think>\n\n"  # reasoning is switched off where the template has the switch
    assert prompt.text == f"<|im_start|>user\n{plain.text}<|im_end|>\n<|im_start|>assistant\n{thought}"
    assert prompt.extra["prompt_chat"] is True
    (never,) = build_prompts(evaluated[:1], shots=shots, chat="never", tokenizer=tokenizer)
    assert never == plain


def test_chat_without_a_template(tokenizer: Any, evaluated: list[Item]) -> None:
    assert tokenizer.chat_template is None
    (prompt,) = build_prompts(evaluated[:1], chat="auto", tokenizer=tokenizer)
    assert (
        prompt.text == build_prompt(evaluated[0].context, evaluated[0].question)
        and "prompt_chat" not in prompt.extra
    )
    with pytest.raises(RecipeError, match="chat is always.*no chat template"):
        build_prompts(evaluated[:1], chat="always", tokenizer=tokenizer)
    assert not wants_chat(None, "auto")


def test_a_template_that_fails_is_the_models_fault(tokenizer: Any, evaluated: list[Item]) -> None:
    for broken in ("{{ raise_exception('no') }}", "{{ messages[0]['content'] + 1 }}", "{% for %}"):
        tokenizer.chat_template = broken
        with pytest.raises(DataError, match="chat template fails"):
            build_prompts(evaluated[:1], chat="always", tokenizer=tokenizer)


@pytest.mark.parametrize("template", [WITH_START, CHATML])
def test_the_sequence_begins_once(starting: Any, evaluated: list[Item], template: str) -> None:
    """What is generated from is tokenized with special tokens: the template's own start must not come twice."""
    starting.chat_template = template
    (prompt,) = build_prompts(evaluated[:1], chat="always", tokenizer=starting)
    ids = starting(prompt.text)["input_ids"]
    assert ids[0] == starting.bos_token_id and ids[1] != starting.bos_token_id
    if template is WITH_START:
        messages = [{"role": "user", "content": build_prompt(evaluated[0].context, evaluated[0].question)}]
        rendered = starting.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ids == starting(rendered, add_special_tokens=False)["input_ids"]


def test_a_template_keeps_its_start_where_the_tokenizer_adds_none(
    tokenizer: Any, evaluated: list[Item]
) -> None:
    tokenizer.chat_template = WITH_START
    (prompt,) = build_prompts(evaluated[:1], chat="always", tokenizer=tokenizer)
    assert prompt.text.startswith(f"{tokenizer.bos_token}[INST]")


def test_the_linker_says_which_tables_it_left(evaluated: list[Item]) -> None:
    item = replace(evaluated[0], context=COMMENTED, question="매장은 몇 개야?")
    (prompt,) = build_prompts([item], linker="lexical")
    assert prompt.extra == {"prompt_tables": ["b"]}
    assert prompt.text == build_prompt("CREATE TABLE b (x INT); -- 매장", item.question)
    unsure = replace(item, question="날씨는?")
    assert build_prompts([unsure], linker="lexical") == build_prompts([unsure])
    hinted = replace(unsure, extra={"evidence": "날씨는 주문에 있다"})
    assert build_prompts([hinted], linker="lexical")[0].tables == ("c",)


def test_examples_go_first_where_the_prompt_is_too_long(
    tokenizer: Any, evaluated: list[Item], shots: list[Item]
) -> None:
    whole = build_prompts(evaluated[:1], shots=shots)[0].text
    room = count(tokenizer, whole) - 1
    (prompt,) = build_prompts(evaluated[:1], shots=shots, tokenizer=tokenizer, room=room)
    assert prompt.text == build_prompts(evaluated[:1], shots=shots[:2])[0].text
    assert prompt.shots == tuple(shot.id for shot in shots[:2]) and prompt.cut == "1 of 3 examples"
    assert build_prompts(evaluated[:1], shots=shots, tokenizer=tokenizer, room=room + 1)[0].cut == ""


@pytest.mark.parametrize("chat", [False, True])
def test_then_the_ddl_from_its_end_then_all_else(tokenizer: Any, evaluated: list[Item], chat: bool) -> None:
    if chat:
        tokenizer.chat_template = CHATML
    longest = max(evaluated, key=lambda item: len(item.context))
    options: Any = {"tokenizer": tokenizer, "chat": "always" if chat else "never"}
    whole = count(tokenizer, build_prompts([longest], **options)[0].text)
    for room in (whole - 1, 400, 200, 120, 60):
        (prompt,) = build_prompts([longest], room=room, **options)
        assert count(tokenizer, prompt.text) <= room and prompt.extra["prompt_cut"]
        if room > 120:
            assert longest.question in prompt.text and "### SQL:\n" in prompt.text
            assert "lines of DDL" in prompt.cut
            kept = prompt.text.partition("### DDL:\n")[2].partition("\n\n### Question")[0]
            assert longest.context.strip().startswith(kept)
    (prompt,) = build_prompts([longest], room=1, **options)  # nothing fits: nothing is left, nothing raises
    assert prompt.cut.startswith("all DDL")


def test_the_options_in_a_recipe() -> None:
    recipe = parse_recipe("kind: evaluate\ntasks: {text2sql: {shots: 2, chat: auto, linker: lexical}}")
    assert parse_recipe(recipe.to_yaml()) == recipe
    assert recipe.digest() != parse_recipe("kind: evaluate\n").digest()
    for key in ("shots: 0", "chat: never", "linker: none", "shots_source: null"):
        silent = parse_recipe(f"kind: evaluate\ntasks: {{text2sql: {{{key}}}}}")
        assert silent.digest() == parse_recipe("kind: evaluate\n").digest()
    with pytest.raises(RecipeError, match="shots_source: no examples are asked for"):
        parse_recipe("kind: evaluate\ntasks: {text2sql: {shots_source: x.jsonl}}")
    with pytest.raises(RecipeError, match="shots"):
        parse_recipe("kind: evaluate\ntasks: {text2sql: {shots: -1}}")


def test_published_digests_are_those_of_their_recipes() -> None:
    runs = Path(__file__).parents[2] / "results" / "runs"
    if not runs.is_dir():
        pytest.skip("the published runs are not here")
    for folder in sorted(runs.iterdir()):
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        recipe = parse_recipe((folder / "recipe.yaml").read_text(encoding="utf-8"))
        assert recipe.digest() == record["row"]["recipe_digest"], folder.name


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> str:
    connection = sqlite3.connect(folder / "t.sqlite")
    connection.executescript(COMMENTED + "INSERT INTO b VALUES (1), (2);")
    connection.close()
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_task_asks_as_the_options_say(tokenizer: Any, tmp_path: Path) -> None:
    """Through the task, with the real model: the samples say how each question was asked."""
    pytest.importorskip("torch")
    from quantlab.evals.text2sql import evaluate
    from quantlab.models.load import load_model
    from quantlab.progress import Silent
    from quantlab.text2sql.prompt.for_model import prompt_room

    row = {"db_id": "s", "context": COMMENTED, "answer": "SELECT COUNT(*) FROM b;", "database": "t.sqlite"}
    long = (
        COMMENTED + "\nCREATE TABLE d (\n" + ",\n".join(f"  column_{i} INTEGER" for i in range(400)) + "\n);"
    )
    source = write_rows(
        tmp_path,
        [
            {**row, "id": "short", "question": "매장은 몇 개야?"},
            {**row, "id": "unsure", "question": "몇 개야?"},
            {**row, "id": "long", "question": "모두 몇 개야?", "context": long},
        ],
    )
    subject = load_model("embedded:base", device="cpu")
    subject.tokenizer.chat_template = CHATML
    assert prompt_room(subject.model, 192) == 1024 - 128 and prompt_room(subject.model, 8) == 1024 - 8
    options = Text2SqlOptions(
        data=source, shots=1, chat="auto", linker="lexical", max_new_tokens=4, batch_size=3
    )
    short, unsure, long_one = (
        sample.extra for sample in evaluate(subject, options, progress=Silent()).samples
    )
    assert short["prompt_tables"] == ["b"] and "prompt_tables" not in unsure
    assert len(short["prompt_shots"]) == 1 and short["prompt_shots"][0].startswith("train-")
    assert all(extra["prompt_chat"] for extra in (short, unsure, long_one))
    assert "lines of DDL" in long_one["prompt_cut"] and long_one["truncated"]
    assert "prompt_shots" not in long_one and "prompt_cut" not in short
