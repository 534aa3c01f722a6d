"""Tokens a second and memory, each model in a process of its own, the models taking turns.

A number that depends on what ran before it in the same process is not a number. So every model is loaded into a fresh
process (``speed_worker``) that has seen nothing else; the processes wait while another one measures, and take turns of
a tenth of a second, the baseline among them. A processor's pace changes from one second to the next, on a shared host
by a fifth and more: over turns that short it averages out of the ratio to the baseline. (Checkpoints of one layout and
kernel came out up to 5 % apart; up to 12 % with turns of one second.)

The work is one pass after another: prefill is one forward pass over a prompt of random tokens, decode is greedy, one
token at a time with the cache, the prompt not counted. Passes before the speed has settled are thrown away: kernels
that compile at their first use do it there, and what the first pass took longer than a settled one is reported with the
time to load. A round is two turns of prompts and as many of decoding as fill half a second; the ratio is taken round by
round, and tokens a second are its median times the baseline's median, so that the two say the same. Reported are
medians over rounds, with the lowest and highest; there are more rounds than asked for, three times as many at most,
until the medians are sure to two per cent. A round during which other processes took more than a seventh of a
processor counts as disturbed; where too few undisturbed ones can be had the result says so, as soon as that is plain.

Memory is told twice: the bytes of all parameters and buffers after loading, and the most that the process held above
what it held idle, with its libraries imported (on CUDA: what the allocator held at most).

Where the models do not fit into memory together they are measured in groups, each with the baseline.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlab.evals.speed_process import SpeedProcess
from quantlab.models.disturbance import DISTURBED, mark, others_since
from quantlab.models.memory import available
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Advance, Progress
from quantlab.registry.tasks import SpeedOptions
from quantlab.runs.run import TaskResult

KINDS = ("prefill", "decode")
PROMPTS, ROUND_SECONDS = 2, 0.5  # of a round: turns of prefill, seconds of decoding, at least
MOST = 3  # times the rounds that were asked for
PATIENCE = 10.0  # seconds to wait for a quiet machine
SURE = 0.02  # relative standard error of the medians
IDLE = 900_000_000  # bytes that a process with torch, transformers and kernels holds before any weight
ROOM = 2.2  # times its files: what a model takes while it is loaded, or unpacked


@dataclass(frozen=True)
class Contestant:
    """A model to be measured: its directory or id, what it is to compute in (``auto``: as stored), and what computes
    it."""

    ref: str | Path
    label: str
    dtype: str = "auto"
    runtime: str = "transformers"


@dataclass
class _Rounds:
    """What one model did: tokens a second by kind, and the processors that others took, round by round."""

    contestant: Contestant
    loaded: Mapping[str, Any]
    speeds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    others: list[float] = field(default_factory=list)


def measure(
    contestants: Sequence[Contestant],
    baseline: Contestant | None,
    options: SpeedOptions,
    *,
    device: str,
    trust_remote_code: bool = False,
    progress: Progress,
) -> list[TaskResult]:
    """Measure models that take turns.

    Args:
        baseline: the model whose speed the others' is divided by; it takes turns with them. None: nobody is compared.
            One of ``contestants`` may be it.

    Returns:
        One result a contestant, in order: prefill_tok_s, decode_tok_s, prefill_ratio, decode_ratio, memory_bytes,
        peak_memory_bytes, load_seconds, disturbed.

    Raises:
        QuantlabError: what the process says that could not load or run its model.
    """
    results: dict[Contestant, TaskResult] = {}
    for group in _groups(contestants, baseline):
        rounds = _measure_group(group, options, device, trust_remote_code, progress)
        reference = rounds.get(baseline) if baseline is not None else None
        for contestant, found in rounds.items():
            results.setdefault(contestant, _result(found, reference, options, len(rounds)))
    return [results[contestant] for contestant in contestants]


def _groups(contestants: Sequence[Contestant], baseline: Contestant | None) -> Iterator[list[Contestant]]:
    """Models that fit into memory together, the baseline first in each group; one at a time where none do."""
    first = [baseline] if baseline is not None else []
    room = available() - sum(map(_bytes, first))
    group, taken = list(first), 0.0
    for contestant in contestants:
        if contestant in group:
            continue
        if len(group) > len(first) and taken + _bytes(contestant) > room:
            yield group
            group, taken = list(first), 0.0
        group.append(contestant)
        taken += _bytes(contestant)
    if group:
        yield group


def _bytes(contestant: Contestant) -> float:
    return IDLE + ROOM * open_files(contestant.ref).loaded_bytes


def _measure_group(
    group: Sequence[Contestant],
    options: SpeedOptions,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[Contestant, _Rounds]:
    total = len(group) * (2 + options.repeats)
    with ExitStack() as stack, progress.task("models take turns", total=total) as advance:
        processes: dict[Contestant, SpeedProcess] = {}
        found: dict[Contestant, _Rounds] = {}
        for contestant in group:  # libraries are imported in all processes at once, nothing of that is timed
            process = processes[contestant] = stack.enter_context(contextlib.closing(SpeedProcess()))
            process.send(
                "prepare", ref=str(contestant.ref), dtype=contestant.dtype, device=device,
                trust_remote_code=trust_remote_code, runtime=contestant.runtime, options=options.model_dump(),
                kv_cache=options.kv_cache.model_dump() if options.kv_cache else None,
            )  # fmt: skip
        for process in processes.values():
            process.receive()
            advance(1)
        for contestant, process in processes.items():
            found[contestant] = _Rounds(contestant, {**process.ask("load"), **process.ask("settle")})
            advance(1)
        _wait_for_quiet()
        _take_turns(processes, found, options.repeats, advance)
    return found


def _wait_for_quiet() -> None:
    """Until nobody computes, for ``PATIENCE`` seconds at most: compilers that the first passes started may be at it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        before = mark()
        time.sleep(0.5)
        if others_since(before) <= DISTURBED:
            return


