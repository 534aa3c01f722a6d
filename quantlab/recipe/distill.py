"""The `distill` recipe: student, teacher, data, training, judge, sweep.

    kind: distill
    student: {model: embedded:base, mode: lora, lora: {r: 64, alpha: 128}}
    teacher: {endpoint: https://api.openai.com/v1, model: gpt-4o, max_usd: 20}
    data: {source: ko_text2sql/train.jsonl, filters: [parses, binds, executes], holdout_db: 1}
    train: {epochs: 1, lr: 2.0e-4, batch_size: 8, accumulate: 8}
    evaluate: [text2sql]

Without `teacher` the rows' own answers are learned. Secrets have no place here: a teacher names the environment
variable that holds its key.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from quantlab.recipe.base import BaseRecipe
from quantlab.registry.strict import Positive, Strict

Share = Annotated[float, Field(gt=0, le=1, strict=False)]
PositiveFloat = Annotated[float, Field(gt=0, strict=False)]
NotNegative = Annotated[float, Field(ge=0, strict=False)]
Level = Literal["easy", "medium", "hard"]
Filter = Literal["parses", "select", "binds", "executes", "returns", "judge"]
Loss = Literal["sft", "forward_kl", "reverse_kl", "jsd"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"]

OPENAI = "https://api.openai.com/v1"
LEVEL_SHARES: dict[Level, float] = {"easy": 0.3, "medium": 0.4, "hard": 0.3}
FILTERS: tuple[Filter, ...] = ("parses", "select", "binds", "executes")
LOCAL = ("hf:", "file:")  # teachers that are not behind an endpoint


class Lora(Strict):
    """Low-rank adapters (Hu et al. 2021): W + (alpha / r) B A, with B [out, r] and A [r, in]."""

    r: Positive = 16
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1, strict=False)] = 0.05
    targets: str | list[str] = "all-linear"
    rslora: bool = False  # scale by alpha / sqrt(r)


class Student(Strict):
    """What is trained. `qlora` loads a plain model as NF4 with double quantization; a quantized checkpoint stays in
    its own format, and only adapters are trained."""

    model: str
    mode: Literal["full", "lora", "qlora"] = "lora"
    lora: Lora = Lora()
    merge: bool | None = (
        None  # default: yes, but a checkpoint that is stored quantized stays so, its adapter beside it
    )


class Price(Strict):
    """US dollars for a million tokens."""

    input: NotNegative
    output: NotNegative


class Endpoint(Strict):
    """Something that answers: an OpenAI-compatible server, `hf:<model>` on this machine, or `file:<answers.jsonl>`."""

    model: str
    endpoint: str | None = None  # filled with OpenAI's for models that are not local
    api_key_env: str = "OPENAI_API_KEY"
    language: Literal["ko", "en"] = "ko"
    rpm: Positive | None = None
    tpm: Positive | None = None
    concurrency: Positive = 16  # ceiling of the adaptive number of requests in flight
    timeout: PositiveFloat = 60.0
    attempts: Positive = 6
    max_usd: PositiveFloat | None = (
        None  # bounds what the ledger has recorded for this model and purpose, in all runs
    )
    max_requests: Positive | None = None
    max_failed: Annotated[float, Field(ge=0, le=1, strict=False)] = (
        0.02  # share of requests that may stay unanswered
    )
    price: Price | None = None  # else from the table of prices
    temperature: NotNegative = 0.0
    max_tokens: Positive = 512
    batch: bool = False  # the Batch API: half the price, answers within a day
    tokenizer: str | None = None  # a model whose tokenizer counts tokens for budgets and estimates

    @model_validator(mode="after")
    def _reachable(self) -> Endpoint:
        if self.local:
            if self.endpoint is not None:
                raise ValueError(f"@endpoint: {self.model!r} is on this machine; leave endpoint out")
            if self.batch:
                raise ValueError(f"@batch: {self.model!r} has no Batch API")
            return self
        if self.endpoint is None:
            object.__setattr__(self, "endpoint", OPENAI)
        url = urlsplit(str(self.endpoint))
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("@endpoint: expected an address such as http://127.0.0.1:8000/v1")
        if url.username or url.password or url.query:
            raise ValueError(
                "@endpoint: no user, password or query in the address; "
                "put the key into the environment variable that api_key_env names"
            )
        return self

    @property
    def local(self) -> bool:
        return self.model.startswith(LOCAL)

    def answers(self) -> dict[str, Any]:
        """The keys that decide what is answered; how fast, how often and for how much is left out."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in _PATIENCE}


_PATIENCE = {
    "api_key_env", "rpm", "tpm", "concurrency", "timeout", "attempts", "max_usd", "max_requests", "max_failed", "price",
    "batch", "tokenizer",
}  # fmt: skip


class Write(Strict):
    """New questions with their SQL, written by the teacher from the DDL of the source's rows."""

    count: Positive = 1000
    per_request: Annotated[int, Field(ge=1, le=20)] = 5
    levels: dict[Level, NotNegative] = Field(default_factory=lambda: dict(LEVEL_SHARES))

    @model_validator(mode="after")
    def _some(self) -> Write:
        if not self.levels or sum(self.levels.values()) <= 0:
            raise ValueError("@levels: expected proportions of easy, medium, hard, not all zero")
        return self


