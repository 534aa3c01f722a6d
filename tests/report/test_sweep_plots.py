"""The page, the plots and the CSV of a sweep: geometry inside the frame, escaped text, partial grids."""

import csv
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from quantlab.errors import DataError
from quantlab.report import svg
from quantlab.report.axis_plot import COLOURS, axis_plot, choose_metric
from quantlab.report.sweep_grid import arrange, key_of, say
from quantlab.report.sweep_plots import page, write_sweep
from quantlab.runs.leaderboard import COLUMNS
from quantlab.stats import wilson

Axes = dict[str, list[Any]]
GRID: Axes = {"student.lora.r": [4, 16, 64], "data.fraction": [0.2, 0.4, 0.6, 0.8, 1.0]}
BASE = dict.fromkeys(COLUMNS) | {"run_id": "base-none-1", "model": "embedded:base", "ex": 21 / 126}


def rows_of(axes: Axes, missing: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    rows = []
    for number, values in enumerate(itertools.product(*axes.values())):
        if number in missing:
            continue
        right = min(126, 30 + 3 * number)
        low, high = wilson(right, 126)
        measured = {"run_id": f"student-{number}", "model": "out/student", "parent": "base-none-1", "em": 0.25,
                    "ex": right / 126, "ex_low": low, "ex_high": high}  # fmt: skip
        rows.append(dict.fromkeys(COLUMNS) | measured | dict(zip(axes, values, strict=True)))
    return rows


def tree(plot: str) -> ElementTree.Element:
    return ElementTree.fromstring(plot)


def marks(plot: str) -> list[ElementTree.Element]:
    """Points of the plot itself: legend marks stand below the frame."""
    found = [e for e in tree(plot).iter() if e.tag in ("circle", "rect", "polygon")]
    return [e for e in found if place(e)[1] <= svg.HEIGHT - svg.BOTTOM]


def place(mark: ElementTree.Element) -> tuple[float, float]:
    if mark.tag == "circle":
        return float(mark.get("cx", "")), float(mark.get("cy", ""))
    if mark.tag == "rect":
        return float(mark.get("x", "")) + 4, float(mark.get("y", "")) + 4
    points = [tuple(map(float, pair.split(","))) for pair in mark.get("points", "").split()]
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def words(plot: str) -> list[str]:
    return [e.text or "" for e in tree(plot).iter("text")]


def boxes(plot: str) -> list[tuple[float, float, float, float]]:
    """Where the horizontal texts are, about."""
    found = []
    for e in tree(plot).iter("text"):
        if e.get("transform"):
            continue
        x, y, width = float(e.get("x", "")), float(e.get("y", "")), svg.wide(e.text or "")
        left = {"start": x, "middle": x - width / 2, "end": x - width}[e.get("text-anchor", "start")]
        found.append((left, y - 10, left + width, y + 2))
    return found


def check_texts_apart(plot: str) -> None:
    height = float(tree(plot).get("viewBox", "").split()[3])
    all_boxes = boxes(plot)
    for left, top, right, bottom in all_boxes:
        assert left >= -1 and right <= svg.WIDTH + 1 and top >= 0 and bottom <= height
    for one, two in itertools.combinations(all_boxes, 2):
        apart = one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
        assert apart, (one, two)


def test_numeric_axis_has_a_series_a_combination_with_intervals() -> None:
    plot, caption = axis_plot("data.fraction", GRID, rows_of(GRID), bases=[BASE])
    points = marks(plot)
    assert len(points) == 15 and "95 % Wilson" in caption
    for mark in points:
        x, y = place(mark)
        assert svg.LEFT <= x <= svg.WIDTH - svg.RIGHT and svg.TOP <= y <= svg.HEIGHT - svg.BOTTOM
    assert {mark.get("fill") for mark in points} == set(COLOURS[:3])
    assert len({mark.tag for mark in points}) == 3  # shapes tell series apart too
    paths = [e.get("d", "") for e in tree(plot).iter("path")]
    assert sum("L" in d for d in paths) == 3 * 4  # lines between neighbours
    assert sum(d.count("h6") == 2 for d in paths) == 15  # bars
    said = words(plot)
    assert {"0.2", "1", "r 4", "r 64", "data.fraction", "base embedded:base: 16.67 %"} <= set(said)
    check_texts_apart(plot)
    titles = [e.findtext("title") or "" for e in points]
    assert any(re.fullmatch(r"fraction 0.2: 23.8 \[17.2, 32.0\] %", title) for title in titles)
    assert tree(plot).get("role") == "img" and "execution accuracy" in tree(plot).get("aria-label", "")


def test_interval_and_base_are_where_the_scale_says() -> None:
    axes: Axes = {"data.fraction": [0.5, 1.0]}
    plot, _ = axis_plot("data.fraction", axes, rows_of(axes), bases=[BASE])
    ticks = {float(e.text or ""): float(e.get("y", "")) - 4 for e in tree(plot).iter("text")
             if e.get("text-anchor") == "end" and not e.get("transform")}  # fmt: skip
    (low, y_low), (high, y_high) = min(ticks.items()), max(ticks.items())
    pixel = lambda value: y_low + (value - low) / (high - low) * (y_high - y_low)  # noqa: E731
    assert abs(place(marks(plot)[0])[1] - pixel(100 * 30 / 126)) < 0.1
    bar = next(e.get("d", "") for e in tree(plot).iter("path") if "h6" in e.get("d", ""))
    ends = re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)", bar)
    expected = [pixel(100 * end) for end in wilson(30, 126)]
    assert ends and all(abs(float(e) - p) < 0.1 for e, p in zip(ends.groups(), expected, strict=True))
    dashed = next(e for e in tree(plot).iter("path") if e.get("stroke-dasharray"))
    line = re.match(r"M([\d.]+) ([\d.]+)H([\d.]+)", dashed.get("d", ""))
    assert line and abs(float(line[2]) - pixel(100 * 21 / 126)) < 0.1
    assert (float(line[1]), float(line[3])) == (svg.LEFT, svg.WIDTH - svg.RIGHT)


