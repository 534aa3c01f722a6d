"""A checkpoint whose weights are one GGUF file: made of the packed parts of a finished run, and opened again.

While a run goes on, a packed linear ``name`` is one tensor ``name.Q4_K`` of bytes, uint8 [rows, row_bytes], called by
its block type; everything else is as in the original. At the end the parts are streamed into the file. Beside it stay
config.json and the tokenizer, so that the checkpoint is opened by its directory as any other; ``gguf-tensors.json``
says which tensor of the file is which of the model's, and ``Modelfile`` is for Ollama, which finds the chat template
in the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from quantlab.errors import DataError
from quantlab.formats.gguf.architectures import Place, Places
from quantlab.formats.gguf.file import Bytes, Entry, extras, write
from quantlab.formats.gguf.metadata import read_settings
from quantlab.formats.gguf.pack import Blocks, unpack
from quantlab.formats.gguf.pack import pack as pack_blocks
from quantlab.paths import atomic_write_text
from quantlab.registry.block_types import BLOCK_TYPES, PLAIN_TYPES
from quantlab.registry.formats import Contents

NAMES = "gguf-tensors.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Held(NamedTuple):
    """A tensor of the parts. ``kind``: a block type or a plain one. ``shape``: of its numbers."""

    kind: str
    shape: tuple[int, ...]


def pack(blocks: Blocks) -> dict[str, torch.Tensor]:
    """The one tensor of a linear."""
    return {blocks.kind.name: pack_blocks(blocks)}


def packed(tensors: Mapping[str, torch.Tensor], prefix: str) -> Blocks | None:
    """The inverse of :func:`pack`, of a linear among the ``tensors`` by its name; None where it is not packed."""
    for name, kind in BLOCK_TYPES.items():
        if (found := tensors.get(f"{prefix}.{name}")) is not None:
            return unpack(found, kind)
    return None


def file_name(wanted: str) -> str:
    """What the file of a type or mixture is called."""
    return f"model-{wanted}.gguf"


def config(contents: Contents) -> dict[str, Any]:
    """The ``quantization_config``; ``files`` is what makes it a checkpoint with files of its own."""
    return {
        "quant_method": "gguf",
        "name": contents.name,
        "type": contents.type,
        "bits": contents.bits,
        "files": [file_name(contents.type)],
        "quantizer": contents.quantizer,
    }


def lay_out(tensors: Mapping[str, Held], places: Places, read: Callable[[str], torch.Tensor]) -> list[Entry]:
    """What the file holds, in its order: what is outside the blocks, then block by block.

    Args:
        tensors: of the parts, by their names in the original (``model.norm.weight``).
        read: gives a tensor of the parts; it is asked when the entry's bytes are.

    Raises:
        DataError: as ``Places.of``; experts of one layer in different types, or not all there.
    """
    found: dict[str, dict[int, tuple[str, Place, Held]]] = {}
    for name, held in tensors.items():
        place = places.of(name)
        if place is not None:
            found.setdefault(place.name, {})[place.expert or 0] = (name, place, held)
    entries = []
    for target, parts in found.items():
        _, place, held = parts[0] if 0 in parts else next(iter(parts.values()))
        kind, shape = _as_written(target, held)
        if place.expert is not None:
            if len({of for *_, of in parts.values()}) > 1 or sorted(parts) != list(range(len(parts))):
                raise DataError(
                    f"{places.called}: the experts of {target} are one tensor of a GGUF file, but are not all there "
                    "in one type"
                )
            shape = (len(parts), *shape)
        sources = [_source(name, at, kind, places, read) for _, (name, at, _) in sorted(parts.items())]
        entries.append((place.layer, target, Entry(target, kind, shape, sources)))
    ordered = [entry for *_, entry in sorted(entries, key=lambda one: one[:2])]
    return [*extras(places.settings, places), *ordered]


def _as_written(target: str, held: Held) -> Held:
    """Vectors and routers are float32, as llama.cpp has them."""
    if "ffn_gate_inp_shexp" in target:
        return Held("F32", held.shape[-1:])
    if len(held.shape) < 2 or "ffn_gate_inp." in target:
        return Held("F32", held.shape)
    return held


def _source(
    name: str, place: Place, kind: str, places: Places, read: Callable[[str], torch.Tensor]
) -> Callable[[], Bytes]:
    def given() -> Bytes:
        tensor = read(name)
        if kind in PLAIN_TYPES:
            tensor = (tensor.to(torch.float32) + place.offset) if place.offset else tensor
            tensor = tensor.to(DTYPES[kind])
        order = places.rows(place.order, len(tensor))
        if order is not None:
            tensor = tensor[torch.from_numpy(order)]
        return np.asarray(tensor.contiguous().view(-1).view(torch.uint8).numpy())

    return given


@dataclass
class Parts:
    """The tensors in the safetensors files of a folder, packed ones under the names of what they stand for."""

    tensors: dict[str, Held]
    _read: dict[str, Callable[[], torch.Tensor]]

    @classmethod
    def open(cls, folder: Path, stack: ExitStack) -> Parts:
        """Those of ``folder``, readable until the ``stack`` is left."""
        from safetensors import safe_open

        parts = cls({}, {})
        for file in sorted(folder.glob("*.safetensors")):
            stream = stack.enter_context(safe_open(file, framework="pt"))
            for name in stream.keys():  # noqa: SIM118
                view = stream.get_slice(name)
                kind, shape = str(view.get_dtype()), tuple(view.get_shape())
                owner, _, leaf = name.rpartition(".")
                if leaf in BLOCK_TYPES:
                    of = BLOCK_TYPES[leaf]
                    name_, held = f"{owner}.weight", Held(leaf, (shape[0], shape[1] // of.bytes * of.block))
                else:
                    name_, held = name, Held(kind, shape)
                parts.tensors[name_] = held
                parts._read[name_] = partial(stream.get_tensor, name)
        return parts

    def read(self, name: str) -> torch.Tensor:
        return self._read[name]()


def export(assembled: Path, target: Path) -> None:
    """Write the file from the parts in ``assembled``, and the names of its tensors."""
    described = json.loads((assembled / "config.json").read_text(encoding="utf-8"))
    wanted, called = (described["quantization_config"][key] for key in ("type", "name"))
    settings = read_settings(assembled)
    places = Places(settings, called)
    with ExitStack() as stack:
        parts = Parts.open(assembled, stack)
        entries = lay_out(parts.tensors, places, parts.read)
        write(target / file_name(wanted), entries, assembled, settings, wanted, called)
    names = {name: place.name for name in parts.tensors if (place := places.of(name)) is not None}
    atomic_write_text(target / "Modelfile", f"FROM ./{file_name(wanted)}\n")
    atomic_write_text(target / NAMES, json.dumps(dict(sorted(names.items())), indent=1) + "\n")


def load(path: Path, dtype: torch.dtype | str) -> Any:
    """The model with its weights decoded, through transformers.

    Raises:
        DataError: the file does not hold what the names say.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(path)
    del settings.quantization_config
    wanted = dtype if isinstance(dtype, torch.dtype) else torch.float32
    state = {name: tensor.to(wanted) for name, tensor in decoded(path)}
    kind = AutoModelForCausalLM._model_mapping[type(settings)]
    return kind.from_pretrained(None, config=settings, state_dict=state, dtype=wanted)


