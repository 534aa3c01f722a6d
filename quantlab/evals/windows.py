"""A text as non-overlapping windows of tokens, the way GPTQ's authors measure perplexity.

Documents are joined with a blank line and tokenised once; the tokens are cut into windows of `seq_len` and
what is left over is dropped (Frantar et al. 2022, `datautils.py` and `opt_eval`). The bytes of text that
the scored tokens stand for are counted too, so that models with different tokenizers can be compared per
byte.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from quantlab.calibration import SEPARATOR, read_texts
from quantlab.errors import DataError, NotANumber, RecipeError
from quantlab.models.positions import positions_of

PROTOCOL = "gptq-windows"
LOGITS_AT_ONCE = 2**25  # values; a batch's logits in float32 stay below 128 MiB where one window allows it


@dataclass(frozen=True)
class Windows:
    """`ids`: int64 [windows, seq_len]; the first token of a window is context only, the others are scored."""

    ids: torch.Tensor
    scored_bytes: int
    source: str
    text_digest: str
    unknown_tokens: int

    @property
    def name(self) -> str:
        """The text by its source and its content."""
        return f"{self.source}#{self.text_digest[:8]}"

    @property
    def scored_tokens(self) -> int:
        count, seq_len = self.ids.shape
        return count * (seq_len - 1)


def load_windows(subject: Any, source: str, seq_len: int, max_tokens: int | None = None) -> Windows:
    """The windows of `source` for the subject's tokenizer; refused when the model cannot attend so far."""
    return windows_for(
        subject.tokenizer, positions_of(subject.model.config), subject.name, source, seq_len, max_tokens
    )


def windows_for(
    tokenizer: Any, positions: int | None, name: str, source: str, seq_len: int, max_tokens: int | None
) -> Windows:
    """The same for a model that is not loaded: its tokenizer, how many positions it has, what it is called."""
    if positions is not None and seq_len > positions:
        raise RecipeError(
            f"seq_len {seq_len} is longer than the {positions} positions of {name}",
            hint=f"set seq_len to at most {positions}",
        )
    return make_windows(tokenizer, SEPARATOR.join(read_texts(source)), seq_len, max_tokens, source)


def make_windows(
    tokenizer: Any, text: str, seq_len: int, max_tokens: int | None = None, source: str = "text"
) -> Windows:
    """Tokenise once and cut. DataError where the text is shorter than one window."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, return_offsets_mapping=fast, verbose=False)
    ids = encoded["input_ids"]
    count = len(ids) // seq_len
    if max_tokens is not None:
        count = min(count, max(1, max_tokens // seq_len))
    if count == 0:
        raise DataError(
            f"{source} has {len(ids)} tokens, fewer than one window of {seq_len}",
            hint=f"set seq_len to at most {len(ids)}, or give more text",
        )
    windows = torch.tensor(ids[: count * seq_len], dtype=torch.int64).view(count, seq_len)
    if fast:
        ends = [end for _, end in encoded["offset_mapping"]]
        spans = [text[ends[at * seq_len] : ends[(at + 1) * seq_len - 1]] for at in range(count)]
    else:
        spans = [tokenizer.decode(row[1:].tolist(), skip_special_tokens=True) for row in windows]
    unknown = getattr(tokenizer, "unk_token_id", None)
    return Windows(
        ids=windows,
        scored_bytes=sum(len(span.encode("utf-8")) for span in spans),
        source=source,
        text_digest=hashlib.sha256(text.encode("utf-8")).hexdigest()[:16],
        unknown_tokens=int((windows == unknown).sum()) if unknown is not None else 0,
    )


def refuse_nan(task: str, subject: Any, values: torch.Tensor) -> None:
    """Refuse a measurement of which some values [values] are NaN.

    Raises:
        NotANumber: says how many of the values are.
    """
    bad = int(torch.isnan(values).sum())
    if bad:
        raise NotANumber(
            f"{task} of {subject.name} is not a number: the logits are NaN in {bad} of {len(values)} places",
            hint="its activations overflow in what it computes in; --set dtype=float32 or bfloat16 may hold them",
        )


def batch_rows(model: Any, seq_len: int) -> int:
    """Windows to run at once such that their logits fit `LOGITS_AT_ONCE`; at least one."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return max(1, min(16, LOGITS_AT_ONCE // (seq_len * vocabulary)))
