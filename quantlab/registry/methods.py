"""The methods: one entry each, read by recipes, planning, the engine, ``doctor``, cards and plots.

A method that quantlab solves itself is a function on one decoder block::

    def quantize_block(block: BlockView, grids: Sequence[Mapping[str, Grid]], **options) -> list[BlockResult]

which gets, for each result that is wanted, the grids of the linears to quantize, by name in the block (others stay as
they are), with the options of its recipe keys as plain arguments. One that a library applies to a whole model is a
function::

    def quantize_model(name: str, target: Path, method: str, *, dtype, device, trust_remote_code, **options) -> None
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from quantlab.registry.strict import Strict

Need = Literal["hessian", "inputs", "folds"]
Layers = Sequence[tuple[int, int]]  # inputs and rows of each set of linears that share an input


class Options(Strict):
    """Recipe keys that only one method has. A method without such keys uses this class."""

    @property
    def reorders(self) -> bool:
        """Whether columns are grouped in an order of their own, which the format must be able to store."""
        return False


class GptqOptions(Options):
    act_order: bool | Literal["group"] = Field(
        default=False,
        description="quantize the columns with the largest activations first; "
        "`group` orders whole groups and leaves the columns in them in place",
    )
    static_groups: bool = Field(
        default=False,
        description="with `act_order: true`: groups stay in place, on grids of the original weights",
    )
    damp: Annotated[float, Field(gt=0, le=1, strict=False)] = Field(
        default=0.01, description="share of the Hessian's mean diagonal that is added to its diagonal"
    )
    clip_search: bool = Field(default=False, description="search for the clipping range of each group")

    @model_validator(mode="after")
    def _static_groups_have_an_order(self) -> Self:
        if self.static_groups and self.act_order is not True:
            raise ValueError(
                "@static_groups: goes with act_order: true; without it groups are in place anyway"
            )
        return self

    @property
    def reorders(self) -> bool:
        return self.act_order is True and not self.static_groups


class AwqOptions(Options):
    scale_search: bool = Field(default=True, description="search for the scale of each input channel")
    clip_search: bool = Field(default=True, description="search for the clipping range of each group")
    search_steps: Annotated[int, Field(ge=2, le=100)] = Field(
        default=20, description="candidate exponents of the scale search"
    )


class FourBitOptions(Options):
    double_quant: bool = Field(default=False, description="quantize the scales too")


class Fixed(NamedTuple):
    """What a method fixes by itself. ``group_size`` is the block size of bitsandbytes."""

    bits: int
    group_size: int
    symmetric: bool
    format: str


class Cost(NamedTuple):
    """What solving takes: floating point operations of matrix products, and passes over all weights."""

    products: float
    passes: float


@dataclass(frozen=True)
class Method:
    """Everything that is known of a method.

    about: one line for people.
    solve: the function on one block; None where there is nothing to solve or a library does it.
    blocks: the same for formats of block types (``Format.types``); None where the method has none. A method whose
        ``solve`` is the same function is for those formats alone.
    whole: the function on a whole model, for methods of a library with a storage of its own.
    options: the recipe keys that it has beside bits, group_size, symmetric and format.
    fixed: bits, group size, symmetric and format where the method leaves no choice.
    formats: which format it is written in when a recipe names none: the first of these that holds the width.
    symmetric: the default.
    needs: "hessian": second moments of every linear's input; "inputs": the block's inputs, and to run the block with
        trial weights (``BlockView.inputs``, ``BlockView.run``); "folds": which scales can be moved between layers.
    floating: codes are 8-bit floating point numbers.
    diagonal: of the second moments it looks at the diagonal alone, which is what an importance matrix holds.
    requires: modules that must import for the method to run.
    cost: what solving takes, from (inputs, rows) of each set of linears that share an input, its options and how many
        widths are solved.
    colour: in plots.
    """

    about: str
    solve: str | None = None
    blocks: str | None = None
    whole: str | None = None
    options: type[Options] = Options
    fixed: Fixed | None = None
    formats: tuple[str, ...] = ("gptq",)
    symmetric: bool = True
    needs: frozenset[Need] = frozenset()
    floating: bool = False
    diagonal: bool = False
    requires: tuple[str, ...] = ("torch", "transformers")
    cost: Callable[[Layers, Mapping[str, Any], int], Cost] = lambda layers, options, widths: Cost(0, 12)
    colour: str = "#8e44ad"

    @property
    def calibrated(self) -> bool:
        """Whether it looks at calibration data."""
        return bool(self.needs & {"hessian", "inputs"})

    def solver(self, *, of_blocks: bool) -> str | None:
        """The function that solves for a format, of block types or not; None where there is none."""
        return self.blocks if of_blocks else (None if self.solve == self.blocks else self.solve)


SCREENED, CLIP_STEPS = 128, 11  # rows and ranges that the AWQ search tries


def _gptq_cost(layers: Layers, options: Mapping[str, Any], widths: int) -> Cost:
    """The Hessian's Cholesky factor and inverse, and the update of all later columns by each one."""
    searched = 16 * 8 if options["clip_search"] else 0
    products = sum(columns**3 + widths * rows * columns**2 for columns, rows in layers)
    return Cost(products, (40 + searched) * widths)


