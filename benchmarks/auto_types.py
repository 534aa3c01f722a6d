"""`type: auto` against llama.cpp's mixtures, within the size of each mixture's file.

    python benchmarks/auto_types.py --model DIR --text FILE [--mixtures Q4_K_M Q3_K_M] [--types Q3_K Q4_K ...]

One run of `quantlab quantize` fills every mixture, and for each of them a file of chosen types of its size. All are
decoded and measured alike: KL divergence to the original in float32 of each window of `--text`, paired over windows
with a 95 % interval. Writes results/benchmarks/auto-types.json. Where the model's weights are those of a quantized
file, leave its type out by `--types`: it would hold them exactly.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from calibration_text import divergences, paired
from peers import machine

from quantlab.calibration.documents import SEPARATOR, read_texts
from quantlab.evals.windows import make_windows
from quantlab.models.load import load_model, quiet_libraries
from quantlab.models.safetensors.files import open_files
from quantlab.paths import atomic_write_text
from quantlab.progress import Silent
from quantlab.quant.estimate.checkpoint_size import checkpoint_bytes
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.quantize import QuantizeRecipe

HERE = Path(__file__).resolve().parent


def jobs_of(args: argparse.Namespace) -> dict[str, Job]:
    """A job for every mixture, and one of its size."""
    calibration = {"source": args.calibration, "rows": args.rows, "seq_len": args.seq_len, "seed": args.seed}
    files, found = open_files(str(args.model)), {}
    for kind in args.mixtures:
        mixture = QuantizeRecipe(method=args.method, type=kind, calibration=calibration, evaluate=[])
        size = checkpoint_bytes(mixture, files)
        chosen = QuantizeRecipe(
            method=args.method, size=size, types=args.types, calibration=calibration, evaluate=[]
        )
        for name, recipe in ((kind, mixture), (f"auto-{kind}", chosen)):
            found[name] = Job(name, recipe, args.work / name)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="the original, a model directory")
    parser.add_argument("--text", type=Path, required=True, help="what KL is measured on")
    parser.add_argument("--mixtures", nargs="+", default=["Q4_K_M", "Q3_K_M"])
    parser.add_argument("--types", nargs="+", default=[], help="types to choose from; all by default")
    parser.add_argument("--method", default="imatrix", choices=["imatrix", "gptq"])
    parser.add_argument("--calibration", default="calib/general.jsonl")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/auto-types"))
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "results" / "benchmarks" / "auto-types.json"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    quiet_libraries()
    jobs = jobs_of(args)
    outcomes = quantize(list(jobs.values()), str(args.model), device="cpu", progress=Silent())
    original = load_model(args.model, device="cpu", dtype="float32")
    windows = make_windows(
        original.tokenizer, SEPARATOR.join(read_texts(str(args.text))), args.seq_len, args.test_tokens, "text"
    ).ids
    kl = {}
    for name, job in jobs.items():
        kl[name] = divergences(original, load_model(job.out, device="cpu", dtype="float32"), windows)
        print(f"{name}: {statistics.fmean(kl[name]):.5f}", file=sys.stderr, flush=True)
    rows = []
    for (name, job), outcome in zip(jobs.items(), outcomes, strict=True):
        size = next(job.out.glob("*.gguf")).stat().st_size
        row = {"file": name, "bytes": size, "kl_mean": statistics.fmean(kl[name]), "types": outcome.types}
        if outcome.types:
            row["difference"] = paired(kl[name], kl[name.removeprefix("auto-")])
        rows.append(row)
    found = {
        "machine": machine.describe(), "model": args.model.name, "method": args.method, "rows": args.rows,
        "seq_len": args.seq_len, "windows": len(windows), "files": rows,
    }  # fmt: skip
    atomic_write_text(args.out, json.dumps(found, indent=1) + "\n")
    print(
        machine.table(
            ["file", "bytes", "KL x 1000"],
            [[row["file"], f"{row['bytes']:,}", f"{1000 * row['kl_mean']:.2f}"] for row in rows],
        )
    )


if __name__ == "__main__":
    main()
