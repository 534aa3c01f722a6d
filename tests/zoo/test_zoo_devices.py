"""The walk through the blocks and every solver on tensors that say they are on a GPU (``tests.fake_cuda``), for a dozen
architectures: a tensor left on the other device fails, and what comes out is what the CPU gives, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import WORDS, byte_tokenizer
from tests.quant.test_devices import exact_products, here_and_there, recipe  # noqa: F401  (a fixture for every test)
from tests.zoo import builder

# Of many kinds: plain, transposed, biases for each head, experts of three kinds, recurrent, with inputs of their own.
NAMES = ("llama", "gpt2", "bloom", "mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3", "mamba",
         "gemma4_text", "nanochat", "phi3")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_walk_stays_on_its_device(tmp_path: Path, name: str) -> None:
    model = builder.write(tmp_path / "model", name, byte_tokenizer())
    text = tmp_path / "words.txt"
    text.write_text(" ".join(WORDS.split() * 20), encoding="utf-8")
    format = {"format": "compressed-tensors", "group_size": "auto"}
    if name == "gpt2":
        format = {"format": "gptq", "group_size": "auto"}
    recipes = {method: recipe(text, method, **format) for method in ("rtn", "gptq", "awq")}
    here_and_there(model, tmp_path / "out", recipes)
