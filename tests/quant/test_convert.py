"""Checkpoints in another layout: the same weights to the bit, by readers that know nothing of the conversion; or a
refusal that says which linear, why, and what holds it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.commands.convert import Options, convert_checkpoint, lines
from quantlab.errors import DataError, QuantlabError, RecipeError
from quantlab.formats import format_module
from quantlab.formats.gguf.checkpoint import decoded
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Silent
from quantlab.quant.convert.choose import Allowed, choose, fits_of
from quantlab.quant.grid import Quantized
from quantlab.quant.pipeline import Job, Settings, quantize
from quantlab.quant.verify.reference_logits import packed_linears
from quantlab.recipe.quantize import QuantizeRecipe
from tests.command import quantlab
from tests.conftest import write_mixture
from tests.formats.test_codes import random_codes

CALIBRATION = {"source": "calib/general.jsonl", "rows": 2, "seq_len": 32}
SOURCES: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 32, "symmetric": True, "format": "gptq"},
    "gptq-64": {"bits": 4, "group_size": 64, "symmetric": True, "format": "gptq"},
    "gptq-channel": {"bits": 4, "group_size": -1, "symmetric": True, "format": "gptq"},
    "gptq-asymmetric": {"bits": 4, "group_size": 32, "symmetric": False, "format": "gptq"},
    "gptq-3": {"bits": 3, "group_size": 32, "symmetric": True, "format": "gptq"},
    "gptq-8": {"bits": 8, "group_size": 32, "symmetric": True, "format": "gptq"},
    "gptq-16": {"bits": 4, "group_size": 16, "symmetric": True, "format": "gptq"},
    "awq": {"bits": 4, "group_size": 32, "symmetric": False, "format": "awq"},
    "ct": {"bits": 4, "group_size": 32, "format": "compressed-tensors"},
    "ct-8": {"bits": 8, "group_size": 64, "format": "compressed-tensors"},
    "ct-mixed": {"bits": 4, "group_size": 32, "format": "compressed-tensors", "overrides": {"down_proj": {"bits": 8}}},
    "gguf-q4": {"type": "Q4_0"},
    "gguf-q8": {"type": "Q8_0"},
    "gguf-k": {"type": "Q4_K"},
    "kept": {"bits": 4, "group_size": 32, "format": "gptq", "ignore": ["o_proj"]},
    "ordered": {"method": "gptq", "bits": 4, "group_size": 32, "act_order": True, "calibration": CALIBRATION},
}  # fmt: skip
ORDERED = "its columns are out of order"


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of the tiny model by its name in ``SOURCES``; made when it is first asked for."""
    folder = tmp_path_factory.mktemp("sources")

    def find(name: str) -> Path:
        if not (folder / name).exists():
            keys = {"method": "rtn", "evaluate": []} | SOURCES[name]
            recipe = QuantizeRecipe(**(keys | ({"format": "gguf"} if "type" in keys else {})))
            quantize(
                [Job(name, recipe, folder / name)],
                str(tiny),
                progress=Silent(),
                settings=Settings(device="cpu"),
            )
        return folder / name

    return find


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The packed linears of a checkpoint that quantlab wrote, float32, by the readers that it had before."""
    files = open_files(checkpoint)
    config = files.quantized
    assert config is not None
    if config["quant_method"] == "gguf":
        return {name: values for name, values in decoded(checkpoint) if name.endswith("_proj.weight")}
    stored: dict[str, torch.Tensor] = {}
    for file in files.weight_files:
        stored |= load_file(file)
    found = {}
    for name, parts in packed_linears(files).items():
        bits, size = config.get("bits"), config.get("group_size")
        if bits is None:
            groups = config["config_groups"].values()
            mine = next((g for g in groups if name in g["targets"]), None) or next(iter(groups))
            bits, size = mine["weights"]["num_bits"], mine["weights"]["group_size"] or -1
        tensors = {leaf: stored[f"{name}.{leaf}"] for leaf in parts}
        read = format_module(config["quant_method"]).unpack(tensors, bits=bits, group_size=size)
        found[f"{name}.weight"] = Quantized(*read, bits).dequantize()
    return found


def run(source: Path | str, out: Path, to: str, **more: Any) -> dict[str, Any]:
    options = Options(to=to, out=out, **({"verify": False} | more))
    return convert_checkpoint(str(source), options, Silent())


def same(one: Path, other: Path) -> bool:
    before, after = weights(one), weights(other)
    return before.keys() <= after.keys() and all(torch.equal(before[name], after[name]) for name in before)


PAIRS = [
    ("gptq", "awq", ""), ("gptq", "compressed-tensors", ""), ("gptq", "gguf", "Q4_0"), ("gptq-64", "gguf", "Q4_0"),
    ("gptq-64", "awq", ""), ("gptq-channel", "gguf", "Q4_0"), ("gptq-channel", "compressed-tensors", ""),
    ("gptq-asymmetric", "awq", ""), ("gptq-asymmetric", "gguf", "Q5_0"), ("gptq-3", "compressed-tensors", ""),
    ("gptq-3", "gguf", "Q4_0"), ("gptq-8", "gguf", "Q8_0"), ("gptq-8", "compressed-tensors", ""),
    ("awq", "gptq", ""), ("awq", "gguf", "Q5_0"), ("ct", "gptq", ""), ("ct", "awq", ""), ("ct", "gguf", "Q4_0"),
    ("ct-8", "gptq", ""), ("ct-8", "gguf", "Q8_0"), ("ct-mixed", "gguf", "Q4_0"), ("gguf-q8", "gptq", ""),
    ("gguf-q8", "compressed-tensors", ""), ("kept", "awq", ""), ("kept", "gguf", "Q4_0"),
    ("kept", "compressed-tensors", ""),
]  # fmt: skip


@pytest.mark.parametrize(("source", "to", "kind"), PAIRS)
def test_every_weight_is_as_it_was(
    made: Callable[[str], Path], tmp_path: Path, source: str, to: str, kind: str
) -> None:
    found = run(made(source), tmp_path / "out", to)
    assert found["exact"] and found["largest_error"] == 0 and found["type"] == kind
    assert same(made(source), tmp_path / "out")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (made(source) / file).read_bytes()
    assert not list(tmp_path.glob("out.*"))


def plain(checkpoint: Path) -> dict[str, torch.Tensor]:
    stored: dict[str, torch.Tensor] = {}
    for file in open_files(checkpoint).weight_files:
        stored |= load_file(file)
    return {name: tensor for name, tensor in stored.items() if name.endswith(".weight")}


@pytest.mark.parametrize("to", ["awq", "compressed-tensors"])
def test_what_is_not_packed_stays_byte_for_byte(made: Callable[[str], Path], tmp_path: Path, to: str) -> None:
    run(made("kept"), tmp_path / "out", to)
    before, after = plain(made("kept")), plain(tmp_path / "out")
    assert before.keys() == after.keys() and "model.layers.1.self_attn.o_proj.weight" in before
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)


@pytest.mark.parametrize(("source", "through"), [
    ("gptq", "gguf"), ("gptq", "awq"), ("gptq-asymmetric", "awq"), ("gptq-asymmetric", "gguf"), ("gptq-8", "gguf"),
    ("ct", "gptq"), ("awq", "gptq"),
])  # fmt: skip
def test_there_and_back(made: Callable[[str], Path], tmp_path: Path, source: str, through: str) -> None:
    """Also from Q5_0, whose codes are found to be of 4 bits again."""
    back = str(SOURCES[source]["format"])
    run(made(source), tmp_path / "there", through)
    run(tmp_path / "there", tmp_path / "back", back)
    assert same(made(source), tmp_path / "back")
    first, last = (open_files(path).quantized for path in (made(source), tmp_path / "back"))
    assert first is not None and last is not None
    assert {k: v for k, v in first.items() if k not in ("damp_percent", "meta")} == {
        k: v for k, v in last.items() if k not in ("damp_percent", "meta")
    }
    record = json.loads((tmp_path / "back" / "quantlab.json").read_text())
    assert [step["to"] for step in record["converted"]] == [through, back]


def test_llama_cpp_s_negative_scales_are_kept(made: Callable[[str], Path], tmp_path: Path) -> None:
    """A block of Q4_0 has the scale's sign of its largest weight; the embedding is Q6_K, which float32 holds."""
    file = made("gguf-q4")
    expected = weights(made("gguf-q4"))
    assert any((values.view(len(values), -1, 32).amax(-1) > -values.view(len(values), -1, 32).amin(-1)).any()
               for values in expected.values())  # fmt: skip
    for to in ("gptq", "awq", "compressed-tensors"):
        run(file, tmp_path / to, to)
        found = weights(tmp_path / to)
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
        stored = plain(tmp_path / to)
        assert {tensor.dtype for name, tensor in stored.items() if "embed" in name} == {torch.float32}
        assert {tensor.dtype for name, tensor in stored.items() if "norm" in name} == {torch.float16}
        every = dict(decoded(made("gguf-q4")))
        assert all(torch.equal(stored[n].float(), every[n].float()) for n in stored if n in every)


