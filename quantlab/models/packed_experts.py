"""Opening a quantized mixture of experts, which transformers by itself cannot.

transformers 5 merges a layer's experts into one parameter while it loads, and knows no form of it that is packed as
gptq or awq: of such a checkpoint it takes the attention, leaves every expert out as "unexpected", starts the merged
ones from random numbers, and says so in a warning only. vLLM and gptqmodel read such checkpoints, named as here,
with code of their own.

So the model is loaded as a subclass that takes the experts apart before the library puts its packed layers in
(``experts.separate``): every expert is then a linear with the name it has on disk, and the ordinary kernels apply.
The experts of a layer run one after the other; fast serving is vLLM's business.

Left to transformers: unquantized models, and compressed-tensors where it merges experts, which it dequantizes while it
loads (right, but each weight then takes its full 2 or 4 bytes in memory). Experts that the original's files hold as one
tensor it looks for as one tensor in any format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from quantlab.models.blockwise import find_blocks, skeleton
from quantlab.models.experts import merged, separate, taken_apart
from quantlab.models.safetensors.files import ModelFiles, has_experts
from quantlab.models.weight_names import Names, conversions
from quantlab.registry.formats import FORMATS


def separated(files: ModelFiles, dtype: Any, trust_remote_code: bool) -> tuple[type, dict[str, Any]] | None:
    """How to load a checkpoint of packed experts: a class with ``from_pretrained``, and arguments for it.

    None where plain transformers does: no experts, none quantized, or kept apart by its own classes.

    Raises:
        DataError: as :func:`quantlab.models.blockwise.skeleton` and :func:`quantlab.models.experts.separate`.
    """
    config = files.quantized
    method = None if config is None else str(config.get("quant_method"))
    if config is None or method not in ("gptq", "awq", "compressed-tensors"):
        return None
    marks = tuple(f".{mark}" for mark in FORMATS[method].marks)
    packed = {name.rpartition(".")[0] for name in files.tensors if name.endswith(marks)}
    if not has_experts(packed):
        return None
    model = skeleton(files, dtype, trust_remote_code)
    found = merged(model)
    if not found or method in taken_apart(type(module).__name__ for module in found.values()):
        return None
    renamings, converters = conversions(model, legacy=False)
    if FORMATS[method].merges and any(_merges(name, converters) for name in found):
        return None
    separate(model, converters)
    shapes = {name: info.shape for name, info in files.tensors.items()}
    names = Names(model, shapes, files.name, packed=packed)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    plain = [name for name in linear if names.on_disk(name) not in packed]
    settings = model.config
    settings.quantization_config = _told(config, plain, linear, find_blocks(model)[0])
    mapping = {
        source: target
        for renaming in renamings
        for source, target in zip(
            renaming._original_source_patterns, renaming._original_target_patterns, strict=True
        )
    }
    return _subclass(type(model), converters), {"config": settings, "key_mapping": mapping}


def _merges(name: str, converters: list[Any]) -> bool:
    """Whether transformers merges the experts of module ``name`` from files that have them one by one."""
    targets = [p.lstrip("^").rstrip("$") for converter in converters for p in converter.target_patterns]
    return any(f"{name}.down_proj".endswith(target) for target in targets)


def _subclass(base: Any, converters: list[Any]) -> type:
    """``base`` with its experts apart. Being no class of transformers' own, its conversions do not apply to it: the
    renamings among them are given as ``key_mapping``, the merging is what must not happen."""

    def start(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        separate(self, converters, tried=True)

    return type(base.__name__, (base,), {"__init__": start, "__module__": __name__})


def _told(config: Mapping[str, Any], plain: list[str], linear: list[str], prefix: str) -> dict[str, Any]:
    """The checkpoint's quantization config, saying which linears are not packed: each library's way."""
    told = dict(config)
    if config["quant_method"] == "gptq":
        inside = [
            n.removeprefix(prefix + ".") for n in linear if n not in plain and n.startswith(prefix + ".")
        ]
        relative = dict.fromkeys(name.partition(".")[2] for name in inside)
        told |= {"modules_in_block_to_quantize": [list(relative)], "block_name_to_quantize": prefix}
    elif config["quant_method"] == "awq":
        told["modules_to_not_convert"] = plain
    return told