def test_wide_ranges_are_logarithmic_and_series_do_not_hide_each_other() -> None:
    plot, _ = axis_plot("student.lora.r", GRID, rows_of(GRID))
    ticks = [float(e.get("x1", "")) for e in tree(plot).iter("line") if e.get("x1") == e.get("x2")]
    assert abs((ticks[1] - ticks[0]) - (ticks[2] - ticks[1])) < 0.2  # 4, 16, 64
    xs = [place(mark)[0] for mark in marks(plot)]
    assert len({round(x, 1) for x in xs}) == 15
    check_texts_apart(plot)


def test_categories_are_points_in_the_order_given_and_wrapped() -> None:
    axes: Axes = {
        "data.source,data.filters,data.dedup": [
            ["hf:shangrilar/ko_text2sql/origin:train", [], False],
            ["hf:shangrilar/ko_text2sql/clean:train", [], False],
            ["ko_text2sql/한국어.jsonl", ["parses", "binds", "executes", "returns", "judge"], True],
        ]
    }
    (axis,) = axes
    plot, _ = axis_plot(axis, axes, rows_of(axes))
    xs = [place(mark)[0] for mark in marks(plot)]
    assert xs == sorted(xs) and len(xs) == 3
    assert not any("L" in e.get("d", "") for e in tree(plot).iter("path"))
    check_texts_apart(plot)
    yes_no: Axes = {"data.dedup": [True, False]}  # not numbers, whatever Python says
    assert {"true", "false"} <= set(words(axis_plot("data.dedup", yes_no, rows_of(yes_no))[0]))


def test_bases_stand_at_their_own_student() -> None:
    axis = "student.model,student.lora.r,student.lora.alpha"
    axes: Axes = {axis: [["own/six", 16, 32], ["own/ten", 16, 32]]}
    rows = rows_of(axes)
    bases = [BASE | {"run_id": "b6", "model": "own/six"}, BASE | {"run_id": "b10", "model": "x", "ex": 0.384}]
    rows[1]["parent"] = "b10"
    plot, _ = axis_plot(axis, axes, rows, bases=bases)
    dashes = [
        e.get("d", "") for e in tree(plot).iter("path") if e.get("stroke-dasharray") and "H" in e.get("d", "")
    ]
    spans = [tuple(map(float, re.findall(r"M([\d.]+) [\d.]+H([\d.]+)", d)[0])) for d in dashes]
    xs = [place(mark)[0] for mark in marks(plot)]
    assert len(spans) == 2
    assert (
        all(left < x < right for (left, right), x in zip(spans, xs, strict=True))
        and spans[0][1] < spans[1][0]
    )
    assert "own/six" in words(plot)  # rank and alpha are the same everywhere: not in the label


