"""What is expected of each architecture that the tests run: the format that a gptq recipe of 8 bits ends in when it
names none, and parts of the reasons why layers stay in 16 bits. Made from a sweep (``python -m tests.zoo.sweep``) and
read."""

from __future__ import annotations

from typing import NamedTuple


class Expected(NamedTuple):
    format: str
    kept: tuple[str, ...] = ()


GPTQ, CT = Expected("gptq"), Expected("compressed-tensors")
UNREAD = "reads such experts packed in no format"
INIT = "initialises it while it loads"

# Those of `make test`: one of every kind of trouble.
FEW: dict[str, Expected] = {
    "bloom": CT,
    "deepseek_v3": CT,
    "gemma4_text": GPTQ,
    "gpt2": Expected("gptq", (INIT,)),
    "gpt_oss": Expected("gptq", (UNREAD,)),
    "llama": GPTQ,
    "llama4_text": CT,
    "mamba": Expected("compressed-tensors", (INIT,)),
    "mixtral": CT,
    "nanochat": Expected("gptq", (INIT,)),
    "qwen3_5_text": GPTQ,
    "qwen3_moe": CT,
}
MANY: dict[str, Expected] = {
    "aria_text": Expected("gptq", (UNREAD,)),
    "axk1": CT,
    "biogpt": GPTQ,
    "bitnet": GPTQ,
    "cohere": GPTQ,
    "ctrl": CT,
    "deepseek_v2": CT,
    "diffllama": GPTQ,
    "doge": GPTQ,
    "ernie4_5_moe": CT,
    "flex_olmo": CT,
    "gemma": GPTQ,
    "gemma2": GPTQ,
    "gemma3_text": GPTQ,
    "gemma4_unified_text": GPTQ,
    "glm": GPTQ,
    "glm4": GPTQ,
    "glm4_moe": CT,
    "gpt_bigcode": Expected("gptq", (INIT,)),
    "gpt_neox": GPTQ,
    "gpt_neox_japanese": GPTQ,
    "gptj": GPTQ,
    "granite": GPTQ,
    "hunyuan_v1_moe": CT,
    "jamba": Expected("compressed-tensors", ("8 inputs are not divisible by 32",)),
    "jetmoe": Expected("gptq", ("takes all experts of a layer from one tensor",)),
    "kolibri1": CT,
    "lfm2": GPTQ,
    "mamba2": Expected("gptq", (INIT,)),
    "minicpm3": GPTQ,
    "minimax": CT,
    "minimax_m2": CT,
    "ministral": GPTQ,
    "mistral": GPTQ,
    "mpt": GPTQ,
    "nemotron": GPTQ,
    "olmo2": GPTQ,
    "olmo_hybrid": GPTQ,
    "olmoe": CT,
    "openai-gpt": GPTQ,
    "opt": GPTQ,
    "persimmon": GPTQ,
    "phi": GPTQ,
    "phi3": GPTQ,
    "phimoe": CT,
    "qwen2": GPTQ,
    "qwen2_moe": CT,
    "qwen3": GPTQ,
    "qwen3_next": CT,
    "recurrent_gemma": Expected("gptq", (INIT,)),
    "stablelm": GPTQ,
    "starcoder2": GPTQ,
}
