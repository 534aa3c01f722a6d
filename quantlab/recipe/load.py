"""Reading recipes: files and bundled names, `--set` overrides, and the JSON Schema for editors.

Errors name file, line, key and the nearest name that exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from quantlab.errors import DataError, RecipeError
from quantlab.paths import bundled, nearest
from quantlab.recipe.base import BaseRecipe
from quantlab.recipe.distill import DistillRecipe
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.recipe.yaml_errors import Places
from quantlab.registry.tasks import task_of
from quantlab.textfile import read_text

R = TypeVar("R", bound=BaseRecipe)


class EvaluateRecipe(BaseRecipe):
    """Measurements alone, for a model as it is stored."""

    kind: Literal["evaluate"] = "evaluate"
    runtime: Literal["transformers", "llama.cpp"] = Field(
        default="transformers", description="what computes the model: llama.cpp runs GGUF files, on the CPU"
    )

    @model_validator(mode="after")
    def _what_the_runtime_can(self) -> EvaluateRecipe:
        wanting = [entry for entry in self.evaluate if not task_of(entry).cached]  # they hand the model on
        wanting += ["tasks.kv_cache"] if self.tasks.kv_cache else []
        if "speed" in self.evaluate and self.tasks.speed.batch_size > 1:
            wanting += ["tasks.speed.batch_size above 1"]
        if self.runtime != "transformers" and wanting:
            raise ValueError(f"@runtime: {wanting[0]} needs transformers, {self.runtime} was asked for")
        return self


Recipe = QuantizeRecipe | EvaluateRecipe | DistillRecipe


KINDS: dict[str, type[BaseRecipe]] = {
    "quantize": QuantizeRecipe,
    "evaluate": EvaluateRecipe,
    "distill": DistillRecipe,
}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override (`a.b=value`, the value read as YAML) and validate; RecipeError names the line and the key."""
    try:
        text = read_text(Path(path), "recipe ")
    except DataError as error:
        raise RecipeError(str(error), hint=error.hint) from error
    return parse_recipe(text, str(path), overrides)


def parse_recipe(text: str, name: str = "<recipe>", overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe` for text; `name` is what messages call it."""
    from quantlab.recipe.yaml_errors import apply_override, read_mapping

    content, places = read_mapping(text, name)
    for override in overrides:
        apply_override(content, places, override)
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        near = nearest(str(kind), KINDS)
        message = (
            "missing"
            if kind is None
            else f"unknown kind {kind!r}" + (f"; did you mean {near!r}?" if near else "")
        )
        raise RecipeError(
            f"{places.say(('kind',))}kind: {message}", hint=f"kind is one of: {', '.join(KINDS)}"
        )
    recipe = _validated(KINDS[kind], content, places)
    assert isinstance(recipe, Recipe)
    return recipe


def parse_settled(kind: type[R], content: dict[str, Any], name: str = "<recipe>") -> R:
    """A recipe of content that was put together by the program; RecipeError names the key that does not fit."""
    from quantlab.recipe.yaml_errors import Places

    return _validated(kind, content, Places(name))


def _validated(kind: type[R], content: dict[str, Any], places: Places) -> R:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        from quantlab.recipe.yaml_errors import explain

        raise RecipeError("\n".join(explain(error, kind, places))) from None


def find_recipe(name: str) -> Path:
    """A path, or the bare name of a bundled recipe; RecipeError names the nearest bundled one."""
    path = Path(name)
    if path.is_file():
        return path
    known = bundled_recipes()
    if name in known:
        return known[name]
    near = nearest(path.stem, known)
    raise RecipeError(
        f"no such recipe: {name}",
        hint=(f"did you mean {near}? " if near else "") + "bundled recipes: " + ", ".join(known),
    )


def bundled_recipes() -> dict[str, Path]:
    """Name → file of the bundled recipes, sorted."""
    root = bundled("recipes")
    files = sorted(root.rglob("*.yaml"))
    return {str(path.relative_to(root).with_suffix("")).replace("\\", "/"): path for path in files}


def json_schema() -> dict[str, Any]:
    """JSON Schema of every kind of recipe, for editors."""
    return TypeAdapter(Recipe).json_schema()
