"""GGUF files filled by quantlab beside those of llama.cpp's own quantizer with an importance matrix of the same text.

    pip install llama-cpp-python
    python benchmarks/gguf_vs_llama_cpp.py --model DIR --source FILE.gguf --text FILE [--types Q4_K_M Q3_K_M Q2_K]

`--source` is the same model as an unquantized GGUF file (or one whose exact values the model has: it may be quantized
again), which llama.cpp's quantizer starts from. One run of `quantlab quantize` fills every type by each of the fillings
and writes the importance matrix; llama.cpp gets that. All files are decoded by quantlab and measured alike: mean KL
divergence to the original in float32 of each window of `--text`, paired over windows with a 95 % interval. Writes
results/benchmarks/gguf-vs-llama-cpp.json. With `--gptq`, GPTQ alone is timed too.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from calibration_text import divergences, paired
from peers import machine

from quantlab.calibration.documents import SEPARATOR, read_texts
from quantlab.evals.windows import make_windows
from quantlab.models.gguf.imatrix import read_imatrix
from quantlab.models.load import load_model, quiet_libraries
from quantlab.paths import atomic_write_text
from quantlab.progress import Silent
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.load import parse_recipe

HERE = Path(__file__).resolve().parent
FILLINGS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "imatrix": {"method": "imatrix"},
    "gptq": {"method": "gptq", "act_order": "group"},
    "corrected": {"method": "gptq", "act_order": "group", "propagate": "corrected"},
}
PEER = "llama.cpp"


def fill(args: argparse.Namespace) -> tuple[dict[tuple[str, str], Path], float]:
    """All types by all fillings in one run: the files, and the seconds."""
    calibration = {"source": args.calibration, "rows": args.rows, "seq_len": args.seq_len, "seed": args.seed}
    jobs = {}
    for kind in args.types:
        for filling in args.fillings:
            content = {"kind": "quantize", "format": "gguf", "type": kind, **FILLINGS[filling]}
            if filling != "rtn":
                content["calibration"] = calibration
            recipe = parse_recipe(json.dumps(content))  # JSON is YAML
            jobs[kind, filling] = Job(f"{kind}-{filling}", recipe, args.work / f"{kind}-{filling}")  # type: ignore[arg-type]
    started = time.perf_counter()
    quantize(
        list(jobs.values()),
        str(args.model),
        device="cpu",
        progress=Silent(),
        save_imatrix=args.work / "imatrix.gguf",
    )
    seconds = time.perf_counter() - started
    return {key: next(job.out.glob("*.gguf")) for key, job in jobs.items()}, seconds


def gptq_alone(args: argparse.Namespace) -> float:
    """Seconds of GPTQ at 4 bits on the same rows, what a run of several is held against."""
    calibration = {"source": args.calibration, "rows": args.rows, "seq_len": args.seq_len, "seed": args.seed}
    content = {
        "kind": "quantize",
        "method": "gptq",
        "act_order": True,
        "group_size": "auto",
        "calibration": calibration,
    }
    recipe = parse_recipe(json.dumps(content))
    started = time.perf_counter()
    quantize([Job("gptq", recipe, args.work / "gptq")], str(args.model), device="cpu", progress=Silent())  # type: ignore[arg-type]
    return time.perf_counter() - started


def quantize_by_peer(source: Path, out: Path, kind: str, imatrix: Path, threads: int) -> float:
    """llama.cpp's quantizer with an importance matrix that quantlab wrote. Returns the seconds it took."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread, params.allow_requantize = threads, True
    matrix = read_imatrix(imatrix)
    entries = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()  # ends with a name that is null
    for entry, (name, values) in zip(entries, matrix.items(), strict=False):
        data = (ctypes.c_float * values.numel())(*values.flatten().tolist())
        entry.name, entry.data, entry.size = name.encode(), data, values.numel()
    params.imatrix = entries
    started = time.perf_counter()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot write {kind}")
    return time.perf_counter() - started


def show(found: Mapping[str, Any]) -> str:
    rows = []
    for one in found["files"]:
        apart = one.get("difference")
        against = (
            f"{1000 * apart['mean']:+.1f} ({1000 * apart['low']:+.1f} to {1000 * apart['high']:+.1f})"
            if apart
            else ""
        )
        rows.append(
            [
                one["type"],
                one["filling"],
                f"{one['bytes'] / 1e6:.2f}",
                f"{1000 * one['kl_mean']:.1f}",
                against,
            ]
        )
    return machine.table(["type", "filling", "MB", "KL x 1000", f"to {PEER} (95 %)"], rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="the original, a model directory")
    parser.add_argument("--source", type=Path, required=True, help="the same as a GGUF file")
    parser.add_argument("--text", type=Path, required=True, help="what KL is measured on")
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument("--fillings", nargs="+", choices=FILLINGS, default=list(FILLINGS))
    parser.add_argument("--calibration", default="calib/general.jsonl")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--gptq", action="store_true", help="time GPTQ alone as well")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/gguf-vs-llama-cpp"))
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "results" / "benchmarks" / "gguf-vs-llama-cpp.json"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    alone = gptq_alone(args) if args.gptq else None
    files, seconds = fill(args)
    print(
        f"quantlab: {len(files)} files in {seconds:.0f} s" + (f", GPTQ alone {alone:.0f} s" if alone else ""),
        file=sys.stderr,
    )
    peers: dict[str, float] = {}
    for kind in args.types:
        files[kind, PEER] = args.work / f"{kind}-{PEER}.gguf"
        peers[kind] = quantize_by_peer(
            args.source, files[kind, PEER], kind, args.work / "imatrix.gguf", args.threads
        )
    original = load_model(args.model, device="cpu", dtype="float32")
    windows = make_windows(
        original.tokenizer, SEPARATOR.join(read_texts(str(args.text))), args.seq_len, args.test_tokens, "text"
    ).ids
    kl = {}
    for key, path in files.items():
        kl[key] = divergences(original, load_model(path, device="cpu", dtype="float32"), windows)
        print(f"{' '.join(key)}: {statistics.fmean(kl[key]):.4f}", file=sys.stderr, flush=True)
    rows = [
        {
            "type": kind, "filling": filling, "bytes": path.stat().st_size,
            "kl_mean": statistics.fmean(kl[kind, filling]),
            **({} if filling == PEER else {"difference": paired(kl[kind, filling], kl[kind, PEER])}),
        }
        for (kind, filling), path in files.items()
    ]  # fmt: skip
    found = {
        "machine": machine.describe(), "model": args.model.name, "rows": args.rows, "seq_len": args.seq_len,
        "windows": len(windows), "seconds": seconds, "seconds_gptq_alone": alone, "seconds_llama_cpp": peers,
        "files": rows,
    }  # fmt: skip
    atomic_write_text(args.out, json.dumps(found, indent=1) + "\n")
    print(show(found))


if __name__ == "__main__":
    main()
