"""The tasks: one entry each, read by recipes, planning, the leaderboard, cards, ``doctor`` and the demo.

A task is a function on one loaded model::

    def evaluate(subject, options, *, baseline, progress) -> TaskResult

``options`` are an instance of the task's options class. A task with ``in_turn`` loads its models itself, all of a run
together: ``measure(contestants, baseline, options, *, device, trust_remote_code, progress) -> list[TaskResult]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from quantlab.registry.strict import Positive, Strict

# Bundled texts for a model of which nothing is known: Korean and English prose, dialogue, code, SQL. What a recipe does
# not name is settled by the model (`commands.defaults`): shorter windows, or the texts that the embedded model knows.
GENERAL_CALIBRATION, GENERAL_TEXT = "calib/general.jsonl", "general.txt"
SeqLen = Annotated[int, Field(ge=8)]


class KvCacheOptions(Strict):
    """Keys and values stored as integers: `group_size` of them share a scale, and the newest tokens, up to `residual`,
    wait as they are until there are enough to quantize together."""

    bits: Literal[2, 4, 8] = Field(description="width of keys and values")
    group_size: Literal[16, 32, 64, 128] = Field(default=64, description="numbers that share a scale")
    residual: Positive = Field(default=128, description="newest tokens that stay as they are")

    @model_validator(mode="after")
    def _groups_fill_the_residual(self) -> Self:
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
    source: str = Field(
        default=GENERAL_TEXT, description="text that is measured on: a file, a bundled name, `hf:…`"
    )
    seq_len: SeqLen = Field(default=512, description="tokens in a window")
    max_tokens: Positive | None = Field(
        default=None, description="no more than so many tokens; all when left out"
    )


class FidelityOptions(CachedOptions):
    source: str = Field(
        default=GENERAL_TEXT, description="text that is measured on: a file, a bundled name, `hf:…`"
    )
    seq_len: SeqLen = Field(default=512, description="tokens in a window")
    max_tokens: Positive | None = Field(
        default=16384, description="no more than so many tokens; null for all"
    )
    reference: Literal["disk", "memory"] = Field(
        default="disk",
        description="the original's log-probabilities are kept in the cache folder; memory: the original is held in "
        "memory beside the model, nothing is kept",
    )


class PromptOptions(Strict):
    """How a question is put: the wording, and what is said of the schema behind its DDL."""

    language: Literal["auto", "ko", "en"] = Field(
        default="auto", description="of the bundled wording; auto: Korean where the questions of the data are"
    )
    file: str | None = Field(default=None, description="a wording of your own, a YAML file")
    values: Annotated[int, Field(ge=0, le=50)] = Field(
        default=0, description="so many distinct values of each column, where there is a database"
    )
    descriptions: bool = Field(
        default=False,
        description="what columns mean: a row's `descriptions`, else BIRD's `database_description`",
    )

    @model_validator(mode="after")
    def _one_wording(self) -> Self:
        if self.file is not None and self.language != "auto":
            raise ValueError("@language: a file is a wording of its own; leave one of the two out")
        return self


class Text2SqlOptions(CachedOptions):
    data: str = Field(
        default="ko_text2sql/test.jsonl", description="questions: a file, a bundled name, a benchmark, `hf:…`"
    )
    limit: Positive | None = Field(
        default=None, description="so many questions, at even distances; all when left out"
    )
    batch_size: Positive = Field(default=16, description="questions generated together")
    max_new_tokens: Positive = Field(default=192, description="tokens of an answer at most")
    stop: Literal["statement", "eos"] = Field(
        default="statement", description="stop at the first complete statement, or at the end token"
    )
    shots: Annotated[int, Field(ge=0)] = Field(
        default=0, description="worked examples before the question, the same ones for every question"
    )
    shots_source: str | None = Field(
        default=None, description="where they come from; default ko_text2sql/train.jsonl"
    )
    chat: Literal["auto", "always", "never"] = Field(
        default="never", description="through the chat template; auto: where there is one"
    )
    linker: Literal["none", "lexical"] = Field(
        default="none", description="lexical: leave out tables that the question does not seem to need"
    )
    dialect: Literal["auto", "sqlite", "mysql", "postgres"] = Field(
        default="auto", description="of golds and answers; auto: as the data say"
    )
    prompt: PromptOptions = Field(default=PromptOptions(), description="how questions are put")
    witness: Literal["auto", "always"] = Field(
        default="auto", description="always: databases made from DDL and gold, even where there is one"
    )
    rules: list[Literal["spider-test-suite", "bird", "sql-eval"]] = Field(
        default=[], description="also score by the rules of these published evaluators"
    )

    @model_validator(mode="after")
    def _shots_have_a_use(self) -> Self:
        if self.shots_source is not None and self.shots == 0:
            raise ValueError("@shots_source: no examples are asked for; set shots to 1 or more")
        return self


class SpeedOptions(CachedOptions):
    prompt_tokens: Positive = Field(default=128, description="tokens of the prompt")
    new_tokens: Annotated[int, Field(ge=2)] = Field(default=32, description="tokens decoded after it")
    batch_size: Positive = Field(default=1, description="sequences at once")
    repeats: Positive = Field(
        default=5, description="rounds at least, each of half a second of decoding or more"
    )


class LmEvalOptions(Strict):
    """For `lm-eval:<name>`; `task` is filled with <name> by the caller, `include_path` holds local task files.
    quantlab's own tasks ask as `tasks.text2sql.prompt` says, which the caller fills in too."""

    _prompt: PromptOptions = PrivateAttr(default_factory=PromptOptions)

    task: str = Field(default="", description="filled in from the entry of `evaluate`")
    include_path: str | None = Field(default=None, description="a folder of task files of your own")
    limit: Positive | None = Field(default=None, description="so many documents; all when left out")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="examples; as the task says when left out"
    )
    batch_size: Positive = Field(default=8, description="requests at once")

    @property
    def prompt(self) -> PromptOptions:
        return self._prompt


