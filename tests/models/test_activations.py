"""Hidden states in memory and in files are the same states; a kill leaves those before a block or after it; files do
not count as resident memory. Tensors read by position equal those of the safetensors library."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.errors import DataError, MachineError
from quantlab.models.activations import MARKER, Activations
from quantlab.models.memory import available, peak_resident, resident
from quantlab.models.safetensors.files import open_files, read_header
from quantlab.models.safetensors.tensors import read_rows, read_tensor

SHAPE = (7, 5, 6)
PARTS = [slice(0, 3), slice(3, 6), slice(6, 9)]


def states(seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fill(held: Activations, values: torch.Tensor) -> None:
    for part in PARTS:
        held.write(part, values[part])
    held.commit()


def whole(held: Activations) -> torch.Tensor:
    return torch.cat([held.read(part) for part in PARTS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spilled", [True, False])
def test_what_is_committed_is_read(tmp_path: Path, dtype: torch.dtype, spilled: bool) -> None:
    held = Activations.make(SHAPE, dtype, spill=tmp_path / "a" if spilled else None)
    for step in range(3):
        fill(held, states(step, dtype))
        assert held.step == step + 1
        assert whole(held).dtype == dtype and torch.equal(whole(held), states(step, dtype))
    held.close()


def test_a_block_in_the_middle_does_not_show(tmp_path: Path) -> None:
    """Before the commit the old states are read, by this process and by one that resumes."""
    held = Activations.make(SHAPE, torch.bfloat16, spill=tmp_path, key={"rows": "x"})
    fill(held, states(0))
    held.write(PARTS[0], states(1)[PARTS[0]])
    assert torch.equal(whole(held), states(0))
    again = Activations.resume(tmp_path, {"rows": "x"})
    assert again is not None and again.step == 1 and torch.equal(whole(again), states(0))
    for part in PARTS:  # the block is done again, in another order
        again.write(part, states(1)[part])
    again.commit()
    assert torch.equal(whole(again), states(1))


def test_copies_go_their_own_way(tmp_path: Path) -> None:
    for spill in (None, tmp_path / "one"):
        held = Activations.make(SHAPE, torch.float16, spill=spill)
        fill(held, states(0, torch.float16))
        for target in (None, tmp_path / f"two-{spill is None}"):
            other = held.copy(spill=target, key={"plan": "q"})
            assert other.step == held.step == 1
            fill(other, states(1, torch.float16))
            assert torch.equal(whole(held), states(0, torch.float16))
            assert torch.equal(whole(other), states(1, torch.float16))
            if target is not None:
                resumed = Activations.resume(target, {"plan": "q"})
                assert resumed is not None and resumed.step == 2


@pytest.mark.parametrize(
    "damage", ["other key", "no marker", "half a marker", "short file", "no file", "a list"]
)
def test_states_that_cannot_be_trusted_are_not_resumed(tmp_path: Path, damage: str) -> None:
    held = Activations.make(SHAPE, torch.bfloat16, spill=tmp_path, key={"rows": "x"})
    fill(held, states(0))
    held.close()
    marker = tmp_path / MARKER
    if damage == "no marker":
        marker.unlink()
    elif damage == "half a marker":
        marker.write_text(marker.read_text()[:20])
    elif damage == "a list":
        marker.write_text("[]")
    elif damage == "short file":
        os.truncate(tmp_path / "1", 10)
    elif damage == "no file":
        (tmp_path / "0").unlink()
    assert Activations.resume(tmp_path, {"rows": "y" if damage == "other key" else "x"}) is None


def test_misuse_is_refused(tmp_path: Path) -> None:
    held = Activations.make(SHAPE, torch.bfloat16, spill=tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        held.write(slice(0, 3), states(0)[:2])
    with pytest.raises(ValueError, match="contiguous"):
        held.read(slice(0, 4, 2))
    assert held.read(slice(5, 3)).shape == (0, 5, 6)


def test_a_full_disk_is_the_machines_fault(tmp_path: Path) -> None:
    """Two petabytes are on no disk here; nothing is left that looks like states."""
    with pytest.raises(MachineError, match="cannot keep hidden states"):
        Activations.make((2**20, 2**15, 2**15), torch.bfloat16, spill=tmp_path / "a")
    assert Activations.resume(tmp_path / "a", {}) is None


KILLED = """
import sys, torch
from pathlib import Path
from quantlab.models.activations import Activations
held = Activations.make((64, 16, 64), torch.float32, spill=Path(sys.argv[1]))
for step in range(100000):
    for row in range(0, 64, 4):
        held.write(slice(row, row + 4), torch.full((4, 16, 64), float(step)))
    held.commit()
    print(step, flush=True)
