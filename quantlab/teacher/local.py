"""Teachers on this machine: `hf:<model>`, a model that transformers opens, and `file:<answers.jsonl>`.

A model answers greedily, in batches of similar length; the chat template of its tokenizer is used where there is
one, otherwise the messages' contents stand one after the other, a blank line between them (a base model goes on
from there). A file holds recorded answers, one JSON object a line, in either of two forms:

    {"key": "<hash of the messages>", "text": "..."}          what `Ledger.export` writes
    {"question": "...", "answer": "SELECT ...", "context": "..."}   Text2SQL rows; context may be left out

The first is found by the messages alone, whatever model was asked; the second by `Request.question` and its evidence (a
row without evidence answers whatever the evidence is, where no row has the same), and by the context being part of the
messages where several rows are left. Both kinds of teacher write to the same ledger,
at no cost. The key holds a digest of the file or of the weights: a changed file answers anew.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.paths import file_digest, find_source
from quantlab.recipe.distill import Endpoint
from quantlab.teacher.ledger import Answer, Ledger, Request, content_key
from quantlab.textfile import json_lines

BATCH_TOKENS = 4096  # prompt tokens of a batch, padding included
Accept = Callable[[str], str | None]
Done = Callable[[str, Answer, str | None], None]  # key, answer, why it is unusable


@dataclass(frozen=True)
class RecordedRow:
    """A Text2SQL row: `context` is None where it was left out, `evidence` plain, "" where there is none."""

    context: str | None
    evidence: str
    answer: str


@dataclass(frozen=True)
class Recorded:
    """The answers of one file."""

    by_content: dict[str, str]
    by_question: dict[str, list[RecordedRow]]

    def find(self, request: Request) -> str | None:
        found = self.by_content.get(content_key(request))
        if found is not None or request.question is None:
            return found
        rows = self.by_question.get(_plain(request.question), [])
        evidence = _plain(request.evidence)
        rows = [row for row in rows if row.evidence == evidence] or [row for row in rows if not row.evidence]
        if len(rows) > 1:
            said = _plain(" ".join(str(message.get("content", "")) for message in request.messages))
            rows = [row for row in rows if row.context is not None and _plain(row.context) in said] or rows
        return rows[0].answer if rows else None


def identity(endpoint: Endpoint) -> str:
    """What stands for the model in a request's key: its name, with a digest where it lies on this machine.

    Raises:
        DataError: no such file or model.
    """
    kind, _, ref = endpoint.model.partition(":")
    if not endpoint.local:
        return endpoint.model
    if kind == "file":
        path = find_source(ref)
        return f"file:{path.name}@{_file_digest(path, path.stat().st_mtime_ns, path.stat().st_size)}"
    from quantlab.models.safetensors.files import open_files

    return f"hf:{ref}@{open_files(ref).digest}"


def answer_from_file(
    todo: Sequence[tuple[str, Request]],
    endpoint: Endpoint,
    ledger: Ledger,
    scope: str,
    accept: Accept | None,
    done: Done,
) -> dict[str, str]:
    """Look up every (key, request); calls `done` after each. Returns why others have no answer."""
    path = find_source(endpoint.model.partition(":")[2])
    recorded = load_recorded(path)
    model = identity(endpoint)
    failed: dict[str, str] = {}
    for key, request in todo:
        text = recorded.find(request)
        if text is None:
            failed[key] = f"no recorded answer in {path.name}"
            continue
        answer = Answer(text, 0, 0, 0.0, "stop", 0.0)
        why = accept(text) if accept is not None else None
        if why is None:
            ledger.put(key, model, request, answer, scope=scope)
        done(key, answer, why)
    return failed


def load_recorded(path: Path) -> Recorded:
    """Raises: DataError, naming file and line, for a line of neither form."""
    by_content: dict[str, str] = {}
    by_question: dict[str, list[RecordedRow]] = {}
    for number, row in json_lines(path):
        _read_line(row, f"{path}:{number}", by_content, by_question)
    if not by_content and not by_question:
        raise DataError(f"{path}: no recorded answers")
    return Recorded(by_content, by_question)


def _read_line(
    row: Any, where: str, by_content: dict[str, str], by_question: dict[str, list[RecordedRow]]
) -> None:
    if isinstance(row, dict) and isinstance(row.get("key"), str) and isinstance(row.get("text"), str):
        by_content.setdefault(row["key"], row["text"])
    elif (
        isinstance(row, dict) and isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)
    ):
        context = row.get("context")
        if context is None and "db" in row and "tables" in row:  # the bundled rows name their domain instead
            from quantlab.data.domains import tables_ddl

            context = tables_ddl(row["db"], row["tables"], where)
        if not isinstance(row.get("evidence"), str | None):
            raise DataError(f"{where}: 'evidence' must be text")
        context = context if isinstance(context, str) else None
        entry = RecordedRow(context, _plain(row.get("evidence") or ""), row["answer"])
        by_question.setdefault(_plain(row["question"]), []).append(entry)
    else:
        raise DataError(
            f"{where}: no recorded answer", hint='form: {"key": …, "text": …} or {"question": …, "answer": …}'
        )


def _plain(text: str) -> str:
    return " ".join(text.split())


@functools.lru_cache(maxsize=16)
def _file_digest(path: Path, changed: int, size: int) -> str:
    return file_digest(path)[:16]


def answer_with_model(
    todo: Sequence[tuple[str, Request]],
    endpoint: Endpoint,
    ledger: Ledger,
    scope: str,
    accept: Accept | None,
    done: Done,
) -> dict[str, str]:
    """Generate for every (key, request), longest prompts first; a batch is in the ledger before the next begins.
    Calls `done` after each; an unusable answer is not asked for again: decoding is greedy."""
    from quantlab.models.load import load_model

    subject = load_model(endpoint.model.partition(":")[2])
    model = identity(endpoint)
    encoded = [(key, request, _prompt(subject.tokenizer, request)) for key, request in todo]
    encoded.sort(key=lambda row: -len(row[2]))
    for batch in _batches(encoded, endpoint.concurrency):
        started = time.monotonic()
        limit = max(request.max_tokens or endpoint.max_tokens for _, request, _ in batch)
        outputs = _generate(subject, [ids for _, _, ids in batch], limit)
        seconds = (time.monotonic() - started) / len(batch)
        for (key, request, ids), (tokens, ended) in zip(batch, outputs, strict=True):
            own = request.max_tokens or endpoint.max_tokens
            finish = "stop" if ended and len(tokens) <= own else "length"
            text = subject.tokenizer.decode(
                tokens[:own], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            answer = Answer(text, len(ids), min(len(tokens), own), 0.0, finish, seconds)
            why = accept(text) if accept is not None else None
            if why is None:
                ledger.put(key, model, request, answer, scope=scope)
            done(key, answer, why)
    return {}


def _batches(rows: list[Any], most: int) -> list[list[Any]]:
    """Rows (key, request, ids) in the order given, as many as fit the padded size of the first, at most `most`."""
    batches: list[list[Any]] = []
    for row in rows:
        last = batches[-1] if batches else None
        if last and len(last) < most and (len(last) + 1) * len(last[0][2]) <= BATCH_TOKENS:
            last.append(row)
        else:
            batches.append([row])
    return batches


def _prompt(tokenizer: Any, request: Request) -> list[int]:
    messages = [dict(message) for message in request.messages]
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    else:
        ids = tokenizer("\n\n".join(str(message["content"]) for message in messages))["input_ids"]
    return list(ids)


def _generate(subject: Any, rows: Sequence[Sequence[int]], limit: int) -> list[tuple[list[int], bool]]:
    """Greedy continuations without the end token, and whether the model ended them itself."""
    import torch
    from transformers import GenerationConfig

    tokenizer, model = subject.tokenizer, subject.model
    named = getattr(model.generation_config, "eos_token_id", None)
    listed = list(named) if isinstance(named, list | tuple) else [named]
    ends = {int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)  # padded on the left
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[index, longest - len(row) :] = 1
    config = GenerationConfig(
        do_sample=False, max_new_tokens=limit, pad_token_id=pad, eos_token_id=sorted(ends) or None
    )
    # no sampling that a checkpoint suggests
    suggested, model.generation_config = (
        model.generation_config,
        config,
    )
    try:
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids.to(subject.device),
                attention_mask=mask.to(subject.device),
                generation_config=config,
            )
    finally:
        model.generation_config = suggested
    return [_cut(row, ends) for row in made[:, longest:].tolist()]


def _cut(tokens: list[int], ends: set[int]) -> tuple[list[int], bool]:
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[:index], True
    return tokens, False
