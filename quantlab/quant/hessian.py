"""Second moments of every distinct linear input in a block: what GPTQ, AWQ and every bit width are solved from.

For an input ``x [in]`` seen at n tokens: ``H = sum x^T x / n`` [in, in] and the mean absolute activation
``sum |x| / n`` [in]. Layers that are handed the very same tensor (q, k and v; gate and up) share one entry; which ones
do is observed, not assumed.

Precision. Inputs are bfloat16, float16 or float32; all of them convert to float32 without loss, and a product of two
bfloat16 or float16 values is exact in float32 (8 + 8 and 11 + 11 significant bits, at most 24), so only the summation
rounds. A matrix product sums some ``CHUNK`` tokens in blocks, and n / CHUNK such sums are added up: the relative error
of a diagonal entry stays near 1e-6, four orders of magnitude below the 1 % of the mean diagonal that GPTQ adds to H.
A plain product of bfloat16 matrices is faster still, but libraries round its *result* to 8 bits: an error of 2e-3 an
entry, which over thousands of entries a row reaches the damping. CPUs with matrix instructions for bfloat16 are used
all the same: oneDNN can round the operands of a float32 product to bfloat16 and sum in float32, and where they were
bfloat16 to begin with there is nothing to round (:func:`quantlab.models.precision.bfloat16_operands`).

H is symmetric: only strips on and below the diagonal are computed, ``(k + 1) / 2k`` of the work with k strips. torch
has no rank-k update; that of scipy's BLAS is a fifth faster alone, but its threads wait busily beside torch's, and the
passes between two updates took twice as long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from quantlab.models.layers import matrix
from quantlab.models.precision import bfloat16_operands

CHUNK = 2048  # tokens converted to float32 at once
STRIPS = 8  # at most; strips narrower than NARROWEST columns waste more in small products than they save
NARROWEST = 96


def strips(size: int) -> Iterator[slice]:
    """Row strips of a lower triangle of ``size``: strip ``a:b`` holds columns ``0:b``."""
    width = max(-(-size // STRIPS), min(NARROWEST, size))
    for start in range(0, size, width):
        yield slice(start, min(start + width, size))


def rank_k_update(hessian: torch.Tensor, x: torch.Tensor) -> None:
    """Add ``x^T x`` to the lower half of ``hessian`` float32 [in, in], in place; ``x`` float32 [tokens, in]."""
    for strip in strips(len(hessian)):
        hessian[strip, : strip.stop].addmm_(x[:, strip].t(), x[:, : strip.stop])


def mirror(hessian: torch.Tensor) -> None:
    """Fill the upper half of a matrix from its lower half, in place."""
    for strip in strips(len(hessian)):
        square = hessian[strip, strip]
        square.copy_(square.tril() + square.tril(-1).t())
        hessian[: strip.start, strip] = hessian[strip, : strip.start].t()


@dataclass
class InputHessian:
    """Statistics of one input. ``layers`` are the linears that share it; ``tokens`` how many were seen. Sums until
    :meth:`finish`, means after. ``squares``: the diagonal's sums, once it is finished: a mean times the tokens need not
    be the sum again."""

    layers: list[str]
    hessian: (
        torch.Tensor
    )  # float32 [in, in]; only its lower half until finished. [in] where it is the diagonal alone
    magnitude: torch.Tensor  # float32 [in]
    tokens: int = 0
    squares: torch.Tensor | None = None  # float32 [in]

    @property
    def diagonal(self) -> torch.Tensor:
        """Mean squared activations, float32 [in]."""
        return self.hessian if self.hessian.dim() == 1 else torch.diagonal(self.hessian)

    @classmethod
    def empty(cls, layer: str, size: int, device: torch.device | str = "cpu") -> InputHessian:
        """Nothing seen yet, for inputs of ``size`` channels."""
        return cls([layer], torch.zeros(size, size, device=device), torch.zeros(size, device=device))

    def add(self, x: torch.Tensor) -> None:
        """Account for inputs ``x`` [..., in]."""
        for part in x.detach().reshape(-1, x.shape[-1]).split(CHUNK):  # [tokens, in]
            flat = part.to(torch.float32)
            with bfloat16_operands(x.device) if x.dtype == torch.bfloat16 else nullcontext():
                rank_k_update(self.hessian, flat)
            # A quarter of the time of torch's own norm over the first dimension; `flat` may be the caller's tensor.
            self.magnitude += (flat.abs() if flat is part else flat.abs_()).sum(dim=0)
            self.tokens += flat.shape[0]

    def finish(self) -> InputHessian:
        """Turn sums into means and fill the upper half, once."""
        self.squares = self.diagonal.clone()
        if self.tokens:
            self.hessian /= self.tokens
            self.magnitude /= self.tokens
        mirror(self.hessian)
        return self


def fill_up(moments: Sequence[InputHessian]) -> dict[str, int]:
    """Fill up the statistics of experts that saw fewer tokens than they have inputs with the mean of their kin, the
    same linears of the layer's other experts: as if the missing tokens had been like theirs. A Hessian of n tokens
    says nothing about all but n directions, and a solver is then free to put its errors there.

    Args:
        moments: finished, of one block; changed in place.

    Returns:
        How many tokens those experts saw, by the name of their first linear.
    """
    kinds: dict[str, list[InputHessian]] = {}
    for one in moments:
        if "experts" in one.layers[0].split("."):
            kinds.setdefault(re.sub(r"\.\d+(?=\.)", ".*", "." + one.layers[0]), []).append(one)
    starved: dict[str, int] = {}
    for several in kinds.values():
        kin = sorted(several, key=lambda one: one.layers[0])  # sums depend on the order
        total, needed = sum(one.tokens for one in kin), kin[0].hessian.shape[0]
        few = [one for one in kin if one.tokens < needed]
        if not few or not total:
            continue
        mean = InputHessian([], torch.zeros_like(kin[0].hessian), torch.zeros_like(kin[0].magnitude))
        for one in kin:
            mean.hessian.add_(one.hessian, alpha=one.tokens / total)
            mean.magnitude.add_(one.magnitude, alpha=one.tokens / total)
        for one in few:
            own = one.tokens / needed
            starved[one.layers[0]] = one.tokens
            one.hessian.mul_(own).add_(mean.hessian, alpha=1 - own)
            one.magnitude.mul_(own).add_(mean.magnitude, alpha=1 - own)
            one.tokens = needed
    return starved


class StopForward(Exception):
    """A block's last linear has seen its input: what it would still compute is not needed."""


