"""Killed with -9 and resumed, a run ends in the same bytes; and the writer alone, cut off between any two of its
steps."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantlab.errors import MachineError
from quantlab.models.safetensors.files import open_files
from quantlab.quant.checkpoint import CheckpointWriter
from quantlab.quant.checkpoint_paths import partial_path, state_path, tidy

from ..conftest import write_tiny

MEASURED = {"seconds", "memory_bytes", "peak_bytes", "parts", "actual", "rates"}
KEY = {"recipe": "r", "model": "m", "calibration": "c"}


def content(folder: Path) -> dict[str, bytes]:
    """Every file; measurements are taken out of quantlab.json."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in MEASURED}
        return [plain(v) for v in value] if isinstance(value, list) else value

    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    found["quantlab.json"] = json.dumps(plain(json.loads(found["quantlab.json"]))).encode()
    return found


def write(out: Path, *, resume: bool, model: Path) -> Path:
    """A whole checkpoint of three small blocks through the writer."""
    seeded = torch.Generator().manual_seed(0)
    values = [torch.randn(8, 8, generator=seeded) for _ in range(4)]
    writer = CheckpointWriter(out, "model.layers", 3, torch.bfloat16, KEY, resume=resume)
    for index in range(3):
        if not writer.has_block(index):
            keep = {"probe": values[index] * 2}
            writer.write_block(index, {"a.weight": values[index]}, {"a": 0.1 * index}, keep)
        assert torch.equal(writer.kept(index)["probe"], values[index] * 2)
    writer.write_rest({"model.norm.weight": values[3], **open_files(model).tensors})
    writer.assemble(model, {"model_type": "llama"})
    return writer.publish({"loss": dict(sorted(writer.losses.items())), "seconds": time.time()})


class Cut(BaseException):
    """The process ends here: nothing may catch it."""


def cut_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let the process "die" just before its ``number``-th change of a name on the disk."""
    done: list[str] = []

    def counted(name: str, real: Any) -> Any:
        def call(*args: Any, **keys: Any) -> Any:
            if len(done) >= number:
                raise Cut
            done.append(f"{name} {Path(args[0]).name}")
            return real(*args, **keys)

        return call

    for module, name in ((os, "replace"), (os, "mkdir"), (os, "rmdir"), (shutil, "copyfile")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return done


def test_cut_off_at_every_step(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = content(write(tmp_path / "whole", resume=False, model=tiny))
    for number in range(200):
        out = tmp_path / f"cut-{number}"
        with monkeypatch.context() as patched:
            done = cut_at(patched, number)
            try:
                write(out, resume=False, model=tiny)
                ended = True
            except Cut:
                ended = False
        if ended:
            break
        if out.exists():  # it had its name already
            assert content(out) == whole
            tidy(out)
        else:
            first = [p.name for p in partial_path(out).glob("model-0000?-of-*.safetensors")]
            assert content(write(out, resume=True, model=tiny)) == whole, (done, first)
        assert sorted(p.name for p in tmp_path.glob(f"cut-{number}*")) == [out.name]
        shutil.rmtree(out)
    assert 15 < number < 100


def test_resuming_keeps_what_is_done_and_what_was_kept(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    first = CheckpointWriter(out, "model.layers", 3, torch.bfloat16, KEY, resume=False)
    first.write_block(0, {"w": torch.ones(2, 2)}, {"a": 0.5}, {"probe": torch.arange(4.0)})
    (first.work / "model-00002-of-00004.part").write_bytes(b"half a block")
    first.scratch.mkdir()
    again = CheckpointWriter(out, "model.layers", 3, torch.bfloat16, KEY, resume=True)
    assert again.first_missing() == 1 and again.losses == {"model.layers.0.a": 0.5}
    assert torch.equal(again.kept(0)["probe"], torch.arange(4.0)) and again.kept(1) == {}
    assert not list(again.work.glob("*.part")) and again.scratch.is_dir()
    assert again.read_block(0)["w"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "damage", ["other key", "half a marker", "a list", "no marker", "other blocks", "no resume"]
)
def test_what_does_not_belong_is_not_gone_on_with(tmp_path: Path, damage: str) -> None:
    out = tmp_path / "q"
    first = CheckpointWriter(out, "model.layers", 3, torch.bfloat16, KEY, resume=False)
    first.write_block(0, {"w": torch.ones(2, 2)}, {})
    marker = state_path(out) / "resume.json"
    if damage == "half a marker":
        marker.write_text(marker.read_text()[:9])
    elif damage == "a list":
        marker.write_text("[]")
    elif damage == "no marker":
        marker.unlink()
    key = KEY | ({"recipe": "another"} if damage == "other key" else {})
    blocks = 4 if damage == "other blocks" else 3
    again = CheckpointWriter(out, "model.layers", blocks, torch.bfloat16, key, resume=damage != "no resume")
    assert not again.has_block(0) and not list(again.work.iterdir())


def test_two_runs_on_one_checkpoint_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "q"
    code = (
        "import sys, time, torch\nfrom pathlib import Path\n"
        "from quantlab.quant.checkpoint import CheckpointWriter\n"
        "CheckpointWriter(Path(sys.argv[1]), 'm', 3, torch.bfloat16, {}, resume=False)\n"
        "print('open', flush=True)\ntime.sleep(600)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        for resume in (False, True):
            with pytest.raises(MachineError, match=f"in use by process {other.pid}"):
                CheckpointWriter(out, "m", 3, torch.bfloat16, {}, resume=resume)
    finally:
        other.kill()
        other.wait()
    CheckpointWriter(out, "m", 3, torch.bfloat16, {}, resume=True)


def test_plain_tensors_are_copied_from_file_to_file(tmp_path: Path) -> None:
    """In the checkpoint's dtype, scales of the packed layouts in their own."""
    model = write_tiny(tmp_path / "m", dtype="float32", layers=1)
    writer = CheckpointWriter(tmp_path / "q", "model.layers", 0, torch.float16, KEY, resume=False)
    tensors = open_files(model).tensors
    writer.write_rest({**tensors, "x.scales": torch.ones(3), "x.weight_scale": torch.ones(3)})
    stored = load_file(writer.work / "model-00001-of-00001.safetensors")
    original = load_file(model / "model.safetensors")
    assert all(torch.equal(stored[n], t.to(torch.float16)) for n, t in original.items())
    assert stored["x.scales"].dtype == torch.float32 and stored["x.weight_scale"].dtype == torch.float16


