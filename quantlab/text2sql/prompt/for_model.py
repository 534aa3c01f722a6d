"""From the options of the Text2SQL task to the prompts that a model is given, when it is asked and when it is taught.

The writing is in `quantlab.text2sql.prompt.prompt`, the choice of examples in `quantlab.text2sql.prompt.few_shot`;
here they are fed from the options and from the model: its tokenizer, and how many tokens it was made for. Training
goes by the options of the evaluation, so that a student learns to answer what it will be asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantlab.data.exclusions import normal_question
from quantlab.models.positions import positions_of
from quantlab.registry.tasks import Text2SqlOptions
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.prompt.few_shot import SOURCE, select_shots
from quantlab.text2sql.prompt.prompt import Prompt, build_prompts

# Share of the context that a prompt always leaves to the answer; `max_new_tokens` where that is less.
ANSWER_SHARE = 8


def choose_shots(options: Text2SqlOptions, evaluated: Sequence[Item]) -> list[Item]:
    """The examples that stand before every question. DataError: too few rows for them."""
    source = options.shots_source or SOURCE
    return select_shots(load_items(source), options.shots, evaluated, name=source) if options.shots else []


def without_shown(items: Sequence[Item], shots: Sequence[Item]) -> list[Item]:
    """Rows to learn from that are no example: the answer to those would stand in their own prompt."""
    shown = {normal_question(shot.question) for shot in shots}
    return [item for item in items if normal_question(item.question) not in shown] if shown else list(items)


def make_prompts(
    subject: Any, items: Sequence[Item], options: Text2SqlOptions, shots: Sequence[Item]
) -> list[Prompt]:
    """A prompt for each item behind the examples, cut to what the model can read.

    Raises:
        RecipeError: `chat` is always and the model has no chat template. DataError: the template fails.
    """
    return build_prompts(
        items,
        shots=shots,
        linker=options.linker,
        chat=options.chat,
        tokenizer=subject.tokenizer,
        room=prompt_room(subject.model, options.max_new_tokens),
    )


def prompt_room(model: Any, max_new_tokens: int) -> int | None:
    """How many tokens a prompt may have, or None where the model's configuration does not say what it can read."""
    size = positions_of(getattr(model, "config", None))
    return size - max(1, min(max_new_tokens, size // ANSWER_SHARE)) if size and size > 1 else None
