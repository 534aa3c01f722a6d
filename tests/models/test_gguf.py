"""Models in GGUF files: what is computed with them is what transformers computes with the same weights, their
tokenizers make the same tokens, and checkpoints made from them are those made from the same weights in safetensors.

The files are written by the ``gguf`` package. With a real file in ``QUANTLAB_GGUF`` and the same model saved by
transformers in bfloat16 in ``QUANTLAB_GGUF_SAFETENSORS``, these two are compared as well.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from quantlab.errors import DataError, MachineError
from quantlab.models.blockwise import dtype_of
from quantlab.models.gguf.header import read_header
from quantlab.models.gguf.weights import whole
from quantlab.models.load import load_model, load_tokenizer
from quantlab.models.safetensors.files import open_files
from quantlab.models.safetensors.tensors import read_rows, read_tensor
from quantlab.progress import Silent
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.quantize import QuantizeRecipe
from tests import gguf_files
from tests.zoo import builder

IDS = torch.arange(3, 67)[None]
TEXTS = [
    "", " ", "the cat sat on a mat", "  two  spaces ", "\n\n\t고양이가 비를 본다.", "SELECT name FROM t;",
    "it's 123 x²",
    "</s>the<|user|> cat", "\u00e9\u0301 \U0001f600", "a" * 70,
]  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))


def built(model_type: str) -> Any:
    model = builder.build(model_type)
    if model_type == "qwen3_moe":  # as every model of it that there is
        model.config.norm_topk_prob = True
    return model


def saved(
    folder: Path, model: Any, tensors: dict[str, np.ndarray], dtype: torch.dtype = torch.float32
) -> Path:
    """``model`` with other weights, as transformers saves it."""
    model.config.dtype = dtype
    model.save_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    held |= {name: torch.from_numpy(values) for name, values in tensors.items()}
    held = {name: tensor.to(dtype).contiguous() for name, tensor in held.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    gguf_files.tokenizer().save_pretrained(folder)
    return folder


def logits(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = load_model(path, device="cpu", dtype="float32").model(IDS).logits
    return found


@pytest.mark.parametrize("model_type", gguf_files.NAMES)
def test_the_model_computes_what_its_weights_compute_in_transformers(model_type: str, tmp_path: Path) -> None:
    model = built(model_type)
    decoded = gguf_files.write(tmp_path / "model.gguf", model, Kind.Q8_0)
    folder = saved(tmp_path / "plain", model, decoded)
    torch.testing.assert_close(logits(tmp_path / "model.gguf"), logits(folder), rtol=0, atol=1e-5)
    files, plain = open_files(tmp_path / "model.gguf"), open_files(folder)
    assert files.params == plain.params and files.tensors.keys() == plain.tensors.keys()


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
def test_every_simple_type_is_decoded(kind: Kind, tmp_path: Path) -> None:
    decoded = gguf_files.write(tmp_path / "model.gguf", built("llama"), kind)
    files = open_files(tmp_path / "model.gguf")
    assert files.encoding == kind.name
    expected = {"F16": torch.float16, "F32": torch.float32}.get(kind.name, torch.bfloat16)
    assert dtype_of(files) == expected
    assert files.config["dtype"] == str(expected).removeprefix("torch.")
    for name, values in decoded.items():
        found = read_tensor(files.tensors[name])
        assert torch.equal(found, torch.from_numpy(values)), name
        part = slice(len(values) // 3, len(values) - 1)
        assert torch.equal(read_tensor(files.tensors[name], part), found[part]), name
    ids = torch.tensor([[5, 0], [5, 299]])
    embedding = files.tensors["model.embed_tokens.weight"]
    assert torch.equal(read_rows(embedding, ids), read_tensor(embedding)[ids])


@pytest.mark.parametrize(
    "kind", [k for k in Kind if (k.name not in ("F32", "F64") and k.name[0] != "I") or k.name[:2] == "IQ"]
)
def test_all_that_the_package_decodes_is_decoded(kind: Kind, tmp_path: Path) -> None:
    """Random bytes are blocks of something in every type."""
    block, size = GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (24, 2 * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=kind)
    gguf_files.finish(writer)
    try:
        with np.errstate(all="ignore"):
            expected = dequantize(data, kind)
    except NotImplementedError:
        with pytest.raises(DataError, match=f"ggml type {kind.name}, which cannot be decoded"):
            read_header(tmp_path / "one.gguf")
        return
    header = read_header(tmp_path / "one.gguf")
    reader = whole(header, header.tensors["blk.0.ffn_up.weight"])
    assert reader.shape == (24, 2 * block)
    np.testing.assert_array_equal(reader.read(), expected)
    np.testing.assert_array_equal(reader.read(slice(7, 20)), expected[7:20])


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gemma2", "phi3"])
def test_the_tokenizer_and_the_template_are_the_same(model_type: str, tmp_path: Path) -> None:
    """Whatever class transformers has for the model. (For Qwen2 it takes one that always cuts as ``qwen2`` does.)"""
    gguf_files.write(tmp_path / "model.gguf", built(model_type))
    ours, original = load_tokenizer(open_files(tmp_path / "model.gguf")), gguf_files.tokenizer()
    for text in TEXTS:
        assert ours(text).input_ids == original(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == original.decode(original(text).input_ids)
    messages = [{"role": "user", "content": "the cat"}]
    assert ours.apply_chat_template(messages, tokenize=False) == "<|user|>the cat</s>"
    assert (ours.eos_token, ours.pad_token, ours.bos_token) == ("</s>", "</s>", None)


def test_a_checkpoint_is_that_of_the_same_weights_in_safetensors(tmp_path: Path) -> None:
    model = built("llama")
    decoded = gguf_files.write(tmp_path / "model.gguf", model, Kind.Q4_1)
    plain = saved(tmp_path / "plain", model, decoded, torch.bfloat16)
    recipe = QuantizeRecipe.model_validate({"method": "rtn", "bits": 4, "group_size": 32})
    made = []
    for source, out in ((tmp_path / "model.gguf", tmp_path / "a"), (plain, tmp_path / "b")):
        quantize([Job("rtn", recipe, out)], str(source), device="cpu", progress=Silent())
        made.append({file.name: file.read_bytes() for file in out.glob("*.safetensors")})
    assert made[0] == made[1] and len(made[0]) > 1
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer("the cat").input_ids == gguf_files.tokenizer()("the cat").input_ids
    assert tokenizer.chat_template == gguf_files.TEMPLATE
    assert json.loads((tmp_path / "a" / "quantlab.json").read_text())["parent"] == str(
        tmp_path / "model.gguf"
    )


@pytest.mark.parametrize("method", ["gptq", "bnb-nf4"])
def test_other_methods_take_it_too(method: str, tmp_path: Path, calibration_file: Path) -> None:
    gguf_files.write(tmp_path / "model.gguf", built("gemma2"), Kind.Q8_0)
    keys = {"method": method, "dtype": "float16"}
    if method == "gptq":
        keys |= {"calibration": {"source": str(calibration_file), "rows": 4, "seq_len": 32}}  # type: ignore[dict-item]
    job = Job(method, QuantizeRecipe.model_validate(keys), tmp_path / "out")
    quantize([job], str(tmp_path / "model.gguf"), device="cpu", progress=Silent())
    assert (logits(tmp_path / "out") - logits(tmp_path / "model.gguf")).abs().max() < 0.5
    held = {t.dtype for t in open_files(tmp_path / "out").tensors.values()}
    assert "F16" in held and "BF16" not in held


def test_it_is_measured_and_is_its_own_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantlab.commands.evaluate import Options, evaluate

    monkeypatch.chdir(tmp_path)
    gguf_files.write(tmp_path / "model.gguf", built("llama"), Kind.Q8_0)
    sets = ("tasks.perplexity.seq_len=64", "tasks.perplexity.max_tokens=256")
    options = Options(tasks=("perplexity",), results=tmp_path / "results", overrides=sets, device="cpu")
    row = evaluate(str(tmp_path), options, Silent())["rows"][0]
    assert (row["stage"], row["method"], row["bits"], row["format"]) == ("quantized", "q8_0", 8, "gguf")
    size = (tmp_path / "model.gguf").stat().st_size
    assert row["size_bytes"] == size and row["bits_per_weight"] == pytest.approx(8 * size / row["params"])
    assert row["model_digest"] == open_files(tmp_path / "model.gguf").digest


def test_a_student_is_trained_from_it(tmp_path: Path) -> None:
    from quantlab.distill.student import merged, open_student, probe, save_merged

    gguf_files.write(tmp_path / "model.gguf", built("qwen3"), Kind.Q8_0)
    student = open_student(str(tmp_path / "model.gguf"), mode="lora", device="cpu")
    save_merged(merged(student), student, tmp_path / "student", "float32")
    reached, start = (load_model(path, dtype="float32").model for path in (tmp_path / "student", tmp_path))
    torch.testing.assert_close(probe(reached), probe(start))


def test_where_models_are_found(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "one.gguf", built("llama"))
    assert open_files(tmp_path).weight_files == [tmp_path / "one.gguf"]
    with pytest.raises(DataError, match="no such model") as failed:
        open_files(tmp_path / "onee.gguf")
    assert "one.gguf" in failed.value.hint
    (tmp_path / "two.gguf").write_bytes((tmp_path / "one.gguf").read_bytes())
    with pytest.raises(DataError, match="holds 2 GGUF files: one.gguf, two.gguf"):
        open_files(tmp_path)
    assert open_files(tmp_path / "one.gguf").path == open_files(tmp_path / "two.gguf").path


def test_a_file_of_the_hub_is_fetched_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    gguf_files.write(tmp_path / "m-Q4_1.gguf", built("llama"))
    asked = []

    def fetch(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / "m-Q4_1.gguf")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert open_files("hf:owner/repo:q4/m-Q4_1.gguf").name == "hf:owner/repo:q4/m-Q4_1.gguf"
    assert asked == [("owner/repo", "q4/m-Q4_1.gguf")]
    with pytest.raises(DataError, match="no such model: hf:owner/repo:../m.gguf"):
        open_files("hf:owner/repo:../m.gguf")


def test_a_file_of_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="the hub cannot be reached"):
        open_files("hf:nobody/nothing:m.gguf")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_files.write(tmp_path / "model.gguf", built("llama"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(MachineError, match="cannot write") as failed:
        open_files(tmp_path / "model.gguf")
    assert "QUANTLAB_CACHE" in failed.value.hint


ROPE = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


@pytest.mark.parametrize("rule", ROPE)
def test_stretched_positions(rule: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = built("llama")
    theta = 500_000.0 if rule == "llama3" else 10_000.0
    model.config.rope_parameters = {"rope_theta": theta, **ROPE[rule]}
    keys: dict[str, Any] = {}
    if rule in ("linear", "yarn"):
        keys = {"llama__rope__scaling__type": rule, "llama__rope__scaling__factor": 4.0}
        keys |= {"llama__rope__scaling__original_context_length": 64} if rule == "yarn" else {}
    path = tmp_path / "model.gguf"
    gguf_files.write(path, model, tables=_llama3(theta, 32) if rule == "llama3" else {}, **keys)
    found = AutoConfig.from_pretrained(open_files(path).path).rope_parameters
    assert {key: found[key] for key in ROPE[rule]} == ROPE[rule] and found["rope_theta"] == theta
    reference = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    reference.load_state_dict(model.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(logits(path), reference(IDS).logits, rtol=0, atol=1e-5)


def _llama3(theta: float, head: int) -> dict[str, np.ndarray]:
    """The factors of Llama 3.1 as transformers computes them."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=head, num_attention_heads=1, rope_parameters={"rope_theta": theta, **ROPE["llama3"]}
    )
    stretched = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = theta ** (-torch.arange(0, head, 2).float() / head)
    return {"rope_freqs.weight": (plain / stretched).numpy()}


