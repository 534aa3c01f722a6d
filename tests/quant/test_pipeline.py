"""The engine on real checkpoints: what is written is what was solved, is read back by plain transformers, survives a
kill, and costs one calibration pass for several recipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.errors import DataError, MachineError, RecipeError
from quantlab.formats import format_module
from quantlab.models.load import load_model
from quantlab.progress import Silent
from quantlab.quant.pipeline import Job, Outcome, check, quantize
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.formats import FORMATS

from ..conftest import SHARED, write_tiny


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def recipe(method: str, source: Path | str = "", **keys: Any) -> QuantizeRecipe:
    if method in ("gptq", "awq"):
        keys.setdefault("calibration", {"source": str(source), "rows": 16, "seq_len": 64})
    return QuantizeRecipe.model_validate({"method": method, **keys})


def run(model: Path, out: Path, recipes: dict[str, QuantizeRecipe], **keys: Any) -> dict[str, Outcome]:
    jobs = [Job(name, r, out / name) for name, r in recipes.items()]
    keys.setdefault("progress", Silent())
    return {o.job.name: o for o in quantize(jobs, str(model), device="cpu", **keys)}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The quantized matrices of a checkpoint, as its own layout module reads them."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(file)
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    kind = "awq" if config["quant_method"] == "awq" else "gptq"
    module = format_module(kind)
    found = {}
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        parts = {s: tensors[f"{name}.{s}"] for s in FORMATS[kind].suffixes}
        codes, scales, zeros, group = module.unpack(
            parts, bits=config["bits"], group_size=config["group_size"]
        )
        found[name] = (codes.float() - zeros[:, group]) * scales[:, group]
    return found


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(path, device="cpu", dtype="float32").model(input_ids=ids).logits
    return found


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("rtn", {"bits": 2, "group_size": 16}), ("rtn", {"bits": 3, "group_size": 32, "symmetric": False}),
        ("rtn", {"bits": 8, "group_size": -1}), ("gptq", {"bits": 4, "group_size": 64, "act_order": True}),
        ("gptq", {"bits": 3, "group_size": 128, "symmetric": False}), ("gptq", {"bits": 8, "group_size": 32}),
        ("gptq", {"bits": 4, "group_size": 32, "propagate": "quantized"}), ("awq", {"bits": 4, "group_size": 32}),
        ("awq", {"bits": 3, "group_size": 32, "format": "gptq"}), ("awq", {"bits": 4, "symmetric": True}),
    ],
)  # fmt: skip
def test_transformers_reads_what_was_solved(
    tiny: Path, calibration_file: Path, tmp_path: Path, method: str, keys: dict[str, Any]
) -> None:
    """Plain transformers, through its kernels, computes what a model with the solved weights written in computes."""
    outcome = run(tiny, tmp_path, {"q": recipe(method, calibration_file, **keys)})["q"]
    assert outcome.checkpoint is not None
    ids = torch.randint(1, 257, (2, 48), generator=torch.Generator().manual_seed(0))
    subject = load_model(tiny, device="cpu", dtype="float32")
    state = subject.model.state_dict()
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for file in outcome.checkpoint.glob("*.safetensors"):
        stored |= load_file(file)
    for name, value in weights(outcome.checkpoint).items():
        state[f"{name}.weight"].copy_(value)
    for name in state:
        if name in stored:
            state[name].copy_(stored[name])
    with torch.no_grad():
        expected = subject.model(input_ids=ids).logits
    got = logits(outcome.checkpoint, ids)
    assert (got - expected).norm() / expected.norm() < 0.02  # kernels work in 16 bit


def test_several_recipes_share_one_pass_and_change_nothing(
    tiny: Path, calibration_file: Path, tmp_path: Path
) -> None:
    recipes = {
        "a": recipe("gptq", calibration_file, bits=3, group_size=32),
        "b": recipe("awq", calibration_file, bits=4, group_size=32),
        "c": recipe("rtn", bits=4, group_size=32),
    }
    notes = Notes()
    together = run(tiny, tmp_path / "together", recipes, progress=notes)
    assert any("one calibration pass" in line and "a, b" in line for line in notes.said)
    assert together["a"].shared_calibration and together["b"].shared_calibration
    for name, one in recipes.items():
        alone = run(tiny, tmp_path / "alone", {name: one})[name]
        assert alone.checkpoint is not None and together[name].checkpoint is not None
        assert same_weights(alone.checkpoint, tmp_path / "together" / name)


def same_weights(first: Path, second: Path) -> bool:
    names = sorted(p.name for p in first.glob("*.safetensors"))
    assert names and names == sorted(p.name for p in second.glob("*.safetensors"))
    return all((first / n).read_bytes() == (second / n).read_bytes() for n in names)


@pytest.mark.parametrize("propagate", ["original", "quantized", "corrected"])
def test_resume_ends_in_the_same_bytes(
    tiny: Path, calibration_file: Path, tmp_path: Path, propagate: str
) -> None:
    one = recipe("gptq", calibration_file, bits=4, group_size=32, propagate=propagate)
    whole = run(tiny, tmp_path / "whole", {"q": one})["q"].checkpoint
    assert whole is not None
    broken = tmp_path / "broken" / "q"
    partial = broken.with_name("q.partial")

    class Stop(Silent):
        """Ends the work the hard way as soon as the first block is on disk."""

        def task(self, name: str, total: float | None = None) -> Any:
            return _StopAfterFirst()

    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "broken", {"q": one}, progress=Stop())
    assert len(list(partial.glob("*.safetensors"))) == 1 and not broken.exists()
    (partial / "model-00002-of-00004.part").write_bytes(b"half a block")
    run(tiny, tmp_path / "broken", {"q": one}, resume=True)
    assert same_weights(whole, broken)


class _StopAfterFirst:
    def __enter__(self) -> Any:
        def advance(units: float = 1) -> None:
            raise KeyboardInterrupt

        return advance

    def __exit__(self, *_: object) -> None:
        return None


def test_resume_with_another_recipe_starts_over(tiny: Path, calibration_file: Path, tmp_path: Path) -> None:
    stale = tmp_path / "q.partial"
    stale.mkdir()
    (stale / "resume.json").write_text('{"recipe": "other"}')
    (stale / "model-00001-of-00004.safetensors").write_bytes(b"not a checkpoint")
    done = run(tiny, tmp_path, {"q": recipe("rtn", group_size=32)}, resume=True)["q"]
    assert done.checkpoint is not None and weights(done.checkpoint)


def test_occupied_output_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "precious.txt").write_text("mine")
    with pytest.raises(RecipeError, match="is not empty"):
        run(tiny, tmp_path, {"q": recipe("rtn")})
    assert [p.name for p in (tmp_path / "q").iterdir()] == ["precious.txt"]


def test_misfits_are_named(baby: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        check(recipe("gptq", "x", bits=4, group_size=128), str(baby))
    message = f"{caught.value} {caught.value.hint}"
    assert "down_proj" in message and "352" in message and "16, 32" in message


def test_quantized_models_are_not_quantized_again(tiny: Path, tmp_path: Path) -> None:
    done = run(tiny, tmp_path, {"q": recipe("rtn", group_size=32)})["q"].checkpoint
    with pytest.raises(DataError, match="already quantized"):
        check(recipe("rtn"), str(done))


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = write_tiny(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"NaN or infinite in model\.layers\.1\.mlp\.up_proj\.weight"):
        run(model, tmp_path, {"q": recipe("rtn", group_size=32)})
    assert not (tmp_path / "q").exists()


def test_empty_and_short_calibration(tiny: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        run(tiny, tmp_path, {"q": recipe("gptq", empty, group_size=32)})
    short = tmp_path / "short.txt"
    short.write_text("word " * 60)
    with pytest.raises(DataError) as caught:
        run(tiny, tmp_path, {"q": recipe("gptq", short, group_size=32)})
    assert "enough for 4 rows" in str(caught.value) and "rows=4" in caught.value.hint
    assert not (tmp_path / "q").exists()


def test_a_disk_too_small_is_said_before_work(tmp_path: Path) -> None:
    """A real (sparse) model file larger than any disk here: one terabyte of which no block is allocated."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    side = 2**18
    entries = {
        f"model.layers.{i}.mlp.up_proj.weight": {
            "dtype": "BF16",
            "shape": [side, side],
            "data_offsets": [2 * i * side**2, 2 * (i + 1) * side**2],
        }
        for i in range(80)
    }
    header = json.dumps(entries).encode()
    with (model / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + 160 * side**2)
    with pytest.raises(MachineError, match="GB of disk"):
        run(model, tmp_path, {"q": recipe("rtn", group_size=32)})
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


