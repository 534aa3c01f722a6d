"""The student: a model opened for training (full, LoRA, QLoRA, LoRA over a quantized checkpoint), merged and saved.

LoRA (Hu et al. 2021, arXiv:2106.09685) trains B A beside a frozen W; QLoRA (Dettmers et al. 2023, arXiv:2305.14314)
holds W in NF4 with double quantization. Merging adds (alpha / r) B A to the weights that were trained against: for a
quantized base those are the dequantized values, read from the layer itself by what it makes of unit vectors, never the
original weights, and never rounded back to 4 bits.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantlab.errors import DataError, MachineError
from quantlab.models.companions import copy_companions
from quantlab.models.load import compute_bnb_in, load_model, packed_as, pick_device
from quantlab.models.safetensors.files import ModelFiles, open_files
from quantlab.quant.methods.bnb import bnb_config

UNIT_ROWS = 1024  # unit vectors sent through a layer at once when its weights are read


@dataclass
class Student:
    """``model`` is the transformers model, wrapped by peft unless it is trained whole."""

    model: Any
    tokenizer: Any
    files: ModelFiles
    device: str
    precision: str  # float32, bfloat16, float16: what the training computes in
    quantized: bool  # the frozen weights are not plain numbers

    @property
    def adapted(self) -> bool:
        return hasattr(self.model, "peft_config")


def pick_precision(wish: str, device: str) -> str:
    """``auto``: bfloat16 on GPUs that have it, else float16; float32 on CPUs, the most exact."""
    if wish != "auto":
        return wish
    if not device.startswith("cuda"):
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def open_student(
    ref: str,
    *,
    mode: str,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    rslora: bool = False,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Student:
    """Load a model for training.

    ``full`` keeps float32 weights and trains all; ``lora`` and ``qlora`` freeze the model and train float32 adapters.
    Plain frozen weights are held in ``precision`` where that is bfloat16 or the device is a GPU, else in float32.
    A checkpoint that is stored quantized stays as it is stored, in either mode.

    Raises:
        DataError: the model cannot be read, or is quantized and was to be trained whole. MachineError: something is
            missing here.
    """
    files = open_files(ref)
    place = pick_device(device)
    precision = pick_precision(precision, place)
    if mode == "full" and files.quantized is not None:
        raise DataError(
            f"{ref} is stored quantized, its weights cannot be trained",
            hint="set student.mode: qlora or lora",
        )
    compute: torch.dtype = getattr(torch, precision)
    scheme = None
    if mode == "qlora" and files.quantized is None:
        scheme = bnb_config("bnb-nf4", double_quant=True, compute_dtype=compute)
    quantized = scheme is not None or files.quantized is not None
    frozen_half = mode != "full" and (
        place.startswith("cuda") or (precision == "bfloat16" and files.quantized is None)
    )
    dtype = precision if frozen_half or (quantized and files.quantized is None) else "float32"
    if files.quantized is not None:
        dtype = "auto" if frozen_half else "float32"
    subject = load_model(
        ref, device=place, dtype=dtype, trust_remote_code=trust_remote_code, quantization=scheme
    )
    model = subject.model
    if files.quantized is not None:
        compute_bnb_in(model, compute)
    model.config.use_cache = False
    torch.manual_seed(seed)
    if mode == "full":
        model.requires_grad_(True)
    else:
        model = _adapt(model, r, alpha, dropout, targets, rslora)
    model.train()
    return Student(model, subject.tokenizer, files, place, precision, quantized)


def _adapt(model: Any, r: int, alpha: int, dropout: float, targets: str | Sequence[str], rslora: bool) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MachineError("LoRA needs the peft library", hint="pip install peft") from error
    model.requires_grad_(False)
    names: str | list[str] = targets if isinstance(targets, str) else list(targets)
    packed = {n.rpartition(".")[2] for n, m in model.named_modules() if packed_as(m) == "BaseQuantLinear"}
    # peft knows plain and bitsandbytes layers by that word, not gptqmodel's
    if names == "all-linear" and packed:
        names = sorted(packed)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=names,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise DataError(
            f"no adapter fits: {error}", hint="student.lora.targets: all-linear, or names of linear layers"
        ) from error
    train_in_float32(wrapped)
    return wrapped


def train_in_float32(model: nn.Module) -> None:
    """Every trained parameter in float32: small steps vanish in bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def trainable(model: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def settle(student: Student) -> Any:
    """The trained model in evaluation mode, computing in float32: what merging is measured against."""
    model = student.model.eval()
    inner = model.get_base_model() if student.adapted else model
    with contextlib.suppress(ValueError):  # training may have used its own attention
        inner.set_attn_implementation("sdpa")
    if student.quantized:
        compute_bnb_in(model, torch.float32)
        return model
    return model.float()


@torch.no_grad()
def merged(student: Student) -> Any:
    """A plain float32 model that computes what the settled student computes. The student is used up."""
    model = settle(student)
    if not student.adapted:
        return model
    return _rebuild(model) if student.quantized else model.merge_and_unload()


@torch.no_grad()
def probe(model: Any, rows: int = 2, length: int = 32) -> torch.Tensor:
    """Logits float32 [rows, length, V] on fixed tokens from all over the vocabulary."""
    size = int(model.config.get_text_config().vocab_size)
    ids = (torch.arange(rows * length).view(rows, length) * 7919) % size
    place = next(model.parameters()).device
    return model(input_ids=ids.to(place), use_cache=False).logits.float().cpu()


def _rebuild(wrapped: Any) -> Any:
    """The model behind quantized layers, every linear written out in float32 with its adapter added."""
    inner = wrapped.get_base_model()
    config = type(inner.config).from_dict(
        {k: v for k, v in inner.config.to_dict().items() if k != "quantization_config"}
    )
    plain = type(inner)._from_config(config, dtype=torch.float32)
    target = dict(plain.named_parameters()) | dict(plain.named_buffers())
    filled = set()
    for name, value in _tensors(inner):
        if name in target:
            target[name].copy_(value)
            filled.add(name)
    tied = set(getattr(plain, "all_tied_weights_keys", None) or ())
    missing = [name for name, _ in plain.named_parameters() if name not in filled | tied]
    if missing:
        raise DataError(f"the merged model lacks {missing[0]} and {len(missing) - 1} more tensors")
    return plain.eval()


def _tensors(inner: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names as in the plain model and float32 values, linears dequantized and merged."""
    layers = {
        name: module
        for name, module in inner.named_modules()
        if hasattr(module, "base_layer") or packed_as(module)
    }
    outer = [name for name in layers if not any(name.startswith(other + ".") for other in layers)]
    for name in outer:
        module = layers[name]
        base = getattr(module, "base_layer", module)
        weight, bias = linear_weight(base)
        for adapter in getattr(module, "active_adapters", ()):
            if adapter in module.lora_A:
                b, a = module.lora_B[adapter].weight, module.lora_A[adapter].weight  # [out, r], [r, in]
                weight = weight + float(module.scaling[adapter]) * (b.float() @ a.float())
        yield f"{name}.weight", weight
        if bias is not None:
            yield f"{name}.bias", bias
    inside = tuple(name + "." for name in outer)
    for name, value in [*inner.named_parameters(), *inner.named_buffers()]:
        if not name.startswith(inside):
            yield name, value.float()


def linear_weight(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight [out, in], bias [out] or None), float32: what a linear layer of any storage multiplies by.

    Plain layers are read; others are asked, with unit vectors as inputs.
    """
    if type(layer) is nn.Linear:
        bias = None if layer.bias is None else layer.bias.float()
        return layer.weight.float(), bias
    size, device = int(layer.in_features), next(iter([*layer.parameters(), *layer.buffers()])).device
    dtype = torch.float32
    zero = layer(torch.zeros(1, size, dtype=dtype, device=device)).float()  # [1, out]: the bias
    columns = []
    for start in range(0, size, UNIT_ROWS):
        count = min(UNIT_ROWS, size - start)
        unit = torch.zeros(count, size, dtype=dtype, device=device)
        unit[torch.arange(count), start + torch.arange(count)] = 1
        columns.append(layer(unit).float() - zero)  # [count, out]
    bias = zero[0] if getattr(layer, "bias", None) is not None else None
    return torch.cat(columns).T.contiguous(), bias


def save_merged(model: Any, student: Student, out: Path, dtype: str) -> None:
    """An ordinary model directory; ``dtype`` is what the weights are stored in."""
    model.config.use_cache = True
    model.to(getattr(torch, dtype)).save_pretrained(out)
    student.tokenizer.save_pretrained(out)
    copy_companions(student.files.path, out)


def save_adapted(student: Student, out: Path) -> None:
    """The quantized base with the adapter beside it: transformers (with peft) loads the directory as one model.

    A base that was stored quantized is copied byte for byte; one that was quantized while loading is saved.
    """
    out.mkdir(parents=True, exist_ok=True)
    student.model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)  # peft's template; ours is written in its place
    files = student.files
    if files.quantized is None:
        base = student.model.unload()
        base.config.use_cache = True
        base.save_pretrained(out)
    else:
        index = [files.found.index] if files.found.index else []
        for file in (*files.found.read, *index, files.path / "config.json"):
            if not file.name.startswith("adapter_"):
                shutil.copyfile(file, out / file.name)
    student.tokenizer.save_pretrained(out)
    copy_companions(files.path, out)
