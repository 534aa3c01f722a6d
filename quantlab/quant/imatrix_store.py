"""Importance matrices: of a walk, and in place of one.

The diagonal of the second moments is all that llama.cpp's importance matrix is. A walk's is kept block by block and
written at the end; a block's part is in its place before the block counts as done, so that an interrupted run goes on
with it. One that was written is what a method that looks at no more is solved from, to the same bytes: sums and tokens
are kept, not means.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from quantlab.errors import DataError, MachineError
from quantlab.formats.gguf.architectures import Places
from quantlab.models.blockwise import BlockwiseModel, layers_of
from quantlab.models.gguf.imatrix import Imatrix, open_imatrix, write_imatrix
from quantlab.models.layers import linears
from quantlab.models.safetensors.durable import replace
from quantlab.models.safetensors.files import ModelFiles
from quantlab.quant.block_selection import places_of
from quantlab.quant.hessian import InputHessian


class Statistics(Protocol):
    """Statistics that are there already, so that no row is run for them."""

    def load(self, index: int, device: torch.device | str) -> list[InputHessian]: ...


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
                assert one.squares is not None  # of a walk
                tensors[f"{stored}.weight"] = one.squares.cpu().clone()  # a tensor each, for the file
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


SHOWN = 3  # names in a message


class Importance:
    """An importance matrix as statistics of a model's layers. ``held``: the file. ``means``: by layer, by its name in
    the files of the model: mean squares float32 [in], and of how many tokens."""

    def __init__(self, held: Imatrix, means: Mapping[str, tuple[torch.Tensor, int]]) -> None:
        self.held, self.means = held, means
        self.opened: BlockwiseModel | None = None  # whose blocks they are of

    @classmethod
    def open(cls, path: Path, wanted: Collection[str], files: ModelFiles) -> Importance:
        """The importance matrix of a model, of which there must be an entry for each of the ``wanted`` layers.

        Raises:
            DataError: as ``models.gguf.imatrix.open_imatrix`` and ``block_selection.places_of``; layers that are
                missing, of another length, or that saw no tokens, by name.
        """
        held, places, shapes = open_imatrix(path), places_of(files), layers_of(files).shapes
        means: dict[str, tuple[torch.Tensor, int]] = {}
        missing, odd, unseen = list[str](), list[str](), list[str]()
        for name in wanted:
            place, columns = places.of(f"{name}.weight"), shapes[name][1]
            entry = None if place is None else held.sums.get(place.name)
            if place is None or entry is None:
                missing.append(name if place is None else place.name)
                continue
            squares = entry.squares
            if entry.tokens is None and place.expert is not None and squares.numel() % columns == 0:
                squares = squares.view(-1, columns)  # experts are not told apart there
            rows, length = squares.shape
            if length != columns or (place.expert or 0) >= rows or (place.expert is None and rows > 1):
                odd.append(f"{place.name} has {rows} x {length} sums, {columns} inputs are wanted")
                continue
            found, tokens = entry._replace(squares=squares).means(columns)
            if not any(tokens) or not squares.any():
                unseen.append(place.name)
            means[name] = (found[place.expert or 0], tokens[place.expert or 0])
        for what, names in (("entry for", missing), ("tokens of", unseen)):
            if names:
                raise DataError(
                    f"{path}: this importance matrix has no {what} {_some(names)} of {files.name}",
                    hint="it is of another model, or its text reached too little: calibrate on a text instead",
                )
        if odd:
            raise DataError(
                f"{path}: this importance matrix is of another model than {files.name}: {_some(odd)}",
                hint="give one that was gathered from this model",
            )
        return cls(held, means)

    def load(self, index: int, device: torch.device | str) -> list[InputHessian]:
        """The statistics of a block, one entry a layer: the diagonals alone."""
        assert self.opened is not None
        opened, found = self.opened, []
        for name in linears(opened.blocks[index]):
            known = self.means.get(opened.names.on_disk(f"{opened.prefix}.{index}.{name}"))
            if known is not None:
                squares = known[0].to(device)
                found.append(InputHessian([name], squares.clone(), torch.zeros_like(squares), known[1]))
        return found

    def record(self, path: Path) -> dict[str, Any]:
        """For quantlab.json, where rows of a text would be told."""
        return {
            "imatrix": path.name,
            "source": self.held.source,
            "chunks": self.held.chunks,
            "digest": self.held.digest,
        }


def in_words(record: Mapping[str, Any]) -> str:
    """A line about an importance matrix, from :meth:`Importance.record`."""
    of = f" of {record['source']}" if record["source"] else ""
    chunks = f", {record['chunks']} chunks" if record["chunks"] else ""
    return f"importance matrix {record['imatrix']} (digest {record['digest']}{of}{chunks})"


def _some(names: Sequence[str]) -> str:
    """A few of the names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
