"""Code that a model brings along: what its configuration names is copied with the checkpoint, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantlab.models.remote_code import named_code
from quantlab.progress import Silent
from quantlab.quant.jobs import Job
from quantlab.quant.pipeline import quantize
from quantlab.recipe.quantize import QuantizeRecipe

CONFIGURATION = (
    "from transformers import LlamaConfig\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
)
MODELING = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig
from .parts_own import SCALE


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    scale = SCALE
"""


@pytest.fixture
def own(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model as one of a kind that transformers does not know."""
    folder = tmp_path / "own"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    (folder / "parts_own.py").write_text("from .deeper_own import SCALE\n")
    (folder / "deeper_own.py").write_text("SCALE = 1.0\n")
    for name in ("setup.py", "conftest.py", "install.sh", "modeling_other.py"):
        (folder / name).write_text("raise SystemExit('this must not travel')\n")
    return folder


NAMED = ["configuration_own.py", "deeper_own.py", "modeling_own.py", "parts_own.py"]


def test_what_is_named_with_what_it_imports(own: Path) -> None:
    assert named_code(own) == NAMED


@pytest.mark.parametrize("method", ["rtn", "bnb-nf4"])
def test_the_checkpoint_is_verified_with_its_own_code(own: Path, tmp_path: Path, method: str) -> None:
    recipe = QuantizeRecipe.model_validate(
        {"method": method, **({"group_size": 32} if method == "rtn" else {})}
    )
    out = tmp_path / "out"
    quantize([Job("x", recipe, out)], str(own), progress=Silent(), verify=True, trust_remote_code=True)
    assert sorted(file.name for file in out.glob("*.py")) == NAMED
    assert not (out / "install.sh").exists()
    if method == "rtn":
        found = json.loads((out / "quantlab.json").read_text())["verification"]
        assert found["passed"] and found["how"] == "transformers"


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({}, []),
        ({"AutoModel": "someone/model--modeling_own.Own"}, []),  # stays on the hub
        ({"AutoModel": "../outside.Own"}, []),
        ({"AutoModel": "missing.Own"}, []),
        ({"AutoModel": 3}, []),
        ({"AutoModel": "modeling_own.Own"}, NAMED),
        ({"AutoTokenizer": ["parts_own.Slow", None]}, ["deeper_own.py", "parts_own.py"]),
    ],
)
def test_maps(own: Path, mapping: dict[str, Any], expected: list[str]) -> None:
    (own.parent / "outside.py").write_text("")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"auto_map": mapping}))
    assert named_code(own) == expected


def test_a_tokenizer_names_code_too(own: Path) -> None:
    (own / "tokenization_own.py").write_text("from . import parts_own\n")
    config = json.loads((own / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    (own / "tokenizer_config.json").write_text(json.dumps(config))
    assert named_code(own) == sorted([*NAMED, "tokenization_own.py"])


def test_code_that_cannot_be_read_is_copied_and_not_followed(own: Path) -> None:
    (own / "modeling_own.py").write_text("def (:\n")
    assert named_code(own) == ["configuration_own.py", "modeling_own.py"]
