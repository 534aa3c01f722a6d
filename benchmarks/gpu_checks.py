"""Everything that needs an NVIDIA GPU, in one run with a time limit, into one JSON file. `gpu_checks.sh` calls this.

    python benchmarks/gpu_checks.py [--out FILE] [--only PART...] [--seconds 540]

Parts (`PARTS`), the most wanted first, each a process of its own with its own limit:

    tests          tests/gpu
    kernel         GPTQ's column loop on the shapes of Llama-3-8B (gptq_kernel.py)
    blocks         blocks of that shape quantized, beside the floor that their arithmetic sets at measured matrix rates
    bitsandbytes   int8, fp4, nf4, nf4 with double quantization: quantized on the GPU, reloaded, perplexity as a CPU's
    formats        decoding speed and memory of every format on a model of about a billion random parameters
    demo           `quantlab demo --device cuda`

The file is written anew after every part, beside itself and then renamed: a run that is stopped leaves what it had. A
part that fails, or is ended at its limit, keeps the numbers it had come to and does not stop the others; one whose
packages are missing is skipped, and they are named. Texts in the file hold no directories and no secrets. Exit status:
0 all that ran was right; 1 something failed; 3 there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SECONDS = 540.0
LEAST = 15.0  # seconds without which no part is begun
LINES, CHARACTERS = 25, 4000  # of what a part said last
SECRET = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|KEY", re.IGNORECASE)
CORE = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "pydantic",
    "yaml",
    "psutil",
    "numpy",
)
WHOLE = (*CORE, "typer", "rich", "sqlglot", "filelock")
TESTED = ("torch", "pytest", "hypothesis")
NOTED = (
    "torch",
    "triton",
    "transformers",
    "bitsandbytes",
    "gptqmodel",
    "compressed-tensors",
    "optimum",
    "peft",
)


@dataclass(frozen=True)
class Part:
    """One check. ``command`` takes the folder that the part may write into; numbers it leaves there in ``numbers.json``
    count, also when it is stopped. ``needs``: modules without which it is skipped."""

    name: str
    seconds: float
    command: Callable[[Path], Sequence[str]]
    needs: Sequence[str] = CORE


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _own(name: str) -> Callable[[Path], Sequence[str]]:
    return lambda folder: _python(str(HERE / "gpu_parts.py"), name, str(folder))


def _tests(folder: Path) -> Sequence[str]:
    # Where a package is missing the files that do without are still worth running.
    quiet = ("-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit2", "--continue-on-collection-errors")
    return _python("-m", "pytest", str(ROOT / "tests" / "gpu"), *quiet, f"--junitxml={folder / 'tests.xml'}")


def _kernel(folder: Path) -> Sequence[str]:
    return _python(str(HERE / "gptq_kernel.py"), "--json", str(folder / "numbers.json"))


PARTS = (
    Part("tests", 150, _tests, TESTED),
    Part("kernel", 90, _kernel, ("torch", "triton")),
    Part("blocks", 120, _own("blocks")),
    Part("bitsandbytes", 90, _own("bitsandbytes"), (*CORE, "bitsandbytes")),
    Part("formats", 150, _own("formats")),
    Part("demo", 240, _own("demo"), (*WHOLE, "bitsandbytes", "peft", "datasets", "datasketch", "gptqmodel")),
)


def run_part(part: Part, limit: float) -> dict[str, Any]:
    """What came of a part: status, seconds, numbers, and where it was not ok what it said last."""
    missing = [name for name in part.needs if not importable(name)]
    if missing:
        return {"status": "skipped", "seconds": 0.0, "why": f"not here: {', '.join(missing)}"}
    with tempfile.TemporaryDirectory(prefix="gpu-checks-") as made:
        folder = Path(made)
        started = time.monotonic()
        status, said = _run(part.command(folder), folder, limit)
        found = {
            "status": status,
            "seconds": round(time.monotonic() - started, 2),
            "numbers": _numbers(folder),
        }
        if status != "ok":
            found["said"] = said
        if status == "timeout":
            found["limit"] = round(limit, 1)
    return found


def _run(command: Sequence[str], folder: Path, limit: float) -> tuple[str, list[str]]:
    """``ok``, ``failed`` or ``timeout``, and the last lines. Whatever the process started ends with it."""
    said = folder / "said"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with said.open("wb") as stream:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
        except OSError as error:
            return "failed", [str(error)]
        try:
            status = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, last_lines(said.read_bytes()[-16 * CHARACTERS :].decode("utf-8", "replace"))


def _numbers(folder: Path) -> Any:
    """What a part left, whole or not: its own file, or the outcomes of its tests."""
    try:
        return json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass
    try:
        tree = xml.etree.ElementTree.parse(folder / "tests.xml")
    except (OSError, xml.etree.ElementTree.ParseError):
        return {}
    counts: dict[str, int] = {"passed": 0, "failure": 0, "error": 0, "skipped": 0}
    wrong = []
    for case in tree.iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in counts), "passed")
        counts[outcome] += 1
        if outcome in ("failure", "error"):
            wrong.append(f"{case.get('classname')}::{case.get('name')}")
    return counts | ({"wrong": wrong} if wrong else {})


def last_lines(text: str) -> list[str]:
    """The last things said, without progress bars' returns."""
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    kept = [line for line in lines if line][-LINES:]
    while sum(map(len, kept)) > CHARACTERS and len(kept) > 1:
        kept.pop(0)
    return [line[-CHARACTERS:] for line in kept]


