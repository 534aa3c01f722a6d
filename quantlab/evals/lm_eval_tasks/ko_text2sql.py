"""What `quantlab_ko_text2sql.yaml` calls: documents, prompts, targets, scores.

A document is a row of the bundled data without paths, so that its hash is the same on every machine; the database
is looked up when it is scored. Scoring is quantlab's own (`text2sql.score_one`): `ex` and `em` are 0 or 1, `verdict`
is ok, wrong, error, timeout or unparsed with the reason behind a colon. A question whose gold returns nothing has no
`ex`. SQL runs in a sandbox that each process starts once and closes at its exit.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from quantlab.errors import DataError
from quantlab.evals.text2sql import score_one
from quantlab.registry.tasks import PromptOptions
from quantlab.runs.run import VERDICTS
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.prompt.few_shot import SOURCE, select_shots
from quantlab.text2sql.prompt.for_model import as_asked, template_of, with_notes
from quantlab.text2sql.prompt.prompt import complete_statement, item_prompt
from quantlab.text2sql.prompt.template import Template
from quantlab.text2sql.sandbox.pool import Sandbox

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("test", "dev")
EXAMPLES = 16  # for --num_fewshot; more do not fit the context of most models

Document = Mapping[str, Any]


_asked_by = [PromptOptions()]  # what `dataset` was given last: examples are asked for without it


def dataset(
    split: str = "test", prompt: Mapping[str, Any] | None = None, **metadata: Any
) -> dict[str, Dataset]:
    """{split: its documents}. `prompt` are the keys of `tasks.text2sql.prompt`: the harness passes the task's metadata
    (`--metadata '{"prompt": {"language": "en"}}'`), the rest of which says nothing here."""
    from datasets import Dataset

    if split not in SPLITS:
        raise DataError(f"ko_text2sql has no split {split!r}", hint=f"one of: {', '.join(SPLITS)}")
    try:
        wish = PromptOptions.model_validate(prompt or {})
    except ValidationError as error:
        raise DataError(f"metadata 'prompt': {error.errors()[0]['msg']}") from None
    _asked_by[:] = [wish]
    items, template = as_asked(list(_items(split).values()), wish)
    return {split: Dataset.from_list([_document(item, split, template) for item in items])}


def examples() -> list[dict[str, Any]]:
    """Training rows for few-shot prompts; the first k are those that quantlab shows for `shots: k`."""
    evaluated = [item for split in SPLITS for item in _items(split).values()]
    template = template_of(_asked_by[0], evaluated)
    drawn = with_notes(select_shots(load_items(SOURCE), EXAMPLES, evaluated), _asked_by[0], template)
    return [_document(item, "train", template) for item in drawn]


def prompt(doc: Document) -> str:
    """quantlab's prompt, to the character."""
    return str(doc["prompt"])


def target(doc: Document) -> str:
    return complete_statement(str(doc["answer"]))


def score(doc: Document, results: Sequence[str]) -> dict[str, float | str]:
    """The metrics of one document from what the model wrote for it."""
    item = _items(str(doc["split"]))[str(doc["id"])]
    sample = score_one(_sandbox(os.getpid()), item, results[0])
    found: dict[str, float | str] = {
        "em": float(sample.extra["exact"]),
        "verdict": f"{sample.verdict}: {sample.why}" if sample.why else sample.verdict,
    }
    if sample.extra["evidence"]:
        found["ex"] = float(sample.verdict == "ok")
    return found


def count_verdicts(verdicts: Sequence[str]) -> str:
    """ "2 ok, 1 error", for the table of results."""
    counts = Counter(verdict.partition(":")[0] for verdict in verdicts)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])


def _document(item: Item, split: str, template: Template) -> dict[str, Any]:
    return {
        "id": item.id,
        "split": split,
        "question": item.question,
        "answer": item.answer,
        "prompt": item_prompt(item, template=template),
        "level": item.extra.get("level", ""),
        "kind": item.extra.get("kind", ""),
    }


@functools.cache
def _items(split: str) -> dict[str, Item]:
    return {item.id: item for item in load_items(f"ko_text2sql:{split}")}


@functools.cache
def _sandbox(process: int) -> Sandbox:
    """One for each process: a forked one must not talk to its parent's workers."""
    sandbox = Sandbox()
    atexit.register(sandbox.close)
    return sandbox
