"""Keeping the original's distributions on disk before the model is loaded: one model in memory at a time.

`keep` finds the store of these windows, or loads the original, writes the store, and lets the original go. At that time
the original is also run against itself, which costs a few windows: in another batch shape, and loaded anew in another
type of 16 bits. (bfloat16 for what computes in float32 or float16, float16 for what computes in bfloat16: float32 would
be the exact one there, and would take twice the memory; float16 has eight times bfloat16's precision, so that what is
seen is bfloat16's rounding.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantlab.errors import NotANumber, QuantlabError
from quantlab.evals.kl_divergence import OnDisk, batch_noise, check_same_tokens, summarize_noise
from quantlab.evals.reference import (
    CannotKeep,
    Store,
    Writer,
    compress,
    folder,
    positions_at_once,
    store_key,
    window_digest,
)
from quantlab.evals.text_pass import nll_of
from quantlab.evals.windows import batch_rows, windows_for
from quantlab.models.load import LoadedModel, load_tokenizer, pick_device, wanted_dtype
from quantlab.models.safetensors.files import open_files
from quantlab.progress import Progress
from quantlab.registry.tasks import FidelityOptions

NOISE_WINDOWS = 4


@dataclass(frozen=True)
class Unloaded:
    """A model that is not in memory. ``load`` opens it in a type (auto, float32, …), ``release`` lets go of it."""

    ref: str | Path
    dtype: str
    device: str
    load: Callable[[str], LoadedModel]
    release: Callable[[], None] = lambda: None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class _Named:
    name: str
    tokenizer: Any


def keep(
    subject: Unloaded, original: Unloaded, options: FidelityOptions, progress: Progress
) -> OnDisk | None:
    """The original's distributions on the windows that `subject` will be measured on; None where they are not to be
    kept (`reference: memory`), or cannot be, which is said.

    Raises:
        DataError: the two do not share a tokenizer. NotANumber: the original's logits are NaN.
    """
    if options.reference == "memory":
        return None
    files, own = open_files(original.ref), open_files(subject.ref)
    tokenizer = load_tokenizer(own, subject.trust_remote_code)
    windows = windows_for(
        tokenizer, own.positions, own.name, options.source, options.seq_len, options.max_tokens
    )
    other = load_tokenizer(files, original.trust_remote_code)
    check_same_tokens(_Named(own.name, tokenizer), _Named(files.name, other), windows.ids[0])
    place = pick_device(original.device)
    dtype = str(wanted_dtype(files, original.dtype, place))
    path = folder() / store_key(files.digest, windows.ids, dtype, place)
    try:
        store = Store(path)
    except QuantlabError:  # none yet, or damaged
        try:
            store = _gather(path, files.name, original, windows.ids, progress)
        except CannotKeep as error:
            progress.note(
                f"{files.name}: its log-probabilities cannot be kept in {path.parent} ({error}); it stays in memory"
            )
            return None
    store.touch()
    return OnDisk(store, files.name)


def _gather(path: Path, name: str, original: Unloaded, ids: torch.Tensor, progress: Progress) -> Store:
    with Writer(path) as writer:
        loaded = original.load(original.dtype)
        with progress.task(f"{name}: log-probabilities", total=len(ids)) as advance:
            _write(writer, loaded, ids, advance)
        noise = {"batch": batch_noise(loaded, ids, NOISE_WINDOWS)}
        computed = _computed_in(loaded)
        del loaded
        original.release()
        noise["dtype"] = _dtype_noise(writer.draft(), original, ids, computed)
        original.release()
        return writer.finish({"windows": window_digest(ids), "model": name, "noise": noise})


def _computed_in(loaded: LoadedModel) -> torch.dtype:
    """The type of its first weights that are numbers and not codes."""
    return next((p.dtype for p in loaded.model.parameters() if p.is_floating_point()), torch.float32)


@torch.inference_mode()
def _write(writer: Writer, loaded: LoadedModel, ids: torch.Tensor, advance: Callable[[int], None]) -> None:
    """All windows `ids` [windows, seq_len] of the original, batch by batch."""
    for batch in ids.split(batch_rows(loaded.model, ids.shape[1])):
        here = batch.to(loaded.device)
        logits = loaded.model(input_ids=here, use_cache=False).logits
        nll = nll_of(logits, here)
        if bool(torch.isnan(nll).any()):
            raise NotANumber(
                f"fidelity: {loaded.name} is not a number: its logits are NaN",
                hint="its activations overflow in what it computes in; --set dtype=float32 or bfloat16 may hold them",
            )
        step = positions_at_once(logits.shape[-1])
        writer.add([[compress(part) for part in one.split(step)] for one in logits[:, :-1]], nll.tolist())
        advance(len(batch))


@torch.inference_mode()
def _dtype_noise(
    store: Store, original: Unloaded, ids: torch.Tensor, computed: torch.dtype
) -> dict[str, Any]:
    """The original against itself in another type, on the first windows."""
    wish = "float16" if computed == torch.bfloat16 else "bfloat16"
    found: dict[str, Any] = {"from": str(computed).removeprefix("torch."), "to": wish}
    try:
        loaded = original.load(wish)
        kept, parts = OnDisk(store, loaded.name), []
        for number, window in enumerate(ids[:NOISE_WINDOWS]):
            logits = loaded.model(input_ids=window[None].to(loaded.device), use_cache=False).logits
            parts.append(kept.compare(number, window[None], logits))
        found |= summarize_noise([part.kl for part in parts], [part.same for part in parts])
    # Not every model runs in every type, and each library says so in its own way.
    except (QuantlabError, RuntimeError, ValueError, TypeError) as error:
        found |= {"kl_mean": None, "why": str(error).partition("\n")[0]}
    return found
