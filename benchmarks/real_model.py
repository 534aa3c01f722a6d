"""A real model in many smaller ways, and its peers' ways beside them: one table, one plot. Resumable.

    pip install llama-cpp-python                  # without it llama.cpp's numbers are left out
    python benchmarks/real_model.py --model DIR --text FILE [--source FILE.gguf] [--peers gptqmodel llmcompressor]

The first half of the text calibrates, the second measures: for everybody, the same rows. quantlab's checkpoints come
from one run of `quantlab quantize` (one calibration pass); a peer makes each of its own in its own environment
(`peers/environments.py`); llama.cpp's quantizer starts from `--source`, the same weights as a GGUF file, with the
importance matrix of the same rows. Every checkpoint, whoever made it, is measured by `quantlab evaluate`: perplexity,
KL divergence to the original and agreement of the most likely token, on the same windows, by transformers, and GGUF
files by llama.cpp too; last the speed of each, for which the machine should do nothing else (a GGUF file by llama.cpp:
decoded weights have no speed of their own).

Every finished step is kept in `--work`; the same command goes on with the next. Writes table.md, table.json, plot.svg
and leaderboard.csv to `--out`, also where it was told to leave the speed out (`--no-speed`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from gguf_vs_llama_cpp import quantize_by_peer
from peers import machine
from peers.bench import CACHE, HERE, Bench
from peers.variants import halves
from real_model_plot import draw

TYPES = ("Q8_0", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
FILLINGS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "imatrix": {"method": "imatrix"},
    "gptq": {"method": "gptq", "act_order": "group"},
}


@dataclass(frozen=True)
class Way:
    """One way to store the model. ``content``: quantlab's recipe, or a peer's settings."""

    tool: str
    name: str
    content: Mapping[str, Any]

    @property
    def gguf(self) -> bool:
        return self.content.get("format") == "gguf"

    @property
    def label(self) -> str:
        return f"{self.tool}-{self.name}"


def own_ways(group_size: int) -> Iterator[Way]:
    """quantlab's: what its bundled recipes do, in groups of one size."""
    grouped = {"group_size": group_size}
    gptq = {"method": "gptq", "act_order": True, "propagate": "corrected", "clip_search": True, **grouped}
    ways: dict[str, dict[str, Any]] = {"int8": {"method": "rtn", "bits": 8, **grouped}}
    for bits in (4, 3):
        ways[f"rtn-int{bits}"] = {"method": "rtn", "bits": bits, **grouped}
        ways[f"gptq-int{bits}"] = {**gptq, "bits": bits}
        ways[f"gptq-int{bits}-asymmetric"] = {**gptq, "bits": bits, "symmetric": False}
        ways[f"awq-int{bits}"] = {"method": "awq", "bits": bits, **grouped}
    ways["gptq-int4-ct"] = {**gptq, "bits": 4, "static_groups": True, "format": "compressed-tensors"}
    for kind in ("int8", "fp4", "nf4"):
        ways[f"bnb-{kind}"] = {"method": f"bnb-{kind}"}
    ways["bnb-nf4-dq"] = {"method": "bnb-nf4", "double_quant": True}
    for kind in TYPES:
        for filling, content in FILLINGS.items():
            ways[f"gguf-{kind.lower()}-{filling}"] = {**content, "format": "gguf", "type": kind}
    yield from (Way("quantlab", name, content) for name, content in ways.items())


def peer_ways(group_size: int) -> Iterator[Way]:
    """What the peers can do of the same."""
    for bits in (4, 3):
        common = {"method": "gptq", "bits": bits, "group_size": group_size, "damp": 0.01}
        yield Way("gptqmodel", f"gptq-int{bits}", {**common, "symmetric": True, "act_order": "group"})
        yield Way(
            "gptqmodel", f"gptq-int{bits}-asymmetric", {**common, "symmetric": False, "act_order": "group"}
        )
        yield Way("llmcompressor", f"gptq-int{bits}", {**common, "symmetric": True, "act_order": "static"})
    for tool in ("gptqmodel", "llmcompressor"):
        yield Way(
            tool, "awq-int4", {"method": "awq", "bits": 4, "group_size": group_size, "symmetric": False}
        )


