"""How much the kind of calibration text matters: one recipe calibrated on each of several kinds, KL divergence to the
original on texts of several kinds.

    python benchmarks/calibration_text.py --model DIR --wikitext FILE [--recipe gptq-int4-ct] [--seeds 3]

Calibration texts, `--rows` windows of `--seq-len` tokens each:
  general       calib/general.jsonl: Korean and English prose, dialogue, code, SQL
  chat          the same documents as conversations: the first half is asked, the second half is the answer
  ko-text2sql   calib/ko-text2sql.jsonl: schemas, Korean questions, queries
  ko-prose      the Korean documents of calib/general.jsonl
  sql           queries alone, the answers of ko_text2sql/train.jsonl
  random        texts that random tokens stand for (tokenised again they are other tokens)
  none          no text: the same grid by round to nearest

Measured on: WikiText (the file), the Korean documents of general.txt, and prompts of ko_text2sql/test.jsonl with their
answers; no calibration text holds any of these. For each text the mean KL divergence per window, averaged over seeds;
the difference to `general` is over the same windows, with a 95 % interval over windows.

Every cell (a text and a seed) is written to `--work` when it is finished and not computed again. Writes
results/benchmarks/calibration-text.json and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peers import machine

from quantlab.calibration.describe import scripts
from quantlab.calibration.documents import SEPARATOR, identities, read_documents, read_texts
from quantlab.commands.defaults import settle
from quantlab.errors import QuantlabError
from quantlab.evals.kl_divergence import compare_all
from quantlab.evals.windows import batch_rows, make_windows
from quantlab.models.load import LoadedModel, load_model, load_tokenizer, quiet_libraries
from quantlab.models.safetensors.files import open_files
from quantlab.paths import atomic_write_text, short_hash
from quantlab.progress import Silent
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.load import find_recipe, load_recipe
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.stats import Z_95
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.prompt.prompt import item_prompt

HERE = Path(__file__).resolve().parent
REFERENCE = "general"
KINDS = (REFERENCE, "chat", "ko-text2sql", "ko-prose", "sql", "random", "none")
MOSTLY = 0.5  # share of Hangul in a Korean document
RANDOM = 120_000  # tokens of the random text, in texts of 400


def korean(texts: Iterable[str]) -> list[str]:
    return [text for text in texts if scripts(text)["Hangul"] > MOSTLY]


def calibration_texts(folder: Path, tokenizer: Any) -> dict[str, str]:
    """Kind → source; what is not bundled is written into `folder`."""
    general = read_texts("calib/general.jsonl")
    seeded = random.Random(0)
    plain = sorted(set(range(len(tokenizer))) - {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    drawn = [[seeded.choice(plain) for _ in range(400)] for _ in range(RANDOM // 400)]
    made: dict[str, list[dict[str, Any]]] = {
        "chat": [{"messages": conversation(text)} for text in general],
        "ko-prose": [{"text": text} for text in korean(general)],
        "sql": [{"text": item.answer} for item in load_items("ko_text2sql/train.jsonl")],
        "random": [{"text": tokenizer.decode(ids)} for ids in drawn],
    }
    for kind, rows in made.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write_text(folder / f"{kind}.jsonl", lines)
    bundled = {REFERENCE: "calib/general.jsonl", "ko-text2sql": "calib/ko-text2sql.jsonl"}
    return bundled | {kind: str(folder / f"{kind}.jsonl") for kind in made}


def conversation(text: str) -> list[dict[str, str]]:
    """A document as a question and an answer, cut between two paragraphs near its middle, or two words."""
    between = SEPARATOR if SEPARATOR in text else " "
    parts = text.split(between)
    half = max(1, len(parts) // 2)
    asked, answer = between.join(parts[:half]), between.join(parts[half:])
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def measured_texts(wikitext: Path | None) -> dict[str, str]:
    """Name → text that is measured on."""
    documents = korean("\n\n".join(read_texts("general.txt")).split("\n\n"))
    items = load_items("ko_text2sql/test.jsonl")
    found = {
        "ko-prose": SEPARATOR.join(documents),
        "text2sql": SEPARATOR.join(f"{item_prompt(item)}{item.answer}" for item in items),
    }
    return ({"wikitext": SEPARATOR.join(read_texts(str(wikitext)))} if wikitext else {}) | found


@torch.inference_mode()
def divergences(original: LoadedModel, changed: LoadedModel, windows: torch.Tensor) -> list[float]:
    """Mean KL(original || changed) in nats of every window [windows, seq_len]."""
    found: list[float] = []
    for batch in windows.split(batch_rows(original.model, windows.shape[1])):
        left, right = (m.model(input_ids=batch, use_cache=False).logits for m in (original, changed))
        values, _ = compare_all(left, right)
        found += values.double().view(len(batch), -1).mean(dim=1).tolist()
    return found


class Bench:
    """One model, one recipe; cells are kept in files."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.files = open_files(args.model)
        self.sources = calibration_texts(args.work / "texts", load_tokenizer(self.files))
        self.original = load_model(args.model, device="cpu", dtype="float32")
        self.windows = {
            name: make_windows(self.original.tokenizer, text, args.seq_len, args.test_tokens, name).ids
            for name, text in measured_texts(args.wikitext).items()
        }
        measured = (windows.numpy().tobytes().hex() for windows in self.windows.values())
        self.measured = short_hash(measured)

    def recipe(self, kind: str, seed: int) -> QuantizeRecipe:
        path, args = find_recipe(self.args.recipe), self.args
        if kind == "none":
            found = load_recipe(path)
            assert isinstance(found, QuantizeRecipe)
            grid = {key: getattr(found, key) for key in ("bits", "group_size", "symmetric", "format")}
            return settle(QuantizeRecipe.model_validate({"method": "rtn", **grid}), self.files)
        named = {"source": self.sources[kind], "rows": args.rows, "seq_len": args.seq_len, "seed": seed}
        sets = [f"calibration.{key}={json.dumps(value)}" for key, value in named.items()]
        found = load_recipe(path, sets)
        assert isinstance(found, QuantizeRecipe)
        return settle(found, self.files)

    def cell(self, kind: str, seed: int) -> dict[str, Any]:
        """KL of every window of every text after calibration on one kind of text with one seed."""
        recipe = self.recipe(kind, seed)
        texts = identities(read_documents(self.sources[kind])) if kind != "none" else []
        key = short_hash([recipe.digest(), self.files.digest, self.measured, *texts])
        path = self.args.work / "cells" / f"{kind}-{seed}-{key}.json"
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        with tempfile.TemporaryDirectory(dir=self.args.work) as folder:
            job = Job(kind, recipe, Path(folder) / "checkpoint")
            (outcome,) = quantize([job], self.files, device="cpu", progress=Silent())
            changed = load_model(job.out, device="cpu", dtype="float32")
            kl = {name: divergences(self.original, changed, ids) for name, ids in self.windows.items()}
        found = {"kind": kind, "seed": seed, "calibration": outcome.calibration, "kl": kl}
        atomic_write_text(path, json.dumps(found) + "\n")
        return found

    def run(self) -> dict[str, Any]:
        cells: dict[str, list[dict[str, Any]]] = {}
        failed: dict[str, str] = {}
        for kind in self.args.only or KINDS:
            for seed in range(1 if kind == "none" else self.args.seeds):
                try:
                    cells.setdefault(kind, []).append(self.cell(kind, seed))
                except QuantlabError as error:
                    failed[f"{kind}, seed {seed}"] = f"{error}"
                    print(f"{kind}, seed {seed}: {error}", file=sys.stderr, flush=True)
                    continue
                means = {name: statistics.fmean(kl) for name, kl in cells[kind][-1]["kl"].items()}
                said = ", ".join(f"{name} {mean:.5f}" for name, mean in means.items())
                print(f"{kind}, seed {seed}: {said}", file=sys.stderr, flush=True)
        return {
            "machine": machine.describe(), "model": str(self.args.model), "recipe": self.args.recipe,
            "seeds": self.args.seeds, "rows": self.args.rows, "seq_len": self.args.seq_len,
            "windows": {name: len(ids) for name, ids in self.windows.items()},
            "kinds": {kind: summary(mine, cells.get(REFERENCE)) for kind, mine in cells.items() if mine},
            "failed": failed,
        }  # fmt: skip


