"""`quantlab doctor`: versions, the machine, and which methods can run here, with the reason where one cannot.

Libraries are really imported, one after the other, since "installed" and "works" are different things.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantlab import __version__
from quantlab.commands.guard import print_json, stdout_is_stderr
from quantlab.registry.formats import FORMATS, OF_BLOCKS, PACKING
from quantlab.registry.methods import METHODS
from quantlab.registry.tasks import TASKS

PACKAGES = (
    "torch", "transformers", "accelerate", "safetensors", "bitsandbytes", "optimum", "gptqmodel", "compressed-tensors",
    "gguf", "datasets", "lm-eval", "sqlglot", "triton",
)  # fmt: skip

BASE = ("torch", "transformers")


def needs() -> dict[str, tuple[str, ...]]:
    """What must import for each method, format and task; a method needs what its own format needs too."""
    found = {}
    for name, method in METHODS.items():
        format = method.fixed.format if method.fixed else method.formats[0]
        found[name] = (*method.requires, *FORMATS[format].requires)
    found |= {f"format {name}": (*BASE, *FORMATS[name].requires) for name in (*PACKING, *OF_BLOCKS)}
    found |= {name: (*BASE, *task.requires) for name, task in TASKS.items()}
    return {name: tuple(dict.fromkeys(modules)) for name, modules in found.items()}


def run(*, as_json: bool) -> None:
    with stdout_is_stderr():
        found = examine()
    if as_json:
        print_json(found)
        return
    print(f"quantlab {found['quantlab']}, Python {found['python']} on {found['system']}")
    print("\nmachine")
    for name, value in found["machine"].items():
        print(f"  {name:<16}{value}")
    print("\nlibraries")
    for name, value in found["packages"].items():
        print(f"  {name:<14}{value or 'not installed'}")
    print("\nwhat can run")
    for name, reason in found["can_run"].items():
        print(f"  {name:<26}{'yes' if not reason else 'no: ' + reason}")


def examine() -> dict[str, Any]:
    """Everything that `doctor` says, as one dictionary; `can_run` maps to the reason why not, "" when it can."""
    problems: dict[str, str] = {}
    wanted = needs()
    _attempt(lambda: import_module("quantlab.models.load").quiet_libraries())
    for module in sorted({module for modules in wanted.values() for module in modules}):
        problems[module] = _import_problem(module)
    reasons = {}
    for name, modules in wanted.items():
        reasons[name] = "; ".join(problems[module] for module in modules if problems[module])
    return {
        "quantlab": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "machine": _machine(torch_works=not problems["torch"]),
        "packages": {name: _version(name) for name in PACKAGES},
        "can_run": reasons,
    }


def _import_problem(module: str) -> str:
    """Why a module cannot be imported, with what to do; "" when it can."""
    problem = _attempt(lambda: import_module(module))
    if not problem:
        return ""
    package = module.replace("_", "-")
    if _version(package) is None:
        return f"{package} is not installed (pip install -c constraints.txt {package})"
    return f"{package} does not import ({problem})"


def _attempt(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:  # libraries raise all kinds at import
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine(*, torch_works: bool) -> dict[str, str]:
    import psutil

    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(Path.cwd())
    gib = 2**30
    return {
        "CPU": f"{os.cpu_count()} cores; {cpu_features()}",
        "RAM": f"{memory.available / gib:.1f} of {memory.total / gib:.1f} GiB free",
        "disk here": f"{disk.free / gib:.1f} of {disk.total / gib:.1f} GiB free",
        "16 bits on CPU": _half() if torch_works else "unknown: torch does not import",
        "CUDA": _cuda() if torch_works else "unknown: torch does not import",
        "hub cache": os.environ.get("HF_HOME", "the default of huggingface_hub"),
    }


def cpu_features() -> str:
    """The vector features that decide which kernels run, as Linux names them."""
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16")
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "features unknown on " + sys.platform
    words = set(text.split())
    present = [feature for feature in wanted if feature in words]
    return " ".join(present) or "no vector features"


def _half() -> str:
    """What models stored in 16 bits are computed in on this CPU."""
    import torch

    from quantlab.models.precision import cpu_multiplies

    fast = cpu_multiplies(torch.bfloat16)
    return (
        "bfloat16 as it is, float16 in float32"
        if fast
        else "computed in float32, this CPU multiplies neither type"
    )


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "no device" + ("" if built else " (this torch is a CPU build)")
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        )
    return f"{torch.version.cuda}: " + "; ".join(names)
