"""How far a model has moved from the one it was made from, token by token.

On the same windows of text both models give a distribution over the next token. Reported are the Kullback-Leibler
divergence KL(original || model) in nats, its mean, median and tail over positions, and how often the most likely token
is the same. With `tasks.kv_cache` the changed model runs on a quantized cache, the original never does. Unlike accuracy
it needs no questions, and it sees every token.

**Intervals** (95 %) are over windows: every window has as many positions, so the mean over positions is the mean of the
windows' means, and Student's t interval of those needs no seed and holds for few windows. The perplexity ratio is
paired by window: the t interval of the differences of the windows' losses, exponentiated. Neighbouring windows of one
document are alike, so the intervals are about this text, not about all text.

**Noise.** An original that is run in another batch shape, or in another type of 16 bits, differs from itself too. That
divergence stands beside the result (`kl_noise`): below it, a divergence says nothing of the model.

The original's distributions come from a store on disk (`reference.py`, made by `kept_original.py`), or, with
`reference: memory`, from the original itself, held in memory beside the model. Logits are thrown away at once: nothing
grows with the length of the text but one float a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from quantlab.errors import DataError, RecipeError
from quantlab.evals.kv_cache import Caches
from quantlab.evals.reference import (
    STEP,
    TAIL,
    Store,
    divergence,
    divergence_from,
    positions_at_once,
    window_digest,
)
from quantlab.evals.text_pass import Compared, Original, nll_of, run
from quantlab.evals.windows import Windows, batch_rows, load_windows, refuse_nan
from quantlab.models.load import LoadedModel
from quantlab.progress import Progress
from quantlab.registry.tasks import FidelityOptions
from quantlab.runs.run import TaskResult
from quantlab.stats import mean_interval, ratio_interval

TAILS = {"kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999}
BEYOND = 10  # positions beyond a percentile, for it to be given; the 99th is always


def evaluate(
    subject: LoadedModel,
    options: FidelityOptions,
    *,
    baseline: LoadedModel | OnDisk | None = None,
    progress: Progress,
) -> TaskResult:
    """Metrics of `result`. `baseline`: the original, loaded or kept.

    Raises:
        RecipeError: no original. DataError: the two do not share a tokenizer. NotANumber: NaN logits.
    """
    windows = load_windows(subject, options.source, options.seq_len, options.max_tokens)
    original = original_of(subject, baseline, windows)
    caches = Caches(subject.model, options.kv_cache)
    with progress.task("fidelity", total=len(windows.ids)) as advance:
        losses, found = run(subject, windows.ids, caches, advance, original, len(windows.ids))
    assert found is not None
    return result(subject, options, windows, original, found, losses, caches.details(), progress)


def original_of(subject: LoadedModel, baseline: LoadedModel | OnDisk | None, windows: Windows) -> Original:
    """The original as something to compare with on these windows. Raises as `evaluate`."""
    if baseline is None:
        raise RecipeError("fidelity needs the original to compare with", hint="name it with --baseline")
    if isinstance(baseline, OnDisk):
        baseline.check(windows.ids)
        return baseline
    check_same_tokens(subject, baseline, windows.ids[0])
    return InMemory(baseline, windows.ids)


class InMemory:
    """The original itself, loaded."""

    def __init__(self, loaded: LoadedModel, ids: torch.Tensor) -> None:
        self.name = loaded.name
        self.form: dict[str, Any] = {"reference": "memory"}
        self.loaded = loaded
        self.noise: dict[str, Any] = {"batch": batch_noise(loaded, ids)}

    def compare(self, first: int, ids: torch.Tensor, logits: torch.Tensor) -> Compared:
        mine = self.loaded.model(input_ids=ids.to(self.loaded.device), use_cache=False).logits
        kl, same = compare_all(mine, logits)
        return Compared(kl, same, nll_of(mine, ids))


class OnDisk:
    """The original as a store; needs no model."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.noise: dict[str, Any] = dict(store.about.get("noise") or {})
        self.form: dict[str, Any] = {
            "reference": "disk",
            "store": store.path.name,
            "bytes": store.nbytes,
            "step": STEP,
            "tail": TAIL,
        }

    def compare(self, first: int, ids: torch.Tensor, logits: torch.Tensor) -> Compared:
        kls, sames, nlls = [], [], []
        for at, own in enumerate(logits[:, :-1]):  # [seq_len - 1, vocabulary]
            found = []
            for start, kept in self.store.window(first + at, positions_at_once(own.shape[-1])):
                found.append(divergence_from(kept, own[start : start + len(kept.top)]))
            kls.append(torch.cat([kl for kl, _ in found]))
            sames.append(torch.cat([same for _, same in found]))
            nlls.append(self.store.nll[first + at])
        return Compared(torch.stack(kls), torch.stack(sames), torch.tensor(nlls, dtype=torch.float64))

    def check(self, ids: torch.Tensor) -> None:
        """DataError unless it was made from exactly these windows [windows, seq_len]."""
        if self.store.about.get("windows") != window_digest(ids):
            raise DataError(f"{self.store.path} was made from other windows", hint="delete it")


