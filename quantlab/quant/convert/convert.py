"""A quantized checkpoint in another layout, block by block: read, chosen for, written, proved.

First every packed linear is read once, which tells what the layout holds (``choose``) and finds damage; whatever cannot
be held is refused then, before anything is written. Then each is read again and packed by the layout's writer, and
what was packed is read back and compared with what was read, weight by weight. At the end a fresh process loads both
checkpoints and computes with them (``verify``).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from quantlab import __version__
from quantlab.errors import DataError, QuantlabError
from quantlab.formats import format_module
from quantlab.formats.codes import Codes, refit, rounding_error
from quantlab.formats.gguf.checkpoint import Held, lay_out
from quantlab.formats.gguf.file import file_bytes
from quantlab.formats.gguf.groups import blocks_of
from quantlab.formats.gguf.pack import pack as pack_blocks
from quantlab.formats.gguf.pack import unpack
from quantlab.models.blockwise import BlockwiseModel
from quantlab.models.provenance import provenance
from quantlab.models.safetensors.files import TensorInfo
from quantlab.models.safetensors.tensors import PIECE, read_tensor
from quantlab.models.scaled import scaled_activations
from quantlab.paths import slug
from quantlab.progress import Progress
from quantlab.quant.block_selection import places_of
from quantlab.quant.checkpoint import CheckpointWriter
from quantlab.quant.convert.choose import DTYPES, Allowed, Choice, Fits, choose, fits_of, listed
from quantlab.quant.convert.source import CONVERTED, GGUF, Source
from quantlab.quant.selection import reads_experts
from quantlab.registry import load
from quantlab.registry.block_types import BLOCK_TYPES
from quantlab.registry.formats import FORMATS, Contents

PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SCALED = ".scales"  # how tensors behind activations end, which some awq checkpoints have


@dataclass
class Conversion:
    """A checkpoint and the layout that it is to have. ``made`` by :func:`prepare`.

    fits: what holds each packed linear. choice: how each is stored. plain: all tensors that are not packed and go
    along, by the dtype that they are stored in.
    """

    source: Source
    to: str
    allowed: Allowed
    opened: BlockwiseModel
    fits: Mapping[str, Fits]
    choice: Choice
    plain: Mapping[str, tuple[TensorInfo, str]]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.allowed.dtype]

    @cached_property
    def type(self) -> str:
        """The block type that most weights of a GGUF file have; empty for other layouts."""
        weights: Counter[str] = Counter()
        for name, kind in self.choice.kinds.items():
            weights[kind] += self.fits[name].shape[0] * self.fits[name].shape[1]
        return weights.most_common(1)[0][0] if weights else ""

    @property
    def unread(self) -> str:
        """Packed experts that transformers alone does not read, as ``Selection.unread``."""
        layers = self.opened.layers
        packed = bool(layers.experts & self.fits.keys()) and not reads_experts(self.to, layers)
        return ("stacked" if layers.stacked else "merged") if packed else ""

    def bits_per_weight(self) -> float:
        """Of the packed linears, in the files that will be written: codes, scales and zeros."""
        from quantlab.models.safetensors.files import DTYPE_BYTES
        from quantlab.registry.formats import Linear

        total = weights = 0.0
        for name, fits in self.fits.items():
            bits, size = self.choice.widths[name]
            groups = 1 if size == -1 else fits.shape[1] // size
            plain = {of: short for short, of in PLAIN.items()}[self.allowed.dtype]
            linear = Linear(*fits.shape, bits, groups, plain, type=self.choice.kinds.get(name, ""))
            for kind, shape in FORMATS[self.to].tensors(linear).values():
                total += 8 * DTYPE_BYTES[kind] * torch.Size(shape).numel()
            weights += fits.shape[0] * fits.shape[1]
        return total / weights

    def contents(self) -> Contents:
        """What the checkpoint's ``quantization_config`` says."""
        opened, widths = self.opened, self.choice.widths
        usual = Counter(widths.values()).most_common(1)[0][0]
        names = opened.names
        return Contents(
            widths,
            bits=usual[0],
            group_size=usual[1],
            symmetric=self.choice.symmetric,
            options={"act_order": not all(fits.ordered for fits in self.fits.values())},
            quantizer=f"quantlab:{__version__}",
            ignore=opened.left_out(widths),
            kept=self.kept,
            blocks=opened.prefix,
            aliases={name: names.in_model(name) for name in widths if names.in_model(name) != name},
            type=self.type,
            name=slug(self.source.files.name),
        )

    @property
    def kept(self) -> list[str]:
        """The linears in the blocks that are not packed."""
        layers = self.opened.layers
        return sorted({*layers.shapes, *layers.kept} - self.fits.keys())

    def config(self) -> dict[str, Any]:
        """config.json of the checkpoint.

        Raises:
            DataError: the layout cannot say what is packed.
        """
        said = ("torch_dtype", "dtype", "quantization_config")
        config = {key: value for key, value in self.source.files.config.items() if key not in said}
        try:
            described = format_module(self.to).config(self.contents())
        except ValueError as error:
            raise DataError(f"{self.source.files.name} cannot be converted to {self.to}: {error}") from error
        return config | {"dtype": self.allowed.dtype, "quantization_config": described}


