"""Which scales can be moved inside a block without changing what it computes, found by trying.

AWQ multiplies a linear's input channels by s and has whatever produced them divide by s (Lin et al.,
arXiv:2306.00978, section 3.2). That is exact only if *every* reader of the divided tensor multiplies. Names do not
tell: in Mixtral a router reads what the experts read, in Phi q, k, v and fc1 share one norm, Gemma 2 has norms whose
output goes into the residual.

So it is tried on a few tokens. A module's output channels are multiplied by random powers of two, and every matrix
whose input arrives multiplied by just these divides it again. Whoever does so is a reader. If the block's output is
then what it was before, the readers found are all there are. Powers of two make both steps exact in every float
format, so that equal means equal up to the order in which a GPU adds.

Between two linears one must also know which row feeds which column. For an attention's values the first token tells:
it sees only itself, so its attention output *is* its values, whatever the layout (grouped heads, a fused
``query_key_value``). For a perceptron the rows are taken one to one, or as one half of a fused ``gate_up_proj``; a
wrong guess does not survive the trial.

Not covered: pairs of linears with different parents, or more than one linear behind a producer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantlab.models.block_inputs import BlockInputs
from quantlab.models.blockwise import BlockwiseModel, run_block
from quantlab.models.layers import linears

PROBE_ROWS, PROBE_TOKENS = 8, 16
EXPONENTS = torch.tensor([-2.0, -1.0, 1.0, 2.0])


@dataclass(frozen=True)
class NormFold:
    """Dividing the output of ``norm`` by s is undone by multiplying the columns of ``layers`` *and* ``others`` by s.

    layers: linears that are to be quantized; experts that no probing token reached are counted by their likes.
    others: modules with a matrix ``weight`` that are not quantized (a router, the gate of a shared expert).
    """

    norm: str
    layers: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True)
class LinearPair:
    """Dividing the rows ``rows[c]`` of ``producer`` (weight and bias) by s is undone by multiplying every column c of
    ``consumer`` that has this row by the same s. Several columns may share a row (grouped-query attention); rows
    that are not named (queries and keys of a fused projection) are left alone. Positive s only: a relu lets nothing
    else through."""

    producer: str
    consumer: str
    rows: torch.Tensor  # int64 [in of consumer], on the CPU


@dataclass(frozen=True)
class ScaleFolds:
    """What can be moved in a block. A linear is in at most one norm's ``layers`` and consumer of at most one pair."""

    norms: tuple[NormFold, ...] = ()
    pairs: tuple[LinearPair, ...] = ()

    def without(self, fixed: Collection[str]) -> ScaleFolds:
        """Those that change none of the parameters ``fixed``, by full name in the block."""
        if not fixed:
            return self

        def free(*modules: str) -> bool:
            return not any(f"{name}.{leaf}" in fixed for name in modules for leaf in ("weight", "bias"))

        return ScaleFolds(
            tuple(fold for fold in self.norms if free(fold.norm, *fold.layers, *fold.others)),
            tuple(pair for pair in self.pairs if free(pair.producer, pair.consumer)),
        )


def probe_inputs(opened: BlockwiseModel, rows: torch.Tensor) -> tuple[torch.Tensor, list[BlockInputs]]:
    """Hidden states and calls for :func:`structure`, from a corner of the calibration rows: the states before the first
    block serve for every block, since any input shows how a block is built."""
    return opened.inputs(rows[:PROBE_ROWS, :PROBE_TOKENS])


