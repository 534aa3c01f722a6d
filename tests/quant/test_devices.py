"""Solvers, layouts and the walk on tensors that say they are on a GPU: no operation mixes devices, nothing that comes
out has moved to the CPU, and every number is the CPU's.

The planted faults at the end show that such a slip fails here.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantlab.formats import format_module
from quantlab.formats.gguf.encode import encode
from quantlab.formats.gguf.pack import pack
from quantlab.models import precision
from quantlab.models.blockwise import BlockwiseModel, dtype_of
from quantlab.models.safetensors.files import open_files
from quantlab.models.scale_folding import LinearPair, NormFold, ScaleFolds
from quantlab.progress import Silent
from quantlab.quant.block import BlockResult, BlockView, NormInput
from quantlab.quant.grid import Grid, Quantized, fit, layer_loss, nearest_values, round_to_grid
from quantlab.quant.hessian import InputHessian
from quantlab.quant.jobs import Job
from quantlab.quant.methods.gptq_blocks import solve_blocks
from quantlab.quant.pipeline import calibration_rows, make_plan, plain_dtype
from quantlab.quant.sequential import open_pass, quantize_blocks
from quantlab.quant.verify.reference_logits import Expected, ReferencePass, probe_rows
from quantlab.recipe.quantize import QuantizeRecipe
from quantlab.registry import load
from quantlab.registry.block_types import BLOCK_TYPES
from quantlab.registry.formats import PACKING
from quantlab.registry.methods import METHODS
from tests.conftest import write_mixture, write_tiny
from tests.fake_cuda import MixedDevices, OnCuda, fake_cuda, to_cuda, value_of

HIDDEN, WIDE = 64, 96
READERS = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some CPUs rank candidates by products of rounded operands (`bfloat16_operands`), GPUs do not."""
    monkeypatch.setattr(precision, "cpu_multiplies", lambda dtype: dtype == torch.float32)


def every_tensor(thing: Any) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        yield thing
    elif dataclasses.is_dataclass(thing):
        yield from (t for f in dataclasses.fields(thing) for t in every_tensor(getattr(thing, f.name)))
    elif isinstance(thing, dict):
        yield from (t for part in thing.values() for t in every_tensor(part))
    elif isinstance(thing, list | tuple):
        yield from (t for part in thing for t in every_tensor(part))


def assert_same(there: Any, here: Any) -> None:
    """Everything on the GPU, and every value the CPU's."""
    found, expected = list(every_tensor(there)), list(every_tensor(here))
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, OnCuda)
        assert one.value.dtype == other.dtype
        assert torch.equal(one.value.float(), other.float())


