"""Who reads a checkpoint right: what is promised of each format, in one place (no torch).

``transformers`` is promised only where a plain ``from_pretrained`` in a fresh process computes what was meant, which is
what the tests and the proof at the end of a run do. A mixture of experts in the gptq or awq layout is the exception:
transformers 5 merges a layer's experts into one parameter while it loads, takes none of the packed ones, starts them
from random numbers and only warns. vLLM and gptqmodel build the experts one by one and read such files.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Readers:
    """``right``: libraries that read it. ``wrong``: one that seems to and does not, with what it does instead; empty
    where there is none. ``install``: packages that the first reader needs."""

    right: tuple[str, ...]
    install: tuple[str, ...]
    wrong: str = ""

    @property
    def text(self) -> str:
        """For the last lines of a run, and for cards."""
        return f"read by {', '.join(self.right)}" + (f"; NOT by {self.wrong}" if self.wrong else "")


_RANDOM_EXPERTS = "transformers alone, which starts the experts from random numbers and only warns"
_READERS = {
    "none": Readers(("transformers", "vLLM"), ("transformers", "accelerate")),
    "gptq": Readers(
        ("transformers", "vLLM", "gptqmodel"), ("transformers", "accelerate", "optimum", "gptqmodel")
    ),
    "awq": Readers(("transformers", "vLLM", "gptqmodel"), ("transformers", "accelerate", "gptqmodel")),
    "compressed-tensors": Readers(
        ("transformers", "vLLM"), ("transformers", "accelerate", "compressed-tensors")
    ),
    "bitsandbytes": Readers(("transformers", "vLLM"), ("transformers", "accelerate", "bitsandbytes")),
}
_EXPERTS = {
    "gptq": Readers(("vLLM", "gptqmodel"), ("gptqmodel",), _RANDOM_EXPERTS),
    "awq": Readers(("vLLM", "gptqmodel"), ("gptqmodel",), _RANDOM_EXPERTS),
}


def readers(format: str, *, experts: bool) -> Readers:
    """Who reads a checkpoint of a ``format``; ``experts``: the model is a mixture of experts, stored packed."""
    return (_EXPERTS if experts else {}).get(format) or _READERS[format]


def transformers_reads(format: str, *, experts: bool) -> bool:
    """Whether plain transformers reads it right."""
    return "transformers" in readers(format, experts=experts).right
