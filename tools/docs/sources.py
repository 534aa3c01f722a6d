"""What the reference is generated from: small functions that ask the code, one per subject.

Whatever the code keeps in a table of its own (methods, formats, tasks, columns) is read here and nowhere else in
`tools/docs`, so that a table that moves is followed in one place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from quantlab.recipe.load import json_schema, parse_recipe

WIDTH = 100  # of the help texts

ROOT = Path(__file__).parents[2]


class Key(NamedTuple):
    """One key of a recipe. `default` is JSON, "" for a required key; `section` for a key that holds other keys."""

    name: str
    type: str
    default: str
    meaning: str
    section: bool = False


def kinds() -> dict[str, dict[str, Any]]:
    """Kind of recipe → its JSON schema."""
    schema = json_schema()
    found = {}
    for reference in schema["anyOf"]:
        one = _resolved(reference, schema["$defs"])
        found[str(one["properties"]["kind"]["const"])] = one
    return found


def keys(kind: str) -> list[Key]:
    """Every key of a kind of recipe, dotted, in the order of the schema."""
    definitions = json_schema()["$defs"]
    return list(_walk(kinds()[kind], definitions, ""))


def _walk(schema: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str) -> Iterator[Key]:
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        if name == "kind":
            continue  # the page is about one kind
        dotted = f"{prefix}{name}"
        inner = _inner(field, definitions)
        meaning = field.get("description", "")
        if inner is None:
            value = field["default"] if "default" in field else _default_of(schema, name)
            default = "" if name in required else _json(value)
            yield Key(dotted, _type(field, definitions), default, meaning)
        else:
            optional = "anyOf" in field
            default = "" if name in required else ("null" if optional else "")
            meaning = meaning or (f"options of {name}" if prefix == "tasks." else "")
            yield Key(dotted, "section" + (" or null" if optional else ""), default, meaning, section=True)
            yield from _walk(inner, definitions, f"{dotted}.")


def _inner(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema of the model that a key holds, or None for a plain value."""
    for choice in (field, *field.get("anyOf", ()), *field.get("allOf", ())):
        if "$ref" in choice:
            found = _resolved(choice, definitions)
            if "properties" in found:
                return found
    return None


def _resolved(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = definitions[field["$ref"].rpartition("/")[2]]
    return found


def _default_of(schema: Mapping[str, Any], name: str) -> Any:
    """A default that a factory makes, which a JSON schema does not show: asked of the class with that title."""
    from quantlab.recipe import base, distill, load, quantize

    for module in (load, quantize, distill, base):
        model = getattr(module, str(schema.get("title")), None)
        if model is not None and name in model.model_fields:
            return model.model_fields[name].get_default(call_default_factory=True)
    return None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _type(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """The type of a plain value in words: `integer ≥ 1 or null`, `"ko", "en"`."""
    if choices := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(choice, definitions) for choice in choices))
    if "$ref" in field:
        return _type(_resolved(field, definitions), definitions)
    if "const" in field:
        return _json(field["const"])
    if "enum" in field:
        return ", ".join(_json(value) for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}), definitions)}"
    if field.get("type") == "object" and "properties" in field:
        return "mapping of " + ", ".join(field["properties"])
    if field.get("type") == "object":
        names = field.get("propertyNames", {}).get("enum")
        keyed = f" from {', '.join(names)}" if names else ""
        return f"mapping{keyed} to {_type(field.get('additionalProperties') or {}, definitions)}"
    words = str(field.get("type", "any value"))
    if words == "null":
        return words
    limits = [
        f"{sign} {field[name]:g}"
        for name, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", "≥"),
            ("exclusiveMaximum", "<"),
            ("maximum", "≤"),
        )
        if name in field
    ]
    return " ".join([words, *([" and ".join(limits)] if limits else [])])


class Command(NamedTuple):
    name: str
    about: str
    help: str
    options: tuple[str, ...]  # every name, long and short