def test_frequencies_of_no_known_rule(tmp_path: Path) -> None:
    tables = {"rope_freqs.weight": np.linspace(1, 8, 16, dtype=np.float32)}
    gguf_files.write(tmp_path / "model.gguf", built("llama"), tables=tables)
    with pytest.raises(DataError, match="rope_freqs.weight follow no rule that is known: number"):
        open_files(tmp_path / "model.gguf")


def test_long_rope_of_phi3(tmp_path: Path) -> None:
    from transformers import AutoConfig

    factors = {
        part: np.linspace(1, size, 16, dtype=np.float32) for part, size in (("short", 1.5), ("long", 30))
    }
    tables = {f"rope_factors_{part}.weight": values for part, values in factors.items()}
    keys = {"phi3__rope__scaling__original_context_length": 64}
    gguf_files.write(tmp_path / "model.gguf", built("phi3"), tables=tables, **keys)
    found = AutoConfig.from_pretrained(open_files(tmp_path / "model.gguf").path)
    assert found.rope_parameters["rope_type"] == "longrope"
    np.testing.assert_allclose(found.rope_parameters["long_factor"], factors["long"], rtol=1e-6)
    assert found.original_max_position_embeddings == 64
    assert logits(tmp_path / "model.gguf").isfinite().all()


@pytest.fixture
def real() -> tuple[Path, Path]:
    file, original = os.environ.get("QUANTLAB_GGUF"), os.environ.get("QUANTLAB_GGUF_SAFETENSORS")
    if not file or not original:
        pytest.skip("QUANTLAB_GGUF and QUANTLAB_GGUF_SAFETENSORS name no real model")
    return Path(file), Path(original)


def test_a_real_file(real: tuple[Path, Path]) -> None:
    from transformers import AutoTokenizer

    files, plain = open_files(real[0]), open_files(real[1])
    assert files.tensors.keys() == plain.tensors.keys()
    for name, info in files.tensors.items():
        assert torch.equal(read_tensor(info).to(torch.bfloat16), read_tensor(plain.tensors[name])), name
    ours, original = (AutoTokenizer.from_pretrained(found.path) for found in (files, plain))
    for text in TEXTS:
        assert ours(text).input_ids == original(text).input_ids, text
    assert ours.chat_template == original.chat_template
