"""How far the layers of quantized checkpoints are from the original model's, on the calibration rows themselves.

    python -m peers.errors SPEC.json        (from benchmarks/, by quantize_vs_peers.py)

All of it in float32 with the original's own inputs, the same for every tool. `X_l` [in, tokens] is what the original
model hands to linear l, `h_b` the hidden states that it hands to block b, over all rows or the first `block_rows`:

* `layer_error`: the sum over all quantized linears of `||(W - W^) X_l||^2 / tokens`, computed as `tr(E H E^T)` with
  `E = W - W^` and `H = X_l X_l^T / tokens` summed in float64 over all rows. Only for methods that leave everything but
  the linears alone (GPTQ, RTN): AWQ moves scales into norms and neighbours, so its matrices act on other inputs.
* `block_error`: the sum over blocks of `||f_b(h_b) - f^_b(h_b)||^2 / tokens`, where `f^_b` is the block with all that
  the checkpoint stores for it, norms included. It is defined for every method; every block gets the original's inputs,
  so errors do not add up along the depth. `block_error_relative` divides by the sum of `||f_b(h_b) - h_b||^2 / tokens`.
* `logits_mse`: mean squared difference of the logits when the checkpoint runs as a whole, and `logits_kl`, the mean
  Kullback-Leibler divergence of its next-token distribution from the original's, in nats.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from peers.checkpoints import Checkpoint

ROWS_AT_ONCE = 2


class Inputs:
    """Hooks that sum ``H = X X^T`` (float64) once for every distinct input of a block's linears."""

    def __init__(self, block: nn.Module) -> None:
        self.sums: dict[str, torch.Tensor] = {}  # by the first linear that saw the input
        self.first: dict[str, str] = {}
        self.tokens = 0
        self._seen: list[tuple[torch.Tensor, str]] = []
        linears = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        self._handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in linears]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            for tensor, leader in self._seen:
                if tensor is args[0]:
                    self.first[name] = leader
                    return
            self._seen.append((args[0], name))
            self.first[name] = name
            x = args[0].reshape(-1, args[0].shape[-1])  # [tokens, in]
            product = (x.t() @ x).to(torch.float64)
            self.sums[name] = self.sums[name] + product if name in self.sums else product

        return add

    def end_batch(self, tokens: int) -> None:
        self._seen.clear()
        self.tokens += tokens

    def finish(self) -> dict[str, torch.Tensor]:
        """Linear to its ``H / tokens`` [in, in], float32; shared where the input is."""
        for handle in self._handles:
            handle.remove()
        means = {name: (total / self.tokens).to(torch.float32) for name, total in self.sums.items()}
        return {name: means[leader] for name, leader in self.first.items()}


def squared(difference: torch.Tensor) -> float:
    return float(difference.to(torch.float64).square().sum())


@torch.no_grad()
def measure(
    model: nn.Module,
    rows: torch.Tensor,
    checkpoints: Mapping[str, Checkpoint],
    *,
    block_rows: int,
    layerwise: set[str],
) -> dict[str, dict[str, float | None]]:
    """The errors of every checkpoint.

    Args:
        model: the original, a Llama of transformers in float32.
        rows: token ids int64 [rows, seq_len], on the model's device.
        block_rows: how many of them block errors and logits are measured on.
        layerwise: names of the checkpoints whose matrices can be compared one by one.
    """
    body: Any = model.model
    hidden = body.embed_tokens(rows)  # [rows, seq_len, hidden]
    positions = torch.arange(rows.shape[1], device=rows.device)[None]
    rope = body.rotary_emb(hidden[:1], position_ids=positions)
    count = min(block_rows, len(rows))
    tokens = count * rows.shape[1]
    own = {name: hidden[:count].clone() for name in checkpoints}
    layer, block_sum, energy = dict.fromkeys(checkpoints, 0.0), dict.fromkeys(checkpoints, 0.0), 0.0

    def run(
        block: nn.Module, states: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        keywords = {"attention_mask": None, "position_ids": positions, "position_embeddings": rope}
        parts = []
        for part in states.split(ROWS_AT_ONCE):
            out = (
                functional_call(block, dict(weights), (part,), keywords)
                if weights
                else block(part, **keywords)
            )
            parts.append(out[0] if isinstance(out, tuple) else out)
        return torch.cat(parts)

    for index, block in enumerate(body.layers):
        inputs = Inputs(block)
        after = []
        for part in hidden.split(ROWS_AT_ONCE):
            after.append(run(block, part))
            inputs.end_batch(part.shape[0] * part.shape[1])
        moments = inputs.finish()
        outputs = torch.cat(after)
        energy += squared(outputs[:count] - hidden[:count]) / tokens
        for name, checkpoint in checkpoints.items():
            weights = {k: v.to(rows.device) for k, v in checkpoint.weights(f"model.layers.{index}").items()}
            if name in layerwise:
                for linear, h in moments.items():
                    error = block.get_parameter(f"{linear}.weight") - weights[f"{linear}.weight"]
                    layer[name] += float(((error @ h) * error).to(torch.float64).sum())
            block_sum[name] += squared(run(block, hidden[:count], weights) - outputs[:count]) / tokens
            own[name] = run(block, own[name], weights)
        hidden = outputs
    found: dict[str, dict[str, float | None]] = {}
    for name, checkpoint in checkpoints.items():
        difference, divergence = _logits(model, checkpoint, hidden[:count], own[name])
        found[name] = {
            "layer_error": layer[name] if name in layerwise else None,
            "block_error": block_sum[name],
            "block_error_relative": block_sum[name] / energy,
            "logits_mse": difference,
            "logits_kl": divergence,
        }
    return found


def _logits(
    model: nn.Module, checkpoint: Checkpoint, right: torch.Tensor, own: torch.Tensor
) -> tuple[float, float]:
    """Mean squared difference of logits and mean KL divergence in nats, from the last hidden states
    [rows, seq_len, hidden] of the original and of the checkpoint."""
    body: Any = model.model
    norm = checkpoint.weights("model.norm")["weight"].to(own.device)
    total, divergence, count = 0.0, 0.0, 0
    for a, b in zip(right.split(1), own.split(1), strict=True):
        expected: torch.Tensor = model.lm_head(body.norm(a))  # type: ignore[operator]
        got: torch.Tensor = model.lm_head(functional_call(body.norm, {"weight": norm}, (b,)))  # type: ignore[operator]
        total += squared(expected - got) / expected.shape[-1]
        p, q = expected.log_softmax(-1), got.log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum().to(torch.float64))
        count += a.shape[1]
    return total / count, divergence / count


def main() -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows = load_file(spec["rows"])["ids"].to(spec["device"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).to(spec["device"]).eval()
    found = measure(
        model, rows, {name: Checkpoint(path) for name, path in spec["checkpoints"].items()},
        block_rows=spec["block_rows"], layerwise=set(spec["layerwise"]),
    )  # fmt: skip
    Path(spec["result"]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
