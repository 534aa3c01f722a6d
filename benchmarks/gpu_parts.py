"""The parts of `gpu_checks.py` that are no program of their own.

    python benchmarks/gpu_parts.py blocks|bitsandbytes|formats|demo FOLDER
    python benchmarks/gpu_parts.py describe -

A part writes what it has measured into FOLDER/numbers.json after each measurement, so that one stopped by its time
limit has not measured for nothing. `describe` prints what the GPU is. Exit status 3: there is none.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

DEVICE = "cuda"
BLOCKS = 4  # of the 8B shape: the first compiles, the last is not run to its end, those between stand for the others
ROWS, SEQ_LEN = 128, 2048
CLOSE = 0.02  # of the CPU's perplexity
MIDDLE = {"hidden": 2048, "blocks": 16, "heads": 16, "kv_heads": 8, "ffn": 5632, "vocab": 32000}
KINDS: dict[str, dict[str, Any]] = {
    "int8": {"method": "bnb-int8"},
    "fp4": {"method": "bnb-fp4"},
    "nf4": {"method": "bnb-nf4"},
    "nf4-dq": {"method": "bnb-nf4", "double_quant": True},
}
ROUNDED: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 128, "symmetric": True}
FORMATS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # and the packages that read them
    "compressed-tensors": (ROUNDED | {"format": "compressed-tensors"}, ("compressed_tensors",)),
    "compressed-tensors fp8": ({"method": "fp8"}, ("compressed_tensors",)),
    "bitsandbytes nf4": (KINDS["nf4"], ("bitsandbytes",)),
    "bitsandbytes int8": (KINDS["int8"], ("bitsandbytes",)),
    "gptq": (ROUNDED | {"format": "gptq"}, ("gptqmodel", "optimum")),
    "awq": (ROUNDED | {"format": "awq"}, ("gptqmodel",)),
}


class Numbers:
    """What was measured so far, in a file that is whole at every moment."""

    def __init__(self, folder: Path) -> None:
        self.file, self.content = folder / "numbers.json", {}

    def add(self, name: str, found: Any) -> None:
        self.content[name] = found
        beside = self.file.with_suffix(".part")
        beside.write_text(json.dumps(self.content), encoding="utf-8")
        os.replace(beside, self.file)


class Watch:
    """A progress that notes when each block was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        counts = name.startswith("quantizing")
        if counts:
            self.times.append(time.perf_counter())

        def advance(units: float = 1) -> None:
            if counts:
                self.times.append(time.perf_counter())

        yield advance

    @property
    def seconds(self) -> list[float]:
        """Of each block."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def blocks(folder: Path, numbers: Numbers) -> bool:
    """Blocks of Llama-3-8B's shape by each method: seconds a block, for all 32, and the floor of GPTQ's arithmetic."""
    from arithmetic import operations
    from gptq_kernel import rate
    from random_llama import SHAPES, build, random_rows, text_of_rows

    whole = SHAPES["8b"]
    shape = dataclasses.replace(whole, blocks=BLOCKS, vocab=4096, shard_bytes=2**30)
    half, single = rate(torch.bfloat16), rate(torch.float32)
    least = operations(whole, ROWS, SEQ_LEN)
    floor = least.seconds(half, single)
    numbers.add("rates", {"bfloat16_flops": half, "float32_flops": single})
    shares = {
        "forward": least.forward / half,
        "moments": least.moments / single,
        "solving": least.solving / single,
    }
    numbers.add("floor", {"block_seconds": floor, "model_seconds": floor * whole.blocks, "shares": shares})
    model = build(folder / "model", shape, DEVICE)
    text = folder / "rows.txt"
    text.write_text(text_of_rows(random_rows(shape.vocab, ROWS, SEQ_LEN)), encoding="utf-8")
    seen = {"calibration": {"source": str(text), "rows": ROWS, "seq_len": SEQ_LEN}}
    four: dict[str, Any] = {"bits": 4, "group_size": 128}
    for name, recipe in {
        "gptq": {"method": "gptq", "symmetric": True, **four, **seen},
        "rtn": {"method": "rtn", "symmetric": True, **four},
        "awq": {"method": "awq", "symmetric": False, **four, **seen},
    }.items():
        torch.cuda.reset_peak_memory_stats()
        watch = Watch()
        made(recipe, str(model), folder / name, progress=watch)
        middle = statistics.median(watch.seconds[1:-1])
        found = {
            "blocks_seconds": watch.seconds,
            "block_seconds": middle,
            "model_seconds": middle * whole.blocks,
            "peak_cuda_bytes": torch.cuda.max_memory_allocated(),
        }
        numbers.add(name, found | ({"times_the_floor": middle / floor} if name == "gptq" else {}))
    return True


def made(
    recipe: Mapping[str, Any], model: str, out: Path, *, device: str = DEVICE, progress: Any = None
) -> Path:
    """A checkpoint, written but not verified."""
    from quantlab.progress import Silent
    from quantlab.quant.pipeline import Job, quantize
    from quantlab.recipe.quantize import QuantizeRecipe

    job = Job(out.name, QuantizeRecipe.model_validate(dict(recipe)), out)
    quantize([job], model, device=device, progress=progress or Silent())
    return out


def bitsandbytes(folder: Path, numbers: Numbers) -> bool:
    """The embedded model by each kind, on the CPU and on the GPU: the same perplexity but for rounding."""
    wrong = []
    for name, recipe in {"none": None, **KINDS}.items():
        spread = {}
        for device in ("cpu", DEVICE):
            out = folder / f"{name}-{device}"
            model = (
                "embedded:base" if recipe is None else str(made(recipe, "embedded:base", out, device=device))
            )
            spread[device] = perplexity(model, device)
        ratio = spread[DEVICE] / spread["cpu"]
        numbers.add(name, {"ppl_cpu": spread["cpu"], "ppl_cuda": spread[DEVICE], "ratio": ratio})
        wrong += [f"{name}: {ratio:.4f} times the CPU's perplexity"] if abs(ratio - 1) > CLOSE else []
    return told(wrong)


def perplexity(model: str, device: str) -> float:
    from quantlab.evals.perplexity import evaluate
    from quantlab.models.load import load_model
    from quantlab.progress import Silent
    from quantlab.registry.tasks import PerplexityOptions

    options = PerplexityOptions(source="heldout.txt", max_tokens=10000)
    found = evaluate(load_model(model, device=device), options, progress=Silent())
    return float(found.metrics["ppl"])  # type: ignore[arg-type]


def formats(folder: Path, numbers: Numbers) -> bool:
    """Every format of one model, and the original: tokens a second, memory. One that fails is noted.

    Not in turns, as `quantlab` itself measures: on a GPU of one's own nothing drifts, and one format that hangs at its
    first use, compiling, must not cost the others their numbers.
    """
    from random_llama import Shape, build

    from quantlab.evals.speed import Contestant, measure
    from quantlab.progress import Silent
    from quantlab.registry.tasks import SpeedOptions

    shape = Shape(**MIDDLE, shard_bytes=2**30)
    plain = Contestant(build(folder / "model", shape, DEVICE), "none")
    options = SpeedOptions(prompt_tokens=512, new_tokens=64, repeats=3)

    def measured(contestant: Contestant) -> dict[str, Any]:
        (found,) = measure([contestant], None, options, device=DEVICE, progress=Silent())
        return dict(found.metrics) | {"kernel": found.details["kernel"]}

    original = measured(plain)
    numbers.add("none", original)
    wrong = []
    for name, (recipe, readers) in FORMATS.items():
        lacking = [reader for reader in readers if importlib.util.find_spec(reader) is None]
        if lacking:
            numbers.add(name, {"skipped": f"not here: {', '.join(lacking)}"})
            continue
        try:
            out = made(recipe, str(plain.ref), folder / name.replace(" ", "-"))
            found = measured(Contestant(out, name))
            found["decode_ratio"] = found["decode_tok_s"] / original["decode_tok_s"]
            numbers.add(name, found)
        except Exception as error:  # of any library; the others are still to be measured
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            numbers.add(name, {"failed": wrong[-1]})
    return told(wrong)


def demo(folder: Path, numbers: Numbers) -> bool:
    """The whole story on the GPU."""
    command = [
        sys.executable,
        "-m",
        "quantlab",
        "demo",
        "--device",
        DEVICE,
        "--out",
        str(folder / "demo"),
        "--json",
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    if done.returncode == 0:
        summary = json.loads(done.stdout)
        kept = (
            "run_id",
            "stage",
            "method",
            "bits",
            "ppl",
            "ex",
            "decode_tok_s",
            "peak_memory_bytes",
            "device",
        )
        numbers.add("seconds", summary["seconds"])
        numbers.add("rows", [{key: row.get(key) for key in kept} for row in summary["rows"]])
    return done.returncode == 0


def told(wrong: list[str]) -> bool:
    print(*wrong, sep="\n", file=sys.stderr)
    return not wrong


def describe() -> dict[str, Any]:
    held = torch.cuda.get_device_properties(0)
    driver = None
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass  # a GPU without its tools
    return {
        "gpu": held.name,
        "gpu_bytes": held.total_memory,
        "gpu_capability": f"{held.major}.{held.minor}",
        "gpu_processors": held.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


PARTS: dict[str, Callable[[Path, Numbers], bool]] = {
    "blocks": blocks,
    "bitsandbytes": bitsandbytes,
    "formats": formats,
    "demo": demo,
}


def main() -> None:
    name, folder = sys.argv[1:]
    if not torch.cuda.is_available():
        print("torch sees no NVIDIA GPU on this machine", file=sys.stderr)
        sys.exit(3)
    if name == "describe":
        print(json.dumps(describe()))
        return
    sys.exit(not PARTS[name](Path(folder), Numbers(Path(folder))))


if __name__ == "__main__":
    main()