@dataclass(frozen=True)
class Column:
    """A column of the leaderboard that a task fills.

    meaning: one line, with the unit. higher: whether more is better; None where neither is.
    derived: computed against the baseline or the other rows, not by the task.
    title: over its column in tables, card: in front of it in model cards; without one it is left out there.
    form, scale: how a number is written. written: "module:function" that writes the cell from the whole row instead;
        card_written: the same for cards, where there is room for more.
    on: columns that say what it was measured on. late: it came later, and stands behind all others.
    """

    name: str
    meaning: str
    higher: bool | None = None
    derived: bool = False
    title: str = ""
    card: str = ""
    form: str = "{:.4g}"
    scale: float = 1.0
    written: str = ""
    card_written: str = ""
    on: tuple[str, ...] = ()
    late: bool = False


@dataclass(frozen=True)
class Task:
    """Everything that is known of a task.

    about: one line for people. run: the function. options: the class of its options.
    key: where they stand under ``tasks``; the task's name when left out. named: its entry in `evaluate` is the name
        with a colon and another name (``lm-eval:<name>``).
    columns: what it fills, in the order of the leaderboard.
    texts: options that name a text, settled by the model where they are left out; windows of ``seq_len`` tokens.
    data_digest: "module:function" that is given the options and names the data, where they are not such a text.
    fits: given the options and the model's positions, what does not fit, and the key to set with a value that does.
    in_turn: it loads its models itself. needs_baseline: it compares with another model.
    keeps: "module:function" that is called before the model is loaded and leaves on disk what is needed of the other
        model, so that the two are not in memory at once: ``keep(subject, original, options, progress)`` gives what the
        function takes as its baseline, or None where it needs the other model itself.
    together: "module:function" for the tasks that name it, where all are asked for on the same windows: one forward
        pass gives all their results.
    compared: its numbers are set against the baseline's own. cached: it can run with a quantized cache.
    requires: modules that must import. seconds: on two cores in the demo, for its estimate.
    """

    about: str
    run: str
    options: type[Strict]
    key: str = ""
    named: bool = False
    columns: tuple[Column, ...] = ()
    texts: tuple[str, ...] = ()
    data_digest: str | None = None
    fits: Callable[[Any, int], tuple[str, tuple[str, int]] | None] = lambda options, positions: None
    in_turn: bool = False
    needs_baseline: bool = False
    keeps: str = ""
    together: str = ""
    compared: bool = False
    cached: bool = True
    requires: tuple[str, ...] = ()
    seconds: float = 5.0