def block(place: Callable[[torch.Tensor], torch.Tensor]) -> BlockView:
    """A decoder block's seven linears with their statistics, one channel dead, and what can be folded where."""
    seeded = torch.Generator().manual_seed(0)
    shapes = {
        "q_proj": (HIDDEN, HIDDEN), "k_proj": (32, HIDDEN), "v_proj": (32, HIDDEN), "o_proj": (HIDDEN, HIDDEN),
        "gate_proj": (WIDE, HIDDEN), "up_proj": (WIDE, HIDDEN), "down_proj": (HIDDEN, WIDE),
    }  # fmt: skip
    stored = {name: place(torch.randn(shape, generator=seeded)) for name, shape in shapes.items()}
    moments = []
    for layers in (READERS, ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        width = shapes[layers[0]][1]
        x = torch.randn(300, width, generator=seeded) * torch.rand(width, generator=seeded).exp()
        x[:, 3] = 0
        gathered = InputHessian.empty(layers[0], width, place(x).device)
        gathered.add(place(x))
        gathered.layers = list(layers)
        moments.append(gathered.finish())
    # two heads read one of values
    rows = torch.arange(32).view(2, 16).repeat_interleave(2, dim=0).reshape(-1)
    found = ScaleFolds(
        (NormFold("norm", READERS, ("router",)), NormFold("second", ("gate_proj", "up_proj"), ())),
        (LinearPair("v_proj", "o_proj", rows), LinearPair("up_proj", "down_proj", torch.arange(WIDE))),
    )
    norms = {
        name: NormInput(place(torch.rand(HIDDEN, generator=seeded) + 0.5), 0.0) for name in ("norm", "second")
    }
    plain = {"router.weight": torch.randn(4, HIDDEN, generator=seeded), "norm.bias": torch.ones(HIDDEN),
             "v_proj.bias": torch.ones(32)}  # fmt: skip
    return BlockView(stored, moments, found, norms, {n: place(t) for n, t in plain.items()}, {})


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


CASES = [
    ("rtn", {}),
    ("fp8", {}),
    ("gptq", {}),
    ("gptq", {"act_order": True}),
    ("gptq", {"act_order": "group"}),
    ("gptq", {"act_order": True, "static_groups": True}),
    ("awq", {"search_steps": 6}),
    ("awq", {"scale_search": False}),
    ("awq", {"clip_search": False, "search_steps": 2}),
]
GRIDS = [Grid(4, 32, True, 1), Grid(3, 32, False), Grid(8, -1, True)]


def solved(
    name: str, options: dict[str, Any], place: Callable[[torch.Tensor], torch.Tensor]
) -> list[BlockResult]:
    view = block(place)
    chosen = [dict.fromkeys(view.stored, grid) for grid in GRIDS]
    return load(METHODS[name].solve or "")(view, chosen, **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_method_solves_a_block_there(name: str, options: dict[str, Any]) -> None:
    here = solved(name, options, same)
    with fake_cuda():
        there = solved(name, options, to_cuda)
    assert_same(there, here)
    assert [r.loss for r in there] == [r.loss for r in here]


@pytest.mark.parametrize("name", ["Q5_1", "Q8_0", "IQ4_NL", "Q4_K", "Q3_K"])
def test_block_types_are_solved_there(name: str) -> None:
    kind, seeded = BLOCK_TYPES[name], torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 256, generator=seeded), torch.randn(300, 256, generator=seeded)
    hessian = x.t() @ x / 300

    def both(place: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, ...]:
        w, h = place(weight), place(hessian)
        solved = solve_blocks(w, h, kind)
        return encode(w, kind, torch.diagonal(h)), solved, solved.dequantize(), pack(solved)

    here = both(same)
    with fake_cuda():
        assert_same(both(to_cuda), here)


def test_statistics_are_gathered_where_the_inputs_are() -> None:
    x = torch.randn(3, 50, HIDDEN, generator=torch.Generator().manual_seed(0))
    here = InputHessian.empty("a", HIDDEN)
    here.add(x)
    with fake_cuda():
        there = InputHessian.empty("a", HIDDEN, "cuda")
        there.add(to_cuda(x))
        assert_same(there.finish(), here.finish())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_to_a_grid_stays_there(grid: Grid) -> None:
    weight = torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(0))
    groups = weight.view(32, -1, grid.columns(HIDDEN))

    def work(w: torch.Tensor, g: torch.Tensor) -> list[Any]:
        found = round_to_grid(w, grid)
        values = found.dequantize()
        return [found, values, nearest_values(g, *fit(g, grid, 0.9), grid), layer_loss(w, values, w.t() @ w)]

    here = work(weight, groups)
    with fake_cuda():
        assert_same(work(to_cuda(weight), to_cuda(groups)), here)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("gptq", 2),
        ("gptq", 3),
        ("gptq", 4),
        ("gptq", 8),
        ("awq", 4),
        *(("compressed-tensors", b) for b in (3, 4, 8)),
    ],
)
def test_a_layout_packs_and_unpacks_there(name: str, bits: int) -> None:
    weight = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))
    grid, module = Grid(bits, 32, True, 1), format_module(name)
    told: dict[str, Any] = {"bits": bits, "group_size": 32}

    def round_trip(w: torch.Tensor) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...], torch.Tensor]:
        q = round_to_grid(w, grid)
        tensors = module.pack(q.codes, q.scales, q.zeros, q.group_of, symmetric=True, **told)
        parts = module.unpack(tensors, **told)
        return tensors, parts, Quantized(*parts, bits).dequantize()

    here = round_trip(weight)
    with fake_cuda():
        there = round_trip(to_cuda(weight))
    there[0].pop("weight_shape", None), here[0].pop("weight_shape", None)  # read by Python, wherever it is
    assert_same(there, here)


