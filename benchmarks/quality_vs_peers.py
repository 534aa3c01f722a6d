"""Perplexity after GPTQ and AWQ at 3 and 4 bits: quantlab's variants beside gptqmodel's and autoawq's, same rows.

    python benchmarks/quality_vs_peers.py [--seeds 3] [--only embedded] [--venvs DIR]
    python benchmarks/quality_vs_peers.py --model DIR --text FILE [--test FILE] --group-size 32 --seq-len 256

Two models: `embedded:base` (calibrated on calib/ko-text2sql.jsonl, measured on heldout.txt) and a real one (`--model`;
by default the 0.94 M character Llama in shared/data beside the checkout, where there is one, on WikiText-2: the first
half of the text for calibration, the second for the perplexity). For each calibration seed everybody gets the same rows
of token ids, symmetric grids for GPTQ, asymmetric ones for AWQ, damping 0.01. Every checkpoint is read by the same code
(`peers/checkpoints.py`), put into the same float32 model and measured by the same perplexity, so only what was stored
differs. The variants are in `peers/variants.py`.

A cell is the mean over the seeds ± the standard deviation; `x best peer` divides it by the mean of the best peer with
the same method and bits. n/a: the tool has no such thing, or failed (the reason is in the JSON). gptqmodel's AWQ holds
4 bits only; autoawq's layout too, so at 3 bits its own search and rounding are stored as plain weights. Both clip only
layers whose outputs are a multiple of 64: elsewhere autoawq runs without clipping, gptqmodel not at all. Writes
results/benchmarks/quality-vs-peers.json after each model.

With `--float32`, the default on CPUs that multiply no 16-bit numbers, the peers start from a float32 copy of the model
and compute in float32, as quantlab does there by itself: in the stored type they would take ten times as long.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peers import machine
from peers.bench import CACHE, HERE, Bench
from peers.variants import BITS, ORDERS, LoadedModel, Variant, halves, own_variants, peer_variants

from quantlab.models.precision import cpu_multiplies

SHARED = HERE.parents[1] / "shared" / "data"


def subjects(args: argparse.Namespace) -> list[LoadedModel]:
    """The models to measure."""
    found = [LoadedModel("embedded", "embedded:base", "calib/ko-text2sql.jsonl", "heldout.txt", 128, 512)]
    model, text, test = args.model, args.text, args.test
    if model is None and (SHARED / "models" / "babyllama-char-1M").is_dir():
        model, text = SHARED / "models" / "babyllama-char-1M", SHARED / "corpora" / "wikitext2_valid.txt"
    if model is not None:
        if text is None:
            raise SystemExit("--model needs --text")
        if test is None:
            text, test = halves(text, args.work)
        found.append(
            LoadedModel(model.name, str(model.resolve()), str(text), str(test), args.group_size, args.seq_len)
        )
    return [s for s in found if not args.only or (s.name if s.name == "embedded" else "model") in args.only]


class Judge:
    """The original model in float32, into which every checkpoint is put to be measured."""

    def __init__(self, subject: LoadedModel, test_tokens: int | None) -> None:
        from quantlab.models.load import load_model, quiet_libraries
        from quantlab.registry.tasks import PerplexityOptions

        quiet_libraries()
        self.loaded = load_model(subject.model, device="cpu", dtype="float32")
        self.options = PerplexityOptions(source=subject.test, seq_len=subject.seq_len, max_tokens=test_tokens)
        self.original = self._perplexity()
        self.pristine = copy.deepcopy(self.loaded.model)

    def save(self, folder: Path) -> None:
        """A float32 copy of the original."""
        if not folder.is_dir():
            self.pristine.save_pretrained(folder)
            self.loaded.tokenizer.save_pretrained(folder)

    def _perplexity(self) -> float:
        from quantlab.evals.perplexity import evaluate
        from quantlab.progress import Silent

        found = evaluate(self.loaded, self.options, baseline=None, progress=Silent()).metrics["ppl"]
        assert isinstance(found, float)
        return found

    def perplexity(self, checkpoint: Path) -> float:
        from peers.checkpoints import Checkpoint

        Checkpoint(checkpoint).install(self.loaded.model)
        return self._perplexity()


class Comparison:
    """One model, all variants, all seeds. ``values``: variant to one perplexity a seed; ``failed``: to why not."""

    def __init__(self, subject: LoadedModel, bench: Bench, args: argparse.Namespace) -> None:
        self.subject, self.bench, self.args = subject, bench, args
        self.values: dict[Variant, list[float]] = defaultdict(list)
        self.failed: dict[Variant, str] = {}
        self.folder = bench.work / "quality" / subject.name
        self.judge = Judge(subject, args.test_tokens)

    def run(self) -> None:
        for seed in range(self.args.seeds):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            rows = self._rows(seed)
            if "quantlab" not in self.args.skip:
                self._own(seed)
            for tool in ("gptqmodel", "autoawq"):
                if tool not in self.args.skip:
                    self._peer(tool, rows, seed)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _rows(self, seed: int) -> Path:
        from safetensors.torch import save_file

        from quantlab.calibration import read_texts, token_rows

        ids = token_rows(
            read_texts(self.subject.calibration), self.judge.loaded.tokenizer,
            rows=self.args.rows, seq_len=self.subject.seq_len, seed=seed,
        )  # fmt: skip
        path = self.folder / "rows.safetensors"
        save_file({"ids": ids}, path)
        return path

    def _own(self, seed: int) -> None:
        """All of quantlab's variants; those that share a calibration pass in one call."""
        from quantlab.errors import QuantlabError
        from quantlab.progress import Silent
        from quantlab.quant.pipeline import Job, quantize
        from quantlab.recipe.load import parse_recipe

        calibration = {
            "source": self.subject.calibration, "rows": self.args.rows, "seq_len": self.subject.seq_len, "seed": seed,
        }  # fmt: skip
        jobs: dict[Variant, Job] = {}
        for variant in own_variants(self.subject.group_size, self.args.orders):
            assert variant.recipe is not None
            content = json.dumps({"kind": "quantize", **variant.recipe, "calibration": calibration})
            try:
                recipe = parse_recipe(content)  # JSON is YAML
            except QuantlabError as error:
                self._fail(variant, str(error))
                continue
            jobs[variant] = Job(variant.name, recipe, self.folder / variant.name)  # type: ignore[arg-type]
        try:
            quantize(list(jobs.values()), self.subject.model, device="cpu", progress=Silent())
        except QuantlabError as error:
            for variant in jobs:
                self._fail(variant, str(error))
            return
        for variant, job in jobs.items():
            self._measure(variant, job.out, seed)

    def _peer(self, tool: str, rows: Path, seed: int) -> None:
        """All variants of one peer, in one process of its environment."""
        from quantlab.models.safetensors.files import open_files

        files = open_files(self.subject.model)
        model = files.path.resolve()
        if self.args.float32:
            model = self.folder / "float32"
            self.judge.save(model)
        clip = all(outputs % 64 == 0 for outputs, _ in files.block_linears().values())
        variants = [
            v for v in peer_variants(self.subject.group_size, clip, self.args.orders) if v.tool == tool
        ]
        jobs = [
            {
                "tool": tool, "model": str(model), "rows": str(rows), "device": "cpu",
                "dtype": "float32" if self.args.float32 else "auto",
                "out": str(self.folder / v.name), "result": str(self.folder / f"{v.name}.json"), **(v.settings or {}),
            }
            for v in variants
        ]  # fmt: skip
        left = dict(zip(variants, jobs, strict=True))
        while left:  # a failure in a tool's own thread may end its process: what is left gets another one
            self._process(tool, list(left.values()))
            ended = next((v for v, job in left.items() if not Path(job["result"]).is_file()), None)
            for variant, job in list(left.items()):
                if variant == ended:
                    self._fail(variant, "its process ended")
                    del left[variant]
                    break
                found = json.loads(Path(job["result"]).read_text(encoding="utf-8"))
                if "error" in found:
                    self._fail(variant, found["error"])
                else:
                    self._measure(variant, Path(job["out"]), seed)
                del left[variant]

    def _process(self, tool: str, jobs: list[dict[str, Any]]) -> None:
        spec = self.folder / f"{tool}.spec"
        spec.write_text(json.dumps({"jobs": jobs}, indent=1), encoding="utf-8")
        log = self.bench.work / f"quality-{self.subject.name}-{tool}.log"
        worker = [str(HERE / "peers" / "worker.py"), str(spec)]
        self.bench.process(self.bench.interpreter(tool), worker, log, own=False)

    def _measure(self, variant: Variant, checkpoint: Path, seed: int) -> None:
        value = self.judge.perplexity(checkpoint)
        shutil.rmtree(checkpoint)
        self.values[variant].append(value)
        print(f"{self.subject.name}, seed {seed}, {variant.name}: {value:.4f}", file=sys.stderr, flush=True)

    def _fail(self, variant: Variant, why: str) -> None:
        self.failed[variant] = why.splitlines()[0]
        print(
            f"{self.subject.name}, {variant.name}: n/a ({self.failed[variant]})", file=sys.stderr, flush=True
        )


