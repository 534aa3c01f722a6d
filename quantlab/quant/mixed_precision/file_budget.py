"""``type: auto`` before anything is measured: which matrices of a GGUF file have their type open, and how many bytes
there are for them.

A file is its header, which does not depend on the types, the tensors whose types are given, and the open ones, each
padded to the file's alignment. So what is left for the open ones is known to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from quantlab.errors import RecipeError
from quantlab.models.gguf.header import ALIGNMENT
from quantlab.models.safetensors.files import ModelFiles
from quantlab.quant.block_selection import file_bytes, places_of
from quantlab.quant.selection import Selection
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry.block_types import BLOCK_TYPES


@dataclass(frozen=True)
class OpenMatrix:
    """A matrix of the file. ``name``: there, without ``.weight``. ``parts``: what it is made of, by names in the
    model's files, several where these are experts. ``shape``: of each part. ``types``: that it may get, fewest bits
    first."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, int]
    types: tuple[str, ...]

    @property
    def weights(self) -> int:
        return len(self.parts) * self.shape[0] * self.shape[1]

    def bytes(self, kind: str) -> int:
        """In the file, with its padding."""
        size = len(self.parts) * self.shape[0] * BLOCK_TYPES[kind].row_bytes(self.shape[1])
        return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class FileBudget:
    """``matrices``: the open ones. ``fixed``: bytes of all else. ``size``: bytes that the file may have. ``least``,
    ``most``: bytes of the smallest and the largest file that these types make."""

    matrices: tuple[OpenMatrix, ...]
    fixed: int
    size: int
    least: int
    most: int


def file_budget(recipe: QuantizeRecipe, files: ModelFiles, chosen: Selection) -> FileBudget:
    """The budget of a recipe with ``type: auto``.

    Args:
        chosen: as ``block_selection.typed`` gives it.

    Raises:
        RecipeError: the size is out of what the types can make; says the least and the most. DataError: as
            ``block_selection.file_bytes``.
    """
    matrices = open_matrices(files, chosen)
    smallest = {part: one.types[0] for one in matrices for part in one.parts}
    least = file_bytes(recipe, files, with_types(chosen, smallest), "F16")
    fixed = least - sum(one.bytes(one.types[0]) for one in matrices)
    most = fixed + sum(one.bytes(one.types[-1]) for one in matrices)
    if recipe.size is not None:
        size, key, wanted = recipe.size, "size", f"{recipe.size:,} bytes"
    else:
        assert recipe.target_bits is not None
        weights = sum(one.weights for one in matrices)
        size = fixed + math.floor(recipe.target_bits * weights / 8)
        key, wanted = "target_bits", f"{recipe.target_bits:g} bits a weight, a file of {size:,} bytes,"
    if not least <= size <= most:
        bits = [8 * (end - fixed) / max(sum(one.weights for one in matrices), 1) for end in (least, most)]
        raise RecipeError(
            f"{key}: {wanted} is not possible: these types make files of {files.name} from {least:,} to {most:,} bytes "
            f"({bits[0]:.3f} to {bits[1]:.3f} bits a weight)",
            hint=f"--set size={least if size < least else most}, or other types",
        )
    return FileBudget(matrices, fixed, size, least, most)


def open_matrices(files: ModelFiles, chosen: Selection) -> tuple[OpenMatrix, ...]:
    """The matrices whose types are open; experts of a layer, which are one tensor of the file, together."""
    places, parts = places_of(files), dict[str, list[str]]()
    for name in chosen.open:
        place = places.of(f"{name}.weight")
        assert place is not None  # or it would not be open
        parts.setdefault(place.leaf, []).append(name)
    found = []
    for leaf, names in parts.items():
        one = chosen.open[names[0]]
        found.append(OpenMatrix(leaf, tuple(names), one.shape, one.types))
    return tuple(found)


def with_types(chosen: Selection, types: Mapping[str, str]) -> Selection:
    """The selection with a type for every matrix, by its name in the model's files."""
    widths = {
        name: width._replace(bits=kind.bits, group_size=kind.group, type=kind.name)
        for name, width in chosen.widths.items()
        for kind in [BLOCK_TYPES[types.get(name, width.type)]]
    }
    outside = {name: types.get(name, kind) for name, kind in chosen.outside.items()}
    return replace(chosen, widths=widths, outside=outside)
