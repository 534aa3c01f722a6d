"""Statistics on disk: gathered once, solved from later without a forward pass.

A directory with one safetensors file a block and ``statistics.json``, which says what they were gathered from. Of each
second-moment matrix only the strips on and below the diagonal are kept (56 % of it). Files are written beside and
renamed, so that an interrupted run leaves whole blocks only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quantlab.errors import DataError, MachineError
from quantlab.models.safetensors.durable import replace
from quantlab.paths import atomic_write_text
from quantlab.quant.hessian import InputHessian, mirror, strips

MANIFEST = "statistics.json"


class StatisticsStore:
    """Statistics of ``blocks`` blocks in ``folder``; ``key`` says of what (digests of model and calibration rows)."""

    def __init__(self, folder: Path, blocks: int, key: Mapping[str, str]) -> None:
        self.folder, self.blocks, self.key = folder, blocks, dict(key)

    @classmethod
    def make(cls, folder: Path, blocks: int, key: Mapping[str, str]) -> StatisticsStore:
        """A store to fill; blocks that an interrupted run with the same key left are kept.

        Raises:
            DataError: the folder holds something else.
        """
        store = cls(folder, blocks, key)
        if folder.exists() and any(folder.iterdir()) and store._manifest().get("key") != store.key:
            raise DataError(
                f"{folder} holds statistics of another model or calibration",
                hint="name another folder, or remove it",
            )
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(
            folder / MANIFEST, json.dumps({"key": store.key, "blocks": blocks}, indent=1) + "\n"
        )
        return store

    @classmethod
    def open(cls, folder: Path, blocks: int, key: Mapping[str, str]) -> StatisticsStore:
        """A filled store.

        Raises:
            DataError: it is not one, is not complete, or was gathered from something else; says which.
        """
        store = cls(folder, blocks, key)
        found = store._manifest()
        for name, value in store.key.items():
            held = found.get("key", {}).get(name)
            if held != value:
                raise DataError(
                    f"{folder}: these statistics were gathered with another {name} ({held}, wanted {value})",
                    hint="gather them anew with --save-statistics",
                )
        missing = [i for i in range(blocks) if not store._file(i).is_file()]
        if missing:
            raise DataError(
                f"{folder}: statistics of block {missing[0]} are missing ({len(missing)} of {blocks})",
                hint="the run that gathered them was interrupted: start it anew, without --resume",
            )
        return store

    def save(self, index: int, moments: Sequence[InputHessian]) -> None:
        """Keep the finished statistics of a block."""
        tensors, described = {}, []
        for number, m in enumerate(moments):
            described.append({"layers": m.layers, "tokens": m.tokens})
            tensors[f"{number}.magnitude"] = m.magnitude.cpu()
            for k, strip in enumerate(strips(len(m.hessian))):
                tensors[f"{number}.hessian.{k}"] = m.hessian[strip, : strip.stop].cpu().contiguous()
        beside = self._file(index).with_suffix(".part")
        try:
            save_file(tensors, beside, metadata={"moments": json.dumps(described)})
            replace(beside, self._file(index))
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise MachineError(
                f"cannot write {self._file(index)}: {error}", hint="is the disk full?"
            ) from error

    def load(self, index: int, device: torch.device | str = "cpu") -> list[InputHessian]:
        """The statistics of a block.

        Raises:
            DataError: the file is damaged.
        """
        found = []
        try:
            with safe_open(self._file(index), framework="pt", device=str(device)) as stream:
                for number, entry in enumerate(json.loads(stream.metadata()["moments"])):
                    magnitude = stream.get_tensor(f"{number}.magnitude")
                    m = InputHessian.empty(entry["layers"][0], len(magnitude), magnitude.device)
                    for k, strip in enumerate(strips(len(magnitude))):
                        m.hessian[strip, : strip.stop] = stream.get_tensor(f"{number}.hessian.{k}")
                    mirror(m.hessian)
                    m.magnitude.copy_(magnitude)
                    m.layers, m.tokens = list(entry["layers"]), int(entry["tokens"])
                    found.append(m)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{self._file(index)} does not hold a block's statistics: {error}",
                hint="gather them anew with --save-statistics",
            ) from error
        return found

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _manifest(self) -> dict[str, dict[str, str]]:
        try:
            found = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.folder} holds no statistics: {MANIFEST} cannot be read",
                hint="make them with --save-statistics, or name an empty folder for that",
            ) from error
        return found if isinstance(found, dict) else {}
