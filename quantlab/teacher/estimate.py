"""How many tokens and dollars a job will take, without a network.

*Input tokens* are exact where `endpoint.tokenizer` names a model: its chat template applied, or, without one,
the tokens of every content plus 4 a message and 3 a request (what OpenAI documents for its chat format). Otherwise they
are a guess by script, times what the ledger's earlier answers of the same model have shown the guess to be off by.

*The guess* gives a run of letters (with an apostrophe or underscore before it) one token for every 8, digits one for
every 3, punctuation one for every 2, a Hangul syllable 0.55, Han and kana 0.8, another character 0.5, a run of line
breaks 1; a space belongs to the word after it. The Hangul figure is from the example that OpenAI published with GPT-4o
(35 syllables in 27 tokens, 8 of them for Latin letters and punctuation), and the English one there is met within 10 %;
for older encodings Hangul takes about twice as much, until the first answers correct it.

*Output tokens* are those of the expected answers where the caller has them (reference queries), else the mean of the
ledger's answers of this model to requests of the same kind, else a quarter of max_tokens.

What a request is *reserved* with, for budgets that must not be crossed, is higher than what it is estimated at: with
a guess, half as much again, raised by what answers show, and never above one token a byte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantlab.errors import DataError
from quantlab.recipe.distill import Endpoint
from quantlab.teacher.ledger import Ledger, Request, canonical, request_key
from quantlab.teacher.local import identity
from quantlab.teacher.prices import cost, price_of

PER_MESSAGE, PER_REQUEST = 4, 3
OUTPUT_SHARE = 0.25  # of max_tokens, when nothing is known
RECENT = 200  # answers that the guess is corrected by
SPARE = 1.5  # reserved over a guess
_PIECES = re.compile(
    r"(?P<hangul>[\uac00-\ud7a3]+)|(?P<han>[\u3040-\u30ff\u3400-\u9fff]+)|(?P<digits>[0-9]+)"
    r"|(?P<letters>['_]?[A-Za-z\u00c0-\u024f]+)|(?P<breaks>\s*\n\s*)|(?P<space>\s+)"
    r"|(?P<marks>[!-/:-@\[-`{-~]+)|(?P<other>.)"
)
_RATES = {"hangul": 0.55, "han": 0.8, "other": 0.5, "breaks": 0.0, "space": 0.0}
_GROUPS = {"digits": 3, "letters": 8, "marks": 2}


@dataclass(frozen=True)
class Estimate:
    """What a job will take beyond the `cached` answers. `basis` says what the numbers rest on."""

    requests: int
    cached: int
    input_tokens: int
    output_tokens: int
    usd: float
    basis: str = ""


def guess_tokens(text: str) -> float:
    """Tokens of a text by script, see above."""
    total = 0.0
    for match in _PIECES.finditer(text):
        name, length = str(match.lastgroup), match.end() - match.start()
        total += math.ceil(length / _GROUPS[name]) if name in _GROUPS else length * _RATES[name]
        total += name == "breaks"
    return total


class Counter:
    """Counts the tokens of requests and texts for one endpoint; learns from what servers report."""

    def __init__(self, endpoint: Endpoint, ledger: Ledger | None = None) -> None:
        self.tokenizer = _open_tokenizer(endpoint.tokenizer) if endpoint.tokenizer else None
        self.ratio = self.highest = 1.0
        self.seen = 0
        if self.tokenizer is None and ledger is not None and not endpoint.local:
            self._calibrate(ledger, identity(endpoint))

    @property
    def basis(self) -> str:
        if self.tokenizer is not None:
            return "input tokens counted with the tokenizer"
        if self.seen:
            return f"input tokens guessed, corrected by {self.seen} earlier answers"
        return "input tokens guessed by script"

    def text(self, text: str) -> int:
        """Tokens of a text alone, as an answer."""
        if self.tokenizer is not None:
            return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return math.ceil(guess_tokens(text) * self.ratio)

    def request(self, request: Request) -> int:
        """Input tokens that are expected to be reported for a request."""
        if self.tokenizer is not None:
            return _exact(self.tokenizer, request)
        return math.ceil(_guess(request) * self.ratio)

    def worst(self, request: Request) -> int:
        """Input tokens that a request is reserved with."""
        if self.tokenizer is not None:
            return _exact(self.tokenizer, request)
        size = sum(len(str(m.get("content", "")).encode("utf-8", "replace")) for m in request.messages)
        ceiling = size + 2 * PER_MESSAGE * len(request.messages) + 16 + len(_schema(request))
        spare = SPARE * self.highest if self.seen < 8 else 1.05 * self.highest
        return min(math.ceil(_guess(request) * spare), ceiling)

    def learn(self, request: Request, reported: int) -> None:
        """A server said how many input tokens a request had."""
        if self.tokenizer is None and reported > 0:
            self.highest = max(self.highest, reported / _guess(request))
            self.seen += 1

    def _calibrate(self, ledger: Ledger, model: str) -> None:
        rows = ledger.rows(
            "SELECT messages, parameters, input_tokens FROM answers WHERE model = ? AND counted = 1"
            " AND input_tokens > 0 ORDER BY at DESC LIMIT ?",
            (model, RECENT),
        )
        if not rows:
            return
        reported = [row[2] for row in rows]
        guessed = [_guess(_stored(row[0], row[1])) for row in rows]
        self.ratio = sum(reported) / sum(guessed)
        self.highest = max(max(r / g for r, g in zip(reported, guessed, strict=True)), 0.1)
        self.seen = len(rows)


def complete(request: Request, endpoint: Endpoint) -> Request:
    """The request with the endpoint's max_tokens and temperature where it names none itself."""
    defaults: dict[str, Any] = {}
    if request.max_tokens is None:
        defaults["max_tokens"] = endpoint.max_tokens
    if "temperature" not in request.parameters:
        defaults["temperature"] = endpoint.temperature
    return replace(request, parameters={**defaults, **request.parameters}) if defaults else request


