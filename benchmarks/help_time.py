"""How long `quantlab --help` takes, against the `--help` of a bare Typer program with two commands.

    python benchmarks/help_time.py [--runs 15]

Prints both medians and their ratio; the two programs take turns, so that a busy machine slows both alike. Exits with 1
when the ratio is above 1.5.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 1.5
BARE = """
import typer
app = typer.Typer()
@app.command()
def one() -> None:
    "The first."
@app.command()
def two() -> None:
    "The second."
app()
"""


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure(runs: int) -> tuple[float, float]:
    """Median seconds of the bare program and of quantlab."""
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text(BARE, encoding="utf-8")
        commands = [[sys.executable, str(bare), "--help"], [sys.executable, "-m", "quantlab", "--help"]]
        for command in commands:
            seconds(command)  # fills the caches
        times = [[seconds(command) for command in commands] for _ in range(runs)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=15)
    bare, own = measure(parser.parse_args().runs)
    print(f"bare Typer program, two commands: {bare * 1000:6.0f} ms")
    print(f"quantlab --help:                  {own * 1000:6.0f} ms")
    print(f"ratio:                            {own / bare:6.2f} (at most {LIMIT})")
    sys.exit(own / bare > LIMIT)


if __name__ == "__main__":
    main()
