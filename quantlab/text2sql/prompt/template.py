"""The wording of the Text2SQL prompt: two that are bundled, Korean and English, and files of a user's own.

A template is a YAML file with these parts; `{name}` is replaced, in one pass, so that what is put in is never read as a
template; `{{` and `}}` are braces:

    instruction   what is asked for; may be empty
    schema        the tables, at {schema}
    question      at {question}
    evidence      at {evidence}; a line behind the question, only where a row has evidence
    answer        what the model's statement follows
    description   a line behind the DDL: {description} of {column} of {table}; with `descriptions: true`
    values        a line behind the DDL: some {values} of {column} of {table}; with `values: n`
    version       a number, for people

The first, second, third and fifth are joined by blank lines, and the answer begins on the line after the last one. What
is left out of `evidence`, `description` and `values` is as in the bundled templates.

Which of the bundled ones is taken (`language: auto`) is decided by a data set's questions: Korean where at least
`KOREAN_SHARE` of their letters are Hangul. Table names and values in Latin letters stand in Korean questions, and
Korean values in English ones, so neither all nor none is asked for."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantlab.errors import DataError, RecipeError
from quantlab.paths import PACKAGE, find_source, nearest
from quantlab.recipe.yaml_errors import Places, read_mapping
from quantlab.textfile import read_text

TEMPLATES = PACKAGE / "text2sql" / "prompt" / "templates"
# Placeholders of each part: those that it must have.
PARTS: Mapping[str, tuple[str, ...]] = {
    "instruction": (),
    "schema": ("schema",),
    "question": ("question",),
    "evidence": ("evidence",),
    "answer": (),
    "description": ("table", "column", "description"),
    "values": ("table", "column", "values"),
}
REQUIRED = ("instruction", "schema", "question", "answer")
MAX_FILE = 64 * 1024  # bytes
MAX_PART = 16 * 1024  # characters
KOREAN_SHARE = 0.25
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w*)\}|[{}]")


@dataclass(frozen=True)
class Template:
    """One wording. `name` is what a run's record calls it."""

    name: str
    instruction: str
    schema: str
    question: str
    evidence: str
    answer: str
    description: str
    values: str

    @property
    def digest(self) -> str:
        """16 hexadecimal characters for its parts."""
        parts = json.dumps([getattr(self, part) for part in PARTS], ensure_ascii=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def write(self, context: str, question: str, evidence: str = "") -> str:
        """Everything that stands before the answer, ending in a newline: the answer's first token follows directly."""
        asked = fill(self.question, question=question.strip())
        if evidence.strip():
            asked += "\n" + fill(self.evidence, evidence=evidence.strip())
        parts = [fill(self.instruction), fill(self.schema, schema=context.strip()), asked, fill(self.answer)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def example(self) -> str:
        """The prompt of a small question, for people; in Korean where the instruction is."""
        korean = hangul_share([self.instruction]) >= KOREAN_SHARE
        question = "책 제목을 모두 보여줘" if korean else "Show the titles of all books"
        return self.write("CREATE TABLE books (book_id INTEGER PRIMARY KEY, title VARCHAR(100));", question)


def fill(part: str, **values: str) -> str:
    """`part` with its placeholders replaced, in one pass."""
    return _PLACEHOLDER.sub(lambda found: values[found[1]] if found[1] is not None else found[0][0], part)


def read_template(path: Path, name: str = "") -> Template:
    """The template in a file; `name` instead of the file's and its digest.

    Raises:
        DataError: names the file, the line and the key that is wrong.
    """
    if path.stat().st_size > MAX_FILE:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes; a prompt template has at most {MAX_FILE:,}")
    text = read_text(path)
    try:
        # They could stand for more than any memory holds.
        if alias := next((one for one in yaml.scan(text) if isinstance(one, yaml.AliasToken)), None):
            raise DataError(f"{path}:{alias.start_mark.line + 1}: an alias; write the text out")
        content, places = read_mapping(text, str(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise DataError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except RecipeError as error:
        raise DataError(str(error), hint=f"a template has the keys {', '.join(PARTS)}") from None
    _check(content, places)
    bundled = bundled_template("ko") if not name else None
    parts = {part: _text(content.get(part), getattr(bundled, part, "")) for part in PARTS}
    found = Template(name or path.name, **parts)
    return found if name else Template(f"{path.name}#{found.digest[:8]}", **parts)


def _text(value: Any, otherwise: str) -> str:
    """A part without the newlines around it: what stands between parts is not theirs to say."""
    return value.strip("\n") if isinstance(value, str) else otherwise


def _check(content: Mapping[str, Any], places: Places) -> None:
    for key in content:
        if key not in PARTS and key != "version":
            near = nearest(str(key), [*PARTS, "version"])
            said = f"; did you mean {near!r}?" if near else f"; keys here: {', '.join([*PARTS, 'version'])}"
            raise DataError(f"{places.say((key,))}{key}: unknown key{said}")
    missing = [key for key in REQUIRED if key not in content]
    if missing:
        raise DataError(
            f"{places.say(())}{', '.join(missing)}: missing", hint=f"needed: {', '.join(REQUIRED)}"
        )
    version = content.get("version", 1)
    if not isinstance(version, int) or isinstance(version, bool):
        raise DataError(f"{places.say(('version',))}version: expected a whole number, found {version!r}")
    for key, value in content.items():
        if key != "version":
            _check_part(key, value, places.say((key,)))


def _check_part(key: str, value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where}{key}: expected text, found {type(value).__name__}")
    if not value.strip() and key != "instruction":
        raise DataError(f"{where}{key}: is empty")
    if len(value) > MAX_PART:
        raise DataError(f"{where}{key}: {len(value):,} characters; a part has at most {MAX_PART:,}")
    if bad := next((char for char in value if ord(char) < 32 and char not in "\n\t"), None):
        raise DataError(f"{where}{key}: control character {bad!r}")
    if key in ("description", "values") and "\n" in value.strip("\n"):
        raise DataError(f"{where}{key}: must be one line", hint="it is written for every column")
    used = []
    for found in _PLACEHOLDER.finditer(value):
        if found[0] in ("{", "}"):
            raise DataError(f"{where}{key}: a single {found[0]!r}", hint="write {{ and }} for braces")
        if found[1] is not None:
            used.append(found[1])
    known = PARTS[key]
    for name in used:
        if name not in known:
            takes = f"it takes {', '.join(f'{{{one}}}' for one in known)}" if known else "it takes none"
            raise DataError(
                f"{where}{key}: unknown placeholder {{{name}}}", hint=f"{takes}; {{{{ for a brace"
            )
    if lacking := [name for name in known if name not in used]:
        raise DataError(f"{where}{key}: lacks the placeholder {', '.join(f'{{{name}}}' for name in lacking)}")


@functools.cache
def bundled_template(language: str) -> Template:
    """The bundled template, "ko" or "en", called `ko-1` by its version."""
    path = TEMPLATES / f"{language}.yaml"
    version = read_mapping(read_text(path), str(path))[0]["version"]
    return read_template(path, f"{language}-{version}")


def choose_template(language: str, file: str | None, questions: Iterable[str]) -> Template:
    """The template of a data set with these questions. DataError: `file` is wrong or not there."""
    if file is not None:
        path = find_source(file)
        if not path.is_file():
            raise DataError(f"tasks.text2sql.prompt.file: {path} is no file")
        return read_template(path)
    if language == "auto":
        language = "ko" if hangul_share(questions) >= KOREAN_SHARE else "en"
    return bundled_template(language)


def hangul_share(texts: Iterable[str]) -> float:
    """Share of the letters of `texts` that are Hangul (syllables and jamo); 0 where there are no letters."""
    hangul = letters = 0
    for text in texts:
        for char in text:
            if char.isalpha():
                letters += 1
                hangul += "가" <= char <= "힣" or "\u1100" <= char <= "\u11ff" or "\u3130" <= char <= "\u318f"
    return hangul / letters if letters else 0.0
