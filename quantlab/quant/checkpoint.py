"""Writing a checkpoint block by block, so that a run killed at any moment goes on where it was.

While work goes on there are two directories beside the one to come::

    <out>.partial   the checkpoint: one file a finished block, later the rest of it
    <out>.state     what is needed to go on: whose work this is, losses, and whatever the walk keeps under ``scratch``

A file gets its name only when its content is on the disk, and a block's losses are written before the block, so what
has its name is whole. At the end the blocks become the checkpoint's shards, an index is written, ``<out>.partial`` is
renamed to ``<out>``, and only then is the state removed: there is no moment at which a kill loses finished work or
leaves something half done under the final name. A checkpoint that fails verification is renamed to ``<out>.failed``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from quantlab import __version__
from quantlab.errors import MachineError
from quantlab.models.companions import copy_companions
from quantlab.models.safetensors.durable import replace, sync_folder
from quantlab.models.safetensors.files import TensorInfo, read_header
from quantlab.models.safetensors.tensors import DTYPES, Source, in_file, in_memory, read_tensor, write_tensors
from quantlab.paths import atomic_write_text
from quantlab.quant.checkpoint_paths import (
    partial_path,
    read_object,
    refuse_second_writer,
    state_path,
    this_process,
)
from quantlab.registry.formats import FORMATS


class CheckpointWriter:
    """One checkpoint in the making. ``prefix`` is the block list's name, ``blocks`` its length, ``dtype`` that of
    plain float tensors, ``key`` what an interrupted attempt must have had in common to be gone on with.

    Raises:
        MachineError: another process is at work on the same checkpoint.
    """

    def __init__(
        self, out: Path, prefix: str, blocks: int, dtype: torch.dtype, key: Mapping[str, str], *, resume: bool
    ) -> None:
        self.out, self.prefix, self.blocks, self.dtype, self.key = out, prefix, blocks, dtype, dict(key)
        self.work, self.state = partial_path(out), state_path(out)
        self.exact: tuple[str, ...] = ()  # parts of the names of plain tensors that keep their dtype
        self.finished = self.work  # the directory that gets the checkpoint's name
        self.losses: dict[str, float] = {}
        self.starved: dict[str, int] = {}  # experts with too few tokens: how many
        self.facts: dict[str, Any] = {}  # what inputs and outputs of layers are like (``layer_facts``)
        whole = {**key, "version": __version__, "dtype": str(dtype), "blocks": f"{prefix} x {blocks}"}
        refuse_second_writer(self.state)
        if resume and self.work.is_dir() and read_object(self.state / "resume.json") == whole:
            for leftover in [*self.work.glob("*.part"), *self.work.glob(".*.part")]:
                leftover.unlink()
            for index in range(blocks):
                if self.has_block(index):
                    self.losses.update(read_object(self._loss_file(index)) or {})
                    self.starved.update(read_object(self._starved_file(index)) or {})
                    self.facts.update(read_object(self._facts_file(index)) or {})
        else:
            for folder in (self.work, self.state):
                if folder.exists():
                    shutil.rmtree(folder)
            self.work.mkdir(parents=True)
            self.state.mkdir(parents=True)
            atomic_write_text(self.state / "resume.json", json.dumps(whole))
            sync_folder(self.state)
            sync_folder(out.absolute().parent)
        atomic_write_text(self.state / "owner.json", json.dumps(this_process()))

    @property
    def scratch(self) -> Path:
        """A directory for what the walk itself needs to go on (activations, probes). Removed at the end."""
        return self.state / "scratch"

    def _block_file(self, index: int) -> Path:
        return self.work / f"model-{index + 1:05d}-of-{self.blocks + 1:05d}.safetensors"

    def _loss_file(self, index: int) -> Path:
        return self.state / f"loss-{index:05d}.json"

    def _starved_file(self, index: int) -> Path:
        return self.state / f"starved-{index:05d}.json"

    def _facts_file(self, index: int) -> Path:
        return self.state / f"facts-{index:05d}.json"

    def has_block(self, index: int) -> bool:
        """Whether the block is solved and safely written."""
        return self._block_file(index).is_file()

    def first_missing(self) -> int:
        """The first block that is not written yet; ``blocks`` when all are."""
        return next((i for i in range(self.blocks) if not self.has_block(i)), self.blocks)

    def write_block(
        self,
        index: int,
        tensors: Mapping[str, torch.Tensor | TensorInfo],
        loss: Mapping[str, float],
        keep: Mapping[str, torch.Tensor] | None = None,
        starved: Mapping[str, int] | None = None,
        facts: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Write one block's tensors (names relative to the block; those in a file are copied), then they count as
        done. ``keep`` are tensors to be had again by :meth:`kept` after a kill, written before the block counts;
        ``starved`` and ``facts`` as the attributes."""
        named = {f"{self.prefix}.{index}.{n}": self._stored(n, t) for n, t in tensors.items()}
        losses = {f"{self.prefix}.{index}.{n}": v for n, v in loss.items()}
        self.losses.update(losses)
        atomic_write_text(self._loss_file(index), json.dumps(losses))
        if starved:
            few = {f"{self.prefix}.{index}.{n}": tokens for n, tokens in starved.items()}
            self.starved.update(few)
            atomic_write_text(self._starved_file(index), json.dumps(few))
        if facts:
            found = {f"{self.prefix}.{index}.{n}": dict(fact) for n, fact in facts.items()}
            self.facts.update(found)
            atomic_write_text(self._facts_file(index), json.dumps(found))
        if keep:
            _write(self._kept_file(index), {name: in_memory(t) for name, t in keep.items()})
        _write(self._block_file(index), named)

    def read_block(self, index: int) -> dict[str, torch.Tensor]:
        """A written block again, names relative to the block."""
        start = len(f"{self.prefix}.{index}.")
        return {
            name[start:]: read_tensor(info) for name, info in read_header(self._block_file(index)).items()
        }

    def kept(self, index: int) -> dict[str, torch.Tensor]:
        """What was given to :meth:`write_block` to be kept; empty where nothing was."""
        file = self._kept_file(index)
        return {n: read_tensor(info) for n, info in read_header(file).items()} if file.is_file() else {}

    def has_outside(self) -> bool:
        """Whether :meth:`write_outside` was done."""
        return self._outside_file().is_file()

    def write_outside(self, tensors: Mapping[str, torch.Tensor | TensorInfo]) -> None:
        """Keep packed matrices from outside the blocks, for :meth:`write_rest`."""
        _write(self._outside_file(), {name: self._stored(name, t) for name, t in tensors.items()})

    def outside(self) -> dict[str, TensorInfo]:
        """What was given to :meth:`write_outside`."""
        return read_header(self._outside_file())

    def write_rest(
        self,
        tensors: Mapping[str, torch.Tensor | TensorInfo],
        carried: Mapping[str, TensorInfo] | None = None,
    ) -> None:
        """Write what lies outside the blocks (embeddings, last norm, head), names as in the checkpoint. What is given
        as a tensor in a file is copied piece by piece and never held whole; ``carried`` byte for byte."""
        held = {name: self._stored(name, t) for name, t in tensors.items()}
        held |= {name: in_file(info, DTYPES[info.dtype]) for name, info in (carried or {}).items()}
        _write(self._block_file(self.blocks), held)

    def assemble(self, source: Path, config: Mapping[str, Any]) -> Path:
        """Turn the parts into a directory that any reader can load, still under its temporary name; returns it."""
        weight_map, total = {}, 0
        for part in (self._block_file(i) for i in range(self.blocks + 1)):
            for tensor in read_header(part).values():
                weight_map[tensor.name] = part.name
                total += tensor.count * DTYPES[tensor.dtype].itemsize
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        atomic_write_text(self.work / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
        _write_beside_weights(self.work, source, config)
        return self.work

    def export(self, write: Callable[[Path, Path], None], source: Path, config: Mapping[str, Any]) -> None:
        """Make the checkpoint that is published of the assembled one: ``write(assembled, target)`` puts weight files of
        its own into the directory ``target``. The assembled one stays until then, so that a killed run goes on."""
        target = self.out.with_name(self.out.name + ".exported")
        if target.exists():
            shutil.rmtree(target)
        target.mkdir()
        try:
            write(self.work, target)
        except OSError as error:
            raise MachineError(
                f"cannot write {target}: {error.strerror or error}", hint="is the disk full?"
            ) from error
        _write_beside_weights(target, source, config)
        self.finished = target

    def publish(self, record: Mapping[str, Any]) -> Path:
        """Add the provenance and give the checkpoint its name."""
        atomic_write_text(
            self.finished / "quantlab.json", json.dumps(dict(record), indent=1, ensure_ascii=False) + "\n"
        )
        replace(self.finished, self.out)
        shutil.rmtree(self.work, ignore_errors=True)  # what an export was made of
        shutil.rmtree(self.state, ignore_errors=True)
        return self.out

    def finish(self, source: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> Path:
        """:meth:`assemble` and :meth:`publish` in one, for callers with nothing to do between."""
        self.assemble(source, config)
        return self.publish(record)

    def fail(self) -> Path:
        """Put a checkpoint that must not be used out of the way, for looking at; returns where."""
        failed = self.out.with_name(self.out.name + ".failed")
        if failed.exists():
            shutil.rmtree(failed)
        os.replace(self.finished, failed)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.state, ignore_errors=True)
        return failed

    def _outside_file(self) -> Path:
        return self.state / "outside.safetensors"

    def _kept_file(self, index: int) -> Path:
        return self.state / f"kept-{index:05d}.safetensors"

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """What the checkpoint holds a tensor of ``dtype`` in: plain floats in its own, scales and codes in theirs."""
        plain = (
            dtype in PLAIN and not name.endswith(OWN_DTYPE) and not any(part in name for part in self.exact)
        )
        return self.dtype if plain else dtype

    def _stored(self, name: str, tensor: torch.Tensor | TensorInfo) -> Source:
        """A tensor as the checkpoint holds it."""
        dtype = DTYPES[tensor.dtype] if isinstance(tensor, TensorInfo) else tensor.dtype
        wanted = self.dtype_of(name, dtype)
        return in_file(tensor, wanted) if isinstance(tensor, TensorInfo) else in_memory(tensor, wanted)


# Ends of names of tensors whose dtype a format fixes.
OWN_DTYPE = tuple({end for found in FORMATS.values() for end in found.own_dtype})
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _write_beside_weights(folder: Path, source: Path, config: Mapping[str, Any]) -> None:
    """config.json, and what goes with every checkpoint of the model in ``source``."""
    atomic_write_text(folder / "config.json", json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n")
    copy_companions(source, folder)


def _write(path: Path, tensors: Mapping[str, Source]) -> None:
    beside = path.with_suffix(".part")
    try:
        write_tensors(beside, tensors)
        replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        reason = error.strerror or error
        raise MachineError(f"cannot write {path}: {reason}", hint="is the disk full?") from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
