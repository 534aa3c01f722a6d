"""`type: auto`: what types cost, what there is to spend, and whole runs of the size that was asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from quantlab.commands.plan import Options, lines, plan
from quantlab.commands.quantize import show
from quantlab.errors import RecipeError
from quantlab.formats.gguf.encode import encode
from quantlab.models.blockwise import BlockwiseModel
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Silent
from quantlab.quant.checkpoint import CheckpointWriter
from quantlab.quant.estimate.checkpoint_size import checkpoint_bytes
from quantlab.quant.grid import layer_loss
from quantlab.quant.hessian import InputHessian
from quantlab.quant.jobs import check, described, expected_bytes, selection
from quantlab.quant.mixed_precision import type_costs
from quantlab.quant.mixed_precision.choose_types import choose_types, table
from quantlab.quant.mixed_precision.file_budget import file_budget
from quantlab.quant.mixed_precision.type_costs import Diagonals, Outside, layer_costs
from quantlab.quant.pipeline import Job, Settings, quantize
from quantlab.recipe.load import find_recipe, load_recipe, parse_recipe
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.block_types import BLOCK_TYPES
from quantlab.registry.mixtures import candidates
from tests.conftest import write_tiny

CALIBRATION = {"source": "calib/general.jsonl", "rows": 4, "seq_len": 64}
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
ROWS = torch.randint(1, 250, (4, 48), generator=torch.Generator().manual_seed(3))


def recipe(size: int | str | None, method: str = "imatrix", **more: Any) -> QuantizeRecipe:
    keys = {"method": method, "type": "auto", "size": size, "evaluate": [], "calibration": CALIBRATION}
    return QuantizeRecipe(**(keys | more))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tied"), hidden=256, layers=2, tie=True)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of its own, and rows that are no multiple of 256."""
    return write_tiny(tmp_path_factory.mktemp("apart"), hidden=96, layers=2, dtype="float32")


def run(model: Path, out: Path, recipes: dict[str, QuantizeRecipe], **settings: Any) -> dict[str, Path]:
    jobs = [Job(name, found, out / name) for name, found in recipes.items()]
    quantize(jobs, str(model), progress=Silent(), settings=Settings(device="cpu", **settings))
    return {name: out / name for name in recipes}


def weights(checkpoint: Path) -> bytes:
    (file,) = checkpoint.glob("*.gguf")
    return file.read_bytes()


def test_types_that_a_row_can_have() -> None:
    assert candidates(512) == K_QUANTS
    assert candidates(576) == ("IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
    assert candidates(48) == ()
    assert candidates(512, ("Q4_0", "Q8_0", "Q3_K")) == ("Q3_K", "Q4_0", "Q8_0")
    assert candidates(576, ("Q3_K", "Q4_K")) == ("Q4_0", "Q5_0")  # as llama.cpp falls back
    assert candidates(48, ("Q3_K",)) == ()


@pytest.mark.parametrize("tokens", [0, 64])
def test_costs_of_a_layer_are_its_errors_by_channel(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=generator) for shape in ((40, 64), (64, 64)))
    fisher = torch.rand(40, generator=generator) + 0.1
    hessian = x.t() @ x / 64 if tokens else torch.zeros(64, 64)
    moments = InputHessian(["q"], hessian, x.abs().mean(0), tokens)
    found = layer_costs(weight, moments, fisher, ["Q4_0", "Q8_0"])
    for kind, cost in found.items():
        importance = torch.diagonal(hessian) if tokens else None
        made = encode(weight, BLOCK_TYPES[kind], importance).dequantize()
        each = [layer_loss(weight[i : i + 1], made[i : i + 1], hessian) * fisher[i] for i in range(40)]
        assert cost == pytest.approx(float(sum(each)), rel=1e-4)
    if tokens:
        assert found["Q8_0"] < found["Q4_0"] / 50
        monkeypatch.setattr(type_costs, "SAMPLED", 20)  # half of the rows stand for all
        assert layer_costs(weight, moments, fisher, ["Q4_0"])["Q4_0"] == pytest.approx(found["Q4_0"], rel=0.3)


