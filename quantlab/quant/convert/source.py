"""The checkpoint that is converted: which linears it holds packed, what else it holds, and the codes of one linear at a
time, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantlab.errors import DataError
from quantlab.formats import format_module
from quantlab.formats.codes import Codes
from quantlab.formats.gguf.groups import codes_of
from quantlab.formats.gguf.pack import unpack
from quantlab.models.gguf.files import with_tensors
from quantlab.models.gguf.weights import GgufTensor
from quantlab.models.refusals import refuse_unusable
from quantlab.models.safetensors.files import ModelFiles, TensorInfo, open_files
from quantlab.models.safetensors.tensors import read_tensor
from quantlab.models.safetensors.weight_files import own_format
from quantlab.quant.verify.reference_logits import packed_linears
from quantlab.registry.block_types import BLOCK_TYPES, PLAIN_TYPES
from quantlab.registry.formats import PACKING

GGUF = "gguf"
CONVERTED = (*PACKING, GGUF)
KINDS = {kind.number: kind for kind in BLOCK_TYPES.values()}
PLAIN_NUMBERS = {number for number, _ in PLAIN_TYPES.values()}
# Keys of a quantization_config under which a checkpoint says more than weights, which would be lost.
MORE = {"kv_cache_scheme": "scales of a key-value cache", "sparsity_config": "sparse weights",
        "transform_config": "rotations of its activations"}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """``format``: one of ``CONVERTED``. ``path``: what opens it again, a directory or a GGUF file. ``digest``: of the
    checkpoint as it was given. ``packed``: the tensors of each packed linear, by its name in the files. ``plain``: all
    other tensors. ``skeleton``: the files with one tensor for each linear, as a plain model has them."""

    files: ModelFiles
    format: str
    path: Path
    digest: str
    packed: Mapping[str, Mapping[str, TensorInfo]]
    plain: Mapping[str, TensorInfo]
    skeleton: ModelFiles

    @property
    def described(self) -> Mapping[str, Any]:
        """The ``quantization_config``; empty for a GGUF file."""
        return self.files.quantized or {}

    def codes(self, name: str, *aliases: str) -> Codes:
        """The codes of a linear. ``aliases``: its other names, by which a configuration may mean it.

        Raises:
            DataError: it is no integer codes, or damaged.
        """
        parts = self.packed[name]
        try:
            if self.format == GGUF:
                found = self._blocks(parts["weight"])
            else:
                tensors = {leaf: read_tensor(info) for leaf, info in parts.items()}
                found = format_module(self.format).read(tensors, self.described, name, *aliases)
            if not bool(found.scales.isfinite().all()):
                raise ValueError("it holds a scale that is no number: the file is damaged")
        except KeyError as error:
            raise DataError(f"{self.files.name}: {name} has no tensor {error}") from error
        except ValueError as error:
            raise DataError(f"{self.files.name}: {name}: {error}", hint=self._hint) from error
        return found

    def bits(self, name: str, codes: Codes) -> int:
        """The width of a linear's codes as it is stored: less than that of ``codes`` where levels are from a table."""
        if self.format == GGUF:
            return KINDS[_tensor(self.packed[name]["weight"]).kind].bits
        return codes.bits

    def group_size(self, codes: Codes, *names: str) -> int:
        """Columns of a group, -1 for one group a row where the configuration says it so."""
        if codes.scales.shape[1] > 1 or self.format == GGUF:
            return codes.width
        told = self.described
        if "config_groups" in told:
            told = format_module(self.format).scheme(told, *names)["weights"]
        return -1 if told.get("group_size") in (None, -1) else codes.width

    def _blocks(self, info: TensorInfo) -> Codes:
        tensor = _tensor(info)
        if tensor.kind not in KINDS:
            raise ValueError("it is of a block type whose values are no integer codes times a scale")
        return codes_of(unpack(torch.from_numpy(tensor.packed().copy()), KINDS[tensor.kind]))

    @property
    def _hint(self) -> str:
        return "quantize the original model into the format that is wanted" if self.format == GGUF else ""


def open_source(ref: str | Path) -> Source:
    """A quantized checkpoint: a directory, a Hugging Face id, or a GGUF file.

    Raises:
        DataError: it is none, is damaged, or says more than a conversion can carry over.
    """
    files = open_files(ref)
    refuse_unusable(files)
    if own_format(files.config) is not None or files.encoding is not None:
        return _of_gguf(files)
    kind = str((files.quantized or {}).get("quant_method", ""))
    if kind not in PACKING:
        said = f"is quantized by {kind}" if kind else "is not quantized"
        raise DataError(
            f"{files.name} {said}; converted are {', '.join(CONVERTED)}",
            hint="quantize the original model: `quantlab quantize`",
        )
    for key, what in MORE.items():
        if files.config["quantization_config"].get(key):
            raise DataError(f"{files.name} holds {what} ({key}), for which no other layout has a place")
    packed = packed_linears(files)
    if not packed:
        raise DataError(f"{files.name} says {kind}, but none of its tensors is packed")
    plain = {
        n: t for n, t in files.tensors.items() if n.rpartition(".")[0] not in packed or n.endswith(".bias")
    }
    whole = {f"{name}.weight": next(iter(parts.values())) for name, parts in packed.items()}
    return Source(
        files, kind, files.path, files.digest, packed, plain, replace(files, tensors={**plain, **whole})
    )


def _of_gguf(given: ModelFiles) -> Source:
    """The model in a GGUF file. Of a checkpoint by quantlab, configuration and tokenizer are those beside it."""
    files, path = given, given.weight_files[0]
    if given.encoding is None:
        files, path = with_tensors(given), given.path
    inside = {f"{name}.weight" for name in files.block_linears()}
    packed = {
        name.removesuffix(".weight"): {"weight": info}
        for name, info in files.tensors.items()
        if name in inside and _tensor(info).kind not in PLAIN_NUMBERS
    }
    if not packed:
        raise DataError(f"{files.name}: none of its linears is quantized")
    plain = {n: t for n, t in files.tensors.items() if n.removesuffix(".weight") not in packed}
    return Source(files, GGUF, path, given.digest, packed, plain, files)


def _tensor(info: TensorInfo) -> GgufTensor:
    assert isinstance(info.reader, GgufTensor)
    return info.reader
