"""What follows the last decoder block, run alone: the last norm, the head, and whatever a model does to its logits.

The model's own forward pass is used, with every block replaced by a stub that returns the hidden states it was given,
so that soft caps, scalings and projections need not be known here. The embedding is not loaded for it.

Not covered: models that use more of the blocks than the last one's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quantlab.models.blockwise import BlockwiseModel


@contextmanager
def head(opened: BlockwiseModel) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """A function from the hidden states after the last block [rows, seq_len, hidden] to logits [rows, seq_len,
    vocabulary]; gradients pass through it. Its weights are in memory until the context is left. ``opened.inputs`` was
    called before.
    """
    parent, _, leaf = opened.prefix.rpartition(".")
    body = opened.model.get_submodule(parent)
    get_input_embeddings: Any = opened.model.get_input_embeddings
    lookup = get_input_embeddings()
    stubs = nn.ModuleList(_Given(block) for block in opened.blocks)
    setattr(body, leaf, stubs)
    try:
        for name, module in opened.model.named_modules():
            if module is not lookup and (module._parameters or module._buffers):
                opened.fill(module, name, recurse=False)
                for key, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[key] = buffer.to(opened.device)

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            for stub in stubs:
                stub.returned = opened.as_returned(hidden)  # type: ignore[assignment]
            found = opened.model(inputs_embeds=hidden.detach(), use_cache=False).logits
            assert isinstance(found, torch.Tensor)
            return found

        yield logits
    finally:
        setattr(body, leaf, opened.blocks)
        opened.empty(opened.model)


class _Given(nn.Module):
    """Stands for a block and returns ``returned`` whatever it gets."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.returned: Any = None
        for name, value in vars(
            block
        ).items():  # what a model reads off its blocks (attention_type and the like)
            if isinstance(value, str | int | float) and name != "training":
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.returned
