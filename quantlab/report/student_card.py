"""The model card of a student: its README.md, in the form the Hugging Face hub reads.

Says what it was trained from, on which rows, by which recipe, what it scored against its base, and how to load it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from quantlab.models.provenance import provenance
from quantlab.paths import atomic_write_text
from quantlab.report.cells import accuracy, flipped, number

SNIPPET = """from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory
model = AutoModelForCausalLM.from_pretrained(path, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(path)
prompt = {prompt}
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=96)[0], skip_special_tokens=True))"""


def write_student_card(
    checkpoint: Path, row: Mapping[str, Any], before_after: Mapping[str, Any] | None
) -> Path:
    """Write `checkpoint/README.md` from its quantlab.json, the run's row and the comparison with the base."""
    made = provenance(checkpoint)
    path = checkpoint / "README.md"
    atomic_write_text(path, student_card(made, row, before_after))
    return path


def student_card(
    made: Mapping[str, Any], row: Mapping[str, Any], before_after: Mapping[str, Any] | None
) -> str:
    """The card's text."""
    recipe, parent = made["recipe"], str(made["parent"])
    mode = recipe["student"]["mode"]
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quantlab", "distilled", mode, *(["text-to-sql"] if before_after else [])],
    }
    if re.fullmatch(r"[\w.-]+/[\w.-]+", parent) and not parent.startswith("."):
        head |= {"base_model": parent, "base_model_relation": "finetune"}
    training, data = made["training"], made["data"]
    parts = [
        "---\n" + yaml.safe_dump(head, sort_keys=False).strip() + "\n---",
        f"# {parent.rstrip('/').split('/')[-1].split(':')[-1]}, {describe(recipe)}",
        f"Made by quantlab {made['quantlab_version']} from `{parent}` (digest `{made['parent_digest']}`).",
        "## Trained on",
        _data(data, recipe),
        f"{training['steps']:,} steps, {training['tokens']:,} tokens of which {training['learned']:,} are learned, "
        f"{training['trainable']:,} trained parameters, computed in {training['precision']}; last loss "
        f"{training['loss']:.4f}.",
        "## Measured",
        _measured(row, before_after),
        "## Recipe",
        "```yaml\n" + yaml.safe_dump(_shown(recipe), sort_keys=False, allow_unicode=True).strip() + "\n```",
        "## Use",
        _needs(made),
        "```python\n" + _snippet(recipe, data) + "\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def describe(recipe: Mapping[str, Any]) -> str:
    """`student by lora (r 64), sft`."""
    student = recipe["student"]
    words = f"student by {student['mode']}"
    if student["mode"] != "full":
        words += f" (r {student['lora']['r']})"
    return f"{words}, {recipe['train']['loss']}"


def _data(data: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    text = f"`{data['source']}`"
    if recipe.get("teacher"):
        text += f", answers by `{recipe['teacher']['model']}`"
    lines = [f"{text}: {data.get('examples', data.get('rows', 0)):,} examples."]
    if data.get("table"):
        lines.append("What cleaning took out:\n\n```\n" + data["table"] + "\n```")
    return "\n\n".join(lines)


def _measured(row: Mapping[str, Any], before_after: Mapping[str, Any] | None) -> str:
    cells = [
        ("Weight files", number(row.get("size_bytes"), "{:,.0f} bytes")),
        ("Perplexity", number(row.get("ppl"), "{:.3f}")),
        ("Perplexity against the base", number(row.get("ppl_ratio"), "{:.3f} times")),
        ("Text2SQL execution accuracy, % [95 %]", accuracy(row)),
        ("Text2SQL items lost and gained against the base", flipped(row)),
    ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells if value)]
    lines.append(f"\nRun `{row['run_id']}`, data digest `{row.get('data_digest')}`, on {row.get('device')}.")
    if before_after:
        lines.append("\n" + str(before_after["markdown"]))
    return "\n".join(lines)


def _shown(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in ("evaluate", "tasks", "sweep")}


def _needs(made: Mapping[str, Any]) -> str:
    if made["saved"]["merged"]:
        return "An ordinary model directory: transformers alone loads it."
    return (
        "The adapter lies beside the base's own weights: transformers loads both as one model when `peft` (and, for a "
        "quantized base, its library) is installed."
    )


def _snippet(recipe: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    if recipe["data"]["format"] == "text":
        return SNIPPET.partition("prompt = ")[0] + (
            'inputs = tokenizer("SELECT", return_tensors="pt").to(model.device)\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"
        )
    from quantlab.text2sql.prompt.template import bundled_template

    written = (data.get("prompt") or {}).get("example") or bundled_template("ko").example()
    plain = '"' not in written and "\\" not in written
    return SNIPPET.replace("{prompt}", f'"""{written}"""' if plain else repr(written))