def best_peer(values: Mapping[Variant, Sequence[float]], variant: Variant) -> float | None:
    """The best peer's mean at the same method and width."""
    means = [
        statistics.fmean(v) for k, v in values.items()
        if k.tool != "quantlab" and v and (k.method, k.bits) == (variant.method, variant.bits)
    ]  # fmt: skip
    return min(means, default=None)


def summary(comparison: Comparison) -> dict[str, Any]:
    """One model as JSON."""
    rows = []
    for variant, values in comparison.values.items():
        mean, peer = statistics.fmean(values), best_peer(comparison.values, variant)
        rows.append({
            "tool": variant.tool, "method": variant.method, "bits": variant.bits, "how": variant.how, "ppl": values,
            "mean": mean, "std": statistics.stdev(values) if len(values) > 1 else None,
            "x_original": mean / comparison.judge.original, "x_best_peer": mean / peer if peer else None,
        })  # fmt: skip
    for variant, why in comparison.failed.items():
        if variant not in comparison.values:
            kind = {"tool": variant.tool, "method": variant.method, "bits": variant.bits, "how": variant.how}
            rows.append(kind | {"ppl": [], "why": why})
    subject, args = comparison.subject, comparison.args
    return {
        "model": subject.name, "group_size": subject.group_size, "rows": args.rows, "seq_len": subject.seq_len,
        "calibration": Path(subject.calibration).name, "test": Path(subject.test).name,
        "ppl_original": comparison.judge.original, "variants": rows,
    }  # fmt: skip


