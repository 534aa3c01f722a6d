"""Runs and the leaderboard: atomic files, nothing lost, ties by an exact test."""

import csv
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from quantlab.errors import DataError, MachineError
from quantlab.paths import atomic_write_text, file_digest, find_source
from quantlab.runs.leaderboard import COLUMNS, rebuild_leaderboard
from quantlab.runs.run import Run, Sample, TaskResult, read_jsonl, read_runs, verdicts, write_jsonl
from quantlab.stats import flips, mcnemar_exact


def make_run(
    results: Path, name: str, right: list[bool], *, done: bool = True, data: str = "d", **row: Any
) -> Run:
    run = Run.start(
        results / "runs" / name, "kind: quantize\nmethod: none\n", {"run_id": name, "data_digest": data} | row
    )
    samples = [Sample(str(i), "q", "a", "ok" if ok else "wrong") for i, ok in enumerate(right)]
    run.add(TaskResult("text2sql", {"ex": sum(right) / len(right), "items": len(right)}, samples))
    if done:
        run.finish()
    return run


def test_rows_are_read_back_whatever_characters_they_hold(tmp_path: Path) -> None:
    """U+2028, U+0085 and the like end lines for str.splitlines(), not in JSON lines."""
    rows = [{"text": "a\u2028b\u2029c\x85d\r\ne\x0bf\x1cg"}, {"text": "다음"}]
    assert write_jsonl(tmp_path / "x.jsonl", rows) == 2
    assert read_jsonl(tmp_path / "x.jsonl") == rows


def test_sample_refuses_an_unknown_verdict() -> None:
    with pytest.raises(ValueError, match="verdict 'right'"):
        Sample("1", "", "", "right")


def test_jsonl_round_trip_and_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.jsonl"
    assert write_jsonl(path, [Sample("1", "질문", "SELECT 1", "ok"), {"a": 1}]) == 2
    assert read_jsonl(path)[0]["input"] == "질문" and read_jsonl(path)[1] == {"a": 1}
    path.write_text('{"a": 1}\n\n{"a":\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.jsonl:3: not JSON"):
        read_jsonl(path)
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.jsonl:1: expected an object"):
        read_jsonl(path)


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"a": 1}])

    def broken() -> Any:
        yield {"a": 2}
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert read_jsonl(path) == [{"a": 1}] and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_place_that_cannot_be_written_is_the_machines_fault() -> None:
    with pytest.raises((MachineError, OSError)):
        atomic_write_text(Path("/proc/quantlab/run.json"), "x")


def test_only_finished_runs_have_a_row(tmp_path: Path) -> None:
    make_run(tmp_path, "a", [True, False])
    make_run(tmp_path, "b", [True, True], done=False)
    rows = rebuild_leaderboard(tmp_path)
    assert [row["run_id"] for row in rows] == ["a"]
    with (tmp_path / "leaderboard.csv").open(encoding="utf-8") as stream:
        table = list(csv.reader(stream))
    assert tuple(table[0]) == COLUMNS and len(table) == 2
    assert table[1][COLUMNS.index("ppl")] == "" and table[1][COLUMNS.index("ex")] == "0.5"


def test_run_is_read_back_as_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", [True], model="m")
    again = Run.read(run.directory)
    assert again.done and again.row == run.row and again.samples("text2sql")[0]["id"] == "0"


def test_infinite_numbers_become_null(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "runs" / "a", "", {"run_id": "a"})
    run.add(TaskResult("perplexity", {"ppl": float("inf"), "nll": float("nan")}))
    record = json.loads((run.directory / "run.json").read_text(encoding="utf-8"))
    assert record["row"]["ppl"] is None and record["tasks"]["perplexity"]["metrics"]["nll"] is None


def test_harness_metrics_stay_out_of_the_row(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "runs" / "a", "", {"run_id": "a"})
    run.add(TaskResult("lm-eval:x/y", {"em": 0.5, "acc": 1.0}, [Sample("1", "", "", "ok")]))
    assert "em" not in run.row and run.samples("lm-eval:x/y")
    run.add(TaskResult("text2sql", {"em": 0.5, "data_digest": "other", "run_id": "other"}))
    assert run.row == {"run_id": "a", "em": 0.5}


