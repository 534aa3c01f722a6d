"""The original's distributions on disk: against the divergence in double precision, damaged, too large, one model at a
time."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.commands import evaluate as verb
from quantlab.errors import DataError, NotANumber
from quantlab.evals import passes, reference, run_pass
from quantlab.evals.kept_original import Unloaded, keep
from quantlab.evals.kl_divergence import OnDisk, evaluate
from quantlab.evals.reference import (
    BIN,
    STEP,
    TAIL,
    CannotKeep,
    Store,
    Writer,
    compress,
    divergence_from,
    expand,
    store_key,
)
from quantlab.models import load as loading
from quantlab.models.load import LoadedModel, load_model
from quantlab.progress import Silent
from quantlab.registry.tasks import FidelityOptions, PerplexityOptions
from tests.conftest import write_tiny

STORY = "Once upon a time there was a little girl named Lily. She liked to play outside in the sun. " * 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference-logprobs"


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "t.txt").write_text(STORY, encoding="utf-8")
    return str(tmp_path / "t.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("original") / "tiny")


def draw(vocabulary: int, positions: int, spread: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(positions, vocabulary, generator=generator)


def exact(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q) of logits in double precision, and the mean of |log(p / q) - KL| over p."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    weight = log_p.exp()
    ratio = torch.where(weight > 0, log_p - log_q, 0.0)
    kl = (weight * ratio).sum(-1)
    return kl, (weight * (ratio - kl[:, None]).abs()).sum(-1)


@pytest.mark.parametrize("vocabulary", [2, 257, 5000, 70000])
@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])  # nearly uniform, like a model, nearly certain
@pytest.mark.parametrize("change", [1e-3, 0.05, 1.0])
def test_the_stated_error_holds(vocabulary: int, spread: float, change: float) -> None:
    original = draw(vocabulary, 6, spread)
    changed = original + draw(vocabulary, 6, change, seed=1)
    kl, same = divergence_from(compress(original), changed)
    truth, deviation = exact(original, changed)
    # float32's own part of it, as of two models in memory, is below 1e-5
    bound = (STEP / 2 + TAIL * BIN / 2 * 10) * deviation + 1e-5
    assert ((kl.double() - truth).abs() <= bound).all(), (kl - truth, bound)
    assert torch.equal(same, original.argmax(-1) == changed.argmax(-1))
    assert kl.dtype == torch.float32 and (kl >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_add_up(dtype: torch.dtype) -> None:
    """Against itself a model has nothing, and a small divergence keeps its value: logits of bfloat16 lie on a grid of
    their own, which is no chance to be right on average."""
    for spread in (0.5, 3.0, 8.0):
        original = draw(5000, 200, spread).to(dtype)
        kl, same = divergence_from(compress(original), original)
        assert float(kl.max()) < 5e-7 and bool(same.all())
        changed = (original.float() + draw(5000, 200, 0.03, seed=1)).to(dtype)
        kl, _ = divergence_from(compress(original), changed)
        truth = exact(original, changed)[0].mean()
        assert float(kl.double().mean()) == pytest.approx(float(truth), rel=1e-3, abs=1e-8)


def test_what_is_stored_sums_to_one_and_is_small() -> None:
    original = draw(5000, 30, 3.0)
    kept = compress(original)
    stored = expand(kept)
    assert torch.allclose(stored.double().exp().sum(-1), torch.ones(30, dtype=torch.float64), atol=1e-5)
    largest = stored.max(dim=-1).values
    assert torch.allclose(largest, original.log_softmax(-1).max(dim=-1).values, atol=STEP)
    size = sum(tensor.nbytes for tensor in kept)
    assert size < 1.9 * original.numel() < original.to(torch.bfloat16).nbytes


def test_tokens_that_are_ruled_out() -> None:
    """Rows for padding in a vocabulary are often minus infinity."""
    original = draw(300, 4, 3.0)
    original[:, 290:] = -torch.inf
    changed = original.clone()
    assert float(divergence_from(compress(original), changed)[0].max()) < 1e-6
    changed[:, 290:] = 0.0  # the other allows them: finite, and the original's own tokens are dearer
    kl = divergence_from(compress(original), changed)[0]
    assert torch.allclose(kl.double(), exact(original, changed)[0], atol=1e-5)
    changed = original.clone()
    changed[0, original[0].argmax()] = -torch.inf  # the other rules out what the original expects
    assert divergence_from(compress(original), changed)[0][0] == torch.inf
    certain = torch.full((1, 300), -torch.inf)
    certain[0, 7] = 0.0
    assert divergence_from(compress(certain), certain)[0] == 0.0
    assert divergence_from(compress(certain), torch.zeros(1, 300))[0].item() == pytest.approx(
        5.7038, abs=1e-4
    )


def test_ties_go_to_the_same_token_as_in_memory() -> None:
    original = torch.zeros(2, 9)
    changed = torch.zeros(2, 9)
    changed[1, 4] = 1.0
    assert divergence_from(compress(original), changed)[1].tolist() == [True, False]


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="10 and 12 tokens in their vocabularies"):
        divergence_from(compress(draw(10, 2, 1.0)), draw(12, 2, 1.0))


def write_store(path: Path, windows: int = 5, size: int = 7) -> tuple[Store, list[torch.Tensor]]:
    logits = [draw(300, size, 3.0, seed=number) for number in range(windows)]
    with Writer(path) as writer:
        for start in range(0, windows, 2):  # batches of 2, 2 and 1 windows, each window in two parts
            batch = logits[start : start + 2]
            parts = [[compress(part) for part in one.split(4)] for one in batch]
            writer.add(parts, [float(start + at) for at in range(len(batch))])
        return writer.finish({"windows": "x"}), logits


@pytest.mark.parametrize("positions", [1, 3, 7, 100])
def test_windows_come_back_whatever_is_read_at_once(tmp_path: Path, positions: int) -> None:
    store, logits = write_store(tmp_path / "a" / "store")
    assert store.nll == [0.0, 1.0, 2.0, 3.0, 4.0]
    for number in (4, 0, 3):  # in any order
        parts = list(store.window(number, positions))
        assert [first for first, _ in parts] == list(range(0, 7, positions))
        read = torch.cat([expand(kept) for _, kept in parts])
        assert torch.allclose(read, expand(compress(logits[number])), atol=1e-6)


def test_an_unfinished_store_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "a" / "store") as writer:
        writer.add([[compress(draw(9, 2, 1.0))]], [1.0])
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []


def test_two_processes_that_make_the_same_store(tmp_path: Path) -> None:
    first, _ = write_store(tmp_path / "a" / "store")
    stamp = (first.path / "index.json").stat().st_mtime_ns
    second, _ = write_store(tmp_path / "a" / "store")
    assert (second.path / "index.json").stat().st_mtime_ns == stamp
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["store"]


@pytest.mark.parametrize(
    "damage", ["no index", "not json", "other format", "cut shard", "no shard", "elsewhere"]
)
def test_a_damaged_store_is_refused_and_replaced(tmp_path: Path, damage: str) -> None:
    store, _ = write_store(tmp_path / "a" / "store")
    index, shard = store.path / "index.json", store.path / "00001.safetensors"
    content = json.loads(index.read_text())
    if damage == "no index":
        index.unlink()
    elif damage == "not json":
        index.write_text("{")
    elif damage == "other format":
        index.write_text(json.dumps({**content, "format": "x"}))
    elif damage == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif damage == "no shard":
        shard.unlink()
    else:
        (tmp_path / "a" / "other").write_bytes(shard.read_bytes())
        content["shards"][1]["file"] = "../other"
        index.write_text(json.dumps(content))
    with pytest.raises(DataError, match="holds no log-probabilities"):
        Store(store.path)
    again, logits = write_store(tmp_path / "a" / "store")
    assert len(next(again.window(2, 100))[1].top) == len(logits[2])


def test_a_shard_that_is_no_safetensors_file_is_named(tmp_path: Path) -> None:
    store, _ = write_store(tmp_path / "a" / "store")
    shard = store.path / "00000.safetensors"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(DataError, match=r"00000.safetensors cannot be read"):
        list(store.window(0, 100))


def test_stores_stay_below_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = write_store(tmp_path / "a" / "one")
    size = sum(path.stat().st_size for path in one.path.iterdir())
    write_store(tmp_path / "a" / "two")
    for name, when in (("one", 2000), ("two", 1000)):
        os.utime(tmp_path / "a" / name / "index.json", (when, when))
    abandoned = tmp_path / "a" / ".x.part"
    abandoned.mkdir()
    os.utime(abandoned, (1000, 1000))
    monkeypatch.setattr(reference, "LARGEST", int(2.5 * size))
    write_store(tmp_path / "a" / "three")  # the one unused longest goes
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"one", "three"}
    monkeypatch.setattr(reference, "LARGEST", size // 2)
    with pytest.raises(CannotKeep):
        write_store(tmp_path / "a" / "four")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"one", "three"}


def test_a_key_names_all_that_numbers_come_from() -> None:
    ids = torch.arange(24).view(2, 12)
    keys = {
        store_key("a", ids, "auto", "cpu"),
        store_key("b", ids, "auto", "cpu"),
        store_key("a", ids.view(3, 8), "auto", "cpu"),
        store_key("a", ids + 1, "auto", "cpu"),
        store_key("a", ids, "torch.float32", "cpu"),
        store_key("a", ids, "auto", "cuda:1"),
    }
    assert len(keys) == 6
    assert store_key("a", ids, "auto", "cuda:0") == store_key("a", ids, "auto", "cuda")


def unloaded(folder: Path, opened: list[str] | None = None, dtype: str = "float32") -> Unloaded:
    def load(wish: str) -> LoadedModel:
        if opened is not None:
            opened.append(wish)
        return load_model(folder, device="cpu", dtype=wish)

    return Unloaded(folder, dtype, "cpu", load)


def damaged(loaded: LoadedModel, noise: float = 0.01) -> LoadedModel:
    other = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model), name="changed")
    torch.manual_seed(0)
    for weight in other.model.parameters():
        weight.data.add_(torch.randn_like(weight), alpha=noise)
    return other


def test_kept_and_in_memory_agree(folder: Path, text: str, cache: Path) -> None:
    options = FidelityOptions(source=text, seq_len=32)
    opened: list[str] = []
    kept = keep(unloaded(folder), unloaded(folder, opened), options, Silent())
    assert kept is not None and opened == ["float32", "bfloat16"]
    original = load_model(folder, device="cpu", dtype="float32")
    subject = damaged(original)
    memory = evaluate(subject, options, baseline=original, progress=Silent())
    disk = evaluate(subject, options, baseline=kept, progress=Silent())
    for name in ("kl_mean", "kl_low", "kl_high", "kl_median", "kl_p90", "kl_p99", "kl_max"):
        assert disk.metrics[name] == pytest.approx(memory.metrics[name], rel=1e-3, abs=1e-6), name
    for name in ("top1_agreement", "top1_low", "ppl_ratio", "ppl_ratio_low", "ppl_ratio_high", "tokens"):
        assert disk.metrics[name] == memory.metrics[name], name
    assert (memory.details["reference"], disk.details["reference"]) == ("memory", "disk")
    assert [path.name for path in cache.iterdir()] == [disk.details["store"]]
    noise = disk.details["noise"]
    assert noise["dtype"]["from"] == "float32" and noise["dtype"]["to"] == "bfloat16"
    assert 0 <= noise["batch"]["kl_mean"] < 1e-6 < noise["dtype"]["kl_mean"] == disk.metrics["kl_noise"]
    # What is there is neither loaded nor made again.
    assert keep(unloaded(folder), unloaded(folder, opened), options, Silent()) is not None
    assert opened == ["float32", "bfloat16"]
    assert keep(unloaded(folder), unloaded(folder, opened, "bfloat16"), options, Silent()) is not None
    assert opened[2:] == ["bfloat16", "float16"]
    fewer = options.model_copy(update={"max_tokens": 64})
    other = keep(unloaded(folder), unloaded(folder, opened), fewer, Silent())
    assert other is not None and other.store.path != kept.store.path
    with pytest.raises(DataError, match="other windows"):
        evaluate(subject, fewer, baseline=kept, progress=Silent())


def test_below_the_noise_is_said_to_be_noise(folder: Path, text: str) -> None:
    class Heard(Silent):
        def __init__(self) -> None:
            self.said: list[str] = []

        def note(self, message: str) -> None:
            self.said.append(message)

    options = FidelityOptions(source=text, seq_len=32)
    kept = keep(unloaded(folder), unloaded(folder), options, Silent())
    original = load_model(folder, device="cpu", dtype="float32")
    heard = Heard()
    near = evaluate(damaged(original, 1e-6), options, baseline=kept, progress=heard).metrics
    assert near["kl_mean"] < near["kl_noise"] and "is noise" in heard.said[0]
    far = evaluate(damaged(original, 0.05), options, baseline=kept, progress=heard).metrics
    assert far["kl_mean"] > far["kl_noise"] and len(heard.said) == 1


def test_it_can_be_turned_off_and_falls_back(
    folder: Path, text: str, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    off = FidelityOptions(source=text, seq_len=32, reference="memory")
    opened: list[str] = []
    assert keep(unloaded(folder), unloaded(folder, opened), off, Silent()) is None and not opened
    monkeypatch.setattr(reference, "LARGEST", 1000)
    assert (
        keep(unloaded(folder), unloaded(folder), FidelityOptions(source=text, seq_len=32), Silent()) is None
    )
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    (folder.parent / "file").write_text("in the way")
    monkeypatch.setenv("QUANTLAB_CACHE", str(folder.parent / "file"))
    assert (
        keep(unloaded(folder), unloaded(folder), FidelityOptions(source=text, seq_len=32), Silent()) is None
    )


def test_refusals_of_the_original(folder: Path, text: str, tmp_path: Path) -> None:
    options = FidelityOptions(source=text, seq_len=32)
    stranger = write_tiny(tmp_path / "stranger")
    content = json.loads((stranger / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (stranger / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match="do not share a tokenizer"):
        keep(unloaded(folder), unloaded(stranger), options, Silent())

    def broken(wish: str) -> LoadedModel:
        loaded = load_model(folder, device="cpu", dtype="float32")
        loaded.model.lm_head.weight.data[3] = torch.nan
        return loaded

    with pytest.raises(NotANumber, match="its logits are NaN"):
        keep(unloaded(folder), Unloaded(folder, "float32", "cpu", broken), options, Silent())


def test_one_pass_gives_both(folder: Path, text: str) -> None:
    original = load_model(folder, device="cpu", dtype="float32")
    subject = damaged(original)
    options = {
        "perplexity": PerplexityOptions(source=text, seq_len=32),
        "fidelity": FidelityOptions(source=text, seq_len=32, max_tokens=640),
    }
    kept = keep(unloaded(folder), unloaded(folder), options["fidelity"], Silent())  # type: ignore[arg-type]
    calls: list[tuple[int, ...]] = []
    hook = subject.model.register_forward_pre_hook(
        lambda module, args, given: calls.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    assert passes(list(options), options) == [["perplexity", "fidelity"]]
    together = run_pass(list(options), subject, options, baseline=kept, progress=Silent())
    one, windows = sum(shape[0] for shape in calls), len(subject.tokenizer(STORY)["input_ids"]) // 32
    assert one == windows > 20
    apart = {
        name: run_pass([name], subject, options, baseline=kept, progress=Silent())[name] for name in options
    }
    hook.remove()
    for name in options:
        mine, other = together[name], apart[name]
        assert not isinstance(mine, NotANumber) and not isinstance(other, NotANumber)
        for key, value in mine.metrics.items():
            near = other.metrics[key]
            assert value == (
                near if isinstance(near, str | None) else pytest.approx(near, rel=1e-5, abs=1e-7)
            ), key
    other_text = {**options, "fidelity": FidelityOptions(source=text, seq_len=64)}
    assert passes(list(options), other_text) == [["perplexity"], ["fidelity"]]
    order = ["fidelity", "speed", "perplexity"]
    assert passes(order, {**options, "speed": None}) == [["fidelity", "perplexity"], ["speed"]]


@pytest.mark.parametrize("reference_in", ["disk", "memory"])
def test_one_model_at_a_time(
    folder: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_in: str
) -> None:
    """The verb: at every load no earlier model is alive, unless the original is asked to stay."""
    alive: list[weakref.ref[Any]] = []
    most = [0]
    whole = loading.load_model

    def watched(*args: Any, **given: Any) -> LoadedModel:
        loaded = whole(*args, **given)
        gc.collect()
        alive.append(weakref.ref(loaded.model))
        most[0] = max(most[0], sum(one() is not None for one in alive))
        return loaded

    monkeypatch.setattr(loading, "load_model", watched)
    changed = write_tiny(tmp_path / "changed")
    sets = [
        f"tasks.{task}.{key}"
        for task in ("perplexity", "fidelity")
        for key in (f"source={text}", "seq_len=32")
    ]
    found = verb.evaluate(
        str(changed),
        verb.Options(
            tasks=("perplexity", "fidelity"),
            baseline=str(folder),
            results=tmp_path / "results",
            overrides=(*sets, f"tasks.fidelity.reference={reference_in}", "dtype=float32"),
            device="cpu",
        ),
        Silent(),
    )
    assert most == [1 if reference_in == "disk" else 2]
    row = next(one for one in found["rows"] if one["kl_mean"] is not None)
    assert row["kl_low"] <= row["kl_mean"] <= row["kl_high"] and row["kl_noise"] is not None
    assert row["ppl_ratio_low"] <= row["ppl_ratio"] <= row["ppl_ratio_high"]
    run = tmp_path / "results" / "runs" / row["run_id"]
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))["tasks"]["fidelity"]
    assert record["details"]["reference"] == reference_in
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = [one for one in log if one["event"] == "measured"]
    assert [one["together"] for one in measured] == [["perplexity", "fidelity"]] * 2


def test_a_store_is_not_taken_for_a_model(folder: Path, text: str) -> None:
    kept = keep(unloaded(folder), unloaded(folder), FidelityOptions(source=text, seq_len=32), Silent())
    assert isinstance(kept, OnDisk) and kept.name == str(folder)
