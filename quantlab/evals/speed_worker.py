"""The process that measures one model and has never seen another: see ``speed``.

    python -m quantlab.evals.speed_worker

Reads one JSON object a line from stdin and answers with one line on stdout:

    prepare  import what reads the model, and note the memory of an idle process
    load     the model
    settle   passes until the speed no longer changes: peaks of memory above the idle process, of all and of those
             behind the first pass; what the first one took longer counts as first use
    prefill  a tenth of a second of prompts: tokens and seconds, and the processor time that others took
    decode   the same for steps of decoding, going on where the last ones ended
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.errors import MachineError, QuantlabError
from quantlab.registry.formats import FORMATS
from quantlab.workers import die_with_parent

if TYPE_CHECKING:
    import torch

TURN_SECONDS = 0.1  # or one step, where that takes longer
WARM_UP_ROUND = 0.5  # seconds of decoding
SETTLED = 0.05  # the two latest rounds differ by less
WARM_UP_ROUNDS, WARM_UP_SECONDS = 8, 60.0


def main() -> None:
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print
    bench: Bench | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked["do"] == "prepare":
                bench, answer = Bench(asked), {}
            else:
                assert bench is not None
                answer = getattr(bench, f"do_{asked['do']}")()
        except QuantlabError as error:
            answer = {"error": type(error).__name__, "message": str(error), "hint": error.hint}
        except (
            RuntimeError,
            ValueError,
            KeyError,
            OSError,
            IndexError,
            TypeError,
            NotImplementedError,
        ) as error:
            kind = MachineError if type(error).__name__ == "OutOfMemoryError" else QuantlabError
            answer = {"error": kind.__name__, "message": f"{type(error).__name__}: {error}", "hint": ""}
        print(json.dumps(answer), file=answers, flush=True)


class Bench:
    """One model and the work that is timed. ``asked``: ref, dtype, device, trust_remote_code, runtime, options,
    kv_cache."""

    def __init__(self, asked: dict[str, Any]) -> None:
        from quantlab.models.safetensors.files import open_files

        self.asked, self.runtime = asked, asked.get("runtime", "transformers")
        _imports((open_files(asked["ref"]).quantized or {}).get("quant_method"), self.runtime)
        from quantlab.models.load import pick_device

        self.device = pick_device(asked["device"])
        self.memory = PeakMemory(self.device)

    def do_load(self) -> dict[str, Any]:
        """How long loading took, and what the model is then."""
        import torch

        from quantlab.evals.kv_cache import Caches
        from quantlab.models.held_memory import held_bytes
        from quantlab.models.load import load_model, packed_as
        from quantlab.registry.tasks import KvCacheOptions, SpeedOptions

        asked = self.asked
        started = time.perf_counter()
        self.subject = load_model(
            asked["ref"],
            device=self.device,
            dtype=asked["dtype"],
            trust_remote_code=asked["trust_remote_code"],
            runtime=self.runtime,
        )
        seconds = time.perf_counter() - started
        model = self.subject.model
        self.options = SpeedOptions.model_validate(asked["options"])
        kv_cache = KvCacheOptions.model_validate(asked["kv_cache"]) if asked["kv_cache"] else None
        self.caches = Caches(model, kv_cache)
        vocabulary = int(model.config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(0)
        shape = (self.options.batch_size, self.options.prompt_tokens)
        self.prompt = torch.randint(vocabulary, shape, generator=generator).to(self.device)
        self.work = self._work()
        gc.collect()
        packed = {type(module).__name__ for module in model.modules() if packed_as(module)}
        return {
            "load_seconds": seconds,
            "memory_bytes": held_bytes(model) or self.subject.size_bytes,  # another runtime maps the file
            "kernel": ", ".join(sorted(packed)) or self.subject.runtime or "torch",
            "computes_in": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }

    def do_settle(self) -> dict[str, Any]:
        """Rounds of whole passes until two in a row are equally fast, and what the process holds meanwhile."""
        started = time.perf_counter()
        _, seconds = self._passes(0.0)
        first = time.perf_counter() - started
        peaks = [self.memory.above_idle()]
        self.memory.start_anew()  # kernels that rearrange weights at their first use held more than they will again
        per_pass = [seconds]
        while len(per_pass) < WARM_UP_ROUNDS and time.perf_counter() - started < WARM_UP_SECONDS:
            passes, seconds = self._passes(WARM_UP_ROUND)
            per_pass.append(seconds / passes)
            if len(per_pass) > 2 and abs(per_pass[-1] / per_pass[-2] - 1) < SETTLED:
                break
        peaks.append(self.memory.above_idle())
        return {
            "first_use_seconds": max(0.0, first - per_pass[-1]),
            "warm_up_rounds": len(per_pass),
            "peak_bytes": max((peak for peak in peaks if peak is not None), default=None),
            "running_peak_bytes": peaks[-1],
            "memory": self.memory.what,
            **self.caches.details(),
        }

    def do_prefill(self) -> dict[str, Any]:
        def prompts() -> Iterator[float]:
            while True:
                with self.caches.fresh() as cache:
                    yield next(timed_steps(self.subject.model, self.prompt, 0, cache))

        return _turn(prompts(), self.prompt.numel())

    def do_decode(self) -> dict[str, Any]:
        """The first step is not counted, unless there is no other: the processor's caches still hold the model that
        ran before."""
        steps = (took for kind, took in self.work if kind == "decode")
        return _turn(steps, len(self.prompt), cold=1)

    def _passes(self, seconds: float) -> tuple[int, float]:
        """Whole passes until ``seconds`` of decoding are full, at least one: their number, and how long they took."""
        decode = both = 0.0
        for number, (kind, took) in enumerate(self.work, 1):
            decode += took if kind == "decode" else 0.0
            both += took
            passes, rest = divmod(number, 1 + self.options.new_tokens)
            if not rest and decode >= seconds:
                return passes, both
        raise AssertionError("passes follow each other without end")

    def _work(self) -> Iterator[tuple[str, float]]:
        """Pass after pass without end: what was done ("prefill" or one step of "decode"), and its seconds."""
        while True:
            with self.caches.fresh() as cache:
                steps = timed_steps(self.subject.model, self.prompt, self.options.new_tokens, cache)
                yield "prefill", next(steps)
                for _ in range(self.options.new_tokens - 1):
                    yield "decode", next(steps)
                took = next(steps)
            yield "decode", took  # behind the cache's end: a pass that is over has noted how large it was


def _turn(work: Iterator[float], tokens: int, cold: int = 0) -> dict[str, Any]:
    """Pieces of work, each of so many tokens and given with the seconds that it took, until the turn is over. The first
    ``cold`` ones count only where the turn has no others."""
    from quantlab.models.disturbance import mark, taken_between

    before = mark()
    took: list[float] = []
    while time.perf_counter() - before.clock < TURN_SECONDS:
        took.append(next(work))
    after = mark()
    counted = took[cold:] or took
    return {
        "tokens": tokens * len(counted),
        "seconds": sum(counted),
        "passed": after.clock - before.clock,
        "taken": taken_between(before, after),
    }


def timed_steps(model: Any, prompt: torch.Tensor, new_tokens: int, cache: Any = None) -> Iterator[float]:
    """Seconds for the prompt, token ids [batch, tokens], then for each of ``new_tokens`` steps of greedy decoding.
    ``cache``: an empty one to use instead of the model's own."""
    import torch

    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    tokens = prompt
    for _ in range(1 + new_tokens):
        with torch.inference_mode():
            started = _clock(prompt)
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True, **last)
            tokens, cache = output.logits[:, -1:].argmax(dim=-1), output.past_key_values
            seconds = _clock(prompt) - started
        yield seconds


