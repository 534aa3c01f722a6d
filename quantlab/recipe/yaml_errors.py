"""YAML with places: where each key of a recipe stands, so that a message can name the line.

Reads one mapping with the safe loader's types, refuses duplicate keys and anchors-as-programs (only plain YAML),
applies `--set` overrides, and turns pydantic's errors into lines a person can act on.
"""

from __future__ import annotations

from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from quantlab.errors import RecipeError
from quantlab.paths import nearest
from quantlab.registry.strict import ALTERNATIVE

Key = tuple[str | int, ...]
MOST_VALUES = 100_000  # in one file; a page of aliases of aliases stands for billions


class Places:
    """Line numbers of keys; keys that came from `--set` are named by the override instead."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Key, int] = {}
        self.overrides: dict[Key, str] = {}

    def say(self, key: Key) -> str:
        """`file:line: ` of the key, or of the nearest parent that has a place."""
        for end in range(len(key), -1, -1):
            if key[:end] in self.overrides:
                return f"--set {self.overrides[key[:end]]}: "
            if key[:end] in self.lines:
                return f"{self.name}:{self.lines[key[:end]]}: "
        return f"{self.name}: "


def read_mapping(text: str, name: str) -> tuple[dict[str, Any], Places]:
    """The content and the places of its keys; RecipeError for anything that is not one plain mapping."""
    places = Places(name)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{name}: expected a mapping of keys to values, as in `method: gptq`")
        _walk(node, (), places)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}: " if mark else f"{name}: "
        raise RecipeError(f"{where}not YAML: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{name}: not YAML: {error}") from None
    return content, places


def _walk(node: yaml.Node, key: Key, places: Places) -> None:
    if len(places.lines) > MOST_VALUES:
        raise RecipeError(
            f"{places.name}: more than {MOST_VALUES:,} values, aliases counted as often as used"
        )
    places.lines.setdefault(key, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            word = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            if not word or key_node.tag != "tag:yaml.org,2002:str":
                raise RecipeError(f"{places.name}:{line}: expected a word as key")
            if word in seen:
                raise RecipeError(
                    f"{places.name}:{line}: {word}: key given twice (first on line {seen[word]})"
                )
            seen[word] = line
            places.lines[(*key, word)] = line
            _walk(value, (*key, word), places)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*key, index), places)


def apply_override(content: dict[str, Any], places: Places, override: str) -> None:
    """`a.b=value` into `content`, in place; `a.b` may be new (the schema decides whether it exists)."""
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {override}: expected key=value, as in --set calibration.rows=64")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: the value is not YAML") from None
    target = content
    for depth, part in enumerate(parts[:-1]):
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override}: {'.'.join(parts[: depth + 1])} is a value, it has no keys")
        target = inner
    target[parts[-1]] = value
    places.overrides[tuple(parts)] = override


def explain(error: ValidationError, model: type[BaseModel], places: Places) -> list[str]:
    """One line a mistake: place, key, what was expected, the nearest valid name."""
    lines = []
    for item in error.errors(include_url=False):
        key: Key = tuple(part for part in item["loc"] if not str(part).startswith(ALTERNATIVE))
        kind, said = item["type"], item["msg"]
        if kind == "value_error" and said.startswith("Value error, @"):  # from recipe.py: "@key: reason"
            name, _, reason = said.partition("@")[2].partition(": ")
            key, said = (*key, *name.split(".")), reason
        elif kind == "extra_forbidden":
            valid = _keys(model, key[:-1])
            near = nearest(str(key[-1]), valid)
            said = "unknown key; " + (f"did you mean {near!r}?" if near else f"keys here: {', '.join(valid)}")
        elif kind == "literal_error":
            expected = item["ctx"]["expected"]
            valid = [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]
            near = nearest(item["input"], valid) if isinstance(item["input"], str) else None
            said = f"{item['input']!r} is not one of {expected}"
            said += f"; did you mean {near}?" if near else ""
        elif kind == "missing":
            said = "missing"
        else:
            said = (
                said.replace("Input should be", "expected").replace(" valid ", " ")
                + f", found {item['input']!r}"
            )
        dotted = ".".join(map(str, key))
        lines.append(f"{places.say(key)}{dotted}: {said}")
    return lines


def _keys(model: type[BaseModel], path: Key) -> list[str]:
    """Names of the fields of the (nested) model at `path`."""
    current: Any = model
    for part in path:
        if isinstance(part, int):  # a place in a list, whose items the list's type was searched for
            continue
        field = current.model_fields.get(part)
        current = None if field is None else _model_in(field.annotation)
        if current is None:
            return []
    return list(current.model_fields)


def _model_in(annotation: Any) -> Any:
    """The first model in a type, however deep inside unions and lists; None where there is none."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)
