"""A judge's verdicts set against execution: the 2×2 table and Cohen's kappa.

Kappa is the agreement beyond chance, (p_o − p_e) / (1 − p_e) (Cohen 1960), with p_o the share of items on which
both say the same and p_e the share expected if both kept their shares of yes but knew nothing of the item. Its 95 %
interval uses the large-sample standard error √(p_o (1 − p_o) / n) / (1 − p_e) and is rough below some 30 items. Where
both always say the same one thing, p_e is 1 and kappa is undefined: None, not 0 and not 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Disagreement:
    id: str
    judge: bool
    execution: bool


@dataclass(frozen=True)
class Agreement:
    """Counts over the `n` items that both have a verdict on; `unpaired` items have only one of the two."""

    both_yes: int
    judge_only: int
    execution_only: int
    both_no: int
    disagreements: tuple[Disagreement, ...] = ()
    unpaired: int = 0

    @property
    def n(self) -> int:
        return self.both_yes + self.judge_only + self.execution_only + self.both_no

    @property
    def observed(self) -> float | None:
        """Share of items on which both say the same."""
        return (self.both_yes + self.both_no) / self.n if self.n else None

    @property
    def expected(self) -> float | None:
        """The same by chance, from the two shares of yes."""
        if not self.n:
            return None
        judge = self.both_yes + self.judge_only
        execution = self.both_yes + self.execution_only
        return (judge * execution + (self.n - judge) * (self.n - execution)) / self.n**2

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa, −1 to 1; None where it is undefined."""
        observed, expected = self.observed, self.expected
        if observed is None or expected is None or expected == 1:
            return None
        return (observed - expected) / (1 - expected)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of kappa."""
        kappa, observed, expected = self.kappa, self.observed, self.expected
        if kappa is None or observed is None or expected is None:
            return None
        half = Z_95 * math.sqrt(observed * (1 - observed) / self.n) / (1 - expected)
        return max(-1.0, kappa - half), min(1.0, kappa + half)

    def record(self) -> dict[str, float | int | None]:
        """The numbers, for a run's details."""
        low, high = self.interval or (None, None)
        return {
            "n": self.n,
            "both_yes": self.both_yes,
            "judge_only": self.judge_only,
            "execution_only": self.execution_only,
            "both_no": self.both_no,
            "unpaired": self.unpaired,
            "agreement": self.observed,
            "kappa": self.kappa,
            "kappa_low": low,
            "kappa_high": high,
        }


def confusion(judge: Mapping[str, bool], execution: Mapping[str, bool]) -> Agreement:
    """Compare item id → yes of the judge with item id → right of execution, on the items that are in both."""
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    differ = []
    for name, said in judge.items():
        if name not in execution:
            continue
        ran = execution[name]
        counts[bool(said), bool(ran)] += 1
        if bool(said) != bool(ran):
            differ.append(Disagreement(name, bool(said), bool(ran)))
    return Agreement(
        both_yes=counts[True, True],
        judge_only=counts[True, False],
        execution_only=counts[False, True],
        both_no=counts[False, False],
        disagreements=tuple(differ),
        unpaired=len(judge.keys() ^ execution.keys()),
    )


def table_text(agreement: Agreement) -> str:
    """The 2×2 table and kappa as plain text."""
    rows = [
        ("", "executes right", "executes wrong"),
        ("judge yes", str(agreement.both_yes), str(agreement.judge_only)),
        ("judge no", str(agreement.execution_only), str(agreement.both_no)),
    ]
    lines = [f"{name:<9}  {right:>14}  {wrong:>14}" for name, right, wrong in rows]
    return "\n".join([*lines, words(agreement)])


def table_markdown(agreement: Agreement) -> str:
    """The 2×2 table and kappa as markdown."""
    return "\n".join(
        [
            "| | executes right | executes wrong |",
            "|---|---:|---:|",
            f"| judge yes | {agreement.both_yes} | {agreement.judge_only} |",
            f"| judge no | {agreement.execution_only} | {agreement.both_no} |",
            "",
            words(agreement),
        ]
    )


def words(agreement: Agreement) -> str:
    """One line: agreement, kappa with its interval, and what is missing."""
    if agreement.observed is None:
        text = "no item has both a verdict and an execution"
    else:
        text = f"agreement {agreement.observed:.1%} of {agreement.n}, Cohen's κ "
        if agreement.kappa is None or agreement.interval is None:
            text += "undefined (both always say the same)"
        else:
            low, high = agreement.interval
            text += f"{agreement.kappa:.2f} (95 % interval {low:.2f} to {high:.2f})"
    return text + (f"; {agreement.unpaired} with only one of the two" if agreement.unpaired else "")
