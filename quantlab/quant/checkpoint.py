"""Writing a checkpoint block by block, so that a run killed at any moment goes on where it was.

While work goes on there are two directories beside the one to come::

    <out>.partial   the checkpoint: one file a finished block, later the rest of it
    <out>.state     what is needed to go on: whose work this is, losses, and whatever the walk keeps under ``scratch``

A file gets its name only when its content is on the disk, and a block's losses are written before the block, so what
has its name is whole. At the end the blocks become the checkpoint's shards, an index is written, ``<out>.partial`` is
renamed to ``<out>``, and only then is the state removed: there is no moment at which a kill loses finished work or
leaves something half done under the final name. A checkpoint that fails its proof is renamed to ``<out>.failed``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from quantlab import __version__
from quantlab.errors import DataError, MachineError, RecipeError
from quantlab.models.companions import copy_companions
from quantlab.models.safetensors.durable import replace, sync_folder
from quantlab.models.safetensors.files import TensorInfo, read_header
from quantlab.models.safetensors.tensors import DTYPES, Source, in_file, in_memory, read_tensor, write_tensors
from quantlab.paths import atomic_write_text


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
        self.losses: dict[str, float] = {}
        whole = {**key, "version": __version__, "dtype": str(dtype), "blocks": f"{prefix} x {blocks}"}
        _refuse_second_writer(self.state)
        if resume and self.work.is_dir() and _read_json(self.state / "resume.json") == whole:
            for leftover in [*self.work.glob("*.part"), *self.work.glob(".*.part")]:
                leftover.unlink()
            for index in range(blocks):
                if self.has_block(index):
                    self.losses.update(_read_json(self._loss_file(index)) or {})
        else:
            for folder in (self.work, self.state):
                if folder.exists():
                    shutil.rmtree(folder)
            self.work.mkdir(parents=True)
            self.state.mkdir(parents=True)
            atomic_write_text(self.state / "resume.json", json.dumps(whole))
            sync_folder(self.state)
            sync_folder(out.absolute().parent)
        atomic_write_text(self.state / "owner.json", json.dumps(_this_process()))

    @property
    def scratch(self) -> Path:
        """A directory for what the walk itself needs to go on (activations, probes). Removed at the end."""
        return self.state / "scratch"

    def _block_file(self, index: int) -> Path:
        return self.work / f"model-{index + 1:05d}-of-{self.blocks + 1:05d}.safetensors"

    def _loss_file(self, index: int) -> Path:
        return self.state / f"loss-{index:05d}.json"

    def has_block(self, index: int) -> bool:
        """Whether the block is solved and safely written."""
        return self._block_file(index).is_file()

    def first_missing(self) -> int:
        """The first block that is not written yet; ``blocks`` when all are."""
        return next((i for i in range(self.blocks) if not self.has_block(i)), self.blocks)

    def write_block(
        self,
        index: int,
        tensors: Mapping[str, torch.Tensor],
        loss: Mapping[str, float],
        keep: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write one block's tensors (names relative to the block), then they count as done. ``keep`` are tensors to be
        had again by :meth:`kept` after a kill, written before the block counts."""
        named = {f"{self.prefix}.{index}.{n}": self._stored(n, t) for n, t in tensors.items()}
        losses = {f"{self.prefix}.{index}.{n}": v for n, v in loss.items()}
        self.losses.update(losses)
        atomic_write_text(self._loss_file(index), json.dumps(losses))
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

    def write_rest(self, tensors: Mapping[str, torch.Tensor | TensorInfo]) -> None:
        """Write what lies outside the blocks (embeddings, last norm, head), names as in the checkpoint. What is given
        as a tensor in a file is copied piece by piece and never held whole."""
        _write(self._block_file(self.blocks), {name: self._stored(name, t) for name, t in tensors.items()})

    def assemble(self, source: Path, config: Mapping[str, Any]) -> Path:
        """Turn the parts into a directory that any reader can load, still under its temporary name; returns it."""
        weight_map, total = {}, 0
        for part in (self._block_file(i) for i in range(self.blocks + 1)):
            for tensor in read_header(part).values():
                weight_map[tensor.name] = part.name
                total += tensor.count * DTYPES[tensor.dtype].itemsize
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        atomic_write_text(self.work / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
        atomic_write_text(
            self.work / "config.json", json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n"
        )
        copy_companions(source, self.work)
        return self.work

    def publish(self, record: Mapping[str, Any]) -> Path:
        """Add the provenance and give the checkpoint its name."""
        atomic_write_text(
            self.work / "quantlab.json", json.dumps(dict(record), indent=1, ensure_ascii=False) + "\n"
        )
        replace(self.work, self.out)
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
        os.replace(self.work, failed)
        shutil.rmtree(self.state, ignore_errors=True)
        return failed

    def _kept_file(self, index: int) -> Path:
        return self.state / f"kept-{index:05d}.safetensors"

    def _stored(self, name: str, tensor: torch.Tensor | TensorInfo) -> Source:
        """A tensor as the checkpoint holds it: plain floats in its dtype, scales and codes in their own."""
        dtype = DTYPES[tensor.dtype] if isinstance(tensor, TensorInfo) else tensor.dtype
        plain = (
            dtype in PLAIN and not name.endswith(OWN_DTYPE) and not any(part in name for part in self.exact)
        )
        wanted = self.dtype if plain else dtype
        return in_file(tensor, wanted) if isinstance(tensor, TensorInfo) else in_memory(tensor, wanted)


PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OWN_DTYPE = ".scales"  # the gptq and awq layouts fix the type of their scales


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


def partial_path(out: Path) -> Path:
    """Where a checkpoint lives until it is complete."""
    return out.with_name(out.name + ".partial")


def state_path(out: Path) -> Path:
    """Where what is needed to go on lives until then."""
    return out.with_name(out.name + ".state")


def tidy(out: Path) -> None:
    """Remove the state that a run left which was killed between naming its checkpoint and removing it."""
    if out.is_dir() and not partial_path(out).exists() and state_path(out).is_dir():
        _refuse_second_writer(state_path(out))
        shutil.rmtree(state_path(out), ignore_errors=True)


def claim(out: Path) -> None:
    """Refuse an output directory that holds something this run did not make.

    Raises:
        RecipeError: ``out`` exists and is not empty. DataError: it is a file.
    """
    if out.is_file():
        raise DataError(f"{out} is a file", hint="name a directory for the checkpoint")
    if out.is_dir() and any(out.iterdir()):
        raise RecipeError(f"{out} already holds something", hint="name another --out, or remove it first")
    if out.is_dir():
        out.rmdir()


def _this_process() -> dict[str, float]:
    return {"pid": os.getpid(), "started": psutil.Process().create_time()}


def _refuse_second_writer(state: Path) -> None:
    """Two runs on one checkpoint would take each other's files for their own."""
    owner = _read_json(state / "owner.json")
    if owner is None or owner.get("pid") == os.getpid():
        return
    try:
        alive = psutil.Process(int(owner["pid"]))
        if alive.create_time() == owner["started"] and alive.status() != psutil.STATUS_ZOMBIE:
            raise MachineError(
                f"{state} is in use by process {owner['pid']}", hint="wait for it, or name another --out"
            )
    except (psutil.Error, KeyError, TypeError, ValueError):
        return


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none, or not a whole one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
