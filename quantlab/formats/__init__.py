"""Checkpoint layouts. One file each, writer and reader together; the table names them and is read lazily.

A layout module offers::

    pack(codes, scales, zeros, group_of, *, bits, group_size, symmetric) -> dict[str, Tensor]   # of one linear
    unpack(tensors, *, bits, group_size) -> (codes, scales, zeros, group_of)
    config(layers, *, bits, group_size, symmetric, act_order, static_groups, damp, quantizer, ignore) -> dict
    ZERO_MIN    # smallest zero it can store
    SUFFIXES    # names a linear's tensors may have; the first one is always there

``layers`` maps the full name of every quantized linear to its (bits, group_size), ``ignore`` names the linears that are
left as they are; ``config`` returns the checkpoint's ``quantization_config``.

Which layer shapes a layout can hold is in ``shapes.py``, which needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

FORMATS: dict[str, str] = {
    "gptq": "quantlab.formats.gptq",
    "awq": "quantlab.formats.awq",
    "compressed-tensors": "quantlab.formats.compressed_tensors",
}


def layout(name: str) -> ModuleType:
    """The module of a layout in :data:`FORMATS`."""
    return import_module(FORMATS[name])
