"""Before and after: the split of the gain, the two readings, refusals, and the four forms."""

import json
import random
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.errors import DataError
from quantlab.report.distillation import as_dict, as_html, as_markdown, as_text, compare, tables
from quantlab.runs.run import VERDICTS, Sample
from quantlab.stats import mcnemar_exact, wilson

Row = dict[str, Any]


def sample(key: str, verdict: str = "ok", *, stopped: bool = True, exact: bool = False, evidence: bool = True,
           level: str | None = "easy", question: str = "", gold: str = "SELECT 1;") -> Row:  # fmt: skip
    extra = {"sql": "", "gold": gold, "exact": exact, "evidence": evidence, "stopped": stopped}
    extra |= {} if level is None else {"level": level}
    return {
        "id": key,
        "input": question or f"q {key}",
        "output": "",
        "verdict": verdict,
        "why": "",
        "extra": extra,
    }


@dataclass(frozen=True)
class Counts:
    both_yes: int = 40
    judge_only: int = 7
    execution_only: int = 3
    both_no: int = 50
    kappa: float | None = 0.8
    n: int = 100


# id, base's verdict and whether it stopped, student's: every way from one to the other.
BASE = [
    sample("a", "ok", stopped=False, level="easy"),
    sample("b", "ok", stopped=True, level="easy", exact=True),
    sample("c", "wrong", stopped=False, level="hard"),
    sample("d", "error", stopped=True, level="hard"),
    sample("e", "unparsed", stopped=False, level="odd"),
    sample("f", "wrong", stopped=True, level="medium"),
    sample("g", "ok", evidence=False, exact=True, level="hard"),
]
STUDENT = [
    sample("g", "wrong", evidence=False, level="hard"),
    sample("a", "ok", stopped=True, level="easy", exact=True),  # learned to stop
    sample("b", "wrong", stopped=True, level="easy"),  # lost
    sample("c", "ok", stopped=True, level="hard", exact=True),  # learned SQL
    sample("d", "ok", stopped=False, level="hard"),  # learned SQL, does not stop
    sample("e", "ok", stopped=True, level="odd"),
    sample("f", "timeout", stopped=False, level="medium"),
]


def test_two_readings_and_the_split_of_the_gain() -> None:
    result = compare(BASE, STUDENT)
    assert (result.items, result.scored) == (7, 6)
    written, cut = result.written, result.cut
    assert (written.ex_base.right, written.ex_student.right) == (1, 3)
    assert (cut.ex_base.right, cut.ex_student.right) == (2, 4)
    assert written.lost == ("b",) and written.gained == ("a", "c", "e")
    assert cut.lost == ("b",) and cut.gained == ("c", "d", "e")
    assert written.p == mcnemar_exact(1, 3) and cut.p == mcnemar_exact(1, 3)
    gain = result.gain
    assert (gain.total, gain.learned_to_stop, gain.learned_sql, gain.not_stopping) == (2, 1, 2, -1)
    assert (cut.ex_base.low, cut.ex_base.high) == wilson(2, 6)
    # Exact match counts items without evidence too, and needs the stop in the first reading only.
    assert (cut.em_base.right, cut.em_base.n) == (2, 7) and written.em_base.right == 2
    assert (cut.em_student.right, written.em_student.right) == (2, 2)
    assert [share.right for share in result.stopped] == [4, 5]
    assert result.verdicts == {
        "ok": (3, 4),
        "wrong": (2, 2),
        "error": (1, 0),
        "timeout": (0, 1),
        "unparsed": (1, 0),
    }


def test_levels_in_their_order_of_scored_items() -> None:
    levels = compare(BASE, STUDENT).levels
    assert [(row.level, row.n) for row in levels] == [("easy", 2), ("medium", 1), ("hard", 2), ("odd", 1)]
    hard = levels[2]
    assert (hard.base_written, hard.base_cut, hard.student_written, hard.student_cut) == (0, 0, 1, 2)
    bare = compare([sample("a", level=None)], [sample("a", level=None)])
    assert bare.levels == () and not any("level" in table.title for table in tables(bare))


flags = st.tuples(st.sampled_from(VERDICTS), st.booleans(), st.booleans(), st.sampled_from(["easy", "hard"]))


@given(st.lists(st.tuples(flags, flags, st.booleans()), min_size=1, max_size=40))
def test_the_parts_add_up_exactly_and_nobody_unlearns_by_not_stopping(pairs: list[Any]) -> None:
    sides: list[list[Row]] = [[], []]
    for number, (one, two, evidence) in enumerate(pairs):
        for side, (verdict, stopped, exact, level) in zip(sides, (one, two), strict=True):
            side.append(
                sample(str(number), verdict, stopped=stopped, exact=exact, level=level, evidence=evidence)
            )
    result = compare(*sides)
    gain = result.gain
    assert gain.learned_to_stop + gain.learned_sql + gain.not_stopping == gain.total
    assert gain.learned_to_stop >= 0 >= gain.not_stopping
    for view in (result.written, result.cut):
        assert len(view.gained) - len(view.lost) == view.ex_student.right - view.ex_base.right
        assert view.p == mcnemar_exact(len(view.lost), len(view.gained))
    assert gain.total == result.written.ex_student.right - result.written.ex_base.right
    assert sum(level.n for level in result.levels) == result.scored
    assert sum(level.student_written for level in result.levels) == result.written.ex_student.right
    for form in (as_text, as_markdown, as_html):
        assert form(result)
    json.dumps(as_dict(result), allow_nan=False)


