"""Speed and memory: processes of their own that take turns, what counts as disturbed, and what a model holds."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from quantlab.errors import DataError, MachineError, QuantlabError
from quantlab.evals import speed, speed_worker
from quantlab.evals.speed import Contestant, measure
from quantlab.evals.speed_process import SpeedProcess
from quantlab.evals.speed_worker import timed_steps
from quantlab.models.disturbance import DISTURBED, mark, others_since
from quantlab.models.held_memory import held_bytes
from quantlab.models.load import load_model
from quantlab.progress import Silent
from quantlab.quant.jobs import Job
from quantlab.quant.pipeline import quantize
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.tasks import KvCacheOptions, SpeedOptions
from tests.conftest import write_tiny

OPTIONS = SpeedOptions(prompt_tokens=16, new_tokens=4, repeats=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("speed") / "plain")


@pytest.fixture(scope="module")
def small(plain: Path) -> Path:
    """The same model at 4 bits."""
    out = plain.parent / "rtn-int4"
    recipe = QuantizeRecipe(method="rtn", bits=4, group_size=32)
    quantize([Job("rtn-int4", recipe, out)], str(plain), progress=Silent())
    return out


def test_two_models_take_turns(plain: Path, small: Path) -> None:
    base, four = Contestant(str(plain), "plain"), Contestant(str(small), "rtn-int4")
    found = measure([four, base], base, OPTIONS, device="cpu", progress=Silent())
    for result in found:
        metrics, details = result.metrics, result.details
        rounds = details["decode_rounds"]
        assert 2 <= len(rounds) == len(details["prefill_rounds"]) == len(details["others"]) <= 6
        low, high = details["decode_range"]
        assert 0 < low <= metrics["decode_tok_s"] <= high and metrics["prefill_tok_s"] > 0
        assert metrics["load_seconds"] > 0 and metrics["peak_memory_bytes"] > 0
        assert metrics["disturbed"] in (0, 1) and set(details["rounds_counted"]) <= set(range(len(rounds)))
        assert details["threads"] >= 1 and details["models_in_turn"] == 2 and details["baseline"] == "plain"
    ours, theirs = found
    ratios = sorted(
        a / b for a, b in zip(ours.details["decode_rounds"], theirs.details["decode_rounds"], strict=True)
    )
    assert ratios[0] <= ours.metrics["decode_ratio"] <= ratios[-1]
    counted = [theirs.details["decode_rounds"][i] for i in ours.details["rounds_counted"]]
    # however fast the machine was in each round
    pace = ours.metrics["decode_ratio"] * statistics.median(counted)
    assert ours.metrics["decode_tok_s"] == pytest.approx(pace)
    assert "decode_ratio" not in theirs.metrics  # nobody is compared with itself
    assert ours.details["kernel"] != "torch" and theirs.details["kernel"] == "torch"
    parameters = sum(p.nbytes for p in load_model(plain, device="cpu").model.parameters())
    assert parameters <= theirs.metrics["memory_bytes"] <= 1.05 * parameters
    assert ours.metrics["memory_bytes"] < theirs.metrics["memory_bytes"]


def test_each_process_has_seen_nothing_else(plain: Path) -> None:
    """Numbers of a model do not know how many others were measured before it in this process."""
    block = torch.ones(2**28, dtype=torch.uint8)  # a parent with much memory
    found = measure([Contestant(str(plain), "plain")], None, OPTIONS, device="cpu", progress=Silent())[0]
    assert found.metrics["peak_memory_bytes"] < block.nbytes
    assert "decode_ratio" not in found.metrics


def test_a_quantized_cache_is_measured_too(plain: Path) -> None:
    found = {}
    for bits in (8, 2):
        options = SpeedOptions(prompt_tokens=80, new_tokens=4, repeats=1)
        options._kv_cache = KvCacheOptions.model_validate({"bits": bits, "group_size": 32, "residual": 32})
        one = measure([Contestant(str(plain), "plain")], None, options, device="cpu", progress=Silent())[0]
        found[bits] = one.details["kv_cache"]
        assert found[bits]["bits"] == bits and found[bits]["residual"] == 32
    assert found[2]["bytes"] < found[8]["bytes"]


def test_models_that_do_not_fit_together_are_measured_in_groups(
    plain: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, four, other = (
        Contestant(str(p), n) for p, n in ((plain, "plain"), (small, "four"), (small, "other"))
    )
    monkeypatch.setattr(speed, "available", lambda: int(2.5 * speed.IDLE))
    groups = list(speed._groups([base, four, other], base))
    assert groups == [[base, four], [base, other]]
    assert list(speed._groups([four], None)) == [[four]]
    monkeypatch.setattr(speed, "available", lambda: 0)
    assert list(speed._groups([base, four, other], base)) == [[base, four], [base, other]]
    monkeypatch.setattr(speed, "available", lambda: 10**12)
    assert list(speed._groups([four, other], base)) == [[base, four, other]]
    assert list(speed._groups([base], base)) == [[base]]


def test_what_the_process_meets_is_told_in_its_words(plain: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with contextlib.closing(SpeedProcess()) as process, pytest.raises(DataError, match="no config.json"):
        process.ask("prepare", ref=str(empty), dtype="auto", device="cpu", trust_remote_code=False,
                    options=OPTIONS.model_dump(), kv_cache=None)  # fmt: skip
    with contextlib.closing(SpeedProcess()) as process:
        process._process.send_signal(signal.SIGKILL)
        with pytest.raises(MachineError, match="was killed"):
            process.ask("decode")
    with contextlib.closing(SpeedProcess()) as process, pytest.raises(QuantlabError, match="ended with code"):
        process.ask("decode")  # nothing is loaded


def test_no_process_is_left_behind(plain: Path) -> None:
    def workers() -> set[int]:
        return {
            child.pid
            for child in psutil.Process().children(recursive=True)
            if "speed_worker" in " ".join(child.cmdline())
        }

    before = workers()
    bad = Contestant(str(plain / "missing"), "missing")
    with pytest.raises(QuantlabError):
        speed._measure_group([Contestant(str(plain), "plain"), bad], OPTIONS, "cpu", False, Silent())
    assert workers() == before


def test_decoding_runs_the_whole_model_for_every_token(tiny: Any) -> None:
    calls: list[int] = []
    hook = tiny.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        took = list(timed_steps(tiny.model, torch.zeros((1, 8), dtype=torch.int64), 5))
    finally:
        hook.remove()
    assert calls == [8, 1, 1, 1, 1, 1] and len(took) == 6 and min(took) > 0


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that do nothing but compute."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_other_processes_are_noticed() -> None:
    with busy(2 * (os.cpu_count() or 1)):
        before = mark()
        time.sleep(1.0)
        assert others_since(before) > DISTURBED


def test_rounds_wait_for_a_quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    shares, slept = iter([0.9, 0.4, 0.1, 0.9]), list[float]()
    monkeypatch.setattr(speed, "others_since", lambda before: next(shares))
    monkeypatch.setattr(speed.time, "sleep", slept.append)
    speed._wait_for_quiet()
    assert slept == [0.5] * 3
    monkeypatch.setattr(speed, "others_since", lambda before: 1.0)
    monkeypatch.setattr(speed, "PATIENCE", 0.02)
    speed._wait_for_quiet()  # not for ever


def test_own_work_is_not_taken_for_others() -> None:
    """As far as the machine is quiet: what this process used itself is taken off."""
    before = mark()
    total = 0
    while time.perf_counter() - before.clock < 1.0:
        total += sum(range(1000))
    now = mark()
    own, busy_seconds = now.own - before.own, now.busy - before.busy
    assert total and others_since(before) <= busy_seconds - own + 0.1


def test_which_rounds_count() -> None:
    quiet, loud = 0.0, 1.0
    base = speed._Rounds(Contestant("a", "a"), {}, others=[quiet, loud, quiet, quiet])
    model = speed._Rounds(Contestant("b", "b"), {}, others=[quiet, quiet, loud, quiet])
    assert speed._chosen(model, base, 2) == ([0, 3], False)
    assert speed._chosen(model, base, 3) == ([0, 1, 2, 3], True)
    assert speed._chosen(model, None, 3) == ([0, 1, 3], False)


class Scripted:
    """A process whose turns are given: seconds a turn, and the processors that others take."""

    def __init__(self, seconds: float, others: float = 0.0) -> None:
        self.seconds, self.others = seconds, others
        self.asked: list[str] = []

    def ask(self, what: str) -> dict[str, float]:
        self.asked.append(what)
        return {
            "tokens": 2,
            "seconds": self.seconds,
            "passed": self.seconds,
            "taken": self.others * self.seconds,
        }


def test_a_round_of_turns() -> None:
    """Models alternate within a round; one whose steps are long does not hold up the others with more than it needs."""
    quick, slow = Scripted(0.1), Scripted(0.4)
    done = speed._one_round({Contestant("q", "q"): quick, Contestant("s", "s"): slow})  # type: ignore[dict-item]
    assert quick.asked == ["prefill"] * 2 + ["decode"] * 5 and slow.asked == ["prefill"] * 2 + ["decode"] * 2
    speeds = [did.tokens["decode"] / did.seconds["decode"] for did in done.values()]
    assert speeds == pytest.approx([20, 5])


@pytest.mark.parametrize(("others", "rounds"), [(0.0, 5), (1.0, 4)])
def test_rounds_end_when_it_is_plain(others: float, rounds: int) -> None:
    """Five that agree on a quiet machine; four on one that cannot give five quiet ones of eight."""
    contestant, process = Contestant("q", "q"), Scripted(0.1, others)
    found = {contestant: speed._Rounds(contestant, {})}
    speed._take_turns({contestant: process}, found, 5, lambda count: None)  # type: ignore[dict-item]
    assert len(found[contestant].others) == rounds and found[contestant].others[0] == pytest.approx(others)


def test_the_first_step_of_a_turn_is_not_counted() -> None:
    steps = iter([0.5, 0.1, 0.2, 0.3])

    def work() -> Iterator[float]:
        for seconds in steps:
            time.sleep(speed_worker.TURN_SECONDS / 3)
            yield seconds

    turn = speed_worker._turn(work(), tokens=3, cold=1)
    counted = turn["tokens"] // 3
    assert counted >= 1 and turn["seconds"] == pytest.approx(sum([0.1, 0.2, 0.3][:counted]))
    long = (time.sleep(speed_worker.TURN_SECONDS) or 7.0 for _ in range(2))
    assert speed_worker._turn(long, tokens=3, cold=1)["seconds"] == 7.0  # there is no other


def test_what_a_model_holds() -> None:
    layer = torch.nn.Linear(64, 32)
    model = torch.nn.Sequential(layer, torch.nn.Linear(32, 64))
    model[1].weight = torch.nn.Parameter(layer.weight.T)  # a view: the storage is shared
    expected = (64 * 32 + 32 + 64) * 4
    assert held_bytes(model) == expected
    model.register_buffer("table", torch.zeros(10, dtype=torch.int64))
    assert held_bytes(model) == expected + 80
    model[0].plain_attribute = [torch.zeros(3), {"x": torch.zeros(2)}]
    assert held_bytes(model) == expected + 80 + 20
    assert held_bytes(torch.nn.Linear(8, 8, device="meta")) == 0


def test_scales_beside_4_bit_weights_count(plain: Path, tmp_path: Path) -> None:
    """bitsandbytes keeps them where neither parameters() nor buffers() look."""
    quantize([Job("x", QuantizeRecipe(method="bnb-nf4"), tmp_path / "x")], str(plain), progress=Silent())
    model = load_model(tmp_path / "x", device="cpu").model
    listed = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    weights = [m.weight for m in model.modules() if type(m).__name__ == "Linear4bit"]
    scales = sum(w.quant_state.absmax.nbytes for w in weights)
    assert weights and scales > 0
    assert held_bytes(model) >= listed + scales
