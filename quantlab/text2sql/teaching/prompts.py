"""What teachers and judges are asked: versioned template files, and the requests made from them.

Three tasks, each in Korean and English, in `templates/<task>.<language>.yaml`:

    answer   DDL and a question → one SQL statement
    write    DDL and a level → new questions with their SQL, as JSON
    judge    DDL, a question and a query → does it answer, and why, as JSON

A template names its data with `{context}`, `{question}`, …; only those names are replaced, in one pass, so braces
in DDL stay what they are and inserted text is never read as a template. Data stands between tags such as
`<ddl>…</ddl>`, which the system prompt declares to be data; a closing tag inside the data is defused. What a row may
lack (`OPTIONAL`) has a block of its own in the user prompt and may have a note in the system prompt (`notes`): without
it the messages are, to the byte, those of a template that does not know it.
`Prompt.record` goes into results: version and digest say which wording produced an answer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from quantlab.errors import DataError
from quantlab.paths import PACKAGE
from quantlab.teacher.ledger import Request
from quantlab.text2sql.extraction.extract import extract
from quantlab.textfile import read_text

Task = Literal["answer", "write", "judge"]
Language = Literal["ko", "en"]

TEMPLATES = PACKAGE / "text2sql" / "teaching" / "templates"
# What each task's user template must name, and what it may leave empty.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "answer": ("context", "question", "evidence"),
    "write": ("context", "examples", "count", "level", "topic", "variation"),
    "judge": ("context", "question", "evidence", "sql", "reference"),
}
OPTIONAL = ("evidence", "examples", "reference")
LEVELS = ("easy", "medium", "hard")
MAX_ANSWER = 200_000  # characters of a reply that are looked at

_PLACEHOLDER = re.compile(r"\{([a-z]+)\}")
_CLOSING_TAG = re.compile(r"<(?=/(?:ddl|question|sql|reference|examples)\b)", re.IGNORECASE)
# a tag where there is evidence, else only text
_CLOSING_EVIDENCE = re.compile(r"<(?=/evidence\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """One template. `schema` is the JSON schema of the reply; `levels` and `topics` are for writing."""

    task: str
    language: str
    version: int
    system: str
    user: str
    schema: Mapping[str, Any] | None = None
    blocks: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    levels: Mapping[str, str] = field(default_factory=dict)
    topics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    digest: str = ""

    @property
    def record(self) -> dict[str, Any]:
        """What a result says about its prompt."""
        return {
            "task": self.task,
            "language": self.language,
            "version": self.version,
            "digest": self.digest,
        }


@functools.lru_cache(maxsize=16)
def load_prompt(task: str, language: str) -> Prompt:
    """The bundled template of `task` in `language`; DataError for one that does not exist or lacks something."""
    path = TEMPLATES / f"{task}.{language}.yaml"
    if task not in FIELDS or not path.is_file():
        known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.yaml")))
        raise DataError(f"no prompt for task {task!r} in language {language!r}", hint=f"there are {known}")
    text = read_text(path)
    return parse_prompt(text, task, language, path.name)


def parse_prompt(text: str, task: str, language: str, name: str) -> Prompt:
    """A template file's text as a Prompt; every complaint opens with `name`."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{name}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{name}: expected keys version, system, user")
    for key, kind in (("version", int), ("system", str), ("user", str)):
        if not isinstance(content.get(key), kind):
            raise DataError(f"{name}: {key!r} must be {'a number' if kind is int else 'text'}")
    blocks = dict(content.get("blocks") or {})
    named = set(_PLACEHOLDER.findall(content["user"]))
    if named != set(FIELDS[task]):
        wrong = ", ".join(sorted(named ^ set(FIELDS[task])))
        raise DataError(f"{name}: missing or unknown placeholders in user: {wrong}")
    notes = dict(content.get("notes") or {})
    named = set(_PLACEHOLDER.findall(content["system"]))
    if named != set(notes) or not named <= set(FIELDS[task]) & set(OPTIONAL):
        wrong = ", ".join(sorted(named ^ set(notes) or named))
        raise DataError(f"{name}: placeholders in system and notes must be the same, and optional: {wrong}")
    levels, topics = dict(content.get("levels") or {}), dict(content.get("topics") or {})
    if task == "write" and not all(levels.get(level) and topics.get(level) for level in LEVELS):
        raise DataError(f"{name}: levels and topics must be given for {', '.join(LEVELS)}")
    if task != "answer" and not isinstance(content.get("schema"), dict):
        raise DataError(f"{name}: no schema of the reply")
    return Prompt(
        task=task,
        language=language,
        version=content["version"],
        system=content["system"].strip(),
        user=content["user"].strip(),
        schema=content.get("schema"),
        blocks=blocks,
        notes=notes,
        levels=levels,
        topics={level: tuple(lines) for level, lines in topics.items()},
        digest=hashlib.sha256(text.encode("utf-8")).hexdigest()[:16],
    )


