"""`quantlab recipes`: the bundled recipes, a line each, taken from the comment that heads each file."""

from __future__ import annotations

from pathlib import Path

from quantlab.commands.guard import print_json
from quantlab.recipe.load import bundled_recipes, json_schema
from quantlab.textfile import read_text


def run(*, schema: bool, as_json: bool) -> None:
    if schema:
        print_json(json_schema())
        return
    found = [
        {"name": name, "file": str(path), "about": about(path)} for name, path in bundled_recipes().items()
    ]
    if as_json:
        print_json(found)
        return
    width = max((len(item["name"]) for item in found), default=0)
    for item in found:
        print(f"{item['name']:<{width}}  {item['about']}")
    print("\nuse one by its name: quantlab quantize gptq-int4 --model embedded:base")
    print("                     quantlab distill distill-embedded   (distill-*, heal-*, book/*)")


def about(path: Path) -> str:
    """The first comment line after the command line at the head of a recipe."""
    lines = []
    for line in read_text(path).split("\n"):
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return lines[1] if len(lines) > 1 else ""
