"""``evaluate --runtime llama.cpp``: what it refuses without the package, and what it measures where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from quantlab.commands.evaluate import Options, evaluate
from quantlab.errors import DataError, MachineError, RecipeError
from quantlab.models.load import load_model
from quantlab.progress import Silent
from quantlab.recipe.load import parse_recipe
from tests import gguf_files
from tests.zoo import builder

INSTALLED = importlib.util.find_spec("llama_cpp") is not None
needs_llama_cpp = pytest.mark.skipif(not INSTALLED, reason="llama-cpp-python is not installed")
IDS = torch.arange(3, 67)[None]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
    gguf_files.write(tmp_path / "model.gguf", builder.build("llama"), Kind.F16)
    return tmp_path / "model.gguf"


def options(tmp_path: Path, *tasks: str, sets: tuple[str, ...] = (), device: str = "cpu") -> Options:
    small = ("tasks.perplexity.seq_len=64", "tasks.perplexity.max_tokens=256")
    small += ("tasks.fidelity.seq_len=64", "tasks.fidelity.max_tokens=256")
    return Options(
        tasks=tasks,
        runtime="llama.cpp",
        results=tmp_path / "results",
        overrides=(*small, *sets),
        device=device,
    )


def test_without_the_package(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "llama_cpp" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr("quantlab.models.llama_cpp.find_spec", missing)
    with pytest.raises(MachineError, match="llama.cpp needs llama-cpp-python") as failed:
        evaluate(str(file), options(tmp_path, "perplexity"), Silent())
    assert failed.value.hint == "pip install llama-cpp-python" and failed.value.exit_code == 3
    assert not (tmp_path / "results").exists()


def test_what_it_does_not_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantlab.models.llama_cpp.find_spec", lambda name: name)  # as if it were installed
    with pytest.raises(DataError, match="runs GGUF files, this is none"):
        evaluate("embedded:base", options(tmp_path, "perplexity"), Silent())
    with pytest.raises(RecipeError, match="--device cuda: llama.cpp computes on the CPU"):
        evaluate(str(file), options(tmp_path, "perplexity", device="cuda"), Silent())
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("evaluate: ['lm-eval:x']", "lm-eval:x needs transformers, llama.cpp was asked for"),
        ("tasks: {kv_cache: {bits: 4}}", "tasks.kv_cache needs transformers"),
        ("tasks: {speed: {batch_size: 2}}", "tasks.speed.batch_size above 1 needs transformers"),
    ],
)
def test_what_it_cannot_measure(keys: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(f"kind: evaluate\nruntime: llama.cpp\n{keys}\n")


def test_the_runtime_decides_the_run_and_old_digests_stay() -> None:
    plain = parse_recipe("kind: evaluate\nevaluate: [perplexity]\n")
    same = parse_recipe("kind: evaluate\nevaluate: [perplexity]\nruntime: transformers\n")
    other = parse_recipe("kind: evaluate\nevaluate: [perplexity]\nruntime: llama.cpp\n")
    assert plain.digest() == same.digest() != other.digest()


@needs_llama_cpp
def test_it_computes_what_transformers_does(file: Path) -> None:
    """Weights in float16 and no quantized activations: what is left is rounding."""
    ours, theirs = load_model(file, runtime="llama.cpp"), load_model(file, dtype="float32")
    both = IDS.repeat(2, 1)
    both[1] += 40
    with torch.inference_mode():
        expected = theirs.model(both).logits
        found = ours.model(input_ids=both).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)
        step = ours.model(input_ids=IDS[:, :40], logits_to_keep=1)
        torch.testing.assert_close(step.logits[:, -1], expected[:1, 39], rtol=0, atol=2e-2)
        after = ours.model(input_ids=IDS[:, 40:41], past_key_values=step.past_key_values)
        torch.testing.assert_close(after.logits[:, -1], expected[:1, 40], rtol=0, atol=2e-2)
        again = ours.model(
            input_ids=IDS[:, 40:41], past_key_values=step.past_key_values
        )  # another row came between
        torch.testing.assert_close(again.logits, after.logits, rtol=0, atol=1e-3)
        long = torch.arange(600)[None] % 300  # beyond the smallest context
        assert ours.model(input_ids=long, logits_to_keep=1).logits.shape == (1, 1, 320)
    assert ours.params == theirs.params and ours.size_bytes == file.stat().st_size


@needs_llama_cpp
def test_greedy_answers_are_those_of_transformers(file: Path) -> None:
    from quantlab.evals.generation import generate

    answers = []
    for runtime in ("llama.cpp", "transformers"):
        subject = load_model(file, dtype="float32", runtime=runtime)
        keys = {"batch_size": 4, "max_new_tokens": 12, "device": "cpu", "stop_at_statement": False}
        made = generate(subject.model, subject.tokenizer, ["the cat", "seven small birds sang"], **keys)  # type: ignore[arg-type]
        answers.append([answer.text for answer in made])
    assert answers[0] == answers[1]


@needs_llama_cpp
def test_its_speed_is_measured(file: Path) -> None:
    from quantlab.evals.speed_worker import Bench
    from quantlab.registry.tasks import SpeedOptions

    bench = Bench({
        "ref": str(file), "dtype": "auto", "device": "cpu", "trust_remote_code": False, "runtime": "llama.cpp",
        "options": SpeedOptions(prompt_tokens=16, new_tokens=4).model_dump(), "kv_cache": None,
    })  # fmt: skip
    loaded = bench.do_load()
    assert loaded["kernel"].startswith("llama.cpp") and loaded["memory_bytes"] == file.stat().st_size
    for turn in (bench.do_prefill(), bench.do_decode()):
        assert turn["tokens"] > 0 and turn["seconds"] > 0


@needs_llama_cpp
def test_it_is_measured_beside_transformers(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wish = options(tmp_path, "perplexity", "fidelity")
    wish = Options(**{**vars(wish), "baseline": str(file)})
    rows = {row["run_id"]: row for row in evaluate(str(file), wish, Silent())["rows"]}
    mine = next(row for name, row in rows.items() if "-llama.cpp-" in name)
    other = next(row for name, row in rows.items() if "-llama.cpp-" not in name)
    assert "llama.cpp (llama-cpp-python" in mine["device"] and other["device"] == "cpu"
    assert mine["kl_mean"] < 1e-3 and mine["top1_agreement"] > 0.95
    assert mine["ppl_ratio"] == pytest.approx(1, abs=0.01)