def summary(
    mine: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """One kind of text: its calibration, and what is measured on every text."""
    found = {}
    for name in mine[0]["kl"]:
        means = over_seeds(mine, name)
        found[name] = {
            "kl_mean": statistics.fmean(means),
            "by_seed": [statistics.fmean(c["kl"][name]) for c in mine],
        }
        if reference and reference is not mine:
            found[name]["difference"] = paired(means, over_seeds(reference, name))
    return {"calibration": mine[0]["calibration"], "measured": found}


def over_seeds(cells: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """KL of every window, averaged over seeds."""
    return [statistics.fmean(values) for values in zip(*(cell["kl"][name] for cell in cells), strict=True)]


def paired(mine: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Mean difference over the same windows and its 95 % interval, windows taken as independent."""
    apart = [a - b for a, b in zip(mine, other, strict=True)]
    mean = statistics.fmean(apart)
    half = Z_95 * statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
    return {"mean": mean, "low": mean - half, "high": mean + half}


def show(found: Mapping[str, Any]) -> str:
    """KL in thousandths of a nat; behind it the difference to the reference."""
    names = list(found["windows"])
    rows = []
    for kind, one in found["kinds"].items():
        cells = [kind]
        for name in names:
            measured = one["measured"][name]
            cell = f"{1000 * measured['kl_mean']:.2f}"
            if apart := measured.get("difference"):
                mean, low, high = (1000 * apart[key] for key in ("mean", "low", "high"))
                cell += f" ({mean:+.2f}: {low:+.2f} to {high:+.2f})"
            cells.append(cell)
        rows.append(cells)
    head = ["calibrated on", *(f"{name}, KL x 1000 (to {REFERENCE}: 95 %)" for name in names)]
    return machine.table(head, rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument(
        "--wikitext", type=Path, help="WikiText-2 validation as a text file; without: not measured"
    )
    parser.add_argument("--recipe", default="gptq-int4-ct", help="a recipe that calibrates")
    parser.add_argument("--only", nargs="+", choices=KINDS, help="some of the calibration texts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--test-tokens", type=int, default=16384, help="of each text that is measured on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, default=Path("build/calibration-text"), help="texts and finished cells"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "results" / "benchmarks" / "calibration-text.json"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    quiet_libraries()
    (args.work / "texts").mkdir(parents=True, exist_ok=True)
    found = Bench(args).run()
    atomic_write_text(args.out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(show(found))
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
