"""A model as files: configuration and safetensors headers, read without torch and without loading a weight.

Everything that can be refused before heavy work is refused from here: a missing or corrupt file, pickled weights,
a layer whose shape does not fit a recipe. The format of a safetensors header (8 bytes of length, JSON with dtype,
shape and offsets of every tensor) is https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantlab.errors import DataError, MachineError
from quantlab.models.positions import positions_of
from quantlab.models.safetensors.weight_files import (
    ADAPTER_CONFIG,
    WeightFiles,
    find_weight_files,
    own_format,
    read_json,
    stays_inside,
)
from quantlab.paths import PACKAGE, nearest
from quantlab.registry import load

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EMBEDDED = PACKAGE / "models" / "embedded"
LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library itself
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
}
GGUF = ".gguf"
HUB_FILE = re.compile(r"hf:([\w.-]+/[\w.-]+):([\w.-]+(?:/[\w.-]+)*\.gguf)")  # a GGUF file of a repository
PLAIN_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]  # code runs only when trusted
# Who decides which experts a token goes to, and how much of each.
ROUTERS = {"gate", "router", "shared_expert_gate"}


class Reader(Protocol):
    """Reads a tensor that its file holds in another form than safetensors (``gguf``)."""

    def read(self, rows: slice | None = None) -> NDArray[np.float32]:
        """float32, all of it or contiguous ``rows``."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is; nothing of it is loaded. ``start``: its first byte in the file. ``piece``: it
    is one (its number) of so many equal pieces of the tensor ``name``. ``reader``: what reads it where the file is no
    safetensors."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    piece: tuple[int, int] | None = None
    reader: Reader | None = field(default=None, compare=False)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.count * DTYPE_BYTES[self.dtype]

    def part(self, index: int) -> TensorInfo:
        """One of the tensors that this one, [count, ...], is made of."""
        one = math.prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]
        start = self.start + index * one
        return TensorInfo(self.name, self.file, self.dtype, self.shape[1:], start, (index, self.shape[0]))


@dataclass(frozen=True)
class ModelFiles:
    """A checked model. ``name`` is how the user called it, ``path`` the directory with configuration and tokenizer,
    ``found`` which files hold the weights. ``memo``: what others found out about the model, so that they find it once.
    ``plain``: the dtype of a checkpoint's plain weights that follows from the files where that is not the one most
    tensors have; ``encoding``: how a GGUF file holds most of its weights (``Q4_K``)."""

    name: str
    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    found: WeightFiles = field(default_factory=lambda: WeightFiles((), None, ()))
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    plain: str | None = None
    encoding: str | None = None

    @property
    def params(self) -> int:
        """Stored parameters: a tied matrix counts once. Meaningful for models that are not quantized."""
        return sum(t.count for t in self.tensors.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.weight_files)

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the weights in memory: those of a GGUF file are decoded."""
        return self.size_bytes if self.plain is None else self.params * PLAIN_BYTES[self.plain]

    @property
    def weight_files(self) -> list[Path]:
        return sorted({*self.found.read, *(t.file for t in self.tensors.values())})

    @cached_property
    def digest(self) -> str:
        """SHA-256 over configuration and weight files, 16 hex digits."""
        total = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.weight_files:
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()[:16]

    @property
    def quantized(self) -> Mapping[str, Any] | None:
        """The checkpoint's ``quantization_config``, None for a plain model."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else None

    @property
    def has_experts(self) -> bool:
        """Whether the model is a mixture of experts whose files hold each expert by itself."""
        return has_experts(name.rpartition(".")[0] for name in self.tensors)

    @property
    def positions(self) -> int | None:
        """How many tokens the model was made to attend to; None where its configuration does not say."""
        return positions_of(self.config)

    @cached_property
    def block_prefix(self) -> str:
        """The name before the block number: ``model.layers`` in ``model.layers.3.mlp.up_proj.weight``."""
        sizes: Counter[str] = Counter()
        for name, tensor in self.tensors.items():
            if found := re.match(r"(.+?)\.\d+\.", name):
                sizes[found.group(1)] += tensor.count
        if not sizes:
            raise DataError(f"{self.name}: no repeated decoder blocks among its {len(self.tensors)} tensors")
        return sizes.most_common(1)[0][0]

    def block_linears(self) -> dict[str, tuple[int, int]]:
        """The linears inside the blocks that are quantized, module name in the files to (out, in): two-dimensional
        weights, without those of routers, norms and embeddings.

        Raises:
            DataError: no repeated blocks.
        """
        prefix = self.block_prefix + "."
        found = {
            name.removesuffix(".weight"): (t.shape[0], t.shape[1])
            for name, t in self.tensors.items()
            if name.startswith(prefix) and name.endswith(".weight") and len(t.shape) == 2
        }
        routed = has_experts(found)
        return {name: shape for name, shape in found.items() if quantizable(name, routed)}


def has_experts(names: Iterable[str]) -> bool:
    """Whether modules of these names form a mixture of experts."""
    return any("experts" in name.split(".") for name in names)


