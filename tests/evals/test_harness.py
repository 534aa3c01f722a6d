"""A local lm-eval task, offline, against the same log-likelihoods computed by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.errors import RecipeError
from quantlab.evals import run_task
from quantlab.progress import Silent
from quantlab.recipe.base import TaskOptions

pytest.importorskip("lm_eval")

DOCUMENTS = [
    {"q": "The players like", "a": " small games", "b": " players small", "label": 0},
    {"q": "SELECT name FROM", "a": " games", "b": " players", "label": 1},
    {"q": "Show every", "a": " table", "b": " game", "label": 0},
]
YAML = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{[a, b]}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "tasks" / "data.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    (data.parent / "tiny.yaml").write_text(YAML.replace("FILE", json.dumps(str(data))))
    return data.parent


def options(folder: Path, task: str = "tiny_choice", **more: Any) -> Any:
    content = {"lm_eval": {"include_path": str(folder), **more}}
    return TaskOptions.model_validate(content).of(f"lm-eval:{task}")


def log_likelihood(subject: Any, context: str, continuation: str) -> float:
    before = subject.tokenizer(context)["input_ids"]
    whole = torch.tensor([subject.tokenizer(context + continuation)["input_ids"]])
    with torch.inference_mode():
        logits = subject.model(input_ids=whole).logits.log_softmax(-1)
    positions = range(len(before) - 1, whole.shape[1] - 1)
    return sum(float(logits[0, at, whole[0, at + 1]]) for at in positions)


def test_a_local_task(tiny: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert os.environ["HF_DATASETS_CACHE"]
    found = run_task("lm-eval:tiny_choice", tiny, options(folder), progress=Silent())
    right = []
    for row in DOCUMENTS:
        scores = [log_likelihood(tiny, row["q"], row[choice]) for choice in ("a", "b")]
        right.append(scores.index(max(scores)) == row["label"])
    assert found.task == "lm-eval:tiny_choice"
    assert found.metrics["acc"] == pytest.approx(sum(right) / len(right))
    assert [sample.verdict == "ok" for sample in found.samples] == right
    assert [sample.id for sample in found.samples] == [f"tiny_choice:{i}" for i in range(3)]
    assert capsys.readouterr().out == ""


def test_a_limit(tiny: Any, folder: Path) -> None:
    assert (
        run_task("lm-eval:tiny_choice", tiny, options(folder, limit=2), progress=Silent()).metrics["items"]
        == 2
    )


def test_an_unknown_task_names_the_nearest(tiny: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    original = lm_eval.tasks.TaskManager

    def without_defaults(*args: Any, **kwargs: Any) -> Any:
        # scanning thousands of files takes seconds
        return original(*args, **{**kwargs, "include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", without_defaults)
    with pytest.raises(RecipeError, match="no task 'tiny_choise'") as caught:
        run_task("lm-eval:tiny_choise", tiny, options(folder, task="tiny_choise"), progress=Silent())
    assert "tiny_choice" in caught.value.hint
