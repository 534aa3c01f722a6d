"""Many architectures, one engine: walked block by block they compute what the whole model does, headers name exactly
the linears that are quantized, and quantized checkpoints of all of them are read back as what was solved."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quantlab.errors import DataError
from quantlab.formats import format_module
from quantlab.models.block_inputs import PerRow, Repeated
from quantlab.models.blockwise import BlockwiseModel, run_block
from quantlab.models.layers import linears
from quantlab.models.load import load_model
from quantlab.models.refusals import refuse_other_kinds
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Silent
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.quantize import QuantizeRecipe
from tests.conftest import WORDS, byte_tokenizer
from tests.models.tiny_architectures import ARCHITECTURES, MIXTURES, write_architecture

IDS = torch.randint(1, 257, (3, 24), generator=torch.Generator().manual_seed(1))
SEPARATORS = ("qweight", "weight_packed", "weight_scale")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Architectures on disk, each built once."""
    folder = tmp_path_factory.mktemp("architectures")

    def find(name: str) -> Path:
        if not (folder / name).is_dir():
            write_architecture(folder / name, name)
            byte_tokenizer().save_pretrained(folder / name)
        return folder / name

    return find


def whole(path: Path, **keys: Any) -> Any:
    """The model as plain transformers opens it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **keys).eval()


class Given(nn.Module):
    """Returns what it is told, whatever it is called with; ``None``: what it is called with."""

    def __init__(self, value: torch.Tensor | None, packed: bool) -> None:
        super().__init__()
        self.value, self.packed = value, packed

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        value = hidden_states if self.value is None else self.value
        return (value,) if self.packed else value


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_by_block_is_the_whole_model(saved: Any, name: str) -> None:
    """Embeddings, masks, rotary tables and blocks: the last hidden states, put before its own norm and head, give
    its logits. Rows go through the blocks in batches, though calls are recorded from one."""
    opened = BlockwiseModel(open_files(saved(name)), "cpu", torch.float32)
    assert all(p.device.type == "meta" for p in opened.model.parameters())
    hidden, calls = opened.inputs(IDS)
    packed = False
    with torch.no_grad():
        for index in range(len(opened.blocks)):
            block = opened.block(index)
            args, keys = calls[index].of(1)
            packed = isinstance(block(hidden[:1], *args, **keys), tuple)
            hidden = torch.cat(
                [run_block(block, hidden[p], calls[index], rows=p) for p in (slice(0, 2), slice(2, 3))]
            )
            opened.empty(block)
        assert all(p.device.type == "meta" for p in opened.model.parameters())
        model = whole(saved(name))
        expected = model(input_ids=IDS).logits
        parent, _, leaf = opened.prefix.rpartition(".")
        body = model.get_submodule(parent)
        count = len(getattr(body, leaf))
        setattr(
            body, leaf, nn.ModuleList(Given(hidden if i == count - 1 else None, packed) for i in range(count))
        )
        torch.testing.assert_close(
            model(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_headers_name_what_is_quantized(saved: Any, name: str) -> None:
    """Told from file headers, without torch: exactly the linears that the engine finds in the blocks."""
    files = open_files(saved(name))
    assert len(files.weight_files) > 1
    opened = BlockwiseModel(files, "cpu", torch.float32)
    found = {
        opened.names.on_disk(f"{opened.prefix}.{i}.{n}"): tuple(layer.weight.shape)
        for i, block in enumerate(opened.blocks)
        for n, layer in linears(block).items()
    }
    assert found == files.block_linears() and found
    assert files.block_prefix == opened.stored_prefix
    assert not [n for n in found if n.endswith(("gate", "router", "norm")) or "embed" in n]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_go_to_the_files_and_back(saved: Any, name: str) -> None:
    """Every tensor of the files has one place in the skeleton and the other way round; so have packed tensors."""
    files = open_files(saved(name))
    opened = BlockwiseModel(files, "cpu", torch.float32)
    inside = {n: opened.names.in_model(n) for n in files.tensors}
    assert set(inside.values()) <= set(opened.model.state_dict()) and len(set(inside.values())) == len(inside)
    assert {opened.names.on_disk(m) for m in inside.values()} == set(inside)
    for stored in files.block_linears():
        module = opened.names.in_model(stored)
        assert isinstance(opened.model.get_submodule(module), nn.Linear)
        assert opened.names.on_disk(f"{module}.qweight") == f"{stored}.qweight"
        assert opened.names.in_model(f"{stored}.g_idx") == f"{module}.g_idx"
    kept = opened.left_out(files.block_linears())
    assert "lm_head" in kept and not set(kept) & set(files.block_linears())


def test_names_that_differ(saved: Any) -> None:
    opened = BlockwiseModel(open_files(saved("mixtral")), "cpu", torch.float32)
    assert opened.names.on_disk("model.layers.1.mlp.experts.2.w3.qweight") == (
        "model.layers.1.block_sparse_moe.experts.2.w3.qweight"
    )
    opened = BlockwiseModel(open_files(saved("gpt_neox")), "cpu", torch.float32)
    assert {"lm_head", "embed_out"} <= set(opened.left_out(opened.layers.shapes))
    opened = BlockwiseModel(open_files(saved("qwen2_moe")), "cpu", torch.float32)
    assert "model.layers.0.mlp.shared_expert_gate" in opened.layers.plain


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_apart_compute_what_they_do_merged(saved: Any, name: str) -> None:
    """transformers' own merged module against the separated one, on routing that leaves an expert out."""
    opened = BlockwiseModel(open_files(saved(name)), "cpu", torch.float32)
    model = whole(saved(name))
    seen: dict[str, int] = {}
    last = len(opened.blocks) - 1
    block = opened.block(last)
    apart, merged = block.mlp.experts, model.get_submodule(f"{opened.prefix}.{last}").mlp.experts
    for key, layer in linears(apart).items():
        layer.register_forward_pre_hook(lambda m, args, key=key: seen.__setitem__(key, len(args[0])))
    tokens = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 1], [0, 3], [1, 0], [3, 1]])
    weights = torch.rand(7, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(apart(tokens, chosen, weights), merged(tokens, chosen, weights))
    assert len(seen) == 12 and {n for key, n in seen.items() if key.startswith("2.")} == {0}
    assert {n for key, n in seen.items() if key.startswith("0.")} == {5}


def test_experts_of_another_kind_stay_as_they_are(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture whose experts limit their output looks the same by its parameters; its miniature gives it
    away."""
    from transformers.models.mixtral import modeling_mixtral

    original = modeling_mixtral.MixtralExperts.forward

    def limited(self: Any, hidden_states: Any, *args: Any) -> Any:
        return original(self, hidden_states, *args).clamp(-1, 1)

    monkeypatch.setattr(modeling_mixtral.MixtralExperts, "forward", limited)
    layers = BlockwiseModel(open_files(saved("mixtral")), "cpu", torch.float32).layers
    assert not layers.experts and not layers.merged and layers.computed
    assert "one tensor" in layers.kept["model.layers.0.block_sparse_moe.experts"]


def test_calls_share_their_tensors(saved: Any) -> None:
    """Two blocks of two kinds hold a mask each, not one for every row; copies of equal content are kept once."""
    opened = BlockwiseModel(open_files(saved("gemma2")), "cpu", torch.float32)
    _, calls = opened.inputs(IDS)
    masks = [c.kwargs["attention_mask"] for c in calls]
    assert masks[0] is not None and all(m is None or len(m.one) == 1 for m in masks)
    tables = [c.kwargs["position_embeddings"] for c in opened.inputs(IDS)[1]]
    held = {id(t.one if isinstance(t, Repeated) else t) for pair in tables for t in pair}
    assert len(held) <= 2


def test_calls_that_depend_on_the_tokens(saved: Any) -> None:
    opened = BlockwiseModel(open_files(saved("llama")), "cpu", torch.float32)
    body = opened.model.get_submodule("model")
    plain = body.forward

    def own(input_ids: torch.Tensor, use_cache: bool) -> Any:
        return plain(input_ids, use_cache=use_cache, extra=input_ids * 2)

    body.forward = own  # type: ignore[method-assign]
    _, calls = opened.inputs(IDS)  # each row its own: kept for all of them, and handed out with them
    extra = calls[1].kwargs["extra"]
    assert isinstance(extra, PerRow) and torch.equal(extra.values, IDS * 2)
    assert torch.equal(calls[1].of(2, slice(1, 3))[1]["extra"], IDS[1:] * 2)

    def entangled(input_ids: torch.Tensor, use_cache: bool) -> Any:
        return plain(input_ids, use_cache=use_cache, extra=input_ids.sum(dim=0))

    body.forward = entangled  # type: ignore[method-assign]
    with pytest.raises(DataError, match="more than hidden states"):
        opened.inputs(IDS)


def test_a_missing_tensor_is_found_at_once(saved: Any, tmp_path: Path) -> None:
    """transformers would start it from random numbers."""
    model = shutil.copytree(saved("llama"), tmp_path / "model")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    file = model / index["weight_map"].pop(name)
    save_file({n: t for n, t in load_file(file).items() if n != name}, file, metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="layers.1.mlp.up_proj.weight .*not in its files"):
        BlockwiseModel(open_files(model), "cpu", torch.float32)
    with pytest.raises(DataError, match="layers.1.mlp.up_proj.weight .*not in its files"):
        load_model(model, device="cpu")


def test_attention_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=257, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="not causal"):
        BlockwiseModel(open_files(tmp_path), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_encoder_decoder": True}, "an encoder with a decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"architectures": ["RobertaForMaskedLM"]}, "not a causal language model"),
    ],
)
def test_other_heads_are_refused_from_the_configuration(
    saved: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model = shutil.copytree(saved("llama"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | change
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message):
        refuse_other_kinds(open_files(model))
    with pytest.raises(DataError, match=message):
        BlockwiseModel(open_files(model), "cpu", torch.float32)


def test_code_from_a_model_runs_only_when_allowed(saved: Any, tmp_path: Path) -> None:
    model = shutil.copytree(saved("llama"), tmp_path / "model")
    marker = tmp_path / "ran"
    (model / "configuration_own.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).write_text('x')\n"
    )
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="needs Python code") as caught:
        BlockwiseModel(open_files(model), "cpu", torch.float32)
    assert "--trust-remote-code" in caught.value.hint and not marker.exists()
    config.pop("auto_map")
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="no causal language model"):
        BlockwiseModel(open_files(model), "cpu", torch.float32)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seeded = random.Random(0)
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(" ".join(seeded.choice(WORDS.split()) for _ in range(900)), encoding="utf-8")
    return path


def recipe(method: str, words: Path, **keys: Any) -> QuantizeRecipe:
    if method in ("gptq", "awq"):
        keys["calibration"] = {"source": str(words), "rows": 6, "seq_len": 48}
    return QuantizeRecipe.model_validate({"method": method, "bits": 4, "group_size": 32, **keys})


def dequantized(checkpoint: Path, target: Path) -> Path:
    """The checkpoint as a plain float32 model: every packed linear unpacked by its own layout module."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(file)
    config = json.loads((checkpoint / "config.json").read_text())
    told = config.pop("quantization_config")
    packed = {n.rpartition(".")[0] for n in tensors if n.rpartition(".")[2] in SEPARATORS}
    plain = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if (owner not in packed or leaf == "bias") and not name.endswith("act.scales"):
            plain[name] = tensor.float()
    for owner in packed:
        parts = {n[len(owner) + 1 :]: t for n, t in tensors.items() if n.startswith(f"{owner}.")}
        codes, scales, zeros, group = format_module(told["quant_method"]).unpack(parts, bits=4, group_size=32)
        plain[f"{owner}.weight"] = ((codes.float() - zeros[:, group]) * scales[:, group]).contiguous()
    target.mkdir()
    save_file(plain, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return target


def logits_and_shares(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [rows, seq_len, vocabulary] for IDS, and with what weight each token goes to each expert of each layer
    [rows, seq_len, experts of all layers]: nothing for a model without experts."""
    shares = [torch.zeros(*IDS.shape, 0)]

    def routed(module: Any, args: Any, output: Any) -> None:
        _, weights, chosen = output
        share = torch.zeros(IDS.numel(), module.weight.shape[0])
        shares.append(share.scatter_(1, chosen, weights.float()).view(*IDS.shape, -1))

    routers = [m for n, m in model.named_modules() if n.endswith((".mlp.gate", ".mlp.router"))]
    handles = [router.register_forward_hook(routed) for router in routers]
    logits = model(input_ids=IDS).logits
    for handle in handles:
        handle.remove()
    return logits, torch.cat(shares, dim=-1)


def decided_alike(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Tokens up to which, in their row, every router decided alike, bool [rows, seq_len]. Kernels work in 16 bit: where
    two experts score alike a token may go to the other, whose function is another, and later tokens attend to it."""
    jumped = ((one - other).abs() > 0.1).any(dim=-1)
    return jumped.long().cumsum(dim=1) == 0


@pytest.mark.parametrize(
    "name", [n for n in ARCHITECTURES if n != "falcon"]
)  # its fused rows are no multiple of 32
def test_checkpoints_are_read_back(saved: Any, words: Path, tmp_path: Path, name: str) -> None:
    """What readers compute from a checkpoint is what the model computes with the solved weights put in; the files hold
    nothing that the original's names do not lead to."""
    recipes = {"gptq": recipe("gptq", words), "awq": recipe("awq", words)}
    jobs = [Job(key, one, tmp_path / key) for key, one in recipes.items()]
    original = set(open_files(saved(name)).tensors)
    with torch.no_grad():
        before = whole(saved(name))(input_ids=IDS).logits
        for outcome in quantize(jobs, str(saved(name)), device="cpu", progress=Silent()):
            assert outcome.checkpoint is not None
            plain = whole(dequantized(outcome.checkpoint, tmp_path / f"{outcome.job.name}-plain"))
            expected, wanted = logits_and_shares(plain)
            subject = load_model(outcome.checkpoint, device="cpu", dtype="float32")
            got, shares = logits_and_shares(subject.model)
            alike = decided_alike(wanted, shares)
            assert alike.all() or (name in MIXTURES and alike.float().mean() > 0.5)
            assert (got - expected)[alike].norm() < 0.02 * expected[alike].norm()
            assert 0.005 * before.norm() < (expected - before).norm() < 0.9 * before.norm()
            assert subject.params == open_files(saved(name)).params
            stored = set(open_files(outcome.checkpoint).tensors)
            modules = {n.rpartition(".")[0] for n in stored if not n.endswith("act.scales")}
            assert modules == {n.rpartition(".")[0] for n in original}


def test_experts_in_compressed_tensors_load_in_plain_transformers(
    saved: Any, words: Path, tmp_path: Path
) -> None:
    jobs = [Job("q", recipe("rtn", words, format="compressed-tensors"), tmp_path / "q")]
    outcome = quantize(jobs, str(saved("qwen2_moe")), device="cpu", progress=Silent())[0]
    assert outcome.checkpoint is not None
    with torch.no_grad():
        expected = whole(dequantized(outcome.checkpoint, tmp_path / "plain"))(input_ids=IDS).logits
        torch.testing.assert_close(
            whole(outcome.checkpoint)(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3
        )


def test_plain_transformers_makes_experts_up(saved: Any, words: Path, tmp_path: Path) -> None:
    """Why quantized mixtures are loaded in a way of their own: when this fails, that way has become needless."""
    jobs = [Job("q", recipe("rtn", words), tmp_path / "q")]
    outcome = quantize(jobs, str(saved("mixtral")), device="cpu", progress=Silent())[0]
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(outcome.checkpoint, output_loading_info=True)
    assert any("experts" in name for name in info["missing_keys"])
