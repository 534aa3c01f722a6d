"""Dense little-endian bit streams in int32 words: the packing under every layout here.

Codes follow each other without gaps along the packed dimension, lowest bits first; codes of 3, 5, 6 and 7 bits cross
word boundaries, so that 32 of them fill exactly as many words as they have bits (AutoGPTQ's layout, bit for bit).
Everything is done in int32: a shift drops what leaves the word at the top, which is what packing needs.
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
    words = torch.zeros(n * bits // 32, m, dtype=torch.int32, device=codes.device)
    period = 32 if 32 % bits else 32 // bits  # codes after which the pattern of offsets repeats
    values = codes.reshape(n // period, period, m)
    grouped = words.view(n // period, period * bits // 32, m)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        value = values[:, i].to(torch.int32)
        grouped[:, word] |= value << shift
        if shift + bits > 32:
            grouped[:, word + 1] |= value >> (32 - shift)
    return words


def unpack(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of :func:`pack`: int32 ``[n * bits / 32, m]`` becomes int32 codes ``[n, m]``."""
    m = words.shape[1]
    period = 32 if 32 % bits else 32 // bits
    grouped = words.reshape(n // period, period * bits // 32, m)
    codes = torch.empty(n // period, period, m, dtype=torch.int32, device=words.device)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        # bits of the code in this word; the mask drops the copies of the sign bit
        held = min(bits, 32 - shift)
        value = (grouped[:, word] >> shift) & (2**held - 1)
        if held < bits:
            value |= (grouped[:, word + 1] << held) & (2**bits - 1)
        codes[:, i] = value
    return codes.reshape(n, m)