@torch.no_grad()
@pytest.mark.parametrize("which", ["tied", "apart"])
def test_costs_foretell_the_divergence(which: str, request: pytest.FixtureRequest) -> None:
    """One matrix at a time in one type: the divergence of the model, in nats a token."""
    from transformers import AutoModelForCausalLM

    folder = request.getfixturevalue(which)
    opened = BlockwiseModel(open_files(folder), "cpu", torch.float32)
    kind = "Q3_K" if which == "tied" else "Q4_0"
    roles = {"model.embed_tokens": Outside(True, which == "tied")}
    roles |= {} if which == "tied" else {"lm_head": Outside(False, True)}
    wanted = {name: [kind] for name in (*opened.layers.shapes, *roles)}
    kept = Diagonals()
    costs = type_costs.type_costs(opened, ROWS, wanted, roles, Silent(), keep=kept)
    assert costs.keys() == wanted.keys()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain = model(input_ids=ROWS).logits.log_softmax(-1)
    ratios = {}
    for name in wanted:
        weight = model.get_submodule(name).weight
        before = weight.detach().clone()
        diagonal = next(
            (
                one.diagonal
                for i, block in enumerate(kept.blocks)
                for one in block
                if any(name == f"model.layers.{i}.{layer}" for layer in one.layers)
            ),
            None,
        )
        weight.copy_(encode(before, BLOCK_TYPES[kind], diagonal).dequantize())
        moved = model(input_ids=ROWS).logits.log_softmax(-1)
        weight.copy_(before)
        ratios[name] = costs[name][kind] / (plain.exp() * (plain - moved)).sum(-1).mean().item()
    assert min(ratios.values()) > 0.3 and max(ratios.values()) < 3, ratios
    again = type_costs.type_costs(
        opened, ROWS, wanted, roles, Silent(), rows_at_once=2, spill=folder / "states"
    )
    assert again["model.embed_tokens"] == costs["model.embed_tokens"]


