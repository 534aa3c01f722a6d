"""The model that ships: shape, size, that it learned something, and that rounding hurts it where GPTQ helps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantlab.evals.perplexity import evaluate
from quantlab.models.load import load_model
from quantlab.models.safetensors.files import EMBEDDED, open_files
from quantlab.progress import Silent
from quantlab.quant.pipeline import Job, Outcome, quantize
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.tasks import PerplexityOptions

OPTIONS = PerplexityOptions(source="heldout.txt", max_tokens=16384)
CALIBRATION = {"source": "calib/ko-text2sql.jsonl", "rows": 32, "seq_len": 512}


def test_shape_and_size() -> None:
    files = open_files("embedded:base")
    assert files.config["model_type"] == "llama"
    assert 4e6 <= files.params <= 8e6 and files.size_bytes <= 16e6
    assert all(out % 128 == 0 and inputs % 128 == 0 for out, inputs in files.block_linears().values())
    assert {t.dtype for t in files.tensors.values()} == {"BF16"}


def test_training_record_is_of_this_model() -> None:
    record = json.loads((Path(__file__).parents[2] / "results/embedded-base/training.json").read_text())
    assert record["parameters"] == open_files("embedded:base").params
    assert record["curve"][-1]["tokens"] == record["tokens"] > 1e6
    assert record["curve"][-1]["heldout_loss"] < 0.2 * record["curve"][0]["heldout_loss"]


def test_tokenizer_is_lossless_on_korean_and_sql() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "base")
    text = "레벨이 10 이상인 플레이어는?\n\tSELECT name FROM players WHERE level >= 10;  -- 끝 🎮"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 4096


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """3 bits, group 32, symmetric, one pass for all; and the formats that plain transformers must read."""
    settings: dict[str, dict[str, Any]] = {
        "rtn": {"method": "rtn", "bits": 3, "group_size": 32},
        "gptq": {"method": "gptq", "bits": 3, "group_size": 32, "calibration": CALIBRATION},
        "awq": {
            "method": "awq", "bits": 3, "group_size": 32, "symmetric": True, "format": "gptq",
            "calibration": CALIBRATION,
        },
        "awq4": {"method": "awq", "bits": 4, "calibration": CALIBRATION},
        "gptq4": {"method": "gptq", "bits": 4, "act_order": True, "calibration": CALIBRATION},
        "nf4": {"method": "bnb-nf4", "double_quant": True},
    }  # fmt: skip
    out = tmp_path_factory.mktemp("checkpoints")
    jobs = [Job(n, QuantizeRecipe.model_validate(s), out / n) for n, s in settings.items()]
    return {o.job.name: o for o in quantize(jobs, "embedded:base", device="cpu", progress=Silent())}


def perplexity(ref: str | Path) -> float:
    value = evaluate(load_model(ref, device="cpu"), OPTIONS, baseline=None, progress=Silent()).metrics["ppl"]
    assert isinstance(value, float)
    return value


def test_three_bits_hurt_and_gptq_helps(outcomes: dict[str, Outcome]) -> None:
    """Calibration text and held-out text share no document."""
    original = perplexity("embedded:base")
    found = {n: perplexity(str(outcomes[n].checkpoint)) for n in ("rtn", "gptq")}
    assert found["rtn"] > 1.02 * original, "3-bit rounding must visibly hurt"
    assert found["gptq"] < found["rtn"]
    assert math.log(found["gptq"] / original) < 0.8 * math.log(found["rtn"] / original)


def test_awq_loses_to_rounding_in_no_layer(outcomes: dict[str, Outcome]) -> None:
    rtn, awq = outcomes["rtn"].loss, outcomes["awq"].loss
    assert len(rtn) == 6 * 7 and set(rtn) == set(awq)
    assert [name for name in rtn if awq[name] > rtn[name]] == []
    assert sum(awq.values()) < sum(rtn.values())


SCRIPT = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
path, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
inputs = tokenizer("CREATE TABLE books (", return_tensors="pt")
with torch.no_grad():
    save_file({"logits": model(**inputs).logits}, out)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]))
"""


@pytest.mark.parametrize("name", ["gptq4", "awq4", "gptq", "nf4"])
def test_plain_transformers_in_a_fresh_process(
    outcomes: dict[str, Outcome], tmp_path: Path, name: str
) -> None:
    """Ten lines without quantlab: loads, generates, and gives the logits that quantlab measures."""
    path = outcomes[name].checkpoint
    assert path is not None
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "logits.safetensors")],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CREATE TABLE books (" in done.stdout and len(done.stdout.split("books (")[1]) > 5
    theirs = load_file(tmp_path / "logits.safetensors")["logits"].float()
    subject = load_model(path, device="cpu")
    inputs = subject.tokenizer("CREATE TABLE books (", return_tensors="pt")
    with torch.no_grad():
        ours = subject.model(**inputs).logits.float()
    assert (ours - theirs).norm() / ours.norm() < 0.03
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
