"""The recipe of `quantlab quantize`.

Unknown keys are refused, and so are keys that the method has no use for: a recipe that says `damp` for
round-to-nearest was written in the belief that it does something. What a file format can hold is a table here
(`LAYOUTS`), checked on load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

from quantlab.recipe.base import (
    BaseRecipe,
    Calibration,
)

if TYPE_CHECKING:
    pass

Method = Literal["none", "rtn", "bnb-int8", "bnb-fp4", "bnb-nf4", "gptq", "awq", "fp8"]
Format = Literal["gptq", "awq", "compressed-tensors", "bitsandbytes", "none"]

GROUP_SIZES = (-1, 16, 32, 64, 128)


class Layout(NamedTuple):
    """What a checkpoint layout can hold, as plain transformers reads it."""

    bits: tuple[int, ...]
    ordered: bool  # says in which order columns were quantized (g_idx)
    asymmetric: bool
    mixed: bool  # a width for every layer


LAYOUTS: dict[str, Layout] = {
    "gptq": Layout((2, 3, 4, 8), ordered=True, asymmetric=True, mixed=False),
    "awq": Layout((4,), ordered=False, asymmetric=True, mixed=False),
    "compressed-tensors": Layout((2, 3, 4, 8), ordered=False, asymmetric=False, mixed=True),
}

# What a method fixes by itself: bits, group size (block size of bitsandbytes), symmetric, format.
_FIXED: dict[str, tuple[int, int, bool, str]] = {
    "none": (16, -1, True, "none"),
    "bnb-int8": (8, -1, True, "bitsandbytes"),
    "bnb-fp4": (4, 64, True, "bitsandbytes"),
    "bnb-nf4": (4, 64, True, "bitsandbytes"),
    "fp8": (8, -1, True, "compressed-tensors"),
}
_GRID = {"bits", "group_size", "symmetric", "format"}
_CALIBRATED = _GRID | {"calibration", "propagate", "target_bits"}
# Keys that only some methods have; every other key belongs to all.
_KEYS: dict[str, set[str]] = {
    "none": set(),
    "rtn": _GRID,
    "bnb-int8": set(),
    "bnb-fp4": {"double_quant"},
    "bnb-nf4": {"double_quant"},
    "gptq": _CALIBRATED | {"act_order", "static_groups", "damp"},
    "awq": _CALIBRATED | {"scale_search", "clip_search", "search_steps"},
    "fp8": set(),
}
_METHOD_KEYS = set().union(*_KEYS.values())


class QuantizeRecipe(BaseRecipe):
    """One way of storing a model. `bits`, `group_size`, `symmetric` and `format` are always filled in."""

    kind: Literal["quantize"] = "quantize"
    method: Method
    bits: Literal[2, 3, 4, 8, 16, "auto"] = 4  # 16 only for `none`, which rounds nothing
    target_bits: Annotated[float, Field(ge=2, le=8)] | None = (
        None  # of `bits: auto`: the average over all weights
    )
    group_size: int = 128  # columns that share a scale; -1 a whole row
    symmetric: bool = True
    act_order: bool | Literal["group"] = False  # "group": order inside groups that stay in place
    static_groups: bool = (
        False  # with act_order: groups stay in place, their grids those of the original weights
    )
    damp: Annotated[float, Field(gt=0, le=1, strict=False)] = 0.01
    double_quant: bool = False
    scale_search: bool = True
    clip_search: bool = True
    search_steps: Annotated[int, Field(ge=2, le=100)] = 20
    propagate: Literal["original", "quantized"] = "original"
    format: Format = "gptq"
    calibration: Calibration = Calibration()

    _named: frozenset[str] = PrivateAttr(default=frozenset())  # keys that were written, not filled in

    @model_validator(mode="wrap")
    @classmethod
    def _remember_what_was_named(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        recipe = handler(data)
        if isinstance(data, dict):
            recipe._named = frozenset(map(str, data))
        return recipe

    def named(self) -> dict[str, Any]:
        return {key: value for key, value in super().named().items() if key in self._named}

    @model_validator(mode="before")
    @classmethod
    def _fill_by_method(cls, data: Any) -> Any:
        """Defaults that depend on the method; a fixed value may be repeated, not contradicted."""
        if not isinstance(data, dict) or str(data.get("method")) not in _KEYS:
            return data  # the field check says what is wrong
        method, filled = data["method"], dict(data)
        for key in [key for key in data if key in _METHOD_KEYS - _KEYS[method]]:
            index = ("bits", "group_size", "symmetric", "format").index(key) if key in _GRID else None
            if index is None or method not in _FIXED or data[key] != _FIXED[method][index]:
                raise ValueError(f"@{key}: {_why_not(method, key)}")
        if method in _FIXED:
            filled.update(zip(("bits", "group_size", "symmetric", "format"), _FIXED[method], strict=True))
        else:
            own = "awq" if method == "awq" and data.get("bits", 4) == 4 else "gptq"
            filled.setdefault("format", "compressed-tensors" if data.get("bits") == "auto" else own)
            filled.setdefault("symmetric", method != "awq" or filled["format"] == "compressed-tensors")
        return filled

    @model_validator(mode="after")
    def _layout_holds_it(self) -> QuantizeRecipe:
        if self.method in _FIXED:
            return self
        if self.bits == 16:
            raise ValueError(f"@bits: {self.method} stores 2, 3, 4 or 8 bits")
        if self.group_size not in GROUP_SIZES:
            raise ValueError("@group_size: expected 16, 32, 64, 128, or -1 for one group a row")
        if self.format not in LAYOUTS:
            raise ValueError(
                f"@format: {self.method} is written as {' or '.join(LAYOUTS)}, not {self.format!r}"
            )
        held = LAYOUTS[self.format]
        if self.bits == "auto":
            self._auto_has_a_target(held)
        elif self.target_bits is not None:
            raise ValueError(f"@target_bits: goes with bits: auto, not with bits: {self.bits}")
        elif self.bits not in held.bits:
            bits = self.bits
            others = [name for name, other in LAYOUTS.items() if bits in other.bits]
            raise ValueError(
                f"@bits: the {self.format} layout holds {', '.join(map(str, held.bits))} bits only, not {bits}; "
                f"for {bits} bits set format: {' or '.join(others)}"
            )
        if self.static_groups and self.act_order is not True:
            raise ValueError(
                "@static_groups: goes with act_order: true; without it groups are in place anyway"
            )
        gptq = "" if self.bits == "auto" else "format: gptq, or "
        if self.act_order is True and not self.static_groups and not held.ordered:
            raise ValueError(
                f"@act_order: the {self.format} layout cannot store a column order; set {gptq}static_groups: true"
            )
        if not self.symmetric and not held.asymmetric:
            raise ValueError(
                f"@symmetric: the {self.format} layout is read with symmetric grids only; set {gptq}symmetric: true"
            )
        return self

    def _auto_has_a_target(self, held: Layout) -> None:
        if "target_bits" not in _KEYS[self.method]:
            raise ValueError(
                f"@bits: auto weighs the layers on calibration data, which {self.method} does without; "
                f"{_users('target_bits')} have it"
            )
        if not held.mixed:
            others = [name for name, other in LAYOUTS.items() if other.mixed]
            raise ValueError(
                f"@format: the {self.format} layout is read with one width for all layers; "
                f"for bits: auto set format: {' or '.join(others)}"
            )
        if self.target_bits is None:
            raise ValueError(
                "@target_bits: missing; bits: auto needs an average width between 2 and 8, as 3.5"
            )

    def unused(self) -> set[str]:
        # Keys younger than the first published results are left out at their defaults: their digests stay good.
        silent = {"target_bits"} if self.target_bits is None else set()
        silent |= set() if self.static_groups else {"static_groups"}
        return (_METHOD_KEYS - _KEYS[self.method]) | silent

    @property
    def widths(self) -> tuple[int, ...]:
        """Code widths that a layer may get: one, or with `bits: auto` all that the format holds."""
        return LAYOUTS[self.format].bits if self.bits == "auto" else (self.bits,)

    @property
    def average_bits(self) -> float:
        """Bits of a code, over all quantized weights."""
        return float(self.bits) if self.bits != "auto" else self.target_bits or 0.0

    @property
    def needs_calibration(self) -> bool:
        return "calibration" in _KEYS[self.method]


def usable(override: str, method: str) -> bool:
    """Whether the key of a `--set` says something to this method; keys of every method and unknown ones do."""
    key = override.partition("=")[0].split(".")[0].strip()
    return key not in _METHOD_KEYS or key in _KEYS.get(method, _METHOD_KEYS)


def _why_not(method: str, key: str) -> str:
    if method in _FIXED and key in _GRID:
        value = dict(zip(("bits", "group_size", "symmetric", "format"), _FIXED[method], strict=True))[key]
        if method == "none":
            return "method none stores the model as it is"
        return f"{method} always has {key}: {value}; leave the key out"
    return f"method {method} has no use for it (only {_users(key)})"


def _users(key: str) -> str:
    """The methods that have a key."""
    return ", ".join(name for name, keys in _KEYS.items() if key in keys)
