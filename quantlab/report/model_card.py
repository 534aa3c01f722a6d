"""The model card of a checkpoint: its README.md, in the form the Hugging Face hub reads.

Says what the checkpoint was made from and how (from `quantlab.json`), what it scored (from the run's row, when there
is one), and how to load it with transformers alone. A checkpoint that was converted from another layout says so, and
has a recipe only where quantlab made the one that it was converted from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quantlab.models.provenance import provenance
from quantlab.paths import atomic_write_text, slug
from quantlab.quant.selection import alike
from quantlab.registry.formats import Readers, readers
from quantlab.registry.tasks import task_columns
from quantlab.report.cells import cell_of, conditions_of, number


def write_model_card(checkpoint: Path, row: Mapping[str, Any] | None) -> Path | None:
    """Write `checkpoint/README.md` from its quantlab.json and the run's row; nothing without a quantlab.json."""
    made = provenance(checkpoint)
    if not made:
        return None
    path = checkpoint / "README.md"
    if row is None and path.exists():
        return path  # made without measuring: keep the card that has numbers
    atomic_write_text(path, model_card(made, row))
    return path


def model_card(made: Mapping[str, Any], row: Mapping[str, Any] | None) -> str:
    """The card's text. `made` is quantlab.json's content, `row` a row of the leaderboard."""
    parent, converted = str(made["parent"]), list(made.get("converted") or [])
    recipe = made["recipe"] if "recipe" in made or not converted else {"method": converted[0]["from_format"]}
    layout = converted[-1]["to"] if converted else recipe.get("format", "bitsandbytes")
    kind = converted[-1]["type"] if converted else recipe.get("type")
    head: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["quantlab", "quantized", recipe["method"]],
    }
    if re.fullmatch(r"[\w.-]+/[\w.-]+", parent) and not parent.startswith("."):
        head |= {"base_model": parent, "base_model_relation": "quantized"}
    parts = [
        "---\n" + yaml.safe_dump(head, sort_keys=False).strip() + "\n---",
        f"# {parent.rstrip('/').split('/')[-1]}, {describe(recipe)}",
        f"Made by quantlab {made['quantlab_version']} from `{parent}` (digest `{made['parent_digest']}`).",
        *map(_converted, converted),
    ]
    if "recipe" in made:
        written = yaml.safe_dump(_without_measurements(recipe), sort_keys=False).strip()
        parts += ["## Recipe", f"```yaml\n{written}\n```"]
    if made.get("calibration"):
        calibration = made["calibration"]
        parts.append(
            f"Filled by the importance matrix `{calibration['imatrix']}` (digest `{calibration['digest']}`)."
            if "imatrix" in calibration
            else f"Calibrated on {calibration.get('rows')} rows of {calibration.get('seq_len')} tokens of "
            f"`{calibration.get('source')}` (digest `{calibration.get('digest')}`)."
        )
    if made.get("kept"):
        parts += ["## Layers that stay in 16 bits", _kept(made["kept"])]
    if row is not None:
        parts += ["## Measured", _measured(row)]
    who = readers(layout, str(made.get("experts_unread", "merged" if made.get("experts") else "")))
    install = f"```sh\npip install {' '.join(who.install)}\n```"
    parts += ["## Use", f"{who.text[0].upper()}{who.text[1:]}."]
    if layout == "gguf":
        parts += ["```sh\n" + _commands(str(kind), parent) + "\n```"]
    parts += [install, "```python\n" + _snippet(who, sees=bool(made.get("sees"))) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _converted(step: Mapping[str, Any]) -> str:
    """A sentence on a conversion."""
    how = (
        "without quantizing again: every weight is as it was"
        if step["exact"]
        else f"without quantizing again; scales and minima are off by up to {step['largest_error']:.2g} of their value"
    )
    return (
        f"Converted from {step['from_format']} to {step['to']} by quantlab {step['quantlab_version']} {how}. Source: "
        f"`{step['from']}` (digest `{step['digest']}`)."
    )


def _commands(kind: str, parent: str) -> str:
    """How llama.cpp and Ollama run the file, from its directory."""
    name = slug(f"{parent.rstrip('/').split('/')[-1]}-{kind}").lower()
    return "\n".join(
        [
            f"llama-server -m model-{kind}.gguf",
            f"ollama create {name} -f Modelfile && ollama run {name}",
        ]
    )


def _kept(kept: Mapping[str, str]) -> str:
    """A line for each kind of name and reason, with how many there are."""
    return "\n".join(f"- `{name}` ({count}): {why}" for (name, why), count in alike(kept).items())


def describe(recipe: Mapping[str, Any]) -> str:
    """`gptq, 4 bits, groups of 128`."""
    words = [str(recipe["method"])]
    if recipe.get("type"):
        words.append(str(recipe["type"]))
    elif "bits" in recipe:
        words.append(f"{recipe['bits']} bits")
        words.append("per channel" if recipe["group_size"] == -1 else f"groups of {recipe['group_size']}")
    if recipe.get("double_quant"):
        words.append("double quantization")
    return ", ".join(words)


def _without_measurements(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in ("evaluate", "tasks")}


def _measured(row: Mapping[str, Any]) -> str:
    cells = [
        ("Weight files", number(row.get("size_bytes"), "{:,.0f} bytes")),
        ("Bits per weight", number(row.get("bits_per_weight"), "{:.2f}")),
        *((c.card, _on(cell_of(c, card=True)(row), conditions_of(c, row))) for c in task_columns() if c.card),
    ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells if value)]
    lines.append(f"\nRun `{row['run_id']}`, data digest `{row.get('data_digest')}`, on {row.get('device')}.")
    return "\n".join(lines)


def _on(value: str, conditions: Sequence[str]) -> str:
    """A number with the text and the protocol that it was measured by."""
    said = ", ".join(f"`{condition}`" for condition in conditions)
    return f"{value} ({said})" if value and said else value


def _snippet(who: Readers, *, sees: bool = False) -> str:
    if who.right[0] == "quantlab":
        return "\n".join(
            [
                "from quantlab.models.load import load_model",
                "",
                'model = load_model(".").model  # this directory',
            ]
        )
    if who.right[0] == "llama.cpp":
        return "\n".join(
            [
                "from pathlib import Path",
                "",
                "from llama_cpp import Llama",
                "",
                'model = Llama(str(next(Path().glob("*.gguf"))))  # in this directory',
                'print(model("SELECT", max_tokens=20)["choices"][0]["text"])',
            ]
        )
    if "transformers" not in who.right:
        return "\n".join(
            ["from gptqmodel import GPTQModel", "", 'model = GPTQModel.load(".")  # this directory'],
        )
    opener = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    return "\n".join(
        [
            f"from transformers import {opener}, AutoTokenizer",
            "",
            'path = "."  # this directory',
            f'model = {opener}.from_pretrained(path, device_map="auto")',
            "tokenizer = AutoTokenizer.from_pretrained(path)",
            'inputs = tokenizer("SELECT", return_tensors="pt").to(model.device)',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
        ]
    )
