"""The importance matrix of a walk: the diagonals of its second moments, kept block by block, and written at the end.

The diagonal is all that llama.cpp's importance matrix is. A block's part is in its place before the block counts as
done, so that an interrupted run goes on with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from quantlab.errors import DataError, MachineError
from quantlab.formats.gguf.architectures import Places
from quantlab.formats.gguf.imatrix import write_imatrix
from quantlab.models.blockwise import BlockwiseModel
from quantlab.models.safetensors.durable import replace
from quantlab.quant.hessian import InputHessian


class Keep(Protocol):
    """What the finished statistics of every block are given to."""

    def save(self, index: int, moments: Sequence[InputHessian]) -> None: ...


class KeepBoth:
    """Several of those."""

    def __init__(self, keeps: Sequence[Keep]) -> None:
        self.keeps = keeps

    def save(self, index: int, moments: Sequence[InputHessian]) -> None:
        for one in self.keeps:
            one.save(index, moments)


class ImatrixStore:
    """Sums of squares by tensor, in ``folder`` until :meth:`write` puts them into ``target``."""

    def __init__(self, target: Path, folder: Path, opened: BlockwiseModel, places: Places) -> None:
        self.target, self.folder, self.opened, self.places = target, folder, opened, places

    def save(self, index: int, moments: Sequence[InputHessian]) -> None:
        """Keep the diagonals of a block, and how many tokens they are of."""
        prefix, tensors = f"{self.opened.prefix}.{index}.", {}
        for one in moments:
            for name in one.layers:
                stored = self.opened.names.on_disk(prefix + name)
                tensors[f"{stored}.weight"] = torch.diagonal(one.hessian).cpu() * one.tokens
                tensors[f"{stored}.tokens"] = torch.tensor([float(one.tokens)])
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._file(index).with_suffix(".part")
        try:
            save_file(tensors, unfinished)
            replace(unfinished, self._file(index))
        except OSError as error:
            raise MachineError(
                f"cannot write {self._file(index)}: {error}", hint="is the disk full?"
            ) from error

    def write(self, *, source: str, chunks: int, chunk_size: int) -> None:
        """Write the importance matrix.

        Raises:
            DataError: blocks are missing, solved by an earlier run that kept none. MachineError: the disk is full.
        """
        sums: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}
        for index in range(len(self.opened.blocks)):
            if not self._file(index).is_file():
                raise DataError(
                    f"{self.target}: block {index} was solved by a run that kept no importance matrix",
                    hint="give --save-imatrix from the start, without --resume",
                )
            held = load_file(self._file(index))
            for name in [name for name in held if name.endswith(".weight")]:
                place = self.places.of(name)
                if place is not None:
                    tokens = held[f"{name.removesuffix('.weight')}.tokens"]
                    sums.setdefault(place.name, {})[place.expert or 0] = (held[name], tokens)
        stacked = {
            name: (
                torch.stack([squares for _, (squares, _) in sorted(parts.items())]),
                torch.cat([tokens for _, (_, tokens) in sorted(parts.items())]),
            )
            for name, parts in sums.items()
        }
        try:
            write_imatrix(self.target, stacked, source=source, chunks=chunks, chunk_size=chunk_size)
        except OSError as error:
            raise MachineError(f"cannot write {self.target}: {error}", hint="is the disk full?") from error

    def _file(self, index: int) -> Path:
        return self.folder / f"imatrix-{index:05d}.safetensors"
