"""Dense little-endian bit streams in int32 words: the packing under the GPTQ and AWQ layouts.

Codes follow each other without gaps along the packed dimension, lowest bits first; 3-bit codes cross word
boundaries, so that 32 of them fill exactly three words (AutoGPTQ's layout, bit for bit).
"""

from __future__ import annotations

import torch


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along dimension 0: integers ``[n, m]`` below ``2**bits`` become int32 ``[n * bits / 32, m]``.

    ``n * bits`` must be a multiple of 32.
    """
    n, m = codes.shape
    if n * bits % 32:
        raise ValueError(f"{n} codes of {bits} bits do not fill whole 32-bit words")
    words = torch.zeros(n * bits // 32, m, dtype=torch.int64, device=codes.device)
    period = 32 if 32 % bits else 32 // bits  # codes after which the pattern of offsets repeats
    values = codes.to(torch.int64).reshape(n // period, period, m)
    grouped = words.view(n // period, period * bits // 32, m)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        grouped[:, word] |= (values[:, i] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            grouped[:, word + 1] |= values[:, i] >> (32 - shift)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of :func:`pack`: int32 ``[n * bits / 32, m]`` becomes int32 codes ``[n, m]``."""
    m = words.shape[1]
    period = 32 if 32 % bits else 32 // bits
    grouped = (words.to(torch.int64) & 0xFFFFFFFF).reshape(n // period, period * bits // 32, m)
    codes = torch.empty(n // period, period, m, dtype=torch.int64, device=words.device)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        value = grouped[:, word] >> shift
        if shift + bits > 32:
            value = value | (grouped[:, word + 1] << (32 - shift))
        codes[:, i] = value & (2**bits - 1)
    return codes.reshape(n, m).to(torch.int32)
