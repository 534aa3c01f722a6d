"""The ranked table, sorting, the HTML page and the model card."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantlab.commands.leaderboard import run as leaderboard
from quantlab.errors import DataError, RecipeError
from quantlab.report.cells import accuracy
from quantlab.report.html import page, scatter
from quantlab.report.leaderboard import print_table, recipe_name, sort_rows
from quantlab.report.model_card import model_card, write_model_card
from quantlab.runs.leaderboard import COLUMNS
from quantlab.runs.run import Run


def row(name: str, **filled: Any) -> dict[str, Any]:
    base = dict.fromkeys(COLUMNS) | {
        "run_id": f"embedded-base-{name}-0a1b2c3d",
        "model": "embedded:base",
        "method": "rtn",
    }
    return base | filled


ROWS = [
    row(
        "none",
        method="none",
        size_bytes=8_000_000,
        ppl=5.0,
        ex=0.5,
        ex_low=0.4,
        ex_high=0.6,
        tie_group="best",
    ),
    row(
        "gptq-int4",
        method="gptq",
        size_bytes=2_500_000,
        ppl=5.5,
        ex=0.45,
        ex_low=0.35,
        ex_high=0.55,
        lost=6,
        gained=1,
    ),
    row("rtn-int3", size_bytes=2_000_000, ppl=9.0),
    row("<script>alert(1)</script>", size_bytes=1, ppl=None, model="</td><img src=x>"),
]


def test_recipe_name_is_cut_out_of_the_run_id() -> None:
    assert recipe_name(ROWS[1]) == "gptq-int4"
    local = row("x") | {"model": "some/dir/tiny-model/", "run_id": "tiny-model-awq-int4-12345678"}
    assert recipe_name(local) == "awq-int4"


def test_sort_puts_the_best_first_and_the_empty_last() -> None:
    assert [recipe_name(r) for r in sort_rows(ROWS, "ppl")][:3] == ["none", "gptq-int4", "rtn-int3"]
    assert [recipe_name(r) for r in sort_rows(ROWS, "ex")][:2] == ["none", "gptq-int4"]
    assert [r["size_bytes"] for r in sort_rows(ROWS, "size_bytes")] == [1, 2_000_000, 2_500_000, 8_000_000]
    with pytest.raises(RecipeError) as caught:
        sort_rows(ROWS, "perplexty_ratio")
    assert "columns:" in caught.value.hint or "did you mean" in caught.value.hint
    with pytest.raises(RecipeError) as caught:
        sort_rows(ROWS, "pl_ratio")
    assert "did you mean ppl_ratio?" in caught.value.hint


def test_table_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(ROWS[:3])
    text = capsys.readouterr().out
    assert "50.0 [40.0, 60.0]" in text and "-6 +1" in text and "gptq-int4" in text
    assert "embedded:base" not in text  # one model: its column says nothing
    assert accuracy(row("x", ex=0.0, ex_low=0.0, ex_high=0.04)) == "0.0 [0.0, 4.0]"


class Page(HTMLParser):
    """Collects tags and their attributes, and that every tag that must be closed is."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained_well_formed_and_escaped() -> None:
    text = page(ROWS)
    parsed = Page()
    parsed.feed(text)
    assert parsed.open == []
    names = [tag for tag, _ in parsed.tags]
    assert (
        names.count("script") == 1 and "img" not in names and "link" not in names and names.count("svg") == 2
    )
    assert names.count("tr") == 1 + len(ROWS)
    for _, attributes in parsed.tags:
        assert not attributes.keys() & {"src", "href", "onload", "onclick"}
    assert not re.search(r"https?://", text)


def test_scatter_draws_points_with_intervals_inside_the_frame() -> None:
    parsed = Page()
    parsed.feed(scatter(ROWS, "ex", "EX", scale=100, low="ex_low", high="ex_high"))
    circles = [attributes for tag, attributes in parsed.tags if tag == "circle"]
    assert len(circles) == 2
    assert all(70 <= float(c["cx"] or 0) <= 620 and 16 <= float(c["cy"] or 0) <= 352 for c in circles)
    assert len([a for tag, a in parsed.tags if tag == "path"]) == 1 + 2  # the axes and two intervals
    assert scatter([row("x")], "ex", "EX") == ""
    assert "circle" in scatter(ROWS[:1], "ppl", "ppl", logarithmic=True)  # one point has no range


def test_leaderboard_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: dict[str, Any] = {"sort": None, "csv": None, "html": None, "as_json": False}
    with pytest.raises(DataError, match="no finished run"):
        leaderboard(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []
    for number, filled in enumerate(ROWS[:3]):
        Run.start(
            tmp_path / "runs" / str(filled["run_id"]), "", filled | {"finished_at": str(number)}
        ).finish()
    leaderboard(
        tmp_path, **arguments | {"sort": "ppl", "csv": tmp_path / "a.csv", "html": tmp_path / "a.html"}
    )
    lines = (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == ",".join(COLUMNS) and "-none-" in lines[1] and len(lines) == 4
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "written:" in capsys.readouterr().out
    with pytest.raises(RecipeError):
        leaderboard(tmp_path, **arguments | {"sort": "nope", "csv": tmp_path / "b.csv"})
    assert not (tmp_path / "b.csv").exists()


MADE = {
    "quantlab_version": "0.1.0",
    "recipe": {
        "kind": "quantize",
        "method": "gptq",
        "bits": 4,
        "group_size": 128,
        "format": "gptq",
        "tasks": {},
    },
    "parent": "owner/model",
    "parent_digest": "abc",
    "calibration": {"source": "calib/x.jsonl", "rows": 4, "seq_len": 8, "digest": "d"},
}


def test_model_card(tmp_path: Path) -> None:
    card = model_card(MADE, ROWS[1])
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "owner/model" and "gptq" in head["tags"]
    assert (
        "gptq, 4 bits, groups of 128" in card
        and "45.0 [35.0, 55.0]" in card
        and "AutoModelForCausalLM" in card
    )
    assert "base_model" not in yaml.safe_load(
        model_card(MADE | {"parent": "embedded:base"}, None).split("---")[1]
    )
    assert write_model_card(tmp_path, None) is None  # not a checkpoint of ours
