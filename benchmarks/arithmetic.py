"""What quantizing a Llama by GPTQ has to compute at least, and how long that takes at given rates of matrix products.

Counted are operations of matrix products (a multiplication and an addition are two), a block at a time: one forward
pass over the calibration tokens in 16 bits, with causal attention's lower half alone; second moments of the four
distinct inputs, one half of each symmetric matrix; and the solves, in which every weight is corrected by half of the
columns on average, a factorisation and a triangular inverse. The last two are done in float32. Reading, packing and
writing, and everything elementwise, are what a measured time has beyond this floor.
"""

from __future__ import annotations

from dataclasses import dataclass

from random_llama import Shape


@dataclass(frozen=True)
class Operations:
    """Of one block: in 16 bits, and in float32."""

    forward: float
    moments: float
    solving: float

    def seconds(self, half: float, single: float) -> float:
        """At ``half`` and ``single`` operations a second in 16 bits and in float32."""
        return self.forward / half + (self.moments + self.solving) / single


def solves(shape: Shape) -> dict[str, tuple[int, int]]:
    """Rows and columns of a block's four solves: layers of one input are one matrix."""
    kv = shape.kv_heads * shape.head_dim
    return {
        "q, k, v": (shape.hidden + 2 * kv, shape.hidden),
        "o": (shape.hidden, shape.hidden),
        "gate, up": (2 * shape.ffn, shape.hidden),
        "down": (shape.hidden, shape.ffn),
    }


def operations(shape: Shape, rows: int, seq_len: int) -> Operations:
    """Of one block, for ``rows`` calibration rows of ``seq_len`` tokens."""
    tokens, matrices = rows * seq_len, list(solves(shape).values())
    weights = sum(out * columns for out, columns in matrices)
    attention = 2 * tokens * seq_len * shape.hidden  # scores and values, 2 each, half of them masked
    return Operations(
        forward=2.0 * tokens * weights + attention,
        moments=float(tokens * sum(columns**2 for _, columns in matrices)),
        solving=sum(out * columns**2 + 2 / 3 * columns**3 for out, columns in matrices),
    )