def _clock(tensor: Any) -> float:
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


class PeakMemory:
    """The most memory held since a moment, above what was held at construction."""

    def __init__(self, device: str) -> None:
        import torch

        from quantlab.models.memory import resident, trim

        self.device = torch.device(device)
        self.what = "CUDA allocator, peak"
        if self.device.type != "cuda":
            self.what = "resident set of a process of its own, peak above idle"
            gc.collect()
            trim()
            self.idle = resident()
        self.start_anew()

    def start_anew(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # Linux: sets VmHWM back to the present size

    def above_idle(self) -> int | None:
        """Bytes; None where the system does not say."""
        from quantlab.models.memory import peak_resident

        if self.device.type == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated(self.device))
        peak = peak_resident()
        return max(0, peak - self.idle) if peak else None


def _imports(kind: str | None, runtime: str) -> None:
    """What an idle process has too, so that it does not count as the model's memory or loading time."""
    import importlib

    from quantlab.models.load import quiet_libraries

    quiet_libraries()
    importlib.import_module("transformers.modeling_utils")
    importlib.import_module("transformers.models.auto.modeling_auto")
    if runtime != "transformers":
        importlib.import_module("quantlab.models.llama_cpp")
        importlib.import_module("llama_cpp")
    for library in FORMATS[kind].requires if kind in FORMATS else ():
        with suppress(ImportError):  # loading says what is missing
            importlib.import_module(library)


if __name__ == "__main__":
    main()
