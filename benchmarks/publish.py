"""The published run is a demo whose answers are left out: `results/runs` and `results/leaderboard.csv`.

    python benchmarks/publish.py        # six minutes on two cores, alone on the machine for the sake of the speeds

Runs ``quantlab demo`` anew, then keeps the runs without their samples: `run.json` has a digest of each samples file and
who was right (``Run.drop_samples``), and the demo makes them again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from quantlab.runs.leaderboard import rebuild_leaderboard
from quantlab.runs.run import read_runs

RESULTS = Path("results")
DEMO = RESULTS / "demo"


def main() -> None:
    shutil.rmtree(DEMO, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "quantlab", "demo"], check=True)
    shutil.rmtree(RESULTS / "runs", ignore_errors=True)
    shutil.copytree(DEMO / "runs", RESULTS / "runs")
    for run in read_runs(RESULTS):
        run.drop_samples()
        for name in ("log.jsonl", "rejected.jsonl"):
            (run.directory / name).unlink(missing_ok=True)
    rebuild_leaderboard(RESULTS)


if __name__ == "__main__":
    main()
