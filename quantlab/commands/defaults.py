"""What a recipe leaves open, settled by the model it is applied to (no torch).

A key that was written stays as it is, and is refused elsewhere where the model cannot do it. A key that was not written
gets a value that this model can work with:

texts           the bundled general ones; for the embedded models, which know little else, the Korean Text2SQL ones
windows         512 tokens, or the model's positions where it has fewer
speed           a prompt and an answer that fit the positions
format          compressed-tensors for a mixture of experts, which transformers reads right in no other packed layout

The settled recipe is the one that is digested, stored and measured, so that a result names what it was made with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from quantlab.models.provenance import is_embedded
from quantlab.models.safetensors.files import ModelFiles
from quantlab.recipe.base import BaseRecipe
from quantlab.recipe.load import parse_settled
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.formats import PACKING, transformers_reads
from quantlab.registry.tasks import TASKS, options_key

R = TypeVar("R", bound=BaseRecipe)
EMBEDDED_CALIBRATION, EMBEDDED_TEXT = "calib/ko-text2sql.jsonl", "heldout.txt"
WINDOW, PROMPT, ANSWER = 512, 128, 32  # tokens
SHORTEST = 8  # tokens of a window


def settle(recipe: R, files: ModelFiles) -> R:
    """The recipe with every key that it leaves open filled in for a model."""
    content = recipe.named()
    for dotted, value in _open_keys(recipe, files):
        *parents, leaf = dotted.split(".")
        target = content
        for parent in parents:
            target = target.setdefault(parent, {})
        target.setdefault(leaf, value)
    return parse_settled(type(recipe), content)


def note_texts(recipes: Sequence[BaseRecipe], files: ModelFiles, *, measured: bool = True) -> str:
    """What to say of texts that the recipes (as written, not settled) leave open: which are used, and how to name one's
    own. Empty where all are named. ``measured``: whether the tasks will run."""
    used: dict[str, list[str]] = {}
    for recipe in recipes:
        for key in _text_keys(recipe):
            if not _is_named(recipe, key) and (measured or not key.startswith("tasks.")):
                keys = used.setdefault(_value(settle(recipe, files), key), [])
                keys += [key] if key not in keys else []
    if not used:
        return ""
    texts = " and ".join(f"{text} for {', '.join(_what(key) for key in keys)}" for text, keys in used.items())
    kind = "Korean Text2SQL" if is_embedded(files) else "Korean and English prose, dialogue, code, SQL"
    every = [key for keys in used.values() for key in keys]
    return f"bundled text ({kind}): {texts}; your own: " + " ".join(f"--set {key}=FILE" for key in every)


def _is_named(recipe: BaseRecipe, key: str) -> bool:
    inner: Any = recipe.named()
    for part in key.split("."):
        if not isinstance(inner, dict) or part not in inner:
            return False
        inner = inner[part]
    return True


def _what(key: str) -> str:
    return key.removeprefix("tasks.").rpartition(".")[0]


def _text_keys(recipe: BaseRecipe) -> Iterator[str]:
    if isinstance(recipe, QuantizeRecipe) and recipe.needs_calibration:
        yield "calibration.source"
    for name, task in TASKS.items():
        if name in recipe.evaluate:
            yield from (f"tasks.{options_key(name)}.{key}" for key in task.texts)


def _open_keys(recipe: BaseRecipe, files: ModelFiles) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that may be settled by the model."""
    if is_embedded(files):
        for key in _text_keys(recipe):
            yield key, EMBEDDED_CALIBRATION if key == "calibration.source" else EMBEDDED_TEXT
    longest = files.positions
    if longest is not None and SHORTEST <= longest < WINDOW:
        yield from ((f"{key.rpartition('.')[0]}.seq_len", longest) for key in _text_keys(recipe))
    if longest is not None and "speed" in recipe.evaluate and longest < PROMPT + ANSWER:
        speed = recipe.named().get("tasks", {}).get("speed", {})
        answer = int(speed.get("new_tokens", max(2, min(ANSWER, longest // 4))))
        yield "tasks.speed.new_tokens", answer
        yield "tasks.speed.prompt_tokens", max(1, longest - answer)
    if isinstance(recipe, QuantizeRecipe):
        yield from _layout(recipe, files)


def _layout(recipe: QuantizeRecipe, files: ModelFiles) -> Iterator[tuple[str, Any]]:
    """Another layout than the method's own where transformers would not read that right."""
    if "format" in recipe.named() or recipe.format not in PACKING:
        return
    if transformers_reads(recipe.format, experts=files.has_experts):
        return
    if "symmetric" in recipe.named() and not recipe.symmetric:  # which compressed-tensors cannot hold
        return
    yield "format", "compressed-tensors"
    if recipe.act_order is True:  # a layout without a column order: groups stay in place
        yield "static_groups", True


def _value(recipe: BaseRecipe, dotted: str) -> Any:
    found: Any = recipe
    for part in dotted.split("."):
        found = getattr(found, part)
    return found
