"""What a checkpoint should compute: a few token rows through the model with the weights that were meant, in float32.

Two ways to the same numbers. ``ReferencePass`` follows the walk that quantizes: it is handed each block's result
while that is in memory, so it knows nothing of packing and files. ``streamed_logits`` reads a finished checkpoint
back through the readers in ``quantlab.formats``, one matrix at a time. Neither ever holds more than one matrix of the
model.

Kernels compute products in 16 bits, so no checkpoint meets float32 logits exactly, and how far a model carries such
errors differs from model to model (0.3 to 3 % of the logits in those measured). Therefore the rows go through twice
at once, the second time with what enters each linear rounded to bfloat16: how far the two come apart is this model's
measure of what rounding does, by which a difference can be judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantlab.errors import DataError
from quantlab.formats import format_module
from quantlab.formats.gguf.pack import unpack
from quantlab.models.blockwise import BlockwiseModel, run_block
from quantlab.models.experts import Experts
from quantlab.models.layers import as_weight, is_layer
from quantlab.models.lazy_weights import borrowed
from quantlab.models.safetensors.files import ModelFiles, TensorInfo, open_files
from quantlab.models.safetensors.tensors import read_rows, read_tensor
from quantlab.quant.block import BlockResult
from quantlab.quant.grid import Quantized
from quantlab.registry.block_types import BLOCK_TYPES
from quantlab.registry.formats import FORMATS

# A module with a tensor of one of these names holds its weight packed.
PACKED = frozenset(mark for found in FORMATS.values() for mark in found.marks)


class FileWeights:
    """A model's plain tensors from its files, by their names in the skeleton, as float32.

    ``stored`` is the dtype that they pass through on the way: what a checkpoint in float16 will hold of them."""

    def __init__(self, opened: BlockwiseModel, stored: torch.dtype | None = None) -> None:
        self.opened, self.stored = opened, stored

    def whole(self, name: str) -> torch.Tensor | None:
        held = self.opened.read(name)
        return None if held is None else self._plain(held)

    def part(self, name: str, rows: slice) -> torch.Tensor | None:
        info = self._info(name)
        return None if info is None else self._plain(read_tensor(info, rows))

    def looked_up(self, name: str, ids: torch.Tensor) -> torch.Tensor | None:
        info = self._info(name)
        return None if info is None else self._plain(read_rows(info, ids.cpu()))

    def _info(self, name: str) -> TensorInfo | None:
        held = self.opened.names.stored.get(name)
        return None if held is None else self.opened.files.tensors[held]

    def _plain(self, tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor if self.stored is None else tensor.to(self.stored)
        return kept.to(self.opened.device, torch.float32)


class _OutsideWeights(FileWeights):
    """Those outside the blocks, some of them packed in block types: ``packed`` by their names in the model's files,
    each the bytes of one, called ``...type``."""

    def __init__(self, opened: BlockwiseModel, stored: torch.dtype, packed: Mapping[str, TensorInfo]) -> None:
        super().__init__(opened, stored)
        self.packed = packed

    def whole(self, name: str) -> torch.Tensor | None:
        held = self._held(name)
        return super().whole(name) if held is None else self._unpacked(held, read_tensor(held))

    def part(self, name: str, rows: slice) -> torch.Tensor | None:
        held = self._held(name)
        return super().part(name, rows) if held is None else self._unpacked(held, read_tensor(held, rows))

    def looked_up(self, name: str, ids: torch.Tensor) -> torch.Tensor | None:
        held = self._held(name)
        if held is None:
            return super().looked_up(name, ids)
        rows = read_rows(held, ids.cpu())
        return self._unpacked(held, rows.view(-1, rows.shape[-1])).view(*ids.shape, -1)

    def _held(self, name: str) -> TensorInfo | None:
        return self.packed.get(self.opened.names.stored.get(name, "").removesuffix(".weight"))

    def _unpacked(self, held: TensorInfo, packed: torch.Tensor) -> torch.Tensor:
        return unpack(packed, BLOCK_TYPES[held.name.rpartition(".")[2]]).dequantize().to(self.opened.device)


class _SolvedWeights(FileWeights):
    """Those of a block as it was solved; what the method left alone comes from the files."""

    def __init__(self, opened: BlockwiseModel, stored: torch.dtype, prefix: str, result: BlockResult) -> None:
        super().__init__(opened, stored)
        self.prefix, self.result = prefix, result

    def whole(self, name: str) -> torch.Tensor | None:
        inside = name.removeprefix(self.prefix)
        solved = self.result.quantized.get(inside.removesuffix(".weight"))
        if solved is not None and inside.endswith(".weight"):
            module = self.opened.model.get_submodule(name.removesuffix(".weight"))
            return as_weight(module, solved.dequantize().to(self.opened.device))
        if inside in self.result.replaced:
            return self._plain(self.result.replaced[inside])
        return super().whole(name)

    def part(self, name: str, rows: slice) -> torch.Tensor | None:
        return None


@dataclass(frozen=True)
class Expected:
    """Logits float32 [rows, tokens, vocabulary], on the CPU, and those [rows, tokens, vocabulary] that come of inputs
    of linears rounded to bfloat16."""

    logits: torch.Tensor
    rounded: torch.Tensor


class ReferencePass:
    """Token rows on their way through a model, as a plan's checkpoint will have it.

    Args:
        rows: token ids int64 [rows, tokens].
        stored: dtype of a checkpoint's plain tensors.
    """

    def __init__(
        self,
        files: ModelFiles,
        rows: torch.Tensor,
        device: str,
        stored: torch.dtype,
        trust_remote_code: bool = False,
    ) -> None:
        self.rows, self.stored = rows, stored
        self._opened = _Skeleton(files, device, torch.float32, trust_remote_code)
        self._around = FileWeights(self._opened, stored)
        self._opened.fill_buffers(self._opened.model, "")
        with torch.no_grad(), borrowed(self._opened.model, self._around):
            first, self._calls = self._opened.inputs(rows)
        self._first = torch.cat([first, first])

    def start(self, outside: Mapping[str, TensorInfo] | None = None) -> torch.Tensor:
        """Hidden states before the first block, float32 [2 rows, tokens, hidden]: every row twice. ``outside``: packed
        matrices in place of the model's own, as ``Plan.outside``."""
        if not outside:
            return self._first.clone()
        with (
            torch.no_grad(),
            borrowed(self._opened.model, _OutsideWeights(self._opened, self.stored, outside)),
        ):
            first, _ = self._opened.inputs(self.rows)
        return torch.cat([first, first])

    @torch.no_grad()
    def through(self, index: int, hidden: torch.Tensor, result: BlockResult) -> torch.Tensor:
        """Hidden states after block ``index`` as it was solved."""
        prefix = f"{self._opened.prefix}.{index}."
        block = self._opened.blocks[index]
        self._opened.fill_buffers(block, prefix.rstrip("."))
        weights = _SolvedWeights(self._opened, self.stored, prefix, result)
        with borrowed(block, weights, prefix.rstrip(".")):
            if not any(isinstance(module, Experts) for module in block.modules()):
                with second_half_rounded(block, hidden.shape[:2]):
                    return run_block(block, hidden, self._calls[index])
            # Experts get the rows that are routed to them, no longer in halves: the halves go one after the other.
            exact, rounded = hidden.chunk(2)
            first = run_block(block, exact, self._calls[index])
            with all_rounded(block):
                return torch.cat([first, run_block(block, rounded, self._calls[index])])

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor, outside: Mapping[str, TensorInfo] | None = None) -> Expected:
        """Last norm and head on the states after the last block. ``outside`` as for :meth:`start`."""
        around = _OutsideWeights(self._opened, self.stored, outside) if outside else self._around
        with borrowed(self._opened.model, around):
            found = _after_blocks(self._opened, torch.cat([self.rows, self.rows]), hidden)
        return Expected(*found.chunk(2))


