"""The calibration of a recipe: rows from one source, or from several in proportion to their weights.

A source of a mixture is drawn from as if it were alone, with the same seed, but documents that stand in an earlier
source too are left out. Shares are rounded by largest remainder. Rows of several sources take turns evenly, so that the
first few, which sensitivities and verifications are measured on, are of every kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from quantlab.calibration.documents import read_documents
from quantlab.calibration.drawing import Drawn, Wanted, digest, draw, left_out
from quantlab.calibration.rendering import opening_ids, special_ids

if TYPE_CHECKING:
    import torch

    from quantlab.recipe.base import Calibration


@dataclass(frozen=True)
class Mixture:
    """Calibration rows [rows, seq_len] and where they are from."""

    wish: Calibration
    sources: Sequence[Drawn]
    rows: torch.Tensor
    special_share: float
    opening: Sequence[str]

    def record(self) -> dict[str, Any]:
        """What a result says of its calibration."""
        return {
            "source": self.wish.named_sources(),
            "rows": self.wish.rows,
            "seq_len": self.wish.seq_len,
            "digest": digest(self.rows),
            "seed": self.wish.seed,
            "pack": self.wish.pack,
            "special_tokens": self.wish.special_tokens,
            "opening": list(self.opening),
            "special_share": round(self.special_share, 6),
            "sources": [
                {
                    "source": source.source,
                    "weight": source.weight,
                    "rows": len(drawn.rows),
                    "documents": drawn.documents,
                    "kinds": drawn.kinds,
                    "characters": drawn.characters,
                    "tokens": drawn.tokens,
                    "parts": drawn.parts,
                    "duplicates": drawn.duplicates,
                    "near_empty": drawn.near_empty,
                    "too_short": drawn.too_short,
                    "repetitive": drawn.repetitive,
                }
                for source, drawn in zip(self.wish.sources, self.sources, strict=True)
            ],
        }


def notes(record: Mapping[str, Any]) -> list[str]:
    """A line for each source of which something was left out, or a part was read; from :meth:`Mixture.record`."""
    lines = []
    for one in record["sources"]:
        said = f"left out {found}" if (found := left_out(one)) else ""
        sampled = record["pack"] and one["parts"] is not None
        part = f"a random part of {one['characters']:,} characters was tokenised" if sampled else ""
        lines += [f"{one['source']}: " + "; ".join(filter(None, (said, part)))] if said or part else []
    return lines


def draw_mixture(wish: Calibration, tokenizer: Any) -> Mixture:
    """The rows of a recipe's calibration.

    Raises:
        DataError: a source is missing or bad, or too short for its share; says how many rows it can give.
    """
    import torch

    seen: set[bytes] = set()
    sources, counts = wish.sources, wish.shares()
    found = []
    total = sum(source.weight for source in sources)
    for source, count in zip(sources, counts, strict=True):
        share = source.weight / total
        wanted = Wanted(count, wish.seq_len, wish.seed, wish.pack, wish.special_tokens, share)
        called = source.source if len(sources) > 1 or not wish.pack else "the calibration text"
        found.append(draw(read_documents(source.source), tokenizer, wanted, called=called, seen=seen))
    rows = torch.cat([drawn.rows for drawn in found])[taking_turns(counts)]
    special = torch.isin(rows, torch.tensor(sorted(special_ids(tokenizer)), dtype=rows.dtype))
    opening = opening_ids(tokenizer) if wish.special_tokens else []
    names = tokenizer.convert_ids_to_tokens(opening)
    return Mixture(wish, found, rows, float(special.double().mean()), names)


def taking_turns(counts: Sequence[int]) -> list[int]:
    """Numbers of rows that stand source by source, in an order in which every source is spread evenly."""
    order, start = [], 0
    for source, count in enumerate(counts):
        order += [(Fraction(2 * k + 1, 2 * count), source, start + k) for k in range(count)]
        start += count
    return [number for _, _, number in sorted(order)]
