"""Whole runs into GGUF files: one pass for several, sizes, resuming, the importance matrix, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from quantlab.errors import DataError, RecipeError
from quantlab.models.gguf.imatrix import read_imatrix
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Silent
from quantlab.quant.checkpoint import CheckpointWriter
from quantlab.quant.estimate.checkpoint_size import checkpoint_bytes
from quantlab.quant.jobs import described, expected_bytes
from quantlab.quant.pipeline import Job, Settings, quantize
from quantlab.quant.verify.reload import FreshProcess
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.report.model_card import model_card
from tests.conftest import write_tiny

CALIBRATION = {"source": "calib/general.jsonl", "rows": 4, "seq_len": 64}


def recipe(method: str, kind: str, **more: Any) -> QuantizeRecipe:
    keys: dict[str, Any] = {"method": method, "format": "gguf", "type": kind, "evaluate": []} | more
    if method != "rtn":
        keys.setdefault("calibration", CALIBRATION)
    return QuantizeRecipe(**keys)


RECIPES = {
    "plain": recipe("rtn", "Q4_K_M"),
    "weighed": recipe("imatrix", "Q3_K_M"),
    "solved": recipe("gptq", "Q2_K", act_order="group"),
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tied"), hidden=256, layers=2, tie=True)


def run(model: Path, out: Path, recipes: dict[str, QuantizeRecipe], **settings: Any) -> dict[str, Path]:
    jobs = [Job(name, found, out / name) for name, found in recipes.items()]
    quantize(jobs, str(model), progress=Silent(), settings=Settings(device="cpu", **settings))
    return {name: out / name for name in recipes}


def weights(checkpoint: Path) -> bytes:
    (file,) = checkpoint.glob("*.gguf")
    return file.read_bytes()


def test_one_pass_many_files(tied: Path, tmp_path: Path) -> None:
    """With a safetensors format among them, verified, of the sizes that were planned."""
    every = RECIPES | {"gptq": QuantizeRecipe(method="gptq", calibration=CALIBRATION, evaluate=[])}
    made = run(tied, tmp_path, every, verify=True, save_imatrix=tmp_path / "imatrix.gguf")
    files = open_files(str(tied))
    for name in RECIPES:
        record = json.loads((made[name] / "quantlab.json").read_text())
        assert record["verification"]["passed"] and record["verification"]["relative"] < 1e-5
        assert (
            len(weights(made[name]))
            == checkpoint_bytes(RECIPES[name], files)
            < expected_bytes(RECIPES[name], files)
        )
        assert (made[name] / "Modelfile").read_text() == f"FROM ./model-{RECIPES[name].type}.gguf\n"
        card = model_card(record, None)
        assert f"llama-server -m model-{RECIPES[name].type}.gguf" in card and "ollama create" in card
    reader = gguf.GGUFReader(made["plain"] / "model-Q4_K_M.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == "Q6_K" and "output.weight" not in kinds
    alone = run(tied, tmp_path / "alone", {"solved": RECIPES["solved"]})
    assert weights(alone["solved"]) == weights(made["solved"])
    importance = read_imatrix(tmp_path / "imatrix.gguf")
    assert importance["blk.1.ffn_down.weight"].shape == (1, 512) and len(importance) == 14
    assert torch.equal(importance["blk.0.attn_q.weight"], importance["blk.0.attn_v.weight"])
    fields = gguf.GGUFReader(tmp_path / "imatrix.gguf").fields
    assert fields["general.type"].contents() == "imatrix" and fields["imatrix.chunk_count"].contents() == 4


class Killed(BaseException):
    pass


def test_a_killed_run_ends_in_the_same_bytes(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each thing that is written: what outlives the process is what is on the disk."""
    two = {name: RECIPES[name] for name in ("weighed", "solved")}
    expected = {name: weights(path) for name, path in run(tied, tmp_path / "whole", two).items()}
    places = [
        ("write_outside", 1),
        ("write_block", 0),
        ("write_block", 2),
        ("write_block", 3),
        ("write_rest", 0),
    ]
    places += [("write_rest", 1), ("assemble", 1), ("export", 0), ("export", 1), ("publish", 1)]
    for method, at in places:
        original, left = getattr(CheckpointWriter, method), [None] * at

        def dying(
            self: Any, *args: Any, original: Any = original, left: list[Any] = left, **more: Any
        ) -> Any:
            if not left:
                raise Killed
            left.pop()
            return original(self, *args, **more)

        out = tmp_path / f"{method}-{at}"
        with monkeypatch.context() as killing:
            killing.setattr(CheckpointWriter, method, dying)
            with pytest.raises(Killed):
                run(tied, out, two)
        run(tied, out, {name: found for name, found in two.items() if not (out / name).exists()}, resume=True)
        assert {name: weights(out / name) for name in two} == expected, (method, at)


