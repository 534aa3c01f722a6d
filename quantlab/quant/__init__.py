"""The quantization engine. ``METHODS`` names what quantlab solves itself; bitsandbytes is reached through
transformers (``bnb.py``). A method is one file and one line here.

A method is a function on one decoder block::

    def quantize_block(block: BlockView, grids: Sequence[Grid], **options) -> list[BlockResult]   # one a grid

with the options of its own recipe keys as plain arguments.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

METHODS: dict[str, str] = {
    "rtn": "quantlab.quant.methods.rtn:quantize_block",
    "gptq": "quantlab.quant.methods.gptq:quantize_block",
    "awq": "quantlab.quant.methods.awq_block:quantize_block",
    "fp8": "quantlab.quant.methods.fp8:quantize_block",
}

# Methods that look at calibration data; the others are solved from the weights alone.
CALIBRATED = ("gptq", "awq")

# Methods that move scales from a layer into what comes before it, and have to know what may be moved.
FOLDING = ("awq",)


def method(name: str) -> Any:
    """The block function of a method in :data:`METHODS`."""
    module, _, function = METHODS[name].partition(":")
    return getattr(import_module(module), function)
