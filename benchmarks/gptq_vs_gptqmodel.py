"""GPTQ by quantlab and by gptqmodel's own quantizer: same model, rows, bits, group size and damping, one run.

    python benchmarks/gptq_vs_gptqmodel.py --model embedded:base --text calib/ko-text2sql.jsonl --test heldout.txt

Both checkpoints are reloaded through plain transformers and measured by the same perplexity on text that is not in the
calibration text. Prints one line per bit width and writes nothing but temporary checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch

from quantlab.calibration import read_texts, token_rows
from quantlab.evals.perplexity import evaluate
from quantlab.models.files import open_files
from quantlab.models.load import load_subject, load_tokenizer, quiet_libraries
from quantlab.progress import Silent
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe import PerplexityOptions, QuantizeRecipe


def peer(model: str, rows: torch.Tensor, out: Path, args: argparse.Namespace, bits: int) -> float:
    """Quantize with gptqmodel; seconds."""
    from gptqmodel import GPTQModel, QuantizeConfig

    settings = QuantizeConfig(
        bits=bits,
        group_size=args.group_size,
        damp_percent=args.damp,
        desc_act=args.act_order == "full",
        act_group_aware=args.act_order == "group",
        sym=True,
    )
    loaded = GPTQModel.load(str(open_files(model).path), settings)
    examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    started = time.perf_counter()
    loaded.quantize(examples, batch_size=1)
    loaded.save(str(out))
    return time.perf_counter() - started


def ours(model: str, out: Path, args: argparse.Namespace, bits: int) -> float:
    """Quantize with quantlab; seconds."""
    recipe = QuantizeRecipe.model_validate(
        {
            "method": "gptq",
            "bits": bits,
            "group_size": args.group_size,
            "act_order": {"none": False, "group": "group", "full": True}[args.act_order],
            "damp": args.damp,
            "propagate": args.propagate,
            "calibration": {"source": args.text, "rows": args.rows, "seq_len": args.seq_len, "seed": 0},
        }
    )
    started = time.perf_counter()
    quantize([Job("ours", recipe, out)], model, device="cpu", progress=Silent())
    return time.perf_counter() - started


def perplexity(path: Path | str, args: argparse.Namespace) -> float:
    options = PerplexityOptions(source=args.test, seq_len=args.seq_len, max_tokens=args.test_tokens)
    found = evaluate(
        load_subject(path, device="cpu", dtype="float32"), options, baseline=None, progress=Silent()
    )
    value = found.metrics["ppl"]
    assert isinstance(value, float)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded:base")
    parser.add_argument("--text", default="calib/ko-text2sql.jsonl", help="calibration text")
    parser.add_argument("--test", default="heldout.txt", help="text for perplexity, disjoint from --text")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--damp", type=float, default=0.01)
    parser.add_argument("--act-order", choices=["none", "group", "full"], default="group")
    parser.add_argument("--propagate", choices=["original", "quantized"], default="original")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--test-tokens", type=int, default=60000)
    args = parser.parse_args()
    quiet_libraries()
    files = open_files(args.model)
    tokenizer = load_tokenizer(files)
    rows = token_rows(read_texts(args.text), tokenizer, rows=args.rows, seq_len=args.seq_len, seed=0)
    base = perplexity(args.model, args)
    for bits in args.bits:
        with tempfile.TemporaryDirectory() as folder:
            seconds = ours(args.model, Path(folder, "ours"), args, bits)
            other = peer(args.model, rows, Path(folder, "peer"), args, bits)
            ppl, ppl_other = perplexity(Path(folder, "ours"), args), perplexity(Path(folder, "peer"), args)
        line = {
            "model": args.model, "bits": bits, "group_size": args.group_size, "act_order": args.act_order,
            "propagate": args.propagate, "ppl_original": base, "ppl_quantlab": ppl, "ppl_gptqmodel": ppl_other,
            "ratio": ppl / ppl_other, "seconds_quantlab": seconds, "seconds_gptqmodel": other,
        }  # fmt: skip
        print(
            json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()}), flush=True
        )


if __name__ == "__main__":
    main()
