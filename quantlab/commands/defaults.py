"""What a recipe leaves open, settled by the model it is applied to.

A key that was written stays as it is, and is refused elsewhere where the model cannot do it. A key that was not written
gets a value that this model can work with:

texts           the bundled general ones; for the embedded models, which know little else, the Korean Text2SQL ones
windows         512 tokens, or the model's positions where it has fewer
speed           a prompt and an answer that fit the positions
format          the method's own where transformers reads that right for the architecture, else one that it does:
                compressed-tensors for a mixture of experts, gptq for layers that are kept transposed; experts that it
                reads packed in none are ignored
imatrix         the digest of its file
group size      with `auto`: the one that fits every layer; left at `auto` where layers differ or some fit none

The settled recipe is the one that is digested, stored and measured, so that a result names what it was made with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from quantlab.calibration.importance import imatrix_digest
from quantlab.models.provenance import is_embedded
from quantlab.models.safetensors.files import ModelFiles
from quantlab.recipe.base import BaseRecipe
from quantlab.recipe.load import parse_settled
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.formats import FORMATS, PACKING
from quantlab.registry.methods import METHODS
from quantlab.registry.tasks import TASKS, options_key

if TYPE_CHECKING:
    from quantlab.models.layers import Layers

R = TypeVar("R", bound=BaseRecipe)
EMBEDDED_CALIBRATION, EMBEDDED_TEXT = "calib/ko-text2sql.jsonl", "heldout.txt"
WINDOW, PROMPT, ANSWER = 512, 128, 32  # tokens
SHORTEST = 8  # tokens of a window
MOST = 0.9  # share of the weights, of those that another layout could hold, that the method's own has to hold


def settle(recipe: R, files: ModelFiles, trust_remote_code: bool = False) -> R:
    """The recipe with every key that it leaves open filled in for a model. For a recipe that quantizes torch is
    imported, for the model's skeleton.

    Raises:
        QuantlabError: as ``quant.selection.select``, and for a model that cannot be quantized.
    """
    found = settle_texts(recipe, files)
    if (
        not isinstance(found, QuantizeRecipe)
        or not METHODS[found.method].solve
        or files.quantized is not None
    ):
        return found
    from quantlab.models.blockwise import layers_of
    from quantlab.quant.selection import select

    layers = layers_of(files, trust_remote_code)
    found = _filled(found, _layout(found, layers))
    chosen = select(found, layers, files.name)
    if found.group_size == "auto" and not found.opens_types and len(chosen.sizes()) == 1 and not chosen.kept:
        found = _filled(found, [("group_size", chosen.sizes()[0])])
    return found


def settle_texts(recipe: R, files: ModelFiles) -> R:
    """The recipe with texts, windows and lengths filled in, which needs no torch."""
    return _filled(recipe, _open_keys(recipe, files))


def _filled(recipe: R, keys: Iterable[tuple[str, Any]]) -> R:
    content = recipe.named()
    for dotted, value in keys:
        *parents, leaf = dotted.split(".")
        target = content
        for parent in parents:
            target = target.setdefault(parent, {})
        if target.get(leaf) in (None, "auto"):
            target[leaf] = value
    return parse_settled(type(recipe), content)


def note_texts(recipes: Sequence[BaseRecipe], files: ModelFiles, *, measured: bool = True) -> str:
    """What to say of texts that the recipes (as written, not settled) leave open: which are used, and how to name one's
    own. Empty where all are named. ``measured``: whether the tasks will run."""
    used: dict[str, list[str]] = {}
    for recipe in recipes:
        for key in _text_keys(recipe):
            if not _is_named(recipe, key) and (measured or not key.startswith("tasks.")):
                keys = used.setdefault(_value(settle_texts(recipe, files), key), [])
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
    if isinstance(recipe, QuantizeRecipe) and (file := recipe.imatrix_file) is not None:
        yield "calibration.imatrix_digest", imatrix_digest(file)
    longest = files.positions
    if longest is not None and SHORTEST <= longest < WINDOW:
        yield from ((f"{key.rpartition('.')[0]}.seq_len", longest) for key in _text_keys(recipe))
    if longest is not None and "speed" in recipe.evaluate and longest < PROMPT + ANSWER:
        speed = recipe.named().get("tasks", {}).get("speed", {})
        answer = int(speed.get("new_tokens", max(2, min(ANSWER, longest // 4))))
        yield "tasks.speed.new_tokens", answer
        yield "tasks.speed.prompt_tokens", max(1, longest - answer)


def _layout(recipe: QuantizeRecipe, layers: Layers) -> Iterator[tuple[str, Any]]:
    """Another layout than the method's own where transformers would not read that right."""
    if "format" in recipe.named() or recipe.format not in PACKING:
        return
    from quantlab.quant.selection import EXPERTS, coverage, reads_experts

    def possible(format: str) -> bool:
        held = FORMATS[format]
        wide = recipe.bits in held.bits or (recipe.bits == "auto" and held.mixed)
        strict = "symmetric" in recipe.named() and not recipe.symmetric and not held.asymmetric
        return wide and not strict

    candidates = [format for format in PACKING if possible(format)]
    if layers.experts and any(reads_experts(format, layers) for format in candidates):
        candidates = [format for format in candidates if reads_experts(format, layers)]
    covered = {format: coverage(recipe, format, layers) for format in candidates}
    best = max(covered, key=lambda format: covered[format], default=recipe.format)
    if covered.get(recipe.format, 0) >= MOST * covered.get(best, 0):
        best = recipe.format
    if best != recipe.format:
        yield "format", best
        if recipe.act_order is True and not FORMATS[best].ordered:  # groups stay in place
            yield "static_groups", True
    if layers.experts and not reads_experts(best, layers):
        yield "ignore", [EXPERTS]


def _value(recipe: BaseRecipe, dotted: str) -> Any:
    found: Any = recipe
    for part in dotted.split("."):
        found = getattr(found, part)
    return found
