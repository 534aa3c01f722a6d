"""The published run: the demo's student on all development questions, and what thirteen ways of storing it cost.

    python benchmarks/publish.py            # replaces results/runs and results/leaderboard.csv

Two commands, as a user would give them: ``quantlab distill`` with the demo's shortened training, then ``quantlab
quantize`` with twelve bundled recipes. Samples are replaced by their digest and by who was right
(``Run.drop_samples``): the commands make them again. Alone on the machine, or the speeds are marked as disturbed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from quantlab.demo import DISTILL, TRAINED, precision
from quantlab.results import read_runs, rebuild_leaderboard

RECIPES = (
    "rtn-int8", "rtn-int4", "rtn-int3", "gptq-int8", "gptq-int4", "gptq-int3", "awq-int4", "awq-int3",
    "bnb-int8", "bnb-fp4", "bnb-nf4", "bnb-nf4-dq",
)  # fmt: skip
STUDENT = Path("checkpoints/published/student")
MEASURED = (
    "tasks.text2sql.data=ko_text2sql/dev.jsonl",
    "tasks.text2sql.batch_size=42",
    "tasks.text2sql.max_new_tokens=96",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"))
    results: Path = parser.parse_args().results
    shutil.rmtree(STUDENT.parent, ignore_errors=True)
    trained = [key for key in TRAINED if key.startswith(("train.", "data."))]
    with tempfile.TemporaryDirectory(dir=results, prefix=".publish-") as folder:
        place = ["--results", folder]
        quantlab(
            "distill", DISTILL, *place, "--out", str(STUDENT), *sets(*trained, f"train.precision={precision()}"),
            *sets("evaluate=[perplexity, text2sql, speed]", *MEASURED),
        )  # fmt: skip
        out = ["--out", str(STUDENT.with_name("quantized"))]
        quantlab("quantize", *RECIPES, "--model", str(STUDENT), *place, *out, *sets(*MEASURED))
        for run in read_runs(Path(folder)):
            run.drop_samples()
            for name in ("log.jsonl", "rejected.jsonl"):
                (run.directory / name).unlink(missing_ok=True)
        rebuild_leaderboard(Path(folder))
        shutil.rmtree(results / "runs", ignore_errors=True)
        (Path(folder) / "runs").rename(results / "runs")
        (Path(folder) / "leaderboard.csv").rename(results / "leaderboard.csv")


def quantlab(*words: str) -> None:
    """One command, shown as it would be typed."""
    print("quantlab", *(f"'{word}'" if " " in word else word for word in words), flush=True)
    subprocess.run([sys.executable, "-m", "quantlab", *words], check=True)


def sets(*overrides: str) -> list[str]:
    """`--set` before each override."""
    return [word for override in overrides for word in ("--set", override)]


if __name__ == "__main__":
    main()