def decoded(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint under their names in the original model, float32 (plain ones as they are stored).

    Raises:
        DataError: a tensor is not there.
    """
    from gguf import GGUFReader

    described = json.loads((path / "config.json").read_text(encoding="utf-8"))
    names = json.loads((path / NAMES).read_text(encoding="utf-8"))
    places = Places(read_settings(path), path.name)
    file = path / described["quantization_config"]["files"][0]
    held = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for name, target in names.items():
        tensor, place = held.get(target), places.of(name)
        if tensor is None or place is None:
            raise DataError(f"{file} holds no tensor {target}")
        kind, data = tensor.tensor_type.name, tensor.data
        if place.expert is not None:
            data = data[place.expert]
        yield name, _original(np.array(data), kind, place, places)


def _original(data: np.ndarray[Any, Any], kind: str, place: Place, places: Places) -> torch.Tensor:
    """A tensor as the original has it, of that in the file."""
    if kind in BLOCK_TYPES:
        values = unpack(torch.from_numpy(data), BLOCK_TYPES[kind]).dequantize()
    else:
        raw = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8))
        values = raw.view(DTYPES[kind])
    if place.leaf.endswith("ffn_gate_inp_shexp"):
        values = values[None]
    order = places.rows(place.order, len(values))
    if order is not None:
        back = torch.empty(len(order), dtype=torch.int64)
        back[torch.from_numpy(order)] = torch.arange(len(order))
        values = values[back]
    return values - place.offset if place.offset else values