@contextmanager
def second_half_rounded(module: nn.Module, shape: Sequence[int]) -> Iterator[None]:
    """Inside, what enters a linear is rounded to bfloat16 for the second half of a batch of ``shape`` (rows, tokens).
    Inputs that are not the whole batch in order are left as they are."""

    def half(x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[:-1]) not in (tuple(shape), (shape[0] * shape[1],)):
            return x
        exact, rounded = x.chunk(2)
        return torch.cat([exact, _rounded(rounded)])

    with _entering(module, half):
        yield


@contextmanager
def all_rounded(module: nn.Module) -> Iterator[None]:
    """Inside, what enters a linear is rounded to bfloat16."""
    with _entering(module, _rounded):
        yield


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


@contextmanager
def _entering(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, what enters a linear of ``module`` is changed."""

    def before(linear: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (change(args[0]), *args[1:])

    linears = [m for m in module.modules() if is_layer(m)]
    handles = [linear.register_forward_pre_hook(before) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def expected_of(
    checkpoint: Path | ModelFiles, rows: torch.Tensor, trust_remote_code: bool = False
) -> Expected:
    """What a finished checkpoint should compute, from its own files: where no walk was followed."""
    files = checkpoint if isinstance(checkpoint, ModelFiles) else open_files(checkpoint)
    return Expected(*_streamed(files, rows, trust_remote_code, twice=True).chunk(2))


def streamed_logits(checkpoint: Path, rows: torch.Tensor, trust_remote_code: bool = False) -> torch.Tensor:
    """Logits float32 [rows, tokens, vocabulary] of a checkpoint as it is stored, one matrix in memory at a time, on
    the CPU.

    Raises:
        DataError: the checkpoint's files are bad, or packed in a way that quantlab does not write.
    """
    return _streamed(open_files(checkpoint), rows, trust_remote_code, twice=False)


def _streamed(files: ModelFiles, rows: torch.Tensor, trust_remote_code: bool, *, twice: bool) -> torch.Tensor:
    packed = packed_linears(files)
    plain = {
        n: t for n, t in files.tensors.items() if n.rpartition(".")[0] not in packed or n.endswith(".bias")
    }
    for name, parts in packed.items():  # a skeleton's matrix has a name of its own again
        plain[f"{name}.weight"] = next(iter(parts.values()))
    opened = _Skeleton(replace(files, tensors=plain), "cpu", torch.float32, trust_remote_code)
    opened.fill_buffers(opened.model, "")
    ids = torch.cat([rows, rows]) if twice else rows
    rounding = second_half_rounded(opened.blocks, ids.shape) if twice else nullcontext()
    weights = _PackedWeights(opened, files.quantized or {}, packed)
    with torch.no_grad(), borrowed(opened.model, weights), rounding:
        logits: torch.Tensor = opened.model(input_ids=ids, use_cache=False).logits.float()
    return logits


def packed_linears(files: ModelFiles) -> dict[str, dict[str, TensorInfo]]:
    """The packed tensors of every quantized linear, by the linear's name in the files."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name in files.tensors:
        owner, _, leaf = name.rpartition(".")
        if leaf in PACKED:
            found.setdefault(owner, {})
    for name, info in files.tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner in found and leaf != "bias":
            found[owner][leaf] = info
    return found


class _PackedWeights(FileWeights):
    """A checkpoint's weights, packed ones unpacked by the reader of its layout."""

    def __init__(
        self,
        opened: BlockwiseModel,
        config: Mapping[str, Any],
        packed: Mapping[str, Mapping[str, TensorInfo]],
    ) -> None:
        super().__init__(opened)
        self.config, self.packed = config, packed
        self.reader = format_module(str(config["quant_method"])) if packed else None

    def whole(self, name: str) -> torch.Tensor | None:
        owner, _, leaf = name.rpartition(".")
        held = self.opened.names.stored.get(name, "").removesuffix(".weight")
        if leaf != "weight" or held not in self.packed or self.reader is None:
            return super().whole(name)
        parts = {key: read_tensor(info) for key, info in self.packed[held].items()}
        module = self.opened.model.get_submodule(owner)
        if parts.get("weight") is not None:  # FP8, which is no integer code
            codes, scales, zeros, group_of = self.reader.unpack(parts, bits=8, group_size=-1)
            return as_weight(module, Quantized(codes, scales, zeros, group_of, 8).dequantize())
        try:
            return as_weight(module, self.reader.read(parts, self.config, owner, held).dequantize())
        except (ValueError, KeyError) as error:
            raise DataError(f"{self.opened.files.name}: {held}: {error}") from error

    def part(self, name: str, rows: slice) -> torch.Tensor | None:
        held = self.opened.names.stored.get(name, "").removesuffix(".weight")
        return None if held in self.packed else super().part(name, rows)


class _Skeleton(BlockwiseModel):
    """An opened model that holds no weights: all of them are borrowed while they are needed."""

    def fill(self, module: nn.Module, prefix: str, *, recurse: bool = True) -> None:
        for child in module.modules() if recurse else [module]:
            for name, parameter in child._parameters.items():
                if parameter is not None:  # nothing of no size, which can be moved to a device
                    child._parameters[name] = nn.Parameter(torch.empty(0), requires_grad=False)
        self.fill_buffers(module, prefix, recurse=recurse)

    def fill_buffers(self, module: nn.Module, prefix: str, *, recurse: bool = True) -> None:
        """Load the buffers that the files hold (a router's corrections, a block's scale), and move all to the
        device."""
        for name, buffer in module.named_buffers(recurse=recurse):
            held = self.read(f"{prefix}.{name}" if prefix else name)
            owner, _, leaf = name.rpartition(".")
            value = buffer if held is None else held.to(buffer.dtype)
            module.get_submodule(owner)._buffers[leaf] = value.to(self.device)

    def empty(self, module: nn.Module) -> None:
        pass


def _after_blocks(opened: BlockwiseModel, rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The model's forward pass with ``hidden`` for what its blocks return."""
    for block in opened.blocks:
        block.forward = _Stand(opened.as_returned(hidden))  # type: ignore[assignment]
    try:
        found = opened.model(input_ids=rows.to(opened.device), use_cache=False).logits
    finally:
        for block in opened.blocks:
            block.__dict__.pop("forward", None)
    logits: torch.Tensor = found.to("cpu", torch.float32)
    return logits


class _Stand:
    """What a block is replaced by: it returns what it is told, whatever it gets."""

    def __init__(self, returned: Any) -> None:
        self.returned = returned

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.returned


def probe_rows(rows: torch.Tensor | None, vocabulary: int, count: int = 2, tokens: int = 64) -> torch.Tensor:
    """Short rows to verify a checkpoint on: the beginnings of the first calibration rows, or, where there are none,
    tokens drawn with a fixed seed. int64 [count, tokens]."""
    if rows is not None and len(rows) >= count:
        return rows[:count, :tokens].clone()
    return torch.randint(0, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))
