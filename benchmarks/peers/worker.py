"""One tool quantizing one model, timed and weighed: runs in the tool's own interpreter, on nothing but that and the
standard library.

    python worker.py SPEC.json

The specification says which tool, model, rows, settings and output directories; the measurement goes to its `result`
file. Time runs from "model files on disk and rows" to "checkpoint saved". Importing libraries is measured apart (the
modules that every tool needs later, such as transformers' Llama, are imported before the clock starts). Memory is the
process's peak resident set (`ru_maxrss`), and what it held when the imports were done.

A specification may hold several `jobs`: they run one after the other in this process, for measurements of quality,
where importing a library dozens of times would take longer than the work. Their memory says nothing.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import pkgutil
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Spec = dict[str, Any]


class Clock:
    """Laps of one job, in seconds, and the memory at its start."""

    def __init__(self, device: str) -> None:
        self.device, self.laps, self.idle = device, {}, 0  # type: tuple[str, dict[str, float], int]
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now

    def imported(self) -> None:
        """Everything is imported: work starts."""
        gc.collect()
        self.lap("import")
        self.idle = resident_bytes()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats()
        self._last = time.perf_counter()


def resident_bytes() -> int:
    """What the process holds now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(whose: int = resource.RUSAGE_SELF) -> int:
    found = resource.getrusage(whose).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def import_common() -> None:
    """What every tool imports sooner or later."""
    import safetensors.torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401


def read_rows(spec: Spec) -> Any:
    """Token ids int64 [rows, seq_len]."""
    from safetensors.torch import load_file

    return load_file(spec["rows"])["ids"]


