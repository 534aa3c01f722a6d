"""Models for tests: a tiny random Llama on disk, the real small one where it is at hand, the embedded one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.tiers import tiers_of

# A busy machine is slow at the first example; that says nothing about the code.
settings.register_profile("quantlab", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("quantlab")

TESTS = Path(__file__).parent
_FAST = {"running": False}  # whether the test at hand may start no process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = getattr(item, "originalname", None) or item.name
        for mark in tiers_of(item.path.relative_to(TESTS).as_posix(), name):
            item.add_marker(mark)


def _refuse_processes(event: str, arguments: tuple[Any, ...]) -> None:
    if _FAST["running"] and event in ("subprocess.Popen", "os.posix_spawn", "os.fork"):
        raise RuntimeError(f"a test of `make fast` starts a process ({arguments[:1]}); see tests/tiers.py")


sys.addaudithook(_refuse_processes)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _FAST["running"] = item.get_closest_marker("fast") is not None
    yield
    _FAST["running"] = False


SHARED = Path(__file__).parents[2] / "shared" / "data"
BABY = SHARED / "models" / "babyllama-char-1M"
WORDS = "the cat sat on a mat while seven small birds sang about rain and bread 고양이가 비를 본다 SELECT name FROM t;"


def byte_tokenizer() -> Any:
    """A byte-level tokenizer without merges: 256 bytes and an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def write_tiny(
    folder: Path, *, tie: bool = False, layers: int = 3, dtype: str = "bfloat16", hidden: int = 128
) -> Path:
    """Save a random Llama with grouped-query attention into ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        initializer_range=0.1,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():  # norms that are not all ones, channels that differ
        if "norm" in name:
            parameter.data = torch.rand_like(parameter) + 0.5
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_mixture(folder: Path, *, layers: int = 2, intermediate: int = 128, dtype: str = "bfloat16") -> Path:
    """Save a random Mixtral of four experts into ``folder``."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=257, hidden_size=64, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256,
        initializer_range=0.1, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    MixtralForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """StopForward random words for 16 rows of 64 bytes."""
    import random

    seeded = random.Random(0)
    path = tmp_path_factory.mktemp("calib") / "words.txt"
    path.write_text(" ".join(seeded.choice(WORDS.split()) for _ in range(2000)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def baby() -> Path:
    if not BABY.is_dir():
        pytest.skip("the shared real model is not here")
    return BABY


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a tiny model of the zoo, by its name; made when it is first asked for."""
    from tests.zoo import builder

    folder = tmp_path_factory.mktemp("zoo")

    def find(name: str) -> Path:
        if not (folder / name).is_dir():
            builder.write(folder / name, name, byte_tokenizer())
        return folder / name

    return find
