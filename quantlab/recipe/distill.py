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

    r: Positive = Field(default=16, description="rank of the adapters")
    alpha: Positive = Field(default=32, description="the update is scaled by alpha / r")
    dropout: Annotated[float, Field(ge=0, lt=1, strict=False)] = Field(
        default=0.05, description="dropout in front of the adapters"
    )
    targets: str | list[str] = Field(
        default="all-linear",
        description="names of the layers that get an adapter; all-linear: every linear but the head",
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(r) instead (rank-stabilized LoRA)")


class Student(Strict):
    """What is trained. `qlora` loads a plain model as NF4 with double quantization; a quantized checkpoint stays in
    its own format, and only adapters are trained."""

    model: str = Field(
        description="base model: a Hugging Face id, a directory, a GGUF file, or embedded:base; may be stored quantized"
    )
    mode: Literal["full", "lora", "qlora"] = Field(
        default="lora", description="what is trained: all weights, adapters, or adapters over the base in NF4"
    )
    lora: Lora = Field(default=Lora(), description="options of the adapters")
    merge: bool | None = Field(
        default=None,
        description="merge the adapter into the weights; null: yes, but not into a base that is stored quantized, "
        "which keeps its weights and gets the adapter saved next to them",
    )


class Price(Strict):
    """US dollars for a million tokens."""

    input: NotNegative = Field(description="of the prompt")
    output: NotNegative = Field(description="of the answer")


class Endpoint(Strict):
    """Something that answers: an OpenAI-compatible server, `hf:<model>` on this machine, or `file:<answers.jsonl>`."""

    model: str = Field(
        description="a name that the server knows, `hf:<model>` on this machine, or `file:<answers.jsonl>`"
    )
    endpoint: str | None = Field(
        default=None,
        description="base URL of an OpenAI-compatible server; default: OpenAI, for models that are not local",
    )
    api_key_env: str = Field(
        default="OPENAI_API_KEY", description="environment variable that holds the API key"
    )
    language: Literal["ko", "en"] = Field(default="ko", description="language of the prompt template")
    rpm: Positive | None = Field(default=None, description="requests per minute at most; null: no limit")
    tpm: Positive | None = Field(default=None, description="tokens per minute at most; null: no limit")
    concurrency: Positive = Field(
        default=16, description="requests in flight at most; the number adapts below that"
    )
    timeout: PositiveFloat = Field(default=60.0, description="seconds before a request is given up")
    attempts: Positive = Field(default=6, description="attempts per request")
    max_usd: PositiveFloat | None = Field(
        default=None,
        description="budget in US dollars, over all runs of the ledger for this model, endpoint and purpose; "
        "null: no limit",
    )
    max_requests: Positive | None = Field(
        default=None, description="number of requests at most, counted like max_usd; null: no limit"
    )
    max_failed: Annotated[float, Field(ge=0, le=1, strict=False)] = Field(
        default=0.02,
        description="share of the requests that may end without a usable answer; above it the run stops before "
        "training",
    )
    price: Price | None = Field(
        default=None, description="US dollars per million tokens; null: from the price table"
    )
    temperature: NotNegative = Field(default=0.0, description="sampling temperature")
    max_tokens: Positive = Field(default=512, description="tokens per answer at most")
    batch: bool = Field(default=False, description="use the Batch API: half the price, answers within a day")
    tokenizer: str | None = Field(
        default=None,
        description="model whose tokenizer counts tokens for budgets and estimates; null: estimated from the script",
    )

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

    count: Positive = Field(default=1000, description="questions to write")
    per_request: Annotated[int, Field(ge=1, le=20)] = Field(default=5, description="questions per request")
    levels: dict[Level, NotNegative] = Field(
        default_factory=lambda: dict(LEVEL_SHARES),
        description="proportions of easy, medium and hard questions",
    )

    @model_validator(mode="after")
    def _some(self) -> Write:
        if not self.levels or sum(self.levels.values()) <= 0:
            raise ValueError("@levels: expected proportions of easy, medium, hard, not all zero")
        return self


class Teacher(Endpoint):
    """`answer`: DDL and question → SQL. `write`: DDL → new questions with SQL."""

    task: Literal["answer", "write"] = Field(
        default="answer",
        description="answer the questions of the rows, or write new questions with their SQL",
    )
    write: Write = Field(default=Write(), description="options of task: write")


class Judge(Endpoint):
    """Asked whether a query answers its question: yes or no, and why."""

    max_tokens: Positive = Field(default=256, description="tokens per verdict at most")


class Data(Strict):
    """Rows to learn from and what cleans them. Rows too close to an evaluated item are always taken out."""

    source: str = Field(
        default="ko_text2sql/train.jsonl",
        description="rows to learn from: a bundled name, a path, or `hf:owner/name[/config]:split`",
    )
    format: Literal["text2sql", "text"] = Field(
        default="text2sql", description="kind of rows; text: plain text, every token is learned"
    )
    limit: Positive | None = Field(
        default=None, description="rows taken from the source, evenly spaced; null: all"
    )
    fraction: Share = Field(
        default=1.0,
        description="share of the cleaned rows, drawn with `seed`; smaller fractions are subsets of larger ones",
    )
    seed: int = Field(default=0, description="seed of the drawing")
    holdout_db: int | str | None = Field(default=None, description="db_id whose rows are left out")
    filters: list[Filter] = Field(
        default_factory=lambda: list(FILTERS),
        description="cleaning rules, applied in a fixed order whatever the order here",
    )
    dedup: bool = Field(default=True, description="remove duplicates and near duplicates")
    near_duplicate: Share = Field(
        default=0.9,
        description="Jaccard similarity of question and SQL at which two rows count as duplicates",
    )
    leakage: Share = Field(
        default=0.8, description="similarity to an evaluated item at which a row is removed"
    )

    @model_validator(mode="after")
    def _once(self) -> Data:
        if len(set(self.filters)) < len(self.filters):
            raise ValueError("@filters: a rule is named twice")
        return self


class Logits(Strict):
    """Whose log-probabilities the KL losses learn: another model with the same vocabulary, top-k kept on disk."""

    model: str = Field(description="the model whose distribution is learned; same vocabulary as the student")
    top_k: Positive = Field(default=64, description="log-probabilities kept per position")
    temperature: PositiveFloat = Field(default=1.0, description="temperature of both distributions")
    weight: Share = Field(
        default=1.0,
        description="share of the divergence in the loss; the rest is cross-entropy on the answer",
    )
    beta: Annotated[float, Field(gt=0, lt=1, strict=False)] = Field(
        default=0.5, description="interpolation of the generalized JSD"
    )


class Train(Strict):
    """The optimisation. A step sees batch_size × accumulate × processes sequences (rows, or packed blocks)."""

    epochs: PositiveFloat = Field(default=1.0, description="passes over the rows")
    max_steps: Positive | None = Field(default=None, description="optimizer steps, instead of epochs")
    lr: PositiveFloat = Field(default=2.0e-4, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine",
        description="learning rate schedule; wsd: stable, then linear decay to 0 over the last half",
    )
    warmup: Annotated[float, Field(ge=0, lt=1, strict=False)] = Field(
        default=0.03, description="share of the steps spent on warm-up"
    )
    batch_size: Positive = Field(
        default=8, description="sequences (rows, or packed blocks) per process and step"
    )
    accumulate: Positive = Field(default=1, description="gradient accumulation steps")
    max_len: Annotated[int, Field(ge=16)] = Field(
        default=1024, description="tokens per sequence; longer rows are left out"
    )
    packing: Literal["none", "rows", "shared"] = Field(
        default="none",
        description="rows: several rows per sequence, each attending to itself; shared: rows about the same DDL "
        "share one copy of it",
    )
    checkpointing: bool = Field(default=False, description="gradient checkpointing: less memory, more time")
    optimizer: Optimizer = Field(
        default="adamw", description="paged_adamw_8bit and adamw_8bit are plain AdamW without CUDA"
    )
    weight_decay: NotNegative = Field(default=0.0, description="decoupled weight decay")
    max_grad_norm: PositiveFloat = Field(default=1.0, description="gradient clipping by norm")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="precision of training; auto: bfloat16 on GPUs that have it, else float16, float32 on CPUs",
    )
    loss: Loss = Field(
        default="sft",
        description="cross-entropy on the answer, or a divergence from the teacher's distribution",
    )
    logits: Logits | None = Field(default=None, description="the teacher of the KL losses")
    eval_share: Annotated[float, Field(ge=0, lt=1, strict=False)] = Field(
        default=0.02, description="share of the rows kept for evaluation"
    )
    eval_every: Positive | None = Field(
        default=None, description="steps between evaluations; null: ten evaluations per training"
    )
    patience: Positive | None = Field(
        default=None, description="evaluations without improvement before training stops early"
    )
    save_every: Positive | None = Field(
        default=None, description="steps between training checkpoints; null: at every evaluation"
    )
    seed: int = Field(default=0, description="seed of the training")
    report_to: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        default_factory=list, description="experiment trackers, once installed"
    )

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
    student: Student = Field(description="the model that is trained")
    teacher: Teacher | None = Field(
        default=None, description="who answers; null: the rows' own answers are learned"
    )
    judge: Judge | None = Field(default=None, description="an LLM's yes or no on queries")
    data: Data = Field(default=Data(), description="rows to learn from")
    train: Train = Field(default=Train(), description="the optimization")
    sweep: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="a grid: key, or keys joined by commas, to its values; one run per cell",
    )
    evaluate: list[str] = Field(
        default_factory=lambda: ["text2sql"], description="tasks that base and student are measured by"
    )

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