def signature(block: nn.Module) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Blocks of equal signature have one structure: names, classes and shapes."""
    return tuple(
        (
            name,
            type(m).__name__,
            tuple(w.shape) if isinstance(w := getattr(m, "weight", None), torch.Tensor) else (),
        )
        for name, m in block.named_modules()
    )


@torch.no_grad()
def structure(block: nn.Module, hidden: torch.Tensor, call: BlockInputs) -> ScaleFolds:
    """Find every fold of a block.

    Args:
        block: with its weights. hidden: [rows, tokens, hidden], ``call`` recorded for as many tokens. Four rows at
            least are needed to tell an attention's channels apart.
    """
    base = _Base(block, hidden, call)
    found = [_norm_fold(base, name) for name in norms(block)]
    return ScaleFolds(tuple(f for f in found if f is not None), tuple(_pairs(base)))


@torch.no_grad()
def fold_is_exact(
    block: nn.Module, hidden: torch.Tensor, call: BlockInputs, norm: str, layers: Sequence[str]
) -> bool:
    """Whether dividing the output of ``norm`` and multiplying the columns of ``layers`` leaves the block's output as
    it is. No weight is touched."""
    base = _Base(block, hidden, call)
    by = factors(block.get_submodule(norm).weight.shape[0], hidden)  # type: ignore[union-attr,index]
    with _multiplied({norm: by}, base), _divided(dict.fromkeys(layers, by), base):
        return base.unchanged(run_block(block, hidden, call))


def norms(block: nn.Module) -> list[str]:
    """Modules of one vector ``weight``: the normalisations."""
    return [
        name
        for name, module in block.named_modules()
        if isinstance(w := module._parameters.get("weight"), nn.Parameter) and w.dim() == 1
    ]


def factors(size: int, like: torch.Tensor) -> torch.Tensor:
    """Random powers of two [size], the same for every call of one size, in the dtype and on the device of ``like``."""
    seeded = torch.Generator().manual_seed(size)
    exponent = EXPONENTS[torch.randint(len(EXPONENTS), (size,), generator=seeded)]
    return torch.exp2(exponent).to(like)


@dataclass
class _Base:
    """An undisturbed run: what every matrix got and gave, in the order in which they were reached."""

    block: nn.Module
    hidden: torch.Tensor
    call: BlockInputs
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        again: set[str] = set()

        def record(name: str) -> Any:
            def seen(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if name in self.inputs:
                    again.add(name)
                if args and isinstance(args[0], torch.Tensor):
                    self.inputs[name] = args[0].detach().clone()
                if isinstance(output, torch.Tensor):
                    self.outputs[name] = output.detach().clone()

            return seen

        matrices = {
            name: module
            for name, module in self.block.named_modules()
            if isinstance(w := module._parameters.get("weight"), nn.Parameter) and w.dim() == 2
        }
        self.layers = linears(self.block)
        handles = [m.register_forward_hook(record(n)) for n, m in matrices.items()]
        try:
            self.out = run_block(self.block, self.hidden, self.call)
        finally:
            for handle in handles:
                handle.remove()
        for name in again:
            self.inputs.pop(name, None), self.outputs.pop(name, None)
        # What rounding may change: a GPU adds in no fixed order, and 16 bit then differ in their last place.
        self.tolerance = 1e-4 if self.out.dtype == torch.float32 else 5e-3
        self.moved = (self.out - self.hidden).float().norm()

    def unchanged(self, out: torch.Tensor) -> bool:
        """Whether ``out`` is the block's output, measured against what the block adds to its input."""
        return bool((out - self.out).float().norm() <= self.tolerance * self.moved)

    def close(self, x: torch.Tensor, name: str) -> bool:
        """Whether ``x`` is what module ``name`` got in the undisturbed run."""
        known = self.inputs.get(name)
        if known is None or x.shape != known.shape:
            return False
        return bool((x - known).float().norm() <= self.tolerance * known.float().norm())


