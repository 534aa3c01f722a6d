"""A quantized cache: its values against a plain reference, its bytes counted, and the tasks on top of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.errors import RecipeError
from quantlab.evals import run_task
from quantlab.evals.generation import generate
from quantlab.evals.kv_cache import Caches, Groups, QuantizedLayer, logits_of
from quantlab.progress import Silent
from quantlab.recipe.load import parse_recipe
from quantlab.registry.tasks import KvCacheOptions

HEAD = 16
STORY = "SELECT name FROM players; 선수 이름을 모두 보여줘. " * 40


def options(bits: int, group_size: int = 16, residual: int = 32) -> KvCacheOptions:
    return KvCacheOptions.model_validate({"bits": bits, "group_size": group_size, "residual": residual})


def nearest(values: list[float], bits: int) -> list[float]:
    """One group by the book, in Python's floats; the scale is rounded to bfloat16 as it is stored."""
    low, high = min(values), max(values)
    scale = max(float(torch.tensor((high - low) / (2**bits - 1)).bfloat16()), 2.0**-17)
    return [low + scale * min(max(round((v - low) / scale), 0), 2**bits - 1) for v in values]


def reference(keys: torch.Tensor, values: torch.Tensor, chosen: KvCacheOptions) -> tuple[Any, Any]:
    """`keys` by channel in groups of tokens, `values` by token in groups of channels, element by element."""
    keys, values, size = keys.clone(), values.clone(), chosen.group_size
    width = size if values.shape[-1] % size == 0 else values.shape[-1]
    for row in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            for token in range(0, keys.shape[2], size):
                for channel in range(keys.shape[3]):
                    part = keys[row, head, token : token + size, channel]
                    part.copy_(torch.tensor(nearest(part.tolist(), chosen.bits)))
            for token in range(values.shape[2]):
                for channel in range(0, values.shape[3], width):
                    part = values[row, head, token, channel : channel + width]
                    part.copy_(torch.tensor(nearest(part.tolist(), chosen.bits)))
    return keys, values


def states(tokens: int, dtype: torch.dtype = torch.float32, head_dim: int = HEAD) -> tuple[Any, Any]:
    seeded = torch.Generator().manual_seed(tokens)
    keys = torch.randn(2, 2, tokens, head_dim, generator=seeded) + 10 * torch.arange(head_dim)
    return keys.to(dtype), torch.randn(2, 2, tokens, head_dim, generator=seeded).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("head_dim", [HEAD, 20])  # 20 is no multiple of the group size: one group a token
def test_what_attention_sees_is_what_was_stored(bits: int, head_dim: int, dtype: torch.dtype) -> None:
    chosen = options(bits)
    layer = QuantizedLayer(chosen)
    keys, values = states(40, dtype, head_dim)
    seen = layer.update(keys, values)
    assert torch.equal(seen[0], keys) and torch.equal(seen[1], values)  # a prompt is read exactly
    more = states(1, dtype, head_dim)
    seen = layer.update(*more)
    stored = reference(keys[:, :, :32].float(), values[:, :, :32].float(), chosen)
    for found, old, plain, new in zip(seen, stored, (keys, values), more, strict=True):
        slack = {torch.float32: 1e-4, torch.bfloat16: 1.0, torch.float16: 0.1}[dtype]
        assert torch.allclose(found[:, :, :32].float(), old, atol=slack, rtol=0)
        assert torch.equal(found[:, :, 32:40], plain[:, :, 32:]) and torch.equal(found[:, :, 40:], new)


def test_groups_that_are_all_one_value_are_exact() -> None:
    groups = torch.tensor([0.0, -3.25, 1e4])[:, None].expand(3, 16).contiguous()
    assert torch.equal(Groups.of(groups, 2).values(), groups)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.sampled_from([2, 4, 8]))
def test_what_is_stored_does_not_depend_on_how_it_came(parts: list[int], bits: int) -> None:
    keys, values = states(sum(parts))
    layer, whole = QuantizedLayer(options(bits)), QuantizedLayer(options(bits))
    start = 0
    for part in parts:
        found = layer.update(keys[:, :, start : start + part], values[:, :, start : start + part])
        start += part
        assert found[0].shape[2] == start and layer.get_seq_length() == start
    whole.update(keys, values)
    last = states(1)
    for found, expected in zip(layer.update(*last), whole.update(*last), strict=True):
        assert torch.equal(found, expected)
    assert layer.held() == whole.held()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_counted_to_the_last(bits: int) -> None:
    layer = QuantizedLayer(options(bits, residual=64))
    assert layer.held() == (0, 0)
    keys, values = states(150, torch.bfloat16)
    layer.update(keys, values)
    each = 2 * 2 * 128 * HEAD  # values of the stored tokens
    packed, groups, waiting = each * bits // 8, each // 16, 2 * 2 * 22 * HEAD
    assert layer.held() == (2 * (packed + groups * (2 + 2) + waiting * 2), keys.nbytes + values.nbytes)
    assert layer.keys.untyped_storage().nbytes() == waiting * 2  # nothing stored is held a second time
    layer.reset()
    assert layer.held() == (0, 0) and layer.get_seq_length() == 0


def test_only_greedy_decoding() -> None:
    layer = QuantizedLayer(options(4))
    for call in (layer.crop, layer.reorder_cache, layer.batch_select_indices):
        with pytest.raises(NotImplementedError, match="greedy"):
            call(torch.tensor([0]))


