"""Importance matrices in place of a calibration text: the same bytes, what is refused, what names them."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantlab.commands.defaults import settle, settle_texts
from quantlab.commands.plan import Options, lines, plan
from quantlab.commands.planned_run import check_data
from quantlab.errors import DataError, RecipeError
from quantlab.models.gguf.imatrix import open_imatrix, read_imatrix, write_imatrix
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Silent
from quantlab.quant.jobs import check, described
from quantlab.quant.pipeline import Job, Settings, quantize
from quantlab.recipe.load import parse_recipe
from quantlab.recipe.quantize import QuantizeRecipe
from tests.conftest import write_tiny

CALIBRATION = {"source": "calib/general.jsonl", "rows": 3, "seq_len": 37}  # tokens are no power of 2


def recipe(calibration: dict[str, Any], **more: Any) -> QuantizeRecipe:
    keys = {"method": "imatrix", "type": "Q3_K_M", "evaluate": []} | more
    return QuantizeRecipe(calibration=calibration, **keys)


def run(model: Path, out: Path, wish: QuantizeRecipe, **settings: Any) -> bytes:
    quantize(
        [Job("q", wish, out)], str(model), progress=Silent(), settings=Settings(device="cpu", **settings)
    )
    (file,) = out.glob("*.gguf")
    return file.read_bytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), hidden=256, layers=2, tie=True)


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The importance matrix of a run over text, and the file that the run made."""
    folder = tmp_path_factory.mktemp("written")
    made = run(model, folder / "q", recipe(CALIBRATION), save_imatrix=folder / "imatrix.gguf")
    return folder / "imatrix.gguf", made


def write_dat(path: Path, entries: dict[str, tuple[int, torch.Tensor]], tail: bytes | None = None) -> None:
    """The older form, as ``IMatrixCollector::save_imatrix_legacy`` of llama.cpp writes it."""
    data = struct.pack("<i", len(entries))
    for name, (calls, means) in entries.items():
        values = (means.flatten() * calls).numpy().astype("<f4")
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += values.tobytes()
    path.write_bytes(data + (struct.pack("<ii", 7, 9) + b"words.txt" if tail is None else tail))


def test_a_run_from_the_file_makes_the_same_bytes(
    model: Path, written: tuple[Path, bytes], tmp_path: Path
) -> None:
    matrix, expected = written
    assert run(model, tmp_path / "q", recipe({"imatrix": str(matrix)}), verify=True) == expected
    record = json.loads((tmp_path / "q" / "quantlab.json").read_text())
    assert record["calibration"] == {
        "imatrix": "imatrix.gguf", "source": "calib/general.jsonl", "chunks": 3,
        "digest": open_imatrix(matrix).digest,
    }  # fmt: skip
    assert len(record["loss"]) == 14 and all(loss > 0 for loss in record["loss"].values())


def test_experts_that_saw_few_tokens_are_filled_up_alike(saved: Any, tmp_path: Path) -> None:
    """As many tokens as an expert saw are known from the file, and its kin have the same order."""
    model = saved("qwen3_moe")
    few = CALIBRATION | {"rows": 1}
    expected = run(model, tmp_path / "a", recipe(few, type="Q4_K_M"), save_imatrix=tmp_path / "imatrix.gguf")
    starved = json.loads((tmp_path / "a" / "quantlab.json").read_text())["starved_experts"]
    assert starved
    again = recipe({"imatrix": str(tmp_path / "imatrix.gguf")}, type="Q4_K_M")
    assert run(model, tmp_path / "b", again) == expected


def test_the_older_form_is_read(model: Path, written: tuple[Path, bytes], tmp_path: Path) -> None:
    means = read_imatrix(written[0])
    write_dat(tmp_path / "i.dat", {name: (1, values) for name, values in means.items()})
    found = open_imatrix(tmp_path / "i.dat")
    assert (found.source, found.chunks) == ("words.txt", 7)
    assert all(torch.equal(values, read_imatrix(tmp_path / "i.dat")[name]) for name, values in means.items())
    assert run(model, tmp_path / "q", recipe({"imatrix": str(tmp_path / "i.dat")})) == written[1]
    write_dat(tmp_path / "oldest.dat", {"a.weight": (3, torch.ones(4))}, tail=b"")
    assert torch.equal(read_imatrix(tmp_path / "oldest.dat")["a.weight"], torch.ones(1, 4))


def test_the_content_names_a_run_and_the_path_does_not(
    model: Path, written: tuple[Path, bytes], tmp_path: Path
) -> None:
    files = open_files(str(model))
    shutil.copy(written[0], tmp_path / "copy.gguf")
    one, other = (
        settle_texts(recipe({"imatrix": str(path)}), files) for path in (written[0], tmp_path / "copy.gguf")
    )
    assert one.digest() == other.digest() != settle_texts(recipe(CALIBRATION), files).digest()
    assert parse_recipe(one.to_yaml()).digest() == one.digest()
    check_data(other, files)
    changed = dict(open_imatrix(written[0]).sums)
    name = next(iter(changed))
    tokens = changed[name].tokens
    assert tokens is not None
    changed[name] = changed[name]._replace(squares=changed[name].squares * 2)
    sums = {key: (sums.squares, sums.tokens) for key, sums in changed.items() if sums.tokens is not None}
    write_imatrix(tmp_path / "copy.gguf", sums, source="x", chunks=1, chunk_size=1)
    with pytest.raises(DataError, match="another importance matrix than the recipe's"):
        check_data(other, files)
    assert settle_texts(recipe({"imatrix": str(tmp_path / "copy.gguf")}), files).digest() != one.digest()


