"""Recipes to checkpoints: one walk through the model for all recipes that can share it.

``quantize`` groups recipes that share calibration rows, so that several recipes cost one pass; bitsandbytes recipes go
through its own library, one after the other. What can be refused beforehand is in ``jobs.py``.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab import __version__
from quantlab.errors import DataError, MachineError, RecipeError
from quantlab.models.safetensors.files import ModelFiles, open_files
from quantlab.progress import Progress
from quantlab.quant import FOLDING
from quantlab.quant.jobs import BITSANDBYTES, Job, Outcome, check, group_key
from quantlab.recipe.base import Calibration
from quantlab.recipe.quantize import QuantizeRecipe

if TYPE_CHECKING:
    import torch

    from quantlab.models.blockwise import Opened
    from quantlab.quant.mixed_precision.choose import Choice
    from quantlab.quant.sequential import Plan, Walk
    from quantlab.quant.verify.reference_logits import Probe

__all__ = ["Job", "Outcome", "Settings", "check", "quantize"]


@dataclass(frozen=True)
class Settings:
    """How a run is carried out; nothing here changes what comes out.

    memory_limit: bytes of resident memory to stay below; activations then lie in files, and freed memory is given back
        at once. None takes what is fastest.
    save_statistics: where to keep the statistics. statistics: where they are, from an earlier run.
    prove: reload every finished checkpoint in a fresh process and compare its logits with what was intended.
    """

    device: str = "auto"
    resume: bool = False
    trust_remote_code: bool = False
    memory_limit: int | None = None
    save_statistics: Path | None = None
    statistics: Path | None = None
    prove: bool = False


def quantize(
    jobs: Sequence[Job], model: str, *, progress: Progress, settings: Settings | None = None, **changes: Any
) -> list[Outcome]:
    """Apply every job to one model. Jobs whose calibration is the same share one pass over it.

    Args:
        settings: how; ``changes`` are single fields of it.

    Returns:
        One outcome a job, in order.

    Raises:
        QuantlabError: as :func:`check`, and for bad calibration data; blocks already written stay, for ``resume``.
    """
    from quantlab.models.finite import refuse_nonfinite
    from quantlab.models.load import pick_device
    from quantlab.quant.checkpoint import claim

    chosen = settings or Settings(**changes)
    files = open_files(model)
    for job in jobs:
        check(job.recipe, model, job.out)
        if job.recipe.method != "none":
            claim(job.out)
    if any(job.recipe.method != "none" for job in jobs):
        refuse_nonfinite(files)
    place = pick_device(chosen.device)
    outcomes: dict[int, Outcome] = {}
    groups: dict[str, list[int]] = {}
    for i, job in enumerate(jobs):
        if job.recipe.method == "none":
            outcomes[i] = Outcome(job, None)
        elif job.recipe.method in BITSANDBYTES:
            outcomes[i] = _bitsandbytes(job, files, place, progress, chosen.trust_remote_code)
        else:
            groups.setdefault(group_key(job.recipe), []).append(i)
    # Recipes without a need for data ride along with the first group that has one.
    for key in [k for k in groups if k.startswith("no data") and len(groups) > 1]:
        dtype = key.removeprefix("no data")
        other = next((k for k in groups if not k.startswith("no data") and k.endswith(dtype)), None)
        if other is not None:
            groups[other] += groups.pop(key)
    if len(groups) > 1 and (chosen.save_statistics or chosen.statistics):
        raise RecipeError(
            "these recipes differ in calibration or dtype, so there is no one set of statistics for them",
            hint="quantize them one after the other",
        )
    for members in groups.values():
        done = _Run([jobs[i] for i in members], files, place, progress, chosen).outcomes()
        outcomes.update(zip(members, done, strict=True))
    return [outcomes[i] for i in range(len(jobs))]


def _bitsandbytes(
    job: Job, files: ModelFiles, device: str, progress: Progress, trust_remote_code: bool
) -> Outcome:
    from safetensors import SafetensorError

    from quantlab.models.blockwise import dtype_of
    from quantlab.models.companions import copy_companions
    from quantlab.quant.checkpoint import partial_path
    from quantlab.quant.methods.bnb import quantize_bnb

    started = time.perf_counter()
    work = partial_path(job.out)
    if work.exists():
        shutil.rmtree(work)
    with progress.task(f"{job.name}: bitsandbytes", total=1) as advance:
        try:
            quantize_bnb(
                files.name,
                work,
                job.recipe.method,
                double_quant=job.recipe.double_quant,
                dtype=dtype_of(files, job.recipe.dtype),
                device=device,
                trust_remote_code=trust_remote_code,
            )
        except ImportError as error:
            raise MachineError(
                f"bitsandbytes cannot be used: {error}", hint="pip install bitsandbytes"
            ) from error
        except (OSError, SafetensorError) as error:
            raise MachineError(f"cannot write {work}: {error}", hint="is the disk full?") from error
        copy_companions(files.path, work)
        seconds = time.perf_counter() - started
        record = provenance_record(job, files, {}, seconds)
        (work / "quantlab.json").write_text(
            json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        work.rename(job.out)
        advance(1)
    return Outcome(job, job.out, seconds)


class _Run:
    """One walk through the model for jobs that share their calibration."""

    def __init__(
        self, jobs: Sequence[Job], files: ModelFiles, device: str, progress: Progress, settings: Settings
    ) -> None:
        from quantlab.models.blockwise import Opened, dtype_of
        from quantlab.models.memory import map_large, resident
        from quantlab.models.precision import computed_in

        if settings.memory_limit is not None:
            map_large()
        self.started, self.resident = time.perf_counter(), resident()
        self.jobs, self.files, self.progress, self.settings = jobs, files, progress, settings
        stored = dtype_of(files, jobs[0].recipe.dtype)
        self.opened = Opened(
            files, device, computed_in(stored, device), settings.trust_remote_code, stored=stored
        )
        self.rows, self.calibration = calibration_rows(jobs, files, settings.trust_remote_code)
        self.probe = self._probe() if settings.prove else None
        self.forecasts = self._forecasts() if settings.prove else []
        self.settled: dict[str, Plan] = {}  # the plans of jobs that leave the widths open

    def _probe(self) -> Probe:
        from quantlab.quant.verify.reference_logits import Probe, probe_rows

        opened, settings = self.opened, self.settings
        rows = probe_rows(self.rows, int(opened.config.vocab_size))
        return Probe(self.files, rows, str(opened.device), plain_dtype(opened), settings.trust_remote_code)

    def _forecasts(self) -> list[dict[str, Any]]:
        """What each job should take, to be set beside what it took."""
        from quantlab.quant.estimate.forecast import together
        from quantlab.quant.estimate.machine_speed import measure

        device, spilled = self.opened.device.type, self.settings.memory_limit is not None
        rates = measure(device, self.opened.dtype)
        recipes = [job.recipe for job in self.jobs]
        found, _ = together(recipes, self.files, rates, device=device, spilled=spilled)
        return [one.record() for one in found]

    def outcomes(self) -> list[Outcome]:
        """Solve, assemble, prove, publish."""
        from quantlab.quant.sequential import quantize_blocks

        jobs, progress = self.jobs, self.progress
        made = [self._plans(job) for job in jobs]
        sharing = [j.name for j in jobs if j.recipe.needs_calibration and j.recipe.propagate == "original"]
        if self.rows is not None:
            size, source = f"{self.rows.shape[0]} x {self.rows.shape[1]} tokens", self.calibration["source"]
            shared = f"shared by {', '.join(sharing)}" if len(sharing) > 1 else f"for {jobs[0].name}"
            progress.note(f"one calibration pass ({size}, {source}) {shared}")
        plans = [plan for several in made for plan in several]
        walk = self._walk(plans)
        try:
            quantize_blocks(self.opened, walk, progress)
        except ValueError as error:  # a solver refuses its statistics
            raise DataError(f"{self.files.name}: {error}") from error
        if walk.unreached:
            names = ", ".join(walk.unreached[:3]) + (", ..." if len(walk.unreached) > 3 else "")
            progress.note(
                f"no calibration token reached {len(walk.unreached)} layers, rounded to nearest: {names}"
            )
        common = time.perf_counter() - self.started - sum(plan.seconds for plan in plans)
        outcomes = []
        for job, several in zip(jobs, made, strict=True):
            plan, started, choice = several[0], time.perf_counter(), None
            if job.recipe.bits == "auto":
                choice = self._chosen(job, several, walk)
                plan = choice.plan
            assemble(plan, job, self.files, self.opened, choice.widths if choice else None)
            outcomes.append(
                Outcome(
                    job,
                    job.out,
                    # about what this recipe alone would have taken
                    common + sum(p.seconds for p in several) + time.perf_counter() - started,
                    len(sharing) > 1 and job.name in sharing,
                    self.calibration,
                    dict(sorted(plan.writer.losses.items())),
                    choice.record() if choice else {},
                )
            )
            several[0] = plan
        self._publish(outcomes, [several[0] for several in made])
        return outcomes

    def _plans(self, job: Job) -> list[Plan]:
        """One plan, or with ``bits: auto`` one for every width."""
        from quantlab.quant.mixed_precision.choose import width_plans

        resume = self.settings.resume
        plan = make_plan(job, self.files, self.opened, self.calibration, resume)
        if job.recipe.bits != "auto":
            return [plan]
        self.settled[job.name] = plan
        return width_plans(plan, job.recipe.widths, resume=resume)

    def _chosen(self, job: Job, solved: Sequence[Plan], walk: Walk) -> Choice:
        from quantlab.quant.mixed_precision.choose import choose

        opened, folds = self.opened, walk.structures
        found = [folds.of(i, block) for i, block in enumerate(opened.blocks)] if folds else []
        assert self.rows is not None and job.recipe.target_bits is not None
        return choose(
            self.settled[job.name], solved, opened, self.files, self.rows, job.recipe.target_bits,
            self.probe, self.progress, found if job.recipe.method in FOLDING else [],
        )  # fmt: skip

    def _walk(self, plans: Sequence[Plan]) -> Walk:
        from quantlab.quant.hessian_store import StatisticsStore
        from quantlab.quant.sequential import open_walk

        key = {"model": self.files.digest, "calibration": str(self.calibration.get("digest", ""))}
        blocks, settings = len(self.opened.blocks), self.settings
        keep = reuse = None
        if settings.save_statistics is not None:
            keep = StatisticsStore.make(settings.save_statistics, blocks, key)
        if settings.statistics is not None:
            reuse = StatisticsStore.open(settings.statistics, blocks, key)
        spill = plans[0].writer.scratch / "activations" if settings.memory_limit else None
        return open_walk(
            self.opened, self.rows, plans, spill=spill, key=key, probe=self.probe, keep=keep, reuse=reuse
        )

    def _publish(self, outcomes: Sequence[Outcome], plans: Sequence[Plan]) -> None:
        """Prove the assembled checkpoints, all in one fresh process, and give them their names."""
        from quantlab.models.memory import peak_resident
        from quantlab.quant.estimate.forecast import actual
        from quantlab.quant.verify.reload import Claim, Proof, prove, require

        proofs: list[Proof | None] = [None] * len(plans)
        if self.probe is not None:
            claims = []
            for outcome, plan in zip(outcomes, plans, strict=True):
                assert plan.probe is not None
                claims.append(Claim(plan.writer.work, self.probe.logits(plan.probe), outcome.job.name))
            with self.progress.task("reloading what was written"):
                proofs = list(
                    prove(
                        claims,
                        self.probe.rows,
                        device=str(self.opened.device),
                        memory_limit=self.settings.memory_limit,
                        trust_remote_code=self.settings.trust_remote_code,
                    )
                )
        for i, (outcome, plan, proof) in enumerate(zip(outcomes, plans, proofs, strict=True)):
            if proof is not None and not proof.passed:
                require(proof, outcome.job.name, plan.writer.fail())
            record = provenance_record(outcome.job, self.files, self.calibration, outcome.seconds)
            record |= {"shared_calibration": outcome.shared_calibration, "loss": outcome.loss}
            if outcome.widths:
                record["widths"] = outcome.widths
            if proof is not None:
                size = sum(file.stat().st_size for file in plan.writer.work.glob("*.safetensors"))
                took = actual(size, peak_resident() - self.resident, outcome.seconds)
                record |= {"proof": proof.record(), "forecast": self.forecasts[i], "actual": took}
            plan.writer.publish(record)


def calibration_rows(
    jobs: Sequence[Job], files: ModelFiles, trust_remote_code: bool
) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """The token rows that the jobs share, and their provenance; (None, {}) when none looks at data."""
    wanting = [job for job in jobs if job.recipe.needs_calibration]
    if not wanting:
        return None, {}
    from quantlab.calibration import digest, read_texts, token_rows
    from quantlab.models.load import load_tokenizer

    wish: Calibration = wanting[0].recipe.calibration
    limit = files.positions
    if limit is not None and wish.seq_len > limit:
        raise RecipeError(
            f"calibration.seq_len {wish.seq_len} is longer than the {limit} positions of {files.name}",
            hint=f"--set calibration.seq_len={limit}",
        )
    texts = read_texts(wish.source)
    tokenizer = load_tokenizer(files, trust_remote_code)
    rows = token_rows(texts, tokenizer, rows=wish.rows, seq_len=wish.seq_len, seed=wish.seed)
    return rows, {"source": wish.source, "rows": wish.rows, "seq_len": wish.seq_len, "digest": digest(rows)}


def make_plan(
    job: Job, files: ModelFiles, opened: Opened, calibration: Mapping[str, Any], resume: bool
) -> Plan:
    """A job as the engine needs it. With ``bits: auto`` the grid is that of the widest codes."""
    from quantlab.formats import layout
    from quantlab.quant.checkpoint import CheckpointWriter
    from quantlab.quant.grid import Grid
    from quantlab.quant.sequential import Plan

    recipe, dtype = job.recipe, plain_dtype(opened)
    key = {
        "recipe": recipe.digest(),
        "model": files.digest,
        "calibration": str(calibration.get("digest", "")),
    }
    writer = CheckpointWriter(job.out, opened.stored_prefix, len(opened.blocks), dtype, key, resume=resume)
    writer.exact = opened.exact
    grid = Grid(max(recipe.widths), recipe.group_size, recipe.symmetric, layout(recipe.format).ZERO_MIN)
    propagate = recipe.propagate if recipe.needs_calibration else "original"
    return Plan(job.name, recipe.method, grid, recipe.format, writer, method_options(recipe), propagate)


def method_options(recipe: QuantizeRecipe) -> dict[str, Any]:
    """The keyword arguments of a recipe's method."""
    names = {
        "gptq": ("damp", "act_order", "static_groups"),
        "awq": ("scale_search", "clip_search", "search_steps"),
    }
    return {name: getattr(recipe, name) for name in names.get(recipe.method, ())}


