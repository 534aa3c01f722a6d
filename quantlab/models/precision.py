"""What a model is computed in where it is stored in 16 bits: the same on GPUs, float32 on CPUs that cannot multiply it.

Without instructions for a type, products in it are done piece by piece: on an AVX2 processor 1 to 17 GFLOP/s in
bfloat16 against 130 in float32, which holds the same values. Told by what the processor says of itself, never by a
measurement: a run that is resumed must compute in what it began with.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

HALVES = (torch.bfloat16, torch.float16)


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of ``dtype`` about as fast as those of float32, or faster.

    bfloat16: with AVX512-BF16 or AMX on x86, and where oneDNN takes it. float16: nowhere; libraries convert it.
    """
    if dtype == torch.float16:
        return False
    if dtype != torch.bfloat16:
        return True
    told = torch.cpu.get_capabilities()
    native = told.get("architecture") != "x86_64" or told.get("avx512_bf16") or told.get("amx_bf16")
    return bool(native) and onednn_takes_bfloat16()


def onednn_takes_bfloat16() -> bool:
    """Whether the library that multiplies does: it may have been told to use less than the processor has
    (``ONEDNN_MAX_CPU_ISA``)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def computed_in(stored: torch.dtype, device: str | torch.device) -> torch.dtype:
    """The dtype to compute in on ``device`` with weights that are stored in ``stored``."""
    slow = torch.device(device).type == "cpu" and stored in HALVES and not cpu_multiplies(stored)
    return torch.float32 if slow else stored


@contextmanager
def bfloat16_operands(device: torch.device) -> Iterator[None]:
    """Float32 matrix products round their operands to bfloat16 and sum in float32 (oneDNN's fpmath mode) on a CPU that
    is faster so, three times with AMX; anywhere else nothing changes.

    Exact where the operands hold bfloat16 values. The setting is the process's: keep what runs inside short.
    """
    if device.type != "cpu" or not cpu_multiplies(torch.bfloat16):
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
