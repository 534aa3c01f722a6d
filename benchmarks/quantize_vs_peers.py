"""Quantizing one model by quantlab and by its peers: seconds, peak memory, error; one after the other, in one run.

    python benchmarks/quantize_vs_peers.py [--only NAME...] [--skip NAME...] [--threads 2] [--venvs DIR]
    python benchmarks/quantize_vs_peers.py --device cuda            # a random Llama of Llama-3-8B's shape

A random Llama of 56.6 M parameters (`random_llama.py`) and 64 rows of 512 token ids, the same for everybody. Each
tool runs in a fresh process of its own environment (`peers/environments.py` makes them) from "model files on disk and
rows" to "checkpoint saved", imports not counted (`peers/worker.py`), after a warm-up on a toy model that fills caches
of compiled code. Settings are the same where tools have them: 4 bits, groups of 128, symmetric for GPTQ, asymmetric
for AWQ, damping 0.01, no activation order; batch sizes, propagation and the rest are each tool's defaults. The errors
are defined in `peers/errors.py`, measured by one code on the saved checkpoints.

Prints a table (`x quantlab`: seconds divided by quantlab's for the same method) and the points the comparison is
about, and writes results/benchmarks/quantize-vs-peers-<device>.json. With `--dtype float32` the model is stored in
float32 and everybody computes in it: the fair comparison on CPUs that multiply no 16-bit numbers, where quantlab does
so anyway and the peers would compute in the stored type ten times as slowly. Everything is measured anew unless
`--resume` is given. A peer that fails is reported as failed, and the others go on; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers import machine
from peers.bench import CACHE, HERE, Bench, Entry
from random_llama import SHAPES, Shape, parameters

TOY = Shape(hidden=256, blocks=1, heads=4, kv_heads=2, ffn=512, vocab=512)


def gptq(bits: int, group_size: int) -> dict[str, Any]:
    common = {"bits": bits, "group_size": group_size, "symmetric": True}
    return {"method": "gptq", **common, "act_order": False, "damp": 0.01}


def awq(bits: int, group_size: int) -> dict[str, Any]:
    return {"method": "awq", "bits": bits, "group_size": group_size, "symmetric": False}


def entries(group_size: int) -> dict[str, Entry]:
    """What is measured, in this order."""
    four_gptq, four_awq = gptq(4, group_size), awq(4, group_size)
    six = {
        "gptq4": four_gptq, "gptq3": gptq(3, group_size), "gptq8": gptq(8, group_size), "awq4": four_awq,
        "rtn4": {"method": "rtn", "bits": 4, "group_size": group_size, "symmetric": True}, "gptq4g32": gptq(4, 32),
    }  # fmt: skip
    plain = {"bits": 4, "group_size": group_size, "damp": 0.01, "act_order": "none"}
    symmetric, asymmetric = plain | {"symmetric": True}, plain | {"symmetric": False}
    return {
        "quantlab-gptq": Entry("quantlab", "gptq", {"gptq4": four_gptq}),
        "quantlab-awq": Entry("quantlab", "awq", {"awq4": four_awq}),
        "quantlab-six": Entry("quantlab", "six", six),
        "llmcompressor-gptq": Entry("llmcompressor", "gptq", settings=symmetric),
        "gptqmodel-gptq": Entry("gptqmodel", "gptq", settings=symmetric | {"method": "gptq"}),
        "gptqmodel-awq": Entry("gptqmodel", "awq", settings=asymmetric | {"method": "awq"}),
        "autoawq-awq": Entry("autoawq", "awq", settings=asymmetric),
    }


def checkpoints_of(name: str, entry: Entry, folder: Path) -> dict[str, tuple[Path, bool]]:
    """Checkpoint name to its directory, and whether its matrices can be compared one by one."""
    if entry.tool != "quantlab":
        return {name: (folder, entry.kind == "gptq")}
    alone = len(entry.recipes) == 1
    return {
        name if alone else f"{name}/{recipe}": (folder / recipe, content["method"] != "awq")
        for recipe, content in entry.recipes.items()
    }


def merge(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Repeats of one entry: the median run by seconds stands for it, all seconds are kept."""
    failed = [run for run in runs if "error" in run]
    if failed:
        return dict(failed[0])
    middle = statistics.median_low([run["seconds"] for run in runs])
    chosen = next(run for run in runs if run["seconds"] == middle)
    return {**chosen, "all_seconds": [run["seconds"] for run in runs]}