FULL = """
import resource, sys
from pathlib import Path
from quantlab.errors import MachineError
from quantlab.progress import Silent
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.quantize import QuantizeRecipe
method, model, out = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
recipe = QuantizeRecipe.model_validate({"method": method})
try:
    quantize([Job("q", recipe, Path(out))], model, device="cpu", progress=Silent())
except MachineError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("method", ["rtn", "bnb-nf4"])
def test_a_write_that_fails_leaves_no_checkpoint(tiny: Path, tmp_path: Path, method: str) -> None:
    """The kernel itself refuses to let any file grow beyond 20 kB."""
    out = tmp_path / "q"
    done = subprocess.run(
        [sys.executable, "-c", FULL, method, str(tiny), str(out)], capture_output=True, text=True
    )
    assert "refused: cannot write" in done.stdout, done.stdout + done.stderr[-1500:]
    assert not out.exists()
    assert not list(tmp_path.rglob("*.part"))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", tie=True)
    done = run(model, tmp_path, {"q": recipe("rtn", group_size=32)})["q"].checkpoint
    assert done is not None
    subject = load_model(done, device="cpu")
    assert subject.model.get_input_embeddings().weight is subject.model.get_output_embeddings().weight
    assert subject.params == load_model(model, device="cpu").params


def test_real_model_gptq_beats_rtn_and_awq_never_loses(baby: Path, tmp_path: Path) -> None:
    """3 bits, group 32, on a trained model: calibration and test text are different parts of one corpus."""
    corpus = (SHARED / "corpora" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    (tmp_path / "calibration.txt").write_text(corpus[:200_000], encoding="utf-8")
    source = {"source": str(tmp_path / "calibration.txt"), "rows": 64, "seq_len": 256}
    outcomes = run(
        baby,
        tmp_path,
        {
            "rtn": recipe("rtn", bits=3, group_size=32),
            "gptq": recipe("gptq", bits=3, group_size=32, calibration=source),
            "awq": recipe("awq", bits=3, group_size=32, format="gptq", symmetric=True, calibration=source),
        },
    )
    rtn, awq = outcomes["rtn"].loss, outcomes["awq"].loss
    assert len(rtn) == 5 * 7 and set(rtn) == set(awq)
    assert [name for name in rtn if awq[name] > rtn[name]] == []
    subjects = {n: load_model(o.checkpoint, device="cpu") for n, o in outcomes.items() if o.checkpoint}
    text = corpus[600_000:640_000]
    ids = torch.tensor(
        subjects["rtn"].tokenizer(text, add_special_tokens=False)["input_ids"][: 256 * 40]
    ).view(-1, 256)
    found = {}
    for name, subject in subjects.items():
        with torch.no_grad():
            found[name] = (
                torch.stack([subject.model(input_ids=p, labels=p).loss for p in ids.split(10)]).mean().item()
            )
    assert found["gptq"] < found["rtn"]