class Study:
    """The work folder and what is done in it; ``state`` holds every measurement by its label."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.bench = args, Bench(args)
        self.work: Path = self.bench.work
        self.kept = self.work / "state.json"
        self.state: dict[str, Any] = {}
        if self.kept.is_file():
            self.state = json.loads(self.kept.read_text(encoding="utf-8"))
        self.calibration, self.test = halves(args.text, self.work)
        self.llama_cpp = importlib.util.find_spec("llama_cpp") is not None

    def run(self) -> None:
        own = [way for way in own_ways(self.args.group_size) if self.wanted(way)]
        self.quantize(own)
        ways = [*own, *self.llama_cpp_quantizer(), *self.peers()]
        for way in ways:
            self.measure(way, ("perplexity", "fidelity"))
        if self.args.speed:
            for way in ways:
                self.measure(way, ("speed",))
        self.publish()

    def wanted(self, way: Way) -> bool:
        return not self.args.only or any(part in way.label for part in self.args.only)

    def checkpoint(self, way: Way) -> Path:
        return self.work / "checkpoints" / (way.name if way.tool == "quantlab" else way.label)

    def stored(self, way: Way) -> Path:
        """What is measured: the checkpoint, or the one file that it is."""
        folder = self.checkpoint(way)
        return next(folder.glob("*.gguf")) if way.gguf else folder

    def keep(self, label: str, found: Any) -> None:
        self.state[label] = found
        beside = self.kept.with_suffix(".part")
        beside.write_text(json.dumps(self.state, indent=1), encoding="utf-8")
        beside.rename(self.kept)
        print(f"{label}: done", file=sys.stderr, flush=True)

    def quantlab(self, *arguments: str, log: str) -> Any:
        """What a command prints with ``--json``."""
        command = [sys.executable, "-m", "quantlab", *arguments, "--json"]
        environment = self.bench.environment(own=True)
        if self.llama_cpp:
            found = importlib.util.find_spec("llama_cpp")
            assert found is not None and found.origin is not None
            environment["PYTHONPATH"] += f":{Path(found.origin).parents[1]}"
        with (self.work / f"{log}.log").open("w", encoding="utf-8") as stream:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=stream, text=True, env=environment, check=False
            )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed, see {self.work / log}.log")
        return json.loads(done.stdout)

    def quantize(self, ways: list[Way]) -> None:
        """All of quantlab's checkpoints in one run, with the importance matrix."""
        recipes = self.work / "recipes"
        recipes.mkdir(exist_ok=True)
        rows = {"source": str(self.calibration), "rows": self.args.rows, "seq_len": self.args.seq_len}
        paths = []
        for way in ways:
            content = {"kind": "quantize", **way.content}
            if way.content["method"] in ("gptq", "awq", "imatrix"):
                content["calibration"] = rows
            paths.append(recipes / f"{way.name}.yaml")
            paths[-1].write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        left = [path for path, way in zip(paths, ways, strict=True) if not self.checkpoint(way).is_dir()]
        if left:
            resume = [*map(str, paths), "--resume"] if len(left) < len(paths) else list(map(str, paths))
            self.quantlab(
                "quantize", *resume, "--model", str(self.args.model), "--out", str(self.work / "checkpoints"),
                "--save-imatrix", str(self.work / "imatrix.gguf"), "--no-eval", "--results", str(self.work / "runs"),
                log="quantize",
            )  # fmt: skip

    def measure(self, way: Way, tasks: tuple[str, ...]) -> None:
        """By transformers; a GGUF file by llama.cpp as well, its speed only there."""
        timed = "speed" in tasks
        if not (timed and way.gguf):
            self.evaluate(way.label, self.stored(way), tasks)
        if way.gguf and self.llama_cpp:
            self.evaluate(f"{way.label}@llama.cpp", self.stored(way), tasks, "--runtime", "llama.cpp")

    def evaluate(self, label: str, model: Path, tasks: tuple[str, ...], *more: str) -> None:
        step = f"{label} {'+'.join(tasks)}"
        if step in self.state:
            return
        settings = {
            f"tasks.{task}.{key}": value
            for task in ("perplexity", "fidelity")
            for key, value in (
                ("source", self.test), ("seq_len", self.args.seq_len), ("max_tokens", self.args.test_tokens)
            )
            if task in tasks
        }  # fmt: skip
        found = self.quantlab(
            "evaluate", str(model), "--baseline", str(self.args.model),
            *(word for task in tasks for word in ("--task", task)),
            *(f"--set={key}={value}" for key, value in settings.items()), *more,
            "--results", str(self.args.out.absolute()), log="evaluate",
        )  # fmt: skip
        original = f"original {'+'.join(tasks)}"
        if original not in self.state:
            self.keep(original, found["rows"][0])
        self.keep(step, found["rows"][-1])

    def llama_cpp_quantizer(self) -> list[Way]:
        """llama.cpp's own files, with the importance matrix of the same rows."""
        if self.args.source is None or not self.llama_cpp:
            return []
        made = []
        for kind in TYPES:
            way = Way("llama.cpp", f"gguf-{kind.lower()}-imatrix", {"format": "gguf"})
            if not self.wanted(way):
                continue
            if f"{way.label} made" not in self.state:
                folder = self.checkpoint(way)
                folder.mkdir(parents=True, exist_ok=True)
                seconds = quantize_by_peer(
                    self.args.source,
                    folder / "model.gguf",
                    kind,
                    self.work / "imatrix.gguf",
                    self.args.threads,
                )
                self.keep(f"{way.label} made", {"seconds": seconds})
            made.append(way)
        return made

    def peers(self) -> list[Way]:
        """The ways of peers that worked."""
        ways = [
            way for way in peer_ways(self.args.group_size) if way.tool in self.args.peers and self.wanted(way)
        ]
        for way in ways:
            if f"{way.label} made" not in self.state:
                self.keep(f"{way.label} made", self.make_by_peer(way))
        return [way for way in ways if "error" not in self.state[f"{way.label} made"]]

    def make_by_peer(self, way: Way) -> dict[str, Any]:
        out = self.checkpoint(way)
        shutil.rmtree(out, ignore_errors=True)
        files = {kind: self.work / f"{way.label}.{kind}" for kind in ("spec", "result", "log")}
        files["result"].unlink(missing_ok=True)
        spec = {
            "tool": way.tool, "model": str(self.args.model), "rows": str(self.rows()), "out": str(out), "device": "cpu",
            "result": str(files["result"]), **way.content,
        }  # fmt: skip
        files["spec"].write_text(json.dumps(spec, indent=1), encoding="utf-8")
        worker = [str(HERE / "peers" / "worker.py"), str(files["spec"])]
        self.bench.process(self.bench.interpreter(way.tool), worker, files["log"], own=False)
        if not files["result"].is_file():
            return {"error": f"its process ended, see {files['log']}"}
        found: dict[str, Any] = json.loads(files["result"].read_text(encoding="utf-8"))
        return found

    def rows(self) -> Path:
        """The calibration rows as token ids, for the peers."""
        from safetensors.torch import save_file

        from quantlab.calibration import read_texts, token_rows
        from quantlab.models.load import load_tokenizer
        from quantlab.models.safetensors.files import open_files

        path = self.work / "rows.safetensors"
        if not path.is_file():
            tokenizer = load_tokenizer(open_files(self.args.model), False)
            texts = read_texts(str(self.calibration))
            ids = token_rows(texts, tokenizer, rows=self.args.rows, seq_len=self.args.seq_len, seed=0)
            save_file({"ids": ids}, path)
        return path

    def publish(self) -> None:
        out: Path = self.args.out
        out.mkdir(parents=True, exist_ok=True)
        quality = " perplexity+fidelity"
        labels = [step.removesuffix(quality) for step in self.state if step.endswith(quality)]
        rows = [self.row(label) for label in labels if not label.endswith("@llama.cpp")]
        found = {
            "machine": machine.describe(), "threads": self.args.threads, "model": self.args.model.name,
            "rows": self.args.rows, "seq_len": self.args.seq_len, "test_tokens": self.args.test_tokens,
            "group_size": self.args.group_size, "ways": rows,
        }  # fmt: skip
        (out / "table.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (out / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
        (out / "plot.svg").write_text(draw(rows), encoding="utf-8")
        print(table(rows))

    def row(self, label: str) -> dict[str, Any]:
        """What the table says of one way."""
        found, made = self.state[f"{label} perplexity+fidelity"], self.state.get(f"{label} made", {})
        there = self.state.get(f"{label}@llama.cpp perplexity+fidelity", {})
        speed = self.state.get(f"{label}@llama.cpp speed") or self.state.get(f"{label} speed", {})
        tool, _, name = label.partition("-") if label != "original" else ("", "", "original")
        return {
            "tool": tool, "name": name, "bytes": found["size_bytes"], "bits_per_weight": found["bits_per_weight"],
            **{key: found[key] for key in ("ppl", "ppl_ratio", "kl_mean", "kl_low", "kl_high", "top1_agreement")},
            "llama_cpp_ppl": there.get("ppl"), "llama_cpp_kl": there.get("kl_mean"),
            **{key: speed.get(key) for key in ("decode_tok_s", "memory_bytes", "disturbed")},
            "seconds": made.get("seconds", found["work_seconds"]), "peak_bytes": made.get("peak_bytes"),
        }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value * scale, form)

    head = [
        "",
        "by",
        "MB",
        "bits/w",
        "ppl",
        "KL [95 %]",
        "top-1 %",
        "ppl, llama.cpp",
        "tok/s",
        "held MB",
        "s",
    ]
    cells = [
        [
            row["name"], row["tool"], number(row["bytes"], ".1f", 1e-6), number(row["bits_per_weight"], ".2f"),
            number(row["ppl"], ".2f"),
            "" if row["kl_mean"] is None
            else f"{row['kl_mean']:.4f} [{row['kl_low']:.4f}, {row['kl_high']:.4f}]",
            number(row["top1_agreement"], ".1f", 100), number(row["llama_cpp_ppl"], ".2f"),
            number(row["decode_tok_s"], ".0f") + ("*" if row["disturbed"] else ""),
            number(row["memory_bytes"], ".0f", 1e-6), number(row["seconds"], ".0f"),
        ]
        for row in rows
    ]  # fmt: skip
    return machine.table(head, cells)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="the original, a model directory")
    parser.add_argument(
        "--text", type=Path, required=True, help="half of it calibrates, the other half measures"
    )
    parser.add_argument(
        "--source", type=Path, help="the same model as a GGUF file, for llama.cpp's quantizer"
    )
    parser.add_argument("--peers", nargs="*", default=[], choices=["gptqmodel", "llmcompressor"])
    parser.add_argument("--only", nargs="+", help="ways whose label contains one of these")
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="measure no speed")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--test-tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/real-model"))
    parser.add_argument("--venvs", type=Path, default=CACHE / "venvs")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "real-model")
    args = parser.parse_args()
    args.device, args.python = "cpu", Path(sys.executable)
    args.model, args.text = args.model.absolute(), args.text.absolute()
    args.source = args.source and args.source.absolute()
    return args


def main() -> None:
    Study(arguments()).run()


if __name__ == "__main__":
    main()
