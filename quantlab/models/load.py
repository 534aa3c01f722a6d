"""A model opened whole, for evaluation, training, or saving: any checkpoint that transformers can read."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantlab.errors import DataError, MachineError, first_line
from quantlab.models.blockwise import auto_class
from quantlab.models.packed_experts import separated
from quantlab.models.precision import computed_in
from quantlab.models.safetensors.files import ModelFiles, TensorInfo, open_files
from quantlab.models.safetensors.tensors import read_tensor
from quantlab.models.safetensors.weight_files import own_format
from quantlab.models.vocabulary import embedding_rows, refuse_beyond
from quantlab.registry import load

# gptqmodel sizes its pools for a server unless told; it reads this once, at import.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(2, os.cpu_count() or 1)))


@dataclass
class LoadedModel:
    """A model ready to be measured. ``size_bytes`` is that of its weight files; ``params`` counts the
    original parameters, also of a quantized checkpoint. ``runtime``: what computes it where that is not torch."""

    model: Any
    tokenizer: Any
    device: str
    name: str
    path: Path
    size_bytes: int
    params: int
    runtime: str = ""


def pick_device(wish: str = "auto") -> str:
    """``auto`` is CUDA where there is one.

    Raises:
        MachineError: a CUDA device was asked for and there is none.
    """
    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wish.startswith("cuda") and not torch.cuda.is_available():
        raise MachineError("no CUDA device here", hint="use --device cpu")
    return wish


def load_tokenizer(files: ModelFiles, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer.

    Raises:
        DataError: it cannot be loaded, or makes tokens that the model's embedding has no row for.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(files.path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise DataError(f"{files.name}: its tokenizer cannot be loaded: {first_line(error)}") from error
    rows, tokens = embedding_rows(files), tokenizer.get_vocab()
    if rows is not None and tokens:
        token, number = max(tokens.items(), key=lambda pair: pair[1])
        refuse_beyond(files.name, token, number, rows, sum(i >= rows for i in tokens.values()))
    return tokenizer


def load_model(
    ref: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quantization: Any = None,
    runtime: str = "transformers",
) -> LoadedModel:
    """Load a model directory, GGUF file, hub id or ``embedded:<name>`` through transformers: plainly, but for GGUF
    files, whose tensors it is given one by one, and for quantized mixtures of experts, which it cannot read by itself
    (see ``packed_experts``).

    ``quantization`` is a transformers quantization config that is applied while loading (bitsandbytes). ``runtime``:
    with ``llama.cpp`` the model is opened by that (see ``llama_cpp``).

    Raises:
        DataError: the files are bad, transformers cannot make a model of them, or they lack a tensor that it would
            start from random numbers. MachineError: a library is missing.
    """
    if runtime != "transformers":
        opened: LoadedModel = load("quantlab.models.llama_cpp:open_model")(ref, trust_remote_code)
        return opened
    files = open_files(ref)
    place = pick_device(device)
    quiet_libraries()
    tokenizer = load_tokenizer(files, trust_remote_code)
    extra = {"quantization_config": quantization} if quantization is not None else {}
    wanted = wanted_dtype(files, dtype, place)
    if own := own_format(files.config):
        model = load(own.load or "")(files.path, wanted).to(place).eval()
        return LoadedModel(
            model, tokenizer, place, files.name, files.path, files.size_bytes, count_params(model, files)
        )
    loader: Any = auto_class(files)
    source: Path | None = files.path
    if files.encoding is not None:
        source, (loader, told) = None, decoded(files)
        extra |= told
    elif experts := separated(files, torch.float32, trust_remote_code):
        loader, extra = experts[0], extra | experts[1]
    else:
        extra |= {"trust_remote_code": trust_remote_code}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # compressed-tensors draws progress bars of its own
            model, info = loader.from_pretrained(
                source, dtype=wanted, device_map={"": place}, output_loading_info=True, **extra
            )
    except ImportError as error:
        raise MachineError(f"{files.name} needs a library that is not here: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{files.name}: transformers cannot load it: {first_line(error)}") from error
    refuse_missing(model, info.get("missing_keys", ()), files.name)
    model.eval()
    keep_bnb_storage(model)
    if wanted == torch.float32:
        compute_bnb_in(model, wanted)
    if hasattr(model, "ct_decompress_hook"):  # unpack now, not inside the first forward that is timed
        model.hf_quantizer.compressor.decompress_model(model)
    return LoadedModel(
        model, tokenizer, place, files.name, files.path, files.size_bytes, count_params(model, files)
    )


class _Decoded:
    """A tensor of a GGUF file as transformers takes slices of safetensors: read when it is loaded."""

    def __init__(self, info: TensorInfo) -> None:
        self.info, self.shape = info, torch.Size(info.shape)

    def __getitem__(self, _: Any) -> torch.Tensor:
        return read_tensor(self.info)

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.info.dtype


def decoded(files: ModelFiles) -> tuple[Any, dict[str, Any]]:
    """How to load the model in a GGUF file: a class with ``from_pretrained``, and arguments for it beside no name."""
    import transformers
    from transformers import AutoConfig, GenerationConfig

    return getattr(transformers, files.config["architectures"][0]), {
        "config": AutoConfig.from_pretrained(files.path),
        "generation_config": GenerationConfig.from_pretrained(files.path),
        "state_dict": {name: _Decoded(info) for name, info in files.tensors.items()},
    }


def refuse_missing(model: nn.Module, missing: Iterable[str], called: str) -> None:
    """Refuse a model of which the files lack a tensor: transformers starts it from random numbers and only warns. The
    scales behind an activation (see ``scaled``) are set to 1, which is what their absence means.

    Raises:
        DataError: names the tensor.
    """
    lacking = []
    for name in sorted(missing):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf == "scales" and type(module).__name__ == "ScaledActivation":
            nn.init.ones_(getattr(module, leaf))
        else:
            lacking.append(name)
    if lacking:
        more = f" and {len(lacking) - 1} others" if len(lacking) > 1 else ""
        raise DataError(f"{called}: tensor {lacking[0]}{more} of {type(model).__name__} is not in its files")


def wanted_dtype(files: ModelFiles, wish: str, device: str) -> str | torch.dtype:
    """What transformers is asked for, "auto" being the type as stored: float32 where the device cannot multiply what
    the files hold."""
    if wish != "auto":
        found: torch.dtype = getattr(torch, wish)
        return found
    stored = files.config.get("dtype") or files.config.get("torch_dtype")
    kept = getattr(torch, str(stored), None)
    slow = isinstance(kept, torch.dtype) and computed_in(kept, device) != kept
    return torch.float32 if slow else "auto"


def quiet_libraries() -> None:
    """Keep what libraries say on loading off the terminal: stdout belongs to results, stderr to progress."""
    for name in ("torchao", "torch.utils._pytree", "gptqmodel", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|gptqmodel|optimum|bitsandbytes)(\..*)?")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        from logbar import LogBar  # gptqmodel's own logger, which writes to stdout
    except ImportError:
        return
    LogBar.shared().setLevel("ERROR")


def keep_bnb_storage(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place at the first forward on AVX512-BF16 CPUs: what is saved
    afterwards, and every gradient through the layer, would be wrong."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def compute_bnb_in(model: nn.Module, dtype: torch.dtype) -> None:
    """bitsandbytes' 4-bit layers compute in the type that their checkpoint was made with, unless told."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype


