"""GGUF checkpoints of every architecture that is written: read back, and run by llama.cpp where it is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from quantlab.errors import DataError
from quantlab.formats.gguf import checkpoint
from quantlab.formats.gguf.architectures import ARCHITECTURES, Places
from quantlab.formats.gguf.tokenizer import cutting, read_tokenizer, steps
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Silent
from quantlab.quant.estimate.checkpoint_size import checkpoint_bytes
from quantlab.quant.jobs import Job, check
from quantlab.quant.pipeline import quantize
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.mixtures import TYPES, Model, fallback, more_bits, tensor_type
from tests.zoo.builder import build

TEXT = (
    "the cat sat on a mat while seven small birds sang about rain and bread; SELECT name FROM t WHERE x = 3"
)


def tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 300 tokens, merges among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT, TEXT.upper()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny models by architecture, saved once each."""
    folder = tmp_path_factory.mktemp("models")

    def of(model_type: str) -> Path:
        path = folder / model_type
        if not path.exists():
            model = build(model_type)
            if model_type == "gemma3_text":  # llama.cpp takes the last of six blocks for one without a window
                model.config.layer_types = ["sliding_attention", "sliding_attention"]
            if hasattr(model.config, "query_pre_attn_scalar"):
                model.config.query_pre_attn_scalar = 32
            model.save_pretrained(path)
            tokenizer(path)
        return path

    return of


def made(source: Path, out: Path, **recipe: Any) -> Path:
    job = Job("q", QuantizeRecipe(**{"method": "rtn", "format": "gguf", "evaluate": []} | recipe), out)
    quantize([job], str(source), device="cpu", progress=Silent())
    return out


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0].float()
    return found - found.mean(-1, keepdim=True)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).detach().norm() / other.detach().norm())