def test_steps_of_the_residual_are_the_same_as_token_by_token(tiny: Any) -> None:
    ids = torch.randint(300, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        steps = logits_of(tiny.model, ids, Caches(tiny.model, options(2)))
        with Caches(tiny.model, options(2)).fresh() as cache:
            single = [
                tiny.model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(100)
            ]
        plain = tiny.model(input_ids=ids).logits
    assert torch.allclose(steps, torch.cat(single, dim=1), atol=2e-3, rtol=0)
    assert torch.allclose(steps[:, :32], plain[:, :32], atol=1e-4)  # nothing was stored yet
    assert not torch.allclose(steps[:, 32:], plain[:, 32:], atol=0.1)


def test_more_bits_are_nearer_and_eight_are_all_but_exact(baby: Any) -> None:
    ids = torch.tensor(
        baby.tokenizer("Once upon a time there was a little girl named Lily. " * 4)["input_ids"]
    )[None]
    ids = ids[:, :200]
    with torch.inference_mode():
        plain = torch.log_softmax(logits_of(baby.model, ids, Caches(baby.model, None)), dim=-1)
        divergence = {}
        for bits in (2, 4, 8):
            found = logits_of(baby.model, ids, Caches(baby.model, options(bits)))
            terms = plain.exp() * (plain - torch.log_softmax(found, dim=-1))
            divergence[bits] = float(terms.sum(-1).mean())
    assert divergence[8] < 1e-4 < divergence[2] and divergence[8] < divergence[4] < divergence[2]


def test_generation_runs_on_it(tiny: Any) -> None:
    prompt = "SELECT name FROM players; " * 8
    caches = Caches(tiny.model, options(2))
    (found,) = generate(
        tiny.model, tiny.tokenizer, [prompt], batch_size=1, max_new_tokens=40, device="cpu",
        stop_at_statement=False, caches=caches,
    )  # fmt: skip
    ids = torch.tensor(tiny.tokenizer(prompt)["input_ids"])[None]
    written: list[int] = []
    with torch.inference_mode(), Caches(tiny.model, options(2)).fresh() as cache:
        while len(written) < 40:
            token = int(tiny.model(input_ids=ids, past_key_values=cache).logits[0, -1].argmax())
            if token == tiny.tokenizer.eos_token_id:
                break
            written.append(token)
            ids = torch.tensor([[token]])
    assert found.text == tiny.tokenizer.decode(written, skip_special_tokens=True) and len(written) > 30
    plain = generate(
        tiny.model, tiny.tokenizer, [prompt], batch_size=1, max_new_tokens=40, device="cpu",
        stop_at_statement=False,
    )  # fmt: skip
    assert plain[0].text != found.text  # two bits are felt
    record = caches.details()["kv_cache"]
    assert (
        record["quantized_layers"] == record["layers"] == 2
        and 0 < record["bytes"] < record["unquantized_bytes"]
    )


@pytest.mark.parametrize("task", ["perplexity", "fidelity"])
def test_tasks_run_with_the_recipes_cache_and_record_it(task: str, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(STORY, encoding="utf-8")
    text = f"""kind: evaluate
evaluate: [{task}]
tasks:
  perplexity: {{source: {tmp_path}/t.txt, seq_len: 128}}
  fidelity: {{source: {tmp_path}/t.txt, seq_len: 128}}
"""
    found = {}
    for bits in (None, 8, 2):
        more = [] if bits is None else [f"tasks.kv_cache={{bits: {bits}, group_size: 16, residual: 32}}"]
        recipe = parse_recipe(text, overrides=more)
        result = run_task(task, tiny, recipe.tasks.of(task), baseline=tiny, progress=Silent())
        assert ("kv_cache" in result.details) == (bits is not None)
        found[bits] = result
    assert found[2].details["kv_cache"]["bits"] == 2 and found[2].details["kv_cache"]["residual"] == 32
    assert found[2].details["kv_cache"]["bytes"] < found[8].details["kv_cache"]["bytes"]
    if task == "perplexity":
        plain, eight, two = (found[bits].metrics["nll"] for bits in (None, 8, 2))
        assert abs(eight - plain) < min(0.002, abs(two - plain)) and eight != plain
    if task == "fidelity":
        assert (
            found[None].metrics["kl_max"] == 0
            and found[8].metrics["kl_mean"] < 0.01 * found[2].metrics["kl_mean"]
        )


def test_layers_with_a_window_keep_their_own_cache() -> None:
    from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    size: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 24,
    }  # fmt: skip
    mixed = Qwen2ForCausalLM(Qwen2Config(**size, use_sliding_window=True, max_window_layers=3)).eval()
    ids = torch.randint(50, (1, 80))
    caches = Caches(mixed, options(8))
    with torch.inference_mode():
        found, plain = logits_of(mixed, ids, caches), mixed(input_ids=ids, use_cache=False).logits
    assert caches.details()["kv_cache"]["quantized_layers"] == 3
    assert torch.allclose(found, plain, atol=1e-2)
    windowed = MistralForCausalLM(MistralConfig(**size))
    with pytest.raises(RecipeError, match="no layer"), Caches(windowed, options(8)).fresh():
        pass
