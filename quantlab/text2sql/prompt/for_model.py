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
from quantlab.paths import short_hash
from quantlab.registry.tasks import PromptOptions, Text2SqlOptions
from quantlab.text2sql.data.dataset import digest, load_items, on_the_hub
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.prompt.few_shot import SOURCE, select_shots
from quantlab.text2sql.prompt.prompt import Prompt, build_prompts
from quantlab.text2sql.prompt.schema_notes import annotate
from quantlab.text2sql.prompt.template import Template, bundled_template, choose_template, hangul_share

# Share of the context that a prompt always leaves to the answer; `max_new_tokens` where that is less.
ANSWER_SHARE = 8


def template_of(options: PromptOptions, items: Sequence[Item]) -> Template:
    """The wording for a data set: that of a file, of a language, or of the language of its questions.

    Raises:
        DataError: the file is not there, or is no template.
    """
    return choose_template(options.language, options.file, (item.question for item in items))


def with_notes(items: Sequence[Item], options: PromptOptions, template: Template) -> list[Item]:
    """The items with the lines behind their DDL that the options ask for; rows that have theirs keep them."""
    bare = [item for item in items if not item.notes]
    if not bare or not (options.values or options.descriptions):
        return list(items)
    noted = iter(annotate(bare, template, values=options.values, descriptions=options.descriptions))
    return [item if item.notes else next(noted) for item in items]


def as_asked(items: Sequence[Item], options: PromptOptions) -> tuple[list[Item], Template]:
    """A data set as prompts show it, and the template that they are written by."""
    template = template_of(options, items)
    return with_notes(items, options, template), template


def data_digest(items: Sequence[Item], template: Template) -> str:
    """16 hexadecimal characters for what a data set asks: its rows, and the wording, unless that is the bundled Korean
    one, which was the only one once."""
    rows = digest(items)
    plain = template.digest == bundled_template("ko").digest
    return rows if plain else short_hash([rows, template.digest])


def options_digest(options: Text2SqlOptions) -> str:
    """Names the data of the Text2SQL task's options; those on the hub by their name, since fetching is heavy work."""
    if on_the_hub(options.data):
        wish = options.prompt
        if wish == PromptOptions():
            return short_hash([options.data])
        file = template_of(wish, ()).digest if wish.file or wish.language != "auto" else ""
        return short_hash([options.data, file, str(wish.values), str(wish.descriptions)])
    return data_digest(*as_asked(load_items(options.data, options.limit), options.prompt))


def prompt_record(items: Sequence[Item], options: PromptOptions, template: Template) -> dict[str, Any]:
    """How the questions were asked, for a run's record: the template, and for `auto` what it was chosen by."""
    found: dict[str, Any] = {"template": template.name, "digest": template.digest}
    if options.file is None and options.language == "auto":
        found["hangul"] = round(hangul_share(item.question for item in items), 4)
    found |= {key: getattr(options, key) for key in ("values", "descriptions") if getattr(options, key)}
    return found


def choose_shots(
    options: Text2SqlOptions, evaluated: Sequence[Item], template: Template | None = None
) -> list[Item]:
    """The examples that stand before every question, with what the prompt says of a schema. DataError: too few rows for
    them."""
    if not options.shots:
        return []
    source = options.shots_source or SOURCE
    drawn = select_shots(load_items(source), options.shots, evaluated, name=source)
    return with_notes(drawn, options.prompt, template or template_of(options.prompt, evaluated))


def without_shown(items: Sequence[Item], shots: Sequence[Item]) -> list[Item]:
    """Rows to learn from that are no example: the answer to those would stand in their own prompt."""
    shown = {normal_question(shot.question) for shot in shots}
    return [item for item in items if normal_question(item.question) not in shown] if shown else list(items)


def make_prompts(
    subject: Any,
    items: Sequence[Item],
    options: Text2SqlOptions,
    shots: Sequence[Item],
    template: Template | None = None,
) -> list[Prompt]:
    """A prompt for each item behind the examples, cut to what the model can read. Items and template are those of
    `as_asked`; without a template, the one that these items are asked by.

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
        template=template or template_of(options.prompt, items),
    )


def prompt_room(model: Any, max_new_tokens: int) -> int | None:
    """How many tokens a prompt may have, or None where the model's configuration does not say what it can read."""
    size = positions_of(getattr(model, "config", None))
    return size - max(1, min(max_new_tokens, size // ANSWER_SHARE)) if size and size > 1 else None