@dataclass
class Collector:
    """Hooks on the linears of a block that gather :class:`InputHessian` while it runs. Use as a context manager.

    Layers that are never reached (an expert that no token was routed to) get an entry of zero tokens. With
    ``inputs_only`` nobody wants the block's output: where the first forward called each linear once, later ones end
    with :class:`StopForward` at the one that came last.
    """

    layers: Mapping[str, nn.Module]
    inputs_only: bool = False
    moments: dict[str, InputHessian] = field(default_factory=dict)  # by the first layer of each group
    leader: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._current: dict[int, tuple[torch.Tensor, str]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._called: list[str] | None = []  # in the first forward
        self._last: str | None = None

    def __enter__(self) -> Collector:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._input_hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.next_batch()

    def seen(self) -> dict[str, torch.Tensor]:
        """What the first linear of each group got in this batch, when it was first called: [..., in]."""
        found: dict[str, torch.Tensor] = {}
        for x, name in self._current.values():
            found.setdefault(name, x)
        return found

    def next_batch(self) -> None:
        """Forget which tensors the last batch shared; call after every forward."""
        self._current.clear()
        if self._called:
            if self.inputs_only and sorted(self._called) == sorted(self.layers):
                self._last = self._called[-1]
            self._called = None

    def _input_hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def seen(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            account(args[0])
            if self._called is not None:
                self._called.append(name)
            if name == self._last:
                raise StopForward

        def account(x: torch.Tensor) -> None:
            known = self._current.get(id(x))  # the tensor is kept alive with its id, so ids cannot be reused
            if known is not None:
                leader = known[1]
                if self.leader.setdefault(name, leader) == leader:
                    if name not in self.moments[leader].layers:
                        self.moments[leader].layers.append(name)
                    return
            self._current[id(x)] = (x, name)
            self.leader.setdefault(name, name)
            if name not in self.moments:
                self.moments[name] = InputHessian.empty(name, x.shape[-1], x.device)
            self.moments[name].add(x)

        return seen

    def finish(self) -> list[InputHessian]:
        """The gathered statistics, one entry a distinct input."""
        for name, layer in self.layers.items():
            if name not in self.leader:
                self.moments[name] = InputHessian.empty(name, matrix(layer).shape[1], matrix(layer).device)
        return [m.finish() for m in self.moments.values()]
