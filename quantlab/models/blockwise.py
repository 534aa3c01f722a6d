"""A model opened block by block: the skeleton on the meta device, one decoder block in memory at a time.

Nothing here knows an architecture. The decoder blocks are the list of modules that holds the most parameters. What a
block is called with (rotary tables, masks, positions, per layer where they differ) is recorded from one forward pass
of the model with every block replaced by a stub that hands its input on; from then on the blocks run alone. Merged
experts are taken apart (``experts``), names are those of the skeleton inside and translated at the files (``names``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from quantlab.errors import DataError, first_line
from quantlab.models.experts import separate
from quantlab.models.refusals import refuse_unfit
from quantlab.models.safetensors.files import ModelFiles, has_experts, quantizable
from quantlab.models.safetensors.tensors import read_tensor
from quantlab.models.weight_names import Names, conversions


@dataclass
class BlockInputs:
    """What a block gets besides its hidden states, recorded from one row: tensors have a first dimension of 1 (or none
    that counts rows) and are broadcast over the rows of a batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockwiseModel:
    """The skeleton of a causal language model and the means to fill it piece by piece.

    ``prefix`` is the dotted name of the block list in the skeleton, ``stored_prefix`` the same in the files,
    ``blocks`` the list itself, ``dtype`` what it computes in, ``stored`` what its weights are kept in (the same unless
    told), ``names`` the translation between the skeleton and the files.

    Raises:
        DataError: no causal language model, or one whose weights are not linears with files of their own.
    """

    def __init__(
        self,
        files: ModelFiles,
        device: str,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
        stored: torch.dtype | None = None,
    ) -> None:
        refuse_unfit(files)
        self.files, self.device, self.dtype, self.stored = files, torch.device(device), dtype, stored or dtype
        self.model = skeleton(files, dtype, trust_remote_code)
        self.config: Any = self.model.config
        separate(self.model, conversions(self.model)[1])
        self.prefix, self.blocks = find_blocks(self.model)
        refuse_blocks(self.model, self.blocks, files.name)
        self.names = Names(self.model, files.tensors, files.name)
        self.stored_prefix = self.names.on_disk(f"{self.prefix}.0").rpartition(".")[0]
        strict = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        half = getattr(self.model, "_keep_in_fp32_modules", None) or () if dtype == torch.float16 else ()
        # Parts of the names of what is computed in float32 whatever the dtype.
        self.exact: tuple[str, ...] = tuple({*strict, *half})

    def fill(self, module: nn.Module, prefix: str, *, recurse: bool = True) -> None:
        """Load the parameters and stored buffers of ``module``, ``prefix`` in the skeleton, onto the device."""
        named = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
        for name, _ in named:
            full = f"{prefix}.{name}" if prefix else name
            if full not in self.names.stored:  # a buffer that the model computes itself
                continue
            info = self.files.tensors[self.names.stored[full]]
            tensor = read_tensor(info)
            if tensor.is_floating_point():
                tensor = self.as_stored(full, tensor)
                tensor = tensor if tensor.dtype == torch.float32 else tensor.to(self.dtype)
            tensor = tensor.to(self.device)
            owner, _, leaf = name.rpartition(".")
            target = module.get_submodule(owner)
            if leaf in target._parameters:
                target._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                target._buffers[leaf] = tensor

    def as_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A floating-point tensor in what it is kept in; ``name`` in the skeleton tells what transformers keeps in
        float32 whatever is asked."""
        exact = any(part in name for part in self.exact)
        return tensor.to(torch.float32 if exact else self.stored)

    def empty(self, module: nn.Module) -> None:
        """Give the memory of ``module``'s parameters back."""
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None:
                    child._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    def block(self, index: int) -> nn.Module:
        """Block ``index`` with its weights on the device. Empty it when done."""
        block = self.blocks[index]
        self.fill(block, f"{self.prefix}.{index}")
        return block.to(self.device)  # non-persistent buffers

    def kept(self) -> list[str]:
        """Linears that stay as they are: the head, routers, gates of shared experts. By their names in the skeleton,
        which transformers compares with, and those in the files, which vLLM does, where the two differ."""
        chosen = {
            f"{self.prefix}.{i}.{name}" for i, block in enumerate(self.blocks) for name in linears(block)
        }
        every = [name for name, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        inside = [name for name in every if name not in chosen]
        return list(dict.fromkeys(inside + [self.names.on_disk(name) for name in inside]))

    @torch.no_grad()
    def inputs(self, rows: torch.Tensor) -> tuple[torch.Tensor, list[BlockInputs]]:
        """Run everything before the first block.

        Args:
            rows: token ids int64 [rows, seq_len].

        Returns:
            hidden states [rows, seq_len, hidden] on the device, and one call per block, recorded from the first row
            (all rows have one length, so the rest of a call is the same for each; that is checked on the second).

        Raises:
            DataError: the blocks get something else that depends on the tokens.
        """
        first, second = _Record(), _Record()
        parent, _, leaf = self.prefix.rpartition(".")
        body = self.model.get_submodule(parent)  # the model without its head: no logits are computed
        around = [(f"{parent}.{n}" if parent else n, m) for n, m in body.named_children() if n != leaf]
        self.fill(body, parent, recurse=False)
        for name, module in around:
            self.fill(module, name)
            module.to(self.device)  # rotary tables and the like, which no file holds
        stubs = nn.ModuleList(_Stub(block) for block in self.blocks)
        setattr(body, leaf, stubs)
        hidden = []
        try:
            for number, row in enumerate(rows):
                record = (first, second, None)[min(number, 2)]
                hidden.append(self._through(body, stubs, row[None].to(self.device), record))
        finally:
            setattr(body, leaf, self.blocks)
            for _, module in around:
                self.empty(module)
        if len(first.calls) != len(self.blocks):
            raise DataError(
                f"{self.files.name}: its forward pass does not go through its decoder blocks once each"
            )
        if second.calls and not _same(first.plain(), second.plain()):
            raise DataError(
                f"{self.files.name}: its decoder blocks get more than hidden states from the tokens",
                hint="such an architecture cannot be quantized block by block",
            )
        return torch.cat(hidden), first.calls

    def _through(
        self, body: nn.Module, stubs: nn.ModuleList, row: torch.Tensor, record: _Record | None
    ) -> torch.Tensor:
        """The hidden states [1, seq_len, hidden] that the first block gets for ``row`` [1, seq_len]."""
        for stub in stubs:
            stub.record, stub.got = record, None  # type: ignore[assignment]
        try:
            body(input_ids=row, use_cache=False)
        except _Indexed:
            for stub in stubs:
                stub.packed = True  # type: ignore[assignment]
            if record is not None:
                record.calls.clear()
            body(input_ids=row, use_cache=False)
        got = stubs[0].got
        if not isinstance(got, torch.Tensor):
            raise DataError(f"{self.files.name}: its forward pass does not reach its first decoder block")
        return got


class _Record:
    """Calls in order. Tensors of equal content are kept once, however many blocks get a copy of their own."""

    def __init__(self) -> None:
        self.calls: list[BlockInputs] = []
        self._kept: dict[tuple[Any, ...], list[torch.Tensor]] = {}

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append(BlockInputs(self._once(args), self._once(kwargs)))

    def plain(self) -> list[Any]:
        return [(call.args, call.kwargs) for call in self.calls]

    def _once(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            same = self._kept.setdefault((value.shape, value.dtype, value.device), [])
            for known in same:
                if known is value or torch.equal(known, value):
                    return known
            same.append(value)
        elif isinstance(value, dict):
            return {key: self._once(part) for key, part in value.items()}
        elif type(value) in (tuple, list):
            return type(value)(self._once(part) for part in value)
        return value


def _same(one: Any, other: Any) -> bool:
    """Whether two recorded calls agree in every tensor; things that are no tensors are not looked at."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return True


class _Indexed(Exception):
    """The model takes the first element of what a block returns: its blocks return tuples."""


class _Stub(nn.Module):
    """Stands for a block: records its call, keeps its input, and hands the hidden states on, ``packed`` in a tuple."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.record: _Record | None = None
        self.got: torch.Tensor | None = None
        self.packed = False
        for name, value in vars(
            block
        ).items():  # what a model reads off its blocks (attention_type and the like)
            if isinstance(value, str | int | float) and name != "training":
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.dim() < 3:
            raise _Indexed
        self.got = hidden_states.detach()
        if self.record is not None:
            self.record.add(args, kwargs)
        return (hidden_states,) if self.packed else hidden_states


def skeleton(files: ModelFiles, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The model on the meta device, without weights, in eval mode.

    Raises:
        DataError: transformers has no causal language model of this type, or it needs code from its files.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(files.path, trust_remote_code=trust_remote_code)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise DataError(
                f"{files.name}: it needs Python code that comes with its files",
                hint="read that code; --trust-remote-code lets it run",
            ) from error
        raise DataError(
            f"{files.name}: transformers has no causal language model of it: {first_line(error)}"
        ) from error
    return model.eval()


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: the ModuleList that holds the most parameters."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            size = sum(p.numel() for p in module.parameters())
            if size and (best is None or size > best[0]):  # of two that hold the same, the outer one
                best = (size, name, module)
    if best is None:
        raise DataError(f"{type(model).__name__} has no list of equal decoder blocks")
    return best[1], best[2]


def refuse_blocks(model: nn.Module, blocks: nn.ModuleList, called: str) -> None:
    """Refuse blocks that cannot be quantized as linears, or that look both ways.

    Raises:
        DataError: transposed layers (GPT-2's Conv1D), attention that is not causal, no linear at all.
    """
    architecture = type(model).__name__
    for name, module in blocks.named_modules():
        if "Conv1D" in {c.__name__ for c in type(module).__mro__}:
            raise DataError(
                f"{called}: {architecture} keeps its layers transposed ({name} is a {type(module).__name__})",
                hint="only architectures made of linear layers can be quantized; GPT-2 and its kin are not",
            )
        if getattr(module, "is_causal", True) is False:
            raise DataError(
                f"{called}: the attention of {architecture} is not causal",
                hint="give a causal language model (a decoder alone, as Llama, Qwen or Gemma are)",
            )
    if not any(linears(block) for block in blocks):
        raise DataError(f"{called}: the blocks of {architecture} hold no linear layers")


def run_block(
    block: nn.Module,
    hidden: torch.Tensor,
    call: BlockInputs,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """One block on hidden states [rows, seq_len, hidden]; returns the same shape. ``weights``: other values for some
    parameters, by their names in the block."""
    if weights:
        out = functional_call(block, dict(weights), (hidden, *call.args), call.kwargs)
    else:
        out = block(hidden, *call.args, **call.kwargs)
    result = out[0] if isinstance(out, tuple) else out
    assert isinstance(result, torch.Tensor)
    return result


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside a block that are quantized, by their name in it: not its routers."""
    found = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    routed = has_experts(found)
    return {name: module for name, module in found.items() if quantizable(name, routed)}


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` covering ``range(count)``."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def dtype_of(files: ModelFiles, wish: str = "auto") -> torch.dtype:
    """The dtype that weights are kept in: the files' unless ``wish`` names another."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    stored = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    if wish != "auto":
        return names[wish]
    kinds: Sequence[str] = [t.dtype for t in files.tensors.values() if t.dtype in stored]
    return stored[max(set(kinds), key=kinds.count)] if kinds else torch.float32