def quantizable(name: str, routed: bool) -> bool:
    """Whether the matrix of module ``name`` is one to quantize; ``routed``: the model has experts.

    A router's few rows decide discretely, and no reader expects them packed; a norm with a matrix for weight (one row a
    head) and an embedding are no linears.
    """
    parts = name.split(".")
    if "norm" in parts[-1] or "embed" in parts[-1] or parts[-1] in ("wte", "wpe"):
        return False
    return not (routed and ROUTERS & set(parts))


def open_files(ref: str | Path) -> ModelFiles:
    """Find a model (``embedded:<name>``, a directory, a GGUF file, or a Hugging Face id) and check its files.

    Raises:
        DataError: no such model, no safetensors, a corrupt file, a shard that the index names is missing.
        MachineError: a hub id that is not cached, and no network.
    """
    name = str(ref)
    path = _locate(name)
    if gguf := path if path.is_file() else _gguf_in(name, path):
        opened: ModelFiles = load("quantlab.models.gguf.files:open_gguf")(name, gguf)
        return opened
    config_file = path / "config.json"
    if not config_file.is_file():
        if (path / ADAPTER_CONFIG).is_file():
            raise DataError(
                f"{name} is an adapter without its base model: no config.json in {path}",
                hint="merge it into its base first (peft: merge_and_unload), and give the merged model",
            )
        raise DataError(
            f"{name}: no config.json in {path}", hint="give the directory of a Hugging Face model"
        )
    config = read_json(config_file)
    found = find_weight_files(name, path, config)
    tensors: dict[str, TensorInfo] = {}
    if own_format(config) is None:
        for file in found.read:
            tensors.update(read_header(file))
    return ModelFiles(name, path, config, tensors, found)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, with every offset checked against the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(LARGEST_HEADER, size - 8):
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        header.pop("__metadata__", None)
        found, end = {}, 0
        for name, entry in header.items():
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            expected = math.prod(shape) * DTYPE_BYTES.get(dtype, 0)
            if dtype in DTYPE_BYTES and stop - start != expected:
                raise ValueError(f"{name} spans {stop - start} bytes, {dtype} {list(shape)} needs {expected}")
            found[name] = TensorInfo(name, file, dtype, shape, 8 + length + start)
            end = max(end, stop)
        if 8 + length + end != size:
            raise ValueError(f"its header describes {8 + length + end} bytes, the file has {size}")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is not a sound safetensors file: {error}",
            hint="it is cut short or damaged: fetch it again",
        ) from error
    return found


def embedded_names() -> list[str]:
    """The models that ship with quantlab, as ``embedded:<name>``."""
    return [f"embedded:{p.name}" for p in sorted(EMBEDDED.glob("*")) if (p / "config.json").is_file()]


def _gguf_in(name: str, path: Path) -> Path | None:
    """The GGUF file of a directory that is no model of Hugging Face's; None where it has none.

    Raises:
        DataError: it has several.
    """
    found = [] if (path / "config.json").is_file() else sorted(path.glob(f"*{GGUF}"))
    if len(found) > 1:
        raise DataError(
            f"{name} holds {len(found)} GGUF files: {', '.join(file.name for file in found[:4])}",
            hint=f"give one of them: {found[0]}",
        )
    return found[0] if found else None


def _locate(name: str) -> Path:
    """A directory, or a GGUF file."""
    if name.startswith("embedded:"):
        path = EMBEDDED / name.removeprefix("embedded:")
        if name not in embedded_names():
            near = nearest(name, embedded_names())
            raise DataError(
                f"no embedded model {name!r}", hint=f"there is {near or ', '.join(embedded_names())}"
            )
        return path
    if (hub := HUB_FILE.fullmatch(name)) and stays_inside(hub[2]):
        return _file_from_hub(name, *hub.groups())
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == GGUF):
        return path
    if path.is_file():
        raise DataError(f"{name} is a file", hint=f"give the model's directory, or a {GGUF} file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or (path.parent.is_dir() and path.parent != Path()):
        siblings = [
            p.name
            for p in (path.parent.iterdir() if path.parent.is_dir() else ())
            if p.is_dir() or p.suffix == GGUF
        ]
        near = nearest(path.name, siblings)
        raise DataError(
            f"no such model: {name}",
            hint=f"did you mean {path.parent / near}?"
            if near
            else f"give a directory, a {GGUF} file, a Hugging Face id (owner/name, or hf:owner/name:file{GGUF}), or "
            + ", ".join(embedded_names()),
        )
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    return _fetched(name, lambda: snapshot_download(name, allow_patterns=WANTED))


def _file_from_hub(name: str, repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    return _fetched(name, lambda: hf_hub_download(repository, file))


def _fetched(name: str, fetch: Callable[[], str]) -> Path:
    """What ``fetch`` brings from the hub, or has in its cache."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(fetch())
    except RepositoryNotFoundError as error:
        raise DataError(f"no such model: {name} is neither a directory nor on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise DataError(f"no such model: its repository has no file of {name}") from error
        raise MachineError(
            f"{name} is not a directory here, and the hub cannot be reached for it",
            hint="check the path, or the network; embedded:base needs neither",
        ) from error
