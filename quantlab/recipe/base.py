"""What every kind of recipe has: tasks and their options, the digest."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Discriminator, Field, Tag, create_model, field_validator, model_validator

from quantlab.paths import nearest
from quantlab.registry.strict import Positive, Strict
from quantlab.registry.tasks import (
    DEFAULT_TASKS,
    GENERAL_CALIBRATION,
    TASKS,
    KvCacheOptions,
    LmEvalOptions,
    SeqLen,
    is_task,
    options_key,
    task_of,
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
# Part of every digest, which holds a recipe's differences from the defaults: raise it when a default changes.
DEFAULTS = 1


class WeightedSource(Strict):
    """One source of a mixture."""

    source: str = Field(description="a file, a bundled name, `hf:…`")
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0, description="its share of the rows, relative to the other sources'"
    )


def _one_or_several(value: Any) -> str:
    return "|list" if isinstance(value, list) else "|name"


def _plain_or_weighted(value: Any) -> str:
    return "|weighted" if isinstance(value, dict | WeightedSource) else "|name"


# Tags begin with `quantlab.registry.strict.ALTERNATIVE`.
_Name = Annotated[str, Tag("|name")]
_Weighted = Annotated[WeightedSource, Tag("|weighted")]
_OneOfSeveral = Annotated[_Name | _Weighted, Discriminator(_plain_or_weighted)]
_Several = Annotated[list[_OneOfSeveral], Field(min_length=1), Tag("|list")]
Sources = Annotated[_Name | _Several, Discriminator(_one_or_several)]


class Calibration(Strict):
    """Texts that the Hessians are gathered from: `rows` windows of `seq_len` tokens drawn with `seed`. Or, for a method
    that looks at no more, an importance matrix that was gathered before."""

    source: Sources = Field(
        default=GENERAL_CALIBRATION,
        description="calibration text: a file, a bundled name, `hf:…`, or a list of them, each with a `weight`",
    )
    rows: Positive = Field(default=128, description="windows drawn from it")
    seq_len: SeqLen = Field(default=512, description="tokens in a window")
    seed: int = Field(default=0, description="of the drawing")
    pack: bool = Field(
        default=True,
        description="documents are joined and cut into windows; false: a row is the beginning of a document that is at "
        "least `seq_len` tokens long",
    )
    special_tokens: bool = Field(
        default=False, description="a row begins with what the tokenizer puts before a text (bos)"
    )
    imatrix: str | None = Field(
        default=None,
        description="method imatrix: a file with llama.cpp's importance matrix (its GGUF form or .dat), in place of a "
        "text; nothing is calibrated then",
    )
    imatrix_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None = Field(
        default=None,
        description="with `imatrix`: 16 hexadecimal digits of the file's SHA-256; a run fills it in, and refuses "
        "another file",
    )

    @field_validator("source", mode="after")
    @classmethod
    def _one_is_no_mixture(cls, value: str | list[str | WeightedSource]) -> str | list[str | WeightedSource]:
        if isinstance(value, list) and len(value) == 1:
            return value[0] if isinstance(value[0], str) else value[0].source
        return value

    @model_validator(mode="after")
    def _text_or_imatrix(self) -> Calibration:
        if self.imatrix is None and self.imatrix_digest is not None:
            raise ValueError("@imatrix_digest: goes with imatrix")
        others = [key for key in differences(self) if not key.startswith("imatrix")]
        if self.imatrix is not None and others:
            raise ValueError(
                f"@{others[0]}: is for calibration on a text, in place of which there is an imatrix; leave one of "
                "them out"
            )
        return self

    @property
    def imatrix_file(self) -> Path | None:
        """The importance matrix, where one is given."""
        return None if self.imatrix is None else Path(self.imatrix).expanduser()

    @model_validator(mode="after")
    def _every_source_gives_rows(self) -> Calibration:
        names = [one.source for one in self.sources]
        for name, count in zip(names, self.shares(), strict=True):
            if names.count(name) > 1:
                raise ValueError(f"@source: {name!r} is named twice; give it one weight")
            if count == 0:
                raise ValueError(f"@rows: {self.rows} rows in these weights leave none for {name!r}")
        return self

    @property
    def sources(self) -> list[WeightedSource]:
        """Every source with its weight."""
        written = self.source if isinstance(self.source, list) else [self.source]
        return [WeightedSource(source=one) if isinstance(one, str) else one for one in written]

    def shares(self) -> list[int]:
        """Rows of each source, in proportion to the weights, rounded by largest remainder."""
        weights = [Fraction(one.weight) for one in self.sources]
        exact = [self.rows * weight / sum(weights) for weight in weights]
        counts = [int(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda n: counts[n] - exact[n])
        for n in by_remainder[: self.rows - sum(counts)]:
            counts[n] += 1
        return counts

    def named_sources(self) -> str:
        """The sources in one line."""
        several = [f"{one.source} ({one.weight:g})" for one in self.sources]
        return self.source if isinstance(self.source, str) else " + ".join(several)


class _TaskOptions(Strict):
    """The options of every task, and how all of them but lm-eval keep keys and values."""

    kv_cache: KvCacheOptions | None = Field(
        default=None, description="quantize keys and values; null for none"
    )

    if TYPE_CHECKING:  # one field for each task of the registry

        def __getattr__(self, name: str) -> Any: ...

    def of(self, entry: str) -> Any:
        """The options of one entry of `evaluate`."""
        name, _, rest = entry.partition(":")
        options = getattr(self, options_key(name)).model_copy(update={"task": rest} if rest else None)
        if TASKS[name].cached:
            options._kv_cache = self.kv_cache
        if isinstance(options, LmEvalOptions):
            options._prompt = self.text2sql.prompt
        return options


if TYPE_CHECKING:
    TaskOptions = _TaskOptions
else:
    TaskOptions = create_model(
        "TaskOptions",
        __base__=_TaskOptions,
        __doc__=_TaskOptions.__doc__,
        **{options_key(name): (task.options, task.options()) for name, task in TASKS.items()},
    )


class BaseRecipe(Strict):
    dtype: Dtype = Field(
        default="auto", description="type of plain weights and of the computation; auto: as stored"
    )
    evaluate: list[str] = Field(
        default_factory=lambda: list(DEFAULT_TASKS), description="what is measured, in this order"
    )
    tasks: TaskOptions = Field(default=TaskOptions(), description="options of the tasks")

    @model_validator(mode="after")
    def _known_tasks(self) -> BaseRecipe:
        known = [f"{name}:" if task.named else name for name, task in TASKS.items()]
        for entry in self.evaluate:
            if not is_task(entry):
                near = nearest(entry, known)
                raise ValueError(
                    f"@evaluate: unknown task {entry!r}; "
                    + (f"did you mean {near!r}? " if near else "")
                    + "tasks: " + ", ".join(f"{name}<name>" if name.endswith(":") else name for name in known)
                )  # fmt: skip
        if len(set(self.evaluate)) < len(self.evaluate):
            raise ValueError("@evaluate: a task is named twice")
        plain = [entry for entry in self.evaluate if not task_of(entry).cached]
        if self.tasks.kv_cache and plain:
            raise ValueError(
                f"@evaluate: {plain[0].partition(':')[0]} tasks run without tasks.kv_cache; "
                "measure them by another recipe"
            )
        return self

    def digest(self) -> str:
        """16 hexadecimal characters that name what this recipe does: its differences from the defaults, so that a key
        added later changes no digest of a recipe that does not use it."""
        canonical = json.dumps({"defaults": DEFAULTS} | self.decides(), sort_keys=True, separators=(",", ":"))
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
        """What results depend on: the kind, and every key that is not at its default."""
        found = {key: value for key, value in differences(self).items() if key not in self.unused()}
        return {"kind": self.model_dump()["kind"]} | found

    def unused(self) -> set[str]:
        """Keys that say nothing in this recipe; its content leaves them out."""
        return set()

    def to_yaml(self) -> str:
        """The recipe as resolved; loading it again gives the same digest."""
        return yaml.safe_dump(self.content(), sort_keys=False, allow_unicode=True)


def differences(model: BaseModel) -> dict[str, Any]:
    """The fields of a model that are not at their defaults, those of models inside it likewise; what has no default is
    always there. Values as JSON has them."""
    dumped, found = model.model_dump(mode="json"), {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if not field.is_required() and value == field.get_default(call_default_factory=True):
            continue
        found[name] = differences(value) if isinstance(value, BaseModel) else dumped[name]
    return found