def result(
    subject: LoadedModel,
    options: FidelityOptions,
    windows: Windows,
    original: Original,
    compared: Compared,
    nll: Sequence[float],
    details: dict[str, Any],
    progress: Progress,
) -> TaskResult:
    """Metrics kl_mean with kl_low, kl_high and kl_stderr, kl_median, kl_p90, kl_p99, kl_p999, kl_max, kl_noise,
    top1_agreement with its interval, ppl_ratio (of these windows) with its interval, kl_text, tokens.

    `nll`: the model's losses, sums over each of the windows.
    """
    kl = compared.kl.flatten()
    refuse_nan("fidelity", subject, kl)
    means = compared.kl.double().mean(dim=1)  # [windows]
    agreed = compared.same.double().mean(dim=1)
    scored = options.seq_len - 1
    before = [value / scored for value in compared.nll.tolist()]
    after = [value / scored for value in nll]
    change = (math.fsum(after) - math.fsum(before)) / len(before)
    noise = [found["kl_mean"] for found in original.noise.values() if found.get("kl_mean") is not None]
    metrics: dict[str, float | int | str | None] = {
        "kl_mean": float(kl.double().mean()),
        **_interval("kl", mean_interval(means.tolist()), 0.0, math.inf),
        "kl_stderr": float(means.std() / math.sqrt(len(means))) if len(means) > 1 else None,
        "kl_median": percentile(kl, 0.5),
        **{name: tail_percentile(kl, share) for name, share in TAILS.items()},
        "kl_max": float(kl.max()),
        "kl_noise": max(noise) if noise else None,
        "top1_agreement": float(compared.same.double().mean()),
        **_interval("top1", mean_interval(agreed.tolist()), 0.0, 1.0),
        "ppl_ratio": math.exp(change) if change < 700 else math.inf,
        **_interval("ppl_ratio", ratio_interval(before, after), 0.0, math.inf),
        "kl_text": windows.name,
        "tokens": len(kl),
    }
    if said := noise_note(metrics):
        progress.note(f"{subject.name}: {said}")
    return TaskResult(
        "fidelity",
        metrics,
        details={
            "baseline": original.name,
            "source": options.source,
            "seq_len": options.seq_len,
            "windows": len(means),
            "intervals": "95 %, Student's t over windows",
            "noise": original.noise,
            **original.form,
            **details,
        },
    )


def noise_note(metrics: dict[str, Any]) -> str:
    """A sentence where a divergence is not above the original's own noise, else nothing."""
    kl, noise = metrics.get("kl_mean"), metrics.get("kl_noise")
    if kl is None or noise is None or kl > noise:
        return ""
    return (
        f"KL {kl:.3g} nats is noise: the original differs from itself by {noise:.3g} in another batch or type"
    )