def estimate(
    requests: Sequence[Request],
    endpoint: Endpoint,
    ledger: Path,
    expected_output: Sequence[int] | None = None,
) -> Estimate:
    """What `gather` would take for these requests now. No network; the ledger file is read when there is one.

    Args:
        expected_output: tokens of the expected answers, one number for each request.

    Raises:
        DataError: `endpoint.tokenizer` cannot be opened, the ledger is damaged.
    """
    if expected_output is not None and len(expected_output) != len(requests):
        raise ValueError(f"{len(expected_output)} expected answers for {len(requests)} requests")
    book = Ledger(ledger) if ledger.exists() else None
    try:
        return _estimate(requests, endpoint, book, expected_output)
    finally:
        if book is not None:
            book.close()


def _estimate(
    requests: Sequence[Request], endpoint: Endpoint, book: Ledger | None, expected: Sequence[int] | None
) -> Estimate:
    model = identity(endpoint)
    wanted: dict[str, tuple[Request, int | None]] = {}
    keys = []
    for index, request in enumerate(requests):
        whole = complete(request, endpoint)
        keys.append(request_key(model, whole))
        wanted.setdefault(keys[-1], (whole, None if expected is None else expected[index]))
    answered = book.get_many(keys) if book is not None else {}
    asked = [pair for key, pair in wanted.items() if key not in answered]
    cached = sum(key in answered for key in keys)
    if endpoint.model.startswith("file:"):
        return Estimate(len(asked), cached, 0, 0, 0.0, "recorded answers")
    counter = Counter(endpoint, book)
    means = _means(book, model) if expected is None else {}
    inputs = sum(counter.request(request) for request, _ in asked)
    outputs = sum(
        tokens if tokens is not None else means.get(request.kind, OUTPUT_SHARE * (request.max_tokens or 0))
        for request, tokens in asked
    )
    outputs = round(outputs)
    if expected is not None:
        basis = "output tokens of the expected answers"
    elif any(request.kind in means for request, _ in asked):
        basis = "output tokens as the mean of earlier answers"
    else:
        basis = f"output tokens taken as {OUTPUT_SHARE:.0%} of max_tokens"
    price = None if endpoint.local else price_of(endpoint.model, endpoint.price, endpoint.batch)
    usd = cost(price, inputs, outputs)
    return Estimate(len(asked), cached, inputs, outputs, usd, f"{counter.basis}; {basis}")


def _means(book: Ledger | None, model: str) -> dict[str, float]:
    if book is None:
        return {}
    return dict(
        book.rows("SELECT kind, avg(output_tokens) FROM answers WHERE model = ? GROUP BY kind", (model,))
    )


def _open_tokenizer(ref: str) -> Any:
    """A tokenizer without its model: a directory, a hub id or `embedded:<name>`."""
    from quantlab.models.load import load_tokenizer
    from quantlab.models.safetensors.files import open_files

    folder = Path(ref).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise DataError(f"{ref}: its tokenizer cannot be loaded: {error}") from error
    return load_tokenizer(open_files(ref))


def _exact(tokenizer: Any, request: Request) -> int:
    messages = [dict(message) for message in request.messages]
    if getattr(tokenizer, "chat_template", None):
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return len(encoded["input_ids"])
    contents = [tokenizer(str(m.get("content", "")), add_special_tokens=False)["input_ids"] for m in messages]
    return sum(map(len, contents)) + PER_MESSAGE * len(messages) + PER_REQUEST


def _guess(request: Request) -> float:
    total = sum(guess_tokens(str(m.get("content", ""))) + PER_MESSAGE for m in request.messages) + PER_REQUEST
    return total + guess_tokens(_schema(request))


def _schema(request: Request) -> str:
    """OpenAI puts the schema of a structured answer before the messages and bills it."""
    form = request.parameters.get("response_format")
    return canonical(form) if isinstance(form, Mapping) else ""


def _stored(messages: str, parameters: str) -> Request:
    import json

    return Request(tuple(json.loads(messages)), json.loads(parameters), "")