def computed_by_llama_cpp(file: Path) -> torch.Tensor:
    """llama.cpp's logits for ``IDS``, without their mean; the tokens that it makes of a text are checked too."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from tokenizers import Tokenizer

    loaded = llama_cpp.Llama(str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    try:
        ids = Tokenizer.from_file(str(file.with_name("tokenizer.json"))).encode(TEXT).ids
        assert loaded.tokenize(TEXT.encode(), add_bos=False) == ids
        loaded.eval(IDS)
        found = torch.from_numpy(np.array(loaded.scores[: len(IDS)], dtype=np.float32))
    finally:
        loaded.close()
    return found - found.mean(-1, keepdim=True)


IDS = [5, 60, 131, 200, 17, 99, 42, 250, 7, 256, 31, 88]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_is_read_back(model_type: str, models: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = models(model_type)
    files = open_files(str(source))
    out = made(source, tmp_path / "q", type="Q8_0")
    recipe = QuantizeRecipe(method="rtn", type="Q8_0", evaluate=[])
    assert (out / "model-Q8_0.gguf").stat().st_size == checkpoint_bytes(recipe, files)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ours = checkpoint.load(out, torch.float32)
    assert relative(logits(ours, IDS), logits(original, IDS)) < 0.05
    held = dict(original.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative(parameter, held[name]) < 0.01, name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_llama_cpp_computes_the_same(model_type: str, models: Any, tmp_path: Path) -> None:
    """llama.cpp rounds what it multiplies to 8 bits in groups of 32: a few per cent of the logits of such models."""
    out = made(models(model_type), tmp_path / "q", type="Q8_0")
    theirs = computed_by_llama_cpp(out / "model-Q8_0.gguf")
    assert relative(theirs, logits(checkpoint.load(out, torch.float32), IDS)) < 0.06


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows are whole super-blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    folder = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).save_pretrained(folder)
    tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", TYPES)
def test_llama_cpp_computes_every_type(kind: str, wide: Path, tmp_path: Path) -> None:
    out = made(wide, tmp_path / "q", type=kind)
    theirs = computed_by_llama_cpp(out / f"model-{kind}.gguf")
    assert relative(theirs, logits(checkpoint.load(out, torch.float32), IDS)) < 0.06


def test_llama_cpp_computes_a_file_of_chosen_types(wide: Path, tmp_path: Path) -> None:
    text = {"source": "calib/general.jsonl", "rows": 2, "seq_len": 32}
    out = made(wide, tmp_path / "q", method="imatrix", type="auto", target_bits=4.5, calibration=text)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(out / "model-auto.gguf").tensors}
    assert len(kinds - {"F32"}) > 1
    theirs = computed_by_llama_cpp(out / "model-auto.gguf")
    assert relative(theirs, logits(checkpoint.load(out, torch.float32), IDS)) < 0.06


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_plain_transformers_reads_the_file_alone(model_type: str, models: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = made(models(model_type), tmp_path / "q", type="Q4_0")
    (tmp_path / "alone").mkdir()
    (out / "model-Q4_0.gguf").rename(tmp_path / "alone" / "m.gguf")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "alone", gguf_file="m.gguf", dtype=torch.float32)
    (tmp_path / "alone" / "m.gguf").rename(out / "model-Q4_0.gguf")
    assert relative(logits(alone, IDS), logits(checkpoint.load(out, torch.float32), IDS)) < 1e-4


def test_another_architecture_is_refused_by_name(models: Any) -> None:
    recipe = QuantizeRecipe(method="rtn", type="Q8_0", evaluate=[])
    with pytest.raises(DataError, match="architecture opt cannot be written"):
        check(recipe, str(models("opt")))


def test_rows_change_places_and_back() -> None:
    places = Places(
        {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2},
        "m",
    )
    query, key = (
        places.of("model.layers.0.self_attn.q_proj.weight"),
        places.of("model.layers.0.self_attn.k_proj.bias"),
    )
    assert (
        query is not None
        and key is not None
        and (query.name, key.name) == ("blk.0.attn_q.weight", "blk.0.attn_k.bias")
    )
    order = places.rows(query.order, 32)  # heads of 8 channels: pairs (0, 4), (1, 5) come together
    assert order is not None and order[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert places.rows(key.order, 16).tolist()[8:] == [8, 12, 9, 13, 10, 14, 11, 15]  # type: ignore[union-attr]
    with pytest.raises(DataError, match="no name for the tensor model.layers.0.extra.weight"):
        places.of("model.layers.0.extra.weight")


def test_metadata(models: Any, tmp_path: Path) -> None:
    out = made(models("qwen3_moe"), tmp_path / "q", type="Q4_0")
    reader = gguf.GGUFReader(out / "model-Q4_0.gguf")
    held = {name: field.contents() for name, field in reader.fields.items()}
    assert held["general.architecture"] == "qwen3moe" and held["general.file_type"] == 2
    assert held["qwen3moe.expert_count"] == 4 and held["qwen3moe.expert_used_count"] == 2
    assert held["tokenizer.ggml.pre"] == "gpt-2" and held["tokenizer.ggml.add_bos_token"] is False
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.ffn_down_exps.weight"].shape.tolist() == [64, 128, 4]
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


def test_an_unknown_cutting_is_said(models: Any) -> None:
    from tokenizers import Tokenizer

    folder = models("llama")
    held = read_tokenizer(folder, "m")
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert cutting(held, library, "m") == "gpt-2"
    with pytest.raises(DataError, match="cuts text in a way that llama.cpp has no known name for"):
        cutting(held | {"pre_tokenizer": {"type": "Whitespace"}}, library, "m")
    split = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated"}
    assert steps(
        {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]}
    ) == (("split", r"\d"),)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "not a tokenizer"),
        ("{", "not a tokenizer"),
        ('{"model": {"type": "Unigram", "vocab": {}}}', "BPE here, not Unigram"),
        ('{"model": {"type": "BPE", "vocab": {"a": "b"}}}', "not a tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {}}, "added_tokens": [{"id": 1}]}', "not a tokenizer"),
        ("[" * 100_000, "not a tokenizer"),
    ],
)
def test_damaged_tokenizers_are_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=said):
        read_tokenizer(tmp_path, "m")
    with pytest.raises(DataError, match="no tokenizer.json"):
        read_tokenizer(tmp_path / "none", "m")


def test_sentencepiece_tokens_have_the_ranks_of_their_merges(models: Any, tmp_path: Path) -> None:
    import shutil

    source = tmp_path / "m"
    shutil.copytree(models("llama"), source)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    vocabulary |= {"a": 259, "b": 260, "\u2581": 261, "ab": 262, "\u2581ab": 263}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
            for i, text in enumerate(("<unk>", "<s>", "</s>"))
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ]},
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True, "vocab": vocabulary,
                  "merges": [["a", "b"], ["\u2581", "ab"]]},
    }  # fmt: skip
    (source / "tokenizer.json").write_text(json.dumps(content))
    out = made(source, tmp_path / "q", type="Q8_0")
    held = {n: f.contents() for n, f in gguf.GGUFReader(out / "model-Q8_0.gguf").fields.items()}
    assert held["tokenizer.ggml.model"] == "llama" and held["tokenizer.ggml.add_space_prefix"] is True
    assert (
        held["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6] and held["tokenizer.ggml.token_type"][300] == 5
    )
    assert held["tokenizer.ggml.scores"][262:264] == [0.0, -1.0]


def test_the_mixtures_are_those_of_llama_cpp() -> None:
    thirty = Model(30, sharing=3.0, tied=True)
    assert [i for i in range(30) if more_bits(i, 30)] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]

    def chosen(wanted: str, leaf: str, layer: int = 9, columns: int = 2048, model: Model = thirty) -> str:
        return tensor_type(wanted, f"blk.{layer}.{leaf}", columns, layer, model)

    assert [chosen("Q4_K_M", "ffn_down", i) for i in (0, 8, 9)] == ["Q6_K", "Q6_K", "Q4_K"]
    assert [chosen("Q4_K_M", "attn_v", i) for i in (29, 9)] == ["Q6_K", "Q4_K"]
    assert [chosen("Q4_K_S", "attn_v", i) for i in (3, 4)] == ["Q5_K", "Q4_K"]
    assert [chosen("Q3_K_M", leaf) for leaf in ("attn_q", "attn_v", "attn_output", "ffn_down")] == [
        "Q3_K", "Q4_K", "Q4_K", "Q4_K",
    ]  # fmt: skip
    assert [chosen("Q3_K_M", "ffn_down", i) for i in (0, 1)] == ["Q5_K", "Q4_K"]
    assert [chosen("Q2_K", leaf) for leaf in ("attn_q", "attn_v", "attn_output", "ffn_down")] == [
        "Q2_K", "Q3_K", "Q3_K", "Q3_K",
    ]  # fmt: skip
    assert chosen("Q2_K", "attn_v", model=Model(30, sharing=4.0)) == "Q4_K"
    assert tensor_type("Q4_K_M", "token_embd", 2048, -1, thirty) == "Q6_K"
    assert tensor_type("Q4_K_M", "token_embd", 576, -1, thirty) == "Q8_0"
    assert tensor_type("Q4_K_M", "token_embd", 2048, -1, Model(30)) == "Q4_K"
    assert [chosen(kind, "attn_q", columns=576) for kind in ("Q2_K", "Q3_K", "Q4_K_M", "Q5_K", "Q6_K")] == [
        "Q4_0", "Q4_0", "Q5_0", "Q5_1", "Q8_0",
    ]  # fmt: skip
    assert (
        fallback("Q4_K", 33) == "F16"
        and chosen("Q4_0", "ffn_down", 0, model=Model(30, importance=True)) == "Q4_1"
    )
    assert chosen("Q4_K_M", "attn_k", model=Model(30, experts=8)) == "Q8_0"
