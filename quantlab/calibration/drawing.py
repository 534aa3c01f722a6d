"""Documents of one source to rows of tokens.

Documents that say nothing, or the same as an earlier one, are left out. Packed, the others are tokenised one after the
other and ``rows`` of the non-overlapping windows of ``seq_len`` tokens are drawn at random; not packed, a row is the
beginning of a document that is at least as long. Rows that are mostly one token (rules, padding, blank tables) are left
out.

Of a packed source of more than `LARGE` characters that is also more than `PER_TOKEN` characters for each token needed,
a random part is tokenised: documents in an order of the seed's, long texts in pieces, until there are `ENOUGH` times
the tokens that are needed.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quantlab.calibration.documents import Document
from quantlab.calibration.rendering import opening_ids, packed_ids, separate_ids
from quantlab.errors import DataError

if TYPE_CHECKING:
    import torch

SHORTEST = 5  # characters, without spaces, of a document that says something
MOSTLY = 0.75  # share of one token above which a row says nothing
JUDGED = 128  # tokens; in a shorter row an indentation or a rule may be most, and it is drawn
LARGE = 2**24  # characters; about 64 times what 128 rows of 512 tokens take
PER_TOKEN = 64  # characters; a token stands for one to five, in the longest runs of spaces for tens
ENOUGH = 16  # times the tokens needed
PIECE = 2**16  # characters of the pieces that a long text is cut into where a part is enough
RUN = 2**18  # characters that are tokenised at once there; a token takes 300 bytes meanwhile
AT_ONCE = 64  # documents that are tokenised at once where not all may be needed


@dataclass
class Drawn:
    """Rows of one source, and what became of its documents.

    rows: int64 [rows, seq_len]. kinds: documents by kind, all that are there. characters, tokens: of what was
    tokenised. parts: how many documents or pieces that was, where not all. too_short: documents shorter than a row.
    repetitive: rows that are mostly one token.
    """

    rows: torch.Tensor
    kinds: dict[str, int] = field(default_factory=dict)
    characters: int = 0
    tokens: int = 0
    parts: int | None = None
    duplicates: int = 0
    near_empty: int = 0
    too_short: int = 0
    repetitive: int = 0

    @property
    def documents(self) -> int:
        return sum(self.kinds.values())


def left_out(counts: Mapping[str, Any]) -> str:
    """What was left out, in words, from the fields of a `Drawn`; empty where nothing was."""
    words = {
        "duplicates": ("duplicate", "duplicates"),
        "near_empty": ("near-empty document", "near-empty documents"),
        "too_short": ("document shorter than a row", "documents shorter than a row"),
        "repetitive": ("row of mostly one token", "rows of mostly one token"),
    }
    found = [(counts[name], *pair) for name, pair in words.items() if counts[name]]
    return ", ".join(f"{n:,} {one if n == 1 else more}" for n, one, more in found)


@dataclass(frozen=True)
class Wanted:
    """What is drawn from a source: ``rows`` of ``seq_len`` tokens.

    special: whether a row begins as the tokenizer begins a text. share: of all rows of the mixture that it is in.
    """

    rows: int
    seq_len: int
    seed: int
    pack: bool = True
    special: bool = False
    share: float = 1.0


def token_rows(texts: Sequence[str], tokenizer: Any, *, rows: int, seq_len: int, seed: int) -> torch.Tensor:
    """Token ids int64 [rows, seq_len] of packed texts.

    Raises:
        DataError: the texts are too short for that many windows; says how many there are.
    """
    documents = [Document("text", text, (), "text", number) for number, text in enumerate(texts)]
    return draw(documents, tokenizer, Wanted(rows, seq_len, seed)).rows


def digest(rows: torch.Tensor) -> str:
    """SHA-256 of token rows, 16 hex digits."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]


def draw(
    documents: Sequence[Document],
    tokenizer: Any,
    wanted: Wanted,
    *,
    called: str = "the calibration text",
    seen: set[bytes] | None = None,
) -> Drawn:
    """The rows of one source. ``seen``: digests of documents that are duplicates here, which those kept are added to.

    Raises:
        DataError: not enough for that many rows; says how many there are.
    """
    kept, drawn = _distinct(documents, set() if seen is None else seen)
    drawn.kinds = dict(Counter(document.kind for document in documents))
    opening = opening_ids(tokenizer) if wanted.special else []
    make = _packed if wanted.pack else _separate
    return make(kept, tokenizer, wanted, opening, drawn, called)


def _distinct(documents: Sequence[Document], seen: set[bytes]) -> tuple[list[Document], Drawn]:
    """The documents that say something new; two that differ in white space alone are the same."""
    import torch

    kept, drawn = [], Drawn(torch.empty(0, 0, dtype=torch.int64))
    for document in documents:
        words = document.content.split()
        if sum(map(len, words)) < SHORTEST:
            drawn.near_empty += 1
            continue
        name = hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if name in seen:
            drawn.duplicates += 1
            continue
        seen.add(name)
        kept.append(document)
    return kept, drawn


def _packed(
    documents: list[Document], tokenizer: Any, wanted: Wanted, opening: list[int], drawn: Drawn, called: str
) -> Drawn:
    import torch

    ids = _stream(documents, tokenizer, wanted, drawn)
    there = len(ids) // wanted.seq_len
    windows = ids[: there * wanted.seq_len].view(there, wanted.seq_len)
    usable = torch.nonzero(~repetitive(windows)).flatten().tolist()
    drawn.repetitive = there - len(usable)
    if len(usable) < wanted.rows:
        fewer = int(len(usable) / wanted.share)
        raise DataError(
            f"{called} has {len(ids)} tokens, enough for {len(usable)} rows of {wanted.seq_len}, "
            f"not {wanted.rows}{_without(drawn)}",
            hint=f"set calibration.rows={fewer}, a smaller calibration.seq_len, or give more text"
            if fewer
            else "give more text or a smaller calibration.seq_len",
        )
    chosen = sorted(random.Random(wanted.seed).sample(usable, wanted.rows))
    rows = windows[chosen]
    if opening:
        rows = torch.stack([_opened(row, opening) for row in rows])
    return replace(drawn, rows=rows)


