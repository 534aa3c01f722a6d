"""The reference pages, generated from the code: `python -m tools.docs.reference` writes them, `--check` compares.

Everything that a page says of a command, key, method, format, task, column, exit code or bundled recipe comes from
`sources`; the sentences around it are here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tools.docs import sources

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
MARK = "<!-- Generated from the code by `python -m tools.docs.reference`; edit there. -->\n\n"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        + "\n"
    )


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def commands() -> str:
    found = sources.commands()
    parts = [
        "# Commands\n\nThe text of every `--help`, and what each command is for. Exit codes are on "
        "[a page of their own](exit-codes.md).\n"
    ]
    for command in found:
        title = f"quantlab {command.name}".rstrip()
        parts.append(f"## `{title}`\n\n```text\n{command.help}\n```\n")
    return "\n".join(parts)


def _default(key: sources.Key) -> str:
    return code(key.default) if key.default or key.section else "required"


def _key_table(keys: Iterable[sources.Key]) -> str:
    rows = [(code(key.name), key.type, _default(key), key.meaning) for key in keys]
    return table(("key", "type", "default", "meaning"), rows)


def quantize_keys() -> str:
    every = [key for key in sources.keys("quantize") if not key.name.startswith("tasks.")]
    owners: dict[str, list[str]] = {}
    for method in sources.methods():
        for name in method.own:
            owners.setdefault(name, []).append(method.name)
    rows = []
    for key in every:
        users = owners.get(key.name.partition(".")[0])
        rows.append(
            (
                code(key.name),
                key.type,
                _default(key),
                key.meaning,
                ", ".join(users) if users else "all",
            )
        )
    return (
        "# Keys of quantize recipes\n\n"
        "`kind: quantize` and `method` are required. A key that the method does not have is refused. `bits`, "
        "`group_size`, `symmetric` and `format` depend on the method when left out: "
        "[Methods and formats](methods.md) has the values. Keys under `tasks` are the same for every kind of recipe: "
        "[Keys of tasks](recipe-tasks.md).\n\n"
        + table(("key", "type", "default", "meaning", "methods"), rows)
        + "\n`quantlab recipes --schema` prints the same as a JSON Schema, for editors.\n"
    )


def distill_keys() -> str:
    every = [key for key in sources.keys("distill") if not key.name.startswith("tasks.")]
    sections = [key for key in every if key.section and "." not in key.name and key.name != "tasks"]
    parts = [
        "# Keys of distill recipes\n\n"
        "`kind: distill` and `student.model` are required. `teacher` and `judge` are left out unless written; a "
        "section that is written takes the defaults below for what it does not name. Keys under `tasks` are the same "
        "for every kind of recipe: [Keys of tasks](recipe-tasks.md).\n"
    ]
    top = [key for key in every if "." not in key.name]
    parts.append("## Top level\n\n" + _key_table(top))
    for section in sections:
        inside = [key for key in every if key.name.startswith(f"{section.name}.")]
        parts.append(f"## `{section.name}`\n\n" + _key_table(inside))
    return "\n".join(parts)


def task_keys() -> str:
    inside = [key for key in sources.keys("evaluate") if key.name.startswith("tasks.")]
    top = [key for key in sources.keys("evaluate") if "." not in key.name]
    return (
        "# Keys of tasks\n\n"
        "How tasks measure, in every kind of recipe. `quantlab evaluate` has no recipe file: its `--set` takes these "
        "keys, for example `--set tasks.text2sql.limit=50`.\n\n## `kind: evaluate`\n\n"
        + _key_table(top)
        + "\n## `tasks`\n\n"
        + _key_table(inside)
    )


def methods() -> str:
    names = ("bits", "group_size", "symmetric", "format")
    rows = []
    for method in sources.methods():
        cells = [code(str(method.filled[name]).lower()) for name in names]
        own = ", ".join(code(name) for name in method.own if name not in names)
        choice = "no" if method.fixed else "yes"
        calibrates = "yes" if method.calibrated else "no"
        rows.append((code(method.name), method.meaning, calibrates, *cells, choice, own))
    formats = [
        (
            code(found.name),
            found.meaning,
            ", ".join(map(str, found.bits)),
            ", ".join(found.abilities),
            found.readers,
            found.expert_readers,
        )
        for found in sources.formats()
    ]
    return (
        "# Methods and formats\n\n## Methods\n\nThe values of `bits`, `group_size`, `symmetric` and `format` are what "
        "a recipe gets that names only the method; *choice* says whether it can name others.\n\n"
        + table(("method", "what it does", "calibrates", *names, "choice", "further keys"), rows)
        + "\nAWQ at a width other than 4 is written in the gptq format. `bits: auto` is for methods that calibrate, "
        "in a format with a width per layer. A mixture of experts is written as compressed-tensors unless the recipe "
        "names a format.\n\n## Formats\n\n"
        + table(
            ("format", "what it is", "bits", "also holds", "dense models", "mixtures of experts"), formats
        )
    )


def tasks() -> str:
    rows = [
        (code(task.name), task.meaning, ", ".join(map(code, task.columns)) or "in `run.json`")
        for task in sources.tasks()
    ]
    return (
        "# Tasks\n\nWhat `evaluate:` in a recipe and `--task` on the command line take. How each one measures is "
        "under [What is measured](../explanation/measures.md), its options under [Keys of tasks](recipe-tasks.md), its "
        "columns under [Columns of the leaderboard](leaderboard.md).\n\n"
        + table(("task", "what it measures", "columns"), rows)
    )


def leaderboard() -> str:
    rows = [(code(name), meaning) for name, meaning in sources.columns()]
    return (
        "# Columns of the leaderboard\n\n`leaderboard.csv` has one row per finished run and these columns, in this "
        "order; a cell is empty where nothing was measured. `quantlab leaderboard --sort COLUMN` ranks by any of "
        "them.\n\n" + table(("column", "meaning"), rows)
    )


def exit_codes() -> str:
    rows = [("0", "", "Done.")]
    rows += [(str(number), code(name), meaning) for number, name, meaning in sources.exit_codes()]
    return (
        "# Exit codes\n\nAn error message states the cause, the location, the expected value and the fix. `--debug` "
        "adds the traceback.\n\n" + table(("code", "error", "meaning"), rows)
    )


def recipes() -> str:
    parts = [
        "# Bundled recipes\n\nWhat heads each file under `recipes/`. Use one by its name: "
        "`quantlab quantize gptq-int4 --model MODEL`, `quantlab distill distill-embedded`. Any key can be overridden "
        "with `--set`.\n"
    ]
    for name, kind, head in sources.recipes():
        parts.append(f"## `{name}`\n\nkind: {kind}\n\n```text\n{head}\n```\n")
    return "\n".join(parts)


def architectures() -> str:
    """The sweep over every architecture (``python -m tests.zoo.sweep``)."""
    found = sources.architectures()
    right = {name: one for name, one in found.items() if one["verdict"] == "right"}
    rows = []
    for name, one in sorted(right.items()):
        errors = one["errors"]
        eight = ", ".join(f"{100 * errors[f'{m}-8']:.1f}" for m in ("rtn", "gptq", "awq"))
        four = ", ".join(f"{100 * errors[f'{m}-4']:.0f}" for m in ("rtn", "gptq", "awq"))
        kept = "; ".join(one["kept"])
        rows.append((code(name), one["formats"]["gptq-4"], f"{one['share']:.0%}", eight, four, kept))
    refused = {
        name: one["why"].partition(": ")[2] for name, one in found.items() if one["verdict"] == "refused"
    }
    head = (
        "model type",
        "format of gptq, 4 bits",
        "quantized",
        "error at 8 bits, %",
        "error at 4 bits, %",
        "in 16 bits",
    )
    parts = [
        "# Architectures",
        f"Every causal language model of transformers {sources.transformers_version()} that can be made tiny: random "
        "weights, hidden size 128, two blocks, all else as its class has it. Each was quantized by rtn, gptq and awq "
        "at 8 and at 4 bits, in groups of 32 where these fit, with nothing else said, and read back by plain "
        f"transformers. **{len(right)} are read back right, {len(refused)} are refused in one line before any work, "
        "none is wrong.**",
        "Right means: at 8 bits the logits differ by less than 3 % from the original's, and at 4 bits gptq and awq "
        "come closer to them than rtn does on the calibration rows. Of mixtures those tokens are compared that go to "
        "the same experts. How good a format is these random models do not say; whether it is read right they do. "
        "`python -m tests.zoo.sweep --out results/architectures.json` repeats it; `quantlab doctor --model MODEL` says "
        "the same of a model at hand.",
        table(head, rows).rstrip(),
        "Errors are those of rtn, gptq, awq. Quantized: the share of all parameters; a tiny model is half embeddings.",
        "## Refused",
        table(("model type", "why"), [(code(name), why) for name, why in sorted(refused.items())]).rstrip(),
        "Models that see (Gemma 3, Qwen2.5-VL, Mistral 3, Llava) have tests of their own: their language model is "
        "quantized, everything else carried over byte for byte.",
    ]
    return "\n\n".join(parts) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands,
    "recipe-quantize.md": quantize_keys,
    "recipe-distill.md": distill_keys,
    "recipe-tasks.md": task_keys,
    "methods.md": methods,
    "tasks.md": tasks,
    "leaderboard.md": leaderboard,
    "exit-codes.md": exit_codes,
    "recipes.md": recipes,
    "architectures.md": architectures,
}


def pages() -> dict[str, str]:
    """File name → text of every generated page."""
    return {name: MARK + make().rstrip() + "\n" for name, make in PAGES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    stale = []
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        path = FOLDER / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text, encoding="utf-8")
    if check and stale:
        sys.exit("stale: " + ", ".join(stale) + "; run python -m tools.docs.reference")
    print("up to date" if not stale else "written: " + ", ".join(stale))


if __name__ == "__main__":
    main()
