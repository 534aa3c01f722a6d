"""Bytes that a loaded model holds: the storages behind its parameters, its buffers, and what packed layers keep beside.

Storages are counted once, so tied matrices and views cost nothing. bitsandbytes keeps its scales in attributes of the
weights (``quant_state``, ``CB``, ``SCB``), gptqmodel's kernels keep tensors as plain attributes: both are found by
looking at what the modules and these objects hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

LIBRARIES = ("bitsandbytes", "gptqmodel", "compressed_tensors", "torchao")
DEEPEST = 6  # objects inside objects


def held_bytes(model: nn.Module) -> int:
    """Bytes of all storages that the model keeps alive, on whatever device."""
    storages: dict[tuple[str, int], int] = {}
    for module in model.modules():
        for tensor in _tensors(vars(module), 0, set()):
            if tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                storages[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any, depth: int, seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors in a value, in what it contains, and in the objects of quantization libraries that it holds."""
    if depth > DEEPEST or id(value) in seen or isinstance(value, nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        inner: Any = [v for k, v in getattr(value, "__dict__", {}).items() if k != "grad"]
    elif isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple):
        inner = value
    elif type(value).__module__.partition(".")[0] in LIBRARIES and hasattr(value, "__dict__"):
        inner = list(vars(value).values())
    else:
        return
    for part in inner:
        yield from _tensors(part, depth + 1, seen)
