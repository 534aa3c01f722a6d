"""The benchmark of calibration texts on a tiny model: its texts, its cells that are kept, its intervals."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bench() -> Any:
    """The benchmark as a module: it is a script whose folder is the first on the path."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import calibration_text

    sys.path.remove(str(ROOT / "benchmarks"))
    return calibration_text


def test_a_conversation_has_all_of_its_document(bench: Any) -> None:
    for text in ("one\n\ntwo\n\nthree", "one two three", "one"):
        asked, answer = bench.conversation(text)
        assert (asked["role"], answer["role"]) == ("user", "assistant")
        assert f"{asked['content']} {answer['content']}".split() == text.split()


def test_paired_differences(bench: Any) -> None:
    found = bench.paired([1.0, 2.0, 4.0], [1.0, 1.0, 2.0])
    assert found["mean"] == pytest.approx(1) and found["high"] - 1 == pytest.approx(
        1.96 / math.sqrt(3), rel=1e-3
    )
    cells = [{"kl": {"t": [1.0, 3.0]}, "calibration": {}}, {"kl": {"t": [3.0, 5.0]}, "calibration": {}}]
    assert bench.over_seeds(cells, "t") == [2.0, 4.0]
    measured = bench.summary(cells, None)["measured"]["t"]
    assert measured == {"kl_mean": 3.0, "by_seed": [2.0, 4.0]}


def test_finished_cells_are_not_computed_again(
    bench: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = argparse.Namespace(
        model=tiny, wikitext=None, recipe="gptq-int4-ct", only=["general", "sql", "none"], seeds=1, rows=4, seq_len=32,
        test_tokens=128, work=tmp_path,
    )  # fmt: skip
    (tmp_path / "texts").mkdir()
    found = bench.Bench(args).run()
    assert (
        found["failed"] == {}
        and list(found["kinds"]) == args.only
        and found["windows"] == {"ko-prose": 4, "text2sql": 4}
    )
    assert {one["calibration"].get("rows") for one in found["kinds"].values()} == {4, None}
    assert "difference" in found["kinds"]["sql"]["measured"]["text2sql"]
    table = bench.show(found)
    assert table.count("\n") == 4 and "| none" in table
    assert not list(tmp_path.glob("tmp*"))
    cells = sorted((tmp_path / "cells").iterdir())
    assert [json.loads(cell.read_text())["kind"] for cell in cells] == sorted(args.only)
    monkeypatch.setattr(bench, "quantize", lambda *_, **__: pytest.fail("a finished cell is computed again"))
    assert bench.Bench(args).run()["kinds"] == found["kinds"]
    for kind, content in (
        ("sql", "SELECT"),
        ("chat", '{"messages": [{"role": "user"'),
        ("ko-prose", '{"text"'),
    ):
        assert content in (tmp_path / "texts" / f"{kind}.jsonl").read_text(encoding="utf-8")
