"""Does `quantlab layers` name layers that hurt? KL divergence to the original with the layers that it names at 8 bits,
against random layers with as many weights.

    python benchmarks/layers_that_hurt.py --model DIR --text FILE [--recipe gptq-int3] [--set calibration.rows=32 ...]

Every figure comes from a checkpoint of a recipe that was run in full: the recipe as it is (in compressed-tensors, which
holds several widths), the same with the `overrides` that `quantlab layers` suggests for the first checkpoint, and one
for each random draw. All but the first share one calibration pass. The KL divergence is that of the `fidelity` task on
--windows windows of --text, all models computed in float32 from the files. What is gained is the divergence of the
recipe less that of the one with overrides; the ratio is the gain of the named layers over the mean gain of the draws.

Random draws are layers of the model in a random order, each taken where it still fits, until they have the weights of
the named ones; the share that they come to is printed. Resumable: checkpoints and figures that are in --work are not
made again. Writes results/benchmarks/layers-that-hurt.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peers import machine

from quantlab.commands.defaults import settle
from quantlab.commands.layers import Options, examine
from quantlab.commands.planned_run import open_model
from quantlab.commands.quantize import load_recipes
from quantlab.evals.kl_divergence import evaluate
from quantlab.models.load import LoadedModel, load_model, quiet_libraries
from quantlab.progress import default_progress
from quantlab.quant.pipeline import Job, Settings, quantize
from quantlab.recipe.load import parse_settled
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.tasks import FidelityOptions

HERE = Path(__file__).resolve().parent
WIDE = 8


def base_recipe(args: argparse.Namespace) -> QuantizeRecipe:
    """The recipe in a format that holds several widths, as it is applied to the model."""
    changes = ["format=compressed-tensors", "act_order=group", *args.overrides]
    _, recipe = load_recipes([args.recipe], changes)[0]
    return settle(recipe, open_model(args.model))


def made(jobs: Sequence[Job], model: str) -> None:
    """Run the recipes whose checkpoints are not there yet, in one pass."""
    missing = [job for job in jobs if not job.out.exists()]
    if missing:
        quantize(missing, model, progress=default_progress(), settings=Settings("cpu", resume=True))


def record(checkpoint: Path) -> dict[str, Any]:
    found = json.loads((checkpoint / "quantlab.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def draw(weights: Mapping[str, int], target: int, seed: int) -> list[str]:
    """Layers in a random order, each taken where it still fits into ``target`` weights."""
    names, taken, used = sorted(weights), list[str](), 0
    random.Random(seed).shuffle(names)
    for name in names:
        if used + weights[name] <= target:
            taken.append(name)
            used += weights[name]
    return taken


def with_overrides(recipe: QuantizeRecipe, names: Sequence[str]) -> QuantizeRecipe:
    content = recipe.content() | {"overrides": {name: {"bits": WIDE} for name in names}}
    return parse_settled(QuantizeRecipe, content)


def divergence(checkpoint: Path, original: LoadedModel, args: argparse.Namespace) -> float:
    """KL(original || checkpoint) in nats a token; kept beside the checkpoint."""
    kept = checkpoint.with_name(checkpoint.name + f".kl-{args.windows}x{args.seq_len}.json")
    if not kept.exists():
        options = FidelityOptions(
            source=str(args.text), seq_len=args.seq_len, max_tokens=args.windows * args.seq_len
        )
        subject = load_model(checkpoint, device="cpu", dtype="float32")
        found = evaluate(subject, options, baseline=original, progress=default_progress())
        kept.write_text(json.dumps(found.metrics), encoding="utf-8")
    return float(json.loads(kept.read_text(encoding="utf-8"))["kl_mean"])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    recipe = base_recipe(args)
    plain = Job("recipe", recipe, args.work / "recipe")
    made([plain], args.model)
    known = record(plain.out)
    weights = {name: one["weights"] for name, one in known["layers"].items()}
    total = sum(weights.values())
    bits = int(recipe.bits) + args.share * (
        WIDE - int(recipe.bits)
    )  # so that the share of the weights gets 8 bits
    found = examine("recipe", known, Options(average_bits=bits, bits=WIDE), 0.0)
    named = list(found["suggestion"]["overrides"])
    target = sum(weights[name] for name in named)
    sets = {"named": named} | {f"random {n}": draw(weights, target, n) for n in range(1, args.draws + 1)}
    jobs = [
        Job(key, with_overrides(recipe, names), args.work / key.replace(" ", "-"))
        for key, names in sets.items()
    ]
    made(jobs, args.model)
    original = load_model(args.model, device="cpu", dtype="float32")
    before = divergence(plain.out, original, args)
    rows = []
    for job in jobs:
        kl = divergence(job.out, original, args)
        share = sum(weights[name] for name in sets[job.name]) / total
        rows.append(
            {"layers": job.name, "count": len(sets[job.name]), "share": share, "kl": kl, "gain": before - kl}
        )
    mean = statistics.fmean(row["gain"] for row in rows[1:])
    best = max(row["gain"] for row in rows[1:])
    return {
        "machine": machine.describe(), "model": Path(args.model).name, "recipe": recipe.content(), "kl": before,
        "predicted": found["divergence"], "predicted_share": found["suggestion"]["saved"], "rows": rows,
        "ratio": rows[0]["gain"] / mean, "ratio_to_best_draw": rows[0]["gain"] / best, "named": named,
    }  # fmt: skip


def show(found: Mapping[str, Any]) -> str:
    lines = [["the recipe as it is", "", "", f"{found['kl']:.4f}", ""]]
    for row in found["rows"]:
        lines.append(
            [
                row["layers"],
                str(row["count"]),
                f"{row['share']:.2%}",
                f"{row['kl']:.4f}",
                f"{row['gain']:.4f}",
            ]
        )
    table = machine.table([f"at {WIDE} bits", "layers", "of the weights", "KL, nats", "gained"], lines)
    ratio = (
        f"{found['ratio']:.1f} times the mean of the draws, {found['ratio_to_best_draw']:.1f} times the best"
    )
    return f"{table}\n\nthe named layers gain {ratio}\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a model directory or id")
    parser.add_argument("--text", type=Path, required=True, help="text for the divergence")
    parser.add_argument("--recipe", default="gptq-int3", help="a recipe of one width that calibrates")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--share", type=float, default=0.05, help="of the quantized weights that get 8 bits")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("checkpoints/layers-that-hurt"))
    out = HERE.parent / "results" / "benchmarks" / "layers-that-hurt.json"
    parser.add_argument("--out", type=Path, default=out)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    found = measure(args)
    print(show(found))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