def count_params(model: nn.Module, files: ModelFiles) -> int:
    """Parameters of the model before quantization: packed layers count as the matrices they stand for."""
    config: Mapping[str, Any] | None = files.quantized
    if config is None and not any(packed_as(m) for m in model.modules()):
        return files.params
    total = 0
    inside: set[int] = set()
    for module in model.modules():
        # compressed-tensors keeps nn.Linear and changes what is in it
        if packed_as(module) or (isinstance(module, nn.Linear) and hasattr(module, "quantization_scheme")):
            bias = getattr(module, "bias", None)
            total += int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
            total += bias.numel() if isinstance(bias, torch.Tensor) else 0
            inside.update(id(t) for t in (*module.parameters(), *module.buffers()))
        elif type(module).__name__ == "ScaledActivation":  # the awq layout's own
            inside.add(id(module.scales))
    for module in model.modules():  # buffers that files hold count there too (a router's corrections)
        kept = [b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set]
        total += sum(b.numel() for b in kept if b is not None and id(b) not in inside)
    return total + sum(p.numel() for p in model.parameters() if id(p) not in inside)


def packed_as(module: nn.Module) -> str | None:
    """The library class that a layer of packed weights is of (bitsandbytes' or gptqmodel's); None for any other."""
    kinds = {c.__name__ for c in type(module).__mro__}
    return next((kind for kind in ("Linear4bit", "Linear8bitLt", "BaseQuantLinear") if kind in kinds), None)
