"""A model opened block by block: the skeleton on the meta device, one decoder block in memory at a time.

Nothing here knows an architecture. The decoder blocks are the list of modules that holds the most parameters. What a
block is called with (rotary tables, masks, positions, per layer where they differ) is recorded from one forward pass
of the model with every block replaced by a stub that hands its input on; from then on the blocks run alone. Merged
experts are taken apart (``experts``), names are those of the skeleton inside and translated at the files (``names``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from quantlab.errors import DataError, first_line
from quantlab.models.block_inputs import BlockInputs, Dependent, record
from quantlab.models.experts import Part, merged, separate, stacks, taken_apart
from quantlab.models.layers import Layers, Trait, is_layer, linears, matrix, traits
from quantlab.models.refusals import refuse_other_kinds, wrapping
from quantlab.models.safetensors.files import ModelFiles
from quantlab.models.safetensors.tensors import read_tensor
from quantlab.models.weight_names import Names, conversions, renamed


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
        refuse_other_kinds(files)
        self.files, self.device, self.dtype, self.stored = files, torch.device(device), dtype, stored or dtype
        self.model = skeleton(files, dtype, trust_remote_code)
        self.config: Any = self.model.config
        parts = self._separate_experts()
        self._text = language_model(self.model)
        self.prefix, self.blocks = find_blocks(self.model)
        refuse_blocks(self.model, self.blocks, files.name)
        shapes = {name: info.shape for name, info in files.tensors.items()}
        self.names = Names(self.model, shapes, files.name, parts=parts)
        self.stored_prefix = self.names.on_disk(f"{self.prefix}.0").rpartition(".")[0]
        self.returned: int | None = None  # see RETURNED; known once a row went through
        strict = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        half = getattr(self.model, "_keep_in_fp32_modules", None) or () if dtype == torch.float16 else ()
        # Parts of the names of what is computed in float32 whatever the dtype.
        self.exact: tuple[str, ...] = tuple({*strict, *half})

    def _separate_experts(self) -> dict[str, Part]:
        """Take experts apart; returns where those of their tensors lie that the files hold as parts of others."""
        before = merged(self.model)
        plain = renamed(self.model, self.files.tensors) if before else {}
        self._apart = taken_apart(type(module).__name__ for module in before.values())
        parts = separate(self.model, conversions(self.model)[1], plain=plain)
        stacked = {part.parameter.rpartition(".")[0] for part in parts.values()}
        self.merged = bool(
            before.keys() - merged(self.model).keys() - stacked
        )  # by transformers, while it loads
        return {name: part._replace(parameter=plain[part.parameter]) for name, part in parts.items()}

    def fill(self, module: nn.Module, prefix: str, *, recurse: bool = True) -> None:
        """Load the parameters and stored buffers of ``module``, ``prefix`` in the skeleton, onto the device."""
        named = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
        for name, _ in named:
            full = f"{prefix}.{name}" if prefix else name
            held = self.read(full)
            if held is None:  # a buffer that the model computes itself
                continue
            tensor = held
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

    def read(self, name: str) -> torch.Tensor | None:
        """A tensor of the skeleton from the files, as they hold it; None where they do not."""
        if name in self.names.stored:
            return read_tensor(self.files.tensors[self.names.stored[name]])
        if name in self.names.parts:
            part = self.names.parts[name]
            return part.of(read_tensor(self.files.tensors[part.parameter].part(part.expert)))
        if name in self.names.computed:
            found = self.names.computed[name].run(lambda n: read_tensor(self.files.tensors[n]), self.model)
            return found[name]
        return None

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

    @cached_property
    def layers(self) -> Layers:
        """Which layers there are, by their names in the files."""
        inside = {f"{self.prefix}.{i}.{n}" for i, block in enumerate(self.blocks) for n in linears(block)}
        odd, names = traits(self.model), self.names
        exact = getattr(self.model, "_keep_in_fp32_modules", None) or ()
        shapes: dict[str, tuple[int, int]] = {}
        kept: dict[str, str] = {}
        found: dict[str, frozenset[Trait]] = {}
        held_in: dict[str, tuple[str, ...]] = {}
        plain, experts = set(), set()
        for name, module in self.model.named_modules():
            if not is_layer(module):
                continue
            stored = names.on_disk(name)
            if name not in inside:
                plain.add(stored)
            elif any(part in name for part in exact):
                kept[stored] = "transformers keeps it in float32"
            elif f"{name}.weight" in names.computed:
                kept[stored] = "transformers computes it from other tensors in the files"
            else:
                rows, columns = matrix(module).shape
                shapes[stored] = (rows, columns)
                found |= {stored: frozenset(odd[name])} if name in odd else {}
                experts |= {stored} if "experts" in name.split(".") else set()
                held = [names.parts.get(f"{name}.{leaf}") for leaf in ("weight", "bias")]
                held_in |= {stored: tuple(part.parameter for part in held if part)} if held[0] else {}
        whole = {names.on_disk(n) for n in stacks(self.blocks, self.prefix)}
        kept |= dict.fromkeys(sorted(whole), "transformers takes all experts of a layer from one tensor")
        return Layers(
            architecture=type(self.model).__name__,
            prefix=self.stored_prefix,
            blocks=len(self.blocks),
            shapes=shapes,
            kept=kept,
            plain=frozenset(plain),
            experts=frozenset(experts),
            merged=self.merged,
            held_in=held_in,
            whole=frozenset(whole),
            apart=self._apart,
            computed=bool(names.computed),
            carried=frozenset(name for name in self.files.tensors if self.is_carried(name)),
            exact=self.exact,
            traits=found,
        )

    def left_out(self, chosen: Iterable[str]) -> list[str]:
        """The linears that stay as they are where ``chosen`` (names in the files) are quantized. By their names in the
        skeleton, which transformers compares with, and those in the files, which vLLM does, where the two differ."""
        packed = set(chosen)
        every = [name for name, module in self.model.named_modules() if is_layer(module)]
        inside = [name for name in every if self.names.on_disk(name) not in packed]
        return list(dict.fromkeys(inside + [self.names.on_disk(name) for name in inside]))

    @torch.no_grad()
    def inputs(self, rows: torch.Tensor) -> tuple[torch.Tensor, list[BlockInputs]]:
        """Run everything before the first block.

        Args:
            rows: token ids int64 [rows, seq_len].

        Returns:
            hidden states [rows, seq_len, hidden] on the device, and the other inputs of every block. All rows have one
            length, so most of a call is the same for each; what is a row's own is recorded for all of them.

        Raises:
            DataError: the blocks get something else that depends on the tokens, or hand on more than hidden states.
        """
        parent, _, leaf = self.prefix.rpartition(".")
        body = self.model.get_submodule(parent)  # the model without its head: no logits are computed
        around = [(f"{parent}.{n}" if parent else n, m) for n, m in body.named_children() if n != leaf]
        self.fill(body, parent, recurse=False)
        for name, module in around:
            self.fill(module, name)
            module.to(self.device)  # rotary tables and the like, which no file holds
        stubs = nn.ModuleList(_Stub(block) for block in self.blocks)
        setattr(body, leaf, stubs)
        try:
            hidden, calls = self._recorded(body, stubs, rows)
        finally:
            setattr(body, leaf, self.blocks)
            for _, module in around:
                self.empty(module)
        return hidden, calls

    def is_carried(self, stored: str) -> bool:
        """Whether a tensor of the files belongs to what surrounds the language model, in a model that sees."""
        if not self._text:
            return False
        name = self.names.in_model(stored)
        return not name.startswith(self._text) and not name.startswith("lm_head.")

    def as_returned(self, hidden: torch.Tensor) -> Any:
        """Hidden states in the form that a block of this model returns them in."""
        return hidden if self.returned is None else (hidden, *[None] * self.returned)

    def _recorded(
        self, body: nn.Module, stubs: nn.ModuleList, rows: torch.Tensor
    ) -> tuple[torch.Tensor, list[BlockInputs]]:
        first, one = self._through(body, stubs, rows[:1])
        if len(one) != len(self.blocks):
            raise DataError(
                f"{self.files.name}: its forward pass does not go through its decoder blocks once each"
            )
        other = self._through(body, stubs, rows[1:2])[1] if len(rows) > 1 else one
        pair = rows[:2] if len(rows) > 1 else rows[[0, 0]]
        try:
            calls = record(one, other, self._through(body, stubs, pair)[1])
        except Dependent:
            raise DataError(
                f"{self.files.name}: its decoder blocks get more than hidden states from the tokens",
                hint="such an architecture cannot be quantized block by block",
            ) from None
        hidden = [first]
        own = [call.own for call in calls]
        parts: list[list[list[torch.Tensor]]] = [[[] for _ in of] for of in own]
        for row in rows[1:].split(1):
            states, more = self._through(body, stubs, row)
            hidden.append(states)
            if any(own):
                recorded = record(more, one, self._through(body, stubs, torch.cat([row, rows[:1]]))[1])
                for lists, call in zip(parts, recorded, strict=True):
                    for values, mine in zip(lists, call.own, strict=True):
                        values.append(mine.values[: len(mine.values) // 2])
        for of, lists in zip(own, parts, strict=True):
            for mine, values in zip(of, lists, strict=True):
                mine.values = torch.cat([mine.values[: len(mine.values) // 2], *values])
        return torch.cat(hidden), calls

    def _through(
        self, body: nn.Module, stubs: nn.ModuleList, rows: torch.Tensor
    ) -> tuple[torch.Tensor, list[Any]]:
        """The hidden states [rows, seq_len, hidden] that the first block gets for ``rows`` [rows, seq_len], and what
        every block gets besides."""
        for returned in dict.fromkeys([self.returned, *RETURNED]):
            calls: list[Any] = []
            for stub in stubs:
                stub.calls, stub.got, stub.returned = calls, None, returned  # type: ignore[assignment]
            try:
                body(input_ids=rows.to(self.device), use_cache=False)
            except (_Indexed, ValueError, TypeError, AttributeError, IndexError) as error:
                if returned == RETURNED[-1] or not calls:
                    problem = first_line(error)
                    raise DataError(
                        f"{self.files.name}: its forward pass cannot be followed: {problem}"
                    ) from error
                continue
            self.returned = returned
            got = stubs[0].got
            if not isinstance(got, torch.Tensor):
                break
            if got.shape[:2] != rows.shape:
                raise DataError(
                    f"{self.files.name}: its decoder blocks take hidden states {list(got.shape)} for {len(rows)} rows "
                    f"of {rows.shape[1]} tokens",
                    hint="such an architecture cannot be quantized block by block",
                )
            if any(_holds(call, stub.more) for call, stub in zip(calls[1:], stubs, strict=False)):
                raise DataError(
                    f"{self.files.name}: its decoder blocks hand on more than hidden states",
                    hint="such an architecture cannot be quantized block by block",
                )
            return got, calls
        raise DataError(f"{self.files.name}: its forward pass does not reach its first decoder block")


def layers_of(files: ModelFiles, trust_remote_code: bool = False) -> Layers:
    """The layers of a model, found once.

    Raises:
        DataError: as :class:`BlockwiseModel`.
    """
    if "layers" not in files.memo:
        files.memo["layers"] = BlockwiseModel(files, "cpu", torch.float32, trust_remote_code).layers
    found: Layers = files.memo["layers"]
    return found


class _Indexed(Exception):
    """The model takes the first element of what a block returns: its blocks return tuples."""


SEEING = ("vision_tower", "visual", "vision_model", "vision_embed_tokens")
# What blocks return: hidden states, or a tuple of them and so many other things.
RETURNED = (None, 0, 1, 2)


class _More:
    """Stands for what a block returns besides hidden states; it is known again where it is handed on."""


class _Stub(nn.Module):
    """Stands for a block: records its call, keeps its input, and hands the hidden states on, in a tuple with
    ``returned`` other things where that is a number."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.got: torch.Tensor | None = None
        self.returned: int | None = None
        self.more = [_More() for _ in RETURNED]
        for name, value in vars(
            block
        ).items():  # what a model reads off its blocks (attention_type and the like)
            if isinstance(value, str | int | float) and name != "training":
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.dim() < 3:
            raise _Indexed
        self.got = hidden_states.detach()
        self.calls.append((args, kwargs))
        return hidden_states if self.returned is None else (hidden_states, *self.more[: self.returned])