def test_every_layout_is_tried() -> None:
    assert set(PACKING) == {"gptq", "awq", "compressed-tensors"}


def test_fp8_codes_are_stored_as_they_are() -> None:
    with fake_cuda():
        (found,) = load(METHODS["fp8"].solve or "")(
            BlockView({"a": to_cuda(torch.randn(8, 32))}), [{"a": GRIDS[0]}]
        )
        q = found.quantized["a"]
        tensors = format_module("compressed-tensors").pack(
            q.codes, q.scales, q.zeros, q.group_of, bits=8, group_size=-1, symmetric=True
        )
        parts = format_module("compressed-tensors").unpack(tensors, bits=8, group_size=-1)
        assert all(isinstance(t, OnCuda) for t in every_tensor([tensors, parts]))


# The walk


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "small", layers=2, hidden=64, dtype="float32")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(
        tmp_path_factory.mktemp("models") / "mixture", layers=1, intermediate=64, dtype="float32"
    )


def walked(
    model: Path,
    out: Path,
    recipes: dict[str, QuantizeRecipe],
    device: str,
    *,
    spill: bool = False,
    resume: bool = False,
) -> tuple[dict[str, bytes], list[Expected]]:
    """The blocks' files of every recipe, and what the finished checkpoints should compute."""
    files = open_files(str(model))
    opened = BlockwiseModel(files, device, torch.float32, stored=dtype_of(files, "auto"))
    jobs = [Job(name, recipe, out / name) for name, recipe in recipes.items()]
    rows, calibration = calibration_rows(jobs, files, False)
    probe = ReferencePass(files, probe_rows(rows, 257, tokens=16), device, plain_dtype(opened))
    plans = [make_plan(job, files, opened, calibration, resume) for job in jobs]
    folder = plans[0].writer.scratch / "activations" if spill else None
    walk = open_pass(opened, rows, plans, spill=folder, key={"a": "b"}, probe=probe)
    quantize_blocks(opened, walk, Silent())
    written = {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("model-*.safetensors"))}
    return written, [probe.logits(plan.probe) for plan in plans if plan.probe is not None]


def recipe(source: Path, name: str, **keys: Any) -> QuantizeRecipe:
    plain: dict[str, Any] = (
        {"method": name, **keys} if name == "fp8" else {"method": name, "group_size": 32, **keys}
    )
    if name in ("gptq", "awq"):
        plain["calibration"] = {"source": str(source), "rows": 4, "seq_len": 32}
    return QuantizeRecipe.model_validate(plain)


def here_and_there(model: Path, out: Path, recipes: dict[str, QuantizeRecipe], **how: Any) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        files, logits = walked(model, out / "cpu", recipes, "cpu", **how)
    with fake_cuda():
        files_there, logits_there = walked(model, out / "cuda", recipes, "cuda", **how)
    assert files and files_there == files
    for one, other in zip(logits_there, logits, strict=True):
        assert not isinstance(one.logits, OnCuda) and torch.equal(one.logits, other.logits)
        assert torch.equal(one.rounded, other.rounded)


def four(source: Path) -> dict[str, QuantizeRecipe]:
    return {
        "rtn": recipe(source, "rtn"),
        "gptq": recipe(source, "gptq", bits=3, format="compressed-tensors"),
        "own": recipe(source, "gptq", propagate="quantized", act_order=True),
        "awq": recipe(source, "awq", search_steps=4),
    }


def test_the_walk_writes_the_same_bytes(small: Path, calibration_file: Path, tmp_path: Path) -> None:
    here_and_there(small, tmp_path, four(calibration_file))


