"""`bits: auto` against uniform widths of at least the same size: perplexity of two small real models.

    python benchmarks/auto_bits.py [--seeds 3] [--only embedded]
    python benchmarks/auto_bits.py --model DIR [--text FILE --test FILE] --group-size 32 --seq-len 256

Models: `embedded:base`, calibrated on calib/ko-text2sql.jsonl and measured on heldout.txt; and one from elsewhere
(`--model`; by default the 0.94 M character Llama in shared/data beside the checkout, where there is one). Text of the
kind that a model was trained on is not always at hand: without `--text` and `--test` the model writes both itself, by
sampling with fixed seeds of their own (1 for calibration, 2 for the test), and the table says so.

For each calibration seed all recipes are quantized in one call (GPTQ, groups ordered, compressed-tensors), read back by
plain transformers and measured. `bits/weight` is what the quantized matrices take in the files, scales and all. Every
`auto` recipe is set against a uniform one that is no smaller: 3 bits on average against 3 bits in groups of the same
size, 3.5 against 3 bits in groups of 16, and a third of exactly the size of 3 bits in groups of 32. Uniform 4 bits,
larger than all of these, is shown for comparison. Writes results/benchmarks/auto-bits.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers import machine

from quantlab.evals.perplexity import evaluate
from quantlab.models.load import LoadedModel, load_model, quiet_libraries
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Silent
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.tasks import PerplexityOptions

HERE = Path(__file__).resolve().parent
BABY = HERE.parents[1] / "shared" / "data" / "models" / "babyllama-char-1M"
SMALLER = {128: 32, 64: 16, 32: 16}  # a group size whose scales take what more codes could
TEXTS_AT_ONCE = 64
WRITTEN = {"calibration": (1, 80_000), "test": (2, 64_000)}  # seed and tokens of what a model writes itself


@dataclass(frozen=True)
class Text:
    """A model with its texts."""

    name: str
    model: str
    calibration: str
    test: str
    group_size: int
    seq_len: int
    note: str


@dataclass
class Recipe:
    """One recipe and what came of it, an entry a seed. ``against``: the uniform recipes that it has to beat."""

    name: str
    bits: int | float  # a float is the target of `bits: auto`
    group_size: int
    against: tuple[str, ...] = ()
    ppl: list[float] = field(default_factory=list)
    bits_per_weight: float = 0.0  # the largest of the seeds
    widths: list[dict[str, Any]] = field(default_factory=list)

    def content(self, text: Text, rows: int, seed: int) -> QuantizeRecipe:
        auto = isinstance(self.bits, float)
        width = {"bits": "auto", "target_bits": self.bits} if auto else {"bits": self.bits}
        calibration = {"source": text.calibration, "rows": rows, "seq_len": text.seq_len, "seed": seed}
        return QuantizeRecipe.model_validate(
            {
                "kind": "quantize", "method": "gptq", "group_size": self.group_size, "act_order": "group",
                "format": "compressed-tensors", "calibration": calibration, **width,
            }
        )  # fmt: skip


def recipes(group_size: int) -> list[Recipe]:
    """Two auto recipes in groups of ``group_size``, one that is exactly as large as 3 bits in smaller groups, and the
    uniform ones."""
    small = SMALLER[group_size]
    equal = 3 + 16 / small - 16 / group_size  # scales take 16 bits a group
    uniform = [
        Recipe(f"3 bits, groups of {size}", 3, size) for size in sorted({group_size, small, 16}, reverse=True)
    ]
    names = [recipe.name for recipe in uniform]
    auto = [
        Recipe(f"auto 3.0, groups of {group_size}", 3.0, group_size, (names[0],)),
        Recipe(f"auto 3.5, groups of {group_size}", 3.5, group_size, (names[-1],)),
    ]
    if equal != 3.5:
        auto.insert(1, Recipe(f"auto {equal}, groups of {group_size}", equal, group_size, (names[1],)))
    return uniform + auto + [Recipe(f"4 bits, groups of {group_size}", 4, group_size)]


def texts(args: argparse.Namespace) -> Iterator[Text]:
    """The models to measure."""
    if args.model is None and args.only != "model":
        note = "calib/ko-text2sql.jsonl; heldout.txt"
        yield Text("embedded:base", "embedded:base", "calib/ko-text2sql.jsonl", "heldout.txt", 128, 256, note)
    model = args.model or (BABY if BABY.is_dir() else None)
    if model is None or args.only == "embedded":
        return
    if args.text and args.test:
        calibration, test = args.text, args.test
        note = f"{calibration.name}; {test.name}"
    else:
        loaded = load_model(model, device="cpu", dtype="float32")
        calibration, test = (
            written(loaded, args.work / f"{model.name}-{kind}.jsonl", *WRITTEN[kind]) for kind in WRITTEN
        )
        note = "both texts written by the model itself, seeds 1 and 2"
    name = model.name
    yield Text(name, str(model.resolve()), str(calibration), str(test), args.group_size, args.seq_len, note)


@torch.inference_mode()
def written(subject: LoadedModel, path: Path, seed: int, tokens: int, length: int = 240) -> Path:
    """Texts sampled from the model, one JSON line each; not again where they lie in the folder already."""
    if path.is_file():
        return path
    start = subject.tokenizer.bos_token_id
    if start is None:
        raise SystemExit(f"{subject.name} has no token to start a text with: give --text and --test")
    generator = torch.Generator().manual_seed(seed)
    lines: list[str] = []
    while len(lines) * length < tokens:
        ids = torch.full((TEXTS_AT_ONCE, 1), start)  # [texts, so far]
        past, new = None, ids
        for _ in range(length):
            out = subject.model(input_ids=new, past_key_values=past, use_cache=True)
            past, chances = out.past_key_values, out.logits[:, -1].float().softmax(dim=-1)
            new = torch.multinomial(chances, 1, generator=generator)
            ids = torch.cat([ids, new], dim=1)
        lines += subject.tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


def perplexity(model: Path | str, text: Text, tokens: int) -> float:
    options = PerplexityOptions(source=text.test, seq_len=text.seq_len, max_tokens=tokens)
    subject = load_model(model, device="cpu", dtype="float32")
    value = evaluate(subject, options, baseline=None, progress=Silent()).metrics["ppl"]
    assert isinstance(value, float)
    return value


def stored_bits(checkpoint: Path, model: str) -> float:
    """Bits that a quantized weight takes in the files of ``checkpoint``, with its share of scales and shapes."""
    layers = open_files(model).block_linears()
    tensors = open_files(checkpoint).tensors.values()
    size = sum(t.size_bytes for t in tensors if t.name.rpartition(".")[0] in layers)
    return 8 * size / sum(a * b for a, b in layers.values())


def measure(text: Text, args: argparse.Namespace) -> dict[str, Any]:
    """One model over all seeds."""
    tried = recipes(text.group_size)
    original = perplexity(text.model, text, args.test_tokens)
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            jobs = [
                Job(r.name, r.content(text, args.rows, seed), Path(folder, str(i)))
                for i, r in enumerate(tried)
            ]
            outcomes = quantize(jobs, text.model, device="cpu", progress=Silent())
            for recipe, outcome in zip(tried, outcomes, strict=True):
                assert outcome.checkpoint is not None
                recipe.ppl.append(perplexity(outcome.checkpoint, text, args.test_tokens))
                size = stored_bits(outcome.checkpoint, text.model)
                recipe.bits_per_weight = max(recipe.bits_per_weight, size)
                if outcome.widths:
                    recipe.widths.append(dict(outcome.widths))
                print(
                    f"{text.name}, seed {seed}, {recipe.name}: {recipe.ppl[-1]:.4f}",
                    file=sys.stderr,
                    flush=True,
                )
                shutil.rmtree(outcome.checkpoint)
    known = {recipe.name: recipe for recipe in tried}
    rows = []
    for recipe in tried:
        rows.append(
            {
                "recipe": recipe.name, "bits": recipe.bits, "group_size": recipe.group_size,
                "bits_per_weight": round(recipe.bits_per_weight, 4), "ppl": recipe.ppl,
                "mean": statistics.fmean(recipe.ppl),
                "std": statistics.stdev(recipe.ppl) if len(recipe.ppl) > 1 else None,
                "widths": recipe.widths, "against": [verdict(recipe, known[name]) for name in recipe.against],
            }
        )  # fmt: skip
    return {
        "model": text.name, "texts": text.note, "rows": args.rows, "seq_len": text.seq_len,
        "test_tokens": args.test_tokens, "ppl_original": original, "recipes": rows,
    }  # fmt: skip


def verdict(auto: Recipe, uniform: Recipe) -> dict[str, Any]:
    """Whether ``auto`` is better on every seed, and no larger."""
    return {
        "recipe": uniform.name,
        "no_larger": auto.bits_per_weight <= uniform.bits_per_weight + 1e-9,
        "better_on_seeds": sum(a < b for a, b in zip(auto.ppl, uniform.ppl, strict=True)),
        "seeds": len(auto.ppl),
    }


def show(found: Mapping[str, Any]) -> str:
    """One model's table, the smallest first."""
    lines = []
    for row in sorted(found["recipes"], key=lambda row: row["bits_per_weight"]):
        spread = f" ± {row['std']:.4f}" if row["std"] is not None else ""
        beaten = ", ".join(
            f"{a['recipe']}: {a['better_on_seeds']} of {a['seeds']} seeds"
            + ("" if a["no_larger"] else " (smaller!)")
            for a in row["against"]
        )
        increase = f"{100 * (row['mean'] / found['ppl_original'] - 1):.2f} %"
        lines.append(
            [row["recipe"], f"{row['bits_per_weight']:.3f}", f"{row['mean']:.4f}{spread}", increase, beaten]
        )
    head = ["", "bits/weight", "perplexity", "above original", "better than"]
    title = f"{found['model']}: original {found['ppl_original']:.4f} ({found['texts']})"
    return f"{title}\n\n{machine.table(head, lines)}\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["embedded", "model"], help="one of the two models")
    parser.add_argument("--model", type=Path, help="a model directory, instead of both")
    parser.add_argument("--text", type=Path, help="its calibration text")
    parser.add_argument("--test", type=Path, help="text for its perplexity, disjoint from --text")
    parser.add_argument("--group-size", type=int, default=32, choices=sorted(SMALLER), help="for --model")
    parser.add_argument("--seq-len", type=int, default=256, help="for --model")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-tokens", type=int, default=60000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, help="folder for texts and checkpoints; a temporary one by default"
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "benchmarks" / "auto-bits.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    quiet_libraries()
    content: dict[str, Any] = {"machine": machine.describe(), "seeds": args.seeds, "models": []}
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or Path(folder)
        args.work.mkdir(parents=True, exist_ok=True)
        for text in texts(args):
            content["models"].append(measure(text, args))
            print(show(content["models"][-1]), flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
