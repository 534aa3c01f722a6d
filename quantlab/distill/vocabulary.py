"""Whether two models mean the same tokens by the same numbers, so that their probabilities can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from quantlab.errors import DataError


def same_vocabulary(
    teacher_tokenizer: Any, student_tokenizer: Any, teacher_config: Any, student_config: Any
) -> int:
    """How many logits of teacher and student can be compared: the tokens that both have.

    Embeddings padded beyond the tokenizer are cut off, and so is a padding token that only one of them has. How a text
    is split is not compared: the teacher reads the student's tokens.

    Raises:
        DataError: an id stands for different tokens, or they stop at different ones; shows some of them.
    """
    left, right = _tokens(teacher_tokenizer), _tokens(student_tokenizer)
    for tokens, tokenizer in ((left, teacher_tokenizer), (right, student_tokenizer)):
        pad = tokenizer.pad_token_id
        if pad is not None and pad not in (left if tokens is right else right):
            tokens.pop(pad, None)
    hint = "learn the teacher's answers instead, which works across vocabularies: loss: sft with teacher: {model: hf:…}"
    differing = [i for i in sorted(left.keys() | right.keys()) if left.get(i) != right.get(i)]
    if differing:
        shown = "; ".join(f"id {i}: {_show(left, i)} against {_show(right, i)}" for i in differing[:5])
        raise DataError(
            f"teacher and student have different vocabularies ({len(left)} and {len(right)} tokens, {len(differing)} "
            f"ids differ), so their probabilities cannot be compared: {shown}{'; …' if len(differing) > 5 else ''}",
            hint=hint,
        )
    stops = teacher_tokenizer.eos_token_id, student_tokenizer.eos_token_id
    if stops[0] != stops[1]:
        raise DataError(
            f"the teacher ends its answers with {_show(left, stops[0])} and the student with {_show(right, stops[1])}: "
            "it would learn to end with a token at which it does not stop",
            hint="give the student's tokenizer the teacher's eos_token (and its generation_config the id), or: "
            + hint,
        )
    sizes = [int(config.get_text_config().vocab_size) for config in (teacher_config, student_config)]
    return min(*sizes, max(left) + 1)


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 over ids and tokens, 16 hex digits."""
    return hashlib.sha256(json.dumps(sorted(_tokens(tokenizer).items())).encode()).hexdigest()[:16]


def _tokens(tokenizer: Any) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}


def _show(tokens: Mapping[int, str], number: int | None) -> str:
    return repr(tokens[number]) if number is not None and number in tokens else "nothing"