def prepare(
    source: Source,
    to: str,
    *,
    tolerance: float = 0.0,
    widen: bool = False,
    trust_remote_code: bool = False,
    progress: Progress,
) -> Conversion:
    """Everything up to the first byte that is written.

    Args:
        to: one of ``CONVERTED``. tolerance: how far a scale or minimum may be off, relative to itself. widen: codes may
            take more bits than they have now.

    Raises:
        DataError: the layout does not hold the checkpoint, by linear and with the reason; or the checkpoint is damaged.
    """
    called = source.files.name
    if source.format == to:
        raise DataError(
            f"{called} is {to} already", hint=f"--to {' or '.join(n for n in CONVERTED if n != to)}"
        )
    opened = BlockwiseModel(source.skeleton, "cpu", torch.float32, trust_remote_code)
    allowed = Allowed(tolerance, widen, "float16" if source.format == GGUF else _dtype(source))
    fits: dict[str, Fits] = {}
    with progress.task(f"reading {called}", total=len(source.packed)) as advance:
        for name in source.packed:
            alias = opened.names.in_model(name)
            held = source.codes(name, alias)
            fits[name] = fits_of(held, source.bits(name, held), source.group_size(held, name, alias))
            advance(1)
    others = tuple(name for name in CONVERTED if name not in (to, source.format))
    together = _tensor_of(opened, source) if to == GGUF else str
    choice = choose(to, fits, allowed, called, others, together)
    found = Conversion(source, to, allowed, opened, fits, choice, _plain(source, to, allowed))
    _refuse_misplaced(found)
    found.config()
    if to == GGUF:
        _refuse_unwritable(found)
    return found


def _dtype(source: Source) -> str:
    """What a checkpoint's plain tensors are in, as its configuration says, else as most of them are."""
    told = str(source.files.config.get("dtype") or source.files.config.get("torch_dtype"))
    if told in DTYPES:
        return told
    kinds = Counter(PLAIN[info.dtype] for info in source.plain.values() if info.dtype in PLAIN)
    return kinds.most_common(1)[0][0] if kinds else "float16"


def _tensor_of(opened: BlockwiseModel, source: Source) -> Any:
    """By a linear's name, the tensor of a GGUF file that it is, or is a part of.

    Raises:
        DataError: as ``formats.gguf.architectures``.
    """
    places = places_of(source.files)

    def named(name: str) -> str:
        place = places.of(f"{name}.weight")
        return name if place is None else place.name

    return named


