"""What every kind of recipe has: the strict model, the options of the tasks, the digest."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from quantlab.paths import nearest

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Positive = Annotated[int, Field(ge=1)]

# Bundled texts for a model of which nothing is known: Korean and English prose, dialogue, code, SQL. What a recipe does
# not name is settled by the model (`models.defaults`): shorter windows, or the texts that the embedded model knows.
GENERAL_CALIBRATION, GENERAL_TEXT = "calib/general.jsonl", "general.txt"


class Calibration(Strict):
    """Texts that the statistics are gathered from: `rows` windows of `seq_len` tokens drawn with `seed`."""

    source: str = GENERAL_CALIBRATION
    rows: Positive = 128
    seq_len: Annotated[int, Field(ge=8)] = 512
    seed: int = 0


class KvCacheOptions(Strict):
    """Keys and values stored as integers: `group_size` of them share a scale, and the newest tokens, up to `residual`,
    wait as they are until there are enough to quantize together."""

    bits: Literal[2, 4, 8]
    group_size: Literal[16, 32, 64, 128] = 64
    residual: Positive = 128

    @model_validator(mode="after")
    def _groups_fill_the_residual(self) -> KvCacheOptions:
        if self.residual % self.group_size:
            near = max(1, round(self.residual / self.group_size)) * self.group_size
            raise ValueError(
                f"@residual: {self.residual} tokens are not whole groups of {self.group_size}; nearest: {near}"
            )
        return self


class CachedOptions(Strict):
    """Options of a task that can run with a quantized cache; `TaskOptions.of` fills in which."""

    _kv_cache: KvCacheOptions | None = PrivateAttr(default=None)

    @property
    def kv_cache(self) -> KvCacheOptions | None:
        return self._kv_cache


class PerplexityOptions(CachedOptions):
    source: str = GENERAL_TEXT
    seq_len: Annotated[int, Field(ge=8)] = 512
    max_tokens: Positive | None = None


_FIRST_TEXT2SQL_KEYS = ("data", "limit", "batch_size", "max_new_tokens", "stop")


class Text2SqlOptions(CachedOptions):
    data: str = "ko_text2sql/test.jsonl"
    limit: Positive | None = None
    batch_size: Positive = 16
    max_new_tokens: Positive = 192
    stop: Literal["statement", "eos"] = "statement"
    shots: Annotated[int, Field(ge=0)] = 0  # examples before the question, the same ones for every question
    shots_source: str | None = None  # where they come from; default ko_text2sql/train.jsonl
    chat: Literal["auto", "always", "never"] = "never"  # through the chat template; auto: where there is one
    linker: Literal["none", "lexical"] = "none"  # leaves out tables that the question does not seem to need

    dialect: Literal["auto", "sqlite", "mysql", "postgres"] = (
        "auto"  # of golds and answers; auto: as the data says
    )
    witness: Literal["auto", "always"] = (
        "auto"  # always: databases made from DDL and gold, even where there is one
    )
    rules: list[Literal["spider-test-suite", "bird", "sql-eval"]] = []  # published rules to set beside ours

    @model_validator(mode="after")
    def _shots_have_a_use(self) -> Text2SqlOptions:
        if self.shots_source is not None and self.shots == 0:
            raise ValueError("@shots_source: no examples are asked for; set shots to 1 or more")
        return self

    @model_serializer(mode="wrap")
    def _without_silent_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys younger than the first published results are left out at their defaults: their digests stay good."""
        content: dict[str, Any] = handler(self)
        defaults = {key: field.default for key, field in type(self).model_fields.items()}
        return {k: v for k, v in content.items() if k in _FIRST_TEXT2SQL_KEYS or v != defaults[k]}


class FidelityOptions(CachedOptions):
    source: str = GENERAL_TEXT
    seq_len: Annotated[int, Field(ge=8)] = 512
    max_tokens: Positive | None = 16384


class SpeedOptions(CachedOptions):
    prompt_tokens: Positive = 128
    new_tokens: Annotated[int, Field(ge=2)] = 32
    batch_size: Positive = 1
    repeats: Positive = 5  # rounds of half a second or more


class LmEvalOptions(Strict):
    """For `lm-eval:<name>`; `task` is filled with <name> by the caller, `include_path` holds local task files."""

    task: str = ""
    include_path: str | None = None
    limit: Positive | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    batch_size: Positive = 8


class TaskOptions(Strict):
    perplexity: PerplexityOptions = PerplexityOptions()
    text2sql: Text2SqlOptions = Text2SqlOptions()
    fidelity: FidelityOptions = FidelityOptions()
    speed: SpeedOptions = SpeedOptions()
    lm_eval: LmEvalOptions = LmEvalOptions()
    kv_cache: KvCacheOptions | None = None  # not a task: how every task but lm-eval keeps keys and values

    @model_serializer(mode="wrap")
    def _without_silent_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A key younger than the first published results is left out at its default: their digests stay good."""
        content: dict[str, Any] = handler(self)
        return {key: value for key, value in content.items() if key != "kv_cache" or value is not None}

    def of(self, task: str) -> BaseModel:
        """The options of one entry of `evaluate`."""
        if task.startswith("lm-eval:"):
            return self.lm_eval.model_copy(update={"task": task.partition(":")[2]})
        options: CachedOptions = getattr(self, task).model_copy()
        options._kv_cache = self.kv_cache
        return options


TASK_NAMES = ("perplexity", "text2sql", "fidelity", "speed")


class BaseRecipe(Strict):
    dtype: Dtype = "auto"
    evaluate: list[str] = Field(default_factory=lambda: list(TASK_NAMES))
    tasks: TaskOptions = TaskOptions()

    @model_validator(mode="after")
    def _known_tasks(self) -> BaseRecipe:
        for task in self.evaluate:
            if task in TASK_NAMES or (task.startswith("lm-eval:") and task != "lm-eval:"):
                continue
            near = nearest(task, [*TASK_NAMES, "lm-eval:"])
            raise ValueError(
                f"@evaluate: unknown task {task!r}; "
                + (f"did you mean {near!r}? " if near else "")
                + f"tasks: {', '.join(TASK_NAMES)}, lm-eval:<name>"
            )
        if len(set(self.evaluate)) < len(self.evaluate):
            raise ValueError("@evaluate: a task is named twice")
        if self.tasks.kv_cache and any(task.startswith("lm-eval:") for task in self.evaluate):
            raise ValueError(
                "@evaluate: lm-eval tasks run without tasks.kv_cache; measure them by another recipe"
            )
        return self

    def digest(self) -> str:
        """16 hexadecimal characters that name exactly this content, defaults included."""
        canonical = json.dumps(self.decides(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def content(self) -> dict[str, Any]:
        """Every default and override written out, keys that say nothing left out."""
        dumped = self.model_dump(mode="json")
        head = {key: dumped[key] for key in ("kind", "method") if key in dumped}
        return head | {key: value for key, value in dumped.items() if key not in self.unused()}

    def named(self) -> dict[str, Any]:
        """The keys that were written, without anything filled in."""
        return self.model_dump(mode="json", exclude_unset=True)

    def decides(self) -> dict[str, Any]:
        """The part of the content that results depend on."""
        return self.content()

    def unused(self) -> set[str]:
        """Keys that say nothing in this recipe; its content leaves them out."""
        return set()

    def to_yaml(self) -> str:
        """The recipe as resolved; loading it again gives the same digest."""
        return yaml.safe_dump(self.content(), sort_keys=False, allow_unicode=True)