def test_more_than_eight_combinations_are_averaged() -> None:
    axes = GRID | {"student.lora.alpha": [16, 32]}
    rows = rows_of(axes, missing=(3,))
    plot, caption = axis_plot("student.lora.alpha", axes, rows)
    points = marks(plot)
    assert len(points) == 2 and "Mean over 14 combinations of r, fraction" in caption
    assert "Left out: 1 not measured at every value yet." in caption
    whole = [row for row in rows if (row["student.lora.r"], row["data.fraction"]) != (4, 0.4)]
    mean = sum(100 * row["ex"] for row in whole if row["student.lora.alpha"] == 16) / 14
    assert f"mean of 14 cells {mean:.4g} %" in (points[0].findtext("title") or "")
    halves = [row for row in rows if (row["data.fraction"] == 0.2) == (row["student.lora.alpha"] == 16)]
    axes = GRID | {"student.lora.alpha": [16, 32]}
    assert "different cells" in axis_plot("student.lora.alpha", axes, halves)[1]


def test_a_missing_cell_breaks_the_line_and_is_named() -> None:
    axes: Axes = {"data.fraction": [0.2, 0.4, 0.6, 0.8]}
    plot, _ = axis_plot("data.fraction", axes, rows_of(axes, missing=(1,)))
    assert len(marks(plot)) == 3
    assert sum("L" in e.get("d", "") for e in tree(plot).iter("path")) == 1
    text = page(axes, rows_of(axes, missing=(1,)))
    assert "3 of 4 cells have a result" in text and "Cells without a result: 1" in text
    assert "<li>fraction 0.4</li>" in text
    nothing = page(axes, [])
    assert "0 of 4 cells" in nothing and "<svg" not in nothing and nothing.count("<li>") == 4


def test_perplexity_where_there_is_no_accuracy() -> None:
    axes: Axes = {"train.lr": [1e-4, 1e-3]}
    rows = [
        row | {"ex": None, "ex_low": None, "ex_high": None, "ppl": 5.0 - n}
        for n, row in enumerate(rows_of(axes))
    ]
    plot, caption = axis_plot("train.lr", axes, rows, bases=[BASE | {"ex": None, "ppl": 6.5}])
    assert choose_metric(rows).column == "ppl" and len(marks(plot)) == 2 and caption == ""
    assert "base embedded:base: 6.5" in words(plot)
    assert "Best: lr 0.001" in page(axes, rows)  # less is better
    assert axis_plot("train.lr", axes, [row | {"ppl": None} for row in rows]) == ("", "")


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_everything_that_comes_from_outside_is_escaped() -> None:
    evil = "</svg><script>alert(1)</script>&\"'"
    axes: Axes = {"student.model": [evil, "b"], f"data.{evil}": [1, 2]}
    rows = [
        row | {"run_id": f"{evil}-{n}", "model": evil} for n, row in enumerate(rows_of(axes, missing=(3,)))
    ]
    text = page(axes, rows, bases=[BASE | {"model": evil}], title=evil)
    parsed = Page()
    parsed.feed(text)
    names = [tag for tag, _ in parsed.tags]
    assert parsed.open == [] and names.count("script") == 1 and names.count("svg") == 2
    assert not any(attributes.keys() & {"src", "href", "onload"} for _, attributes in parsed.tags)
    for plot in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(plot)


