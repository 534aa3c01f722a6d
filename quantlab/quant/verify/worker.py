"""The fresh process of ``reload``: told on stdin which checkpoints to load, writes their logits beside a description.

    python -m quantlab.quant.verify.worker [LIBRARY...] < questions.json

The libraries are imported before stdin is read, so that a process started early is ready when it is asked.

For each question ``<answer>.json`` (how it was loaded, seconds, peak memory, or the error) and
``<answer>.safetensors`` (the logits). Checkpoints are loaded one after the other; nothing of one is left when the
next is loaded. Dies with its parent.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from quantlab.errors import MachineError, QuantlabError
from quantlab.workers import die_with_parent


def main(libraries: Sequence[str]) -> None:
    die_with_parent()
    os.dup2(2, 1)  # libraries that print
    import torch

    from quantlab.models.memory import peak_resident, resident, trim

    imports(libraries)
    asked = json.load(sys.stdin)
    torch.set_num_threads(int(asked["threads"]))
    rows = torch.tensor(asked["rows"], dtype=torch.int64)
    for question in asked["questions"]:
        trim()
        before, started = resident(), time.perf_counter()
        answer = {"how": question["how"], "why": question["why"]}
        path = Path(question["answer"])
        try:
            logits, answer["dtype"] = _logits(question, rows, asked)
            from safetensors.torch import save_file

            save_file({"logits": logits}, path.with_suffix(".safetensors"))
            del logits
        except MachineError as error:
            answer |= {"error": str(error), "missing": True}
        except (QuantlabError, RuntimeError, ValueError, KeyError, OSError, NotImplementedError) as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        answer |= {"seconds": time.perf_counter() - started, "peak_bytes": max(peak_resident() - before, 0)}
        gc.collect()
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(answer), encoding="utf-8")
        os.replace(beside, path.with_suffix(".json"))


def imports(libraries: Sequence[str]) -> None:
    """What an idle process has too, so that it does not count as memory of a checkpoint. A library that is not there is
    missed when a checkpoint needs it."""
    import transformers.modeling_utils  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    from quantlab.models.load import quiet_libraries

    quiet_libraries()
    for name in libraries:
        with suppress(Exception):
            import_module(name)


def _logits(question: Mapping[str, Any], rows: Any, asked: Mapping[str, Any]) -> tuple[Any, str]:
    """Logits float32 [rows, tokens, vocabulary] on the CPU, and the dtype of what is between the products."""
    import torch

    checkpoint, trust = Path(question["checkpoint"]), bool(asked["trust_remote_code"])
    if question["how"] == "streamed":
        from quantlab.quant.verify.reference_logits import streamed_logits

        return streamed_logits(checkpoint, rows, trust), "float32"
    from quantlab.models.load import load_model

    device = str(asked["device"])
    wish = "float32" if device == "cpu" else "auto"
    model = load_model(checkpoint, device=device, dtype=wish, trust_remote_code=trust).model
    with torch.no_grad():
        found = model(input_ids=rows.to(model.device), use_cache=False).logits
    return found.to("cpu", torch.float32), str(model.dtype).removeprefix("torch.")


if __name__ == "__main__":
    main(sys.argv[1:])