def show(found: Mapping[str, Any]) -> str:
    """One model's table: a line a variant, a column pair a width."""
    cells: dict[tuple[str, str, str], dict[int, tuple[str, str]]] = defaultdict(dict)
    for row in found["variants"]:
        spread = f" ± {row['std']:.4f}" if row.get("std") is not None else ""
        text = f"{row['mean']:.4f}{spread}" if row["ppl"] else "n/a"
        ratio = f"{row['x_best_peer']:.4f}" if row.get("x_best_peer") else ""
        cells[row["method"], row["tool"], row["how"]][row["bits"]] = (text, ratio)
    head = ["", *(text for bits in BITS for text in (f"{bits} bits", "x best peer"))]
    lines = [
        [f"{method.upper()} {tool}, {how}", *(t for bits in BITS for t in columns.get(bits, ("n/a", "")))]
        for (method, tool, how), columns in sorted(
            cells.items(), key=lambda item: (item[0][0] != "gptq", item[0][1:])
        )
    ]
    title = f"{found['model']}: original {found['ppl_original']:.4f}, groups of {found['group_size']}"
    return f"{title}, {found['rows']} rows of {found['seq_len']}\n\n{machine.table(head, lines)}\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=["embedded", "model"], default=[], help="one of the two models"
    )
    parser.add_argument("--skip", nargs="+", choices=["quantlab", "gptqmodel", "autoawq"], default=[])
    parser.add_argument("--model", type=Path, help="a model directory")
    parser.add_argument("--text", type=Path, help="its calibration text; without --test its first half")
    parser.add_argument("--test", type=Path, help="text for its perplexity")
    parser.add_argument("--group-size", type=int, default=32, help="for --model")
    parser.add_argument("--seq-len", type=int, default=256, help="for --model")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-tokens", type=int, default=60000)
    parser.add_argument(
        "--orders", nargs="+", choices=list(ORDERS), default=list(ORDERS), help="of GPTQ's columns"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--venvs", type=Path, default=CACHE)
    parser.add_argument("--work", type=Path, default=CACHE / "work")
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "results" / "benchmarks" / "quality-vs-peers.json"
    )
    parser.add_argument("--float32", action=argparse.BooleanOptionalAction, help="what the peers compute in")
    args = parser.parse_args()
    args.device, args.python = "cpu", sys.executable
    if args.float32 is None:
        args.float32 = not cpu_multiplies(torch.bfloat16)
    return args


def main() -> None:
    args = arguments()
    bench = Bench(args)
    for tool in ("gptqmodel", "autoawq"):
        if tool not in args.skip:
            bench.interpreter(tool)
    torch.set_num_threads(args.threads)
    content: dict[str, Any] = {
        "machine": machine.describe(), "seeds": args.seeds, "peers_compute_in": "float32" if args.float32 else "auto",
        "models": [],
    }  # fmt: skip
    for subject in subjects(args):
        comparison = Comparison(subject, bench, args)
        comparison.run()
        content["models"].append(summary(comparison))
        print(show(content["models"][-1]), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
