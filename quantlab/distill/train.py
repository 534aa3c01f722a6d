"""Training the student: trl's SFTTrainer on blocks of tokens, with the loss on the answers alone.

What is added to the trainer: logits are computed only where something is learned; packed blocks bring their own
attention; on CPUs a LoRA layer is one product; the losses of logit distillation; checkpoints that are known to be
whole, so that a training killed at any moment goes on from the last one and ends as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from quantlab.distill import packed_attention
from quantlab.distill.data import IGNORED, Block, Example, collate
from quantlab.distill.fused_lora import one_product
from quantlab.distill.losses import divergence_sum
from quantlab.distill.processes import is_first_process, process_count
from quantlab.distill.student import Student, train_in_float32
from quantlab.errors import DataError
from quantlab.paths import atomic_write_text
from quantlab.progress import Advance, Progress

WHOLE = "whole.json"  # written last into a checkpoint: it was not cut short
EVALUATIONS = 10  # of a training, unless told
MULTIPLE = 64  # lengths of packed blocks on CPUs, whose kernels are made anew for every length

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",  # one operation for all tensors, on CPUs too
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",  # Hu et al. 2024, arXiv:2404.06395
}


@dataclass(frozen=True)
class LogitLoss:
    """Learn a teacher's distribution. ``lookup`` gives, for an example, its log-probabilities float32
    [learned, K + 1] (the last column is the mass of all other tokens) and tokens int64 [learned, K]."""

    lookup: Callable[[Example], tuple[torch.Tensor, torch.Tensor]]
    kind: str  # forward_kl, reverse_kl, jsd
    vocabulary: int  # logits beyond are padding of the student's matrix
    temperature: float = 1.0
    weight: float = 1.0
    beta: float = 0.5


@dataclass
class Trained:
    """What a training was: ``curve`` has a line for every log (step, loss, learning rate, evaluation loss)."""

    steps: int
    tokens: int  # of the blocks, padding left out
    learned: int
    seconds: float
    loss: float
    eval_loss: float | None
    stopped_early: bool
    resumed_from: int | None
    processes: int = 1
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """Plain arguments of a training; what they mean is said in ``quantlab.recipe.distill.Train``."""

    epochs: float = 1.0
    max_steps: int | None = None
    lr: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    batch_size: int = 8
    accumulate: int = 1
    packed: bool = False
    checkpointing: bool = False
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_every: int | None = None
    patience: int | None = None
    save_every: int | None = None
    seed: int = 0
    report_to: tuple[str, ...] = ()

    def steps(self, blocks: int, processes: int = 1) -> int:
        """Optimizer steps for so many blocks, as the trainer counts them."""
        if self.max_steps is not None:
            return self.max_steps
        batches = -(-blocks // (self.batch_size * processes))
        return max(1, int(-(-(max(batches // self.accumulate, 1) * self.epochs) // 1)))


def train(
    student: Student,
    blocks: Sequence[Block],
    evaluated: Sequence[Block],
    settings: Settings,
    folder: Path,
    progress: Progress,
    logits: LogitLoss | None = None,
) -> Trained:
    """Train in place; ``folder`` holds the checkpoints, and a whole one found there is gone on from."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(trl|accelerate|peft|torch)(\..*)?")
    processes = process_count()
    steps = settings.steps(len(blocks), processes)
    every = settings.eval_every or max(1, steps // EVALUATIONS)
    folder.mkdir(parents=True, exist_ok=True)
    start = last_checkpoint(folder)
    grouped = settings.packed and _by_groups(student)
    if not student.device.startswith("cuda"):
        _keep_freed_memory()
    everything = [*blocks, *evaluated]
    numbers = list(range(len(everything)))
    follower = _Follower()
    started = time.perf_counter()
    with progress.task("optimizer steps", total=steps) as advance:
        follower.advance = advance
        trainer = _Trainer(
            model=student.model,
            args=_arguments(student, settings, folder, steps, every, bool(evaluated)),
            train_dataset=Dataset.from_dict({"block": numbers[: len(blocks)]}),
            eval_dataset=Dataset.from_dict({"block": numbers[len(blocks) :]}) if evaluated else None,
            data_collator=_Collator(everything, _pad(student.tokenizer), settings.packed, grouped),
            processing_class=student.tokenizer,
            callbacks=[follower, *_early_stop(settings)],
        )
        trainer.blocks, trainer.logit_loss = everything, logits
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if student.adapted:
            train_in_float32(student.model)  # trl stores the adapters of a quantized model in bfloat16
        with one_product(student.model):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        # Mixed precision wraps the model's forward; what is measured and saved from here on is the model itself.
        student.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    log = [dict(entry) for entry in trainer.state.log_history]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    best = trainer.state.best_metric if settings.patience else None
    return Trained(
        steps=trainer.state.global_step,
        tokens=sum(map(len, blocks)),
        learned=sum(example.learned for block in blocks for example in block.examples),
        seconds=time.perf_counter() - started,
        loss=losses[-1] if losses else float("nan"),
        eval_loss=best if best is not None else (evaluations[-1] if evaluations else None),
        stopped_early=trainer.state.global_step < steps,
        resumed_from=int(start.name.rpartition("-")[2]) if start else None,
        processes=processes,
        curve=log,
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole; those cut short are removed."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if (path / WHOLE).is_file():
            found.append(path)
        elif is_first_process():
            shutil.rmtree(path, ignore_errors=True)
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _arguments(
    student: Student, settings: Settings, folder: Path, steps: int, every: int, evaluates: bool
) -> SFTConfig:
    cpu = not student.device.startswith("cuda")
    optimizer = settings.optimizer
    if cpu and optimizer.endswith("8bit"):
        optimizer = "adamw"  # 8-bit states save GPU memory; there is none here
    save_every = settings.save_every or every
    best = settings.patience is not None
    if best:
        save_every = every  # the best one must have been saved
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.lr,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        lr_scheduler_kwargs=_schedule(settings.schedule, steps),
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=OPTIMIZERS[optimizer],
        bf16=student.precision == "bfloat16",
        fp16=student.precision == "float16",
        use_cpu=cpu,
        gradient_checkpointing=settings.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.checkpointing else None,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        load_best_model_at_end=best,
        metric_for_best_model="eval_loss" if best else None,
        greater_is_better=False if best else None,
        logging_steps=max(1, min(10, steps // 20)),
        report_to=list(settings.report_to) or "none",
        seed=settings.seed,
        data_seed=settings.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        log_level="error",
        ddp_backend="gloo" if cpu and "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,
    )


def _schedule(name: str, steps: int) -> dict[str, Any]:
    if name != "wsd":
        return {}
    return {"num_decay_steps": steps // 2, "decay_type": "linear", "min_lr_ratio": 0.0}


def _pad(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id)


def _by_groups(student: Student) -> bool:
    """On CPUs attention by groups, where the model looks attention up in transformers' table (True); else a dense mask,
    which PyTorch's attention takes."""
    model = student.model.get_base_model() if student.adapted else student.model
    packed_attention.register()
    if not student.device.startswith("cuda"):
        with contextlib.suppress(ValueError):
            model.set_attn_implementation(packed_attention.NAME)
            return bool(model.config._attn_implementation == packed_attention.NAME)
    try:
        model.set_attn_implementation("sdpa")
    except ValueError as error:
        raise DataError(
            f"{student.files.name} has an attention of its own, which cannot keep packed rows apart: {error}",
            hint="set train.packing: none",
        ) from error
    return False


def _keep_freed_memory() -> None:
    """Activations come and go with every step; glibc would give them back to the system each time, and a tenth of the
    time goes into getting them anew."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def _early_stop(settings: Settings) -> list[TrainerCallback]:
    from transformers import EarlyStoppingCallback

    return [EarlyStoppingCallback(settings.patience)] if settings.patience else []


class _Collator:
    """Numbers of blocks → a batch."""

    def __init__(self, blocks: Sequence[Block], pad: int, packed: bool, grouped: bool) -> None:
        self.blocks, self.pad, self.packed, self.grouped = blocks, pad, packed, grouped

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        chosen = [self.blocks[row["block"]] for row in rows]
        multiple = MULTIPLE if self.grouped else 1
        batch: dict[str, Any] = dict(collate(chosen, self.pad, self.packed and not self.grouped, multiple))
        batch["numbers"] = torch.tensor([row["block"] for row in rows])
        if self.grouped:
            batch["packed_layout"] = packed_attention.layout_of(chosen)
        return batch


def _rounded(keep: torch.Tensor, length: int) -> torch.Tensor:
    """Positions int64 [K], and as many others below ``length`` as make a multiple, or all; in order."""
    taken = torch.zeros(length, dtype=torch.bool)
    taken[keep] = True
    spare = (~taken).nonzero()[: -len(keep) % MULTIPLE, 0]
    taken[spare] = True
    return taken.nonzero()[:, 0]


class _Follower(TrainerCallback):
    """Moves the progress bar, and marks checkpoints that are complete."""

    advance: Advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.advance(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            atomic_write_text(folder / WHOLE, json.dumps({"step": state.global_step}) + "\n")


class _Trainer(SFTTrainer):
    """SFTTrainer with the loss where something is learned, and nowhere else."""

    blocks: Sequence[Block] = ()
    logit_loss: LogitLoss | None = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        labels = inputs["labels"][:, 1:]  # [B, L - 1]: what the position before should say
        learned = labels != IGNORED
        keep = learned.any(dim=0).nonzero()[:, 0]
        who_sees = "attention_mask"
        if "packed_layout" in inputs:
            who_sees = "packed_layout"
            keep = _rounded(keep, labels.shape[1])
        forward = {"use_cache": False, "logits_to_keep": keep, who_sees: inputs[who_sees]}
        outputs = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], **forward)
        where = learned[:, keep]
        logits = outputs.logits[where]  # [N, V], blocks in order, positions in order
        loss = self._sum(logits, labels[:, keep][where], inputs["numbers"])
        if num_items_in_batch is None:
            loss = loss / max(1, len(logits))
        else:  # of all processes and accumulated batches; DDP averages over processes
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _sum(self, logits: torch.Tensor, targets: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """The loss summed over N positions."""
        teacher = self.logit_loss
        if teacher is None:
            return cross_entropy(logits.float(), targets, reduction="sum")
        examples = [e for number in numbers.tolist() for e in self.blocks[number].examples]
        rows = [teacher.lookup(example) for example in examples]
        divergence = divergence_sum(
            logits[:, : teacher.vocabulary],
            torch.cat([values for values, _ in rows]).to(logits.device),
            torch.cat([indices for _, indices in rows]).to(logits.device),
            kind=teacher.kind,  # type: ignore[arg-type]
            temperature=teacher.temperature,
            beta=teacher.beta,
        )
        if teacher.weight == 1:
            return divergence
        answer = cross_entropy(logits.float(), targets, reduction="sum")
        return teacher.weight * divergence + (1 - teacher.weight) * answer

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written with the numbers, at the end."""
