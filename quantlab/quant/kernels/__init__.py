"""Fused kernels for the quantizers, and whether they can run here.

Nothing but `available` is imported with the package: the modules beside this file import Triton, which exists only
where a CUDA build of torch brought it (or the development environment, for its interpreter).
"""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch


def available(device: torch.device | str) -> bool:
    """Whether the Triton kernels run on ``device``: an NVIDIA GPU of compute capability 7.5 or more, Triton itself, and
    the C compiler with which it builds a kernel's launcher. Elsewhere the plain torch solvers are used, also where
    Triton's interpreter would do: it is for tests and slower than they are."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability(device) < (7, 5) or importlib.util.find_spec("triton") is None:
        return False
    return any(shutil.which(name) for name in (os.environ.get("CC") or "gcc", "gcc", "clang"))