@contextmanager
def _multiplied(by: Mapping[str, torch.Tensor], base: _Base) -> Iterator[None]:
    """Multiply the output channels of modules."""
    handles = [
        base.block.get_submodule(name).register_forward_hook(lambda m, args, out, f=f: out * f)  # type: ignore[misc]
        for name, f in by.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _divided(by: Mapping[str, torch.Tensor], base: _Base, readers: set[str] | None = None) -> Iterator[None]:
    """Divide the inputs of modules; with ``readers`` only where that gives what they got undisturbed, and note them."""

    def hook(name: str, f: torch.Tensor) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            restored = args[0] / f
            if readers is not None:
                if not args[0].numel() or not base.close(restored, name) or base.close(args[0], name):
                    return None
                readers.add(name)
            return (restored, *args[1:])

        return before

    handles = [base.block.get_submodule(n).register_forward_pre_hook(hook(n, f)) for n, f in by.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norm_fold(base: _Base, norm: str) -> NormFold | None:
    """The readers of one norm, or None where dividing its output cannot be undone."""
    weight = base.block.get_submodule(norm).weight
    assert isinstance(weight, torch.Tensor)
    by = factors(weight.shape[0], base.hidden)
    fitting = {name: by for name, x in base.inputs.items() if x.shape[-1] == len(by)}
    readers: set[str] = set()
    with _multiplied({norm: by}, base), _divided(fitting, base, readers):
        out = run_block(base.block, base.hidden, base.call)
    if not base.unchanged(out) or not readers & base.layers.keys():
        return None
    kinds = {_kind(name) for name in readers}
    every = [n for n in fitting if n in readers or (_kind(n) in kinds and not base.inputs[n].numel())]
    return NormFold(
        norm, tuple(n for n in every if n in base.layers), tuple(n for n in every if n not in base.layers)
    )


def _pairs(base: _Base) -> Iterator[LinearPair]:
    """Every pair of linears of one parent that stands the trial. Pairs that differ in numbers alone (the experts of a
    layer) are tried together."""
    order = [name for name in base.inputs if name in base.layers]
    kinds: dict[tuple[str, str], list[LinearPair]] = {}
    settled: set[tuple[str, str]] = set()
    for position, consumer in enumerate(order):
        for producer in order[:position]:
            if producer.rpartition(".")[0] != consumer.rpartition(".")[0] or producer not in base.outputs:
                continue
            for variant, rows in _row_maps(base, producer, consumer):
                kind = (f"{variant} {_kind(producer)}", _kind(consumer))
                kinds.setdefault(kind, []).append(LinearPair(producer, consumer, rows))
    for (_, consumer_kind), pairs in kinds.items():
        if ("", consumer_kind) not in settled and _stands(base, pairs):
            settled.add(("", consumer_kind))
            yield from pairs


def _row_maps(base: _Base, producer: str, consumer: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Guesses which row of ``producer`` feeds each column of ``consumer``, int64 [columns]."""
    given, taken = base.outputs[producer], base.inputs[consumer]
    rows, columns = given.shape[-1], taken.shape[-1]
    if given.dim() == taken.dim() == 3 and taken.shape[:2] == given.shape[:2] and len(given) >= 4:
        where = {tuple(column): row for row, column in enumerate(given[:, 0].t().tolist())}
        found = [where.get(tuple(column)) for column in taken[:, 0].t().tolist()]
        matched = [row for row in found if row is not None]
        if len(matched) == columns:
            yield "values", torch.tensor(matched)
            return
    if rows == columns:
        yield "equal", torch.arange(columns)
    elif rows == 2 * columns:
        yield "second half", torch.arange(columns, rows)
        yield "first half", torch.arange(columns)


def _stands(base: _Base, pairs: Sequence[LinearPair]) -> bool:
    """Whether these pairs, tried at once, leave the block's output as it is. Experts without tokens say nothing."""
    out_by, in_by = {}, {}
    for pair in pairs:
        by = torch.ones(base.outputs[pair.producer].shape[-1]).to(base.hidden)
        rows = pair.rows.to(by.device)
        by[rows] = factors(len(by), base.hidden)[rows]
        out_by[pair.producer], in_by[pair.consumer] = by, by[rows]
    readers: set[str] = set()
    with _multiplied(out_by, base), _divided(in_by, base, readers):
        out = run_block(base.block, base.hidden, base.call)
    reached = {pair.consumer for pair in pairs if base.inputs[pair.consumer].numel()}
    return bool(reached) and readers == reached and base.unchanged(out)


def _kind(name: str) -> str:
    """A name with its numbers taken out: all experts of a layer have one kind."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
