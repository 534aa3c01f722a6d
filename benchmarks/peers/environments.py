"""The peers' virtual environments: one each, exactly pinned, made on first use.

Each peer wants its own transformers: llmcompressor 0.14 one below 5.18, autoawq 0.2.9 (archived) one of 4.5x. torch
goes in first and by itself, so that the build which the package index offers for this machine (a CPU build, say) is not
replaced by what a peer would pull in. autoawq imports triton even where there is no GPU. The packages come without
build isolation: their set-up scripts want the torch that is installed, not another copy.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FIRST = ("torch==2.13.0", "setuptools==84.2.1", "wheel==0.48.0")

# Versions that were seen working together (Python 3.11, Linux x86-64).
PINS: dict[str, tuple[str, ...]] = {
    "llmcompressor": (
        "llmcompressor==0.14.0", "compressed-tensors==0.19.0", "transformers==5.17.0", "tokenizers==0.23.3",
        "huggingface-hub==1.33.0", "accelerate==1.15.0", "datasets==5.0.1", "auto-round==0.15.1",
        "safetensors==0.8.0", "numpy==2.4.6", "pydantic==2.14.3",
    ),
    "gptqmodel": (
        "gptqmodel==7.6.0", "transformers==5.23.0", "tokenizers==0.23.3", "huggingface-hub==2.4.0",
        "accelerate==1.15.0", "datasets==5.2.0", "safetensors==0.8.0", "numpy==2.2.6", "tokenicer==0.0.14",
        "defuser==0.0.28", "device-smi==0.5.7", "logbar==0.4.15", "pypcre==0.6.4", "torchao==0.18.0",
    ),
    "autoawq": (
        "autoawq==0.2.9", "transformers==4.51.3", "tokenizers==0.21.4", "huggingface-hub==0.36.2",
        "accelerate==1.15.0", "datasets==5.0.1", "safetensors==0.8.0", "numpy==2.4.6", "triton==3.9.0",
        "zstandard==0.25.0",
    ),
}  # fmt: skip
MARKER = "quantlab-peer.json"


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of a peer's environment under ``folder``."""
    scripts = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
    return folder / name / scripts


def is_ready(folder: Path, name: str) -> bool:
    """Whether the environment was made to the end, with the versions of :data:`PINS`."""
    try:
        return json.loads((folder / name / MARKER).read_text(encoding="utf-8")) == _wanted(name)
    except (OSError, ValueError):
        return False


def ensure(folder: Path, name: str) -> Path:
    """Make a peer's environment where there is none (one to three minutes, 1 to 3 GB); returns its interpreter.

    Raises:
        RuntimeError: pip failed; with the end of what it said.
    """
    python = python_of(folder, name)
    if is_ready(folder, name):
        return python
    print(f"making the environment of {name} in {folder / name}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder / name)])
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    _run([*pip, *FIRST])
    _run([*pip, "--no-build-isolation", FIRST[0], *PINS[name]])
    marker = folder / name / MARKER
    marker.write_text(json.dumps(_wanted(name), indent=1) + "\n", encoding="utf-8")
    return python


def _wanted(name: str) -> list[str]:
    return [*FIRST, *PINS[name]]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