def test_quantized_propagation_and_overrides(tied: Path, tmp_path: Path) -> None:
    found = recipe(
        "gptq", "Q3_K", act_order="group", propagate="quantized", ignore=["model.layers.0.mlp.up_proj"],
        overrides={"down_proj": {"type": "Q6_K"}},
    )  # fmt: skip
    made = run(tied, tmp_path, {"q": found}, verify=True)["q"]
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(made / "model-Q3_K.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == "BF16" and kinds["blk.1.ffn_up.weight"] == "Q3_K"
    assert kinds["blk.0.ffn_down.weight"] == "Q6_K" and kinds["blk.0.attn_norm.weight"] == "F32"


def test_a_file_that_was_changed_is_not_verified(tied: Path, tmp_path: Path) -> None:
    from quantlab.quant.verify.reference_logits import Expected
    from quantlab.quant.verify.reload import Check, verify

    made = run(tied, tmp_path, {"q": RECIPES["plain"]})["q"]
    rows = torch.arange(32).view(2, 16)
    from quantlab.models.load import load_model

    with torch.no_grad():
        logits = load_model(made, device="cpu", dtype="float32").model(input_ids=rows).logits
    (file,) = made.glob("*.gguf")
    data = bytearray(file.read_bytes())
    data[-200_000:] = bytes(
        np.random.default_rng(0).permutation(np.frombuffer(bytes(data[-200_000:]), np.uint8))
    )
    file.write_bytes(data)
    with FreshProcess(("gguf",)) as process:
        (found,) = verify([Check(made, Expected(logits, logits))], rows, ready=process)
    assert found.how == "own reader" and not found.passed


def test_refusals(tied: Path, tmp_path: Path) -> None:
    files = open_files(str(tied))
    assert described(RECIPES["solved"], files)[0].startswith("14 layers are quantized")
    with pytest.raises(RecipeError, match="no calibration pass over the original model"):
        run(tied, tmp_path, {"q": RECIPES["plain"]}, save_imatrix=tmp_path / "i.gguf")
    assert (
        QuantizeRecipe(method="rtn", format="gguf").type == "Q4_K_M" == QuantizeRecipe(method="imatrix").type
    )
    with pytest.raises(ValueError, match="does not round to block types"):
        QuantizeRecipe(method="awq", format="gguf")
    with pytest.raises(ValueError, match="the type Q4_K has bits: 4"):
        QuantizeRecipe(method="rtn", type="Q4_K", bits=5)
    with pytest.raises(ValueError, match="goes with format: gguf"):
        QuantizeRecipe(method="rtn", type="Q4_K", format="gptq")
    with pytest.raises(ValueError, match="cannot store a column order"):
        QuantizeRecipe(method="gptq", type="Q4_K", act_order=True)
    with pytest.raises(ValueError, match="imatrix is written as gguf"):
        QuantizeRecipe(method="imatrix", format="gptq")
    with pytest.raises(ValueError, match="for 5 bits set format: gguf|holds 2, 3, 4, 8 bits only"):
        QuantizeRecipe(method="rtn", bits=5, format="gptq")
    assert "type" not in QuantizeRecipe(method="rtn").decides()


@pytest.mark.parametrize("damage", ["counts", "negative", "nothing"])
def test_damaged_importance_matrices_are_refused(damage: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "x")
    squares = np.full((1, 32), -1.0 if damage == "negative" else 1.0, dtype=np.float32)
    writer.add_tensor("other" if damage == "nothing" else "a.weight.in_sum2", squares)
    if damage == "negative":
        writer.add_tensor("a.weight.counts", np.ones((1, 1), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DataError, match="damaged|no sums"):
        read_imatrix(tmp_path / "i.gguf")


def test_a_tokenizer_that_cannot_be_written_is_refused_before_work(tied: Path, tmp_path: Path) -> None:
    from quantlab.quant.jobs import check

    source = tmp_path / "m"
    shutil.copytree(tied, source)
    (source / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer.json"):
        check(RECIPES["plain"], str(source))
