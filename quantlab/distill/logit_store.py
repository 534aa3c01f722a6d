"""A store of top-k log-probabilities: a directory that is read lazily and written shard by shard.

`index.json` says what the values were taken from and lists the shards, which are safetensors:

==========  ==================  ========================================================================
`logprobs`  float16 [P, K + 1]  the K largest log-probabilities, descending, then that of all other tokens
`indices`   uint16 [P, K]       the tokens (int32 where the vocabulary has more than 65536)
`digests`   uint8 [E, 32]       SHA-256 of each example, its tokens and positions
`counts`    int32 [E]           positions of each example; their rows follow one another
==========  ==================  ========================================================================

So 64 tokens a position take 258 bytes, or 386 with a large vocabulary, against 600 KB for all logits of 150,000.

**float16.** A log-probability l is off by some d of at most |l| / 2048, half a unit in the last place (below 6e-5, by
3e-8): a probability of 0.9 by 5e-5 of itself, one of e^-10 by 0.5 %. Since buckets are scaled to sum to one again, the
forward KL moves by sum p d (log(p / q) - KL), the reverse KL by sum (p - q) d: about 1e-3 nats for distributions of a
few nats of entropy, less where student and teacher are alike. The rest is stored, not derived: 1 - sum of rounded
values would have lost every rest below 1e-3.

Shards are written beside and renamed, then the index: a kill leaves a store from which writing goes on. Examples are
known by their content, so neither their order nor a shuffle nor a subset matters, and new ones can be added.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantlab.errors import DataError, MachineError
from quantlab.paths import atomic_write_text

FORMAT = "quantlab-top-logits-1"
INDEX = "index.json"
LOWEST = -65504.0  # of float16
AGAIN = "delete it; what it held is gathered again"


def example_digest(input_ids: Sequence[int], positions: Sequence[int]) -> bytes:
    """SHA-256 (32 bytes) of an example's content."""
    values = torch.tensor([len(input_ids), *input_ids, *positions], dtype=torch.int64)
    return hashlib.sha256(values.numpy().astype("<i8").tobytes()).digest()


