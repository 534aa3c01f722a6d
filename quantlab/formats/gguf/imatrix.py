"""llama.cpp's importance matrix in its GGUF form: sums of squared activations by input channel, and of how many tokens.

For a tensor ``blk.0.attn_q.weight`` of the model it holds ``blk.0.attn_q.weight.in_sum2`` float32 [columns] (one row an
expert, where there are several) and ``blk.0.attn_q.weight.counts``. Source: ``tools/imatrix/imatrix.cpp`` of llama.cpp.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch


def write_imatrix(
    path: Path,
    sums: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    source: str,
    chunks: int,
    chunk_size: int,
) -> None:
    """Write the file, beside its place and then renamed.

    Args:
        sums: by tensor, with ``.weight``: sums of squares float32 [experts, columns], and tokens float32 [experts]; one
            expert where there are none.
        source: the calibration text's name. chunks, chunk_size: how many rows of how many tokens were seen.

    Raises:
        OSError: it cannot be written.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(None, "")
    writer.kv_data[0].clear()  # an importance matrix has no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [source])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name, (squares, tokens) in sorted(sums.items()):
        writer.add_tensor(f"{name}.in_sum2", squares.to(torch.float32).numpy())
        writer.add_tensor(f"{name}.counts", tokens.to(torch.float32)[:, None].numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        writer.write_header_to_file(unfinished)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_imatrix(path: Path) -> dict[str, torch.Tensor]:
    """Mean squared activations by tensor, float32 [experts, columns]; experts that saw nothing have ones.

    Raises:
        ValueError: it is no importance matrix. OSError: it cannot be read.
    """
    from gguf import GGUFReader

    held = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
    found = {}
    for name, squares in held.items():
        if not name.endswith(".in_sum2"):
            continue
        counts = held.get(name.removesuffix(".in_sum2") + ".counts")
        if (
            counts is None
            or squares.dtype != np.float32
            or not np.isfinite(squares).all()
            or (squares < 0).any()
        ):
            raise ValueError(f"{name} is damaged")
        sums, tokens = torch.from_numpy(squares), torch.from_numpy(counts.astype(np.float32)).reshape(-1, 1)
        sums = sums.reshape(len(tokens), -1)
        found[name.removesuffix(".in_sum2")] = torch.where(tokens > 0, sums / tokens.clamp(min=1), 1.0)
    if not found:
        raise ValueError("it holds no sums of squared activations")
    return found
