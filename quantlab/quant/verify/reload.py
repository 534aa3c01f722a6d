"""Verification at the end of a run: a finished checkpoint, reloaded in a fresh process, computes what was intended.

What was intended is a few token rows through the model with the weights of the in-memory result, in float32 (see
``intended.ReferencePass``). The fresh process loads the checkpoint with plain transformers, through whatever kernels
read its layout, and hands its logits back. Experts in a layout that transformers does not read (``formats.readers``)
are taken apart first (``models.packed_experts``). Where the machine or ``--memory-limit`` has no room for that, or a
library is missing, it reads the files itself, one matrix at a time, which proves what was written but not the
kernels. The record says which it was.

Tolerances. Read back in float32 only the order of summation differs: 1e-6 measured, 1e-4 asked. Kernels round what they
multiply to 16 bits, and on a GPU everything between the products too. What that does to a model is measured on the
model itself (``Expected.rounded``: inputs of linears rounded to bfloat16); a checkpoint may differ by four times
that, since weights and outputs are rounded as well, the divergence by sixteen times, being quadratic, and both by no
less than 2 % and 1e-3 nats. A matrix of a wrong scale, zero or order changes logits by tens of per cent. Logits are
compared without their mean over the vocabulary, to which softmax is blind.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from quantlab.errors import MachineError, QuantlabError
from quantlab.models.memory import available
from quantlab.models.safetensors.files import ModelFiles, open_files
from quantlab.models.safetensors.weight_files import own_format
from quantlab.quant.verify import worker
from quantlab.quant.verify.reference_logits import Expected
from quantlab.registry.formats import FORMATS
from quantlab.workers import Forked, can_fork, last_line, start, stopping

IMPORTS = 2_000_000_000  # bytes that a process with transformers and its kernels holds before any weight, and to spare
SECONDS = 600.0  # for start and imports; a slow disk gets more by size
SLOWEST = 20e6  # bytes of checkpoint a second


@dataclass(frozen=True)
class Tolerance:
    """What may differ. ``relative``: Euclidean norm of the difference of logits over that of the intended ones.
    ``kl``: mean divergence of the next-token distributions from the intended ones, in nats."""

    relative: float
    kl: float


TOLERANCES = {"streamed": Tolerance(1e-4, 1e-5), "transformers": Tolerance(2e-2, 1e-3)}
LARGEST = Tolerance(0.25, 0.1)  # beyond this nothing is verified, however the model carries errors on


@dataclass(frozen=True)
class Verification:
    """What came of reloading one checkpoint. ``how``: ``transformers``, ``separated`` (experts apart),
    ``own reader`` (``Format.load``) or ``streamed``;
    ``why`` it was not transformers. ``top1``: share of positions whose most likely token is the intended one.
    ``peak_bytes``: of the fresh process, above what it held before it opened the checkpoint."""

    how: str
    dtype: str
    rows: int
    tokens: int
    max_abs: float
    relative: float
    top1: float
    kl: float
    tolerance: Tolerance
    seconds: float = 0.0
    peak_bytes: int = 0
    why: str = ""

    @property
    def passed(self) -> bool:
        """Never for NaN, of which no comparison is true."""
        return self.relative <= self.tolerance.relative and self.kl <= self.tolerance.kl

    def record(self) -> dict[str, Any]:
        """For quantlab.json."""
        return {"passed": self.passed, **{k: v for k, v in asdict(self).items() if v != ""}}


@dataclass(frozen=True)
class Check:
    """A checkpoint (its directory may still have its temporary name) and the logits float32 [rows, tokens,
    vocabulary] that it is to compute. ``label`` is what messages call it; ``apart``: it holds packed experts that
    transformers alone does not read."""

    checkpoint: Path
    expected: torch.Tensor
    label: str = ""
    apart: bool = False


@dataclass
class _Answer:
    """What the fresh process wrote about one checkpoint."""

    how: str = ""
    why: str = ""
    dtype: str = ""
    error: str = ""
    missing: bool = False  # the error is a library's absence
    seconds: float = 0.0
    peak_bytes: int = 0
    logits: torch.Tensor | None = field(default=None, repr=False)


def verify(
    claims: Sequence[Check],
    rows: torch.Tensor,
    *,
    device: str = "cpu",
    memory_limit: int | None = None,
    trust_remote_code: bool = False,
    seconds: float | None = None,
    ready: FreshProcess | None = None,
) -> list[Verification]:
    """Reload checkpoints in one fresh process and hold their logits against the reference logits.

    Args:
        rows: token ids int64 [rows, tokens], those that ``expected`` was computed for.
        memory_limit: bytes that the fresh process may hold above an idle one; None asks the machine.
        seconds: how long the process may take; None goes by the size of the checkpoints.
        ready: a process that was started before; it is used up.

    Returns:
        One verification for each check, passed or not: see :func:`raise_if_failed`.

    Raises:
        MachineError: the process was killed, or took too long. QuantlabError: it could not load a checkpoint at all.
    """
    hows = [_how(open_files(claim.checkpoint), memory_limit, claim.apart) for claim in claims]
    with ready if ready is not None else fresh_process(claims) as process:
        answers = _ask(process, claims, hows, rows, device, trust_remote_code, seconds)
    again = [
        i
        for i, answer in enumerate(answers)
        if answer.how != "streamed" and (answer.missing or not answer.how)
    ]
    if again:  # killed for its memory, or a library is not there: read back by quantlab itself
        why = [answers[i].error or "the process that loaded it with transformers was killed" for i in again]
        with FreshProcess() as process:
            streamed = [("streamed", reason) for reason in why]
            retried = _ask(
                process, [claims[i] for i in again], streamed, rows, "cpu", trust_remote_code, seconds
            )
        for i, answer in zip(again, retried, strict=True):
            answers[i] = answer
    return [_compare(claim, answer) for claim, answer in zip(claims, answers, strict=True)]


def raise_if_failed(found: Verification, label: str, kept: Path | None = None) -> None:
    """Refuse a checkpoint that does not compute what was intended. ``kept``: where it was put.

    Raises:
        QuantlabError: says by how much it differs.
    """
    if found.passed:
        return
    raise QuantlabError(
        f"{label}: reloaded ({found.how}), the checkpoint does not compute what was intended: its logits differ by "
        f"{found.relative:.2%} (allowed {found.tolerance.relative:.2%}), KL {found.kl:.2g} nats (allowed "
        f"{found.tolerance.kl:.2g}), the most likely token agrees at {found.top1:.1%} of positions",
        hint=f"it is not usable and was left in {kept} to be looked at" if kept else "it is not usable",
    )


def compare(expected: torch.Tensor, got: torch.Tensor) -> tuple[float, float, float, float]:
    """Largest absolute difference, relative difference, share of equal most likely tokens, mean KL divergence.

    Both are logits float [rows, tokens, vocabulary]."""
    if expected.shape != got.shape:
        raise QuantlabError(
            f"the reloaded checkpoint returns logits {tuple(got.shape)}, intended were {tuple(expected.shape)}"
        )
    one, other = (x.to(torch.float64) - x.to(torch.float64).mean(-1, keepdim=True) for x in (expected, got))
    difference = other - one
    relative = (difference.norm() / one.norm().clamp(min=1e-30)).item()
    logs = one.log_softmax(-1)
    kl = (logs.exp() * (logs - other.log_softmax(-1))).sum(-1).mean().item()
    top1 = (one.argmax(-1) == other.argmax(-1)).double().mean().item()
    return difference.abs().max().item(), relative, top1, max(kl, 0.0) if math.isfinite(kl) else kl


def tolerance(how: str, expected: Expected) -> Tolerance:
    """What a checkpoint may differ by when it is loaded in this way."""
    least = TOLERANCES["streamed" if how == "streamed" else "transformers"]
    if how == "streamed":
        return least
    _, relative, _, kl = compare(expected.logits, expected.rounded)
    return Tolerance(
        min(max(least.relative, 4 * relative), LARGEST.relative), min(max(least.kl, 16 * kl), LARGEST.kl)
    )


def _compare(claim: Check, answer: _Answer) -> Verification:
    if answer.logits is None:
        label = claim.label or str(claim.checkpoint)
        raise QuantlabError(f"{label}: the finished checkpoint cannot be loaded: {answer.error}")
    expected = claim.expected.logits
    max_abs, relative, top1, kl = compare(expected, answer.logits)
    rows, tokens = expected.shape[:2]
    return Verification(
        answer.how, answer.dtype, rows, tokens, max_abs, relative, top1, kl, tolerance(answer.how, claim.expected),
        round(answer.seconds, 3), answer.peak_bytes, answer.why,
    )  # fmt: skip


def _how(files: ModelFiles, memory_limit: int | None, apart: bool) -> tuple[str, str]:
    """How the checkpoint is to be loaded here, and why not with plain transformers."""
    needed = transformers_bytes(files)
    room = available() - IMPORTS if memory_limit is None else memory_limit
    if own_format(files.config):
        return "own reader", "the format has files of its own"
    if needed <= room and not apart:
        return "transformers", ""
    if needed <= room:
        return "separated", "plain transformers starts the experts of this layout from random numbers"
    limit = "of memory are free" if memory_limit is None else "are allowed by --memory-limit"
    return "streamed", f"transformers needs {needed / 1e9:.2f} GB, {max(room, 0) / 1e9:.2f} GB {limit}"


def transformers_bytes(files: ModelFiles) -> int:
    """Bytes that transformers takes for a checkpoint on the CPU: the packed weights with a copy of their largest file
    while they are loaded, and plain tensors in float32."""
    largest = max(file.stat().st_size for file in files.weight_files)
    plain = sum(t.count for t in files.tensors.values() if t.dtype in ("F16", "BF16", "F32"))
    return files.size_bytes + largest + 4 * plain


class FreshProcess:
    """The process that reloads checkpoints: started when this is made, so that it imports what it will need while the
    caller does other work; stopped when the context ends.

    Args:
        formats: of the checkpoints that it will be asked for, whose libraries it imports.
        early: nothing has been computed in this process yet, so that the fresh one may be forked from it once it has
            imported what both need.
    """

    def __init__(self, formats: Iterable[str] = (), *, early: bool = False) -> None:
        libraries = list(dict.fromkeys(module for name in formats for module in FORMATS[name].requires))
        self._folder = tempfile.TemporaryDirectory(prefix="quantlab-verify-")
        self.folder = Path(self._folder.name)
        self.process: subprocess.Popen[bytes] | Forked
        with (self.folder / "stderr").open("wb") as errors:
            if early and can_fork():
                worker.imports(())
                self.process = Forked(lambda: worker.main(libraries), errors)
            else:
                self.process = start(worker.__name__, errors, *libraries)

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with stopping(self.process):
            pass
        self._folder.cleanup()

    def ask(self, asked: Mapping[str, Any], limit: float) -> str:
        """Hand over the questions and wait, for ``limit`` seconds at most; what the process said on stderr."""
        with suppress(BrokenPipeError):  # it has died; what it said, and its exit code, tell why
            self.process.communicate(json.dumps(asked).encode(), timeout=limit)
        self.process.wait()
        return (self.folder / "stderr").read_text(encoding="utf-8", errors="replace")


def fresh_process(claims: Sequence[Check]) -> FreshProcess:
    """A process for these checkpoints."""
    kinds = [(open_files(claim.checkpoint).quantized or {}).get("quant_method") for claim in claims]
    return FreshProcess(str(kind) for kind in kinds if kind in FORMATS)


def _ask(
    fresh: FreshProcess,
    claims: Sequence[Check],
    hows: Sequence[tuple[str, str]],
    rows: torch.Tensor,
    device: str,
    trust_remote_code: bool,
    seconds: float | None,
) -> list[_Answer]:
    """Ask the process, wait, and read what it wrote. A checkpoint that it did not come to has an empty answer."""
    size = sum(open_files(claim.checkpoint).size_bytes for claim in claims)
    limit = SECONDS + size / SLOWEST if seconds is None else seconds
    questions = [
        {
            "checkpoint": str(claim.checkpoint.absolute()),
            "how": how,
            "why": why,
            "answer": str(fresh.folder / str(i)),
        }
        for i, (claim, (how, why)) in enumerate(zip(claims, hows, strict=True))
    ]
    asked = {
        "questions": questions,
        "rows": rows.tolist(),
        "device": device,
        "trust_remote_code": trust_remote_code,
        "threads": torch.get_num_threads(),
    }
    try:
        said = fresh.ask(asked, limit)
    except subprocess.TimeoutExpired as error:
        raise MachineError(
            f"reloading {', '.join(c.label or str(c.checkpoint) for c in claims)} took more than {limit:.0f} s",
            hint="is the machine busy? --resume tries again",
        ) from error
    answers = [_read(Path(q["answer"])) for q in questions]
    if fresh.process.returncode not in (0, -9, 137) and not all(a.how or a.error for a in answers):
        raise QuantlabError(f"the process that reloads checkpoints failed: {last_line(said)}")
    return answers


def _read(path: Path) -> _Answer:
    described, logits = path.with_suffix(".json"), path.with_suffix(".safetensors")
    if not described.is_file():
        return _Answer()
    answer = _Answer(**json.loads(described.read_text(encoding="utf-8")))
    if logits.is_file():
        answer.logits = load_file(logits)["logits"]
    return answer