def test_plain_transformers_computes_the_same(made: Callable[[str], Path], tmp_path: Path) -> None:
    """Both checkpoints in a fresh process, as `quantize` does it; the record says what was found."""
    for source, to in (("gptq", "compressed-tensors"), ("awq", "gguf"), ("gguf-q8", "gptq")):
        found = run(made(source), tmp_path / to, to, verify=True)
        record = json.loads((tmp_path / to / "quantlab.json").read_text())
        assert record["verification"]["passed"] and record["verification_of_source"]["passed"]
        assert record["verification"]["how"] == ("own reader" if to == "gguf" else "transformers")
        assert found["verification"]["top1"] > 0.9 and "loaded in a fresh process" in "\n".join(lines(found))


def test_the_record_and_the_card_say_where_it_is_from(made: Callable[[str], Path], tmp_path: Path) -> None:
    before = json.loads((made("gptq") / "quantlab.json").read_text())
    run(made("gptq"), tmp_path / "out", "gguf")
    record = json.loads((tmp_path / "out" / "quantlab.json").read_text())
    (step,) = record["converted"]
    assert (step["from"], step["digest"]) == (str(made("gptq")), open_files(made("gptq")).digest)
    assert step["linears"] == {"Q4_0": 21} and step["exact"] is True
    assert record["recipe"] == before["recipe"] and "recipe_digest" not in record
    assert (record["parent"], record["parent_digest"]) == (before["parent"], before["parent_digest"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Converted from gptq to gguf" in card and "every weight is as it was" in card
    assert "llama-server -m model-Q4_0.gguf" in card and "method: rtn" in card


def test_a_checkpoint_of_others_has_no_recipe(made: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(made("gptq"), tmp_path / "theirs")
    (tmp_path / "theirs" / "quantlab.json").unlink()
    run(tmp_path / "theirs", tmp_path / "out", "awq")
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "## Recipe" not in card and "Converted from gptq to awq" in card and str(tmp_path / "theirs") in card
    )
    assert same(tmp_path / "theirs", tmp_path / "out")


@pytest.mark.parametrize(("source", "to", "said", "hint"), [
    ("ordered", "awq", ORDERED, "original model"),
    ("ordered", "gguf", ORDERED, "original model"),
    ("ordered", "compressed-tensors", ORDERED, "original model"),
    ("gptq-asymmetric", "compressed-tensors", "its grid is asymmetric", "--widen .*; awq and gguf hold it as it is"),
    ("gptq-8", "awq", "8-bit codes have levels from -12[78] to 127, the layout holds 4 bits",
     "compressed-tensors and gguf hold it"),
    ("gptq-3", "awq", "3-bit codes have levels from -[34] to 3", "--widen stores them in more bits, in awq"),
    ("gptq-16", "gguf", "groups of 16 columns are not made of whole blocks of 32", "awq and compressed-tensors hold"),
    ("ct-mixed", "gptq", "the linears have 4 and 8 bits, and gptq knows one width", "--widen|gguf holds it"),
    ("gguf-k", "gptq", "the minima of .* are no whole number of steps", "quantize the original model"),
    ("gptq", "gptq", "is gptq already", "--to awq or compressed-tensors or gguf"),
    ("gptq", "ggfu", "--to ggfu: expected gguf", "did you mean gguf"),
])  # fmt: skip
def test_what_cannot_be_held_is_refused(
    made: Callable[[str], Path], tmp_path: Path, source: str, to: str, said: str, hint: str
) -> None:
    """Before anything is written."""
    with pytest.raises((DataError, RecipeError), match=said) as refused:
        run(made(source), tmp_path / "out", to)
    assert re.search(hint, refused.value.hint), refused.value.hint
    assert not list(tmp_path.iterdir())
    if ORDERED in said:
        assert "self_attn.q_proj (3)" in str(refused.value)


def test_wider_codes_where_it_is_asked_for(made: Callable[[str], Path], tmp_path: Path) -> None:
    found = run(made("gptq-3"), tmp_path / "awq", "awq", widen=True)
    assert found["notes"] == ["21 linears of 3 bits are stored in 4 bits"] and same(
        made("gptq-3"), tmp_path / "awq"
    )
    run(made("gptq-asymmetric"), tmp_path / "ct", "compressed-tensors", widen=True)
    assert same(made("gptq-asymmetric"), tmp_path / "ct")
    run(made("ct-mixed"), tmp_path / "gptq", "gptq", widen=True)
    assert same(made("ct-mixed"), tmp_path / "gptq")


def test_a_tolerance_takes_the_smaller_block_type(made: Callable[[str], Path], tmp_path: Path) -> None:
    """Q4_1 in place of Q5_0, its minima rounded to float16; the note of the exact conversion says what it takes."""
    dry = run(made("gptq-asymmetric"), tmp_path / "out", "gguf", dry_run=True)
    assert dry["type"] == "Q5_0" and "Q4_1 has 0.5 bits a weight less" in dry["notes"][0]
    assert not list(tmp_path.iterdir())
    asked = float(dry["notes"][0].split("--tolerance ")[1].split(" ")[0])
    found = run(made("gptq-asymmetric"), tmp_path / "out", "gguf", tolerance=asked)
    assert found["type"] == "Q4_1" and 0 < found["largest_error"] <= asked < 2**-10
    before, after = weights(made("gptq-asymmetric")), weights(tmp_path / "out")
    off = max(((before[n] - after[n]).abs().max() / before[n].abs().max()).item() for n in before)
    assert 0 < off <= asked
    assert "off by up to" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(RecipeError, match="expected a number from 0"):
        run(made("gptq"), tmp_path / "other", "gguf", tolerance=1.0)


def changed(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors in its first block."""
    shutil.copytree(source, out)
    file = sorted(out.glob("*.safetensors"))[0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return out


Q = "model.layers.0.self_attn.q_proj"


def test_damaged_sources_are_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    def no_number(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.scales"][1, 3] = float("nan")

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.qzeros"] = tensors[f"{Q}.qzeros"][:, :-1].contiguous()

    def lacking(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{Q}.scales"]

    for name, change, said in (
        ("nan", no_number, f"{Q}: it holds a scale that is no number"),
        ("cut", cut, f"{Q}: qweight .* are not of one linear"),
        ("lacking", lacking, f"{Q} has no tensor 'scales'"),
    ):
        source = changed(made("gptq"), tmp_path / name, change)
        with pytest.raises(DataError, match=said):
            run(source, tmp_path / "out", "awq")
    file = next(made("gguf-q8").glob("*.gguf"))
    (tmp_path / "short.gguf").write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(DataError, match="not a sound GGUF file"):
        run(tmp_path / "short.gguf", tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.*"))


def test_a_zero_of_0_is_not_put_into_gptq(made: Callable[[str], Path], tmp_path: Path) -> None:
    """Unless the group's codes leave room to move it."""

    def whole_range(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.qzeros"].zero_()

    source = changed(made("awq"), tmp_path / "zero", whole_range)
    with pytest.raises(DataError, match=r"a group has the zero 0") as refused:
        run(source, tmp_path / "out", "gptq")
    assert "gguf holds it" in refused.value.hint
    half = random_codes(4, 32, symmetric=False)
    half = half._replace(codes=half.codes % 8, zeros=torch.zeros_like(half.zeros))
    assert (4, False, 1) in fits_of(half, 4, 32).grids


def test_scales_that_float16_does_not_hold(made: Callable[[str], Path], tmp_path: Path) -> None:
    def tiny_scale(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors[f"{Q}.weight_scale"]
        assert scale.dtype == torch.bfloat16
        scale[0, 0] = 1e-30

    source = changed(made("ct"), tmp_path / "small", tiny_scale)
    for to in ("gptq", "awq", "gguf"):
        with pytest.raises(
            DataError, match="stored in float16, in which they are beyond its range|no block type holds"
        ):
            run(source, tmp_path / "out", to)


def test_what_is_said_of_a_scale_that_is_a_little_off() -> None:
    held = random_codes(4, 32, symmetric=True)
    held = held._replace(scales=held.scales * (1 + 2**-13))
    with pytest.raises(
        DataError, match=r"a\.b \(1\): its scales would be stored in float16, .* off by up to"
    ) as refused:
        choose("gptq", {"a.b": fits_of(held, 4, 32)}, Allowed(), "m", ("awq", "gguf"))
    assert "--tolerance" in refused.value.hint
    asked = float(refused.value.hint.split("--tolerance ")[1].split(" ")[0])
    found = choose("gptq", {"a.b": fits_of(held, 4, 32)}, Allowed(asked), "m")
    assert found.widths == {"a.b": (4, 32)} and found.symmetric and 0 < found.error <= asked


def test_what_is_no_conversion(tiny: Path, made: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not quantized; converted are"):
        run(tiny, tmp_path / "out", "gguf")
    shutil.copytree(made("gptq"), tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="is quantized by bitsandbytes"):
        run(tmp_path / "other", tmp_path / "out", "gguf")
    shutil.copytree(made("ct"), tmp_path / "cache")
    config = json.loads((tmp_path / "cache" / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8}
    (tmp_path / "cache" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="scales of a key-value cache"):
        run(tmp_path / "cache", tmp_path / "out", "gptq")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(RecipeError, match="is not empty"):
        run(made("gptq"), tmp_path / "full", "awq")


def test_a_checkpoint_that_computes_something_else_gets_no_name(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is packed is read back; here the packing is damaged on the way."""
    module = format_module("awq")
    original = module.pack

    def damaged(*args: Any, **more: Any) -> Any:
        found = original(*args, **more)
        found["qzeros"] = found["qzeros"] ^ 1
        return found

    monkeypatch.setattr(module, "pack", damaged)
    with pytest.raises(QuantlabError, match="the converted weights differ by up to"):
        run(made("gptq"), tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()


def test_experts_one_by_one(tmp_path: Path) -> None:
    model = write_mixture(tmp_path / "m")
    recipe = QuantizeRecipe(method="rtn", bits=4, group_size=32, format="compressed-tensors", evaluate=[])
    quantize(
        [Job("q", recipe, tmp_path / "ct")], str(model), progress=Silent(), settings=Settings(device="cpu")
    )
    for to in ("gptq", "awq"):
        found = run(tmp_path / "ct", tmp_path / to, to)
        assert same(tmp_path / "ct", tmp_path / to) and "NOT by transformers alone" in found["readers"]
        record = json.loads((tmp_path / to / "quantlab.json").read_text())
        assert record["experts_unread"] == "merged"
    with pytest.raises(DataError, match="architecture mixtral cannot be written"):
        run(tmp_path / "ct", tmp_path / "gguf", "gguf")


def test_the_command(made: Callable[[str], Path], tmp_path: Path) -> None:
    words = ("convert", made("gptq-64"), "--to", "gguf", "--out", tmp_path / "out", "--no-verify")
    done = quantlab(*words, cwd=tmp_path)
    assert "gptq to gguf (Q4_0): 21 linears at 4.50 bits a weight, every weight as it was" in done.stdout
    refused = quantlab("convert", made("ordered"), "--to", "awq", "--json", cwd=tmp_path, code=4)
    assert "out of order (act_order)" in json.loads(refused.stdout)["message"]


@pytest.mark.skipif("QUANTLAB_SMOLLM2" not in os.environ, reason="no real model (QUANTLAB_SMOLLM2)")
def test_a_real_model(tmp_path: Path) -> None:
    recipe = QuantizeRecipe(method="rtn", bits=4, group_size=64, format="gptq", evaluate=[])
    source = os.environ["QUANTLAB_SMOLLM2"]
    quantize(
        [Job("q", recipe, tmp_path / "gptq")], source, progress=Silent(), settings=Settings(device="cpu")
    )
    for to in ("gguf", "awq", "compressed-tensors"):
        run(tmp_path / "gptq", tmp_path / to, to)
        assert same(tmp_path / "gptq", tmp_path / to)
