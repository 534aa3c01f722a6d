"""Sweeps: `sweep:` in a recipe as a grid of recipes, each one a run of its own.

    sweep:
      data.fraction: [0.2, 0.4, 0.6, 0.8, 1.0]                  # an axis: a dotted key and its values
      student.lora.r,student.lora.alpha: [[16, 32], [64, 128]]  # an axis of keys that change together

A cell is one combination of values. Its recipe is the sweep's with the values put in and `sweep` left out, so it can be
run, resumed and found again by its digest like any other. Defaults that follow from other keys are made anew in
each cell: a teacher's endpoint that was filled in for one model is not carried over to another.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from quantlab.errors import RecipeError
from quantlab.paths import slug
from quantlab.recipe.distill import DistillRecipe
from quantlab.recipe.yaml_errors import Key, Places, explain

LIMIT = 500  # cells; a larger grid is a slip of the pen
VALUE_LENGTH, LABEL_LENGTH = 40, 120  # characters of a directory's name


@dataclass(frozen=True)
class Cell:
    """One combination. `point` has a value an axis, as `sweep` writes it; `overrides` has one a key.

    `label` is fit for a directory's name, unique within the sweep, and made of the cell's own values.
    """

    label: str
    point: Mapping[str, Any]
    overrides: Mapping[str, Any]
    recipe: DistillRecipe


def cells(recipe: DistillRecipe, name: str = "<recipe>") -> list[Cell]:
    """The cells of `recipe.sweep`, the last axis changing fastest; one cell without values where there is no sweep.

    `name` is what messages call the recipe. RecipeError names axis, value and reason where a value does not fit, where
    two axes set the same key, where two cells come out equal, and where there are more than LIMIT cells.
    """
    axes = {axis: split_axis(axis) for axis in recipe.sweep}
    _check_axes(axes, recipe.sweep, name)
    words = _words(axes, recipe.sweep)
    found: list[Cell] = []
    seen: dict[str, Cell] = {}
    for indices in itertools.product(*(range(len(values)) for values in recipe.sweep.values())):
        point = {axis: recipe.sweep[axis][index] for axis, index in zip(axes, indices, strict=True)}
        label = "_".join(words[axis][index] for axis, index in zip(axes, indices, strict=True))
        cell = Cell(_shorten(label, LABEL_LENGTH, point), point, spread(point), _build(recipe, point, name))
        digest = cell.recipe.digest()
        if digest in seen:
            raise RecipeError(
                f"{name}: sweep: two cells are the same recipe: "
                f"{describe(seen[digest].point)}, and {describe(point)}",
                hint="take out the value that is there twice",
            )
        seen[digest] = cell
        found.append(cell)
    return found


def split_axis(axis: str) -> list[str]:
    """The dotted keys of an axis: several, parted by commas, change together."""
    return [key.strip() for key in axis.split(",")]


def spread(point: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value of a cell's point, the values of grouped axes handed out to their keys."""
    overrides: dict[str, Any] = {}
    for axis, value in point.items():
        keys = split_axis(axis)
        overrides |= zip(keys, value, strict=True) if len(keys) > 1 else {keys[0]: value}
    return overrides


def describe(point: Mapping[str, Any]) -> str:
    """`student.lora.r = 16, data.filters = [parses, binds]`, for messages."""
    return ", ".join(f"{key} = {_yaml(value)}" for key, value in spread(point).items()) or "no values"


