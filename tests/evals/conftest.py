"""A tiny random Llama with a byte-level tokenizer, built on the spot, and the real small one where it is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

TEXT = (
    "CREATE TABLE players (name TEXT); SELECT name FROM players; "
    "선수 이름을 모두 보여줘. The players like small games. "
)
BABY = Path(__file__).parents[3] / "shared" / "data" / "models" / "babyllama-char-1M"


def build_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def build_subject() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from quantlab.models.load import LoadedModel

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    return LoadedModel(
        model, tokenizer, "cpu", "tiny", Path("tiny"), 1, sum(p.numel() for p in model.parameters())
    )


@pytest.fixture(scope="session")
def tiny() -> Any:
    return build_subject()


@pytest.fixture(scope="session")
def baby() -> Any:
    if not BABY.is_dir():
        pytest.skip("the real small model is not at hand")
    from quantlab.models.load import load_model

    return load_model(BABY, device="cpu")
