"""Does everybody who reads a GGUF file of quantlab's compute the same? Every block type, on a real model.

    pip install llama-cpp-python
    python benchmarks/gguf_agreement.py --model DIR --text FILE [--types Q8_0 Q4_K ...]

One run of `quantlab quantize` writes a file of each type, by rounding. Each is then read three ways: by quantlab (every
tensor decoded, transformers computes in float32), by transformers' own reader of GGUF files, and by llama.cpp. A row
has the perplexity of quantlab's and of llama.cpp's reading on the same windows, the relative error of the logits, of
how many of 20 prompts the greedy continuations are the same (and how many tokens are, on average), and
the largest difference that transformers' reading makes to a weight.

llama.cpp multiplies with activations rounded to 8 bits in blocks (Q8_0, Q8_1 and Q8_K of ggml; keys and values in
float16). The last column is the perplexity of quantlab's reading with the inputs of every matrix rounded so: how much
of the difference that is. Writes results/benchmarks/gguf-agreement.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peers import machine

from quantlab.evals.windows import make_windows
from quantlab.models.llama_cpp import open_model
from quantlab.models.load import LoadedModel, load_model, quiet_libraries
from quantlab.paths import atomic_write_text
from quantlab.progress import Silent
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.load import parse_recipe
from quantlab.registry.block_types import BLOCK_TYPES

HERE = Path(__file__).resolve().parent
PROMPTS = 20
SUPER = 256  # columns of a block of activations beside k-quants; 32 beside the other types


def files_of(args: argparse.Namespace) -> dict[str, Path]:
    jobs = {}
    for kind in args.types:
        recipe = parse_recipe(
            json.dumps({"kind": "quantize", "method": "rtn", "format": "gguf", "type": kind})
        )
        jobs[kind] = Job(kind, recipe, args.work / kind)  # type: ignore[arg-type]
    missing = [job for job in jobs.values() if not job.out.is_dir()]
    if missing:
        quantize(missing, str(args.model), device="cpu", progress=Silent())
    return {kind: next(job.out.glob("*.gguf")) for kind, job in jobs.items()}


@torch.inference_mode()
def logits_of(model: LoadedModel, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    for row in windows:
        yield model.model(input_ids=row[None]).logits[0].float()


def loss_of(logits: torch.Tensor, row: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:-1], row[1:]))


@torch.inference_mode()
def continuation(model: LoadedModel, prompt: torch.Tensor, tokens: int) -> list[int]:
    """The most likely tokens behind a prompt, one after the other."""
    fed, past, found = prompt[None], None, list[int]()
    for _ in range(tokens):
        output = model.model(input_ids=fed, past_key_values=past, use_cache=True, logits_to_keep=1)
        fed, past = output.logits[:, -1:].argmax(dim=-1), output.past_key_values
        found.append(int(fed))
    return found


@contextmanager
def rounded_activations(model: LoadedModel, file: Path) -> Iterator[None]:
    """The inputs of every linear layer rounded to 8 bits, as ggml's kernels for the layer's type round them."""
    from gguf import GGUFReader

    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    kinds.setdefault("output.weight", kinds["token_embd.weight"])
    names = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip

    def hook(block: int) -> Any:
        return lambda module, inputs: (rounded(inputs[0], block), *inputs[1:])

    handles = []
    for name, module in model.model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        layer, _, leaf = name.removeprefix("model.layers.").partition(".")
        leaf = leaf.rpartition(".")[2]
        kind = kinds[f"blk.{layer}.{names[leaf]}.weight" if leaf in names else "output.weight"]
        if kind in BLOCK_TYPES:
            handles.append(module.register_forward_pre_hook(hook(BLOCK_TYPES[kind].block)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rounded(x: torch.Tensor, block: int) -> torch.Tensor:
    """Q8_0's and Q8_K's rounding of activations [.., columns]; the scale of the former is a float16."""
    blocks = x.float().view(-1, block)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    if block < SUPER:
        codes = torch.round(blocks / scale.clamp(min=1e-30))
        scale = scale.half().float()
    else:
        codes = torch.round(blocks / scale.clamp(min=1e-30))
    return (codes * scale).view(x.shape).to(x.dtype)


def compare(kind: str, file: Path, args: argparse.Namespace) -> dict[str, Any]:
    ours, theirs = load_model(file, device="cpu", dtype="float32"), open_model(file)
    windows = make_windows(
        ours.tokenizer, args.text.read_text(encoding="utf-8"), args.seq_len, args.test_tokens, "text"
    ).ids
    losses, squares = [], [0.0, 0.0]
    for row, a, b in zip(windows, logits_of(ours, windows), logits_of(theirs, windows), strict=True):
        losses.append((loss_of(a, row), loss_of(b, row)))
        squares = [squares[0] + float((a - b).square().sum()), squares[1] + float(a.square().sum())]
    with rounded_activations(ours, file):
        emulated = [loss_of(a, row) for row, a in zip(windows, logits_of(ours, windows), strict=True)]
    prompts = [windows[i % len(windows), 16 * (i // len(windows)) :][:24] for i in range(PROMPTS)]
    same, agreed = 0, []
    for prompt in prompts:
        a, b = (continuation(model, prompt, args.continued) for model in (ours, theirs))
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        same += first == len(a)
        agreed.append(first)
    ppl, ppl_llama_cpp, ppl_emulated = (
        math.exp(sum(column) / len(column)) for column in (*zip(*losses, strict=True), emulated)
    )
    return {
        "type": kind, "bytes": file.stat().st_size, "ppl": ppl, "ppl_llama_cpp": ppl_llama_cpp,
        "ppl_8_bit_activations": ppl_emulated, "logits_error": math.sqrt(squares[0] / squares[1]),
        "same_continuations": same, "mean_agreed": sum(agreed) / len(agreed), "continued": args.continued,
        "transformers_largest_difference": against_transformers(file, ours),
    }  # fmt: skip


def against_transformers(file: Path, ours: LoadedModel) -> float | str:
    """The largest difference of a weight, or why transformers cannot read the file."""
    from transformers import AutoModelForCausalLM

    try:
        other = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except Exception as error:  # whatever the reader of another project raises is its answer
        return f"{type(error).__name__}: {str(error)[:200]}"
    mine, largest = ours.model.state_dict(), 0.0
    for name, tensor in other.state_dict().items():
        largest = max(largest, float((tensor - mine[name]).abs().max()))
    return largest


def show(rows: list[dict[str, Any]]) -> str:
    head = [
        "type",
        "MB",
        "ppl",
        "llama.cpp",
        "ratio",
        "8-bit activations",
        "logits",
        "same of 20",
        "transformers",
    ]
    cells = [
        [
            row["type"], f"{row['bytes'] / 1e6:.1f}", f"{row['ppl']:.3f}", f"{row['ppl_llama_cpp']:.3f}",
            f"{row['ppl_llama_cpp'] / row['ppl']:.4f}", f"{row['ppl_8_bit_activations']:.3f}",
            f"{row['logits_error']:.4f}", f"{row['same_continuations']} ({row['mean_agreed']:.1f})",
            str(row["transformers_largest_difference"])[:40],
        ]
        for row in rows
    ]  # fmt: skip
    return machine.table(head, cells)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a Llama in float, a model directory")
    parser.add_argument("--text", type=Path, required=True, help="what perplexity is measured on")
    parser.add_argument("--types", nargs="+", choices=list(BLOCK_TYPES), default=list(BLOCK_TYPES))
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--continued", type=int, default=16, help="tokens of a greedy continuation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/gguf-agreement"))
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "results" / "benchmarks" / "gguf-agreement.json"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind, file in files_of(args).items():
        rows.append(compare(kind, file, args))
        print(show(rows[-1:]), file=sys.stderr, flush=True)
        found = {"machine": machine.describe(), "model": args.model.name, "types": rows}
        atomic_write_text(args.out, json.dumps(found, indent=1) + "\n")
    print(show(rows))


if __name__ == "__main__":
    main()