def _check_axes(axes: Mapping[str, list[str]], sweep: Mapping[str, Sequence[Any]], name: str) -> None:
    """Refuse keys that cannot be swept or are set twice, values that miss a key, and a grid that is too large."""
    keys: list[tuple[str, ...]] = []
    for axis, dotted in axes.items():
        for key in dotted:
            parts = tuple(key.split("."))
            if not all(parts):
                raise RecipeError(f"{name}: sweep.{axis}: expected a dotted key, as in student.lora.r")
            if parts[0] in ("sweep", "kind"):
                raise RecipeError(f"{name}: sweep.{axis}: {key} is not a key that can be swept")
            for other in keys:
                shorter = min(len(parts), len(other))
                if parts[:shorter] == other[:shorter]:
                    raise RecipeError(f"{name}: sweep.{axis}: {key} is set by {'.'.join(other)} already")
            keys.append(parts)
        for value in sweep[axis] if len(dotted) > 1 else []:
            if not isinstance(value, list | tuple) or len(value) != len(dotted):
                raise RecipeError(
                    f"{name}: sweep.{axis}: expected lists of {len(dotted)} values, one a key, "
                    f"found {_yaml(value)}"
                )
    count = math.prod(len(values) for values in sweep.values())
    if count > LIMIT:
        sizes = " × ".join(str(len(values)) for values in sweep.values())
        raise RecipeError(
            f"{name}: sweep: {sizes} = {count} cells, at most {LIMIT}",
            hint="sweep fewer values, or group keys that belong together: `a.b,a.c: [[1, 2], [3, 4]]`",
        )


class _CellPlaces(Places):
    """Says which swept value a mistake comes from; the whole cell where it comes from several together."""

    def __init__(self, name: str, point: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.point = point

    def say(self, key: Key) -> str:
        words = ".".join(map(str, key)).split(".")
        touched = []
        for dotted, value in spread(self.point).items():
            parts = dotted.split(".")
            shorter = min(len(words), len(parts))
            if words[:shorter] == parts[:shorter]:
                touched.append(f"{self.name}: sweep.{dotted} = {_yaml(value)}: ")
        return touched[0] if len(touched) == 1 else f"{self.name}: sweep with {describe(self.point)}: "


def _build(recipe: DistillRecipe, point: Mapping[str, Any], name: str) -> DistillRecipe:
    """The recipe with a point's values; RecipeError with a line a mistake."""
    content = recipe.named()
    content.pop("sweep", None)
    places = _CellPlaces(name, point)
    for dotted, value in spread(point).items():
        parts = dotted.split(".")
        target = content
        for depth, part in enumerate(parts[:-1]):
            inner = target.get(part)
            if inner is None:  # not written, or written as null
                inner = target[part] = {}
            if not isinstance(inner, dict):
                parent = ".".join(parts[: depth + 1])
                raise RecipeError(f"{places.say(tuple(parts))}{parent} is a value, it has no keys")
            target = inner
        target[parts[-1]] = copy.deepcopy(value)
    try:
        return DistillRecipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, DistillRecipe, places))) from None


def _words(axes: Mapping[str, list[str]], sweep: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    """Axis → what each of its values is called in labels; values that would be called alike get a hash each."""
    keys = [key for dotted in axes.values() for key in dotted]
    names = {key: _key_name(key, keys) for key in keys}
    words = {}
    for axis, values in sweep.items():
        said = [
            "_".join(f"{names[key]}-{_value_name(part)}" for key, part in spread({axis: value}).items())
            for value in values
        ]
        folded = [word.casefold() for word in said]  # some file systems do not tell case apart
        words[axis] = [
            f"{word}-{_hash(value)}" if folded.count(low) > 1 else word
            for word, low, value in zip(said, folded, values, strict=True)
        ]
    return words


def _key_name(key: str, keys: Sequence[str]) -> str:
    """The last part of a dotted key, with as many before it as tell it from the others."""
    parts = key.split(".")
    others = [other.split(".") for other in keys if other != key]
    for length in range(1, len(parts)):
        if all(parts[-length:] != other[-length:] for other in others):
            return slug(".".join(parts[-length:]))
    return slug(key)


def _value_name(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        word = {True: "true", False: "false", None: "none"}[value]
    elif isinstance(value, int | float):
        word = str(value).replace("+", "")
    elif isinstance(value, list | tuple):
        word = "-".join(map(_value_name, value)) or "none"
    elif isinstance(value, dict):
        word = "-".join(f"{slug(str(key))}-{_value_name(part)}" for key, part in value.items()) or "none"
    else:
        word = slug(str(value))
    return _shorten(word, VALUE_LENGTH, value)


def _shorten(word: str, length: int, value: Any) -> str:
    return word if len(word) <= length else f"{word[: length - 7]}-{_hash(value)}"


def _hash(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:6]


def _yaml(value: Any) -> str:
    """A value as it would stand in the recipe, short."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(part)}" for key, part in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)
