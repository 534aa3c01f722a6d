"""Which files of a directory a model's weights are in: the rule of transformers, and no other (no torch).

``PreTrainedModel.from_pretrained`` on a directory takes, in this order (transformers 5, ``modeling_utils.py``,
``_get_resolved_checkpoint_files``): what ``transformers_weights`` in config.json names; ``model.safetensors``; the
shards of ``model.safetensors.index.json``. An ``adapter_config.json`` beside it puts the weights of
``adapter_model.safetensors`` on top (``integrations/peft.py``, ``maybe_load_adapters``). A directory that was saved in
shards and later as one file holds both: the single file counts, the older index says nothing.

A checkpoint in a format with files of its own (``Format.load`` of the registry) names them in its
``quantization_config``, under ``files``.

Not covered: pickled weights, which are refused, and ``variant`` files, which transformers reads only when asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.registry.formats import FORMATS, Format

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EXPLICIT = "transformers_weights"  # the key of config.json that names another file
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
NAMED = 4  # files of a note


@dataclass(frozen=True)
class WeightFiles:
    """``read``: the files that hold the model, an adapter's last. ``index``: the one that names the shards, None for a
    single file. ``ignored``: names of weight files that lie beside and are no part of the model."""

    read: tuple[Path, ...]
    index: Path | None
    ignored: tuple[str, ...]

    @property
    def note(self) -> str:
        """What to tell of the ignored files; empty where there are none."""
        if not self.ignored:
            return ""
        more = f" and {len(self.ignored) - NAMED} more" if len(self.ignored) > NAMED else ""
        taken = self.index.name if self.index else ", ".join(file.name for file in self.read)
        return f"weights are read from {taken}, as transformers does; not from {', '.join(self.ignored[:NAMED])}{more}"


def find_weight_files(name: str, path: Path, config: Mapping[str, Any]) -> WeightFiles:
    """The weight files of the model directory ``path``; ``name`` is what messages call it.

    Raises:
        DataError: no safetensors, pickles only, a shard that the index names is missing or lies outside, a pickled
            adapter.
    """
    index = None
    if exported := _exported(name, path, config):
        return WeightFiles(exported, None, ())
    if config.get(EXPLICIT) is not None:
        chosen = _explicit(name, path, config[EXPLICIT])
    elif (path / SINGLE).is_file():
        chosen = path / SINGLE
    elif (path / INDEX).is_file():
        chosen = path / INDEX
    else:
        raise _nothing(name, path)
    if chosen.name.endswith(".index.json"):
        index = chosen
        read = _shards(name, chosen)
    else:
        read = [chosen]
    read += _adapter(name, path)
    return WeightFiles(tuple(read), index, _beside(path, read, index))


def _explicit(name: str, path: Path, wish: object) -> Path:
    file = path / str(wish)
    if not isinstance(wish, str) or not wish.endswith((".safetensors", ".safetensors.index.json")):
        raise DataError(
            f"{name}: {EXPLICIT} in config.json is {wish!r}, expected a .safetensors file or an index of such"
        )
    if not stays_inside(wish):
        raise DataError(f"{name}: {EXPLICIT} in config.json points outside the model's directory: {wish}")
    if not file.is_file():
        raise DataError(f"{name}: {wish}, named by {EXPLICIT} in config.json, is missing")
    return file


def _shards(name: str, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index} has no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    files = [index.parent / shard for shard in names]
    for shard, file in zip(names, files, strict=True):
        if not stays_inside(shard):
            raise DataError(f"{index} points outside the model's directory: {shard}")
        if not file.is_file():
            raise DataError(f"{name}: shard {file.name}, named in {index.name}, is missing")
        if file.suffix in PICKLES:
            raise DataError(f"{index} names pickled weights: {file.name}")
    return files


def _adapter(name: str, path: Path) -> list[Path]:
    """Low-rank weights beside the model's own, which transformers adds to them."""
    if not (path / ADAPTER_CONFIG).is_file():
        return []
    if (path / ADAPTER).is_file():
        return [path / ADAPTER]
    raise DataError(
        f"{name}: {ADAPTER_CONFIG} without {ADAPTER}",
        hint="save the adapter with safetensors, or take its configuration out of the directory",
    )


def _nothing(name: str, path: Path) -> DataError:
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        return DataError(
            f"{name} holds only pickled weights ({pickles[0]}), which can run code when opened",
            hint="save the model with safetensors first",
        )
    others = sorted(p.name for p in path.glob("*.safetensors"))
    if others:
        return DataError(
            f"{name}: neither {SINGLE} nor {INDEX}, only {others[0]}",
            hint="fetch the index too, or save the model again",
        )
    return DataError(f"{name}: no {SINGLE} in {path}")


def _beside(path: Path, read: list[Path], index: Path | None) -> tuple[str, ...]:
    taken = {file.name for file in read} | ({index.name} if index else set())
    weights = (
        p.name
        for p in path.iterdir()
        if p.name.endswith((".safetensors", ".safetensors.index.json")) or p.suffix in PICKLES
    )
    return tuple(sorted(name for name in weights if name not in taken and name != "training_args.bin"))


def stays_inside(name: str) -> bool:
    """Whether a file name in a configuration stays in the model's directory. By the name alone: in the hub's cache
    every file is a link to a blob outside."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        DataError: unreadable, not JSON, no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object")
    return content


def own_format(config: Mapping[str, Any]) -> Format | None:
    """The format of a checkpoint that quantlab opens itself, its weights being no safetensors; None for any other."""
    described = config.get("quantization_config")
    kind = described.get("quant_method") if isinstance(described, dict) else None
    found = FORMATS.get(kind) if isinstance(kind, str) else None
    return found if found is not None and found.load else None


def _exported(name: str, path: Path, config: Mapping[str, Any]) -> tuple[Path, ...]:
    if own_format(config) is None:
        return ()
    files = config["quantization_config"].get("files")
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise DataError(f"{name}: config.json names no weight files (quantization_config.files)")
    for file in files:
        if Path(file).name != file or not (path / file).is_file():
            raise DataError(f"{name}: no weight file {file} in {path}")
    return tuple(path / file for file in files)
