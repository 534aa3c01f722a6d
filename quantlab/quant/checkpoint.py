"""Writing a checkpoint block by block, so that a killed run goes on where it was.

While work goes on the directory is called ``<out>.partial``. Every block is one safetensors file, written beside and
renamed; ``resume.json`` names the recipe, model and calibration it belongs to. At the end the blocks become the
checkpoint's shards, an index is written, and the directory is renamed to ``<out>``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from quantlab.errors import DataError, MachineError, RecipeError
from quantlab.models.files import read_header
from quantlab.paths import atomic_write_text

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


class CheckpointWriter:
    """One checkpoint in the making. ``prefix`` is the block list's name, ``blocks`` its length, ``dtype`` that of
    plain float tensors, ``key`` what an interrupted attempt must have had in common to be gone on with."""

    def __init__(
        self, out: Path, prefix: str, blocks: int, dtype: torch.dtype, key: Mapping[str, str], *, resume: bool
    ) -> None:
        self.out, self.prefix, self.blocks, self.dtype = out, prefix, blocks, dtype
        self.work = partial_path(out)
        self.losses: dict[str, float] = {}
        marker = self.work / "resume.json"
        if marker.is_file() and resume and json.loads(marker.read_text(encoding="utf-8")) == dict(key):
            for file in sorted(self.work.glob("loss-*.json")):
                self.losses.update(json.loads(file.read_text(encoding="utf-8")))
            return
        if self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True)
        atomic_write_text(marker, json.dumps(dict(key)))

    def _block_file(self, index: int) -> Path:
        return self.work / f"model-{index + 1:05d}-of-{self.blocks + 1:05d}.safetensors"

    def has_block(self, index: int) -> bool:
        """Whether the block is solved and safely written."""
        return self._block_file(index).is_file()

    def write_block(self, index: int, tensors: Mapping[str, torch.Tensor], loss: Mapping[str, float]) -> None:
        """Write one block's tensors (names relative to the block), then they count as done."""
        named = {f"{self.prefix}.{index}.{n}": t for n, t in tensors.items()}
        losses = {f"{self.prefix}.{index}.{n}": v for n, v in loss.items()}
        self.losses.update(losses)
        atomic_write_text(self.work / f"loss-{index:05d}.json", json.dumps(losses))
        self._save(named, self._block_file(index))

    def read_block(self, index: int) -> dict[str, torch.Tensor]:
        """A written block again, names relative to the block."""
        start = len(f"{self.prefix}.{index}.")
        return {name[start:]: t for name, t in load_file(self._block_file(index)).items()}

    def write_rest(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write what lies outside the blocks (embeddings, last norm, head), names as in the checkpoint."""
        self._save(tensors, self._block_file(self.blocks))

    def finish(self, source: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> Path:
        """Turn the parts into a checkpoint directory and move it into place."""
        weight_map, total = {}, 0
        for part in (self._block_file(i) for i in range(self.blocks + 1)):
            for tensor in read_header(part).values():
                weight_map[tensor.name] = part.name
                total += tensor.size_bytes
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        atomic_write_text(self.work / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
        atomic_write_text(
            self.work / "config.json", json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n"
        )
        atomic_write_text(
            self.work / "quantlab.json", json.dumps(dict(record), indent=1, ensure_ascii=False) + "\n"
        )
        copy_tokenizer(source, self.work)
        for leftover in [*self.work.glob("loss-*.json"), self.work / "resume.json"]:
            leftover.unlink()
        os.replace(self.work, self.out)
        return self.out

    def _save(self, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
        stored = {}
        for name, tensor in tensors.items():
            plain = tensor.is_floating_point() and not name.endswith(".scales")  # scales stay float16
            stored[name] = (tensor.to(self.dtype) if plain else tensor).detach().to("cpu").contiguous()
        beside = path.with_suffix(".part")
        try:
            save_file(stored, beside, metadata={"format": "pt"})
            os.replace(beside, path)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise MachineError(f"cannot write {path}: {error}", hint="is the disk full?") from error


def partial_path(out: Path) -> Path:
    """Where a checkpoint lives until it is complete."""
    return out.with_name(out.name + ".partial")


def copy_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's files, and what else an ordinary user of the checkpoint needs."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


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
