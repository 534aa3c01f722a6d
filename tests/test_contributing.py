"""The steps of CONTRIBUTING.md, carried out on a copy of the package, add a method, a format and a task that work."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests import command
from tests.conftest import write_tiny

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
_STEP = re.compile(
    r"^(?P<what>File|Entry in|[^\n`]*[Aa]bove) `(?P<first>[^`]+)`(?: (?:of|in) `(?P<second>[^`]+)`)?"
    r"[^\n]*:\n\n```\w+\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def carry_out(text: str, root: Path) -> list[str]:
    """Do what a section says in the repository `root`; returns the kinds of steps."""
    done = []
    for step in _STEP.finditer(text):
        what, first, second, code = step["what"], step["first"], step["second"], step["code"]
        if what == "File":
            path = root / first
            assert not path.exists() and path.parent.is_dir(), first
            path.write_text(code, encoding="utf-8")
        else:
            path = root / second
            lines = path.read_text(encoding="utf-8").split("\n")
            start = next(i for i, line in enumerate(lines) if re.match(rf"(class )?{first}\b", line))
            if what == "Entry in":  # at the end of the literal table
                at = next(i for i in range(start, len(lines)) if lines[i] == "}")
                lines[at:at] = code.rstrip("\n").split("\n")
            else:
                start -= lines[start - 1].startswith("@")
                lines[start:start] = [*code.rstrip("\n").split("\n"), "", ""]
            path.write_text("\n".join(lines), encoding="utf-8")
        done.append(what.split(" ")[-1])
    return done


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    for folder in ("quantlab", "recipes", "calib"):
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "databases")
        )
    assert carry_out(section("Add a method"), root) == ["File", "above", "in", "File"]
    assert carry_out(section("Add a format"), root) == ["File", "Above", "in", "File"]
    assert carry_out(section("Add a task"), root) == ["File", "above", "in"]
    write_tiny(root / "model", hidden=128)
    return root


def quantlab(copy: Path, *words: str) -> str:
    return command.quantlab(*words, cwd=copy, root=copy).stdout


@pytest.fixture(scope="module")
def made(copy: Path) -> dict[str, Any]:
    """All three in one run."""
    small = ("calibration.rows=4", "calibration.seq_len=32", "calibration.source=calib/general.jsonl", "shrink_steps=2",
             "tasks.perplexity.max_tokens=256", "tasks.perplexity.seq_len=64", "tasks.repetition.rows=2",
             "evaluate=[perplexity, repetition]")  # fmt: skip
    settings = [word for one in small for word in ("--set", one)]
    told = quantlab(
        copy, "quantize", "shrink-int4", "rtn-npz", "--model", "model", *settings, "--out", "out", "--json"
    )
    found: dict[str, Any] = json.loads(told)
    return found


def test_they_are_in_the_schema_doctor_and_plan(copy: Path) -> None:
    program = "import json; from quantlab.recipe.load import json_schema; print(json.dumps(json_schema()))"
    environment = os.environ | {"PYTHONPATH": str(copy)}
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=copy, env=environment, capture_output=True, text=True
    )
    schema = json.loads(told.stdout)["$defs"]
    fields = schema["QuantizeRecipe"]["properties"]
    assert "shrink" in fields["method"]["enum"] and "npz" in fields["format"]["enum"]
    assert fields["shrink_steps"]["default"] == 3 and "repetition" in schema["TaskOptions"]["properties"]
    can = json.loads(quantlab(copy, "doctor", "--json"))["can_run"]
    assert can["shrink"] == can["format npz"] == can["repetition"] == ""
    planned = json.loads(quantlab(copy, "plan", "shrink-int4", "rtn-npz", "--model", "model", "--json"))
    assert [(row["method"], row["format"]) for row in planned["recipes"]] == [
        ("shrink", "gptq"),
        ("rtn", "npz"),
    ]
    assert all(row["size_bytes"] > 0 and row["parts"]["solving"] >= 0 for row in planned["recipes"])
    assert "shrink-int4" in quantlab(copy, "recipes") and "rtn-npz" in quantlab(copy, "recipes")


def test_they_are_in_checkpoints_cards_and_the_leaderboard(copy: Path, made: dict[str, Any]) -> None:
    folders = {
        Path(path).name.split("-int4")[0].split("-npz")[0]: copy / path
        for path in made["checkpoints"].values()
    }
    shrunk, archive = folders["shrink"], folders["rtn"]
    for folder in (shrunk, archive):
        record = json.loads((folder / "quantlab.json").read_text(encoding="utf-8"))
        assert record["verification"]["passed"]
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "Repeated 4-grams of greedy text" in card and "Perplexity" in card
    assert sorted(p.name for p in archive.iterdir() if p.suffix in (".npz", ".safetensors")) == [
        "weights.npz"
    ]
    assert "Read by quantlab." in (archive / "README.md").read_text(encoding="utf-8")
    assert not [p.name for p in archive.parent.iterdir() if "." in p.name]  # nothing is left beside them
    with (copy / "results" / "leaderboard.csv").open(encoding="utf-8", newline="") as stream:
        rows = {row["method"]: row for row in csv.DictReader(stream)}
    assert set(rows) == {"none", "shrink", "rtn"} and rows["rtn"]["format"] == "npz"
    assert all(0 <= float(row["repetition"]) <= 1 and float(row["ppl"]) > 0 for row in rows.values())
    assert "rep." in quantlab(copy, "leaderboard")


def test_text_left_open_is_settled_for_the_new_task_too(copy: Path, made: dict[str, Any]) -> None:
    run = next(row["run_id"] for row in made["rows"] if row["method"] == "shrink")
    recipe = (copy / "results" / "runs" / run / "recipe.yaml").read_text(encoding="utf-8")
    assert "source: general.txt" in recipe.partition("repetition:")[2]


def test_an_interrupted_export_starts_from_the_assembled_parts(copy: Path, tmp_path: Path) -> None:
    """Killed inside ``export``: nothing has the checkpoint's name, and --resume solves no block again."""
    words = ("quantize", "rtn-npz", "--model", "model", "--no-eval", "--out", str(tmp_path / "q"))
    module = copy / "quantlab" / "formats" / "npz.py"
    plain = module.read_text(encoding="utf-8")
    module.write_text(
        plain.replace("    import numpy as np\n", "    import os; os._exit(9)\n", 1), encoding="utf-8"
    )
    try:
        environment = os.environ | {"PYTHONPATH": str(copy)}
        done = subprocess.run(
            [sys.executable, "-m", "quantlab", *words], cwd=copy, env=environment, capture_output=True
        )
        assert done.returncode == 9 and not (tmp_path / "q").exists() and (tmp_path / "q.partial").is_dir()
    finally:
        module.write_text(plain, encoding="utf-8")
    blocks = sorted((tmp_path / "q.partial").glob("model-*.safetensors"))
    before = [path.stat().st_mtime_ns for path in blocks[:-1]]
    os.link(blocks[0], tmp_path / "witness")
    quantlab(copy, *words, "--resume")
    assert len(before) == 3 and (tmp_path / "witness").stat().st_mtime_ns == before[0]
    assert [path.name for path in tmp_path.iterdir() if path.name != "witness"] == ["q"]


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`(quantlab/[\w/]+\.py|tests/[\w/]+\.py|tools/[\w/]+\.\w+)`", TEXT)))
)
def test_files_that_it_names_exist(name: str) -> None:
    added = {step["first"] for step in _STEP.finditer(TEXT) if step["what"] == "File"}
    assert (ROOT / name).is_file() or name in added


def test_names_that_its_code_imports_exist() -> None:
    added = {step["first"].removesuffix(".py").replace("/", ".") for step in _STEP.finditer(TEXT)}
    found = re.findall(r"^ *from (quantlab[\w.]*) import (.+)$", TEXT, re.MULTILINE)
    assert len(found) > 5
    for module, names in found:
        for name in names.split(", "):
            assert module in added or name == "RepetitionOptions" or hasattr(import_module(module), name), (
                name
            )
