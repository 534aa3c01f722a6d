"""`quantlab convert`: a quantized checkpoint in another layout, exactly, or the reason why that cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.commands.guard import print_json, stdout_is_stderr
from quantlab.commands.quantize import check_device
from quantlab.errors import RecipeError
from quantlab.paths import nearest, slug
from quantlab.progress import Progress, default_progress
from quantlab.quant.checkpoint_paths import claim
from quantlab.registry.formats import OF_BLOCKS, PACKING, readers

TARGETS = (*OF_BLOCKS, *PACKING)


@dataclass(frozen=True)
class Options:
    """The command line, parsed."""

    to: str
    out: Path | None = None
    tolerance: float = 0.0
    widen: bool = False
    device: str = "cpu"
    verify: bool = True
    dry_run: bool = False
    trust_remote_code: bool = False


def run(checkpoint: str, options: Options, *, as_json: bool = False) -> None:
    """The verb: convert, then say where the result is (or one JSON document) on stdout."""
    with stdout_is_stderr():
        summary = convert_checkpoint(checkpoint, options, default_progress())
    if as_json:
        print_json(summary)
        return
    print("\n".join(lines(summary)))


def convert_checkpoint(checkpoint: str, options: Options, progress: Progress) -> dict[str, Any]:
    """Everything between the command line and its last line; returns the summary.

    Raises:
        RecipeError: an argument is wrong. DataError: as ``quant.convert``.
    """
    if options.to not in TARGETS:
        near = nearest(options.to, TARGETS)
        raise RecipeError(
            f"--to {options.to}: expected {', '.join(TARGETS)}", hint=f"did you mean {near}?" if near else ""
        )
    if not 0 <= options.tolerance < 0.1:
        raise RecipeError(f"--tolerance {options.tolerance}: expected a number from 0 to 0.1")
    check_device(options.device)
    out = options.out or Path("checkpoints") / slug(checkpoint) / options.to
    if not options.dry_run:
        claim(out)
    from quantlab.quant.convert.convert import convert, prepare
    from quantlab.quant.convert.source import open_source
    from quantlab.report.model_card import write_model_card

    source = open_source(checkpoint)
    found = prepare(
        source,
        options.to,
        tolerance=options.tolerance,
        widen=options.widen,
        trust_remote_code=options.trust_remote_code,
        progress=progress,
    )
    for note in found.choice.notes:
        progress.note(note)
    summary = {
        "status": "dry-run" if options.dry_run else "done",
        "checkpoint": checkpoint,
        "from": source.format,
        "to": options.to,
        "type": found.type,
        "linears": len(found.fits),
        "bits_per_weight": round(found.bits_per_weight(), 3),
        "exact": found.choice.error == 0,
        "largest_error": found.choice.error,
        "notes": list(found.choice.notes),
        "out": None if options.dry_run else str(out),
        "readers": readers(options.to, found.unread).text,
    }
    if options.dry_run:
        return summary
    from quantlab.models.load import pick_device

    record = convert(
        found,
        out,
        progress=progress,
        verify=options.verify,
        device=pick_device(options.device),
        trust_remote_code=options.trust_remote_code,
    )
    write_model_card(out, None)
    return summary | {
        "verification": record.get("verification"),
        "source": record.get("verification_of_source"),
    }


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary for people."""
    how = (
        "every weight as it was"
        if summary["exact"]
        else f"scales and minima off by up to {summary['largest_error']:.2g}"
    )
    kind = f" ({summary['type']})" if summary["type"] else ""
    text = [
        f"{summary['from']} to {summary['to']}{kind}: {summary['linears']} linears at "
        f"{summary['bits_per_weight']:.2f} bits a weight, {how}"
    ]
    if found := summary.get("verification"):
        text.append(
            f"loaded in a fresh process ({found['how']}): logits {found['relative']:.2g} off, KL {found['kl']:.2g} "
            f"nats; the source ({summary['source']['how']}): {summary['source']['relative']:.2g}, "
            f"{summary['source']['kl']:.2g}"
        )
    if summary["out"]:
        text.append(f"checkpoint: {summary['out']} ({summary['readers']})")
    return text