def compare_all(original: torch.Tensor, changed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and agreement at every scored position of two models' logits [windows, seq_len, vocabulary]; float32 and bool
    [windows, seq_len - 1], on the CPU."""
    if original.shape[-1] != changed.shape[-1]:
        raise DataError(
            f"the models have {original.shape[-1]} and {changed.shape[-1]} tokens in their vocabularies: "
            "nothing to compare"
        )
    step = positions_at_once(original.shape[-1])
    parts = []
    for left, right in zip(original[:, :-1], changed[:, :-1], strict=True):
        pairs = zip(left.split(step), right.split(step), strict=True)
        found = [compare_logits(one, other.to(one.device)) for one, other in pairs]
        parts.append((torch.cat([kl for kl, _ in found]).cpu(), torch.cat([same for _, same in found]).cpu()))
    return torch.stack([kl for kl, _ in parts]), torch.stack([same for _, same in parts])


def compare_logits(original: torch.Tensor, changed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(softmax(original) || softmax(changed)) in nats, and whether the argmax agrees; [..., vocabulary] → [...]."""
    log_p = torch.log_softmax(original.float(), dim=-1)
    log_q = torch.log_softmax(changed.float(), dim=-1)
    return divergence(log_p, log_q), original.argmax(dim=-1) == changed.argmax(dim=-1)


@torch.inference_mode()
def batch_noise(loaded: LoadedModel, ids: torch.Tensor, windows: int = 4) -> dict[str, Any]:
    """The original against itself in another batch shape: the first windows of `ids` [windows, seq_len] together, and
    each one alone and half as long."""
    rows = min(windows, batch_rows(loaded.model, ids.shape[1]), len(ids))
    short = ids.shape[1] // 2
    found = []
    for batch in ids[:windows].to(loaded.device).split(rows):
        whole = loaded.model(input_ids=batch, use_cache=False).logits[:, :short]
        for one, row in zip(whole, batch, strict=True):
            half = loaded.model(input_ids=row[None, :short], use_cache=False).logits
            found.append(compare_all(one[None], half))
    return summarize_noise([kl for kl, _ in found], [same for _, same in found])


def summarize_noise(kl: Sequence[torch.Tensor], same: Sequence[torch.Tensor]) -> dict[str, Any]:
    """kl_mean, kl_p99 and top1_agreement over all positions."""
    values, agreed = torch.cat([one.flatten() for one in kl]), torch.cat([one.flatten() for one in same])
    if not bool(torch.isfinite(values).all()):
        return {"kl_mean": None, "why": "the logits are not finite"}
    return {
        "kl_mean": float(values.double().mean()),
        "kl_p99": percentile(values, 0.99),
        "top1_agreement": float(agreed.double().mean()),
    }


def percentile(values: torch.Tensor, share: float) -> float:
    """Nearest-rank percentile: the smallest value with at least `share` of all values at or below it."""
    rank = max(1, math.ceil(share * len(values)))
    return float(values.kthvalue(rank).values)


def tail_percentile(values: torch.Tensor, share: float) -> float | None:
    """The same, None where fewer than `BEYOND` values lie beyond it (but for the 99th, which was always given)."""
    few = round(len(values) * (1 - share), 6) < BEYOND
    return None if few and share != 0.99 else percentile(values, share)


def _interval(
    name: str, found: tuple[float, float] | None, low: float, high: float
) -> dict[str, float | None]:
    """`<name>_low` and `<name>_high`, kept within what the value can be."""
    ends = (None, None) if found is None else (max(low, found[0]), min(high, found[1]))
    return {f"{name}_low": ends[0], f"{name}_high": ends[1]}


def check_same_tokens(subject: Any, baseline: Any, ids: torch.Tensor) -> None:
    """DataError unless both tokenizers read the same text off the same tokens."""
    tokens = ids.tolist()
    if subject.tokenizer.convert_ids_to_tokens(tokens) != baseline.tokenizer.convert_ids_to_tokens(tokens):
        raise DataError(f"{subject.name} and {baseline.name} do not share a tokenizer")
