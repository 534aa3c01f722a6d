"""The recipe of `quantlab quantize`.

Unknown keys are refused, and so are keys that the method has no use for: a recipe that says `damp` for
round-to-nearest was written in the belief that it does something. What methods and formats can do is said in
`quantlab.registry`; what one cannot do is refused when a recipe is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import regex
from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    create_model,
    model_validator,
)

from quantlab.recipe.base import BaseRecipe, Calibration
from quantlab.registry.block_types import BLOCK_TYPES
from quantlab.registry.formats import FORMATS, GROUP_SIZES, OF_BLOCKS, PACKING
from quantlab.registry.methods import METHODS, Options
from quantlab.registry.mixtures import AUTO_TYPE, TYPES, USUAL_TYPE, base_type
from quantlab.registry.strict import Size, Strict

GROUPS = (-1, *GROUP_SIZES)
_GRID = ("bits", "group_size", "symmetric", "format")
# Keys that only some methods have; every other key belongs to all.
_KEYS: dict[str, frozenset[str]] = {
    name: frozenset(method.options.model_fields)
    | (frozenset() if method.fixed else frozenset({*_GRID, "overrides"}))
    | (frozenset({"ignore"}) if method.solve else frozenset())
    | (frozenset({"type"}) if method.blocks else frozenset())
    | (frozenset({"size", "types"}) if method.blocks and method.calibrated else frozenset())
    | ({"calibration", "propagate"} if method.calibrated else frozenset())
    | ({"target_bits"} if method.calibrated and (method.solve or method.blocks) else frozenset())
    for name, method in METHODS.items()
}
_METHOD_KEYS = frozenset().union(*_KEYS.values())

if TYPE_CHECKING:
    from builtins import str as FormatName
    from builtins import str as MethodName
    from builtins import str as TypeName
    from builtins import str as WishName
else:
    MethodName, FormatName = Literal[tuple(METHODS)], Literal[tuple(FORMATS)]
    TypeName, WishName = Literal[TYPES], Literal[(*TYPES, AUTO_TYPE)]


class Override(Strict):
    """What is different for some layers; what is left out is as the recipe has it."""

    bits: Literal[2, 3, 4, 8, 16] | None = Field(
        default=None, description="width of a code; 16: left as it is"
    )
    group_size: int | Literal["auto"] | None = Field(default=None, description="columns that share a scale")
    method: str | None = Field(default=None, description="another method, with its own defaults")
    type: TypeName | None = Field(default=None, description="another block type, in a GGUF file")


class _QuantizeRecipe(BaseRecipe):
    kind: Literal["quantize"] = "quantize"
    method: MethodName = Field(description="how weights are rounded")
    bits: Literal[2, 3, 4, 5, 6, 8, 16, "auto"] = Field(
        default=4,
        description="width of a code; auto: a width for each layer, `target_bits` on average; gguf: as `type` says",
    )
    target_bits: Annotated[float, Field(ge=2, le=8)] | None = Field(
        default=None,
        description="with `bits: auto`: average width over all weights; with `type: auto`: bits of storage, "
        "scales and all",
    )
    size: Size | None = Field(
        default=None,
        description="with `type: auto`: the most bytes that the file may have, as 90MB or 1.5GiB",
    )
    group_size: int | Literal["auto"] = Field(
        default=128,
        description="columns that share a scale: 16, 32, 64, 128, or -1 for per-channel scales; auto, and left out: "
        "the largest of 128, 64, 32 that fits the model",
    )
    symmetric: bool = Field(
        default=True, description="zero in the middle of the grid; awq: false unless named"
    )
    propagate: Literal["original", "quantized", "corrected"] = Field(
        default="original",
        description="whose outputs the next block is calibrated on; corrected: on the original's, and each layer aims "
        "at the original's output on what the quantized layers before it give",
    )
    format: FormatName = Field(
        default="gptq", description="what the checkpoint is written in; left out: as the method has it"
    )
    type: WishName | None = Field(
        default=None,
        description="with `format: gguf`: the block type of most matrices, or one of llama.cpp's mixtures; auto: a "
        "type for each matrix, within `size` or `target_bits`; left out: `Q4_K_M`, or auto where one of these is there",
    )
    types: list[TypeName] = Field(
        default_factory=list,
        description="with `type: auto`: block types to choose from; left out: all that fit a matrix",
    )
    ignore: list[str] = Field(
        default_factory=list,
        description="layers that stay in 16 bits: names, ends of names, or `re:` and a regular expression",
    )
    overrides: dict[str, Override] = Field(
        default_factory=dict,
        description="layers, named as in `ignore`, with a `bits`, `group_size` or `method` of their own",
    )
    calibration: Calibration = Field(
        default=Calibration(), description="text that the Hessians are gathered from"
    )

    _named: frozenset[str] = PrivateAttr(default=frozenset())  # keys that were written, not filled in

    if TYPE_CHECKING:  # the options of every method of the registry

        def __getattr__(self, name: str) -> Any: ...

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
        name, filled = data["method"], dict(data)
        method = METHODS[name]
        fixed = dict(zip(_GRID, method.fixed, strict=True)) if method.fixed else {}
        for key in [key for key in data if key in _METHOD_KEYS - _KEYS[name]]:
            if key not in fixed or data[key] != fixed[key]:
                raise ValueError(f"@{key}: {_why_not(name, key)}")
        for key, option in method.options.model_fields.items():
            filled.setdefault(key, option.default)
        if fixed:
            return filled | fixed
        named = [key for key in ("type", "size", "types") if data.get(key)]
        if named and "format" not in data and method.blocks:
            filled["format"] = OF_BLOCKS[0]
        if filled.get("format", method.formats[0]) in OF_BLOCKS:
            return cls._fill_by_type(filled)
        bits = data.get("bits", 4)
        fitting = [
            f for f in method.formats if (bits == "auto" and FORMATS[f].mixed) or bits in FORMATS[f].bits
        ]
        mixed = [f for f in PACKING if FORMATS[f].mixed] if bits == "auto" else []
        filled.setdefault("format", next(iter([*fitting, *mixed]), method.formats[-1]))
        held = FORMATS.get(str(filled["format"]))
        filled.setdefault("symmetric", method.symmetric or not (held is None or held.asymmetric))
        filled.setdefault("group_size", "auto")
        return filled

    @staticmethod
    def _fill_by_type(filled: dict[str, Any]) -> dict[str, Any]:
        """In a format of block types these say what a grid is; it may be repeated, not contradicted."""
        filled.setdefault("format", OF_BLOCKS[0])
        open_keys = [filled.get("size"), filled.get("target_bits"), filled.get("types") or None]
        if filled.get("bits") == "auto" or any(key is not None for key in open_keys):
            filled["type"] = filled.get("type") or AUTO_TYPE
        if filled.get("type") == AUTO_TYPE:
            for key in ("bits", "group_size"):
                if filled.setdefault(key, "auto") != "auto":
                    raise ValueError(f"@{key}: type: auto chooses it with the type; leave the key out")
            if not filled.setdefault("symmetric", True):
                raise ValueError("@symmetric: type: auto chooses it with the type; leave the key out")
            return filled
        filled["type"] = filled.get("type") or USUAL_TYPE
        kind = BLOCK_TYPES.get(base_type(str(filled.get("type"))))
        if kind is None:
            return filled  # the field check says what is wrong
        for key, value in (("bits", kind.bits), ("group_size", kind.group), ("symmetric", not kind.minimum)):
            if filled.setdefault(key, value) != value:
                raise ValueError(f"@{key}: the type {filled['type']} has {key}: {value}; leave the key out")
        return filled

    @model_validator(mode="after")
    def _format_holds_it(self) -> Self:
        name = self.method
        self._patterns_compile()
        if METHODS[name].fixed:
            self.options()
            return self
        if self.propagate == "corrected":
            self._can_be_corrected()
        if self.calibration.imatrix is not None:
            self._imatrix_is_enough()
        if self.format in OF_BLOCKS:
            self._blocks_hold_it()
            return self
        for key in ("type", "size", "types"):
            if getattr(self, key):
                raise ValueError(
                    f"@{key}: goes with format: {' or '.join(OF_BLOCKS)}, not with format: {self.format}"
                )
        if METHODS[name].solver(of_blocks=False) is None:
            raise ValueError(
                f"@format: {name} is written as {' or '.join(METHODS[name].formats)}, not {self.format!r}"
            )
        if self.bits == 16:
            raise ValueError(f"@bits: {name} stores 2, 3, 4 or 8 bits")
        if self.group_size not in (*GROUPS, "auto"):
            raise ValueError("@group_size: expected auto, 16, 32, 64, 128, or -1 for per-channel scales")
        if self.format not in PACKING:
            raise ValueError(f"@format: {name} is written as {' or '.join(PACKING)}, not {self.format!r}")
        held = FORMATS[self.format]
        if self.bits == "auto":
            self._auto_has_a_target()
        elif self.target_bits is not None:
            raise ValueError(f"@target_bits: goes with bits: auto, not with bits: {self.bits}")
        elif self.bits not in held.bits:
            bits = self.bits
            others = [other for other in PACKING if bits in FORMATS[other].bits] or OF_BLOCKS
            raise ValueError(
                f"@bits: the {self.format} format holds {', '.join(map(str, held.bits))} bits only, not {bits}; "
                f"for {bits} bits set format: {' or '.join(others)}"
            )
        options = self.options()
        ordered = [other for other in PACKING if FORMATS[other].ordered and self.bits in FORMATS[other].bits]
        instead = f"format: {' or '.join(ordered)}, or " if ordered else ""
        if options.reorders and not held.ordered:
            raise ValueError(
                f"@act_order: the {self.format} format cannot store a column order; "
                f"set {instead}static_groups: true"
            )
        if not self.symmetric and not held.asymmetric:
            loose = [
                other for other in PACKING if FORMATS[other].asymmetric and self.bits in FORMATS[other].bits
            ]
            instead = f"format: {' or '.join(loose)}, or " if loose else ""
            raise ValueError(
                f"@symmetric: the {self.format} format is read with symmetric grids only; "
                f"set {instead}symmetric: true"
            )
        return self

    def _blocks_hold_it(self) -> None:
        """What a format of block types asks of a recipe."""
        if METHODS[self.method].blocks is None:
            others = [name for name, method in METHODS.items() if method.blocks]
            raise ValueError(f"@format: {self.method} does not round to block types; {', '.join(others)} do")
        if self.type == AUTO_TYPE:
            self._types_have_a_target()
        for key in ("target_bits", "size", "types"):
            if self.type != AUTO_TYPE and getattr(self, key):
                raise ValueError(f"@{key}: goes with type: auto, not with type: {self.type}")
        if self.options().reorders:
            raise ValueError(
                "@act_order: a GGUF file cannot store a column order; set act_order: group, or static_groups: true"
            )
        if "clip_search" in self.model_fields_set and self.clip_search:
            raise ValueError("@clip_search: block types have their scales searched anyway; leave the key out")

    def _types_have_a_target(self) -> None:
        """What types are chosen by, and within."""
        if "size" not in _KEYS[self.method]:
            raise ValueError(
                f"@type: auto weighs the matrices on calibration data, which {self.method} does without; "
                f"{_users('size')} have it"
            )
        if self.calibration.imatrix is not None:
            raise ValueError(
                "@calibration.imatrix: type: auto measures on a text what an error of each matrix costs, which an "
                "importance matrix does not say: calibrate on a text"
            )
        if (self.size is None) == (self.target_bits is None):
            raise ValueError(
                "@size: type: auto needs the most bytes of the file, as 90MB, or target_bits, and not both"
            )
        mixed = [name for name in self.types if name not in BLOCK_TYPES or self.types.count(name) > 1]
        if mixed:
            raise ValueError(
                f"@types: expected block types, each once ({', '.join(BLOCK_TYPES)}), not {mixed[0]}"
            )

    def _can_be_corrected(self) -> None:
        """Layers are solved one after the other then."""
        if METHODS[self.method].needs & {"folds", "inputs"}:
            raise ValueError(
                f"@propagate: {self.method} looks at all layers of a block at once; corrected solves one after the "
                "other: expected original or quantized"
            )
        if self.opens_widths:
            raise ValueError(
                "@propagate: bits: auto takes each layer from one of several solutions, and corrected makes layers "
                "that fit those of one: expected original or quantized"
            )

    def _imatrix_is_enough(self) -> None:
        """An importance matrix says of every input channel how large it is, and no more."""
        if not METHODS[self.method].diagonal:
            others = " or ".join(name for name, method in METHODS.items() if method.diagonal)
            raise ValueError(
                f"@calibration.imatrix: {self.method} needs all second moments of the inputs, an importance matrix "
                f"holds their diagonal alone: set method: {others}, or calibrate on a text"
            )
        if self.propagate != "original":
            raise ValueError(
                "@propagate: an importance matrix is of the original's inputs, and no text is run through the model: "
                "expected original"
            )

    def _patterns_compile(self) -> None:
        for key, patterns in (("ignore", self.ignore), ("overrides", [*self.overrides])):
            for pattern in patterns:
                if not pattern.strip() or pattern == "re:":
                    raise ValueError(f"@{key}: an empty name")
                try:
                    regex.compile(pattern.removeprefix("re:"))
                except regex.error as error:
                    raise ValueError(f"@{key}: {pattern!r} is no regular expression: {error}") from None
        for pattern, change in self.overrides.items():
            self._override_is_possible(pattern, change)

    def _override_is_possible(self, pattern: str, change: Override) -> None:
        where = f"@overrides: {pattern!r}:"
        held = FORMATS[self.format]
        if held.types:
            if change.bits not in (None, 16) or change.group_size is not None or change.method is not None:
                raise ValueError(f"{where} in a GGUF file a layer has a type of its own, or bits: 16")
            return
        if change.type is not None:
            raise ValueError(f"{where} type: goes with format: {' or '.join(OF_BLOCKS)}")
        if self.bits == "auto":
            raise ValueError(f"{where} bits: auto chooses the widths itself; ignore leaves layers in 16 bits")
        if change.bits not in (None, 16, *held.bits):
            raise ValueError(
                f"{where} the {self.format} format holds {', '.join(map(str, held.bits))} bits, not {change.bits}"
            )
        if change.group_size not in (None, "auto", *GROUPS):
            raise ValueError(f"{where} group_size: expected auto, 16, 32, 64, 128, or -1")
        others = [
            name
            for name, method in METHODS.items()
            if method.solver(of_blocks=False)
            and not method.fixed
            and method.needs <= METHODS[self.method].needs
        ]
        if change.method is not None and change.method not in others:
            raise ValueError(
                f"{where} method: expected {' or '.join(others)} beside {self.method}, not {change.method!r}"
            )

    def options(self) -> Options:
        """The options that only this method has."""
        kind = METHODS[self.method].options
        try:
            return kind(**{key: getattr(self, key) for key in kind.model_fields})
        except ValidationError as error:
            raise ValueError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from None

    def _auto_has_a_target(self) -> None:
        if "target_bits" not in _KEYS[self.method]:
            raise ValueError(
                f"@bits: auto weighs the layers on calibration data, which {self.method} does without; "
                f"{_users('target_bits')} have it"
            )
        if not FORMATS[self.format].mixed:
            others = [name for name in PACKING if FORMATS[name].mixed]
            raise ValueError(
                f"@format: the {self.format} format is read with one width for all layers; "
                f"for bits: auto set format: {' or '.join(others)}"
            )
        if self.target_bits is None:
            raise ValueError(
                "@target_bits: missing; bits: auto needs an average width between 2 and 8, as 3.5"
            )

    def decides(self) -> dict[str, Any]:
        """As of every recipe; a key of several methods is at its default where it is at this method's.
        `group_size: auto` is left out as the default is: where both can be applied to a model they do the same, and
        where they do not, auto is settled to another number or 128 is refused."""
        found = super().decides()
        if (calibration := found.get("calibration", {})).get("imatrix_digest"):
            calibration.pop("imatrix")  # the content decides, wherever it lies
        for key, option in METHODS[self.method].options.model_fields.items():
            found.pop(key, None)
            if (value := getattr(self, key)) != option.default:
                found[key] = value
        return {key: value for key, value in found.items() if (key, value) != ("group_size", "auto")}

    def content(self) -> dict[str, Any]:
        """As of every recipe; of the calibration what is looked at, a text or an importance matrix."""
        found = super().content()
        if "calibration" in found:
            given = self.calibration.imatrix is not None
            found["calibration"] = {
                key: value
                for key, value in found["calibration"].items()
                if key.startswith("imatrix") == given and not (given and value is None)
            }
        return found

    def unused(self) -> set[str]:
        silent = {"target_bits"} if self.target_bits is None else set()
        silent |= {key for key in ("ignore", "overrides", "type", "types", "size") if not getattr(self, key)}
        return set(_METHOD_KEYS - _KEYS[self.method]) | silent

    @property
    def widths(self) -> tuple[int, ...]:
        """Code widths that a layer may get: one, or with `bits: auto` all that the format holds."""
        return FORMATS[self.format].bits if self.bits == "auto" else (self.bits,)

    @property
    def opens_widths(self) -> bool:
        """Whether the width of each layer is chosen from several solutions."""
        return self.bits == "auto" and self.type is None

    @property
    def opens_types(self) -> bool:
        """Whether the block type of each matrix is chosen, before it is solved."""
        return self.type == AUTO_TYPE

    @property
    def solutions(self) -> int:
        """How often each layer is solved."""
        return len(self.widths) if self.opens_widths else 1

    @property
    def average_bits(self) -> float:
        """Bits of a code, over all quantized weights."""
        return float(self.bits) if self.bits != "auto" else self.target_bits or 0.0

    @property
    def needs_calibration(self) -> bool:
        """Whether text is run through the model."""
        return METHODS[self.method].calibrated and self.calibration.imatrix is None

    @property
    def imatrix_file(self) -> Path | None:
        """The importance matrix that the method takes in place of a text."""
        return self.calibration.imatrix_file if METHODS[self.method].calibrated else None


def usable(override: str, method: str) -> bool:
    """Whether the key of a `--set` says something to this method; keys of every method and unknown ones do."""
    key = override.partition("=")[0].split(".")[0].strip()
    return key not in _METHOD_KEYS or key in _KEYS.get(method, _METHOD_KEYS)


if TYPE_CHECKING:

    class QuantizeRecipe(_QuantizeRecipe):
        """See below: the fields of the base and the options of every method."""

else:
    _OPTIONS = {}
    for _method in METHODS.values():
        for _name, _field in _method.options.model_fields.items():
            _OPTIONS[_name] = (_field.annotation, _field)
    QuantizeRecipe = create_model("QuantizeRecipe", __base__=_QuantizeRecipe, **_OPTIONS)
    QuantizeRecipe.__doc__ = (
        "One way of storing a model. `bits`, `group_size`, `symmetric` and `format` are always filled in; the keys of "
        "all methods are here, those that the method at hand lacks are refused."
    )


def _why_not(method: str, key: str) -> str:
    fixed = METHODS[method].fixed
    if fixed and key in _GRID:
        value = getattr(fixed, key)
        if method == "none":
            return "method none stores the model as it is"
        return f"{method} always has {key}: {value}; leave the key out"
    return f"not an option of {method} (only of {_users(key)})"


def _users(key: str) -> str:
    """The methods that have a key."""
    return ", ".join(name for name, keys in _KEYS.items() if key in keys)
