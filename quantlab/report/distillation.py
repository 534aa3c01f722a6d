"""Before and after as a dict, as text for the terminal, as Markdown for the model card, as HTML.

One list of tables (`tables`) says what is shown; the forms differ in how a table is written. The numbers come from
`quantlab.report.before_after`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from quantlab.report.before_after import Agreement, BeforeAfter, compare

__all__ = ["BeforeAfter", "Table", "as_dict", "as_html", "as_markdown", "as_text", "compare", "tables"]


@dataclass(frozen=True)
class Table:
    """A title, a head, rows of words, and a sentence below; the first column is text, the others are numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def as_dict(result: BeforeAfter) -> dict[str, Any]:
    """Numbers and ids for run.json; shares in 0 … 1 with their counts."""
    content = asdict(result) | {"judge": None}  # the judge may be any object with these counts
    if result.judge is not None:
        names = ("both_yes", "judge_only", "execution_only", "both_no", "n")
        content["judge"] = {name: getattr(result.judge, name) for name in names} | {
            "kappa": _kappa(result.judge)
        }
    for view in ("written", "cut"):
        for side in ("em_base", "em_student", "ex_base", "ex_student"):
            content[view][side]["value"] = getattr(getattr(result, view), side).value
    content["verdicts"] = {kind: list(pair) for kind, pair in result.verdicts.items()}
    return content


def tables(result: BeforeAfter) -> list[Table]:
    """What every form shows, in this order."""
    shown = [_accuracy_table(result), _gain_table(result)]
    if result.levels:
        shown.append(_level_table(result))
    shown.append(_verdict_table(result))
    if result.judge is not None:
        shown.append(_judge_table(result.judge))
    return shown


def as_text(result: BeforeAfter) -> str:
    """Tables for the terminal, columns aligned."""
    blocks = []
    for table in tables(result):
        rows = [table.head, *table.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(table.head))]
        lines = [table.title]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(w.rjust(size) for w, size in zip(row[1:], widths[1:]))]
            lines.append("  " + "  ".join(cells).rstrip())
        blocks.append("\n".join([*lines, *([f"  {table.note}"] if table.note else [])]))
    return "\n\n".join(blocks) + "\n"


def as_markdown(result: BeforeAfter) -> str:
    """Tables for the model card, each under a bold title."""
    blocks = []
    for table in tables(result):
        head = "| " + " | ".join(map(_plain, table.head)) + " |"
        rule = "|---|" + "---:|" * (len(table.head) - 1)
        body = ["| " + " | ".join(map(_plain, row)) + " |" for row in table.rows]
        blocks.append(f"**{_plain(table.title)}**\n\n" + "\n".join([head, rule, *body]))
        if table.note:
            blocks.append(_plain(table.note))
    return "\n\n".join(blocks) + "\n"


def as_html(result: BeforeAfter) -> str:
    """Tables for a page that has the style of the leaderboard's."""
    blocks = ['<section class="distillation"><h2>Before and after</h2>']
    for table in tables(result):
        head = _html_row(table.head, "th")
        body = "\n".join(_html_row(row, "td") for row in table.rows)
        caption = f"<caption>{escape(table.title)}</caption>"
        blocks.append(f"<table>{caption}<thead>{head}</thead><tbody>\n{body}\n</tbody></table>")
        if table.note:
            blocks.append(f"<p>{escape(table.note)}</p>")
    return "\n".join([*blocks, "</section>"])


def _accuracy_table(result: BeforeAfter) -> Table:
    rows = []
    for name, view in (("as written", result.written), ("cut at the first statement", result.cut)):
        flipped = f"-{len(view.lost)} +{len(view.gained)}"
        rows.append((f"EX, {name}", str(view.ex_base), str(view.ex_student), flipped, _p(view.p)))
        rows.append((f"EM, {name}", str(view.em_base), str(view.em_student), "", ""))
    rows.append(("stopped by itself", str(result.stopped[0]), str(result.stopped[1]), "", ""))
    note = f"{result.items} items, {result.scored} of them scored by execution."
    if result.scored < result.items:
        note += " The gold query of the others returns nothing, which is no evidence."
    head = ("% [95 %]", result.base, result.student, "lost/gained", "McNemar p")
    return Table("Accuracy before and after", head, tuple(rows), note)


def _gain_table(result: BeforeAfter) -> Table:
    gain = result.gain
    parts = (
        ("learned to stop (base cut − base as written)", gain.learned_to_stop),
        ("learned SQL (student cut − base cut)", gain.learned_sql),
        ("still not stopping (student as written − student cut)", gain.not_stopping),
        ("in all (student − base, as written)", gain.total),
    )
    rows = tuple((name, f"{items:+d}", f"{100 * gain.share(items):+.1f}") for name, items in parts)
    return Table("Where the gain in EX comes from", ("", "items", "points"), rows)


def _level_table(result: BeforeAfter) -> Table:
    rows = []
    for level in result.levels:
        counts = (level.base_written, level.student_written, level.base_cut, level.student_cut)
        rows.append((level.level, str(level.n), *(f"{100 * count / level.n:.1f}" for count in counts)))
    base, student = result.base, result.student
    head = (
        "level",
        "items",
        f"{base}, as written",
        f"{student}, as written",
        f"{base}, cut",
        f"{student}, cut",
    )
    return Table("EX by level, %", head, tuple(rows))


def _verdict_table(result: BeforeAfter) -> Table:
    rows = tuple((kind, str(one), str(two)) for kind, (one, two) in result.verdicts.items())
    return Table("Verdicts on the first statement", ("", result.base, result.student), rows)


def _judge_table(judge: Agreement) -> Table:
    kappa = _kappa(judge)
    rows = (
        ("judge: yes", str(judge.both_yes), str(judge.judge_only)),
        ("judge: no", str(judge.execution_only), str(judge.both_no)),
    )
    note = f"{judge.n} items; Cohen's κ " + ("not defined." if kappa is None else f"{kappa:.3f}.")
    if judge.n:
        agreed = judge.both_yes + judge.both_no
        note += f" They agree on {100 * agreed / judge.n:.1f} %."
    return Table("The judge against execution", ("", "execution: right", "execution: not"), rows, note)


def _kappa(judge: Agreement) -> float | None:
    return None if judge.kappa is None or not math.isfinite(judge.kappa) else judge.kappa


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _plain(words: str) -> str:
    """Words that cannot leave their cell in Markdown."""
    for sign in "\\`*_[]<>|":
        words = words.replace(sign, "\\" + sign)
    return words.replace("\n", " ")


def _html_row(cells: Iterable[str], tag: str) -> str:
    first, *others = (escape(cell) for cell in cells)
    return f"<tr><{tag} class=text>{first}</{tag}>" + "".join(f"<{tag}>{c}</{tag}>" for c in others) + "</tr>"
