"""The original's next-token distributions, kept on disk, so that a model is compared without the original in memory.

One store holds one text's windows for one original, in `$QUANTLAB_CACHE/reference-logprobs/<key>/`: `index.json` and
safetensors, one a batch of windows. The tail of a vocabulary is long (of 49,152 tokens it takes 25,000 to gather 99.99
% of the probability), so every token is kept: how far its log-probability lies below the largest one's, in steps of
`STEP` = 2^-11 nats. That is 16 bits, of which the lower 8 are kept only for the most likely tokens, those that have
together all of the probability but `TAIL` = 0.01 %:

==========  ====================  ===============================================================================
`coarse`    uint8 [P, vocabulary]  the upper 8 bits: steps of `BIN` = 1/8 nat; 255: 32 nats or more, taken as never
`fine`      uint8 [K]              the lower 8 bits of tokens with `coarse` < `cut`, position by position
`cut`       int16 [P]              see there
`top`       float32 [P]            the largest log-probability
`best`      int32 [P]              its token
`tail`      float32 [P]            log of the probability of all tokens without lower bits
`own`       float32 [P]            divergence of what is stored from what it was
==========  ====================  ===============================================================================

The index holds, exactly, the original's own losses of each window, and where its lower bits begin.

**Error.** With p^ for what is stored of p, KL(p^ || q) - KL(p || q) = KL(p^ || p) + sum (p^ - p) log(p / q). The first
term does not depend on q: it is computed when p is at hand, kept (`own`) and taken off. What remains has no preferred
sign: a log-probability is off by at most STEP / 2 (of tokens in the tail BIN / 2, scaled so that the tail's probability
is exact), so it is at most 0.00024 times the mean of |log(p / q) - KL| over p, and 0.000006 times that over the tail,
at one position, and little of that stays over thousands. What was measured on real models is in
docs/explanation/measures.md.

A store's key names everything that the numbers come from: weights and configuration, the windows' tokens, the type
computed in, the kind of device, the versions of torch and transformers, this format. Stores are written beside and
renamed. All together take at most `LARGEST` bytes: the one unused longest goes first, and a text that alone would need
more is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantlab.errors import DataError, MachineError
from quantlab.paths import atomic_write_text, cache_folder, short_hash

FORMAT = "quantlab-reference-logprobs-1"
FOLDER = "reference-logprobs"
INDEX = "index.json"
TAIL = 1e-4  # probability of the tokens that are kept in 8 bits
STEP = 2.0**-11  # nats
BIN = 256 * STEP
NEVER = 255  # `coarse` of tokens that the original all but rules out
LARGEST = 2**33  # bytes of all stores together
ABANDONED = 86400  # seconds after which an unfinished store is nobody's
VALUES_AT_ONCE = 2**22  # logits worked on at a time, in float32


class Kept(NamedTuple):
    """Distributions of P positions, as stored; see the table above."""

    coarse: torch.Tensor
    fine: torch.Tensor
    cut: torch.Tensor
    top: torch.Tensor
    best: torch.Tensor
    tail: torch.Tensor
    own: torch.Tensor


def positions_at_once(vocabulary: int) -> int:
    """Positions to work on at a time, so that copies of their logits in float32 stay small."""
    return max(1, min(256, VALUES_AT_ONCE // vocabulary))


def compress(logits: torch.Tensor) -> Kept:
    """The distributions that `logits` [positions, vocabulary] give, in the form that is stored (on the CPU)."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    best = logits.argmax(dim=-1)
    top = log_p.gather(1, best[:, None])  # [positions, 1]
    codes = ((top - log_p) / STEP).round_().clamp_(0, 2**16 - 1).to(torch.int32)
    coarse, fine = codes >> 8, (codes & 255).to(torch.uint8)
    mass = torch.zeros(len(logits), NEVER + 1, dtype=torch.float32, device=logits.device)
    mass.scatter_add_(1, coarse.long(), log_p.exp())
    below = mass.flip(-1).cumsum(-1).flip(-1)  # [positions, bins]: probability of a bin and all deeper ones
    cut = (below > TAIL).sum(dim=-1).clamp_max(NEVER)
    exact = coarse < cut[:, None]
    rest = log_p.masked_fill(exact | (coarse == NEVER), -torch.inf)
    kept = Kept(
        coarse.to(torch.uint8).cpu(),
        fine[exact].cpu(),
        cut.to(torch.int16).cpu(),
        top[:, 0].cpu(),
        best.to(torch.int32).cpu(),
        rest.logsumexp(dim=-1).cpu(),
        torch.zeros(len(logits)),
    )
    return kept._replace(own=_expected(expand(kept, logits.device), log_p).cpu())


