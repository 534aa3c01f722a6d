"""bitsandbytes: LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), FP4 and NF4 with optional double quantization
(QLoRA, Dettmers et al. 2023, arXiv:2305.14314). The real library through transformers; needs no calibration.

bitsandbytes has a storage of its own, so this path loads the model whole, lets it quantize, and saves what it stores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quantlab.models.load import LoadedModel, load_model

KINDS = {"bnb-int8": None, "bnb-fp4": "fp4", "bnb-nf4": "nf4"}


def bnb_config(kind: str, *, double_quant: bool = False, compute_dtype: torch.dtype = torch.bfloat16) -> Any:
    """The transformers configuration for ``bnb-int8``, ``bnb-fp4`` or ``bnb-nf4``."""
    from transformers import BitsAndBytesConfig

    storage = KINDS[kind]
    if storage is None:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=storage,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantize_model(
    ref: str,
    target: Path,
    kind: str,
    *,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool = False,
    double_quant: bool = False,
) -> LoadedModel:
    """Quantize a whole model with bitsandbytes and save it into the directory ``target``."""
    subject = load_model(
        ref,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        trust_remote_code=trust_remote_code,
        quantization=bnb_config(kind, double_quant=double_quant, compute_dtype=dtype),
    )
    subject.model.save_pretrained(target)
    return subject
