"""Before and after: what distillation gained, on the same questions, and which part of it is SQL.

A base model often writes a right query and then goes on: with another query, the next question, prose. Each answer is
therefore judged twice, the second time as the samples have it already:

* as written: right, and nothing after the first statement (a program could run it as it came);
* cut: the first statement alone is right, whatever follows.

The gain, in items, splits exactly:

    student as written − base as written  =  (base cut − base as written)        learned to stop
                                           + (student cut − base cut)            learned SQL
                                           + (student as written − student cut)  still not stopping, ≤ 0

Intervals are 95 % Wilson; items gained and lost go into an exact two-sided McNemar test. Items whose gold query returns
nothing are no evidence and count in exact match only. A judge's verdicts, where there are any, stand against execution
in a 2×2 table with Cohen's κ (Cohen 1960).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quantlab.errors import DataError
from quantlab.runs.run import VERDICTS
from quantlab.stats import flips, mcnemar_exact, wilson

Sample = Mapping[str, Any]
LEVELS = ("easy", "medium", "hard")  # the order of rows; other levels follow


class Agreement(Protocol):
    """A judge's yes against execution's ok, as counts; `kappa` is None or NaN where chance alone agrees."""

    @property
    def both_yes(self) -> int: ...
    @property
    def judge_only(self) -> int: ...
    @property
    def execution_only(self) -> int: ...
    @property
    def both_no(self) -> int: ...
    @property
    def kappa(self) -> float | None: ...
    @property
    def n(self) -> int: ...


@dataclass(frozen=True)
class Share:
    """`right` of `n`, with the 95 % Wilson interval of the share."""

    right: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float | None:
        return self.right / self.n if self.n else None

    def __str__(self) -> str:
        if not self.n:
            return "none"
        return f"{100 * self.right / self.n:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class View:
    """Base against student under one reading of the answers. `lost`, `gained` (ids) and `p` are of EX."""

    em_base: Share
    em_student: Share
    ex_base: Share
    ex_student: Share
    lost: tuple[str, ...]
    gained: tuple[str, ...]
    p: float


@dataclass(frozen=True)
class Gain:
    """EX gained, in items of `n`; the three parts add up to `total`."""

    total: int
    learned_to_stop: int
    learned_sql: int
    not_stopping: int
    n: int

    def share(self, items: int) -> float:
        return items / self.n if self.n else 0.0


@dataclass(frozen=True)
class Level:
    """Right items of one level under both readings, of `n` scored ones."""

    level: str
    n: int
    base_written: int
    base_cut: int
    student_written: int
    student_cut: int


@dataclass(frozen=True)
class BeforeAfter:
    """Everything about one pair of evaluations; `quantlab.report.distillation` shows it."""

    base: str
    student: str
    items: int
    scored: int
    written: View
    cut: View
    gain: Gain
    levels: tuple[Level, ...]
    verdicts: Mapping[str, tuple[int, int]]  # kind → (base, student), of all items
    stopped: tuple[Share, Share]
    judge: Agreement | None = None


def compare(
    base_samples: Sequence[Sample],
    student_samples: Sequence[Sample],
    *,
    base: str = "base",
    student: str = "student",
    judge: Agreement | None = None,
) -> BeforeAfter:
    """Compare two sets of Text2SQL samples (lines of `samples/text2sql.jsonl`) of the same items.

    DataError when an item is missing in one of them, is there twice, or is not the same question with the same gold.
    """
    before, after = _by_id(base_samples, base), _by_id(student_samples, student)
    _same_items(before, after, base, student)
    ids = list(before)
    scored = [key for key in ids if _evidence(before[key]) and _evidence(after[key])]
    views = [_view(before, after, ids, scored, reading) for reading in (_written, _cut)]
    written, cut = views
    gain = Gain(
        total=written.ex_student.right - written.ex_base.right,
        learned_to_stop=cut.ex_base.right - written.ex_base.right,
        learned_sql=cut.ex_student.right - cut.ex_base.right,
        not_stopping=written.ex_student.right - cut.ex_student.right,
        n=len(scored),
    )
    kinds = [Counter(str(sample["verdict"]) for sample in side.values()) for side in (before, after)]
    stops = [sum(_stopped(sample) for sample in side.values()) for side in (before, after)]
    return BeforeAfter(
        base,
        student,
        len(ids),
        len(scored),
        written,
        cut,
        gain,
        _levels(before, after, scored),
        {kind: (kinds[0][kind], kinds[1][kind]) for kind in VERDICTS},
        (_share(stops[0], len(ids)), _share(stops[1], len(ids))),
        judge,
    )


def _by_id(samples: Sequence[Sample], name: str) -> dict[str, Sample]:
    found: dict[str, Sample] = {}
    for number, sample in enumerate(samples, start=1):
        lacking = [key for key in ("id", "verdict", "extra") if key not in sample]
        lacking += [
            f"extra.{key}" for key in ("stopped", "exact") if key not in sample.get("extra", {key: 0})
        ]
        if lacking:
            raise DataError(
                f"{name}: sample {number} has no {', '.join(lacking)}: not a sample of the text2sql task"
            )
        if str(sample["id"]) in found:
            raise DataError(f"{name}: two samples have the id {sample['id']!r}")
        found[str(sample["id"])] = sample
    if not found:
        raise DataError(f"{name}: no Text2SQL samples to compare", hint="evaluate it with the task text2sql")
    return found


def _same_items(before: Mapping[str, Sample], after: Mapping[str, Sample], base: str, student: str) -> None:
    hint = "evaluate both with the same tasks.text2sql.data and limit"
    for one, other, has, lacks in ((before, after, base, student), (after, before, student, base)):
        extra = [key for key in one if key not in other]
        if extra:
            raise DataError(
                f"not the same items: {_some(extra)} in {has}, not in {lacks} "
                f"({len(before)} items in {base}, {len(after)} in {student})",
                hint=hint,
            )
    for key, sample in before.items():
        other = after[key]
        if sample.get("input") != other.get("input") or _gold(sample) != _gold(other):
            raise DataError(
                f"not the same items: {key} has another question or gold in {base} than in {student}",
                hint=hint,
            )


def _view(
    before: Mapping[str, Sample],
    after: Mapping[str, Sample],
    ids: Sequence[str],
    scored: Sequence[str],
    reading: Callable[[Sample, bool], bool],
) -> View:
    base_ok = {key: reading(before[key], before[key]["verdict"] == "ok") for key in scored}
    student_ok = {key: reading(after[key], after[key]["verdict"] == "ok") for key in scored}
    lost = tuple(key for key in scored if base_ok[key] and not student_ok[key])
    gained = tuple(key for key in scored if student_ok[key] and not base_ok[key])
    exact = [
        sum(reading(side[key], bool(side[key]["extra"]["exact"])) for key in ids) for side in (before, after)
    ]
    return View(
        _share(exact[0], len(ids)),
        _share(exact[1], len(ids)),
        _share(sum(base_ok.values()), len(scored)),
        _share(sum(student_ok.values()), len(scored)),
        lost,
        gained,
        mcnemar_exact(*flips(base_ok, student_ok)),
    )


def _levels(
    before: Mapping[str, Sample], after: Mapping[str, Sample], scored: Sequence[str]
) -> tuple[Level, ...]:
    groups: dict[str, list[str]] = {}
    for key in scored:
        if level := before[key]["extra"].get("level"):
            groups.setdefault(str(level), []).append(key)
    order = sorted(groups, key=lambda name: (LEVELS.index(name) if name in LEVELS else len(LEVELS), name))
    rows = []
    for name in order:
        counts = [
            sum(reading(side[key], side[key]["verdict"] == "ok") for key in groups[name])
            for side in (before, after)
            for reading in (_written, _cut)
        ]
        rows.append(Level(name, len(groups[name]), *counts))
    return tuple(rows)


def _written(sample: Sample, right: bool) -> bool:
    return right and _stopped(sample)


def _cut(sample: Sample, right: bool) -> bool:
    return right


def _stopped(sample: Sample) -> bool:
    return bool(sample["extra"]["stopped"])


def _evidence(sample: Sample) -> bool:
    return bool(sample["extra"].get("evidence", True))


def _gold(sample: Sample) -> Any:
    return sample["extra"].get("gold")


def _share(right: int, n: int) -> Share:
    return Share(right, n, *wilson(right, n))


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
