"""What is stored in 16 bits is computed in float32 on CPUs without instructions for it, and stored as before."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantlab.models import precision
from quantlab.models.load import load_model
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Silent
from quantlab.quant.pipeline import Job, quantize
from quantlab.recipe.quantize import QuantizeRecipe


def told(monkeypatch: pytest.MonkeyPatch, library: bool = True, **capabilities: object) -> None:
    """Let the processor say this of itself, and the library whether it takes bfloat16."""
    precision.cpu_multiplies.cache_clear()
    monkeypatch.setattr(precision, "onednn_takes_bfloat16", lambda: library)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    precision.cpu_multiplies.cache_clear()


def test_what_processors_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, architecture="x86_64", avx2=True, avx512_f=True, avx512_bf16=False)
    assert precision.computed_in(torch.bfloat16, "cpu") == torch.float32
    assert precision.computed_in(torch.float16, "cpu") == torch.float32
    assert precision.computed_in(torch.float32, "cpu") == torch.float32
    assert precision.computed_in(torch.bfloat16, "cuda") == torch.bfloat16
    assert precision.computed_in(torch.float16, "cuda:1") == torch.float16
    for feature in ("avx512_bf16", "amx_bf16"):
        told(monkeypatch, architecture="x86_64", **{feature: True})
        assert precision.computed_in(torch.bfloat16, "cpu") == torch.bfloat16
        assert precision.computed_in(torch.float16, "cpu") == torch.float32


@pytest.mark.parametrize("architecture", ["aarch64", "x86_64"])
@pytest.mark.parametrize("library", [False, True])
def test_the_library_is_asked_too(monkeypatch: pytest.MonkeyPatch, library: bool, architecture: str) -> None:
    """On Arm only it knows; on x86 it may have been told to leave instructions alone."""
    told(monkeypatch, library, architecture=architecture, avx512_bf16=architecture == "x86_64")
    assert precision.computed_in(torch.bfloat16, "cpu") == (torch.bfloat16 if library else torch.float32)


def test_a_library_held_back_takes_no_bfloat16() -> None:
    """With the instructions of AVX2 a product in bfloat16 takes ten times as long as one in float32."""
    ask = "from quantlab.models import precision; print(precision.onednn_takes_bfloat16())"
    held_back = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", ask], env=held_back, capture_output=True, text=True, check=True
    )
    assert platform.machine() != "x86_64" or done.stdout.strip() == "False"


@pytest.mark.parametrize("multiplied", [False, True])
def test_a_loaded_model_computes_in_what_the_processor_multiplies(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, multiplied: bool
) -> None:
    told(monkeypatch, architecture="x86_64", avx512_bf16=multiplied)
    assert load_model(tiny, device="cpu").model.dtype == (torch.bfloat16 if multiplied else torch.float32)
    assert load_model(tiny, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16  # as told


@pytest.mark.parametrize("propagate", ["original", "quantized"])
def test_checkpoints_are_stored_as_ever(
    tiny: Path, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, propagate: str
) -> None:
    """AWQ folds scales into norms, in the stored type: computed in another, verification would fail."""
    told(monkeypatch, architecture="x86_64", avx2=True)
    jobs = []
    for method in ("gptq", "awq"):
        calibration = {"source": str(calibration_file), "rows": 8, "seq_len": 64}
        content = {"method": method, "group_size": 32, "calibration": calibration, "propagate": propagate}
        jobs.append(Job(method, QuantizeRecipe.model_validate(content), tmp_path / method))
    quantize(jobs, str(tiny), device="cpu", progress=Silent(), verify=True)  # raises where verification fails
    original = open_files(tiny).tensors
    for job in jobs:
        files = open_files(job.out)
        assert files.config["dtype"] == "bfloat16"
        plain = {name: t.dtype for name, t in files.tensors.items() if name in original}
        assert len(plain) > 6
        assert set(plain.values()) == {"BF16"}