def quantlab(spec: Spec, clock: Clock) -> None:
    """Several recipes in one call, as `quantlab quantize A.yaml B.yaml` makes it. quantlab takes calibration text,
    whose tokens are the rows (checked against the record of what it used)."""
    import_common()
    for package in ("quantlab.quant", "quantlab.formats", "quantlab.models"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
            if module.name.rpartition(".")[2] not in ("train_embedded", "bnb"):
                with contextlib.suppress(ImportError):  # of what is not for this machine
                    importlib.import_module(module.name)
    from quantlab.calibration import digest
    from quantlab.models.load import quiet_libraries
    from quantlab.progress import Silent
    from quantlab.quant.pipeline import Job, quantize
    from quantlab.recipe.quantize import QuantizeRecipe

    quiet_libraries()
    rows = read_rows(spec)
    calibration = {"source": spec["text"], "rows": rows.shape[0], "seq_len": rows.shape[1]}
    jobs = []
    for name, recipe in spec["recipes"].items():
        needs = recipe["method"] in ("gptq", "awq")
        content = recipe | ({"calibration": calibration | {"seed": spec.get("seed", 0)}} if needs else {})
        jobs.append(Job(name, QuantizeRecipe.model_validate(content), Path(spec["out"], name)))
    clock.imported()
    quantize(jobs, spec["model"], device=spec["device"], progress=Silent())
    clock.lap("quantize")
    for job in jobs:
        record = json.loads((job.out / "quantlab.json").read_text(encoding="utf-8"))
        used = record["calibration"].get("digest")
        if used not in (None, digest(rows)):
            raise RuntimeError(f"{job.name} was calibrated with other rows than the peers")


def llmcompressor(spec: Spec, clock: Clock) -> None:
    """llmcompressor's GPTQ, or its AWQ followed by rounding (``spec["method"]``)."""
    import_common()
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
    from llmcompressor.modifiers.quantization import QuantizationModifier  # type: ignore[import-not-found]
    from llmcompressor.modifiers.transform.awq import AWQModifier  # type: ignore[import-not-found]
    from loguru import logger
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.remove()
    rows = read_rows(spec)
    clock.imported()
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    clock.lap("load")
    data = Dataset.from_dict(
        {"input_ids": rows.tolist(), "attention_mask": rows.new_ones(rows.shape).tolist()}
    )
    weights = {
        "num_bits": spec["bits"], "type": "int", "symmetric": spec["symmetric"], "strategy": "group",
        "group_size": spec["group_size"],
    }  # fmt: skip
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if spec.get("method") == "awq":
        recipe = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    else:
        ordered = {"none": None, "static": "static", "group": "group"}[spec["act_order"]]
        recipe = GPTQModifier(
            config_groups=groups, ignore=["lm_head"], dampening_frac=spec["damp"], actorder=ordered
        )
    oneshot(
        model=model, tokenizer=tokenizer, dataset=data, recipe=recipe, max_seq_length=rows.shape[1],
        num_calibration_samples=rows.shape[0], shuffle_calibration_samples=False,
    )  # fmt: skip
    clock.lap("quantize")
    model.save_pretrained(spec["out"], save_compressed=True)
    tokenizer.save_pretrained(spec["out"])
    clock.lap("save")


def gptqmodel(spec: Spec, clock: Clock) -> None:
    """gptqmodel's own GPTQ or AWQ (``spec["method"]``)."""
    import_common()
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD

    rows = read_rows(spec)
    common = {"bits": spec["bits"], "group_size": spec["group_size"], "sym": spec["symmetric"]}
    if spec["method"] == "awq":
        settings = QuantizeConfig(**common, quant_method=METHOD.AWQ, format=FORMAT.GEMM)
    else:
        order = spec["act_order"]
        settings = QuantizeConfig(
            **common, damp_percent=spec["damp"], desc_act=order in ("true", "static"),
            act_group_aware=order == "group", static_groups=order == "static",
        )  # fmt: skip
    clock.imported()
    model = GPTQModel.load(spec["model"], settings, device=spec["device"])
    clock.lap("load")
    examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    # The AWQ kernel that it picks by itself, only to pack with, wants a GPU.
    torch_kernel = spec["method"] == "awq" and spec["device"] == "cpu"
    model.quantize(examples, batch_size=1, backend=BACKEND.AWQ_TORCH if torch_kernel else BACKEND.AUTO)
    clock.lap("quantize")
    model.save(spec["out"])
    clock.lap("save")


def autoawq(spec: Spec, clock: Clock) -> None:
    """autoawq's AWQ. Its layout holds 4 bits; at other widths its own search and its own rounding are stored as plain
    float16 weights (`export_compatible`), which is enough to measure quality."""
    import_common()
    import torch
    from awq import AutoAWQForCausalLM  # type: ignore[import-not-found]
    from transformers import PreTrainedTokenizerFast

    rows = read_rows(spec)
    clock.imported()
    wish = {"torch_dtype": torch.float32} if spec.get("dtype") == "float32" else {}
    model = AutoAWQForCausalLM.from_pretrained(spec["model"], **wish)
    # By name: the class that transformers 5 writes into a tokenizer's configuration is unknown to the older one.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(spec["model"])
    clock.lap("load")
    settings = {
        "zero_point": True,
        "q_group_size": spec["group_size"],
        "w_bit": spec["bits"],
        "version": "GEMM",
    }
    model.quantize(
        tokenizer, quant_config=settings, calib_data=rows.tolist(), max_calib_samples=rows.shape[0],
        max_calib_seq_len=rows.shape[1], apply_clip=spec.get("clip", True), export_compatible=spec["bits"] != 4,
    )  # fmt: skip
    clock.lap("quantize")
    if spec["bits"] == 4:
        model.save_quantized(spec["out"])
    else:
        for layer in model.model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.data = model.quantizer.pseudo_quantize_tensor(module.weight.data.half())[0]
        model.model.half().save_pretrained(spec["out"])
    tokenizer.save_pretrained(spec["out"])
    clock.lap("save")


TOOLS: dict[str, Callable[[Spec, Clock], None]] = {
    "quantlab": quantlab,
    "llmcompressor": llmcompressor,
    "gptqmodel": gptqmodel,
    "autoawq": autoawq,
}
LIBRARIES = (
    "torch",
    "transformers",
    "quantlab",
    "llmcompressor",
    "compressed-tensors",
    "gptqmodel",
    "autoawq",
)


def measure(spec: Spec) -> dict[str, Any]:
    """Run one job; what it took, or the error that ended it."""
    clock = Clock(spec["device"])
    try:
        TOOLS[spec["tool"]](spec, clock)
    except Exception as error:  # a peer may raise anything; the benchmark goes on without it
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    import torch

    cuda = spec["device"].startswith("cuda")
    work = {name: seconds for name, seconds in clock.laps.items() if name != "import"}
    return {
        "seconds": sum(work.values()),
        "laps": work,
        "import_seconds": clock.laps["import"],
        "idle_bytes": clock.idle,
        "peak_bytes": peak_bytes(),
        "peak_bytes_of_children": peak_bytes(resource.RUSAGE_CHILDREN),
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "threads": torch.get_num_threads(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    if name == "quantlab" and name in sys.modules:
        return str(sys.modules[name].__version__)  # may be a checkout that is not installed
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    jobs = spec.get("jobs", [spec])
    found = []
    for job in jobs:
        found.append(measure(job))
        Path(job["result"]).write_text(json.dumps(found[-1], indent=1) + "\n", encoding="utf-8")
        gc.collect()
    sys.exit(0 if all("error" not in one for one in found) else 1)


if __name__ == "__main__":
    main()