def commands() -> list[Command]:
    """The commands of the command line with the text of their `--help`."""
    import typer
    from typer.testing import CliRunner

    from quantlab.cli import app

    group: Any = typer.main.get_command(app)
    found = []
    for name in ("", *group.commands):
        command = group.commands[name] if name else group
        asked = CliRunner().invoke(
            app,
            [*([name] if name else []), "--help"],
            prog_name="quantlab",
            env={"COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH), "NO_COLOR": "1"},
        )
        options = [opt for param in command.params for opt in param.opts if opt.startswith("-")]
        found.append(
            Command(name, " ".join((command.help or "").split()), asked.output.rstrip(), tuple(options))
        )
    return found


class Method(NamedTuple):
    name: str
    meaning: str
    filled: Mapping[str, Any]  # bits, group_size, symmetric, format
    fixed: bool  # whether these are the only ones
    own: tuple[str, ...]  # keys that not every method has
    calibrated: bool


def methods() -> list[Method]:
    from quantlab.recipe.quantize import usable
    from quantlab.registry.methods import METHODS

    plain = [key.name for key in keys("quantize") if "." not in key.name]
    found = []
    for name, method in METHODS.items():
        recipe: Any = parse_recipe(f"kind: quantize\nmethod: {name}\n")
        filled = {key: getattr(recipe, key) for key in ("bits", "group_size", "symmetric", "format")}
        own = tuple(
            key
            for key in plain
            if usable(f"{key}=x", name) and not all(usable(f"{key}=x", other) for other in METHODS)
        )
        found.append(Method(name, method.about, filled, method.fixed is not None, own, method.calibrated))
    return found


class Format(NamedTuple):
    name: str
    meaning: str
    bits: tuple[int, ...]
    abilities: tuple[str, ...]
    readers: str
    expert_readers: str


def formats() -> list[Format]:
    from quantlab.registry.formats import FORMATS, readers

    words = {"asymmetric": "asymmetric grids", "ordered": "column order", "mixed": "a width per layer"}
    return [
        Format(
            name,
            found.about,
            found.bits,
            tuple(words[ability] for ability in words if getattr(found, ability)),
            readers(name).text,
            readers(name, "merged").text,
        )
        for name, found in FORMATS.items()
    ]


class Task(NamedTuple):
    name: str
    meaning: str
    columns: tuple[str, ...]


def tasks() -> list[Task]:
    from quantlab.registry.tasks import TASKS

    return [
        Task(
            f"{name}:<name>" if task.named else name,
            task.about,
            tuple(column.name for column in task.columns),
        )
        for name, task in TASKS.items()
    ]


def columns() -> list[tuple[str, str]]:
    """(name, meaning) of every column of the leaderboard, in their order."""
    from quantlab.runs.leaderboard import MEANINGS

    return list(MEANINGS.items())


def exit_codes() -> list[tuple[int, str, str]]:
    """(code, name of the error, what it means), 0 apart."""
    from quantlab import errors

    found = {
        kind.exit_code: (kind.__name__, " ".join((kind.__doc__ or "").split()))
        for kind in (errors.QuantlabError, errors.RecipeError, errors.MachineError, errors.DataError)
    }
    return [(code, *found[code]) for code in sorted(found)]


def recipes() -> list[tuple[str, str, str]]:
    """(name, kind, head comment without the first line's mark) of every bundled recipe."""
    from quantlab.recipe.load import bundled_recipes, load_recipe

    return [(name, str(load_recipe(path).kind), head(path)) for name, path in bundled_recipes().items()]


def head(path: Path) -> str:
    """The comment that heads a recipe file, without the marks."""
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines)


def architectures() -> dict[str, Any]:
    """What the sweep over all architectures found, by model type."""
    found: dict[str, Any] = json.loads((ROOT / "results" / "architectures.json").read_text(encoding="utf-8"))
    return found


def transformers_version() -> str:
    """The version in constraints.txt, which the sweep was made with."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return next(line.partition("==")[2] for line in text.splitlines() if line.startswith("transformers=="))
