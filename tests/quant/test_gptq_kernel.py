"""The Triton kernel for GPTQ's column loop without a GPU: under the interpreter, and compiled but not run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantlab.quant.kernels import available

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no Triton: pip install -c constraints.txt triton"
)


def python(*arguments: str, **environment: str) -> str:
    """Standard output of a fresh interpreter in the repository's root, one thread."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@needs_triton
def test_same_integers_under_the_interpreter() -> None:
    out = python(
        "-m",
        "pytest",
        "-s",
        "-p",
        "no:cacheprovider",
        "tests/quant/gptq_kernel_cases.py",
        TRITON_INTERPRET="1",
    )
    print(out)  # how many ties; shown with -s or -rP
    passed = re.search(r"(\d+) passed", out)
    assert passed and int(passed[1]) >= 28 and "skipped" not in out
    assert re.search(r"\d+ codes, \d+ ties, 0 wrong", out)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from quantlab.quant.kernels.gptq_block import _block_kernel as kernel
given, architecture = sys.argv[1] == "given", int(sys.argv[2])
search = 16 if sys.argv[1] == "searched" else 1
constants = {"GIVEN": given, "SEARCH": search, "WIDTH": 1 if given else 32, "ROWS": 16, "BLOCK": 128}
types = {name: "i32" for name in kernel.arg_names}
types |= {f"{name}_ptr": "*fp32" for name in ("w", "factor", "limits", "scales", "errors", "loss", "shrinks")}
types |= {"zeros_ptr": "*i32", "group_ptr": "*i32", "codes_ptr": "*u8"}
types |= dict.fromkeys(constants, "constexpr")
options = {"num_warps": 4, "enable_fp_fusion": False}
source = ASTSource(kernel, types, constexprs=constants)
built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
assert len(built.asm["cubin"]) > 1000
print("shared", built.metadata.shared)
print(built.asm["ptx"])
"""


@needs_triton
@pytest.mark.parametrize(
    ("grids", "architecture"), [("fitted", "80"), ("fitted", "90"), ("searched", "90"), ("given", "90")]
)
def test_compiles_for_gpus_with_every_operation_rounded(
    grids: str, architecture: str, tmp_path: Path
) -> None:
    """To machine code, by the compiler that comes with Triton: divisions are the rounded ones and nothing is fused."""
    out = python("-c", COMPILE, grids, architecture, TRITON_CACHE_DIR=str(tmp_path))
    assert "div.rn.f32" in out
    assert not re.search(r"div\.(full|approx)|fma\.|rcp\.|\.ftz", out)
    assert int(out.split()[1]) <= 48 * 1024


def test_plain_solver_where_there_is_no_gpu() -> None:
    assert not available("cpu")
    assert not available("meta")


def test_asking_imports_no_triton() -> None:
    code = "import sys, quantlab.quant.kernels as k; k.available('cuda'); print('triton' in sys.modules)"
    assert python("-c", code).strip() == "False"
