"""What is refused before any work, in one line and by every method alike: other kinds of models, tokens without a row,
NaN."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from quantlab.errors import DataError
from quantlab.models.finite import EXPONENTS, refuse_nonfinite
from quantlab.models.load import load_tokenizer
from quantlab.models.refusals import refuse_other_kinds, refuse_unusable
from quantlab.models.safetensors.files import open_files
from quantlab.models.vocabulary import embedding_rows, refuse_foreign_tokens, stored_tokens
from quantlab.progress import Silent
from quantlab.quant.jobs import Job, check
from quantlab.quant.pipeline import quantize
from quantlab.recipe.quantize import QuantizeRecipe

METHODS = ("none", "rtn", "gptq", "awq", "fp8", "bnb-int8", "bnb-fp4", "bnb-nf4")


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny, tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def test_the_tiny_model_is_fine(model: Path) -> None:
    files = open_files(model)
    refuse_unusable(files)
    assert embedding_rows(files) == 257 and max(stored_tokens(model).values()) == 256


def _added(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)


def _special(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tokenizer.save_pretrained(model)


def _pad_in_no_vocabulary(model: Path) -> None:
    edit(model / "tokenizer_config.json", pad_token="<new>")


def _list_of_added_tokens(model: Path) -> None:
    (model / "added_tokens.json").write_text('{"<new>": 257}')


def _decoder(model: Path) -> None:
    token = {"content": "<new>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    edit(model / "tokenizer_config.json", added_tokens_decoder={"257": token | {"single_word": False}})


ADDED = [_added, _special, _pad_in_no_vocabulary, _list_of_added_tokens, _decoder]


@pytest.mark.parametrize("add", ADDED)
@pytest.mark.parametrize("method", METHODS)
def test_tokens_beyond_the_embedding(model: Path, add: Any, method: str) -> None:
    add(model)
    with pytest.raises(DataError, match="'<new>' with id 257, the model's embedding has 257 rows") as caught:
        check(QuantizeRecipe.model_validate({"method": method}), str(model))
    assert "resize_token_embeddings" in caught.value.hint


@pytest.mark.parametrize("add", ADDED)
def test_the_files_tell_what_the_tokenizer_would(model: Path, add: Any) -> None:
    """Without the files' words the loaded tokenizer is asked, and says the same."""
    add(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert max(stored_tokens(model).values()) == max(tokenizer.get_vocab().values())
    with pytest.raises(DataError, match="'<new>' with id 257"):
        load_tokenizer(open_files(model))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "eos_token_id", 257),
        ("config.json", "bos_token_id", 100_000),
        ("config.json", "pad_token_id", 257),
        ("config.json", "eos_token_id", [0, 300]),
        ("config.json", "eos_token_id", -1),
        ("config.json", "pad_token_id", -100),
        ("generation_config.json", "eos_token_id", 257),
        ("generation_config.json", "pad_token_id", 999),
    ],
)
def test_special_ids_out_of_range(model: Path, file: str, key: str, value: Any) -> None:
    edit(model / file, **{key: value})
    with pytest.raises(DataError, match=f"{key} in {file} is"):
        refuse_foreign_tokens(open_files(model))


@pytest.mark.parametrize("value", [0, 256, None, [0, 256], -1])
def test_special_ids_in_range(model: Path, value: Any) -> None:
    edit(model / "config.json", pad_token_id=value)
    refuse_foreign_tokens(open_files(model))


def test_an_embedding_padded_beyond_the_tokenizer_is_fine(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(320, 128, dtype=torch.bfloat16)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    _added(model)
    refuse_foreign_tokens(open_files(model))


@pytest.mark.parametrize(
    ("content", "largest"),
    [
        ({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}, 1),  # Unigram: places are ids
        ({"model": {"vocab": {"a": 0, "b": 7}}}, 7),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 9, "content": "x"}]}, 9),
    ],
)
def test_kinds_of_vocabularies(tmp_path: Path, content: dict[str, Any], largest: int) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert max(stored_tokens(tmp_path).values()) == largest


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    return {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}


PART = {"hidden_size": 8}
WRAPPERS: dict[str, Any] = {
    "gemma 3": _text_config,
    "hears and sees": lambda c: {"architectures": ["MiniCPMO"], "text_config": c, "vision_config": PART,
                                 "audio_config": PART},
    "internvl": lambda c: c | {"architectures": ["InternVLChatModel"], "llm_config": c, "vision_config": PART},
    "qwen vl of old": lambda c: c | {"architectures": ["QWenLMHeadModel"], "visual": {"width": 1664}},
    "audio": lambda c: {"architectures": ["Qwen2AudioForConditionalGeneration"], "audio_config": PART},
    "omni": lambda c: {"architectures": ["Qwen2_5OmniModel"], "thinker_config": {"text_config": c}},
    "by its class alone": lambda c: c | {"architectures": ["Mistral3ForConditionalGeneration"]},
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("method", METHODS)
def test_multimodal_wrappers(model: Path, wrapper: str, method: str) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(WRAPPERS[wrapper](config)))
    with pytest.raises(DataError, match="multimodal wrapper around a language model") as caught:
        check(QuantizeRecipe.model_validate({"method": method}), str(model))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "GPTNeoXForCausalLM", "OwnModel"])
def test_language_models_alone_pass(model: Path, name: str) -> None:
    edit(model / "config.json", architectures=[name])
    refuse_other_kinds(open_files(model))


TYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPONENTS)
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_numbers_that_are_none(model: Path, kind: str, bad: str) -> None:
    if kind == "F8_E4M3" and bad != "nan":
        pytest.skip("this type has no infinity")
    tensors = load_file(model / "model.safetensors")
    values = torch.randn(40, 70, dtype=torch.float64)
    values[0, 0] = torch.finfo(TYPES[kind]).max  # the largest number is one
    values[17, 3] = values[39, 69] = float(bad)
    tensors["model.layers.0.mlp.extra.weight"] = values.to(TYPES[kind])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    expected = r"2 values are NaN or infinite in model.layers.0.mlp.extra.weight, the first at \[17, 3\]"
    with pytest.raises(DataError, match=expected):
        refuse_nonfinite(open_files(model))


@pytest.mark.parametrize("kind", EXPONENTS)
def test_every_other_number_passes(model: Path, kind: str) -> None:
    """All 65,536 patterns of 16 bits, or 256 of 8, against torch."""
    if kind in ("F64", "F32"):
        bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
        values = bits.view(torch.float32).to(TYPES[kind])
    else:
        wide = TYPES[kind].itemsize == 2
        bits = (
            torch.arange(-(2**15), 2**15).to(torch.int16) if wide else torch.arange(-128, 128).to(torch.int8)
        )
        values = bits.view(TYPES[kind])
    kept = values[torch.isfinite(values.float())]
    assert len(kept) < len(values)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"x": kept.clone()}, model / "model.safetensors", metadata={"format": "pt"})
    refuse_nonfinite(open_files(model))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "none"])
def test_nan_is_refused_by_every_method(model: Path, tmp_path: Path, method: str) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][1, 2] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    job = Job("x", QuantizeRecipe.model_validate({"method": method}), tmp_path / "out")
    with pytest.raises(DataError, match=r"1 value is NaN or infinite in model.layers.2.mlp.down_proj.weight"):
        quantize([job], str(model), progress=Silent())
    assert not (tmp_path / "out").exists()


def test_a_file_that_changed_is_read_again(model: Path) -> None:
    refuse_nonfinite(open_files(model))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="model.norm.weight"):
        refuse_nonfinite(open_files(model))