def test_a_failed_verification_leaves_no_checkpoint(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    for _ in range(2):  # the second time there is one from before
        writer = CheckpointWriter(out, "model.layers", 0, torch.float16, KEY, resume=False)
        writer.write_rest(open_files(tiny).tensors)
        writer.assemble(tiny, {"model_type": "llama"})
        failed = writer.fail()
        assert failed == tmp_path / "q.failed" and sorted(p.name for p in tmp_path.iterdir()) == ["q.failed"]


def quantize(model: Path, text: Path, out: Path, propagate: str, *, resume: bool) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "quantlab",
        "quantize",
        "gptq-int4",
        "--model",
        str(model),
        "--out",
        str(out),
    ]
    command += ["--no-eval", "--device", "cpu"]
    for one in ("evaluate=[]", "group_size=32", f"propagate={propagate}"):
        command += ["--set", one]
    for key, value in (("source", str(text)), ("rows", "32"), ("seq_len", "64")):
        command += ["--set", f"calibration.{key}={value}"]
    log = out.with_name(out.name + ".log").open("ab")
    return subprocess.Popen(
        command + (["--resume"] if resume else []), stdout=log, stderr=log, start_new_session=True
    )


@pytest.mark.parametrize("propagate", ["original", "quantized", "corrected"])
def test_killed_runs_end_in_the_same_bytes(tmp_path: Path, calibration_file: Path, propagate: str) -> None:
    """Killed once some blocks are there, then while it resumes, then while it is verified."""
    model = write_tiny(tmp_path / "model", layers=6)
    assert quantize(model, calibration_file, tmp_path / "whole", propagate, resume=False).wait() == 0
    out = tmp_path / "killed"
    partial = partial_path(out)
    for attempt, moment in enumerate(("model-00002-of-*", "model-00005-of-*", "config.json")):
        process = quantize(model, calibration_file, out, propagate, resume=attempt > 0)
        while process.poll() is None and not list(partial.glob(moment)):
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert quantize(model, calibration_file, out, propagate, resume=True).wait() == 0, (
        tmp_path / "killed.log"
    ).read_text()[-2000:]
    assert content(out) == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.glob("killed*")) == ["killed", "killed.log"]