def importable(name: str) -> bool:
    """Whether a module is installed; it is not imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def without_secrets(content: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """The content with directories taken off every path, and values of secret variables of the environment removed."""
    if isinstance(content, Mapping):
        return {str(key): without_secrets(value, environment) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_secrets(value, environment) for value in content]
    if not isinstance(content, str):
        return content
    for name, value in environment.items():
        if SECRET.search(name) and len(value) >= 8:
            content = content.replace(value, "***")
    content = content.replace(str(Path.home()), "~")
    return re.sub(r"(?<![\w.:/~-])~?/(?:[^\s/'\":,;]+/)*(?=[\w.<])", "", content)


def write(out: Path, content: Mapping[str, Any]) -> None:
    """Beside the file, then renamed: there is a whole one at every moment."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(out.name + ".part")
    text = json.dumps(without_secrets(content), indent=1, ensure_ascii=False) + "\n"
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, out)


def run_all(
    parts: Iterable[Part], out: Path, described: Mapping[str, Any], *, seconds: float = SECONDS
) -> dict[str, Any]:
    """Run every part for which time is left, writing the file after each."""
    began = time.monotonic()
    content: dict[str, Any] = {"machine": dict(described), "seconds": 0.0, "parts": {}}
    for part in parts:
        left = seconds - (time.monotonic() - began)
        if left < LEAST:
            content["parts"][part.name] = {"status": "skipped", "seconds": 0.0, "why": "no time was left"}
        else:
            print(f"{part.name}: at most {min(part.seconds, left):.0f} s", file=sys.stderr, flush=True)
            content["parts"][part.name] = run_part(part, min(part.seconds, left))
        content["seconds"] = round(time.monotonic() - began, 2)
        write(out, content)
        print(line_of(part.name, content["parts"][part.name]), flush=True)
    return content


def line_of(name: str, found: Mapping[str, Any]) -> str:
    more = found.get("why") or (found.get("said") or [""])[-1]
    return f"{name:<14}{found['status']:<9}{found['seconds']:7.1f} s  {without_secrets(more)}".rstrip()


def describe() -> dict[str, Any] | None:
    """The GPU and what drives it, in a process of its own, so that this one holds none of its memory; None without."""
    if not importable("torch"):
        return None
    done = subprocess.run(
        _python(str(HERE / "gpu_parts.py"), "describe", "-"),
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        return None
    here = {k: v for k, v in machine.describe().items() if k != "load_average"}
    return {**json.loads(done.stdout), **here, "packages": packages(), "missing": missing()}


def packages() -> dict[str, str]:
    found = {}
    for name in NOTED:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def missing() -> list[str]:
    """Modules that some part needs and this Python lacks."""
    names = {name for part in PARTS for name in part.needs} | {"gptqmodel", "compressed_tensors", "optimum"}
    return sorted(name for name in names if not importable(name))


def file_name(device: str) -> str:
    """``NVIDIA H200`` → ``nvidia-h200.json``."""
    return (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "gpu") + ".json"


def main() -> None:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="default: results/gpu/<device>.json")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--elapsed", type=float, default=0.0, help="of them, what installing has taken")
    parser.add_argument("--missing", action="store_true", help="name what this Python lacks, and stop")
    args = parser.parse_args()
    if args.missing:
        print(*missing())
        return
    described = describe()
    if described is None:
        print("no NVIDIA GPU that torch can use on this machine: nothing was run", file=sys.stderr)
        sys.exit(3)
    out = args.out or ROOT / "results" / "gpu" / file_name(described["gpu"])
    chosen = [part for part in PARTS if part.name in args.only]
    content = run_all(chosen, out, described, seconds=args.seconds - args.elapsed)
    print(f"written: {out}")
    sys.exit(any(found["status"] in ("failed", "timeout") for found in content["parts"].values()))


if __name__ == "__main__":
    main()
