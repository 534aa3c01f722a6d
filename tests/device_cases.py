"""Operations on tensors of two devices, and whether CUDA runs them: the ground truth for ``fake_cuda``.

Each takes ``there``, which puts a tensor on the GPU, and raises or not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Case = Callable[[Callable[[Tensor], Tensor]], object]


def _assign(target: Tensor, index: object, value: object) -> None:
    target[index] = value


def _two() -> Tensor:
    return torch.tensor([0, 1])


REFUSED: dict[str, Case] = {
    "a sum": lambda there: there(torch.ones(4)) + torch.ones(4),
    "a sum with one element": lambda there: there(torch.ones(4)) + torch.ones(1),
    "a CPU sum with a number of the GPU": lambda there: torch.ones(4) + there(torch.tensor(2.0)),
    "a sum in place": lambda there: there(torch.ones(4)).add_(torch.ones(4)),
    "a product": lambda there: there(torch.ones(4, 4)) @ torch.ones(4, 4),
    "a product added": lambda there: there(torch.ones(4, 4)).addmm_(torch.ones(4, 4), torch.ones(4, 4)),
    "an outer product added": lambda there: there(torch.ones(4, 4)).addr_(torch.ones(4), torch.ones(4)),
    "a choice": lambda there: torch.where(there(torch.ones(4)) > 0, there(torch.ones(4)), torch.ones(4)),
    "a mask of the CPU": lambda there: there(torch.ones(4)).masked_fill(torch.ones(4) > 0, 0.0),
    "pieces put together": lambda there: torch.cat([there(torch.ones(4)), torch.ones(4)]),
    "a pile": lambda there: torch.stack([there(torch.ones(4)), torch.ones(4)]),
    "a question of equality": lambda there: torch.equal(there(torch.ones(4)), torch.ones(4)),
    "an index of the GPU into the CPU": lambda there: torch.ones(4)[there(_two())],
    "an assignment at indices": lambda there: _assign(there(torch.ones(4)), there(_two()), torch.ones(2)),
    "an addition at CPU indices": lambda there: there(torch.ones(4)).index_add_(
        0, _two(), there(torch.ones(2))
    ),
    "a gathering by CPU indices": lambda there: there(torch.ones(4)).gather(0, _two()),
    "rows looked up by CPU indices": lambda there: torch.nn.functional.embedding(
        _two(), there(torch.ones(4, 2))
    ),
    "a triangular system": lambda there: torch.linalg.solve_triangular(
        there(torch.eye(4)), torch.ones(4, 4), upper=True
    ),
    "an array of numpy": lambda there: there(torch.ones(4)).numpy(),
}

ALLOWED: dict[str, Case] = {
    "a number of the CPU": lambda there: there(torch.ones(4)) * torch.tensor(2.0),
    "a choice between it and a number": lambda there: torch.where(
        there(torch.ones(4)) > 0, there(torch.ones(4)), torch.tensor(0.0)
    ),
    "CPU indices": lambda there: there(torch.ones(4))[_two()],
    "a CPU mask as an index": lambda there: there(torch.ones(4))[torch.ones(4) > 0],
    "a copy": lambda there: there(torch.ones(4)).copy_(torch.zeros(4)),
    "an assignment to a slice": lambda there: _assign(there(torch.ones(4)), slice(2), torch.zeros(2)),
    "a number assigned at CPU indices": lambda there: _assign(
        there(torch.ones(4)), _two(), torch.tensor(0.0)
    ),
    "a move back": lambda there: there(torch.ones(4)).cpu() + torch.ones(4),
    "a move to where another is": lambda there: torch.ones(4).to(there(torch.ones(1))) + there(torch.ones(4)),
    "a list": lambda there: there(torch.ones(4)).tolist(),
}
