"""Tokens a second and peak memory, after a warm-up, as medians.

Prefill is one forward pass over a prompt of random tokens; decode is greedy, one token at a time with the
cache, the prompt not counted. Peak memory is what the CUDA allocator held at most, or on a CPU the largest
resident set of this process during the measurement (which includes the interpreter and whatever else it has
loaded).
"""

from __future__ import annotations

import inspect
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from quantlab.errors import RecipeError
from quantlab.evals.kv_cache import Caches
from quantlab.evals.windows import context_length
from quantlab.models.load import Subject
from quantlab.progress import Progress
from quantlab.recipe import SpeedOptions
from quantlab.results import TaskResult


def evaluate(
    subject: Subject, options: SpeedOptions, *, baseline: Subject | None = None, progress: Progress
) -> TaskResult:
    """Metrics prefill_tok_s, decode_tok_s, peak_memory_bytes."""
    longest, wanted = context_length(subject.model), options.prompt_tokens + options.new_tokens
    if longest is not None and wanted > longest:
        raise RecipeError(
            f"prompt_tokens + new_tokens = {wanted}, but {subject.name} has {longest} positions",
            hint="lower tasks.speed.prompt_tokens or tasks.speed.new_tokens",
        )
    vocabulary = int(subject.model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (options.batch_size, options.prompt_tokens), generator=generator)
    memory = PeakMemory(subject.device)
    caches = Caches(subject.model, options.kv_cache)
    prefills, decodes = [], []
    with progress.task("speed", total=options.repeats + 1) as advance, torch.inference_mode():
        for repeat in range(options.repeats + 1):
            with caches.fresh() as cache:
                prefill, decode = time_once(
                    subject.model, prompt.to(subject.device), options.new_tokens, cache
                )
            if repeat > 0:  # the first is the warm-up
                prefills.append(options.batch_size * options.prompt_tokens / prefill)
                decodes.append(options.batch_size * options.new_tokens / decode)
            advance(1)
    return TaskResult(
        "speed",
        {
            "prefill_tok_s": statistics.median(prefills),
            "decode_tok_s": statistics.median(decodes),
            "peak_memory_bytes": memory.read(),
        },
        details={
            "prefill_runs": prefills,
            "decode_runs": decodes,
            "memory": memory.what,
            "threads": torch.get_num_threads(),
            **options.model_dump(),
            **caches.details(),
        },
    )


def time_once(model: Any, prompt: torch.Tensor, new_tokens: int, cache: Any = None) -> tuple[float, float]:
    """Seconds for the prompt [batch, tokens], and for `new_tokens` steps behind it. `cache`: an empty one to use
    instead of the model's own."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    started = _clock(prompt)
    output = model(input_ids=prompt, past_key_values=cache, use_cache=True, **last)
    token = output.logits[:, -1:].argmax(dim=-1)
    prefilled = _clock(prompt)
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, **last)
        token = output.logits[:, -1:].argmax(dim=-1)
    return prefilled - started, _clock(prompt) - prefilled


def _clock(tensor: torch.Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


class PeakMemory:
    """Peak memory since construction where the system lets the mark be reset, else since the process began."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.what = "resident set of the process, peak since it began"
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.what = "CUDA allocator, peak"
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # Linux: sets VmHWM back to the present size
                self.what = "resident set of the process, peak of the measurement"

    def read(self) -> int | None:
        """Bytes; None where the system does not say."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return _peak_of_process()


def _peak_of_process() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # macOS counts bytes, Linux KiB