def _awq_cost(layers: Layers, options: Mapping[str, Any], widths: int) -> Cost:
    screened = 2 * SCREENED * options["search_steps"] if options["scale_search"] else 0
    products = widths * sum((screened + 16 * rows) * columns**2 for columns, rows in layers)
    return Cost(products, widths * (60 + (2 * CLIP_STEPS * 11 if options["clip_search"] else 0)))


_BITSANDBYTES = ("torch", "transformers", "bitsandbytes")
METHODS: dict[str, Method] = {
    "none": Method(
        "the model as it is: the baseline",
        fixed=Fixed(16, -1, True, "none"),
        colour="#555555",
    ),
    "rtn": Method(
        "round to nearest: each weight to the closest point of its group's grid",
        solve="quantlab.quant.methods.rtn:quantize_block",
        blocks="quantlab.quant.methods.rtn_blocks:quantize_block",
        colour="#c0392b",
    ),
    "bnb-int8": Method(
        "LLM.int8() of bitsandbytes",
        whole="quantlab.quant.methods.bnb:quantize_model",
        fixed=Fixed(8, -1, True, "bitsandbytes"),
        requires=_BITSANDBYTES,
    ),
    "bnb-fp4": Method(
        "FP4 of bitsandbytes",
        whole="quantlab.quant.methods.bnb:quantize_model",
        options=FourBitOptions,
        fixed=Fixed(4, 64, True, "bitsandbytes"),
        requires=_BITSANDBYTES,
    ),
    "bnb-nf4": Method(
        "NF4 of bitsandbytes, the storage of QLoRA",
        whole="quantlab.quant.methods.bnb:quantize_model",
        options=FourBitOptions,
        fixed=Fixed(4, 64, True, "bitsandbytes"),
        requires=_BITSANDBYTES,
    ),
    "gptq": Method(
        "GPTQ: column by column, each error compensated by the columns that follow",
        solve="quantlab.quant.methods.gptq:quantize_block",
        blocks="quantlab.quant.methods.gptq_blocks:quantize_block",
        options=GptqOptions,
        needs=frozenset({"hessian"}),
        cost=_gptq_cost,
        colour="#2471a3",
    ),
    "awq": Method(
        "AWQ: channels with large activations are scaled up before rounding",
        solve="quantlab.quant.methods.awq:quantize_block",
        options=AwqOptions,
        formats=("awq", "gptq"),
        symmetric=False,
        needs=frozenset({"hessian", "folds"}),
        cost=_awq_cost,
        colour="#1e8449",
    ),
    "imatrix": Method(
        "round to nearest in a GGUF file's block types, weighted by the importance matrix",
        solve="quantlab.quant.methods.rtn_blocks:quantize_block_by_importance",
        blocks="quantlab.quant.methods.rtn_blocks:quantize_block_by_importance",
        formats=("gguf",),
        needs=frozenset({"hessian"}),
        diagonal=True,
        cost=lambda layers, options, widths: Cost(0, 300 * widths),
        colour="#b9770e",
    ),
    "fp8": Method(
        "8-bit floating point (E4M3), per-channel scales",
        solve="quantlab.quant.methods.fp8:quantize_block",
        fixed=Fixed(8, -1, True, "compressed-tensors"),
        floating=True,
    ),
}
