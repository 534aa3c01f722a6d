"""Checkpoint layouts. One file each, writer and reader together; the table names them and is read lazily.

A layout module offers::

    pack(codes, scales, zeros, group_of, *, bits) -> dict[str, Tensor]      # the tensors of one linear
    unpack(tensors, *, bits, group_size) -> (codes, scales, zeros, group_of)
    config(*, bits, group_size, symmetric, act_order, ...) -> dict          # its ``quantization_config``
    ZERO_MIN                                                                # smallest zero it can store
    SUFFIXES                                                                # names of a linear's tensors

Which layer shapes a layout can hold is in ``shapes.py``, which needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

FORMATS: dict[str, str] = {
    "gptq": "quantlab.formats.gptq",
    "awq": "quantlab.formats.awq",
}


def layout(name: str) -> ModuleType:
    """The module of a layout in :data:`FORMATS`."""
    return import_module(FORMATS[name])
