"""Hidden states on their way through a model, in memory or in files, and safe against a kill.

A walk through the blocks reads the states before a block slice by slice, writes those after it, and then commits.
In memory both are one tensor that is overwritten. On disk they are two files that take turns: what is written goes to
the other file, and only ``commit`` makes it the current one, by renaming a small marker into place once the data is
on the disk. A run killed at any moment therefore finds the states before some block or after it, never a mixture, and
goes on there instead of running every block before it again.

Files are read and written at positions, into memory of one slice: a mapped file's touched pages would count as
resident memory, which is what spilling is for avoiding.

Not covered: compressing the states (bfloat16 stays bfloat16), more than one writer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from quantlab.errors import DataError, MachineError
from quantlab.models.safetensors.durable import sync_folder
from quantlab.models.safetensors.tensors import read_exactly
from quantlab.paths import atomic_write_text

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}
MARKER = "activations.json"
WINDOW = 32 * 2**20  # bytes moved at once when all of it is copied


class Activations:
    """Hidden states [rows, seq_len, hidden] after ``step`` blocks. Make them with :meth:`make` or :meth:`resume`.

    Every slice is read before it is written; slices of one step may come in any order.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        folder: Path | None,
        key: Mapping[str, str],
        step: int = 0,
        current: int = 0,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.folder, self.key, self.step = folder, dict(key), step
        self._current = current
        self._memory: torch.Tensor | None = None
        self._files: list[int] = []
        if folder is None:
            self._memory = torch.empty(shape, dtype=dtype, device=device)

    @classmethod
    def make(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        spill: Path | None = None,
        device: torch.device | str = "cpu",
        key: Mapping[str, str] | None = None,
    ) -> Activations:
        """Room for states, to be written and committed.

        Args:
            shape: (rows, seq_len, hidden).
            spill: a folder of its own for the files, made anew; None keeps them in memory.
            device: where slices are handed out, and where states in memory live.
            key: what a later :meth:`resume` must have in common (digests of model, rows and, where states depend on
                it, recipe).

        Raises:
            MachineError: the disk has no room for two copies.
        """
        found = cls(shape, dtype, torch.device(device), folder=spill, key=key or {})
        if spill is not None:
            if DTYPES.get(str(dtype).removeprefix("torch.")) is not dtype:
                raise ValueError(f"hidden states in {dtype} cannot be kept in a file")
            if spill.exists():
                shutil.rmtree(spill)
            found._open(make=True)
        return found

    @classmethod
    def resume(
        cls, spill: Path, key: Mapping[str, str], *, device: torch.device | str = "cpu"
    ) -> Activations | None:
        """The states that an interrupted run committed last, or None where it left none with this ``key``."""
        try:
            marker = json.loads((spill / MARKER).read_text(encoding="utf-8"))
            if marker["key"] != dict(key):
                return None
            shape, dtype = tuple(marker["shape"]), DTYPES[marker["dtype"]]
            found = cls(
                shape, dtype, torch.device(device), folder=spill, key=key,
                step=int(marker["step"]), current=int(marker["current"]),
            )  # fmt: skip
            if any((spill / str(i)).stat().st_size != found.size_bytes for i in (0, 1)):
                return None
            found._open(make=False)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found

    @property
    def on_disk(self) -> bool:
        return self.folder is not None

    @property
    def size_bytes(self) -> int:
        """Bytes of one copy; on disk there are two."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, part: slice) -> torch.Tensor:
        """States before the block being done: rows ``part`` [n, seq_len, hidden] on ``device``. In memory a view."""
        if self._memory is not None:
            return self._memory[part]
        first, last = self._rows(part)
        width = self.size_bytes // max(len(self), 1)
        data = torch.empty((last - first) * width, dtype=torch.uint8)
        done = read_exactly(self._files[self._current], data, first * width)
        if done < len(data):
            raise DataError(f"{self.folder}: the file of hidden states ends early")
        return data.view(self.dtype).reshape(last - first, *self.shape[1:]).to(self.device)

    def write(self, part: slice, states: torch.Tensor) -> None:
        """States after the block being done, for rows ``part``. They count from the next :meth:`commit`.

        Raises:
            MachineError: the disk is full.
        """
        if self._memory is not None:
            self._memory[part] = states
            return
        first, last = self._rows(part)
        if tuple(states.shape) != (last - first, *self.shape[1:]):
            raise ValueError(f"{tuple(states.shape)} does not fit rows {first} to {last} of {self.shape}")
        width = self.size_bytes // max(len(self), 1)
        plain = states.detach().to("cpu", self.dtype).contiguous()
        view = memoryview(plain.view(torch.uint8).reshape(-1).numpy())
        done = 0
        with self._disk_errors():
            while done < len(view):
                done += os.pwritev(self._files[1 - self._current], [view[done:]], first * width + done)

    def commit(self) -> None:
        """What was written becomes what is read; ``step`` grows by one. On disk also across a kill or a power cut."""
        if self.folder is not None:
            with self._disk_errors():
                os.fsync(self._files[1 - self._current])
            self._mark(self.step + 1, 1 - self._current)
        self.step += 1
        self._current = 1 - self._current

    def copy(self, *, spill: Path | None = None, key: Mapping[str, str] | None = None) -> Activations:
        """The current states once more, in memory or in files, for a stream that goes its own way from here."""
        found = Activations.make(
            self.shape, self.dtype, spill=spill, device=self.device, key=self.key if key is None else key
        )
        found.step = self.step - 1  # the commit below makes them equal
        rows = max(1, WINDOW * len(self) // max(self.size_bytes, 1))
        for start in range(0, len(self), rows):
            part = slice(start, min(start + rows, len(self)))
            found.write(part, self.read(part))
        found.commit()
        return found

    def close(self) -> None:
        """Close the files, which stay for :meth:`resume`; memory is given back."""
        for fd in self._files:
            os.close(fd)
        self._files, self._memory = [], None

    def remove(self) -> None:
        """Close, and delete the files."""
        self.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _rows(self, part: slice) -> tuple[int, int]:
        first, last, step = part.indices(len(self))
        if step != 1:
            raise ValueError("rows must be contiguous")
        return first, max(first, last)

    def _open(self, *, make: bool) -> None:
        assert self.folder is not None
        with self._disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("0", "1"):
                self._files.append(os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644))
            if make and self.size_bytes:
                reserve = getattr(os, "posix_fallocate", None)
                for fd in self._files:  # a disk too small is known now, not in the middle of the walk
                    os.truncate(fd, self.size_bytes)
                    if reserve is not None:
                        reserve(fd, 0, self.size_bytes)

    def _mark(self, step: int, current: int) -> None:
        assert self.folder is not None
        marker = {
            "key": self.key,
            "step": step,
            "current": current,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        atomic_write_text(self.folder / MARKER, json.dumps(marker))
        sync_folder(self.folder)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise MachineError(
                f"cannot keep hidden states in {self.folder} (two copies of {self.size_bytes / 1e9:.2f} GB): "
                f"{error.strerror or error}",
                hint="free some space, or raise --memory-limit so that they stay in memory" if full else "",
            ) from error
