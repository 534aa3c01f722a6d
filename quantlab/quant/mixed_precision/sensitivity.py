"""How much of the model's quality one unit of a layer's output error costs: measured, one number a layer.

A small error ``e_t`` in the output of a layer at token t shifts the model's predictions by a Kullback-Leibler
divergence of ``1/2 E[(sum_t g_t . e_t)^2]`` nats, where ``g_t`` is the gradient of the log-probability of labels drawn
from the model itself with respect to that output: the Fisher information (for quantization see Li et al., "BRECQ",
ICLR 2021, arXiv:2102.05426, section 3). Taking errors of different tokens and output channels as unrelated leaves

    divergence a token  ~  sum over channels of f * loss,     f = 1/2 mean over tokens of g^2

with ``loss`` the mean squared error a token of each channel (:func:`fisher`), or with one number for all channels
(:func:`sensitivities`: the mean of f, beside the loss of a whole layer, which every solver here reports). They do not
depend on how the layer is quantized: they are measured once and serve every width, type, group size and method.

Outside the blocks: an error in the embedding is one in the first hidden states, which have a gradient like any output.
An error ``d_v`` in the logits costs half its variance under the predictions p, ``1/2 Var_p(d)``, which is the mean of
``1/4 (d_v - d_u)^2`` over pairs of labels v, u drawn from p: the rows of the head that are drawn are enough.

Neither the model nor a graph through it is ever held. :class:`Probe` takes a few rows forward block by block, keeping
what each block got; then backward from the head, where each block is run once more on one row at a time and
differentiated.

Cost, for one draw of labels, P probe tokens and L blocks of F operations a token: about 3 F P L (two passes forward,
one backward through the activations; weights have no gradients), and reading the blocks twice. Memory: (L + 1) * P *
hidden values in the model's dtype, plus the graph of one row through one block. 1024 tokens are plenty: each number
averages 1024 * out_features squares.

Not covered: interactions between layers (divergences of several quantized layers are taken to add up), and the
direction of the errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from quantlab.models.block_inputs import BlockInputs
from quantlab.models.blockwise import BlockwiseModel, run_block
from quantlab.models.layers import linears, matrix
from quantlab.models.lm_head import head
from quantlab.quant.mixed_precision.error_cost import Seen

ROWS, SEQ_LEN = 4, 256  # of the calibration rows, by default
DRAWN = 8  # labels that are drawn for each token to judge the head by
STRIDE = 1_000_003  # between the seeds of draws
# Of labels, for what is watched: averages over few errors need more than averages over all channels.
DRAWS = 4


def sensitivities(
    opened: BlockwiseModel,
    rows: torch.Tensor,
    *,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    watch: Callable[[int, nn.Module, Seen], None] | None = None,
) -> dict[str, float]:
    """The sensitivity of every linear in the blocks, by its full name in the files. No block may be in memory.

    Args:
        rows: token ids int64 [rows, seq_len], of the text that the model is meant for.
        seed: of the labels drawn from the model's predictions.
        advance: called with 1 for every block gone through, twice the number of blocks in all.
        watch: given each block's number, the block, and what its layers got and were asked for, the last block first;
            for ``DRAWS`` draws of labels, the first of which the sensitivities are of.

    Raises:
        ValueError: the predictions or their gradients overflow.
    """
    found = fisher(opened, rows, seed=seed, advance=advance, watch=watch).layers
    return {name: value.mean().item() for name, value in found.items()}


@dataclass(frozen=True)
class Fisher:
    """What errors cost. ``rows``: token ids int64 [rows, seq_len] that it was measured on.

    layers: by layer, ``1/2 mean g^2`` of each channel of its output, float32 [out].
    embedding: the same of the hidden states before the first block, float32 [hidden].
    states: those states, float32 [tokens, hidden]. into_head: what enters the head, float32 [tokens, hidden].
    drawn: labels from the predictions, int64 [tokens, DRAWN].
    """

    rows: torch.Tensor
    layers: dict[str, torch.Tensor]
    embedding: torch.Tensor
    states: torch.Tensor
    into_head: torch.Tensor
    drawn: torch.Tensor


def fisher(
    opened: BlockwiseModel,
    rows: torch.Tensor,
    *,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    watch: Callable[[int, nn.Module, Seen], None] | None = None,
) -> Fisher:
    """The Fisher information of every linear in the blocks, by its full name in the files, and outside them. Arguments
    and errors as of :func:`sensitivities`."""
    hidden, calls = opened.inputs(rows)
    probe = Probe(hidden)
    first = probe.states[0]
    for index, call in enumerate(calls):
        block = opened.block(index)
        probe.forward(block, call)
        opened.empty(block)
        if advance is not None:
            advance(1)
    into_head: list[torch.Tensor] = []

    def entering(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        into_head.append(args[0].detach().float().flatten(0, -2))

    output: nn.Module | None = opened.model.get_output_embeddings()
    handle = None if output is None else output.register_forward_pre_hook(entering)
    try:
        with head(opened) as logits:
            probe.score(logits, seed, draws=1 if watch is None else DRAWS)
    finally:
        if handle is not None:
            handle.remove()
    found: dict[str, torch.Tensor] = {}
    for index, call in reversed(list(enumerate(calls))):
        block = opened.block(index)
        seen = None if watch is None else Seen(DRAWS)
        for name, value in probe.backward(block, call, seen).items():
            found[opened.names.on_disk(f"{opened.prefix}.{index}.{name}")] = value
        if watch is not None and seen is not None:
            watch(index, block, seen)
        opened.empty(block)
        if advance is not None:
            advance(1)
    behind = probe.gradient.float().flatten(0, -2)  # [tokens, hidden]
    return Fisher(
        rows,
        dict(reversed(found.items())),
        behind.square().mean(dim=0) / 2,
        first.float().flatten(0, -2),
        torch.cat(into_head) if into_head else first.new_empty(0, first.shape[-1]),
        probe.drawn,
    )


class Probe:
    """A few rows on their way through the model and back. BlockInputs ``forward`` for each block in order, ``score``
    once, and ``backward`` for each block in reverse order.

    ``hidden`` [rows, seq_len, hidden]: what the first block gets.
    """

    def __init__(self, hidden: torch.Tensor) -> None:
        self.states = [hidden.detach()]  # before each block gone through, and after the last one
        # Of the states last in the list, [draws, rows, seq_len, hidden].
        self._gradient: torch.Tensor | None = None
        self.drawn = torch.empty(0, DRAWN, dtype=torch.int64)  # labels from the predictions, [tokens, DRAWN]

    @property
    def gradient(self) -> torch.Tensor:
        """Of the first draw's log-probability with respect to the states last come back to, [rows, seq_len, hidden]."""
        assert self._gradient is not None
        return self._gradient[0]

    @torch.no_grad()
    def forward(self, block: nn.Module, call: BlockInputs) -> None:
        """Run the rows through the next block."""
        out = [
            run_block(block, row[None], call, rows=slice(i, i + 1)) for i, row in enumerate(self.states[-1])
        ]
        self.states.append(torch.cat(out))

    def score(self, logits: Callable[[torch.Tensor], torch.Tensor], seed: int = 0, *, draws: int = 1) -> None:
        """Draw a label for every token from the predictions, and start the gradients of their log-probabilities.

        Args:
            logits: from the hidden states after the last block [1, seq_len, hidden] to [1, seq_len, vocabulary].
            draws: how many times labels are drawn.

        Raises:
            ValueError: the predictions are not finite.
        """
        # On the CPU, so that every device draws the same; the first draw does not depend on how many there are.
        generators = [torch.Generator().manual_seed(seed + STRIDE * draw) for draw in range(draws)]
        others = torch.Generator().manual_seed(seed + 1)
        gradients: list[list[torch.Tensor]] = [[] for _ in generators]
        drawn = []
        for row in self.states.pop():
            with torch.enable_grad():
                leaf = row[None].clone().requires_grad_()
                scores = logits(leaf)[0].float().log_softmax(dim=-1)  # [seq_len, vocabulary]
                if not torch.isfinite(scores).all():
                    raise ValueError("the model's predictions are not finite: its activations overflow")
                chances = scores.detach().exp().cpu()
                drawn.append(torch.multinomial(chances, DRAWN, replacement=True, generator=others))
                for draw, generator in enumerate(generators):
                    labels = torch.multinomial(chances, 1, generator=generator).to(scores.device)
                    chosen = scores.gather(1, labels).sum()
                    gradients[draw] += torch.autograd.grad(chosen, leaf, retain_graph=draw < draws - 1)
        self._gradient = torch.stack([torch.cat(rows) for rows in gradients])
        self.drawn = torch.cat(drawn)

    def backward(
        self, block: nn.Module, call: BlockInputs, seen: Seen | None = None
    ) -> dict[str, torch.Tensor]:
        """Take the gradients through the last block not yet gone back through, and show them to ``seen``.

        Returns:
            The Fisher information of each of its linears' output channels, float32 [out], by their names in the block.
            A layer that no token reached (an expert) gets the least of the others' means: zero would allow it any loss.
        """
        if self._gradient is None:
            raise RuntimeError("score comes before backward")
        states, gradient = self.states.pop(), self._gradient
        layers = linears(block)
        squares, draw = {name: torch.zeros(len(matrix(layer))) for name, layer in layers.items()}, [0]
        handles = [
            layer.register_forward_hook(_square(name, squares, draw, seen)) for name, layer in layers.items()
        ]
        before: list[list[torch.Tensor]] = [[] for _ in gradient]
        try:
            for i, (row, behind) in enumerate(zip(states, gradient.unbind(1), strict=True)):
                with torch.enable_grad():
                    leaf = row[None].clone().requires_grad_()
                    out = run_block(block, leaf, call, rows=slice(i, i + 1))
                    for draw[0], wanted in enumerate(behind):  # [seq_len, hidden]
                        more = draw[0] < len(behind) - 1
                        before[draw[0]] += torch.autograd.grad(out, leaf, wanted[None], retain_graph=more)
        finally:
            for handle in handles:
                handle.remove()
        self._gradient = torch.stack([torch.cat(rows) for rows in before])
        if not torch.isfinite(self._gradient).all():
            raise ValueError("the model's gradients overflow: compute in float32 or bfloat16")
        tokens = states.shape[0] * states.shape[1]
        found = {name: squares[name] / (2 * tokens) for name in layers}
        least = min((mean for value in found.values() if (mean := value.mean().item()) > 0), default=0.0)
        return {
            name: value if value.any() else torch.full_like(value, least) for name, value in found.items()
        }


def _square(
    name: str, squares: dict[str, torch.Tensor], draw: list[int], watched: Seen | None
) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    """A forward hook that adds up the squared gradients of a layer's output for the first ``draw`` of labels, and shows
    those of all draws to ``watched``."""

    def seen(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.requires_grad:  # an expert that gets no token of the row has no output to speak of

            def back(gradient: torch.Tensor) -> None:
                if draw[0] == 0:
                    squares[name] += gradient.float().flatten(0, -2).square().sum(dim=0).cpu()
                if watched is not None:
                    watched.add(name, args[0], gradient)

            output.register_hook(back)

    return seen
