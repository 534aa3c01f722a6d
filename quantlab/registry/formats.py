"""The formats that checkpoints are written in: one entry each, read by recipes, planning, the engine, validation of
what was written, ``doctor``, cards and the last lines of a run.

A format's module (torch) offers, for one linear::

    pack(codes, scales, zeros, group_of, *, bits, group_size, symmetric) -> dict[str, Tensor]
    unpack(tensors, *, bits, group_size) -> (codes, scales, zeros, group_of)

with the tensors that ``Format.tensors`` names, one that reads any checkpoint of the format, also such as quantlab does
not write, by its ``quantization_config`` and what the linear is called (``formats.codes``; ValueError for what is no
integer codes, or damaged)::

    read(tensors, described, *names) -> Codes

and for the checkpoint::

    config(contents: Contents) -> dict

which is the ``quantization_config``.

One that holds block types (``types``) rather than widths has, for one linear::

    pack(blocks) -> dict[str, Tensor]
    packed(tensors, name) -> blocks, or None

A format that is not safetensors has ``export``: a function that is given the finished checkpoint with its parts in the
form above, and writes files of its own in their place (see ``quant/export.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from quantlab.registry.block_types import BLOCK_TYPES
from quantlab.registry.mixtures import TYPES

Entry = tuple[str, tuple[int, ...]]  # type as safetensors names it, shape
GROUP_SIZES = (16, 32, 64, 128)
TILE = 16  # outputs that aten::_convert_weight_to_int4pack_for_cpu takes at once


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


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, as far as its ``quantization_config`` says it.

    layers: (bits, group_size) of every quantized linear, by its full name in the files. bits, group_size: of most.
    options: the method's. floating: codes are 8-bit floating point numbers. quantizer: ``name:version``.
    ignore: all linears that are left as they are, by their names in the skeleton and in the files.
    kept: those of them that a recipe or their shape left out. blocks: the block list's name in the skeleton.
    aliases: names of quantized linears in the skeleton, where readers that go by those find them under others.
    type: the block type or mixture, where the format has those. name: what the model is called.
    """

    layers: Mapping[str, tuple[int, int]]
    bits: int
    group_size: int
    symmetric: bool
    options: Mapping[str, Any]
    floating: bool = False
    quantizer: str = ""
    ignore: Sequence[str] = ()
    kept: Sequence[str] = ()
    blocks: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    type: str = ""
    name: str = ""


class Linear(NamedTuple):
    """A linear that is to be stored: [rows, columns] weights at ``bits``, ``groups`` of columns, ``plain`` the type
    of the checkpoint's plain tensors, ``floating`` whether codes are 8-bit floating point numbers, ``type`` its block
    type."""

    rows: int
    columns: int
    bits: int
    groups: int
    plain: str
    floating: bool = False
    type: str = ""


def _any_shape(bits: int, columns: int, rows: int) -> str | None:
    return None


