"""The work folder of a comparison, and processes that run in it: models, rows, measurements, errors."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from random_llama import Shape

from peers import environments

HERE = Path(__file__).resolve().parents[1]  # benchmarks/
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantlab-peers"


@dataclass(frozen=True)
class Entry:
    """One thing to measure. ``recipes`` are quantlab's; ``settings`` go to a peer's worker."""

    tool: str
    kind: str  # gptq, awq, six: what it is compared with
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


class Bench:
    """The work folder, and processes that run in it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work, self.venvs = args.work.absolute(), args.venvs.absolute()
        self.device, self.threads, self.python = args.device, args.threads, args.python
        self.dtype = getattr(args, "dtype", "auto")
        self.work.mkdir(parents=True, exist_ok=True)

    def environment(self, own: bool) -> dict[str, str]:
        """Variables of a worker: its threads, no network, and for quantlab's own processes where quantlab is."""
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"),
                                str(self.threads))  # fmt: skip
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
        more = {"TOKENIZERS_PARALLELISM": "false", "GPTQMODEL_CPU_WORKERS": str(max(2, self.threads))}
        if self.device == "cpu":
            more["CUDA_VISIBLE_DEVICES"] = ""
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        if own:
            more["PYTHONPATH"] = os.pathsep.join([str(HERE), str(quantlab_root())])
        return kept | threads | offline | more

    def process(self, python: str | Path, arguments: Sequence[str], log: Path, own: bool) -> int:
        """Run to the end; everything said goes to ``log``. Exit status."""
        with log.open("w", encoding="utf-8") as stream:
            command = [str(python), *arguments]
            return subprocess.run(
                command, stdout=stream, stderr=stream, env=self.environment(own), cwd=self.work, check=False
            ).returncode

    def interpreter(self, tool: str) -> Path:
        """The Python of a peer; its environment is made where there is none."""
        return environments.ensure(self.venvs, tool)

    def model(self, shape: Shape) -> Path:
        """The folder of a random model, made where there is none."""
        name = hashlib.sha256(json.dumps(dataclasses.asdict(shape)).encode()).hexdigest()[:12]
        out = self.work / f"model-{name}"
        if not (out / "config.json").is_file():
            # In a process of its own: a child's peak memory starts at what its parent held, so this one stays small.
            code = "import json, sys; from pathlib import Path; from random_llama import Shape, build; "
            code += "build(Path(sys.argv[1]), Shape(**json.loads(sys.argv[2])), sys.argv[3])"
            shape_json = json.dumps(dataclasses.asdict(shape))
            self._own("-c", code, str(out), shape_json, self.device, log=self.work / "model.log")
        return out

    def rows(self, shape: Shape, rows: int, seq_len: int, seed: int) -> tuple[Path, Path]:
        """Token rows as ids and as text."""
        stem = self.work / f"rows-{shape.vocab}-{rows}-{seq_len}-{seed}"
        ids, text = stem.with_suffix(".safetensors"), stem.with_suffix(".txt")
        if not (ids.is_file() and text.is_file()):
            code = "import sys; from peers.rows import write; write(*sys.argv[1:])"
            numbers = map(str, (shape.vocab, rows, seq_len, seed))
            self._own("-c", code, str(ids), str(text), *numbers, log=self.work / "rows.log")
        return ids, text

    def _own(self, *arguments: str, log: Path) -> None:
        if self.process(self.python, arguments, log, own=True):
            raise SystemExit(f"failed, see {log}:\n{log.read_text(encoding='utf-8')[-1500:]}")

    def run(self, name: str, entry: Entry, model: Path, rows: tuple[Path, Path]) -> dict[str, Any]:
        """Measure one entry once; its checkpoints stay under ``work/out/<name>``."""
        out = self.work / "out" / name
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(exist_ok=True)
        files = {kind: self.work / f"{name}.{kind}" for kind in ("spec", "result", "log")}
        files["result"].unlink(missing_ok=True)
        spec = {
            "tool": entry.tool, "model": str(model), "rows": str(rows[0]), "text": str(rows[1]), "out": str(out),
            "device": self.device, "dtype": self.dtype, "result": str(files["result"]), "recipes": entry.recipes,
            **entry.settings,
        }  # fmt: skip
        files["spec"].write_text(json.dumps(spec, indent=1), encoding="utf-8")
        own = entry.tool == "quantlab"
        python = self.python if own else self.interpreter(entry.tool)
        status = self.process(
            python, [str(HERE / "peers" / "worker.py"), str(files["spec"])], files["log"], own
        )
        if not files["result"].is_file():
            return {"error": f"exit status {status}, see {files['log']}"}
        found: dict[str, Any] = json.loads(files["result"].read_text(encoding="utf-8"))
        return found

    def errors(
        self,
        model: Path,
        rows: Path,
        checkpoints: Mapping[str, Path],
        layerwise: Sequence[str],
        block_rows: int,
    ) -> dict[str, dict[str, float | None]]:
        files = {kind: self.work / f"errors.{kind}" for kind in ("spec", "result", "log")}
        spec = {
            "model": str(model), "rows": str(rows), "device": self.device, "block_rows": block_rows,
            "checkpoints": {name: str(path) for name, path in checkpoints.items()}, "layerwise": list(layerwise),
            "result": str(files["result"]),
        }  # fmt: skip
        files["spec"].write_text(json.dumps(spec, indent=1), encoding="utf-8")
        self._own("-m", "peers.errors", str(files["spec"]), log=files["log"])
        found: dict[str, dict[str, float | None]] = json.loads(files["result"].read_text(encoding="utf-8"))
        return found


def quantlab_root() -> Path:
    """The folder that holds the quantlab package of this interpreter."""
    found = importlib.util.find_spec("quantlab")
    if found is None or found.origin is None:
        raise SystemExit("quantlab is not importable: pip install it, or set PYTHONPATH to the checkout")
    return Path(found.origin).resolve().parents[1]