def test_the_choice_costs_no_more_than_a_mixture_of_that_size(tied: Path) -> None:
    files = open_files(str(tied))
    mixture = QuantizeRecipe(method="imatrix", type="Q4_K_M", calibration=CALIBRATION)
    size = checkpoint_bytes(mixture, files)
    wish = recipe(size)
    budget = file_budget(wish, files, selection(wish, files))
    assert budget.size == size == budget.fixed + sum(
        one.bytes(kind) for one in budget.matrices
        for kind in [(selection(mixture, files).widths | selection(mixture, files).outside)[one.parts[0]]]
        for kind in [kind if isinstance(kind, str) else kind.type]
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    costs = {
        part: {kind: 2.0 ** -BLOCK_TYPES[kind].bits * scale for kind in one.types}
        for one in budget.matrices
        for part, scale in zip(
            one.parts, torch.rand(len(one.parts), generator=generator).tolist(), strict=True
        )
    }
    choice = choose_types(budget, costs)
    named = {name: width.type for name, width in selection(mixture, files).widths.items()}
    named |= dict(selection(mixture, files).outside)
    assert choice.size <= size and choice.cost <= sum(costs[name][kind] for name, kind in named.items())
    assert choice.cost == pytest.approx(sum(costs[name][kind] for name, kind in choice.parts.items()))


@pytest.mark.parametrize("which", ["tied", "apart"])
def test_files_have_the_size_that_was_asked_for(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By two fillings from one run, verified; what was chosen is in the record and in the file."""
    model = request.getfixturevalue(which)
    files = open_files(str(model))
    wish = recipe("1GiB")
    with pytest.raises(RecipeError) as refused:
        check(wish, files)
    range_ = re.search(r"from ([\d,]+) to ([\d,]+) bytes", str(refused.value))
    assert range_ is not None
    least, most = (int(number.replace(",", "")) for number in range_.groups())
    size = (2 * least + most) // 3
    every = {"weighed": recipe(size), "solved": recipe(size, "gptq", act_order="group")}
    made = run(model, tmp_path, every, verify=True)
    for name, path in made.items():
        record = json.loads((path / "quantlab.json").read_text())
        assert record["verification"]["passed"] and record["verification"]["relative"] < 1e-5
        (file,) = path.glob("*.gguf")
        assert 0.97 * size < file.stat().st_size <= size == checkpoint_bytes(every[name], files)
        assert record["types"]["size"] == file.stat().st_size and record["types"]["allowed"] == size
        reader = gguf.GGUFReader(file)
        kinds = {t.name.removesuffix(".weight"): t.tensor_type.name for t in reader.tensors}
        assert all(kinds[tensor] == kind for tensor, kind in record["types"]["tensors"].items())
        assert {"token_embd", "blk.0.attn_q"} <= record["types"]["tensors"].keys()
        assert ("output" in record["types"]["tensors"]) == (which == "apart")
        assert len(set(record["types"]["tensors"].values())) > 1
        assert reader.fields["general.file_type"].contents() in {2, 3, 7, 8, 9, 10, 11, 14, 16, 17, 18, 25}
        assert size < expected_bytes(every[name], files)
    summary = {"status": "done", "rows": [], "types": {"weighed": record["types"]}, "checkpoints": {}}
    show(summary | {"leaderboard": None}, as_json=False)
    shown = capsys.readouterr().out
    assert f"of {size:,} bytes; tensors of each type:" in shown and "ffn_down" in shown
    alone = run(model, tmp_path / "alone", {"weighed": every["weighed"]})
    assert weights(alone["weighed"]) == weights(made["weighed"])


class Killed(BaseException):
    pass


def test_a_killed_run_ends_in_the_same_bytes(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {
        "weighed": recipe(None, target_bits=4.3),
        "solved": recipe(None, "gptq", target_bits=3.7, propagate="corrected"),
    }
    expected = {name: weights(path) for name, path in run(tied, tmp_path / "whole", two).items()}
    alone = {"weighed": two["weighed"]}
    assert weights(run(tied, tmp_path / "one", alone)["weighed"]) == expected["weighed"]
    places = [("write_outside", 0), ("write_block", 1), ("publish", 1)]
    for names in (two, alone):
        for method, at in places if names is two else places[1:2]:
            original, left = getattr(CheckpointWriter, method), [None] * at

            def dying(
                self: Any, *args: Any, original: Any = original, left: list[Any] = left, **more: Any
            ) -> Any:
                if not left:
                    raise Killed
                left.pop()
                return original(self, *args, **more)

            out = tmp_path / f"{method}-{at}-{len(names)}"
            with monkeypatch.context() as killing:
                killing.setattr(CheckpointWriter, method, dying)
                with pytest.raises(Killed):
                    run(tied, out, names)
            left_over = {name: found for name, found in names.items() if not (out / name).exists()}
            run(tied, out, left_over, resume=True)
            assert all(weights(out / name) == expected[name] for name in names), (method, at)


def test_experts_of_a_layer_have_one_type(saved: Any, tmp_path: Path) -> None:
    made = run(saved("qwen3_moe"), tmp_path, {"q": recipe(None, target_bits=6.0)}, verify=True)["q"]
    record = json.loads((made / "quantlab.json").read_text())
    assert any(name.endswith("ffn_down_exps") for name in record["types"]["tensors"])
    assert record["types"]["size"] == len(weights(made)) <= record["types"]["allowed"]


def test_layers_that_are_named_keep_what_they_are_given(tied: Path, tmp_path: Path) -> None:
    wish = recipe(
        None, target_bits=4.0, types=["Q3_K", "Q5_K"], ignore=["model.layers.0.mlp.up_proj"],
        overrides={"down_proj": {"type": "Q8_0"}},
    )  # fmt: skip
    made = run(tied, tmp_path, {"q": wish})["q"]
    (file,) = made.glob("*.gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_up.weight"] == "BF16" and kinds["blk.1.ffn_down.weight"] == "Q8_0"
    tensors = json.loads((made / "quantlab.json").read_text())["types"]["tensors"]
    assert {*tensors.values()} == {"Q3_K", "Q5_K"} and "blk.1.ffn_down" not in tensors


def test_statistics_of_an_earlier_run_serve(tied: Path, tmp_path: Path) -> None:
    wish = {"q": recipe(None, "gptq", target_bits=4.0)}
    first = run(tied, tmp_path / "a", wish, save_statistics=tmp_path / "statistics")
    again = run(tied, tmp_path / "b", wish, statistics=tmp_path / "statistics")
    assert weights(first["q"]) == weights(again["q"])


def test_plans_say_what_is_open(tied: Path) -> None:
    files = open_files(str(tied))
    wish = recipe(None, target_bits=4.5)
    said = "\n".join(described(wish, files))
    assert "15 matrices get one of Q2_K, Q3_K" in said and "chosen after the calibration pass" in said
    summary = plan([("q", wish)], Options(str(tied)))
    assert summary["recipes"][0]["size_bytes"] == checkpoint_bytes(wish, files)
    assert f"at most {checkpoint_bytes(wish, files):,} bytes" in "\n".join(lines(summary))
    assert summary["recipes"][0]["parts"]["choosing types"] > 0


def test_recipes_that_cannot_be_are_refused(tied: Path) -> None:
    assert recipe("90MB").size == 90_000_000 and recipe("1.5MiB").size == 1_572_864
    assert recipe("90MB").digest() == recipe(90_000_000).digest() != recipe("91MB").digest()
    assert QuantizeRecipe(method="gptq", size="1MB").type == "auto"
    written = QuantizeRecipe(method="imatrix", format="gguf", bits="auto", target_bits=4.0)
    assert written.type == "auto" and parse_recipe(written.to_yaml()).digest() == written.digest()
    bundled = load_recipe(find_recipe("gguf-auto"))
    assert isinstance(bundled, QuantizeRecipe) and bundled.opens_types
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "@size: type: auto needs the most bytes"),
        ({"size": "1MB", "target_bits": 4.0}, "and not both"),
        ({"size": "many"}, "expected a size such as 90MB"),
        ({"size": -1}, "expected a size such as"),
        ({"size": "1MB", "bits": 4}, "@bits: type: auto chooses it"),
        ({"size": "1MB", "group_size": 32}, "@group_size: type: auto chooses it"),
        ({"size": "1MB", "symmetric": False}, "@symmetric: type: auto chooses it"),
        ({"size": "1MB", "types": ["Q4_K_M"]}, "@types: expected block types"),
        ({"size": "1MB", "types": ["Q4_K", "Q4_K"]}, "each once"),
        ({"size": "1MB", "type": "Q4_K"}, "@size: goes with type: auto"),
        ({"size": "1MB", "calibration": {"imatrix": "i.gguf"}}, "which an importance matrix does not say"),
    ]
    for keys, match in wrong:
        with pytest.raises(ValueError, match=match):
            QuantizeRecipe(**({"method": "imatrix", "type": "auto"} | keys))
    with pytest.raises(ValueError, match="rtn does without|not an option of rtn"):
        QuantizeRecipe(method="rtn", type="auto", size="1MB")
    with pytest.raises(ValueError, match="rtn does without; gptq, imatrix have it"):
        QuantizeRecipe(method="rtn", type="auto")
    with pytest.raises(ValueError, match="@size: goes with format: gguf"):
        QuantizeRecipe(method="gptq", format="gptq", size="1MB")
    with pytest.raises(RecipeError, match="size: 1,000 bytes is not possible: these types make files of"):
        check(recipe(1000), str(tied))
    with pytest.raises(RecipeError, match="target_bits: 2 bits a weight"):
        check(recipe(None, target_bits=2.0), str(tied))


def test_the_table_counts_tensors_by_kind_and_type() -> None:
    tensors = {"token_embd": "Q6_K", "blk.0.attn_q": "Q3_K", "blk.1.attn_q": "Q3_K", "blk.0.attn_v": "Q6_K"}
    assert table({"size": 900, "allowed": 1000, "tensors": tensors}) == [
        "900 of 1,000 bytes; tensors of each type:",
        "            Q3_K  Q6_K",
        "token_embd           1",
        "attn_q         2",
        "attn_v               1",
    ]