@dataclass(frozen=True)
class Format:
    """Everything that is known of a format.

    about: one line for people.
    module: where pack, unpack and config are; None where quantlab packs nothing itself.
    bits: the widths that it holds.
    zero_min: the smallest zero that it can store.
    ordered: whether it stores in which order columns were quantized.
    asymmetric: whether its readers take asymmetric grids.
    mixed: whether its readers take a width for each layer. by_name: whether it leaves a layer of one name out in every
        block or in none. unread: layers that transformers does not read in it, by their trait
        (``models.layers.Trait``), and why.
    fits: why a linear of (bits, columns, rows) cannot be stored, or None; group sizes are looked at elsewhere.
    tensors: names, types and shapes of the tensors of a linear; the names are relative to it, the first one always
    there. marks: names of tensors that say that a linear is packed. own_dtype: ends of names of tensors whose type
    the format fixes, whatever the plain tensors are stored in. unscaled: it expects, beside some activations, scales
    of its own that are all ones. readers, expert_readers: who reads it right, the second where experts are packed
    that transformers alone does not read. merges: whether transformers merges packed experts. converts: whether it
    reads the format where it computes other tensors from those in the files. requires: modules that must import to
    load a checkpoint. types: the block types and mixtures that it holds; empty where a width and a group size say all.
    export: "module:function" that writes files of its own. load: "module:function" that opens such
    files as a transformers model."""

    about: str
    readers: Readers
    module: str | None = None
    bits: tuple[int, ...] = ()
    zero_min: int = 0
    ordered: bool = False
    asymmetric: bool = False
    mixed: bool = False
    by_name: bool = False
    unread: Mapping[str, str] = field(default_factory=dict)
    fits: Callable[[int, int, int], str | None] = _any_shape
    tensors: Callable[[Linear], dict[str, Entry]] = lambda linear: {}
    marks: tuple[str, ...] = ()
    own_dtype: tuple[str, ...] = ()
    unscaled: bool = False
    expert_readers: Readers | None = None
    merges: bool = False
    converts: bool = True
    requires: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    export: str | None = None
    load: str | None = None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Every name that a tensor of a linear may have; the first one is always there."""
        linears = (
            Linear(32, 32, max(self.bits, default=8), 1, "F16", floating) for floating in (False, True)
        )
        return tuple(dict.fromkeys(name for linear in linears for name in self.tensors(linear)))


def _whole_words(bits: int, features: int, what: str, step: int) -> str | None:
    if features % step:
        return f"its {features} {what} are not divisible by {step}, which fill packed words at {bits} bits"
    return None


def _gptq_fits(bits: int, columns: int, rows: int) -> str | None:
    step = 32 if bits == 3 else 32 // bits  # codes that fill whole packed words
    whole = _whole_words(bits, rows, "outputs", step) or _whole_words(bits, columns, "inputs", step)
    return whole or (_whole_tiles(rows) if bits == 4 else None)


def _awq_fits(bits: int, columns: int, rows: int) -> str | None:
    return _whole_words(bits, rows, "outputs", 8) or _whole_tiles(rows)


def _whole_tiles(rows: int) -> str | None:
    return (
        f"its {rows} outputs are not divisible by {TILE}, the tile of torch's int4 kernel"
        if rows % TILE
        else None
    )


def _gptq_tensors(linear: Linear) -> dict[str, Entry]:
    rows, columns, bits, groups = linear[:4]
    return {
        "qweight": ("I32", (columns * bits // 32, rows)),
        "qzeros": ("I32", (groups, rows * bits // 32)),
        "scales": ("F16", (groups, rows)),
        "g_idx": ("I32", (columns,)),
    }


def _awq_tensors(linear: Linear) -> dict[str, Entry]:
    rows, columns, bits, groups = linear[:4]
    return {
        "qweight": ("I32", (columns, rows * bits // 32)),
        "qzeros": ("I32", (groups, rows * bits // 32)),
        "scales": ("F16", (groups, rows)),
    }


def _compressed_tensors(linear: Linear) -> dict[str, Entry]:
    rows, columns, bits, groups = linear[:4]
    if linear.floating:
        return {"weight_scale": (linear.plain, (rows, 1)), "weight": ("F8_E4M3", (rows, columns))}
    return {  # a row says how long it is, so its last word may be half empty
        "weight_scale": (linear.plain, (rows, groups)),
        "weight_packed": ("I32", (rows, -(-columns * bits // 32))),
        "weight_shape": ("I64", (2,)),
    }


def _gguf_tensors(linear: Linear) -> dict[str, Entry]:
    """While a run goes on: one tensor of bytes, called by its type."""
    if not linear.type:
        return {name: ("U8", (1, kind.bytes)) for name, kind in BLOCK_TYPES.items()}
    return {linear.type: ("U8", (linear.rows, BLOCK_TYPES[linear.type].row_bytes(linear.columns)))}


# transformers 5 merges a layer's experts into one parameter while it loads, takes none of the packed ones, starts them
# from random numbers and only warns. vLLM and gptqmodel build the experts one by one and read such files.
_EXPERTS = Readers(
    ("vLLM", "gptqmodel"),
    ("gptqmodel",),
    "transformers alone, which starts the experts from random numbers and only warns",
)

# Where the files of the original hold all experts as one tensor, transformers looks for that and nothing else.
_STACKED = Readers(
    ("quantlab",),
    ("quantlab",),
    "transformers alone, which looks for one tensor of all experts, starts it from random numbers and only warns",
)

_READ = (
    "transformers initialises it while it loads the model, and a packed layer has no weight to do that with"
)
_READ_BY_BLOCK = {"read by its block": _READ}
_RUN = {"read when run": "its block looks at its weight when it runs, and a packed layer has none"}

FORMATS: dict[str, Format] = {
    "none": Format(
        "the model's own files",
        Readers(("transformers", "vLLM"), ("transformers", "accelerate")),
    ),
    "gptq": Format(
        "AutoGPTQ's format, version 1",
        Readers(
            ("transformers", "vLLM", "gptqmodel"), ("transformers", "accelerate", "optimum", "gptqmodel")
        ),
        module="quantlab.formats.gptq",
        bits=(2, 3, 4, 8),
        zero_min=1,  # zeros are stored less one
        ordered=True,
        asymmetric=True,
        by_name=True,
        unread=_READ_BY_BLOCK
        | _RUN
        | {
            "subclass": "optimum passes over subclasses of nn.Linear",
            "numbered": "optimum passes over layers that are called by a number",
        },
        fits=_gptq_fits,
        tensors=_gptq_tensors,
        marks=("qweight",),
        own_dtype=(".scales",),
        expert_readers=_EXPERTS,
        requires=("optimum", "gptqmodel"),
    ),
    "awq": Format(
        "AutoAWQ's GEMM format",
        Readers(("transformers", "vLLM", "gptqmodel"), ("transformers", "accelerate", "gptqmodel")),
        module="quantlab.formats.awq",
        bits=(4,),
        asymmetric=True,
        unread=_READ_BY_BLOCK | _RUN | {"transposed": "readers of awq pass over transposed layers (Conv1D)"},
        fits=_awq_fits,
        tensors=_awq_tensors,
        marks=("qweight",),
        own_dtype=(".scales",),
        unscaled=True,
        expert_readers=_EXPERTS,
        requires=("gptqmodel",),
    ),
    "compressed-tensors": Format(
        "compressed-tensors: pack-quantized integers, float-quantized FP8",
        Readers(("transformers", "vLLM"), ("transformers", "accelerate", "compressed-tensors")),
        module="quantlab.formats.compressed_tensors",
        bits=(2, 3, 4, 8),
        mixed=True,
        unread=_READ_BY_BLOCK
        | {
            "transposed": "readers of compressed-tensors pass over transposed layers (Conv1D)",
            "read by itself": _READ,
        },
        tensors=_compressed_tensors,
        merges=True,
        converts=False,
        marks=("weight_packed", "weight_scale"),
        requires=("compressed_tensors",),
    ),
    "gguf": Format(
        "one GGUF file of ggml's block types",
        Readers(("llama.cpp", "Ollama", "LM Studio", "quantlab"), ("llama-cpp-python",)),
        module="quantlab.formats.gguf.checkpoint",
        bits=(2, 3, 4, 5, 6, 8),
        asymmetric=True,
        mixed=True,
        tensors=_gguf_tensors,
        merges=True,
        marks=tuple(BLOCK_TYPES),
        requires=("gguf",),
        types=TYPES,
        export="quantlab.formats.gguf.checkpoint:export",
        load="quantlab.formats.gguf.checkpoint:load",
    ),
    "bitsandbytes": Format(
        "bitsandbytes' own storage",
        Readers(("transformers", "vLLM"), ("transformers", "accelerate", "bitsandbytes")),
        requires=("bitsandbytes",),
    ),
}

# Formats that quantlab packs itself: of one width and group size a linear, and of block types.
PACKING: tuple[str, ...] = tuple(n for n, found in FORMATS.items() if found.module and not found.types)
OF_BLOCKS: tuple[str, ...] = tuple(n for n, found in FORMATS.items() if found.types)


def readers(format: str, unread: str = "") -> Readers:
    """Who reads a checkpoint of a ``format``. ``unread``: packed experts that transformers alone does not read,
    ``merged`` by it while it loads them, or ``stacked`` in one tensor in the files of the original."""
    if unread == "stacked":
        return _STACKED
    found = FORMATS[format]
    return (found.expert_readers if unread else None) or found.readers


def misfit(format: str, bits: int, group_size: int, in_features: int, out_features: int) -> str | None:
    """Why a linear of this shape cannot be stored in ``format``, or None if it can."""
    held = FORMATS[format]
    if bits not in held.bits:
        return f"the {format} format holds {', '.join(map(str, held.bits))} bits, not {bits}"
    if group_size != -1 and in_features % group_size:
        fitting = [str(size) for size in GROUP_SIZES if in_features % size == 0] + ["-1 (per channel)"]
        return (
            f"its {in_features} inputs are not divisible by group_size {group_size}; "
            f"group sizes that work for it: {', '.join(fitting)}"
        )
    return held.fits(bits, in_features, out_features)


def fitting_widths(format: str, group_size: int, in_features: int, out_features: int) -> tuple[int, ...]:
    """The widths at which ``format`` can hold a linear of this shape; empty where none fits."""
    held = FORMATS[format].bits
    return tuple(bits for bits in held if misfit(format, bits, group_size, in_features, out_features) is None)


def common_group_sizes(inputs: set[int]) -> list[int]:
    """Group sizes that divide every one of these input widths."""
    return [size for size in GROUP_SIZES if all(width % size == 0 for width in inputs)]