def test_files(tmp_path: Path) -> None:
    axes: Axes = {
        "student.lora.r,student.lora.alpha": [[16, 32], [64, 128]],
        "data.filters": [[], ["parses"]],
    }
    rows = rows_of(axes, missing=(2,))
    html, table = write_sweep(tmp_path / "out", axes, rows, bases=[BASE], title="Rank")
    assert html.name == "sweep.html" and "<h1>Rank</h1>" in html.read_text(encoding="utf-8")
    with table.open(encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    assert list(read[0]) == ["student.lora.r", "student.lora.alpha", "data.filters", *COLUMNS]
    assert [(row["student.lora.r"], row["data.filters"], row["run_id"]) for row in read] == [
        ("16", "[]", "student-0"), ("16", '["parses"]', "student-1"),
        ("64", "[]", ""), ("64", '["parses"]', "student-3"),
    ]  # fmt: skip
    flat = [{**row, "student.lora.r": row[axis][0], "student.lora.alpha": row[axis][1]}
            for axis in [next(iter(axes))] for row in rows]  # fmt: skip
    for row in flat:
        del row["student.lora.r,student.lora.alpha"]
    assert [row and row["run_id"] for _, row in arrange(axes, flat)] == [
        "student-0",
        "student-1",
        None,
        "student-3",
    ]


def test_rows_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    axes: Axes = {"data.fraction": [0.5, 1]}
    rows = rows_of(axes)
    with pytest.raises(DataError, match="no cell of this sweep"):
        write_sweep(tmp_path, axes, [rows[0] | {"data.fraction": 0.7}])
    with pytest.raises(DataError, match="the same cell: fraction 0.5"):
        write_sweep(tmp_path, axes, [rows[0], rows[0] | {"run_id": "other"}])
    with pytest.raises(DataError, match="no value for data.fraction"):
        write_sweep(tmp_path, axes, [{"run_id": "x"}])
    assert list(tmp_path.iterdir()) == []


def test_long_names_that_begin_alike_are_told_apart_by_their_ends() -> None:
    axes: Axes = {"student.model": [f"an-organisation/a-model-with-a-long-name-7B-v{n}" for n in range(8)]}
    plot, _ = axis_plot("student.model", axes, rows_of(axes))
    assert all(any(text.endswith(f"v{n}") for text in words(plot)) for n in range(8))
    check_texts_apart(plot)


def test_series_keep_the_order_of_the_grid_when_cells_are_missing() -> None:
    plot, _ = axis_plot("data.fraction", GRID, rows_of(GRID, missing=(0, 1)))
    assert [text for text in words(plot) if text.startswith("r ")] == ["r 4", "r 16", "r 64"]


def test_series_that_read_alike_stay_apart() -> None:
    axes: Axes = {"data.fraction": [0.5, 1], "data.holdout_db": [1, "1"], "a.model": ["x"], "b.model": ["x"]}
    plot, _ = axis_plot("data.fraction", axes, rows_of(axes))
    assert len(marks(plot)) == 4 and words(plot).count("holdout_db 1, a.model x, b.model x") == 2


def test_values_in_words_and_their_equality() -> None:
    assert [say(v) for v in ([], None, True, 0.2, 1.0, ["a", "b"], {"r": 1})] == [
        "none", "none", "true", "0.2", "1", "a, b", "r 1",
    ]  # fmt: skip
    assert key_of(1) == key_of(1.0) != key_of(True) and key_of((1, 2)) == key_of([1, 2]) != key_of("12")
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2.0], "a": 1.0})


def test_scales_mark_round_numbers_around_the_values() -> None:
    for values in ([0.0], [100.0], [16.7, 88.2], [3.2, 3.21], [0.0, 100.0], [99.9, 100.0]):
        place_of, ticks = svg.round_scale(values, 352, 16, floor=0, ceiling=100)
        assert ticks[0] <= min(values) and max(values) <= ticks[-1] and 2 <= len(ticks) <= 8
        assert ticks[0] >= 0 and ticks[-1] <= 100
        assert place_of(ticks[0]) == 352 and place_of(ticks[-1]) == 16
    assert svg.round_scale([16.7, 88.2], 352, 16, floor=0, ceiling=100)[1] == [0, 20, 40, 60, 80, 100]


def test_words_that_do_not_fit_are_cut_or_wrapped() -> None:
    assert svg.fit("short", 100) == "short" and svg.fit("한국어" * 20, 100).endswith("…")
    assert svg.wide(svg.fit("x" * 100, 100)) <= 100 + svg.CHARACTER
    assert svg.wrap("parses, select, binds", 60, 3) == ["parses,", "select,", "binds"]
    assert len(svg.wrap("a b c d e f g h", 20, 3)) == 3 and svg.wrap("", 50, 2) == [""]
