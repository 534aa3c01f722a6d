"""What a run takes over from its baseline, so that the rows of a leaderboard say the same."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from quantlab.commands.measure import compare
from quantlab.runs.run import Run

RESULTS = Path(__file__).resolve().parents[1] / "results"


def run(folder: Path, name: str, **row: object) -> Run:
    return Run.start(folder / name, "kind: evaluate\n", {"run_id": name, **row})


def test_tokens_per_second_are_the_ratio_times_the_baselines(tmp_path: Path) -> None:
    """The baseline was measured on a slow day, and again in turns with the run on a fast one."""
    baseline = run(tmp_path, "base", ppl=2.0, decode_tok_s=100.0, prefill_tok_s=1000.0)
    mine = run(tmp_path, "mine", ppl=3.0, decode_tok_s=300.0, decode_ratio=1.5, prefill_tok_s=9.0)
    found = compare(mine, baseline)
    assert found == {"parent": "base", "ppl_ratio": 1.5, "decode_tok_s": 150.0}
    assert "decode_tok_s" not in compare(run(tmp_path, "other", decode_tok_s=3.0), baseline)
    assert "decode_tok_s" not in compare(mine, run(tmp_path, "unmeasured"))


def test_the_published_rows_agree_with_their_parents() -> None:
    with (RESULTS / "leaderboard.csv").open(encoding="utf-8", newline="") as stream:
        rows = {row["run_id"]: row for row in csv.DictReader(stream)}
    compared = [row for row in rows.values() if row["decode_ratio"]]
    assert len(compared) > 3
    for row in compared:
        pace = float(row["decode_ratio"]) * float(rows[row["parent"]]["decode_tok_s"])
        assert float(row["decode_tok_s"]) == pytest.approx(pace, rel=1e-4)