"""


def test_a_kill_never_leaves_a_mixture(tmp_path: Path) -> None:
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(5 + attempt):
            child.stdout.readline()
        time.sleep(0.003 * attempt)
        child.send_signal(signal.SIGKILL)
        last = max(map(int, child.stdout.read().split()), default=4 + attempt)
        child.wait()
        found = Activations.resume(folder, {})
        assert found is not None and found.step in (last + 1, last + 2)  # the print comes after the commit
        values = found.read(slice(None)).unique()
        assert values.tolist() == [found.step - 1.0]
        found.remove()
        assert not folder.exists()


RESIDENT = """
import sys, torch
from pathlib import Path
from quantlab.models.activations import Activations
from quantlab.models.memory import peak_resident, resident
held = Activations.make((64, 256, 1024), torch.float32, spill=Path(sys.argv[1]))  # 64 MiB a copy
block = torch.ones(2, 256, 1024)
before = resident()
for _ in range(2):
    for row in range(0, 64, 2):
        held.write(slice(row, row + 2), held.read(slice(row, row + 2)) + block)
    held.commit()
assert held.read(slice(62, 64))[1, 255, 1023] == 2
print(peak_resident() - before)
"""


def test_files_are_not_resident_memory(tmp_path: Path) -> None:
    """128 MiB of files pass through; the process grows by some slices of 2 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(tmp_path / "a")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 24 * 2**20


def test_tensors_by_position_equal_the_librarys(tmp_path: Path, tiny: Path) -> None:
    seeded = torch.Generator().manual_seed(0)
    stored = {
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
        "flag": torch.tensor([True, False, True]),
        "odd": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(5, 3, generator=seeded).to(torch.float16),
        "brain": torch.randn(5, 3, generator=seeded).to(torch.bfloat16),
        "long": torch.arange(6).reshape(2, 3),
        "words": torch.arange(6, dtype=torch.int32).reshape(3, 2),
    }
    save_file(stored, tmp_path / "t.safetensors", metadata={"format": "pt"})
    for name, info in read_header(tmp_path / "t.safetensors").items():
        found = read_tensor(info)
        assert found.dtype == stored[name].dtype and torch.equal(found, stored[name])
    expected = load_file(tiny / "model.safetensors")
    for name, info in open_files(tiny).tensors.items():
        assert torch.equal(read_tensor(info), expected[name])
    info = open_files(tiny).tensors["model.embed_tokens.weight"]
    assert torch.equal(read_tensor(info, slice(10, 20)), expected[info.name][10:20])
    ids = torch.tensor([[5, 0, 5], [256, 1, 2]])
    assert torch.equal(read_rows(info, ids), expected[info.name][ids])


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    info = read_header(path)["a"]
    assert read_tensor(info).sum() == 1000
    os.truncate(path, 1000)
    with pytest.raises(DataError, match=r"t\.safetensors"):
        read_tensor(info)
    save_file({"a": torch.ones(10)}, path)
    with pytest.raises(DataError, match="changed"):
        read_tensor(info)
    header = json.dumps({"b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(DataError, match="holds no tensor a"):
        read_tensor(info)
    path.unlink()
    with pytest.raises(DataError, match="cannot read"):
        read_tensor(info)


def test_memory_is_told() -> None:
    assert 2**20 < resident() <= peak_resident() + 2**22
    assert 0 < available() < 2**50