def test_damaged_record_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, "a", [True])
    (tmp_path / "runs" / "a" / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"run\.json"):
        read_runs(tmp_path)


def test_mcnemar_against_the_definition() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 32)
    assert mcnemar_exact(0, 6) == pytest.approx(2 / 64)
    assert mcnemar_exact(3, 9) == mcnemar_exact(9, 3) == pytest.approx(2 * (1 + 12 + 66 + 220) / 4096)
    assert mcnemar_exact(4, 4) == 1.0
    assert mcnemar_exact(3000, 3000) == 1.0  # no overflow


def test_flips_look_at_shared_items_only() -> None:
    assert flips({"a": True, "b": True, "c": False, "d": True}, {"a": True, "b": False, "c": True}) == (1, 1)


def test_tie_group_is_what_the_paired_test_cannot_tell_from_the_best(tmp_path: Path) -> None:
    best = [True] * 20
    make_run(tmp_path, "best", best)
    make_run(tmp_path, "near", [False] * 5 + [True] * 15)  # p = 0.0625
    make_run(tmp_path, "far", [False] * 6 + [True] * 14)  # p = 0.03125
    make_run(tmp_path, "elsewhere", [True] + [False] * 19, data="other")
    rows = {row["run_id"]: row for row in rebuild_leaderboard(tmp_path)}
    assert rows["best"]["tie_group"] and rows["best"]["tie_group"] == rows["near"]["tie_group"]
    assert rows["far"]["tie_group"] is None
    assert rows["elsewhere"]["tie_group"] is not None  # best on its own data
    assert list(rows) == ["best", "near", "far", "elsewhere"]


def test_items_without_evidence_do_not_count_in_ties(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", [True] * 8)
    samples = [Sample(str(i), "", "", "wrong", extra={"evidence": i >= 6}) for i in range(8)]
    other = make_run(tmp_path, "b", [False] * 8)
    write_jsonl(other.directory / "samples" / "text2sql.jsonl", samples)
    assert run.run_id == "a" and all(row["tie_group"] for row in rebuild_leaderboard(tmp_path))


def _finish_many(results: str, first: int) -> None:
    for number in range(first, first + 8):
        make_run(Path(results), f"run-{number:02d}", [True])
        rebuild_leaderboard(Path(results))


def test_runs_that_end_together_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_finish_many, args=(str(tmp_path), first)) for first in (0, 8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    with (tmp_path / "leaderboard.csv").open(encoding="utf-8") as stream:
        assert len(list(csv.DictReader(stream))) == 16


def test_find_source_names_the_nearest(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("x", encoding="utf-8")
    assert find_source(str(own)) == own
    assert find_source("calib/ko-text2sql.jsonl").is_file()
    with pytest.raises(DataError) as caught:
        find_source("calib/ko-text2sq.jsonl")
    assert "did you mean calib/ko-text2sql.jsonl?" in caught.value.hint


def test_runs_without_samples_keep_who_was_right(tmp_path: Path) -> None:
    """Ties and flips are the same before and after the samples are dropped; a digest says which samples they were."""
    answers = {"best": [True] * 12, "near": [True] * 11 + [False], "far": [True] * 3 + [False] * 9}
    runs = [make_run(tmp_path, name, right) for name, right in answers.items()]
    before = {row["run_id"]: row["tie_group"] for row in rebuild_leaderboard(tmp_path)}
    known = {run.run_id: verdicts(run) for run in runs}
    digest = file_digest(runs[0].directory / "samples" / "text2sql.jsonl")
    for run in runs:
        run.drop_samples()
        assert not (run.directory / "samples").exists() and run.samples("text2sql") == []
    again = [Run.read(run.directory) for run in runs]
    assert {run.run_id: verdicts(run) for run in again} == known
    assert {row["run_id"]: row["tie_group"] for row in rebuild_leaderboard(tmp_path)} == before
    assert again[0].record["samples"]["text2sql"]["digest"] == digest[:16]
