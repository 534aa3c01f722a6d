"""The documentation says what the code has: every command, option, key, column, recipe and file, no broken link.

Each check is a function on texts, and each is shown to fail on a planted fault.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from tools.docs import picture, reference, sources

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def texts() -> dict[str, str]:
    """Path from the root → text of every page, the READMEs and CONTRIBUTING."""
    found = [*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "README.ko.md", "CONTRIBUTING.md"))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in found}


# The reference


def committed() -> dict[str, str]:
    return {name: (DOCS / "reference" / name).read_text(encoding="utf-8") for name in reference.PAGES}


def stale(pages: Mapping[str, str], folder: Mapping[str, str]) -> list[str]:
    """Pages of `folder` that are not what the code says now."""
    return [name for name, text in pages.items() if folder.get(name) != text]


def test_the_reference_is_what_the_code_says() -> None:
    assert stale(reference.pages(), committed()) == [], "run python -m tools.docs.reference"


def test_the_picture_is_what_the_leaderboard_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "ROOT", tmp_path)
    monkeypatch.setattr(picture, "PICTURE", tmp_path / "leaderboard.svg")
    picture.main()
    assert (tmp_path / "leaderboard.svg").read_text(encoding="utf-8") == (
        DOCS / "assets" / "leaderboard.svg"
    ).read_text(encoding="utf-8"), "run python -m tools.docs.picture"


def missing_names(folder: Mapping[str, str]) -> list[str]:
    """Names that the code has and the reference does not mention."""
    wanted: list[tuple[str, str]] = []
    for command in sources.commands():
        wanted.append(("commands.md", f"## `{f'quantlab {command.name}'.rstrip()}`"))
        wanted += [("commands.md", option) for option in command.options]
    for kind in sources.kinds():
        page = {"evaluate": "tasks"}.get(kind, kind)
        for key in sources.keys(kind):
            wanted.append(
                ("recipe-tasks.md" if key.name.startswith("tasks.") else f"recipe-{page}.md", f"`{key.name}`")
            )
    wanted += [("leaderboard.md", f"`{name}`") for name, _ in sources.columns()]
    wanted += [("recipes.md", f"## `{name}`") for name, _, _ in sources.recipes()]
    wanted += [("methods.md", f"`{method.name}`") for method in sources.methods()]
    wanted += [("methods.md", f"`{found.name}`") for found in sources.formats()]
    wanted += [("tasks.md", f"`{task.name}`") for task in sources.tasks()]
    return [f"{page}: {name}" for page, name in wanted if name not in folder[page]]


def test_every_name_of_the_code_is_in_the_reference() -> None:
    assert missing_names(committed()) == []


def test_every_name_has_a_meaning() -> None:
    silent = [
        f"{kind}: {key.name}" for kind in sources.kinds() for key in sources.keys(kind) if not key.meaning
    ]
    silent += [f"column {name}" for name, meaning in sources.columns() if not meaning]
    silent += [f"method {method.name}" for method in sources.methods() if not method.meaning]
    silent += [f"format {found.name}" for found in sources.formats() if not found.meaning]
    silent += [f"task {task.name}" for task in sources.tasks() if not task.meaning]
    assert silent == []


def test_a_planted_option_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantlab import cli

    planted = typer.Typer(name="quantlab", rich_markup_mode=None, help=cli.app.info.help)
    planted.registered_commands = list(cli.app.registered_commands)
    planted.registered_callback = cli.app.registered_callback

    @planted.command()
    def polish(gloss: Annotated[int, typer.Option("--gloss", help="How much.")] = 1) -> None:
        """Shine."""

    monkeypatch.setattr(cli, "app", planted)
    before = committed()
    assert {"commands.md: ## `quantlab polish`", "commands.md: --gloss"} <= set(missing_names(before))
    assert "commands.md" in stale(reference.pages(), before)


def test_a_planted_key_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = sources.json_schema()
    schema["$defs"]["Train"]["properties"]["sparkle"] = {"type": "boolean", "default": False}
    monkeypatch.setattr(sources, "json_schema", lambda: schema)
    before = committed()
    assert "recipe-distill.md: `train.sparkle`" in missing_names(before)
    assert "recipe-distill.md" in stale(reference.pages(), before)
    with pytest.raises(AssertionError, match=r"train\.sparkle"):
        test_every_name_has_a_meaning()


@pytest.mark.parametrize(
    ("function", "value", "named"),
    [
        ("columns", [("shine", "")], "leaderboard.md: `shine`"),
        ("recipes", [("gloss", "quantize", "quantlab quantize gloss")], "recipes.md: ## `gloss`"),
        ("tasks", [sources.Task("glitter", "", ())], "tasks.md: `glitter`"),
    ],
)
def test_a_planted_name_is_found(
    monkeypatch: pytest.MonkeyPatch, function: str, value: list[Any], named: str
) -> None:
    real: Callable[[], list[Any]] = getattr(sources, function)
    found = real() + value
    monkeypatch.setattr(sources, function, lambda: found)
    assert named in missing_names(committed())
    assert stale(reference.pages(), committed())


def test_a_changed_help_text_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantlab import cli

    command = next(c for c in cli.app.registered_commands if c.callback and c.callback.__name__ == "doctor")
    monkeypatch.setattr(command, "help", "Something else.")
    assert "commands.md" in stale(reference.pages(), committed())


# Links


def anchors(text: str) -> set[str]:
    """Anchors of the headings of a page, as GitHub and mkdocs make them of plain words."""
    found = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        plain = re.sub(r"[^\w\- ]", "", heading.lower().replace("`", ""))
        found.add(re.sub(r"\s+", "-", plain.strip()))
    return found


def broken_links(pages: Mapping[str, str], exists: Callable[[Path], bool]) -> list[str]:
    """Relative links that lead nowhere; `pages` have paths from the root."""
    found = []
    for page, text in pages.items():
        for target in LINK.findall(FENCE.sub("", text)):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            path = Path(_normal((Path(page).parent / name).as_posix())) if name else Path(page)
            inside = page.startswith("docs/") and not str(path).startswith("docs/")
            if (
                inside
                or not exists(path)
                or (anchor and str(path) in pages and anchor not in anchors(pages[str(path)]))
            ):
                found.append(f"{page}: {target}")
    return found


def _normal(path: str) -> str:
    parts: list[str] = []
    for part in path.split("/"):
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def test_no_link_is_broken() -> None:
    assert broken_links(texts(), lambda path: (ROOT / path).exists()) == []


@pytest.mark.parametrize(
    "planted",
    ["[x](nowhere.md)", "[x](../README.md)", "[x](numbers.md#no-such-heading)", "![x](assets/no.svg)"],
)
def test_a_planted_broken_link_is_found(planted: str) -> None:
    pages = texts() | {"docs/index.md": planted}
    assert broken_links(pages, lambda path: (ROOT / path).exists()) == [
        f"docs/index.md: {planted.partition('(')[2][:-1]}"
    ]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r": ([\w/-]+\.md)$", navigation, re.MULTILINE)
    pages = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    assert sorted(named) == pages


# The start pages


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_a_start_page_is_short(name: str) -> None:
    assert len(texts()[name].splitlines()) <= 200


def flags(text: str) -> set[str]:
    """Options of quantlab that code blocks of a page use."""
    found = set()
    for block in FENCE.findall(text):
        joined = block.replace("\\\n", " ")
        for line in joined.split("\n"):
            command = re.search(r"\bquantlab (\w+)(.*)", line.partition(" #")[0])
            if command:
                found |= {
                    f"{command.group(1)} {flag}" for flag in re.findall(r"(?<= )--[a-z-]+", command.group(2))
                }
    return found


def known_flags() -> set[str]:
    return {f"{command.name} {option}" for command in sources.commands() for option in command.options}


def test_every_command_in_the_pages_has_the_options_that_are_shown() -> None:
    known = known_flags()
    assert {f"{page}: {flag}" for page, text in texts().items() for flag in flags(text) - known} == set()
    assert flags("```\nquantlab quantize a --model b \\\n    --nonsense 1\n```") - known == {
        "quantize --nonsense"
    }


def unknown_sets(text: str, keys: set[str]) -> set[str]:
    """Keys of `--set` in a page that no recipe has."""
    named = set(re.findall(r"--set '?([a-z_][\w.]*)=", text))
    return {name for name in named if name not in keys}


def test_every_key_that_is_set_in_the_pages_exists() -> None:
    keys = {key.name for kind in sources.kinds() for key in sources.keys(kind)}
    assert {f"{page}: {name}" for page, text in texts().items() for name in unknown_sets(text, keys)} == set()
    assert unknown_sets("--set train.sparkle=1 --set bits=3", keys) == {"train.sparkle"}


# The architecture page


def described(text: str) -> list[str]:
    return re.findall(r"^- `((?:quantlab|tools)/[\w/.]+\.py)`: \S", text, re.MULTILINE)


def files() -> list[str]:
    found: Iterable[Path] = (path for top in ("quantlab", "tools") for path in (ROOT / top).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def differences(text: str, present: Iterable[str]) -> dict[str, list[str]]:
    """Files without a line, lines without a file, files with several lines."""
    named, present = described(text), set(present)
    return {
        "not described": sorted(present - set(named)),
        "not there": sorted(set(named) - present),
        "twice": sorted(name for name, count in Counter(named).items() if count > 1),
    }


def test_every_file_has_its_line_in_the_architecture() -> None:
    assert not any(differences(texts()["docs/architecture.md"], files()).values()), differences(
        texts()["docs/architecture.md"], files()
    )


def test_a_planted_file_is_found() -> None:
    text = (
        "- `quantlab/cli.py`: x\n- `quantlab/gone.py`: x\n- `quantlab/cli.py`: again\nsee `quantlab/new.py`\n"
    )
    assert differences(text, ["quantlab/cli.py", "quantlab/new.py"]) == {
        "not described": ["quantlab/new.py"],
        "not there": ["quantlab/gone.py"],
        "twice": ["quantlab/cli.py"],
    }


def test_the_site_fetches_nothing() -> None:
    """No font, script, style or plugin from elsewhere."""
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings and "http" not in settings
    assert not re.search(r"^ *- (social|privacy|git-|offline)", settings, re.MULTILINE)