class TopLogits:
    """A store, read lazily: only the rows that are looked up leave the disk.

    `identity` is what the values were taken from; `vocabulary` how many logits of the student they compare with.
    """

    def __init__(self, path: Path, index: Mapping[str, Any]) -> None:
        self.path = path
        self.identity: dict[str, str] = dict(index["identity"])
        self.top_k = int(self.identity["top_k"])
        self.temperature = float(self.identity["temperature"])
        self.vocabulary = int(self.identity["vocabulary"])
        self._files = [shard["file"] for shard in index["shards"]]
        self._open: dict[int, Any] = {}
        self._places: list[tuple[int, int, int]] = []  # shard, first row, rows; by number of example
        self._numbers: dict[bytes, int] = {}
        for shard in range(len(self._files)):
            self._read_places(shard)

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, str] | None = None) -> TopLogits:
        """Open a store; with `identity`, only one that agrees with it on every key it has.

        Raises:
            DataError: there is none, it is damaged, or it was made from something else.
        """
        index = read_index(path, missing_ok=False)
        if identity is not None:
            known = {key: index["identity"].get(key) for key in identity}
            check_identity(path, known, {key: str(value) for key, value in identity.items()})
        return cls(path, index)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._numbers

    def number(self, input_ids: Sequence[int], positions: Sequence[int]) -> int:
        """The number of an example in this store. DataError where it was not gathered."""
        found = self._numbers.get(example_digest(input_ids, positions))
        if found is None:
            raise DataError(
                f"{self.path}: no log-probabilities of an example of {len(input_ids)} tokens and "
                f"{len(positions)} positions that begins with tokens {list(input_ids[:8])}",
                hint="gather again with the same tokenizer and max_len; what is there is kept",
            )
        return found

    def lookup(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities float32 [positions, K + 1] (the last column is the rest's) and tokens int64
        [positions, K] of example `number`, in the order of its positions."""
        shard, start, count = self._places[number]
        stream = self._stream(shard)
        values = stream.get_slice("logprobs")[start : start + count]
        indices = stream.get_slice("indices")[start : start + count]
        return values.to(torch.float32), indices.to(torch.int64)

    def _stream(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = _open_shard(self.path / self._files[shard])
        return self._open[shard]

    def _read_places(self, shard: int) -> None:
        stream = self._stream(shard)
        digests = stream.get_tensor("digests").numpy()
        start = 0
        for digest, count in zip(digests, stream.get_tensor("counts").tolist(), strict=True):
            self._numbers.setdefault(digest.tobytes(), len(self._places))
            self._places.append((shard, start, count))
            start += count


class Writer:
    """Collects rows and writes them as the next shard."""

    def __init__(self, path: Path, index: dict[str, Any], vocabulary: int) -> None:
        self.path, self.index = path, index
        self.indices_dtype = torch.uint16 if vocabulary <= 2**16 else torch.int32
        self._clear()

    def _clear(self) -> None:
        self.digests: list[tuple[bytes, int]] = []
        self.values: list[torch.Tensor] = []
        self.indices: list[torch.Tensor] = []
        self.positions = 0
        self.started = time.monotonic()

    def age(self) -> float:
        return time.monotonic() - self.started

    def add(self, counts: Sequence[tuple[bytes, int]], logprobs: torch.Tensor, indices: torch.Tensor) -> None:
        """Digest and number of positions of each example; log-probabilities [P, K + 1], tokens [P, K]."""
        self.digests += counts
        # clamped: a probability of zero stays a number, and losses finite
        self.values.append(logprobs.clamp_min(LOWEST).to(torch.float16))
        self.indices.append(indices.to(torch.int32).to(self.indices_dtype))
        self.positions += len(logprobs)

    def flush(self) -> None:
        if not self.digests:
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        names = hashlib.sha256(b"".join(digest for digest, _ in self.digests)).hexdigest()[:16]
        target = self.path / f"shard-{names}.safetensors"
        beside = target.with_suffix(".part")
        tensors = {
            "logprobs": torch.cat(self.values),
            "indices": torch.cat(self.indices),
            "digests": torch.tensor([list(digest) for digest, _ in self.digests], dtype=torch.uint8),
            "counts": torch.tensor([count for _, count in self.digests], dtype=torch.int32),
        }
        try:
            save_file(tensors, beside, metadata={"format": FORMAT})
            beside.replace(target)
        except (OSError, SafetensorError) as error:
            raise MachineError(f"cannot write {target}: {error}", hint="is the disk full?") from error
        entry = {"file": target.name, "examples": len(self.digests), "positions": self.positions}
        self.index["shards"].append(entry)
        write_index(self.path, self.index)
        self._clear()


def write_index(path: Path, index: Mapping[str, Any]) -> None:
    atomic_write_text(path / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n")


def read_index(path: Path, *, missing_ok: bool) -> dict[str, Any]:
    """The index of a store; empty where there is none and that is fine. DataError where it is missing or damaged."""
    file = path / INDEX
    try:
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}, not {FORMAT!r}")
        numbers = [float(index["identity"][key]) for key in ("top_k", "temperature", "vocabulary")]
        files = [Path(shard["file"]).name for shard in index["shards"]]
        if min(numbers) <= 0 or files != [shard["file"] for shard in index["shards"]]:
            raise ValueError("numbers or file names that no store has")
    except FileNotFoundError as error:
        if missing_ok:
            return {}
        raise DataError(f"{path} holds no log-probabilities: it has no {INDEX}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file} is damaged: {error!r}", hint=f"delete {path}; it is made again") from error
    return index


def check_identity(path: Path, found: Mapping[str, Any], wanted: Mapping[str, str]) -> None:
    """DataError that names every key on which a store is not what is wanted."""
    differing = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    if differing:
        told = "; ".join(
            f"{key} is {found.get(key, 'unknown')}, not {wanted.get(key, 'unknown')}" for key in differing
        )
        raise DataError(
            f"{path} holds other log-probabilities than asked for: {told}",
            hint="give another directory, or delete this one to gather again",
        )


def remove_leftovers(path: Path, index: Mapping[str, Any]) -> None:
    """Delete what a killed writer left: files that were not renamed, or not entered into the index."""
    listed = {shard["file"] for shard in index["shards"]}
    for file in [*path.glob("*.part"), *path.glob("shard-*.safetensors")]:
        if file.name not in listed:
            file.unlink()


def _open_shard(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        stream: Any = safe_open(path, framework="pt")
        rows = stream.get_slice("logprobs").get_shape()[0]
        if stream.get_slice("indices").get_shape()[0] != rows or stream.get_tensor("counts").sum() != rows:
            raise ValueError("its tensors have different lengths")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing", hint="gather again: what else is there is kept") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}", hint=AGAIN) from error
    return stream
