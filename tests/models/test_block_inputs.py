"""What blocks get besides hidden states: the same for every row, wanted once for each, or a row's own."""

from __future__ import annotations

import pytest
import torch

from quantlab.models.block_inputs import Dependent, PerRow, Repeated, record

TABLE, HEADS = torch.arange(6.0).view(1, 2, 3), torch.arange(8.0).view(4, 1, 2)


def call(rows: int, *, start: float = 0.0) -> list[tuple[tuple[object, ...], dict[str, object]]]:
    """Two blocks' arguments: a table, biases for every head of every row, something of each row's own, a flag."""
    own = torch.arange(rows, dtype=torch.float32)[:, None] + start
    return [
        ((TABLE.clone(),), {"bias": HEADS.repeat(rows, 1, 1), "own": own, "pair": (None, True)})
        for _ in range(2)
    ]


def test_each_kind_is_told_and_handed_out() -> None:
    first, second = call(1), call(1, start=1.0)
    found = record(first, second, call(2))
    args, keys = found[0].of(3)
    assert torch.equal(args[0], TABLE) and keys["pair"] == (None, True)
    assert torch.equal(keys["bias"], HEADS.repeat(3, 1, 1))
    assert torch.equal(keys["own"], torch.tensor([[0.0], [1.0], [0.0]]))  # over again
    assert torch.equal(found[0].of(1, slice(1, 2))[1]["own"], torch.tensor([[1.0]]))
    assert [type(v) for v in (found[0].kwargs["bias"], found[0].kwargs["own"])] == [Repeated, PerRow]
    assert len(found[1].own) == 1 and found[0].own[0].values.shape == (2, 1)


def test_equal_tensors_are_kept_once() -> None:
    found = record(call(1), call(1, start=1.0), call(2))
    assert found[0].args[0] is found[1].args[0]
    assert found[0].kwargs["bias"].one is found[1].kwargs["bias"].one


def test_one_row_is_expanded_without_memory() -> None:
    mask = torch.zeros(1, 1, 5, 5)
    found = record([((), {"m": mask})], [((), {"m": mask + 0})], [((), {"m": mask.repeat(2, 1, 1, 1)})])[0]
    given = found.of(7)[1]["m"]
    assert given.shape == (7, 1, 5, 5) and given.data_ptr() == found.kwargs["m"].one.data_ptr()


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2)),  # one shape for any rows, other values
        (torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(3, 2)),
        (torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(2, 2)),
        (torch.zeros(1, 2), None, torch.zeros(2, 2)),
        (torch.tensor(1.0), torch.tensor(1.0), torch.zeros(2)),
    ],
)
def test_what_cannot_be_followed_is_refused(one: object, other: object, both: object) -> None:
    with pytest.raises(Dependent):
        record([((), {"x": one})], [((), {"x": other})], [((), {"x": both})])
    with pytest.raises(Dependent):
        record([((), {})], [], [((), {})])