def _take_turns(
    processes: Mapping[Contestant, SpeedProcess],
    found: Mapping[Contestant, _Rounds],
    repeats: int,
    advance: Advance,
) -> None:
    """Rounds, at least ``repeats`` and at most ``MOST`` times as many: until so many were undisturbed for everybody and
    the medians of those are sure to ``SURE``, or it is plain that the machine is not quiet."""
    quiet: list[int] = []
    for number in range(MOST * repeats):
        round_ = _one_round(processes)
        for contestant, did in round_.items():
            for kind in KINDS:
                found[contestant].speeds[kind].append(did.tokens[kind] / did.seconds[kind])
            found[contestant].others.append(did.others)
        quiet += [number] if all(did.others <= DISTURBED for did in round_.values()) else []
        loud = number + 1 - len(quiet)
        advance(len(processes) if number < repeats else 0)
        settled = len(quiet) >= repeats and _uncertainty(list(found.values()), quiet) < SURE
        if settled or loud > (repeats + 1) // 2:
            return


@dataclass
class _Done:
    """What one model did in a round: tokens and seconds by kind, and the processor seconds that others took of all the
    time that its turns lasted."""

    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    taken: float = 0.0
    passed: float = 0.0

    def add(self, kind: str, turn: Mapping[str, Any]) -> None:
        self.tokens[kind] += turn["tokens"]
        self.seconds[kind] += turn["seconds"]
        self.taken += turn["taken"]
        self.passed += turn["passed"]

    @property
    def others(self) -> float:
        """Processors that others took, on average."""
        return max(0.0, self.taken) / self.passed


def _one_round(processes: Mapping[Contestant, SpeedProcess]) -> dict[Contestant, _Done]:
    """Turns of prompts, then of decoding; who has done enough of it waits for the others."""
    done = {contestant: _Done() for contestant in processes}
    for _ in range(PROMPTS):
        for contestant, process in processes.items():
            done[contestant].add("prefill", process.ask("prefill"))
    unfinished = list(processes)
    while unfinished:
        for contestant in unfinished:
            done[contestant].add("decode", processes[contestant].ask("decode"))
        unfinished = [c for c in unfinished if done[c].seconds["decode"] < ROUND_SECONDS]
    return done


def _uncertainty(found: Sequence[_Rounds], rounds: Sequence[int]) -> float:
    """The largest relative standard error, over some rounds, of a median of decoding speeds, were they normally spread:
    of the ratios to the first model's speed, which drifts as they do, or of a single model's speed itself."""
    if len(rounds) < 2:
        return 0.0
    first = found[0].speeds["decode"]
    worst = 0.0
    for one in found[1:] or found:
        values = [one.speeds["decode"][i] / (first[i] if one is not found[0] else 1.0) for i in rounds]
        worst = max(worst, statistics.stdev(values) / statistics.median(values))
    return 1.2533 * worst / len(rounds) ** 0.5


def _result(found: _Rounds, reference: _Rounds | None, options: SpeedOptions, together: int) -> TaskResult:
    chosen, disturbed = _chosen(found, reference, options.repeats)
    metrics: dict[str, float | int | str | None] = {}
    details: dict[str, Any] = {}
    for kind in KINDS:
        speeds = [found.speeds[kind][i] for i in chosen]
        details[f"{kind}_rounds"] = found.speeds[kind]
        if reference is not None and reference is not found:
            originals = [reference.speeds[kind][i] for i in chosen]
            ratios = [mine / other for mine, other in zip(speeds, originals, strict=True)]
            metrics[f"{kind}_ratio"] = statistics.median(ratios)
            details[f"{kind}_ratio_range"] = [min(ratios), max(ratios)]
            speeds = [ratio * statistics.median(originals) for ratio in ratios]
        metrics[f"{kind}_tok_s"] = statistics.median(speeds)
        details[f"{kind}_range"] = [min(speeds), max(speeds)]
    metrics |= {
        "memory_bytes": int(found.loaded["memory_bytes"]),
        "peak_memory_bytes": found.loaded["peak_bytes"],
        "load_seconds": float(found.loaded["load_seconds"]) + float(found.loaded["first_use_seconds"]),
        "disturbed": int(disturbed),
    }
    details |= {
        **{key: value for key, value in found.loaded.items() if key not in ("memory_bytes", "peak_bytes")},
        "others": found.others,
        "rounds_counted": chosen,
        "baseline": reference.contestant.label if reference else None,
        "models_in_turn": together,
        **options.model_dump(),
    }
    return TaskResult("speed", metrics, details=details)


def _chosen(found: _Rounds, reference: _Rounds | None, repeats: int) -> tuple[list[int], bool]:
    """Which rounds count, and whether they were disturbed: those that were quiet for the model and its baseline, or all
    where there are too few of them."""
    others = [max(pair) for pair in zip(found.others, (reference or found).others, strict=True)]
    quiet = [i for i, share in enumerate(others) if share <= DISTURBED]
    return (quiet, False) if len(quiet) >= repeats else (list(range(len(others))), True)