class Teacher(Endpoint):
    """`answer`: DDL and question → SQL. `write`: DDL → new questions with SQL."""

    task: Literal["answer", "write"] = "answer"
    write: Write = Write()


class Judge(Endpoint):
    """Asked whether a query answers its question: yes or no, and why."""

    max_tokens: Positive = 256


class Data(Strict):
    """Rows to learn from and what cleans them. Rows too close to an evaluated item are always taken out."""

    source: str = "ko_text2sql/train.jsonl"
    format: Literal["text2sql", "text"] = "text2sql"  # text: every token of plain texts is learned
    limit: Positive | None = None
    fraction: Share = (
        1.0  # of the cleaned rows, drawn with `seed`; smaller fractions are subsets of larger ones
    )
    seed: int = 0
    holdout_db: int | str | None = None
    filters: list[Filter] = Field(default_factory=lambda: list(FILTERS))
    dedup: bool = True
    near_duplicate: Share = 0.9  # Jaccard similarity of question and SQL from which on rows count as one
    leakage: Share = 0.8  # similarity to an evaluated item from which on a row is taken out

    @model_validator(mode="after")
    def _once(self) -> Data:
        if len(set(self.filters)) < len(self.filters):
            raise ValueError("@filters: a rule is named twice")
        return self


class Logits(Strict):
    """Whose log-probabilities the KL losses learn: another model with the same vocabulary, top-k kept on disk."""

    model: str
    top_k: Positive = 64
    temperature: PositiveFloat = 1.0
    weight: Share = 1.0  # of the divergence; the rest is cross-entropy on the answer
    beta: Annotated[float, Field(gt=0, lt=1, strict=False)] = 0.5  # of the generalised JSD


class Train(Strict):
    """The optimisation. A step sees batch_size × accumulate × processes sequences (rows, or packed blocks)."""

    epochs: PositiveFloat = 1.0
    max_steps: Positive | None = None
    lr: PositiveFloat = 2.0e-4
    schedule: Literal["cosine", "linear", "constant", "wsd"] = (
        "cosine"  # wsd: stable, then linearly to 0 over half
    )
    warmup: Annotated[float, Field(ge=0, lt=1, strict=False)] = 0.03  # share of the steps
    batch_size: Positive = 8
    accumulate: Positive = 1
    max_len: Annotated[int, Field(ge=16)] = 1024
    packing: Literal["none", "rows", "shared"] = "none"
    checkpointing: bool = False
    optimizer: Optimizer = "adamw"
    weight_decay: NotNegative = 0.0
    max_grad_norm: PositiveFloat = 1.0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    loss: Loss = "sft"
    logits: Logits | None = None
    eval_share: Annotated[float, Field(ge=0, lt=1, strict=False)] = 0.02  # of the rows, kept for evaluation
    eval_every: Positive | None = None  # steps; default: ten times a training
    patience: Positive | None = None  # evaluations without improvement before training stops
    save_every: Positive | None = None  # steps; default: as often as it evaluates
    seed: int = 0
    report_to: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _loss_has_logits(self) -> Train:
        if self.loss != "sft" and self.logits is None:
            raise ValueError(
                f"@logits: loss {self.loss} needs `logits: {{model: …}}`, whose outputs are learned"
            )
        if self.loss == "sft" and self.logits is not None:
            raise ValueError("@logits: loss sft has no use for it; set loss: forward_kl, reverse_kl or jsd")
        if self.patience is not None and self.eval_share == 0:
            raise ValueError("@patience: early stop needs rows to evaluate on; set eval_share above 0")
        return self


class DistillRecipe(BaseRecipe):
    """A small model taught by a larger one's answers."""

    kind: Literal["distill"] = "distill"
    student: Student
    teacher: Teacher | None = None
    judge: Judge | None = None
    data: Data = Data()
    train: Train = Train()
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    evaluate: list[str] = Field(default_factory=lambda: ["text2sql"])

    def decides(self) -> dict[str, Any]:
        """A raised budget is the same recipe: what was paid for or trained under it stays good."""
        found = super().decides()
        for name in ("teacher", "judge"):
            if name in found:
                found[name] = {key: value for key, value in found[name].items() if key not in _PATIENCE}
        if self.student.mode == "full":
            found["student"] = {key: value for key, value in found["student"].items() if key != "lora"}
        return found

    @model_validator(mode="after")
    def _fits_together(self) -> DistillRecipe:
        if "judge" in self.data.filters and self.judge is None:
            raise ValueError("@data.filters: the rule `judge` needs `judge: {model: …}`")
        if self.data.format == "text":
            if self.teacher is not None:
                raise ValueError(
                    "@teacher: plain texts have no question to answer; leave it out, or format too"
                )
            if self.train.packing == "shared":
                raise ValueError("@train.packing: plain texts share no DDL; set rows or none")
        for key, values in self.sweep.items():
            if not values:
                raise ValueError(f"@sweep.{key}: expected a list of values")
            if key.split(".")[0] in ("sweep", "kind"):
                raise ValueError(f"@sweep.{key}: not a key that can be swept")
        return self
