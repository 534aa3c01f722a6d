"""Kill `quantlab quantize` with -9 at random moments, resume, and compare every byte with an undisturbed run.

    python benchmarks/kill_and_resume.py [--kills 20] [--seed 0] [--model DIR] [--work DIR]
    python benchmarks/kill_and_resume.py --text calib/general.jsonl --recipe "gguf, gptq" --recipe "gguf, corrected"

Without --model a random Llama in several shards is built. With a text its tokenizer knows bytes, with random tokens one
word a token, which no GGUF file can hold. For each recipe (GPTQ with original and with quantized propagation, AWQ,
GPTQ with activations in files; GGUF filled by GPTQ, with either propagation, and by the importance matrix) one run is
left alone; then runs are killed, the whole process group, at moments spread over the whole duration: imports,
calibration, blocks, the rest, verification. Every third is killed a second time while it resumes. A run that has ended
before its moment says so. Compared are the names of all files and their bytes; in quantlab.json everything but what is
a measurement of this very run (seconds, memory). Prints a line a kill and exits with 1 if a byte differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_llama import Shape, build, random_rows, text_of_rows, write_byte_tokenizer

MEASURED = {
    "seconds",
    "memory_bytes",
    "peak_bytes",
    "parts",
    "actual",
    "rates",
    "work_seconds",
    "finished_at",
}
SHAPE = Shape(hidden=256, blocks=6, heads=4, kv_heads=2, ffn=512, vocab=1024, shard_bytes=2**21, outliers=4)
GROUPED = ("--set", "group_size=64")
RECIPES: dict[str, tuple[str, ...]] = {
    "gptq, original": ("gptq-int4", *GROUPED, "--set", "propagate=original"),
    "gptq, quantized": ("gptq-int4", *GROUPED, "--set", "propagate=quantized"),
    "awq": ("awq-int4", *GROUPED),
    "gptq, in files": ("gptq-int4", *GROUPED, "--set", "propagate=quantized", "--memory-limit", "2GB"),
}
WITH_TEXT: dict[str, tuple[str, ...]] = {
    "gguf, gptq": ("gguf-q4_k_m",),
    "gguf, corrected": ("gguf-q3_k_m", "--set", "propagate=corrected"),
    "gguf, imatrix": ("gguf-q4_k_m-imatrix",),
}


@dataclass(frozen=True)
class Killed:
    """One run that was killed. ``moments``: seconds after its start, and after the start of the resumed one."""

    recipe: str
    moments: tuple[float, ...]
    state: str
    same: bool
    detail: str = ""


def command(args: argparse.Namespace, recipe: str, out: Path, *, resume: bool = False) -> list[str]:
    sets = [
        f"calibration.source={args.text}",
        f"calibration.rows={args.rows}",
        f"calibration.seq_len={args.seq_len}",
    ]
    found = [
        sys.executable,
        "-m",
        "quantlab",
        "quantize",
        *(RECIPES | WITH_TEXT)[recipe],
        "--model",
        str(args.model),
    ]
    found += ["--out", str(out), "--no-eval", "--device", "cpu"]
    for one in [*sets, "evaluate=[]"]:
        found += ["--set", one]
    return found + (["--resume"] if resume else [])


def run(arguments: Sequence[str], log: Path, kill_after: float | None = None) -> tuple[float, int | None]:
    """Seconds it took, and its exit status: None when it was killed."""
    started = time.monotonic()
    with log.open("ab") as stream:
        process = subprocess.Popen(
            arguments, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            status: int | None = process.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    return time.monotonic() - started, status


def state_of(out: Path) -> str:
    """What a killed run left: how many blocks, and how far beyond them."""
    partial = out.with_name(out.name + ".partial")
    if out.exists():
        return "named already"
    if not partial.exists():
        return "nothing yet"
    files = sorted(file.name for file in partial.glob("model-*.safetensors"))
    total = int(files[0].partition("-of-")[2].partition(".")[0]) if files else 0
    blocks = sum(not file.startswith(f"model-{total:05d}-") for file in files)
    if (partial / "config.json").exists():
        return f"{blocks} blocks, verifying"
    return f"{blocks} blocks" + (", the rest" if blocks < len(files) else "")


def content(out: Path) -> dict[str, bytes]:
    """Every file by its name; measurements are taken out of quantlab.json."""
    found = {
        str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()
    }
    record = json.loads(found["quantlab.json"])
    found["quantlab.json"] = json.dumps(without_measurements(record), sort_keys=True).encode()
    return found


def without_measurements(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_measurements(part) for key, part in value.items() if key not in MEASURED}
    return [without_measurements(part) for part in value] if isinstance(value, list) else value


def difference(expected: dict[str, bytes], got: dict[str, bytes]) -> str:
    """The files that differ, empty when none does."""
    names = sorted(expected.keys() ^ got.keys())
    changed = sorted(name for name in expected.keys() & got.keys() if expected[name] != got[name])
    return ", ".join([f"{n} is in one only" for n in names] + [f"{n} differs" for n in changed])


def kill_and_resume(
    args: argparse.Namespace, recipe: str, number: int, moments: Sequence[float], expected: dict[str, bytes]
) -> Killed:
    """Start, kill at each of the moments, resume to the end, compare."""
    out = args.work / f"killed-{number}"
    log = args.work / f"killed-{number}.log"
    states, happened = [], []
    for attempt, moment in enumerate(moments):
        seconds, status = run(command(args, recipe, out, resume=attempt > 0), log, moment)
        states.append(state_of(out) if status is None else "ended before")
        happened.append(moment if status is None else seconds)
        if status not in (None, 0):
            return Killed(recipe, tuple(happened), " / ".join(states), False, f"exit {status}: {_tail(log)}")
    _, status = run(command(args, recipe, out, resume=True), log)
    if status != 0:
        return Killed(recipe, tuple(happened), " / ".join(states), False, f"exit {status}: {_tail(log)}")
    detail = difference(expected, content(out))
    left = [p.name for p in args.work.glob(f"killed-{number}.*") if p.suffix != ".log"]
    detail = "; ".join(filter(None, [detail, f"left behind: {', '.join(left)}" if left else ""]))
    if not detail:
        shutil.rmtree(out)
        log.unlink()
    return Killed(recipe, tuple(happened), " / ".join(states), not detail, detail)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " | ".join(lines[-2:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model in shards; default: a random Llama")
    parser.add_argument("--text", type=Path, help="for calibration; default: random tokens")
    parser.add_argument("--kills", type=int, default=20, help="runs to kill, dealt out over the recipes")
    parser.add_argument("--recipe", choices=sorted(RECIPES | WITH_TEXT), action="append")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where everything is written; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as temporary:
        args.work = (args.work or Path(temporary)).absolute()
        args.work.mkdir(parents=True, exist_ok=True)
        vocabulary = SHAPE.vocab
        if args.model is None:
            args.model = build(args.work / "model", SHAPE)
            if args.text is not None:
                write_byte_tokenizer(args.model)
        elif args.text is None:
            settings = json.loads(Path(args.model, "config.json").read_text(encoding="utf-8"))
            vocabulary = settings["vocab_size"]
        if args.text is None:
            args.text = args.work / "calibration.txt"
            random_text = text_of_rows(random_rows(vocabulary, args.rows + 1, args.seq_len))
            args.text.write_text(random_text, encoding="utf-8")
        raise SystemExit(0 if all(killed.same for killed in everything(args)) else 1)


def everything(args: argparse.Namespace) -> list[Killed]:
    """The undisturbed runs, then the kills, a printed line each."""
    recipes = args.recipe or list(RECIPES)
    undisturbed: dict[str, tuple[float, dict[str, bytes]]] = {}
    for number, recipe in enumerate(recipes):
        out = args.work / f"undisturbed-{number}"
        seconds, status = run(command(args, recipe, out), args.work / f"undisturbed-{number}.log")
        if status != 0:
            raise SystemExit(f"{recipe}: exit {status}: {_tail(args.work / f'undisturbed-{number}.log')}")
        undisturbed[recipe] = seconds, content(out)
        print(f"{recipe}: undisturbed {seconds:.1f} s, {len(undisturbed[recipe][1])} files", flush=True)
    drawn = random.Random(args.seed)
    found = []
    print(f"\n{'':>3}  {'recipe':16}  {'killed at':>16}  {'found':44}  same bytes")
    for number in range(args.kills):
        recipe = recipes[number % len(recipes)]
        seconds, expected = undisturbed[recipe]
        # One moment in each part of the duration, in turn for each recipe, so that no phase is left out.
        turn, turns = number // len(recipes), -(-args.kills // len(recipes))
        moments = [seconds * (turn + drawn.random()) / turns]
        if number % 3 == 2:
            moments.append(seconds * drawn.random())
        killed = kill_and_resume(args, recipe, number, moments, expected)
        found.append(killed)
        at = ", ".join(f"{m:.1f} s ({m / seconds:.0%})" for m in killed.moments)
        print(
            f"{number + 1:>3}  {recipe:16}  {at:>16}  {killed.state:44}  "
            f"{'yes' if killed.same else 'NO: ' + killed.detail}",
            flush=True,
        )
    print(f"\n{sum(k.same for k in found)} of {len(found)} ended in the same bytes")
    return found


if __name__ == "__main__":
    main()