def test_plans_say_it(model: Path, written: tuple[Path, bytes], tmp_path: Path) -> None:
    wish, files = recipe({"imatrix": str(written[0])}), open_files(str(model))
    settled = settle(wish, files)
    assert settled.calibration.imatrix_digest == open_imatrix(written[0]).digest
    assert "no calibration pass: importance matrix imatrix.gguf" in described(wish, files)[-1]
    summary = plan([("q", wish)], Options(str(model)))
    assert "no calibration pass" in "\n".join(lines(summary))
    assert "forwards" not in summary["recipes"][0]["parts"]


def test_matrices_that_do_not_fit_are_refused_before_work(
    model: Path, written: tuple[Path, bytes], tmp_path: Path
) -> None:
    whole = open_imatrix(written[0]).sums
    kept = {name: (s.squares, s.tokens) for name, s in whole.items() if s.tokens is not None}

    def refused(sums: dict[str, tuple[torch.Tensor, torch.Tensor]], match: str) -> None:
        write_imatrix(tmp_path / "i.gguf", sums, source="x", chunks=1, chunk_size=1)
        with pytest.raises(DataError, match=match):
            check(recipe({"imatrix": str(tmp_path / "i.gguf")}), str(model))

    name = "blk.1.attn_q.weight"
    squares, tokens = kept[name]
    refused({k: v for k, v in kept.items() if k != name}, "has no entry for blk.1.attn_q.weight of")
    refused({k: v for k, v in kept.items() if "blk.0" not in k}, "blk.0.attn_.* and 4 more of")
    refused(kept | {name: (squares[:, :64], tokens)}, "another model .* has 1 x 64 sums, 256 inputs")
    refused(kept | {name: (squares.repeat(2, 1), tokens.repeat(2))}, "has 2 x 256 sums")
    refused(kept | {name: (squares, tokens * 0)}, "has no tokens of blk.1.attn_q")
    refused(kept | {name: (squares * float("nan"), tokens)}, "blk.1.attn_q.weight is damaged")
    refused(kept | {name: (-squares, tokens)}, "negative or not finite")
    refused(kept | {name: (squares, tokens * float("inf"))}, "negative or not finite")
    wider = write_tiny(tmp_path / "wider", hidden=128, layers=2)
    with pytest.raises(DataError, match="another model"):
        check(recipe({"imatrix": str(written[0])}), str(wider))
    with pytest.raises(DataError, match="cannot read"):
        check(recipe({"imatrix": str(tmp_path / "nowhere.gguf")}), str(model))


def test_files_that_are_cut_or_changed_are_refused(written: tuple[Path, bytes], tmp_path: Path) -> None:
    """At every length, and with any field of the header turned into the largest number."""
    write_dat(tmp_path / "whole.dat", {f"blk.{i}.x.weight": (2, torch.rand(8)) for i in range(2)}, tail=b"")
    whole, bad = (tmp_path / "whole.dat").read_bytes(), tmp_path / "bad.dat"
    for size in range(len(whole)):
        bad.write_bytes(whole[:size])
        with pytest.raises(DataError):
            open_imatrix(bad)
    for at in (0, 4, 22, 26):  # entries, a name's length, chunks, values
        for value in (-1, 2**31 - 1):
            bad.write_bytes(whole[:at] + struct.pack("<i", value) + whole[at + 4 :])
            if (at, value) != (22, 2**31 - 1):  # so many chunks there may be
                with pytest.raises(DataError):
                    open_imatrix(bad)
    newer = written[0].read_bytes()
    for size in np.linspace(0, len(newer) - 64, 60).astype(int).tolist():
        bad.write_bytes(newer[:size])
        with pytest.raises(DataError):
            open_imatrix(bad)
    bad.write_bytes(whole[:8] + b"\xff\xfe" + whole[10:])
    with pytest.raises(DataError, match="not ASCII"):
        open_imatrix(bad)


def test_recipes_that_need_more_are_refused(written: tuple[Path, bytes], model: Path, tmp_path: Path) -> None:
    given = {"imatrix": str(written[0])}
    with pytest.raises(ValueError, match="gptq needs all second moments .* set method: imatrix"):
        QuantizeRecipe(method="gptq", calibration=given)
    with pytest.raises(ValueError, match="awq needs all second moments"):
        QuantizeRecipe(method="awq", calibration=given)
    with pytest.raises(ValueError, match="not an option of rtn|@calibration"):
        QuantizeRecipe(method="rtn", format="gguf", calibration=given)
    with pytest.raises(ValueError, match="no text is run through the model"):
        recipe(given, propagate="quantized")
    with pytest.raises(ValueError, match="@rows: is for calibration on a text"):
        recipe(given | {"rows": 4})
    with pytest.raises(ValueError, match="@imatrix_digest: goes with imatrix"):
        recipe({"imatrix_digest": "0" * 16})
    with pytest.raises(RecipeError, match="not from Hessians"):
        run(model, tmp_path / "q", recipe(given), save_statistics=tmp_path / "s")
    with pytest.raises(RecipeError, match="no calibration pass"):
        run(model, tmp_path / "q", recipe(given), save_imatrix=tmp_path / "i.gguf")
