"""How much of the model's quality one unit of a layer's output error costs: measured, one number a layer.

A small error ``e_t`` in the output of a layer at token t shifts the model's predictions by a Kullback-Leibler
divergence of ``1/2 E[(sum_t g_t . e_t)^2]`` nats, where ``g_t`` is the gradient of the log-probability of labels drawn
from the model itself with respect to that output: the Fisher information (for quantization see Li et al., "BRECQ",
ICLR 2021, arXiv:2102.05426, section 3). Taking errors of different tokens and output channels as unrelated leaves

    divergence a token  ~  sensitivity * loss,     sensitivity = 1/2 mean over tokens and channels of g^2

with ``loss`` the layer's mean squared output error a token, which every solver here reports. The number does not depend
on how the layer is quantized: it is measured once and serves every width, group size and method.

Neither the model nor a graph through it is ever held. :class:`Probe` takes a few rows forward block by block, keeping
what each block got; then backward from the head, where each block is run once more on one row at a time and
differentiated.

Cost, for P probe tokens and L blocks of F operations a token: about 3 F P L (two passes forward, one backward through
the activations; weights have no gradients), and reading the blocks twice. Memory: (L + 1) * P * hidden values in the
model's dtype, plus the graph of one row through one block. 1024 tokens are plenty: each number averages
1024 * out_features squares.

Not covered: interactions between layers (divergences of several quantized layers are taken to add up), and the
direction of the errors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from quantlab.models.block_inputs import BlockInputs
from quantlab.models.blockwise import BlockwiseModel, run_block
from quantlab.models.layers import linears, matrix
from quantlab.models.lm_head import head

ROWS, SEQ_LEN = 4, 256  # of the calibration rows, by default


def sensitivities(
    opened: BlockwiseModel, rows: torch.Tensor, *, seed: int = 0, advance: Callable[[int], None] | None = None
) -> dict[str, float]:
    """The sensitivity of every linear in the blocks, by its full name in the files. No block may be in memory.

    Args:
        rows: token ids int64 [rows, seq_len], of the text that the model is meant for.
        seed: of the labels drawn from the model's predictions.
        advance: called with 1 for every block gone through, twice the number of blocks in all.

    Raises:
        ValueError: the predictions or their gradients overflow.
    """
    hidden, calls = opened.inputs(rows)
    probe = Probe(hidden)
    for index, call in enumerate(calls):
        block = opened.block(index)
        probe.forward(block, call)
        opened.empty(block)
        if advance is not None:
            advance(1)
    with head(opened) as logits:
        probe.score(logits, seed)
    found = {}
    for index, call in reversed(list(enumerate(calls))):
        block = opened.block(index)
        for name, value in probe.backward(block, call).items():
            found[opened.names.on_disk(f"{opened.prefix}.{index}.{name}")] = value
        opened.empty(block)
        if advance is not None:
            advance(1)
    return dict(reversed(found.items()))


class Probe:
    """A few rows on their way through the model and back. BlockInputs ``forward`` for each block in order, ``score``
    once, and ``backward`` for each block in reverse order.

    ``hidden`` [rows, seq_len, hidden]: what the first block gets.
    """

    def __init__(self, hidden: torch.Tensor) -> None:
        self.states = [hidden.detach()]  # before each block gone through, and after the last one
        self._gradient: torch.Tensor | None = None  # of the states last in the list

    @torch.no_grad()
    def forward(self, block: nn.Module, call: BlockInputs) -> None:
        """Run the rows through the next block."""
        out = [
            run_block(block, row[None], call, rows=slice(i, i + 1)) for i, row in enumerate(self.states[-1])
        ]
        self.states.append(torch.cat(out))

    def score(self, logits: Callable[[torch.Tensor], torch.Tensor], seed: int = 0) -> None:
        """Draw a label for every token from the predictions, and start the gradients of their log-probabilities.

        Args:
            logits: from the hidden states after the last block [1, seq_len, hidden] to [1, seq_len, vocabulary].

        Raises:
            ValueError: the predictions are not finite.
        """
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same
        gradients = []
        for row in self.states.pop():
            with torch.enable_grad():
                leaf = row[None].clone().requires_grad_()
                scores = logits(leaf)[0].float().log_softmax(dim=-1)  # [seq_len, vocabulary]
                if not torch.isfinite(scores).all():
                    raise ValueError("the model's predictions are not finite: its activations overflow")
                labels = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator)
                gradients += torch.autograd.grad(scores.gather(1, labels.to(scores.device)).sum(), leaf)
        self._gradient = torch.cat(gradients)

    def backward(self, block: nn.Module, call: BlockInputs) -> dict[str, float]:
        """Take the gradients through the last block not yet gone back through.

        Returns:
            The sensitivity of each of its linears, by their names in the block. A layer that no token reached (an
            expert) gets the least of the others': zero would allow it any loss.
        """
        if self._gradient is None:
            raise RuntimeError("score comes before backward")
        states, gradient = self.states.pop(), self._gradient
        layers = linears(block)
        squares = dict.fromkeys(layers, 0.0)
        handles = [layer.register_forward_hook(_square(name, squares)) for name, layer in layers.items()]
        before = []
        try:
            for i, (row, behind) in enumerate(zip(states, gradient, strict=True)):
                with torch.enable_grad():
                    leaf = row[None].clone().requires_grad_()
                    out = run_block(block, leaf, call, rows=slice(i, i + 1))
                    before += torch.autograd.grad(out, leaf, behind[None])
        finally:
            for handle in handles:
                handle.remove()
        self._gradient = torch.cat(before)
        if not torch.isfinite(self._gradient).all():
            raise ValueError("the model's gradients overflow: compute in float32 or bfloat16")
        tokens = states.shape[0] * states.shape[1]
        found = {name: squares[name] / (2 * len(matrix(layers[name])) * tokens) for name in layers}
        least = min((value for value in found.values() if value > 0), default=0.0)
        return {name: value or least for name, value in found.items()}


def _square(
    name: str, squares: dict[str, float]
) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    """A forward hook that adds up the squared gradients of a layer's output."""

    def back(gradient: torch.Tensor) -> None:
        squares[name] += gradient.float().square().sum().item()

    def seen(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.requires_grad:  # an expert that gets no token of the row has no output to speak of
            output.register_hook(back)

    return seen
