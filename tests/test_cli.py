"""The command line from outside: what it imports, how it refuses, and the whole way from recipe to leaderboard.

The model is a real Llama of two small blocks with random weights and a byte-level tokenizer, made once.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.command import ENVIRONMENT as PLAIN_ENVIRONMENT
from tests.command import ROOT, quantlab

HEAVY = ("torch", "transformers", "pydantic", "rich", "yaml", "numpy", "sqlglot")
SMALL = [
    "calibration.rows=4",
    "calibration.seq_len=64",
    "tasks.perplexity.seq_len=64",
    "tasks.perplexity.max_tokens=512",
    "tasks.fidelity.seq_len=64",
    "tasks.fidelity.max_tokens=256",
    "tasks.text2sql.limit=3",
    "tasks.text2sql.max_new_tokens=4",
    "tasks.speed.prompt_tokens=8",
    "tasks.speed.new_tokens=2",
    "tasks.speed.repeats=1",
]
SETS = [word for key in SMALL for word in ("--set", key)]
# for uncalibrated methods
PLAIN = [word for key in SMALL if key.startswith("tasks.") for word in ("--set", key)]


ENVIRONMENT = os.environ | PLAIN_ENVIRONMENT | {"PYTHONPATH": str(ROOT)}


def imported_by(arguments: Sequence[str], before: str = "") -> set[str]:
    """Which of HEAVY are in sys.modules after the command line ran with these arguments."""
    script = (
        f"import sys, io\n{before}\nfrom quantlab.cli import app\n"
        f"kept, sys.stdout = sys.stdout, io.StringIO()\n"
        f"try: app({list(arguments)!r})\nexcept SystemExit: pass\n"
        f"print(*[m for m in {HEAVY!r} if m in sys.modules], file=kept)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    return set(done.stdout.split())


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny Llama: hidden 128, two blocks, 258 tokens (bytes and two special ones)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=4096
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    fast.save_pretrained(path)
    return path


def test_help_imports_nothing_heavy() -> None:
    assert imported_by(["--help"]) == set()
    for arguments in (["quantise"], ["quantize", "--help"], ["demo", "--help"], ["quantize", "--nope"]):
        assert imported_by(arguments) <= {"pydantic"}, arguments  # typer itself reads options with it


def test_the_import_check_sees_what_is_imported() -> None:
    assert "yaml" in imported_by(["--help"], before="import yaml")
    assert "pydantic" in imported_by(["recipes"])


def test_help_names_every_verb(tmp_path: Path) -> None:
    text = quantlab("--help", cwd=tmp_path).stdout
    for verb in ("demo", "quantize", "distill", "evaluate", "leaderboard", "recipes", "doctor"):
        assert verb in text
    assert quantlab("--version", cwd=tmp_path).stdout.startswith("quantlab ")


def test_recipes(tmp_path: Path) -> None:
    assert "gptq-int4" in quantlab("recipes", cwd=tmp_path).stdout
    listed = json.loads(quantlab("recipes", "--json", cwd=tmp_path).stdout)
    assert all(item["about"] and Path(item["file"]).is_file() for item in listed)
    schema = json.loads(quantlab("recipes", "--schema", cwd=tmp_path).stdout)
    assert "QuantizeRecipe" in schema["$defs"]


REFUSALS: list[tuple[list[str], int, str]] = [
    (["quantize", "gptq-itn4"], 2, "did you mean gptq-int4?"),
    (["quantize", "gptq-int4", "--set", "group_sise=64"], 2, "unknown key; did you mean 'group_size'?"),
    (["quantize", "gptq-int4", "--set", "method=gtpq"], 2, "did you mean gptq?"),
    (["quantize", "gptq-int4", "--set", "bits=four"], 2, "bits: 'four' is not one of"),
    (["quantize", "awq-int4", "--set", "bits=3", "--set", "format=awq"], 2, "set format: gptq"),
    (["quantize", "gptq-int4", "gptq-int4"], 2, "given twice"),
    (["quantize", "gptq-int4", "--device", "gpu"], 2, "expected auto, cpu, cuda"),
    (["quantize", "gptq-int4", "--set", "calibration.seq_len=9999"], 2, "--set calibration.seq_len=4096"),
    (
        ["quantize", "gptq-int4", "--set", "calibration.source=calib/ko-text2sq.jsonl"],
        4,
        "did you mean calib/ko-",
    ),
    (["quantize", "gptq-int4", "--set", "calibration.source=empty.jsonl"], 4, "holds no text"),
    (["quantize", "gptq-int4", "--set", "calibration.source=bad.jsonl"], 4, "bad.jsonl, line 2"),
    (["quantize", "gptq-int4", "--set", "tasks.text2sql.data=bad.jsonl"], 4, "bad.jsonl"),
    (["quantize", "gptq-int4", "--out", "full"], 2, "full is not empty"),
    (["quantize", "gptq-int4", "--out", "full", "--resume"], 2, "from another recipe or model"),
    (["quantize", "gptq-int4", "--out", "file"], 2, "file is not empty"),
    (["evaluate", "--task", "perplexty"], 2, "did you mean 'perplexity'?"),
    (["evaluate", "--task", "fidelity"], 2, "--baseline"),
    (["evaluate", "--set", "tasks.speed.repeat=1"], 2, "did you mean 'repeats'?"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), REFUSALS, ids=[" ".join(r[0]) for r in REFUSALS])
def test_refused_before_heavy_work(
    arguments: list[str], code: int, said: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text":\n', encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    verb, *rest = arguments
    place = ["--model", str(model)] if verb == "quantize" else [str(model)]
    done = quantlab(verb, *rest, *place, cwd=tmp_path, code=code)
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_refusals_do_not_import_torch(model: Path, tmp_path: Path) -> None:
    refused = ["quantize", "gptq-int4", "--model", str(model), "--set", "calibration.source=nowhere.jsonl"]
    assert not imported_by(refused) & {"torch", "transformers", "numpy"}


def test_bad_models(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = quantlab("quantize", "rtn-int4", "--model", "cut", cwd=tmp_path, code=4)
    assert "model.safetensors" in done.stderr
    done = quantlab("quantize", "rtn-int4", "--model", "embedded:bass", cwd=tmp_path, code=4)
    assert "embedded:" in done.stderr
    quantlab("evaluate", "no-such-directory", cwd=tmp_path, code=4)
    narrow = json.loads((model / "config.json").read_text(encoding="utf-8"))
    assert narrow["intermediate_size"] == 256


def test_errors_as_json_and_with_traceback(model: Path, tmp_path: Path) -> None:
    done = quantlab("quantize", "nope", "--model", model, "--json", cwd=tmp_path, code=2)
    assert json.loads(done.stdout)["exit_code"] == 2
    done = quantlab("quantize", "nope", "--model", model, "--debug", cwd=tmp_path, code=2)
    assert "Traceback" in done.stderr


def test_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    done = quantlab(
        "quantize", "gptq-int4", "rtn-int4", "--model", model, "--dry-run", "--json", cwd=tmp_path
    )
    plan = json.loads(done.stdout)["plan"]
    assert [item["recipe"] for item in plan] == ["none", "gptq-int4", "rtn-int4"]
    assert plan[1]["steps"][0] == "quantize" and list(tmp_path.iterdir()) == []


def rows_of(board: Path) -> dict[str, dict[str, str]]:
    with board.open(encoding="utf-8") as stream:
        return {row["run_id"].split("-")[2]: row for row in csv.DictReader(stream)}


@pytest.fixture(scope="session")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A directory in which three recipes were applied to the model, the JSON summary, and what was said."""
    place = tmp_path_factory.mktemp("work")
    names = ("gptq-int4", "rtn-int4", "awq-int4")
    done = quantlab("quantize", *names, "--model", model, *SETS, "--out", "out", "--json", cwd=place)
    return place, json.loads(done.stdout), done.stderr