def points(
    found: Mapping[str, Mapping[str, Any]], errors: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What the comparison is about: each a value, a limit, and whether it holds; left out where a part is missing."""
    claims: list[dict[str, Any]] = []

    def claim(text: str, value: float | None, limit: float) -> None:
        if value is not None:
            claims.append({"claim": text, "value": value, "limit": limit, "holds": value <= limit})

    def ratio(a: str, b: str, key: str = "seconds") -> float | None:
        one, other = found.get(a, {}).get(key), found.get(b, {}).get(key)
        return one / other if one and other else None

    def error_ratio(a: str, b: str, key: str) -> float | None:
        one, other = errors.get(a, {}).get(key), errors.get(b, {}).get(key)
        return one / other if one and other else None

    for peer, limit in (("llmcompressor-gptq", 0.5), ("gptqmodel-gptq", 0.4)):
        claim(f"GPTQ: seconds / {peer}", ratio("quantlab-gptq", peer), limit)
        claim(f"GPTQ: layer error / {peer}", error_ratio("quantlab-gptq", peer, "layer_error"), 1.0)
    for peer in ("gptqmodel-awq", "autoawq-awq"):
        claim(f"AWQ: seconds / {peer}", ratio("quantlab-awq", peer), 0.1)
        claim(f"AWQ: block error / {peer}", error_ratio("quantlab-awq", peer, "block_error"), 1.0)
    claim("six recipes: seconds / GPTQ alone", ratio("quantlab-six", "quantlab-gptq"), 1.7)
    own = [
        found[n]["peak_bytes"]
        for n in ("quantlab-gptq", "quantlab-awq", "quantlab-six")
        if "peak_bytes" in found.get(n, {})
    ]
    others = [r["peak_bytes"] for n, r in found.items() if not n.startswith("quantlab") and "peak_bytes" in r]
    if own and others:
        claim("peak memory: largest of quantlab's / smallest of the peers'", max(own) / min(others), 1.0)
    return claims


def show(found: Mapping[str, Mapping[str, Any]], errors: Mapping[str, Mapping[str, Any]], cuda: bool) -> str:
    """The table."""
    gpu_head = ["GPU MB"] if cuda else []
    head = ["", "seconds", "load", "quantize", "save", "x quantlab", "peak MB", "idle MB", *gpu_head,
            "layer error", "block error", "relative", "logits MSE"]  # fmt: skip

    def number(value: float | None, form: str = ".1f") -> str:
        return "" if value is None else format(value, form)

    rows = []
    for name, run in found.items():
        if "error" in run:
            rows.append([name, "failed", *[""] * (len(head) - 2)])
            continue
        mine = found.get(f"quantlab-{name.rpartition('-')[2]}", {}).get("seconds")
        error = errors.get(name, {})
        laps = [number(run["laps"].get(lap)) for lap in ("load", "quantize", "save")]
        gpu = [number(run["peak_cuda_bytes"] / 1e6, ".0f")] if cuda else []
        rows.append([
            name, number(run["seconds"]), *laps, number(run["seconds"] / mine if mine else None, ".2f"),
            number(run["peak_bytes"] / 1e6, ".0f"), number(run["idle_bytes"] / 1e6, ".0f"), *gpu,
            number(error.get("layer_error"), ".5g"), number(error.get("block_error"), ".5g"),
            number(error.get("block_error_relative"), ".3e"), number(error.get("logits_mse"), ".3e"),
        ])  # fmt: skip
        blank = [""] * (len(head) - 5)
        for recipe in sorted(n for n in errors if n.startswith(name + "/")):
            error = errors[recipe]
            rows.append([
                f"  {recipe.partition('/')[2]}", *blank, number(error.get("layer_error"), ".5g"),
                number(error.get("block_error"), ".5g"), number(error.get("block_error_relative"), ".3e"),
                number(error.get("logits_mse"), ".3e"),
            ])  # fmt: skip
    return machine.table(head, rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(entries(128))
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (the 8B shape, 128 rows of 2048)")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--skip", nargs="+", choices=names, default=[])
    parser.add_argument("--shape", choices=sorted(SHAPES), help="default: 57m, on a GPU 8b")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the model's files"
    )
    parser.add_argument("--rows", type=int, help="default: 64, on a GPU 128")
    parser.add_argument("--seq-len", type=int, help="default: 512, on a GPU 2048")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, help="default: 2, on a GPU one a core")
    parser.add_argument("--repeats", type=int, default=1, help="of every entry; the median is reported")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--block-rows", type=int, default=8, help="rows for block errors and logits")
    parser.add_argument(
        "--venvs", type=Path, default=CACHE, help="where the peers' environments are, or will be made"
    )
    parser.add_argument("--work", type=Path, default=CACHE / "work", help="model, rows, checkpoints, logs")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has quantlab")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument(
        "--resume", action="store_true", help="keep what an earlier run with these settings measured"
    )
    parser.add_argument("--no-warm-up", action="store_true")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument(
        "--make-environments", action="store_true", help="make the peers' environments, measure nothing"
    )
    args = parser.parse_args()
    gpu = args.device.startswith("cuda")
    args.shape = args.shape or ("8b" if gpu else "57m")
    args.rows, args.seq_len = args.rows or (128 if gpu else 64), args.seq_len or (2048 if gpu else 512)
    args.threads = args.threads or ((os.cpu_count() or 2) if gpu else 2)
    kind = "cuda" if gpu else "cpu"
    args.out = args.out or HERE.parent / "results" / "benchmarks" / f"quantize-vs-peers-{kind}.json"
    return args


def main() -> None:
    args = arguments()
    bench = Bench(args)
    chosen = {n: e for n, e in entries(args.group_size).items() if n in args.only and n not in args.skip}
    for tool in dict.fromkeys(e.tool for e in chosen.values() if e.tool != "quantlab"):
        bench.interpreter(tool)
    if args.make_environments:
        return
    shape = dataclasses.replace(SHAPES[args.shape], dtype=args.dtype)
    settings = {
        "shape": dataclasses.asdict(shape), "parameters": parameters(shape), "rows": args.rows, "seq_len": args.seq_len,
        "group_size": args.group_size, "threads": args.threads, "device": args.device, "seed": args.seed,
        "repeats": args.repeats,
    }  # fmt: skip
    described = machine.describe()
    found, errors = measure_all(bench, chosen, shape, settings, args)
    claims = points(found, errors)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": described, "settings": settings, "tools": found, "errors": errors, "points": claims}
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(show(found, errors, args.device.startswith("cuda")))
    for one in claims:
        print(
            f"{'yes' if one['holds'] else 'NO '} {one['claim']}: {one['value']:.3f}, at most {one['limit']:g}"
        )
    print(f"written: {args.out}")
    for name, run in found.items():
        if "error" in run:
            print(f"{name} failed: {run['error']}", file=sys.stderr)
    sys.exit(any("error" in run for run in found.values()))


def measure_all(
    bench: Bench,
    chosen: Mapping[str, Entry],
    shape: Shape,
    settings: Mapping[str, Any],
    args: argparse.Namespace,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Every chosen entry, one after the other, then the errors of what they saved."""
    model, rows = bench.model(shape), bench.rows(shape, args.rows, args.seq_len, args.seed)
    warm_up = dataclasses.replace(TOY, dtype=shape.dtype)
    toy, toy_rows = bench.model(warm_up), bench.rows(warm_up, 4, 64, args.seed)
    found: dict[str, dict[str, Any]] = {}
    saved: dict[str, tuple[Path, bool]] = {}
    for name, entry in chosen.items():
        keep = bench.work / f"{name}.kept"
        key = {"settings": dict(settings), "entry": dataclasses.asdict(entry)}
        kept = json.loads(keep.read_text(encoding="utf-8")) if args.resume and keep.is_file() else {}
        if kept.get("key") == json.loads(json.dumps(key)) and (bench.work / "out" / name).is_dir():
            found[name] = kept["found"]
        else:
            if not args.no_warm_up:
                bench.run(f"warm-up-{name}", entry, toy, toy_rows)
            found[name] = merge([bench.run(name, entry, model, rows) for _ in range(args.repeats)])
            if "error" not in found[name]:
                keep.write_text(json.dumps({"key": key, "found": found[name]}), encoding="utf-8")
        one = found[name]
        said = (
            one["error"]
            if "error" in one
            else f"{one['seconds']:.1f} s, peak {one['peak_bytes'] / 1e6:.0f} MB"
        )
        print(f"{name}: {said}", file=sys.stderr, flush=True)
        if "error" not in one:
            saved |= checkpoints_of(name, entry, bench.work / "out" / name)
    if args.no_errors or not saved:
        return found, {}
    layerwise = [name for name, (_, comparable) in saved.items() if comparable]
    paths = {name: path for name, (path, _) in saved.items()}
    return found, bench.errors(model, rows[0], paths, layerwise, args.block_rows)


if __name__ == "__main__":
    main()