def _separate(
    documents: list[Document], tokenizer: Any, wanted: Wanted, opening: list[int], drawn: Drawn, called: str
) -> Drawn:
    """Rows are beginnings of documents, which are looked at in an order of the seed's until there are enough."""
    import torch

    order = list(range(len(documents)))
    random.Random(wanted.seed).shuffle(order)
    found: dict[int, torch.Tensor] = {}  # [seq_len] each
    lengths: list[int] = []
    for start in range(0, len(order), AT_ONCE):
        numbers = order[start : start + AT_ONCE]
        some = [_beginning(documents[number], PER_TOKEN * wanted.seq_len) for number in numbers]
        for number, document, ids in zip(numbers, some, separate_ids(some, tokenizer), strict=True):
            if len(found) == wanted.rows:
                break
            whole = _opened(torch.tensor(ids, dtype=torch.int64), opening, grow=True)
            lengths.append(len(whole))
            drawn.characters += len(document.content)
            row = whole[: wanted.seq_len]
            if len(row) < wanted.seq_len:
                drawn.too_short += 1
            elif repetitive(row[None])[0]:
                drawn.repetitive += 1
            else:
                found[number] = row
        if len(found) == wanted.rows:
            break
    drawn.tokens, drawn.parts = sum(lengths), len(lengths) if len(lengths) < len(documents) else None
    if len(found) < wanted.rows:
        raise _too_few_documents(len(found), lengths, wanted, drawn, called)
    return replace(drawn, rows=torch.stack([found[number] for number in sorted(found)]))


def _beginning(document: Document, characters: int) -> Document:
    """As much of a text as its first tokens can need; others as they are."""
    return replace(document, text=document.text[:characters]) if document.kind == "text" else document


def _too_few_documents(
    found: int, lengths: list[int], wanted: Wanted, drawn: Drawn, called: str
) -> DataError:
    longest = sorted(lengths, reverse=True)
    instead = [f"calibration.rows={fewer}"] if (fewer := int(found / wanted.share)) else []
    if len(longest) >= wanted.rows and longest[wanted.rows - 1] >= 8:
        instead.append(f"calibration.seq_len={longest[wanted.rows - 1]}")
    return DataError(
        f"{called}: {found} of {len(lengths)} documents have {wanted.seq_len} tokens or more, not {wanted.rows}"
        + _without(drawn)
        + (f"; the longest has {longest[0]}" if longest else ""),
        hint=" or ".join([*instead, "calibration.pack=true, which joins documents"]),
    )


def _without(drawn: Drawn) -> str:
    found = left_out(vars(drawn))
    return f" (left out: {found})" if found else ""


def _opened(row: torch.Tensor, opening: list[int], *, grow: bool = False) -> torch.Tensor:
    """A row [seq_len] that begins with ``opening``, as long as before unless it may ``grow``."""
    import torch

    if not opening or row[: len(opening)].tolist() == opening:
        return row
    longer = torch.cat([torch.tensor(opening, dtype=row.dtype), row])
    return longer if grow else longer[: len(row)]


def repetitive(rows: torch.Tensor) -> torch.Tensor:
    """Which rows [rows, seq_len] are mostly one token; bool [rows]. Of rows shorter than `JUDGED` none is."""
    import torch

    if not len(rows) or rows.shape[1] < JUDGED:
        return torch.zeros(len(rows), dtype=torch.bool)
    most = rows.mode(dim=1, keepdim=True).values  # [rows, 1]
    return (rows == most).sum(dim=1) > MOSTLY * rows.shape[1]


def _stream(documents: list[Document], tokenizer: Any, wanted: Wanted, drawn: Drawn) -> torch.Tensor:
    """The documents as one stream of ids [tokens]; of a large source those of a random part."""
    import torch

    needed = wanted.rows * wanted.seq_len
    size = sum(len(document.content) for document in documents)
    runs: Iterable[list[Document]] = [documents]
    if size > max(LARGE, PER_TOKEN * needed):
        runs, drawn.parts = _in_random_order(documents, wanted.seed), 0
    found: list[torch.Tensor] = []
    for run in runs:
        found.append(torch.tensor(packed_ids(run, tokenizer), dtype=torch.int64))
        drawn.characters += sum(len(document.content) for document in run)
        drawn.tokens += len(found[-1])
        if drawn.parts is not None:
            drawn.parts += len(run)
            if drawn.tokens >= ENOUGH * needed:
                break
    return torch.cat(found)


def _in_random_order(documents: list[Document], seed: int) -> Iterator[list[Document]]:
    """Documents, long texts in pieces, in an order of the seed's, some `RUN` characters at a time."""
    parts = [part for document in documents for part in _pieces(document)]
    random.Random(seed).shuffle(parts)
    run: list[Document] = []
    size = 0
    for part in parts:
        run.append(part)
        size += len(part.content)
        if size >= RUN:
            yield run
            run, size = [], 0
    if run:
        yield run


def _pieces(document: Document) -> Iterator[Document]:
    text = document.text
    if document.kind != "text" or len(text) <= 2 * PIECE:
        yield document
        return
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE, start + 2 * PIECE) + 1 or start + PIECE
        yield replace(document, text=text[start:end])
        start = end
