"""The published lm-eval task, through the harness's own entry points, against quantlab's own scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantlab.evals.lm_eval_tasks import FOLDER
from quantlab.evals.text2sql import score
from quantlab.progress import Silent
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.prompt.few_shot import select_shots
from quantlab.text2sql.prompt.prompt import build_prompt, build_prompts

lm_eval = pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def subject() -> Any:
    from quantlab.models.load import load_model

    return load_model("embedded:base", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return load_items("ko_text2sql:test")


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def run_harness(subject: Any, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=4, device="cpu")
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    settings = {"task_manager": manager, "bootstrap_iters": 0, "gen_kwargs": "max_gen_toks=24", **options}
    return lm_eval.simple_evaluate(model=model, **settings)


def agrees_with_quantlab(rows: list[dict[str, Any]], items: list[Item]) -> None:
    """Each logged sample has the verdict that quantlab gives to the same output."""
    known = {item.id: item for item in items}
    asked = [known[row["doc"]["id"]] for row in rows]
    own = score(asked, [row["filtered_resps"][0] for row in rows], progress=Silent())
    for row, sample in zip(rows, own, strict=True):
        assert row["verdict"].partition(": ")[::2] == (sample.verdict, sample.why)
        assert (row["ex"], row["em"]) == (sample.verdict == "ok", sample.extra["exact"])


def test_the_python_entry(subject: Any, items: list[Item]) -> None:
    found = run_harness(subject, tasks=["quantlab_ko_text2sql"], limit=4)
    rows = found["samples"]["quantlab_ko_text2sql"]
    assert [row["doc"]["id"] for row in rows] == [item.id for item in items[:4]]
    for row, item in zip(rows, items, strict=False):
        assert row["arguments"][0][0] == build_prompt(item.context, item.question)
        assert row["target"] == item.answer
        assert str(ROOT) not in json.dumps(row["doc"])  # its hash is the same everywhere
    agrees_with_quantlab(rows, items)
    scores = found["results"]["quantlab_ko_text2sql"]
    assert scores["ex,none"] == sum(row["ex"] for row in rows) / 4
    assert sum(int(part.split()[0]) for part in scores["verdict,none"].split(", ")) == 4
    json.dumps(found["results"])


def test_examples_are_those_of_the_recipe_option(subject: Any) -> None:
    found = run_harness(subject, tasks=["quantlab_ko_text2sql_dev"], limit=1, num_fewshot=1)
    (row,) = found["samples"]["quantlab_ko_text2sql_dev"]
    dev = load_items("ko_text2sql:dev")
    shots = select_shots(load_items("ko_text2sql:train"), 1, dev)
    assert row["arguments"][0][0] == build_prompts(dev[:1], shots=shots)[0].text


def test_the_command_line(tmp_path: Path, items: list[Item]) -> None:
    """As a user types it: the folder from quantlab, the rest is the harness."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    printed = subprocess.run(
        [sys.executable, "-m", "quantlab.evals.lm_eval_tasks"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    folder = printed.stdout.strip()
    assert Path(folder) == FOLDER
    model = ROOT / "quantlab" / "models" / "embedded" / "base"
    ended = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32",
         "--tasks", "quantlab_ko_text2sql", "--include_path", folder, "--limit", "2", "--device", "cpu",
         "--gen_kwargs", "max_gen_toks=24", "--output_path", str(tmp_path / "out"), "--log_samples"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "quantlab_ko_text2sql" in ended.stdout and "verdict" in ended.stdout
    (samples,) = (tmp_path / "out").rglob("samples_quantlab_ko_text2sql_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2
    agrees_with_quantlab(rows, items)


def test_within_quantlab_without_a_path(
    subject: Any, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without scanning the harness's own thousands of files."""
    import lm_eval.tasks

    from quantlab.evals import run_task
    from quantlab.recipe.base import TaskOptions

    original, defaults = lm_eval.tasks.TaskManager, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        defaults.append(kwargs["include_defaults"])
        return original(*args, **kwargs)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", noted)
    name = "lm-eval:quantlab_ko_text2sql"
    options = TaskOptions.model_validate({"lm_eval": {"limit": 1}}).of(name)
    found = run_task(name, subject, options, progress=Silent())
    assert defaults == [False]
    (sample,) = found.samples
    (own,) = score(items[:1], [sample.output], progress=Silent())
    assert (sample.verdict, sample.why) == (own.verdict, own.why)
    assert found.metrics["ex"] == (own.verdict == "ok") and found.metrics["items"] == 1
    assert "verdict" not in found.metrics


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("SELECT guild_name FROM guilds WHERE server = '아르카나'", "ok"),
        ("SELECT guild_name FROM guilds\n-- 없음", "wrong"),
        ("SELECT x FROM nowhere", "error"),
        ("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT COUNT(*) FROM c", "timeout"),
        ("DROP TABLE guilds", "error"),
        ("모르겠습니다.", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_every_verdict(items: list[Item], answer: str, verdict: str) -> None:
    from quantlab.evals.lm_eval_tasks import ko_text2sql

    doc = next(iter(ko_text2sql.dataset("test")["test"]))
    found = ko_text2sql.score(doc, [answer])
    (own,) = score(items[:1], [answer], progress=Silent())
    assert found["verdict"].partition(": ")[::2] == (own.verdict, own.why) and own.verdict == verdict
    assert found["ex"] == (verdict == "ok")
    assert (found["verdict"] == "ok") == (not own.why)


def test_words_for_the_table() -> None:
    from quantlab.evals.lm_eval_tasks.ko_text2sql import count_verdicts

    assert count_verdicts(["ok", "error: no such table: a: b", "ok: in another order"]) == "2 ok, 1 error"


@pytest.mark.parametrize("split", ["test", "dev"])
def test_every_gold_is_right(split: str) -> None:
    from quantlab.evals.lm_eval_tasks import ko_text2sql

    docs = list(ko_text2sql.dataset(split)[split])
    found = [ko_text2sql.score(doc, [ko_text2sql.target(doc).removesuffix(";")]) for doc in docs]
    assert all(scores["ex"] == scores["em"] == 1.0 and scores["verdict"].startswith("ok") for scores in found)
    assert len(found) == {"test": 126, "dev": 252}[split]