def expand(kept: Kept, device: str | torch.device = "cpu") -> torch.Tensor:
    """The log-probabilities float32 [positions, vocabulary] that are stored; they sum to one."""
    coarse, cut = kept.coarse.to(device), kept.cut.to(device)
    top, tail = kept.top.to(device)[:, None], kept.tail.to(device)[:, None]
    log_p = top - (coarse.float() * BIN + BIN / 2)
    log_p.masked_fill_(coarse == NEVER, -torch.inf)
    exact = coarse < cut[:, None]
    lowest = log_p.masked_fill(exact, -torch.inf)
    log_p += torch.where(tail > -torch.inf, tail - lowest.logsumexp(dim=-1, keepdim=True), 0.0)
    del lowest
    log_p[exact] = (top - coarse.float() * BIN)[exact] - STEP * kept.fine.to(device).float()
    return log_p - log_p.logsumexp(dim=-1, keepdim=True)


def divergence_from(kept: Kept, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(kept || softmax(logits)) in nats, and whether the most likely token is the same, for `logits` [positions,
    vocabulary]; float32 and bool [positions], on the CPU. DataError where the vocabularies have different sizes."""
    if kept.coarse.shape[-1] != logits.shape[-1]:
        raise DataError(
            f"the models have {kept.coarse.shape[-1]} and {logits.shape[-1]} tokens in their vocabularies: "
            "nothing to compare"
        )
    kl = _expected(expand(kept, logits.device), torch.log_softmax(logits.float(), dim=-1)).cpu()
    return (kl - kept.own).clamp_min(0.0), kept.best.to(torch.int64) == logits.argmax(dim=-1).cpu()


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats of log-probabilities [..., vocabulary] → [...]; what p rules out adds nothing."""
    # The divergence is never negative; rounding is.
    return _expected(log_p, log_q).clamp_min(0.0)


def _expected(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """The same with its rounding, which may be below zero: what is taken off must not be one-sided."""
    terms = log_p.exp() * (log_p - log_q)
    # A token the original rules out (p = 0) adds nothing, whatever the other model thinks of it.
    terms = torch.where(log_p == -torch.inf, torch.zeros_like(terms), terms)
    return terms.sum(dim=-1)


def window_digest(ids: torch.Tensor) -> str:
    """16 hexadecimal characters for the tokens of windows [windows, seq_len]."""
    shape = " ".join(map(str, ids.shape))
    content = ids.to(torch.int64).cpu().contiguous().numpy().astype("<i8").tobytes()
    return hashlib.sha256(shape.encode() + content).hexdigest()[:16]


def store_key(model_digest: str, ids: torch.Tensor, dtype: str, device: str) -> str:
    """Names a store: everything that the numbers in it come from."""
    libraries = [f"{name}={version(name)}" for name in ("torch", "transformers")]
    return short_hash([FORMAT, model_digest, window_digest(ids), dtype, device.partition(":")[0], *libraries])


def folder() -> Path:
    """Where stores are."""
    return cache_folder() / FOLDER


class Store:
    """A finished store, read window by window. `about` is what was written with it: see `Writer.finish`."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where there is none or it is damaged."""
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise ValueError(f"not {FORMAT}")
            self.about: dict[str, Any] = dict(index["about"])
            self.nll: list[float] = []  # of each window, the sum of -log p of its tokens
            self.nbytes = 0
            self._places: list[
                tuple[str, int, int, int]
            ] = []  # shard, number in it, windows in it, first fine
            for shard in index["shards"]:
                name, starts = str(shard["file"]), [int(start) for start in shard["starts"]]
                size = (path / Path(name).name).stat().st_size
                if size != shard["bytes"] or len(starts) != len(shard["nll"]) or Path(name).name != name:
                    raise ValueError(f"{name} is not as it was written")
                self.nbytes += size
                self.nll += [float(value) for value in shard["nll"]]
                self._places += [(name, at, len(starts), start) for at, start in enumerate(starts)]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} holds no log-probabilities: {error!r}", hint="delete it") from error
        self.path = path

    def touch(self) -> None:
        """Note that it was used; the store unused longest is the first to go."""
        with contextlib.suppress(OSError):  # somebody else's cache
            os.utime(self.path / INDEX)

    def window(self, number: int, positions: int) -> Iterator[tuple[int, Kept]]:
        """The distributions of one window, `positions` at a time, each with the number of its first position; no more
        of the file is read. DataError where it is damaged."""
        from safetensors import SafetensorError, safe_open

        name, at, count, low = self._places[number]
        try:
            with safe_open(self.path / name, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in Kept._fields}
                size = slices["coarse"].get_shape()[0] // count
                for start in range(at * size, (at + 1) * size, positions):
                    rows = slice(start, min(start + positions, (at + 1) * size))
                    coarse, cut = slices["coarse"][rows], slices["cut"][rows]
                    high = low + int((coarse < cut[:, None]).sum())
                    rest = (slices[key][rows] for key in ("top", "best", "tail", "own"))
                    yield start - at * size, Kept(coarse, slices["fine"][low:high], cut, *rest)
                    low = high
        except (OSError, SafetensorError, ValueError, IndexError) as error:
            raise DataError(
                f"{self.path / name} cannot be read: {error}", hint=f"delete {self.path}; it is made again"
            ) from error


class CannotKeep(Exception):
    """A store cannot be written: it would be too large, or the disk takes no more. The text says which."""


class Writer:
    """A store in the making, beside its place; `finish` renames it. As a context it removes what was not finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        except OSError as error:
            raise CannotKeep(str(error)) from error
        self._shards: list[dict[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._beside, ignore_errors=True)

    def add(self, windows: Sequence[Sequence[Kept]], nll: Sequence[float]) -> None:
        """A batch of windows, the positions of each in one or more parts, and the original's losses, a sum a window.
        Raises CannotKeep."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        parts = [part for window in windows for part in window]
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in Kept._fields}
        sizes = [sum(len(part.fine) for part in window) for window in windows]
        file = self._beside / f"{len(self._shards):05d}.safetensors"
        try:
            save_file(tensors, file)
        except (OSError, SafetensorError) as error:
            raise CannotKeep(str(error)) from error
        size = file.stat().st_size
        starts = [sum(sizes[:at]) for at in range(len(sizes))]
        self._shards.append({"file": file.name, "bytes": size, "nll": list(nll), "starts": starts})
        self._bytes += size
        if self._bytes > LARGEST:
            raise CannotKeep(f"more than {LARGEST / 2**30:.0f} GiB")

    def draft(self) -> Store:
        """What was added so far, to be read before it is finished."""
        self._write_index({})
        return Store(self._beside)

    def finish(self, about: dict[str, Any]) -> Store:
        """Write the index, with `about` in it, and rename into place; where another process was first, its store is
        taken."""
        self._write_index(about)
        try:
            Store(self.path)
        except DataError:  # none, or a damaged one
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was first after all
                self._beside.rename(self.path)
        make_room(self.path)
        return Store(self.path)

    def _write_index(self, about: dict[str, Any]) -> None:
        index = {"format": FORMAT, "about": about, "shards": self._shards}
        try:
            atomic_write_text(self._beside / INDEX, json.dumps(index, ensure_ascii=False) + "\n")
        except MachineError as error:
            raise CannotKeep(str(error)) from error


def make_room(kept: Path) -> None:
    """Remove stores, unused longest first, until all together have at most `LARGEST` bytes; never `kept`."""
    for part in kept.parent.glob(".*.part"):  # of processes that were killed
        if time.time() - part.stat().st_mtime > ABANDONED:
            shutil.rmtree(part, ignore_errors=True)
    sizes = dict(_sizes(kept.parent))
    total = sum(size for size, _ in sizes.values())
    for path, (size, _) in sorted(sizes.items(), key=lambda pair: pair[1][1]):
        if total > LARGEST and path != kept:
            shutil.rmtree(path, ignore_errors=True)
            total -= size


def _sizes(place: Path) -> Iterator[tuple[Path, tuple[int, float]]]:
    """(store, (bytes, when it was used last)) of every finished store."""
    for path in place.glob(f"[!.]*/{INDEX}"):
        try:
            size = sum(file.stat().st_size for file in path.parent.iterdir())
            yield path.parent, (size, path.stat().st_mtime)
        except OSError:  # removed meanwhile
            continue