def _plain(source: Source, to: str, allowed: Allowed) -> dict[str, tuple[TensorInfo, str]]:
    """The plain tensors and the dtype each is stored in: its own; of a GGUF file, whose embedding and head may be
    quantized, the checkpoint's where that holds every value, else float32.

    Raises:
        DataError: scales behind activations, which only the awq layout has.
    """
    found = {}
    for name, info in source.plain.items():
        if name.endswith(SCALED) and name not in source.skeleton.tensors and to != "awq":
            continue
        if source.format == "awq" and to != "awq" and name.endswith("act" + SCALED):
            if bool((read_tensor(info).to(torch.float32) != 1).any()):
                raise DataError(
                    f"{source.files.name}: {name} scales an activation, for which {to} has no place",
                    hint="quantize the original model into this format",
                )
            continue
        dtype = PLAIN.get(info.dtype, "")
        if source.format == GGUF and not _survives(info, DTYPES[allowed.dtype], allowed.tolerance):
            dtype = "float32"
        elif source.format == GGUF:
            dtype = allowed.dtype
        found[name] = (info, dtype)
    return found


def _survives(info: TensorInfo, dtype: torch.dtype, tolerance: float) -> bool:
    """Whether every value of a tensor is the same in ``dtype``, but for ``tolerance``."""
    rows = max(1, PIECE // 4 // max(info.count // info.shape[0], 1))
    parts = (slice(start, start + rows) for start in range(0, info.shape[0], rows))
    return all(rounding_error(read_tensor(info, part), dtype) <= tolerance for part in parts)


def _refuse_misplaced(found: Conversion) -> None:
    """Refuse packed linears that readers of the layout pass over, by name."""
    layers, held, to = found.opened.layers, FORMATS[found.to], found.to
    reasons = {}
    for name in found.fits:
        odd = [held.unread[trait] for trait in sorted(layers.traits.get(name, ())) if trait in held.unread]
        if odd:
            reasons[name] = odd[0]
        elif name not in layers.shapes and not held.types:
            reasons[name] = "it lies outside the blocks, where readers of the layout expect no packed linear"
    if reasons:
        hint = "" if to == GGUF else "a GGUF file holds linears outside the blocks too: --to gguf"
        raise DataError(
            f"{found.source.files.name} cannot be converted to {to}: {listed(reasons)}", hint=hint
        )
    if layers.stacked and layers.experts & found.fits.keys():
        raise DataError(
            f"{found.source.files.name}: its experts are one tensor in the original's files, and are not converted"
        )


def _refuse_unwritable(found: Conversion) -> None:
    """Make the header of the GGUF file, which needs a name for every tensor, the configuration and the tokenizer."""
    files, places = found.source.files, places_of(found.source.files)
    held = {f"{name}.weight": Held(kind, found.fits[name].shape) for name, kind in found.choice.kinds.items()}
    held |= {name: Held(info.dtype, info.shape) for name, (info, _) in found.plain.items()}
    entries = lay_out(held, places, lambda name: torch.empty(0))
    file_bytes(entries, files.path, places.settings, found.type, places.called)


def write(found: Conversion, out: Path, progress: Progress) -> CheckpointWriter:
    """Write the checkpoint beside ``out``; it has everything but its provenance and its name.

    Raises:
        QuantlabError: what was packed does not say what was read. MachineError: as ``CheckpointWriter``.
    """
    opened, source = found.opened, found.source
    blocks, prefix = len(opened.blocks), opened.stored_prefix
    key = {"converted": source.digest, "to": found.to}
    writer = CheckpointWriter(out, prefix, blocks, found.dtype, key, resume=False)
    writer.exact = ("",)  # every tensor is given in the dtype that it is to have
    inside: list[dict[str, torch.Tensor | TensorInfo]] = [{} for _ in range(blocks)]
    outside: dict[str, torch.Tensor | TensorInfo] = {}
    owner = {f"{prefix}.{index}.": index for index in range(blocks)}

    def block_of(name: str) -> tuple[int, str] | None:
        start = prefix + "." + name.removeprefix(prefix + ".").partition(".")[0] + "."
        return (owner[start], name.removeprefix(start)) if start in owner and name.startswith(start) else None

    later: list[tuple[str, TensorInfo, str]] = []
    packed: list[list[str]] = [[] for _ in range(blocks)]
    for name in found.fits:
        if (place := block_of(name)) is None:
            outside |= _packed(found, name)
        else:
            packed[place[0]].append(name)
    for name, (info, dtype) in found.plain.items():
        if (place := block_of(name)) is None:
            later.append((name, info, dtype))
        else:
            inside[place[0]][place[1]] = _in(info, dtype)
    with progress.task(f"writing {found.to}", total=blocks) as advance:
        for index in range(blocks):
            tensors = inside[index]
            for name in packed[index]:
                tensors |= {
                    key.removeprefix(f"{prefix}.{index}."): t for key, t in _packed(found, name).items()
                }
            if FORMATS[found.to].unscaled:
                model_type = opened.config.model_type
                for name, channels in scaled_activations(opened.blocks[index], model_type).items():
                    tensors[name] = torch.ones(channels, dtype=found.dtype)
            writer.write_block(index, tensors, {})
            inside[index] = {}
            advance(1)
    writer.write_rest(outside | {name: _in(info, dtype) for name, info, dtype in later})
    config = found.config()
    writer.assemble(source.files.path, config)
    if (export := FORMATS[found.to].export) is not None:
        writer.export(load(export), source.files.path, config)
    return writer


def _in(info: TensorInfo, dtype: str) -> torch.Tensor | TensorInfo:
    """A plain tensor as the writer takes it: in its file where it stays as it is there."""
    if info.reader is None or dtype == "float32":
        return info
    return read_tensor(info).to(DTYPES[dtype])


def _packed(found: Conversion, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a linear in the new layout, by their full names."""
    held = found.source.codes(name, found.opened.names.in_model(name))
    bits, group_size = found.choice.widths[name]
    symmetric, to = found.choice.symmetric, found.to
    if to == GGUF:
        kind = BLOCK_TYPES[found.choice.kinds[name]]
        tensors = {kind.name: pack_blocks(blocks_of(held, kind))}
        again = unpack(tensors[kind.name], kind).dequantize()
    else:
        module = format_module(to)
        fitted = refit(held, bits, symmetric=symmetric, zero_min=FORMATS[to].zero_min)
        if fitted is None:
            raise QuantlabError(f"{name} changed while it was converted")
        tensors = module.pack(*fitted[:4], bits=bits, group_size=group_size, symmetric=symmetric)
        for leaf, tensor in tensors.items():
            if tensor.is_floating_point() and not FORMATS[to].own_dtype:
                tensors[leaf] = tensor.to(found.dtype)
        read = {"bits": bits, "group_size": group_size}
        codes, scales, zeros, group_of = module.unpack(tensors, **read)
        again = Codes(codes, scales, zeros.to(torch.int32), group_of, bits).dequantize()
    _refuse_changed(name, held.dequantize(), again, found.allowed.tolerance)
    return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}


def _refuse_changed(name: str, before: torch.Tensor, after: torch.Tensor, tolerance: float) -> None:
    """Hold the weights that were packed, float32 [out, in], against those that were read."""
    if torch.equal(before, after):
        return
    largest = (
        before.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    )  # a minimum moves small weights as much as large
    off = ((after - before).abs() / largest).amax().item()
    if not off <= 2 * tolerance:
        raise QuantlabError(
            f"{name}: the converted weights differ by up to {off:.2g} of the largest in their row"
        )


@dataclass(frozen=True)
class Proof:
    """What the fresh process found of both checkpoints, as ``Verification.record`` gives it."""

    source: Mapping[str, Any]
    converted: Mapping[str, Any]


def prove(
    found: Conversion, writer: CheckpointWriter, *, device: str = "cpu", trust_remote_code: bool = False
) -> Proof:
    """Load the source and what was made of it in a fresh process, and hold the logits of both against what the codes of
    the source stand for.

    Raises:
        QuantlabError: one of them computes something else.
    """
    from quantlab.quant.verify.reference_logits import expected_of, probe_rows
    from quantlab.quant.verify.reload import Check, raise_if_failed, verify

    source = found.source
    rows = probe_rows(None, int(found.opened.config.get_text_config().vocab_size))
    expected = expected_of(source.files, rows, trust_remote_code)
    layers = found.opened.layers
    apart = bool(layers.experts & found.fits.keys()) and source.format != GGUF
    claims = [
        Check(source.path, expected, source.files.name, apart and not reads_experts(source.format, layers)),
        Check(writer.finished, expected, f"{source.files.name} as {found.to}", bool(found.unread)),
    ]
    before, after = verify(claims, rows, device=device, trust_remote_code=trust_remote_code)
    for one, claim in ((before, claims[0]), (after, claims[1])):
        if not one.passed:
            raise_if_failed(one, claim.label, writer.fail())
    return Proof(before.record(), after.record())


def record_of(found: Conversion, proof: Proof | None, seconds: float) -> dict[str, Any]:
    """quantlab.json: what the source says of how it was quantized, and that it was converted."""
    source = found.source
    made = {k: v for k, v in provenance(source.files.path).items() if k not in OF_THE_FILES}
    chain = [*made.pop("converted", []), _step(found, seconds)]
    record: dict[str, Any] = {
        **made,
        "quantlab_version": __version__,
        "parent": made.get("parent", source.files.name),
        "parent_digest": made.get("parent_digest", source.digest),
        "experts": bool(found.opened.layers.experts),
        "experts_unread": found.unread,
        "group_sizes": sorted({size for _, size in found.choice.widths.values()}, reverse=True),
        "kept": made.get("kept")
        or dict.fromkeys(found.kept, "the checkpoint that was converted has it in 16 bits"),
        "converted": chain,
    }
    if proof is not None:
        record["verification"] = dict(proof.converted)
        record["verification_of_source"] = dict(proof.source)
    return record


# What quantlab.json says of one set of files and not of another: a converted checkpoint is none that the recipe made.
OF_THE_FILES = (
    "recipe_digest", "verification", "verification_of_source", "forecast", "actual", "widths", "group_sizes",
    "experts_unread",
)  # fmt: skip


def _step(found: Conversion, seconds: float) -> dict[str, Any]:
    widths: Mapping[str, Any] = found.choice.kinds or {
        n: bits for n, (bits, _) in found.choice.widths.items()
    }
    return {
        "from": found.source.files.name,
        "digest": found.source.digest,
        "from_format": found.source.format,
        "to": found.to,
        "type": found.type,
        "linears": {str(width): count for width, count in Counter(widths.values()).items()},
        "exact": found.choice.error == 0,
        "largest_error": found.choice.error,
        "quantlab_version": __version__,
        "seconds": round(seconds, 3),
    }


def convert(
    found: Conversion,
    out: Path,
    *,
    progress: Progress,
    verify: bool = True,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write, prove and publish; returns the content of quantlab.json.

    Raises:
        QuantlabError: as :func:`write` and :func:`prove`; nothing has the name ``out`` then.
    """
    started = time.perf_counter()
    writer = write(found, out, progress)
    proof = None
    if verify:
        with progress.task("loading both checkpoints"):
            proof = prove(found, writer, device=device, trust_remote_code=trust_remote_code)
    record = record_of(found, proof, time.perf_counter() - started)
    writer.publish(record)
    return record


__all__ = ["CONVERTED", "Conversion", "convert", "prepare"]