def test_the_order_of_samples_does_not_matter() -> None:
    shuffled = random.Random(0).sample(STUDENT, len(STUDENT))
    assert compare(BASE, shuffled) == compare(BASE, STUDENT)


def test_samples_as_they_are_written_to_disk() -> None:
    written = Sample("a", "q", "SELECT 1;", "ok", "", BASE[0]["extra"])
    assert compare([vars(written)], [vars(written)]).gain.total == 0


@pytest.mark.parametrize(
    ("base", "student", "expected"),
    [
        (BASE, STUDENT[1:], "not the same items: g in base, not in student (7 items in base, 6 in student)"),
        (BASE[:2], STUDENT, "g, c, d and 2 more in student, not in base"),
        (BASE[:1], [sample("a", question="other")], "a has another question or gold in base than in student"),
        (BASE[:1], [sample("a", gold="SELECT 2;")], "a has another question or gold"),
        (BASE[:1] * 2, BASE[:1], "base: two samples have the id 'a'"),
        ([], [], "base: no Text2SQL samples to compare"),
        (
            [{"id": "a", "verdict": "ok", "extra": {}}],
            BASE[:1],
            "base: sample 1 has no extra.stopped, extra.exact",
        ),
        ([{"id": "a"}], BASE[:1], "base: sample 1 has no verdict, extra: not a sample of the text2sql task"),
    ],
)
def test_refused(base: list[Row], student: list[Row], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        compare(base, student)
    assert expected in str(caught.value)


def test_evidence_in_one_of_them_only_does_not_score() -> None:
    result = compare([sample("a"), sample("b")], [sample("a", evidence=False), sample("b")])
    assert (result.items, result.scored) == (2, 1)
    none = compare([sample("a", evidence=False)], [sample("a", evidence=False)])
    assert none.written.ex_base.value is None and "none" in as_text(none)
    assert json.dumps(as_dict(none), allow_nan=False)


def test_dict_has_counts_ids_and_the_judge() -> None:
    content = as_dict(compare(BASE, STUDENT, base="yi", student="yi-sql", judge=Counts()))
    assert content["gain"] == {"total": 2, "learned_to_stop": 1, "learned_sql": 2, "not_stopping": -1, "n": 6}
    assert content["cut"]["ex_student"]["value"] == 4 / 6 and content["cut"]["gained"] == ("c", "d", "e")
    assert content["judge"] == {"both_yes": 40, "judge_only": 7, "execution_only": 3, "both_no": 50, "n": 100,
                                "kappa": 0.8}  # fmt: skip
    assert (content["base"], content["student"]) == ("yi", "yi-sql")
    for kappa in (None, float("nan")):
        undefined = compare(BASE, STUDENT, judge=Counts(kappa=kappa))
        assert as_dict(undefined)["judge"]["kappa"] is None and "κ not defined" in as_text(undefined)
    assert as_dict(compare(BASE, STUDENT))["judge"] is None


def test_text_has_aligned_columns_and_every_number() -> None:
    text = as_text(compare(BASE, STUDENT, judge=Counts()))
    assert "33.3 [9.7, 70.0]" in text and "66.7 [30.0, 90.3]" in text and "-1 +3" in text
    assert re.search(r"learned to stop .* \+1 +\+16\.7", text)
    assert re.search(r"learned SQL .* \+2 +\+33\.3", text)
    assert re.search(r"still not stopping .* -1 +-16\.7", text)
    assert "7 items, 6 of them scored by execution" in text
    assert re.search(r"judge: yes +40 +7", text) and "0.800" in text and "agree on 90.0 %" in text
    for block, table in zip(text.split("\n\n"), tables(compare(BASE, STUDENT, judge=Counts())), strict=True):
        lines = block.splitlines()[2:]
        ends = [line.index(row[1], 2 + len(row[0])) + len(row[1]) for line, row in zip(lines, table.rows)]
        assert len(set(ends)) == 1  # numbers end in one column


def test_markdown_cells_stay_in_their_table() -> None:
    text = as_markdown(compare(BASE, STUDENT, base="a|b`c`", student="<script>\n[x](y)"))
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert "<script>" not in text.replace("\\<script\\>", "") and "a\\|b" in text


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_well_formed_and_escaped() -> None:
    parsed = Page()
    parsed.feed(as_html(compare(BASE, STUDENT, base="</td><script>", student="&", judge=Counts())))
    assert parsed.open == [] and "script" not in parsed.tags and parsed.tags.count("table") == 5
