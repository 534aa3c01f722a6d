"""Through the real command line: what used to be wrong in silence is said before any work, with its exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.test_cli import model, quantlab  # noqa: F401 (a fixture)

METHODS = ("rtn-int4", "gptq-int4", "bnb-nf4")
PERPLEXITY = [
    "--task",
    "perplexity",
    "--set",
    "tasks.perplexity.max_tokens=64",
    "--set",
    "tasks.perplexity.seq_len=32",
]


def copy(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    content = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(content | config), encoding="utf-8")
    return target


def refused(place: Path, folder: Path, said: str) -> None:
    """Quantizing by any method and evaluating: exit 4, one line, no file left."""
    before = sorted(place.rglob("*"))
    for name in METHODS:
        done = quantlab("quantize", name, "--model", folder, "--no-eval", cwd=place, code=4)
        assert said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    done = quantlab("evaluate", folder, *PERPLEXITY, cwd=place, code=4)
    assert said in done.stderr
    assert sorted(place.rglob("*")) == before


def test_tokens_without_a_row(model: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = copy(model, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    refused(tmp_path, folder, "token '<extra>' with id 258, the model's embedding has 258 rows")


def test_a_multimodal_wrapper(model: Path, tmp_path: Path) -> None:  # noqa: F811
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    folder = copy(model, tmp_path / "m", architectures=["LlavaForConditionalGeneration"], text_config=config)
    refused(tmp_path, folder, "LlavaForConditionalGeneration is a multimodal wrapper")


def test_nan_in_the_weights(model: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = copy(model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][2, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, folder, "1 value is NaN or infinite in model.layers.1.self_attn.q_proj.weight")


def test_a_measured_nan_is_an_error_and_the_rest_is_measured(model: Path, tmp_path: Path) -> None:  # noqa: F811
    """Finite weights whose activations overflow: an empty cell would be taken for something that was not measured."""
    folder = copy(model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.finfo(torch.bfloat16).max)
    tensors["model.embed_tokens.weight"] *= 100
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    speed = ["--task", "speed", "--set", "tasks.speed.repeats=1", "--set", "tasks.speed.prompt_tokens=8"]
    done = quantlab("evaluate", folder, *PERPLEXITY, *speed, cwd=tmp_path, code=4)
    assert "perplexity of" in done.stderr and "is not a number" in done.stderr
    assert "tok/s" in done.stdout  # the table is shown, with what could be measured
    record = json.loads(next((tmp_path / "results" / "runs").glob("*/run.json")).read_text(encoding="utf-8"))
    assert "not a number" in record["errors"]["perplexity"] and record["row"].get("ppl") is None
    assert record["row"]["decode_tok_s"] > 0


def test_an_older_index_beside_the_weights_is_noted(model: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = copy(model, tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    done = quantlab("quantize", "rtn-int8", "--model", folder, "--no-eval", "--dry-run", cwd=tmp_path)
    assert (
        "read from model.safetensors, as transformers does; not from model.safetensors.index.json"
        in done.stderr
    )


def test_short_models_need_no_key(model: Path, tmp_path: Path) -> None:  # noqa: F811
    """64 positions: nothing is refused that nobody asked for, and what is measured uses them all."""
    folder = copy(model, tmp_path / "m", max_position_embeddings=64)
    quantlab("quantize", "rtn-int4", "--model", folder, "--no-eval", "--dry-run", cwd=tmp_path)
    done = quantlab("quantize", "gptq-int4", "--model", folder, "--no-eval", "--dry-run", cwd=tmp_path)
    assert "calib/general.jsonl for calibration" in done.stderr and "perplexity" not in done.stderr
    limit = ["--set", "tasks.perplexity.max_tokens=256"]
    done = quantlab("evaluate", folder, "--task", "perplexity", *limit, "--json", cwd=tmp_path)
    row = json.loads(done.stdout)["rows"][0]
    assert row["ppl_protocol"] == "gptq-windows-64" and row["ppl_text"].startswith("general.txt#")
    said = ["--set", "tasks.perplexity.seq_len=65"]
    quantlab("evaluate", folder, "--task", "perplexity", *said, cwd=tmp_path, code=2)
    quantlab("quantize", "rtn-int4", "--model", folder, *said, "--no-eval", "--dry-run", cwd=tmp_path)


@pytest.mark.parametrize("name", ["none", "rtn-int4"])
def test_rows_name_the_texts_that_measured_them(model: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    wish = ["--set", "evaluate=[perplexity]", "--set", "tasks.perplexity.max_tokens=1024"]
    done = quantlab("quantize", name, "--model", model, *wish, cwd=tmp_path)
    assert "bundled text (Korean and English prose, dialogue, code, SQL): general.txt" in done.stderr
    assert "ppl on general.txt#" in done.stdout and "gptq-windows-512" in done.stdout
