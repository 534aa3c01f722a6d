"""Quantized checkpoints of any of the tools as plain float32 weights.

GPTQ's and AWQ's layouts are read by `quantlab.formats`, compressed-tensors by the package of that name, so that a
peer's file is not judged by a reader which the peer's writer was not made for. Widths and group sizes are told from
the tensors' shapes, nothing is guessed from a path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from quantlab.formats import format_module


class Checkpoint:
    """The tensors of a checkpoint directory, read when asked for."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        described = self.config.get("quantization_config") or {}
        self.method: str | None = described.get("quant_method")
        if described.get("checkpoint_format", "gptq") not in ("gptq", "gemm"):
            raise ValueError(
                f"{self.path}: checkpoint format {described['checkpoint_format']} is not read here"
            )
        self.files: dict[str, Path] = {}
        for file in sorted(self.path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stream:
                self.files |= dict.fromkeys(stream.keys(), file)
        if not self.files:
            raise ValueError(f"{self.path} holds no safetensors file")

    def tensor(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], framework="pt") as stream:
            return stream.get_tensor(name)

    def weights(self, prefix: str) -> dict[str, torch.Tensor]:
        """Every parameter below the module ``prefix``, float32, named relative to it, linears dequantized."""
        found: dict[str, torch.Tensor] = {}
        packed: dict[str, dict[str, torch.Tensor]] = {}
        start = len(prefix) + 1 if prefix else 0
        for name in self.files:
            if prefix and not name.startswith(prefix + "."):
                continue
            owner, _, leaf = name[start:].rpartition(".")
            if leaf in ("weight", "bias"):
                found[name[start:]] = self.tensor(name).to(torch.float32)
            else:
                packed.setdefault(owner, {})[leaf] = self.tensor(name)
        return found | {
            f"{owner}.weight": dequantize(self.method, tensors) for owner, tensors in packed.items()
        }

    def install(self, model: nn.Module) -> None:
        """Copy every weight into a plain ``model`` of the same architecture; ties stay."""
        parameters, weights = dict(model.named_parameters()), self.weights("")
        # stored although it is tied
        weights.pop("" if "lm_head.weight" in parameters else "lm_head.weight", None)
        if weights.keys() != parameters.keys():
            different = ", ".join(sorted(weights.keys() ^ parameters.keys())[:4])
            raise ValueError(f"{self.path} does not hold the parameters of this model: {different}")
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)


def dequantize(method: str | None, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The matrix [out, in] that a linear's packed tensors stand for, float32."""
    if method == "gptq":
        inputs = tensors["g_idx"].shape[0]
        bits = tensors["qweight"].shape[0] * 32 // inputs
        codes, scales, zeros, group_of = format_module("gptq").unpack(
            tensors, bits=bits, group_size=inputs // tensors["scales"].shape[0]
        )
    elif method == "awq":
        size = tensors["qweight"].shape[0] // tensors["scales"].shape[0]
        codes, scales, zeros, group_of = format_module("awq").unpack(tensors, bits=4, group_size=size)
    elif method == "compressed-tensors":
        codes, scales, zeros, group_of = _compressed(tensors)
    else:
        raise ValueError(f"packed tensors {', '.join(tensors)} of method {method} are not read here")
    codes, zeros = codes.to(torch.float32), zeros.to(torch.float32)
    return (codes - zeros[:, group_of]) * scales.to(torch.float32)[:, group_of]


def _compressed(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """pack-quantized: signed codes, unpacked by the package itself."""
    from compressed_tensors.compressors import unpack_from_int32  # type: ignore[import-untyped]

    rows, inputs = (int(n) for n in tensors["weight_shape"])
    scales = tensors["weight_scale"]  # [out, groups]
    bits = tensors["weight_packed"].shape[1] * 32 // inputs
    codes = unpack_from_int32(tensors["weight_packed"], bits, torch.Size((rows, inputs)))
    zeros = torch.zeros(scales.shape)
    if "weight_zero_point" in tensors:
        zeros = unpack_from_int32(tensors["weight_zero_point"], bits, scales.shape, packed_dim=0)
    group_of = tensors.get("weight_g_idx", torch.arange(inputs) // (inputs // scales.shape[1]))
    return codes, scales, zeros, group_of.to(torch.int64)
