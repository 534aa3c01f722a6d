"""A model opened block by block: the skeleton on the meta device, one decoder block in memory at a time.

Nothing here knows an architecture. The decoder blocks are the largest list of equal modules. What a block is
called with (rotary tables, masks, positions, per layer where they differ) is recorded from one forward pass of the
model with every block replaced by a stub that hands its input on; from then on the blocks run alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantlab.errors import DataError
from quantlab.models.files import ModelFiles


@dataclass
class Call:
    """What a block gets besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Opened:
    """The skeleton of a causal language model and the means to fill it piece by piece.

    ``prefix`` is the dotted name of the block list, ``blocks`` the list itself, ``dtype`` what it computes in.
    """

    def __init__(
        self, files: ModelFiles, device: str, dtype: torch.dtype, trust_remote_code: bool = False
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.files, self.device, self.dtype = files, torch.device(device), dtype
        config = AutoConfig.from_pretrained(files.path, trust_remote_code=trust_remote_code)
        with init_empty_weights(include_buffers=False):
            self.model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            ).eval()
        self.config = config
        self.prefix, self.blocks = find_blocks(self.model)

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Load the parameters and stored buffers of ``module``, ``prefix`` in the checkpoint, onto the device."""
        from safetensors import safe_open

        names = [n for n, _ in module.named_parameters()] + [
            n for n, _ in module.named_buffers() if f"{prefix}.{n}" in self.files.tensors
        ]
        for name in names:
            full = f"{prefix}.{name}" if prefix else name
            info = self.files.tensors.get(full)
            if info is None:
                raise DataError(f"{self.files.name}: tensor {full} is not in its files")
            with safe_open(info.file, framework="pt") as stream:
                tensor = stream.get_tensor(full)
            owner, _, leaf = name.rpartition(".")
            target = module.get_submodule(owner)
            if tensor.is_floating_point():
                if not torch.isfinite(tensor).all():
                    raise DataError(f"{info.file}: {full} holds NaN or infinite values")
                tensor = tensor.to(self.dtype)
            tensor = tensor.to(self.device)
            if leaf in target._parameters:
                target._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                target._buffers[leaf] = tensor

    def empty(self, module: nn.Module) -> None:
        """Give the memory of ``module``'s parameters back."""
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None:
                    child._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    def block(self, index: int) -> nn.Module:
        """Block ``index`` with its weights on the device. Empty it when done."""
        block = self.blocks[index]
        self.fill(block, f"{self.prefix}.{index}")
        return block.to(self.device)  # non-persistent buffers

    @torch.no_grad()
    def inputs(self, rows: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """Run everything before the first block.

        Args:
            rows: token ids int64 [rows, seq_len].

        Returns:
            hidden states [rows, seq_len, hidden] on the device, and one call per block, recorded from the first row
            (all rows have one length, so the rest of a call is the same for each).
        """
        calls: list[Call] = []
        seen: list[torch.Tensor] = []
        stubs = nn.ModuleList(_Stub(calls, seen if i == 0 else None, b) for i, b in enumerate(self.blocks))
        parent, _, leaf = self.prefix.rpartition(".")
        body = self.model.get_submodule(parent)  # the model without its head: no logits are computed
        around = [(f"{parent}.{n}" if parent else n, m) for n, m in body.named_children() if n != leaf]
        for name, module in around:
            self.fill(module, name)
            module.to(self.device)  # rotary tables and the like, which no file holds
        setattr(body, leaf, stubs)
        try:
            for row in rows:
                body(input_ids=row[None].to(self.device), use_cache=False)
        finally:
            setattr(body, leaf, self.blocks)
            for _, module in around:
                self.empty(module)
        if len(seen) != len(rows):
            raise DataError(f"{self.files.name}: its forward pass does not reach its first decoder block")
        return torch.cat(seen), calls[: len(self.blocks)]


class _Stub(nn.Module):
    """Stands for a block: records its call, keeps its input where asked to, and hands the hidden states on."""

    def __init__(self, calls: list[Call], seen: list[torch.Tensor] | None, block: nn.Module) -> None:
        super().__init__()
        self.calls, self.kept = calls, seen
        for name, value in vars(
            block
        ).items():  # what a model reads off its blocks (attention_type and the like)
            if isinstance(value, str | int | float) and name != "training":
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.kept is not None:
            self.kept.append(hidden_states.detach())
        self.calls.append(Call(args, kwargs))
        return hidden_states


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: the ModuleList of equal children that holds the most parameters."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1:
            size = sum(p.numel() for p in module.parameters())
            if best is None or size > best[0]:
                best = (size, name, module)
    if best is None:
        raise DataError(f"{type(model).__name__} has no list of equal decoder blocks")
    return best[1], best[2]


def run_block(block: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    """One block on hidden states [rows, seq_len, hidden]; returns the same shape."""
    out = block(hidden, *call.args, **call.kwargs)
    result = out[0] if isinstance(out, tuple) else out
    assert isinstance(result, torch.Tensor)
    return result


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside a block, by their name in it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` covering ``range(count)``."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def dtype_of(files: ModelFiles, wish: str = "auto") -> torch.dtype:
    """The dtype to compute in: the stored one unless ``wish`` names another."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    stored = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    if wish != "auto":
        return names[wish]
    kinds: Sequence[str] = [t.dtype for t in files.tensors.values() if t.dtype in stored]
    return stored[max(set(kinds), key=kinds.count)] if kinds else torch.float32
