"""`quantlab calibration`: what the rows look like that a model would be calibrated on, before anything is quantized.

Rows are drawn as a run would draw them, with the model's own tokenizer; no weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlab.commands.defaults import settle_texts
from quantlab.commands.guard import print_json, stdout_is_stderr
from quantlab.commands.planned_run import check_lengths, open_model
from quantlab.errors import RecipeError
from quantlab.models.safetensors.files import ModelFiles
from quantlab.recipe.base import Calibration
from quantlab.recipe.load import bundled_recipes, find_recipe, load_recipe, parse_recipe, parse_settled
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.methods import METHODS

SHOWN = 160  # characters of a row that is printed


def run(
    what: str,
    model: str,
    overrides: Sequence[str] = (),
    *,
    show: int = 3,
    trust_remote_code: bool = False,
    as_json: bool = False,
) -> None:
    """The verb: a text about the rows, or one JSON document, on stdout."""
    recipe = wished(what, overrides)
    with stdout_is_stderr():
        files = open_model(model)
        recipe = settle_texts(recipe, files)
        check_lengths(recipe, files, measured=False)
        found = preview(recipe.calibration, files, show=show, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(found)
    else:
        print("\n".join(lines(found)))


def wished(what: str, overrides: Sequence[str] = ()) -> QuantizeRecipe:
    """The recipe that is named, or one that calibrates on the source that is named.

    Raises:
        RecipeError: a recipe without calibration, or as ``load_recipe``.
    """
    if Path(what).suffix in (".yaml", ".yml") or what in bundled_recipes():
        recipe = load_recipe(find_recipe(what), overrides)
        if isinstance(recipe, QuantizeRecipe) and recipe.needs_calibration:
            return recipe
        methods = " or ".join(name for name, method in METHODS.items() if method.calibrated)
        raise RecipeError(
            f"{what}: nothing is calibrated by this recipe", hint=f"give one of method {methods}"
        )
    recipe = parse_recipe("kind: quantize\nmethod: gptq\n", "the command line", overrides)
    assert isinstance(recipe, QuantizeRecipe)
    content = recipe.named()
    content["calibration"] = content.get("calibration", {}) | {"source": what}
    return parse_settled(QuantizeRecipe, content)


def preview(
    wish: Calibration, files: ModelFiles, *, show: int = 0, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Everything that is said of calibration rows, as one dictionary.

    Raises:
        QuantlabError: as ``calibration.mixture.draw_mixture`` and ``models.load.load_tokenizer``.
    """
    from quantlab.calibration.describe import code_like, scripts
    from quantlab.calibration.mixture import draw_mixture
    from quantlab.models.load import load_tokenizer

    tokenizer = load_tokenizer(files, trust_remote_code)
    mixture = draw_mixture(wish, tokenizer)
    text = "\n".join(tokenizer.batch_decode(mixture.rows, skip_special_tokens=True))
    return {
        "model": files.name,
        **mixture.record(),
        "characters": len(text),
        "scripts": scripts(text),
        "lines_like": code_like(text),
        "shown": tokenizer.batch_decode(mixture.rows[:show]),
    }


def previews(
    recipes: Iterable[QuantizeRecipe], files: ModelFiles, trust_remote_code: bool = False
) -> list[dict[str, Any]]:
    """Of each calibration that is named in the recipes, once; without those that the hub would have to be asked for."""
    wishes = {r.calibration.model_dump_json(): r.calibration for r in recipes if r.needs_calibration}
    here = [w for w in wishes.values() if not any(one.source.startswith("hf:") for one in w.sources)]
    return [preview(wish, files, trust_remote_code=trust_remote_code) for wish in here]


def in_short(found: Mapping[str, Any]) -> list[str]:
    """A preview in a line or two."""
    from quantlab.calibration.mixture import notes

    there = sum(one["documents"] for one in found["sources"])
    head = f"calibration: {found['rows']} rows of {found['seq_len']} tokens, {found['source']} ({there:,} documents)"
    return [f"{head}; {_shares(found['scripts'])}", *notes(found)]


def lines(found: Mapping[str, Any]) -> list[str]:
    """A preview for people."""
    from quantlab.calibration.mixture import notes

    how = "documents joined and cut into windows" if found["pack"] else "beginnings of documents"
    text = [
        f"{found['rows']} rows of {found['seq_len']} tokens for {found['model']}, seed {found['seed']}, {how}; "
        f"digest {found['digest']}",
        "",
        *_table(found["sources"]),
        *notes(found),
        "",
        f"characters: {_shares(found['scripts'])}",
        f"lines that look like: {_shares(found['lines_like']) or 'neither SQL nor code'}",
        f"special tokens: {found['special_share']:.2%} of the tokens"
        + (f"; every row begins with {' '.join(found['opening'])}" if found["opening"] else ""),
    ]
    # repr: no control character gets through to the terminal
    shown = [f"row {number}: {row[:SHOWN]!r}" for number, row in enumerate(found["shown"])]
    return text + ["", *shown] if shown else text


def _table(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [("source", "weight", "documents", "tokens", "characters a token", "rows")]
    for one in sources:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in one["kinds"].items())
        each = f"{one['characters'] / max(one['tokens'], 1):.2f}"
        counts = (f"{one['tokens']:,}", each, str(one["rows"]))
        rows.append((one["source"], f"{one['weight']:g}", kinds, *counts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _shares(shares: Mapping[str, float]) -> str:
    """What there is at least 0.5 % of, the most first."""
    found = sorted(((share, name) for name, share in shares.items() if share >= 0.005), reverse=True)
    return ", ".join(f"{name} {share:.0%}" for share, name in found)