def _speed_fits(options: SpeedOptions, positions: int) -> tuple[str, tuple[str, int]] | None:
    if options.prompt_tokens + options.new_tokens <= positions:
        return None
    return "fewer than prompt_tokens + new_tokens", ("prompt_tokens", max(1, positions - options.new_tokens))


TASKS: dict[str, Task] = {
    "perplexity": Task(
        "perplexity on windows of a text",
        "quantlab.evals.perplexity:evaluate",
        PerplexityOptions,
        columns=(
            Column(
                "ppl",
                "perplexity",
                higher=False,
                title="ppl",
                card="Perplexity",
                form="{:.3f}",
                on=("ppl_text", "ppl_protocol"),
            ),
            Column(
                "ppl_ratio",
                "perplexity over the original's",
                higher=False,
                derived=True,
                title="ratio",
                card="Perplexity over the original's",
                form="{:.3f}",
            ),
            Column("bits_per_byte", "cross-entropy in bits per UTF-8 byte of the text", higher=False),
            Column("ppl_protocol", "windows that perplexity was measured on"),
            Column("ppl_text", "text that perplexity was measured on, with its digest"),
            Column(
                "ppl_ratio_low",
                "lower end of the 95 % interval of `ppl_ratio`, paired by window",
                higher=False,
                derived=True,
                late=True,
            ),
            Column(
                "ppl_ratio_high",
                "upper end of the 95 % interval of `ppl_ratio`, paired by window",
                higher=False,
                derived=True,
                late=True,
            ),
        ),
        texts=("source",),
        together="quantlab.evals.text_tasks:measure",
        compared=True,
        seconds=4.0,
    ),
    "fidelity": Task(
        "KL divergence to the original and agreement of the most likely token",
        "quantlab.evals.kl_divergence:evaluate",
        FidelityOptions,
        columns=(
            Column(
                "kl_mean",
                "mean KL divergence to the original's next-token distribution, nats",
                higher=False,
                title="KL",
                card="Mean KL divergence to the original, nats [95 %]",
                written="quantlab.report.cells:divergence",
                card_written="quantlab.report.cells:divergence_interval",
                on=("kl_text",),
            ),
            Column("kl_p99", "99th percentile of the same", higher=False),
            Column(
                "top1_agreement",
                "share of positions with the original's most likely token",
                higher=True,
                title="top-1 %",
                card="Same most likely token as the original, %",
                form="{:.1f}",
                scale=100,
            ),
            Column("kl_text", "text that the divergence was measured on, with its digest"),
            Column(
                "kl_low", "lower end of the 95 % interval of `kl_mean` over windows", higher=False, late=True
            ),
            Column(
                "kl_high", "upper end of the 95 % interval of `kl_mean` over windows", higher=False, late=True
            ),
            Column("kl_median", "median of the same over positions", higher=False, late=True),
            Column(
                "kl_noise",
                "the original's divergence from itself in another batch shape and type; less is noise",
                late=True,
            ),
            Column("top1_low", "lower end of the 95 % interval of `top1_agreement`", higher=True, late=True),
            Column("top1_high", "upper end of the 95 % interval of `top1_agreement`", higher=True, late=True),
        ),
        texts=("source",),
        needs_baseline=True,
        keeps="quantlab.evals.kept_original:keep",
        together="quantlab.evals.text_tasks:measure",
        seconds=2.0,
    ),
    "text2sql": Task(
        "Text2SQL: exact match and execution accuracy",
        "quantlab.evals.text2sql:evaluate",
        Text2SqlOptions,
        columns=(
            Column("em", "share of answers that match the gold query after normalizing", higher=True),
            Column(
                "ex",
                "execution accuracy: share of answers whose result is the gold's",
                higher=True,
                title="EX % [95 %]",
                card="Text2SQL execution accuracy, % [95 %]",
                written="quantlab.report.cells:accuracy",
                on=("ex_data",),
            ),
            Column("ex_low", "lower end of its 95 % Wilson interval", higher=True),
            Column("ex_high", "upper end of its 95 % Wilson interval", higher=True),
            Column("ex_data", "questions that it was measured on, with their digest"),
            Column("judge", "share of answers that a judge model accepts", higher=True),
            Column(
                "lost",
                "questions right in the parent and wrong here",
                higher=False,
                derived=True,
                title="lost/gained",
                card="Text2SQL questions lost and gained against the original",
                written="quantlab.report.cells:flipped",
            ),
            Column("gained", "questions wrong in the parent and right here", higher=True, derived=True),
            Column(
                "tie_group",
                "`best`: not significantly different from the best row (exact McNemar, 5 %)",
                derived=True,
                title="=",
                written="quantlab.report.cells:tied",
            ),
        ),
        data_digest="quantlab.text2sql.prompt.for_model:options_digest",
        compared=True,
        requires=("sqlglot",),
        seconds=8.0,
    ),
    "lm-eval": Task(
        "a task of lm-evaluation-harness",
        "quantlab.evals.harness:evaluate",
        LmEvalOptions,
        key="lm_eval",
        named=True,
        data_digest="quantlab.evals.lm_eval_tasks:options_digest",
        cached=False,
        requires=("lm_eval",),
        seconds=30.0,
    ),
    "speed": Task(
        "tokens per second and memory, each model in a process of its own",
        "quantlab.evals.speed:measure",
        SpeedOptions,
        columns=(
            Column(
                "prefill_tok_s",
                "prompt tokens per second; with a parent, its own times the ratio",
                higher=True,
            ),
            Column("prefill_ratio", "the same over the original's", higher=True),
            Column(
                "decode_tok_s",
                "decoded tokens per second; with a parent, its own times the ratio",
                higher=True,
                title="tok/s",
                card="Decoded tokens per second",
                written="quantlab.report.cells:speed",
            ),
            Column(
                "decode_ratio",
                "the same over the original's",
                higher=True,
                title="× base",
                card="Decoding speed over the original's",
                form="{:.2f}",
            ),
            Column("disturbed", "1 where other processes took processor time meanwhile"),
            Column("load_seconds", "seconds until the model was loaded", higher=False),
            Column(
                "memory_bytes",
                "bytes of parameters and buffers",
                higher=False,
                title="RAM MB",
                card="Parameters and buffers in memory, MB",
                form="{:.1f}",
                scale=1e-6,
            ),
            Column("peak_memory_bytes", "most bytes that the process held", higher=False),
        ),
        fits=_speed_fits,
        in_turn=True,
        compared=True,
        seconds=10.0,
    ),
}

DEFAULT_TASKS: tuple[str, ...] = ("perplexity", "text2sql", "fidelity", "speed")  # in the order they are run


def is_task(entry: str) -> bool:
    """Whether an entry of `evaluate` names a task."""
    name, colon, rest = entry.partition(":")
    return name in TASKS and TASKS[name].named == bool(colon) == bool(rest)


def task_of(entry: str) -> Task:
    """The task of one entry of `evaluate`. KeyError where there is none."""
    return TASKS[entry.partition(":")[0]]


def options_key(name: str) -> str:
    """Where the options of a task stand under `tasks`."""
    return TASKS[name].key or name


def task_columns() -> tuple[Column, ...]:
    """The columns of all tasks, in the order of the leaderboard."""
    return tuple(column for task in TASKS.values() for column in task.columns)
