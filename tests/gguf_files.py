"""Tiny GGUF files of models of transformers, written by the ``gguf`` package under the names of its own map.

What llama.cpp's converters do to tensors is done here by their formulas: rows of Llama's queries and keys reordered,
Gemma's norms plus one, experts stacked. With each file comes what its weights decode to, under Hugging Face's names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from tests.conftest import WORDS

TOKENS = 300
# model_type of transformers: architecture in the file
NAMES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"


def tokenizer() -> Any:
    """Byte-level byte-pair encoding with 300 tokens, cut into words as GPT-2 does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=["</s>", "<|user|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([WORDS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )


def write(
    path: Path,
    model: Any,
    kind: Kind = Kind.F32,
    tables: Mapping[str, np.ndarray] | None = None,
    **changes: Any,
) -> dict[str, np.ndarray]:
    """Write ``model`` with matrices of ``kind``; returns what its tensors decode to, float32, by Hugging Face's names.
    ``tables``: further tensors, ``changes``: other values for keys, by their full name with ``__`` for a dot."""
    writer = gguf.GGUFWriter(path, NAMES[model.config.model_type])
    write_keys(writer, model.config)
    write_tokenizer(writer, tokenizer(), model.config.vocab_size)
    for key, value in changes.items():
        name = key.replace("__", ".")
        for place in writer.kv_data:
            place.pop(name, None)
        if value is not None:
            writer.add_key_value(name, value, _type_of(value))
    decoded = write_tensors(writer, model, kind)
    for name, values in (tables or {}).items():
        writer.add_tensor(name, values)
    finish(writer)
    return decoded


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _type_of(value: Any) -> gguf.GGUFValueType:
    return gguf.GGUFValueType.get_type(value)


def write_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    """The configuration as llama.cpp's converters write it."""
    rope = config.rope_parameters
    whole = rope.get("full_attention", rope)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(whole["rope_theta"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    if getattr(config, "intermediate_size", None):
        writer.add_feed_forward_length(config.intermediate_size)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if config.model_type in ("gemma2", "gemma3_text", "phi3", "mistral"):
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type.startswith("gemma"):
        writer.add_attention_scale(config.query_pre_attn_scalar**-0.5)
        if config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "gemma3_text":
        sliding = [kind == "sliding_attention" for kind in config.layer_types]
        writer.add_array("gemma3.attention.sliding_window_pattern", sliding)


def write_tokenizer(writer: gguf.GGUFWriter, made: Any, rows: int, pre: str = "gpt-2") -> None:
    """Its tokens, filled up to the ``rows`` of the embedding with unused ones, as llama.cpp wants it."""
    described = json.loads(made.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(made.get_vocab().items(), key=lambda pair: pair[1])]
    special = {entry["content"] for entry in described["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    more = [f"[PAD{number}]" for number in range(len(tokens), rows)]
    writer.add_token_list(tokens + more)
    writer.add_token_types([3 if token in special else 1 for token in tokens] + [5] * len(more))
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_eos_token_id(made.eos_token_id)
    writer.add_pad_token_id(made.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def write_tensors(writer: gguf.GGUFWriter, model: Any, kind: Kind) -> dict[str, np.ndarray]:
    """Every tensor under llama.cpp's name; returns what they decode to."""
    config = model.config
    architecture = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == NAMES[config.model_type])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    decoded: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, values in on_disk(model).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        plain = values.ndim == 1 or "gate.weight" in name
        used = Kind.F32 if plain else kind
        packed = quantize(values, used)
        decoded[name] = dequantize(packed, used).reshape(values.shape)
        stored = packed
        if NAMES[config.model_type] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            stored = permuted(packed, heads)
        if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
            stored = packed + np.float32(1)
        before, number, after = _expert(name)
        if number is None:
            short, ending = name.rsplit(".", 1)
            found = names.get_name(short)
            assert found is not None, name
            if name.endswith("shared_expert_gate.weight"):
                stored = stored[0]
            writer.add_tensor(f"{found}.{ending}", stored, raw_dtype=used)
        else:
            stacks.setdefault(f"{before}.{after}", []).append(stored)
    for name, parts in stacks.items():
        found = names.get_name(name.removesuffix(".weight"))
        assert found is not None, name
        writer.add_tensor(f"{found}.weight", np.stack(parts), raw_dtype=kind)
    return decoded


def _expert(name: str) -> tuple[str, int | None, str]:
    """What is before the number of an expert, the number, and what is after it."""
    before, found, after = name.partition(".experts.")
    if not found:
        return name, None, ""
    number, _, rest = after.partition(".")
    if "block_sparse_moe" in before:
        before = before.removeprefix("model.").replace("block_sparse_moe", "feed_forward")
    return f"{before}.experts", int(number), rest


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """``LlamaModel.permute`` of llama.cpp's converter."""
    shape = (heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def on_disk(model: Any) -> Mapping[str, np.ndarray]:
    """The tensors of a model as it would be saved, experts one by one; float32, in the order of their names with
    experts in theirs."""
    import tempfile

    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = load_file(Path(folder) / "model.safetensors")
    return dict(
        sorted(found.items(), key=lambda pair: (_expert(pair[0])[0], _expert(pair[0])[1] or 0, pair[0]))
    )