def plain_dtype(opened: Opened) -> torch.dtype:
    """What a checkpoint's plain tensors are stored in: the kernels behind the layouts compute in 16 bit."""
    import torch

    return opened.stored if opened.stored != torch.float32 else torch.float16


def assemble(
    plan: Plan, job: Job, files: ModelFiles, opened: Opened, widths: Mapping[str, tuple[int, int]] | None
) -> None:
    """Write everything but the blocks. ``widths``: bits and group size of each linear, where they differ."""
    from quantlab.formats import layout

    inside = opened.stored_prefix + "."
    plan.writer.write_rest({n: info for n, info in files.tensors.items() if not n.startswith(inside)})
    recipe = job.recipe
    described = layout(recipe.format).config(
        widths or dict.fromkeys(files.block_linears(), (plan.grid.bits, recipe.group_size)),
        bits=plan.grid.bits,
        group_size=recipe.group_size,
        symmetric=recipe.symmetric,
        act_order=recipe.act_order is True,
        static_groups=recipe.static_groups,
        damp=recipe.damp,
        quantizer=f"quantlab:{__version__}",
        ignore=opened.kept(),
        **({"floating": True} if recipe.method == "fp8" else {}),
    )
    config = {k: v for k, v in files.config.items() if k not in ("torch_dtype", "dtype")}
    config |= {"dtype": str(plan.writer.dtype).removeprefix("torch."), "quantization_config": described}
    plan.writer.assemble(files.path, config)


def provenance_record(
    job: Job, files: ModelFiles, calibration: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """What a checkpoint was made from and how, kept in it as quantlab.json."""
    return {
        "quantlab_version": __version__,
        "recipe": job.recipe.content(),
        "recipe_digest": job.recipe.digest(),
        "parent": files.name,
        "parent_digest": files.digest,
        "calibration": dict(calibration),
        "experts": files.has_experts,
        "seconds": round(seconds, 3),
    }
