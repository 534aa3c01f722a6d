"""Training with the real trainer: what it minimises, kill -9 and resume, several processes, early stop, logits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.distill import train as training
from quantlab.distill.data import encode_texts, pack, split_off
from quantlab.distill.logits import gather_logits
from quantlab.distill.student import merged, open_student, probe, settle
from quantlab.distill.train import WHOLE, LogitLoss, Settings, Trained, last_checkpoint, train
from quantlab.models.load import load_model
from quantlab.progress import Silent

from ..conftest import WORDS

# Run by the tests in a process of its own, which can be killed: python -c SCRIPT model folder result steps
SCRIPT = """
import json, sys
from pathlib import Path
from tests.distill.test_train import run
model, folder, result = map(Path, sys.argv[1:4])
found = run(model, folder, steps=int(sys.argv[4]), save_every=3)
result.write_text(json.dumps({"loss": found.loss, "eval": found.eval_loss, "resumed": found.resumed_from}))
"""


def texts(count: int = 60) -> list[str]:
    words = WORDS.split()
    return [" ".join(words[(i * 7 + j) % len(words)] for j in range(12)) for i in range(count)]


def run(
    model: Path, folder: Path, *, steps: int = 12, mode: str = "lora", batch: int = 4, **options: Any
) -> Trained:
    student = open_student(str(model), mode=mode, r=4, alpha=8, dropout=0.1, device="cpu", seed=3)
    learned, kept = split_off(encode_texts(texts(), student.tokenizer, 64), 0.1, 0)
    settings = Settings(
        max_steps=steps, batch_size=batch, packed=True, seed=5, **{"lr": 5e-3, "eval_every": 4} | options
    )
    return train(student, pack(learned, "rows", 128), pack(kept, "rows", 128), settings, folder, Silent())


def in_a_process(model: Path, folder: Path, result: Path, steps: int) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(model), str(folder), str(result), str(steps)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )


def test_a_training_killed_in_the_middle_ends_as_an_undisturbed_one(tiny: Path, tmp_path: Path) -> None:
    steps = 24
    undisturbed = run(tiny, tmp_path / "whole", steps=steps, save_every=3)
    process = in_a_process(tiny, tmp_path / "killed", tmp_path / "result.json", steps)
    until = time.monotonic() + 240
    while last_checkpoint_number(tmp_path / "killed") < 6:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "result.json").exists()
    (tmp_path / "killed" / "checkpoint-99").mkdir()  # a checkpoint that was being written
    resumed = in_a_process(tiny, tmp_path / "killed", tmp_path / "result.json", steps)
    assert resumed.wait(timeout=300) == 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert 6 <= found["resumed"] < steps
    assert found["loss"] == pytest.approx(undisturbed.loss, abs=1e-4)
    assert found["eval"] == pytest.approx(undisturbed.eval_loss, abs=1e-4)
    assert not (tmp_path / "killed" / "checkpoint-99").exists()


def last_checkpoint_number(folder: Path) -> int:
    numbers = [int(path.parent.name.partition("-")[2]) for path in folder.glob(f"checkpoint-*/{WHOLE}")]
    return max(numbers, default=0)


def test_after_mixed_precision_the_model_computes_in_float32_again(tiny: Path, tmp_path: Path) -> None:
    student = open_student(str(tiny), mode="lora", r=4, alpha=8, device="cpu", precision="bfloat16")
    blocks = pack(encode_texts(texts(), student.tokenizer, 64), "rows", 128)
    train(student, blocks, [], Settings(max_steps=4, lr=5e-3, batch_size=4, packed=True), tmp_path, Silent())
    before = probe(settle(student))
    assert float((probe(merged(student)) - before).abs().max()) < 1e-3


def test_lengths_are_rounded_up_without_changing_the_training(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for multiple in (1, 64):
        monkeypatch.setattr(training, "MULTIPLE", multiple)
        student = open_student(str(tiny), mode="lora", r=4, alpha=8, dropout=0.0, device="cpu", seed=3)
        blocks = pack(encode_texts(texts(), student.tokenizer, 50), "rows", 110)
        assert any(len(block) % 64 for block in blocks)
        settings = Settings(max_steps=6, batch_size=2, packed=True, lr=5e-3)
        losses.append(train(student, blocks, [], settings, tmp_path / str(multiple), Silent()).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_positions_with_logits_are_rounded_up() -> None:
    keep = torch.tensor([3, 70, 71, 90])
    rounded = training._rounded(keep, 100)
    assert len(rounded) == 64 and set(keep.tolist()) <= set(rounded.tolist())
    assert rounded.tolist() == sorted(set(rounded.tolist())) and rounded[-1] < 100
    assert training._rounded(keep, 92).tolist()[-1] == 90
    assert training._rounded(torch.arange(20), 30).tolist() == list(range(30))


def test_training_learns(tiny: Path, tmp_path: Path) -> None:
    found = run(tiny, tmp_path, steps=20, save_every=100)
    losses = [entry["eval_loss"] for entry in found.curve if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert found.steps == 20 and not found.stopped_early and found.resumed_from is None


@pytest.mark.parametrize("mode", ["full", "qlora"])
def test_every_mode_trains_and_evaluates_in_the_middle(tiny: Path, tmp_path: Path, mode: str) -> None:
    found = run(tiny, tmp_path, steps=8, mode=mode, eval_every=2, accumulate=2)
    losses = [entry["eval_loss"] for entry in found.curve if "eval_loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_checkpointing_changes_no_number(tiny: Path, tmp_path: Path) -> None:
    plain = run(tiny, tmp_path / "a", steps=4)
    again = run(tiny, tmp_path / "b", steps=4, checkpointing=True)
    assert again.loss == pytest.approx(plain.loss, abs=1e-4)


def test_accumulated_batches_are_one_large_batch(tiny: Path, tmp_path: Path) -> None:
    large = run(tiny, tmp_path / "a", steps=4, batch=4)
    small = run(tiny, tmp_path / "b", steps=4, batch=2, accumulate=2)
    # dropout draws other numbers for other batch shapes, so the curves agree closely, not exactly
    assert small.loss == pytest.approx(large.loss, abs=0.05)


def test_training_stops_when_it_no_longer_improves(tiny: Path, tmp_path: Path) -> None:
    stuck = run(tiny, tmp_path / "a", steps=60, lr=1e-12, eval_every=2, patience=2, schedule="constant")
    assert stuck.stopped_early and stuck.steps < 20
    found = run(tiny, tmp_path / "b", steps=12, eval_every=2, patience=2)
    assert not found.stopped_early
    best = min(entry["eval_loss"] for entry in found.curve if "eval_loss" in entry)
    assert found.eval_loss == pytest.approx(best, abs=1e-6)


def test_an_unfinished_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    for number, whole in ((3, True), (6, True), (9, False)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{number}" / WHOLE).write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    assert not (tmp_path / "checkpoint-9").exists()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_learning_the_logits_of_a_model_brings_the_student_towards_it(
    tiny: Path, tmp_path: Path, kind: str
) -> None:
    """A student whose weights were disturbed learns back what its original says."""
    teacher = load_model(tiny, device="cpu", dtype="float32")
    student = open_student(str(tiny), mode="full", device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in student.model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    examples = encode_texts(texts(20), student.tokenizer, 64)
    store = gather_logits(
        teacher.model,
        [(example.tokens, example.positions()) for example in examples],
        tmp_path / "logits",
        top_k=32,
        temperature=1.0,
        batch_tokens=512,
        device="cpu",
        identity={"teacher": "tiny"},
        progress=Silent(),
    )
    logits = LogitLoss(lambda e: store.lookup(store.number(e.tokens, e.positions())), kind, store.vocabulary)
    settings = Settings(max_steps=16, lr=1e-3, batch_size=4, packed=True, eval_every=4, schedule="constant")
    blocks = pack(examples, "rows", 128)
    found = train(student, blocks, blocks[:2], settings, tmp_path / "t", Silent(), logits)
    losses = [entry["eval_loss"] for entry in found.curve if "eval_loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


RECIPE = """
kind: distill
student: {{model: {model}, mode: lora, lora: {{r: 4, alpha: 8, dropout: 0.0}}}}
data: {{source: {text}, format: text, filters: []}}
train: {{max_steps: 4, lr: 5.0e-3, batch_size: {batch}, max_len: 64, packing: rows, eval_share: 0.1, seed: 1}}
evaluate: [perplexity]
tasks: {{perplexity: {{source: {text}, seq_len: 64, max_tokens: 256}}}}
"""


def test_two_processes_reach_the_loss_of_one_with_the_same_global_batch(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("\n\n".join(texts()), encoding="utf-8")
    found = {}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    for name, batch, command in (("one", 4, [sys.executable]), ("two", 2, launch)):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(RECIPE.format(model=tiny, text=tmp_path / "words.txt", batch=batch))
        arguments = ["-m", "quantlab", "distill", str(recipe), "--results", str(tmp_path / name),
                     "--out", str(tmp_path / f"{name}-student"), "--device", "cpu"]  # fmt: skip
        done = subprocess.run(
            [*command, *arguments],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        made = json.loads((tmp_path / f"{name}-student" / "quantlab.json").read_text())
        found[name] = made["training"]
    one, two = ([e["loss"] for e in found[name]["curve"] if "loss" in e] for name in ("one", "two"))
    assert len(one) == len(two) == 4
    assert two == pytest.approx(one, abs=1e-4)
    assert found["two"]["eval_loss"] == pytest.approx(found["one"]["eval_loss"], abs=2e-3)
    assert found["two"]["processes"] == 2
