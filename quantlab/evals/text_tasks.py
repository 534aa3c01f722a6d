"""Perplexity and fidelity at once, by one forward pass where both are on the same text.

The windows of a text are cut from its beginning, so those of the measurement that takes fewer are the first of the
other's: the pass goes over the longer one and compares as far as the shorter one goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantlab.errors import NotANumber
from quantlab.evals import kl_divergence, perplexity
from quantlab.evals.kv_cache import Caches
from quantlab.evals.text_pass import run
from quantlab.evals.windows import load_windows
from quantlab.models.load import LoadedModel
from quantlab.progress import Progress
from quantlab.registry.tasks import FidelityOptions, PerplexityOptions
from quantlab.runs.run import TaskResult


def measure(
    subject: LoadedModel,
    options: Mapping[str, Any],
    *,
    baseline: LoadedModel | kl_divergence.OnDisk | None = None,
    progress: Progress,
) -> dict[str, TaskResult | NotANumber]:
    """`perplexity` and `fidelity`, whose options share a text; what came out as NaN is the error that says so."""
    text, fidelity = options["perplexity"], options["fidelity"]
    assert isinstance(text, PerplexityOptions) and isinstance(fidelity, FidelityOptions)
    windows, compared = (
        load_windows(subject, one.source, one.seq_len, one.max_tokens) for one in (text, fidelity)
    )
    original = kl_divergence.original_of(subject, baseline, compared)
    caches = Caches(subject.model, text.kv_cache)
    longest = max(windows.ids, compared.ids, key=len)
    with progress.task("perplexity, fidelity", total=len(longest)) as advance:
        losses, found = run(subject, longest, caches, advance, original, len(compared.ids))
    assert found is not None
    details = caches.details()

    def distance() -> TaskResult:
        own = losses[: len(compared.ids)]
        return kl_divergence.result(subject, fidelity, compared, original, found, own, details, progress)

    return {
        "perplexity": _number(
            lambda: perplexity.result(subject, text, windows, losses[: len(windows.ids)], details)
        ),
        "fidelity": _number(distance),
    }


def _number(made: Callable[[], TaskResult]) -> TaskResult | NotANumber:
    try:
        return made()
    except NotANumber as error:
        return error
