"""Peak resident memory of `quantlab quantize` on a model that is far larger, against an idle quantlab process.

    python benchmarks/streaming_memory.py [--recipe gptq-int4] [--memory-limit 600M] [--rows 32] [--seq-len 512]

Builds a random Llama of about 1.5 GB in bfloat16 (hidden 1536, feed-forward 4096, 26 blocks, 12 heads, 4 of keys,
vocabulary 32,000, untied; in shards), quantizes it in a process of its own under `/usr/bin/time -v`, and measures in
the same way a process that imports what the run imports and opens nothing. Prints both, the difference, the
checkpoint's own record (the verifying process included) and exits with 1 if the difference is above --most. Where there
is no `/usr/bin/time`, the kernel's count for waited-for children is taken.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_llama import Shape, random_rows, text_of_rows

SHAPE = Shape(hidden=1536, ffn=4096, blocks=26, heads=12, kv_heads=4, vocab=32000, shard_bytes=2**28)
IDLE = (
    "import accelerate, safetensors.torch, torch, transformers\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM\n"
    "import quantlab.cli, quantlab.commands.quantize\n"
    "import quantlab.models.load, quantlab.quant.sequential\n"
    "import quantlab.quant.methods.gptq, quantlab.quant.methods.awq\n"
)


@dataclass(frozen=True)
class Used:
    """What a process took. ``peak_bytes``: the most that was resident, of it or of one of its children."""

    status: int
    peak_bytes: int
    seconds: float
    output: str


def measured(arguments: Sequence[str]) -> Used:
    """Run to the end and count."""
    started = time.monotonic()
    timer = shutil.which("time")
    if timer is None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        done = subprocess.run(arguments, capture_output=True, text=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        if peak == before:
            raise SystemExit("a process before this one was larger: measure them apart")
        return Used(done.returncode, peak * 1024, time.monotonic() - started, done.stderr)
    with tempfile.NamedTemporaryFile("r", suffix=".time") as report:
        done = subprocess.run([timer, "-v", "-o", report.name, *arguments], capture_output=True, text=True)
        found = re.search(r"Maximum resident set size \(kbytes\): (\d+)", report.read())
    if found is None:
        raise SystemExit(f"{timer} did not say how much memory was used")
    return Used(done.returncode, int(found[1]) * 1024, time.monotonic() - started, done.stderr)


def command(args: argparse.Namespace, model: Path, out: Path) -> list[str]:
    found = [
        sys.executable,
        "-m",
        "quantlab",
        "quantize",
        args.recipe,
        "--model",
        str(model),
        "--out",
        str(out),
    ]
    found += ["--no-eval", "--device", "cpu", "--memory-limit", args.memory_limit]
    for key, value in (("source", args.text), ("rows", args.rows), ("seq_len", args.seq_len)):
        found += ["--set", f"calibration.{key}={value}"]
    for one in args.set:
        found += ["--set", one]
    return found + (["--no-verify"] if args.no_verify else [])


def mega(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="an existing model instead of the random one")
    parser.add_argument("--recipe", default="gptq-int4")
    parser.add_argument("--memory-limit", default="600M")
    parser.add_argument("--most", type=float, default=600, help="MB above idle that are allowed")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=SHAPE.blocks)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--work", type=Path, help="where everything is written; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="streaming-memory-") as temporary:
        work = (args.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        raise SystemExit(0 if fits(args, work) else 1)


def fits(args: argparse.Namespace, work: Path) -> bool:
    """Build, run, print; whether the peak is within what is allowed."""
    shape = Shape(**(vars(SHAPE) | {"blocks": args.blocks}))
    model = args.model or work / f"model-{args.blocks}"
    if not (model / "config.json").is_file():
        # In a process of its own: the count for children must not start with what building took.
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        code += f"from pathlib import Path\nfrom random_llama import Shape, build\nbuild(Path(sys.argv[1]), {shape!r})"
        subprocess.run([sys.executable, "-c", code, str(model)], check=True)
    args.text = work / "calibration.txt"
    vocabulary = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    args.text.write_text(text_of_rows(random_rows(vocabulary, args.rows + 1, args.seq_len)), encoding="utf-8")
    out = work / "quantized"
    shutil.rmtree(out, ignore_errors=True)
    idle = measured([sys.executable, "-c", IDLE])
    run = measured(command(args, model, out))
    if run.status != 0:
        print(run.output[-3000:], file=sys.stderr)
        return False
    above = run.peak_bytes - idle.peak_bytes
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(
        f"model           {mega(size)}, {args.blocks} blocks; {args.rows} x {args.seq_len} tokens, {args.recipe}"
    )
    print(f"idle            {mega(idle.peak_bytes)}")
    print(
        f"quantize        {mega(run.peak_bytes)} in {run.seconds:.0f} s, --memory-limit {args.memory_limit}"
    )
    print(
        f"above idle      {mega(above)}, allowed {args.most:.0f} MB: {'yes' if above <= args.most * 1e6 else 'NO'}"
    )
    for line in recorded(out):
        print(line)
    return above <= args.most * 1e6


def recorded(out: Path) -> list[str]:
    """What the checkpoint itself says about the run."""
    record: dict[str, Any] = json.loads((out / "quantlab.json").read_text(encoding="utf-8"))
    lines = []
    if verification := record.get("verification"):
        took = f"{mega(verification['peak_bytes'])} above idle, {verification['seconds']:.0f} s"
        lines.append(f"verification    {verification['how']}, passed {verification['passed']}, {took}")
    for key in ("forecast", "actual"):
        if said := record.get(key):
            sizes = f"{mega(said['size_bytes'])} on disk, {mega(said['memory_bytes'])} of memory"
            lines.append(f"{key:15} {sizes}, {said['seconds']:.0f} s")
    return lines


if __name__ == "__main__":
    main()