def fill(prompt: Prompt, values: Mapping[str, str]) -> tuple[Mapping[str, str], ...]:
    """The two messages of a request. An optional field that is empty takes its block and its note away."""
    tagged = bool(values.get("evidence"))
    shown = {name: _as_data(value, tagged) for name, value in values.items()}

    def text(name: str) -> str:
        value = shown[name]
        if name not in OPTIONAL:
            return value
        block = prompt.blocks.get(name, f"{{{name}}}")
        return block.replace(f"{{{name}}}", value).rstrip() + "\n" if value else ""

    user = _PLACEHOLDER.sub(lambda match: text(match[1]) if match[1] in shown else match[0], prompt.user)
    return {"role": "system", "content": _system(prompt, shown)}, {"role": "user", "content": user}


def _system(prompt: Prompt, shown: Mapping[str, str]) -> str:
    """The system prompt with the notes on those optional fields that are there; others take their line along."""
    text = prompt.system
    for name, note in prompt.notes.items():
        text = text.replace(f"{{{name}}}\n", f"{note.strip()}\n" if shown.get(name) else "")
    return text


def answer_request(
    prompt: Prompt,
    context: str,
    question: str,
    *,
    evidence: str = "",
    max_tokens: int = 512,
    temperature: float = 0.0,
    label: str = "",
) -> Request:
    """Ask for the SQL that answers `question` on the tables of `context` (DDL); `evidence` is what one must know."""
    values = {"context": context, "question": question, "evidence": evidence.strip()}
    parameters = _parameters(prompt, max_tokens, temperature)
    return Request(fill(prompt, values), parameters, label, question, evidence.strip())


def judge_request(
    prompt: Prompt,
    context: str,
    question: str,
    sql: str,
    *,
    evidence: str = "",
    reference: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    structured: bool = True,
    label: str = "",
) -> Request:
    """Ask whether `sql` answers `question`; `reference` is a query known to be right, where there is one."""
    values = {
        "context": context,
        "question": question,
        "evidence": evidence.strip(),
        "sql": sql,
        "reference": reference or "",
    }
    parameters = _parameters(prompt, max_tokens, temperature, structured)
    return Request(fill(prompt, values), parameters, label, question, evidence.strip())


def write_request(
    prompt: Prompt,
    context: str,
    level: str,
    count: int,
    *,
    topic: str,
    variation: int,
    examples: Sequence[tuple[str, str]] = (),
    max_tokens: int = 2048,
    temperature: float = 0.0,
    structured: bool = True,
    label: str = "",
) -> Request:
    """Ask for `count` new pairs of `level`; `topic` and `variation` make requests on the same tables differ."""
    if level not in prompt.levels:
        raise ValueError(f"no level {level!r} in {prompt.task}.{prompt.language}: {', '.join(prompt.levels)}")
    shown = "\n".join(
        json.dumps({"question": asked, "sql": sql}, ensure_ascii=False) for asked, sql in examples
    )
    values = {
        "context": context,
        "examples": shown,
        "count": str(count),
        "level": prompt.levels[level],
        "topic": topic,
        "variation": str(variation),
    }
    return Request(fill(prompt, values), _parameters(prompt, max_tokens, temperature, structured), label)


def parse_answer(text: str) -> str | None:
    """The first SQL statement of a reply, whatever stands around it; None where there is none."""
    return extract(text[:MAX_ANSWER]).statement or None


def _parameters(
    prompt: Prompt, max_tokens: int, temperature: float, structured: bool = True
) -> dict[str, Any]:
    parameters: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    if prompt.schema is not None and structured:
        schema = {"name": prompt.task, "strict": True, "schema": dict(prompt.schema)}
        parameters["response_format"] = {"type": "json_schema", "json_schema": schema}
    return parameters


def _as_data(text: str, beside_evidence: bool) -> str:
    """Stripped, encodable, and unable to end the tag it stands in."""
    clean = text.encode("utf-8", "replace").decode("utf-8").replace("\x00", " ")
    if beside_evidence:
        clean = _CLOSING_EVIDENCE.sub("< ", clean)
    return _CLOSING_TAG.sub("< ", clean).strip("\n ")