def test_the_walk_with_states_in_files_goes_on_where_it_stopped(
    small: Path, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in files comes back to the GPU: states, probes, and blocks that were solved before."""
    from quantlab.quant.checkpoint import CheckpointWriter

    wanted = {name: r for name, r in four(calibration_file).items() if name in ("gptq", "own")}
    with sdpa_kernel(SDPBackend.MATH):
        expected = walked(small, tmp_path / "cpu", wanted, "cpu", spill=True)[0]
    written = CheckpointWriter.write_block

    def stops(writer: CheckpointWriter, index: int, *args: Any) -> None:
        if index == 1 and writer.out.name == "own":
            raise KeyboardInterrupt
        written(writer, index, *args)

    with fake_cuda():
        monkeypatch.setattr(CheckpointWriter, "write_block", stops)
        with pytest.raises(KeyboardInterrupt):
            walked(small, tmp_path / "cuda", wanted, "cuda", spill=True)
        monkeypatch.setattr(CheckpointWriter, "write_block", written)
        found = walked(small, tmp_path / "cuda", wanted, "cuda", spill=True, resume=True)[0]
    assert found == expected


def test_the_walk_through_a_mixture_of_experts(mixture: Path, calibration_file: Path, tmp_path: Path) -> None:
    wanted = {
        "gptq": recipe(calibration_file, "gptq"),
        "awq": recipe(calibration_file, "awq", search_steps=2),
    }
    here_and_there(mixture, tmp_path, wanted)


# Planted faults

FAULTS = [
    ("quantlab.quant.grid", "storable_scales", "rtn"),
    ("quantlab.quant.methods.fp8", "storable_scales", "fp8"),
    ("quantlab.quant.methods.gptq", "squared_distance", "gptq"),
    ("quantlab.quant.methods.gptq", "_damped_factor", "gptq"),
    ("quantlab.quant.methods.awq_search", "nearest_values", "awq"),
    ("quantlab.quant.methods.awq_search", "_average_tied", "awq"),
    ("quantlab.quant.hessian", "InputHessian.empty", "gptq"),
]


def on_the_cpu(found: Any) -> Any:
    if isinstance(found, tuple):
        return tuple(map(on_the_cpu, found))
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return dataclasses.replace(found, **{k: value_of(v) for k, v in vars(found).items()})
    return value_of(found)


def plant(monkeypatch: pytest.MonkeyPatch, where: str, name: str) -> None:
    """From now on what a function makes lies on the CPU, as if a `device=` had been forgotten in it."""
    owner: Any = importlib.import_module(where)
    *classes, leaf = name.split(".")
    for one in classes:
        owner = getattr(owner, one)
    true = getattr(owner, leaf)
    monkeypatch.setattr(owner, leaf, lambda *args, **kwargs: on_the_cpu(true(*args, **kwargs)))


@pytest.mark.parametrize(("where", "name", "by"), FAULTS)
def test_a_helper_that_forgets_the_device_is_noticed(
    where: str, name: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, where, name)
    here = solved(by, {}, same)
    with fake_cuda(), pytest.raises(MixedDevices):
        assert_same(solved(by, {}, to_cuda), here)


@pytest.mark.parametrize(
    ("where", "name"),
    [("quantlab.quant.hessian", "InputHessian.empty"), ("quantlab.models.scale_folding", "factors")],
)
def test_a_walk_that_loses_the_device_is_noticed(
    small: Path,
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    name: str,
) -> None:
    plant(monkeypatch, where, name)
    wanted = {"awq": recipe(calibration_file, "awq", search_steps=2)}
    with fake_cuda(), pytest.raises(MixedDevices):
        walked(small, tmp_path, wanted, "cuda")


def test_a_layout_that_forgets_the_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "quantlab.formats.bits", "unpack")
    with fake_cuda(), pytest.raises(MixedDevices):
        q = round_to_grid(to_cuda(torch.randn(32, 32)), GRIDS[0])
        tensors = format_module("awq").pack(
            q.codes, q.scales, q.zeros, q.group_of, bits=4, group_size=32, symmetric=True
        )
        format_module("awq").unpack(tensors, bits=4, group_size=32)