def _holds(call: Any, things: Sequence[Any]) -> bool:
    """Whether any of ``things`` is among the arguments of a call."""
    args, kwargs = call
    return any(value is thing for value in (*args, *kwargs.values()) for thing in things)


def skeleton(files: ModelFiles, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The model on the meta device, without weights, in eval mode.

    Raises:
        DataError: transformers has no causal language model of this type, or it needs code from its files.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(files.path, trust_remote_code=trust_remote_code)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = auto_class(files).from_config(
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


def auto_class(files: ModelFiles) -> Any:
    """transformers' class that opens a model: for language models, or for those that see images too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if wrapping(files) else AutoModelForCausalLM


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: the ModuleList that holds the most parameters; in a model that sees, of its language
    model."""
    best: tuple[int, str, nn.ModuleList] | None = None
    inside = language_model(model)
    for name, module in model.named_modules():
        if not f"{name}.".startswith(inside):
            continue
        if isinstance(module, nn.ModuleList) and len(module):
            size = sum(p.numel() for p in module.parameters())
            if size and (best is None or size > best[0]):  # of two that hold the same, the outer one
                best = (size, name, module)
    if best is None:
        raise DataError(f"{type(model).__name__} has no list of equal decoder blocks")
    return best[1], best[2]


def language_model(model: nn.Module) -> str:
    """The name of the language model inside one that sees, with a dot behind it; empty for any other."""
    names = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in ("language_model", "text_model")]
    vision = any(n.rpartition(".")[2] in SEEING for n, _ in model.named_modules())
    return f"{names[0]}." if names and vision else ""


def refuse_blocks(model: nn.Module, blocks: nn.ModuleList, called: str) -> None:
    """Refuse blocks without a layer to quantize, or that look both ways.

    Raises:
        DataError: attention that is not causal, no linear at all.
    """
    architecture = type(model).__name__
    for module in blocks.modules():
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
    rows: slice | None = None,
) -> torch.Tensor:
    """One block on hidden states [rows, seq_len, hidden]; returns the same shape. ``weights``: other values for some
    parameters, by their names in the block. ``rows``: which of the recorded rows these are, for what is a row's own;
    None for the first ones."""
    args, kwargs = call.of(len(hidden), rows)
    if weights:
        out = functional_call(block, dict(weights), (hidden, *args), kwargs)
    else:
        out = block(hidden, *args, **kwargs)
    result = out[0] if isinstance(out, tuple | list) else out
    assert isinstance(result, torch.Tensor)
    return result


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` covering ``range(count)``."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def dtype_of(files: ModelFiles, wish: str = "auto") -> torch.dtype:
    """The dtype that weights are kept in: the files' unless ``wish`` names another."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    stored = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    if wish == "auto" and files.plain is not None:
        wish = files.plain
    if wish != "auto":
        return names[wish]
    kinds: Sequence[str] = [t.dtype for t in files.tensors.values() if t.dtype in stored]
    return stored[max(set(kinds), key=kinds.count)] if kinds else torch.float32