def test_from_recipes_to_leaderboard(finished: tuple[Path, dict[str, Any], str], model: Path) -> None:
    place, summary, said = finished
    assert "one calibration pass" in said and "shared by" in said
    assert len(summary["shared_calibration"]) == 2 and summary["status"] == "done"
    rows = rows_of(place / "results" / "leaderboard.csv")
    assert rows.keys() == {"none", "gptq", "rtn", "awq"}
    assert rows["none"]["parent"] == "" and rows["none"]["bits"] == "16" and rows["none"]["kl_mean"] == ""
    for method in ("gptq", "rtn", "awq"):
        row = rows[method]
        assert row["parent"] == rows["none"]["run_id"] and row["stage"] == "quantized" and row["bits"] == "4"
        assert float(row["bits_per_weight"]) < float(rows["none"]["bits_per_weight"])
        assert float(row["ppl_ratio"]) == pytest.approx(
            float(row["ppl"]) / float(rows["none"]["ppl"]), rel=1e-4
        )
        for column in (
            "kl_mean",
            "kl_p99",
            "top1_agreement",
            "ex",
            "ex_low",
            "ex_high",
            "em",
            "lost",
            "gained",
        ):
            assert row[column] != "", column
        for column in ("prefill_tok_s", "decode_tok_s", "peak_memory_bytes", "work_seconds", "device"):
            assert row[column] not in ("", "0"), column
        assert row["model_digest"] == rows["none"]["model_digest"] and row["data_digest"]
        run = place / "results" / "runs" / row["run_id"]
        assert {p.name for p in run.iterdir()} == {"recipe.yaml", "run.json", "samples", "log.jsonl"}
        assert len((run / "samples" / "text2sql.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    checkpoint = Path(place / summary["checkpoints"][next(n for n in summary["checkpoints"] if "gptq" in n)])
    assert {"config.json", "README.md", "quantlab.json", "tokenizer.json"} <= {
        p.name for p in checkpoint.iterdir()
    }
    assert "Perplexity" in (checkpoint / "README.md").read_text(encoding="utf-8")
    assert not list(place.rglob("*.partial")) and not list(place.rglob("*.part"))


def test_the_same_again_is_refused_and_resume_skips_it(
    finished: tuple[Path, dict[str, Any], str], model: Path
) -> None:
    place, _, _ = finished
    again = ["quantize", "rtn-int4", "--model", str(model), *PLAIN, "--out", "out/" + _folder(place, "rtn")]
    assert "is not empty" in quantlab(*again, cwd=place, code=2).stderr
    done = quantlab(*again[:-1], "elsewhere", cwd=place, code=2)
    assert "measured already" in done.stderr and not (place / "elsewhere").exists()
    before = {path: path.stat().st_mtime_ns for path in (place / "results" / "runs").rglob("*")}
    done = quantlab(*again, "--resume", "--json", cwd=place)
    summary = json.loads(done.stdout)
    assert len(summary["skipped"]) == 1 and len(summary["rows"]) == 2 and "measured already" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was done again


def _folder(place: Path, method: str) -> str:
    return next(p.name for p in (place / "out").iterdir() if p.name.startswith(method))


def test_evaluate_a_checkpoint_against_its_original(
    finished: tuple[Path, dict[str, Any], str], model: Path
) -> None:
    place, _, _ = finished
    checkpoint = f"out/{_folder(place, 'gptq')}"
    tasks = ["--task", "perplexity", "--task", "fidelity"]
    sets = [
        word for key in SMALL if key.split(".")[1] in ("perplexity", "fidelity") for word in ("--set", key)
    ]
    done = quantlab("evaluate", checkpoint, *tasks, *sets, "--baseline", model, "--json", cwd=place)
    rows = json.loads(done.stdout)["rows"]
    mine = next(row for row in rows if row["model"] == checkpoint)
    before = rows_of(place / "results" / "leaderboard.csv")["gptq"]
    assert mine["method"] == "gptq" and mine["stage"] == "quantized" and mine["bits"] == 4
    # the same checkpoint, the same number
    assert mine["ppl"] == pytest.approx(float(before["ppl"]), rel=1e-4)
    assert mine["kl_mean"] == pytest.approx(float(before["kl_mean"]), rel=1e-3)
    assert mine["ppl_ratio"] == pytest.approx(float(before["ppl_ratio"]), rel=1e-4)


def test_leaderboard_verb_shows_them(finished: tuple[Path, dict[str, Any], str]) -> None:
    place, _, _ = finished
    done = quantlab("leaderboard", "--sort", "ppl", "--html", "board.html", cwd=place)
    assert "gptq-int4" in done.stdout and (place / "board.html").is_file()
    assert quantlab("leaderboard", "--sort", "pl", cwd=place, code=2).stderr.startswith("error: --sort pl")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_sigterm_leaves_a_state_to_resume_from(model: Path, tmp_path: Path) -> None:
    arguments = [
        "quantize",
        "rtn-int4",
        "--model",
        str(model),
        *PLAIN,
        "--set",
        "evaluate=[perplexity, speed]",
        "--out",
        "o",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "quantlab", *arguments],
        cwd=tmp_path,
        env=ENVIRONMENT,
        text=True,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "o" / "quantlab.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "--resume" in said and "Traceback" not in said, said
    assert not (tmp_path / "results" / "leaderboard.csv").exists()
    summary = json.loads(quantlab(*arguments, "--resume", "--json", cwd=tmp_path).stdout)
    assert summary["status"] == "done" and len(summary["rows"]) == 2


def test_doctor(tmp_path: Path) -> None:
    found = json.loads(quantlab("doctor", "--json", cwd=tmp_path).stdout)
    assert "float32" in found["machine"]["16 bits on CPU"]
    assert found["can_run"]["none"] == "" and found["packages"]["torch"]
    assert found["machine"].keys() >= {"CPU", "RAM", "disk here", "CUDA"}
