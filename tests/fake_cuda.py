"""CUDA tensors on a machine without CUDA: they say that they are on ``cuda:0``, and hold their values on the CPU.

torch's own FakeTensorMode knows devices but no values: a solver that asks whether a factorisation succeeded stops at
that, and what it computes cannot be looked at. Here every operation is computed, by the CPU's kernels, and refused
where CUDA would refuse it because its operands lie on different devices. So code runs to its end, takes the branches
it would take, and its results can be held against those of plain CPU tensors, bit for bit.

The rule (``refusal``) is that of CUDA builds: operands lie on one device, but for

* copies from one device to another (``copy_``, ``to``, assigning to a slice);
* a CPU tensor without dimensions among the operands of an elementwise operation, or as the value of an assignment;
* CPU indices of a CUDA tensor (not the other way round).

``tests/gpu/test_cuda.py`` holds the rule against a real GPU, ``tests/test_fake_cuda.py`` against FakeTensorMode, which
is laxer: it lets ``cat`` mix devices, and a CPU tensor be indexed by a CUDA one.

Not covered: gradients (autograd's engine asks for a real device), what asks the CUDA runtime itself (streams, memory,
capabilities; ``torch.cuda.is_available()`` stays false), Triton but for its interpreter, and libraries that put tensors
on the GPU by themselves (safetensors' ``safe_open``, bitsandbytes, gptqmodel). Attention runs by torch's plain formula.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
COPIES = {aten.copy_.default, aten.to.other}
INDEXED = {aten.index.Tensor}
ASSIGNED = {aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class MixedDevices(RuntimeError):
    """What CUDA says with "Expected all tensors to be on the same device"."""


class OnCuda(torch.Tensor):
    """A tensor that says it is on the GPU; ``value`` is what it holds, on the CPU."""

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> OnCuda:
        found = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(),
            dtype=value.dtype, device=DEVICE, requires_grad=False,
        )  # fmt: skip
        found.value = value
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of fake_cuda()")

    def tolist(self) -> Any:
        return self.value.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCuda({self.value!r})"


def value_of(thing: Any) -> Any:
    """What a tensor holds, on the CPU; anything else as it is."""
    return thing.value if isinstance(thing, OnCuda) else thing


def _on_cpu(thing: Any) -> Any:
    if isinstance(thing, torch.device) and thing.type == "cuda":
        return torch.device("cpu")
    return value_of(thing)


def refusal(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Why CUDA would not run an operation on these operands, or None."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    tensors = [t for t in tensors if t.device.type != "meta"]
    if len({t.device.type for t in tensors}) < 2 or func in COPIES:
        return None
    allowed: list[torch.Tensor] = []
    if func in INDEXED | ASSIGNED and isinstance(args[0], OnCuda):
        allowed += [t for t in args[1] if t is not None]
        if func in ASSIGNED and args[2].dim() == 0:
            allowed.append(args[2])
    elif torch.Tag.pointwise in func.tags or func in (aten.where.self, aten.fill_.Tensor):
        allowed += [t for t in tensors if not isinstance(t, OnCuda) and t.dim() == 0]
    wrong = [t for t in tensors if not isinstance(t, OnCuda) and not any(t is one for one in allowed)]
    if not wrong:
        return None
    devices = ", ".join(f"{t.device.type} {list(t.shape)}" for t in tensors)
    return f"{func}: expected all tensors to be on the same device, but they are on {devices}"


class _Mode(TorchDispatchMode):
    # In the place of a FakeTensorMode: where there is one, torch starts no CUDA runtime for what names the device.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        said = refusal(func, args, kwargs)
        if said is not None:
            raise MixedDevices(said)
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        out = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
        cuda = _lands_on_cuda(func, args, kwargs, given)
        same = {id(value_of(t)): t for t in given}  # an operation in place gives back the tensor it was given

        def placed(found: Any) -> Any:
            if not isinstance(found, torch.Tensor):
                return found
            known = same.get(id(found))
            if known is not None and isinstance(known, OnCuda) == cuda:
                return known
            found = found if known is None else found.clone()  # it changed its device: memory of its own
            return OnCuda(found) if cuda and found.device.type == "cpu" else found

        return tree_map(placed, out)


def _lands_on_cuda(func: Any, args: Sequence[Any], kwargs: dict[str, Any], given: Sequence[Any]) -> bool:
    """Where the result is: on the device that is named, else on that of what is written to, else of the operands."""
    named = [d for d in tree_flatten((args, kwargs))[0] if isinstance(d, torch.device)]
    if named:
        return bool(named[0].type == "cuda")
    if func in COPIES:
        return isinstance(args[0 if func is aten.copy_.default else -1], OnCuda)
    return any(isinstance(t, OnCuda) for t in given)


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, ``device="cuda"`` makes :class:`OnCuda`, and operations that mix devices raise :class:`MixedDevices`."""
    before = torch._C._only_lift_cpu_tensors(), torch.__future__.get_overwrite_module_params_on_conversion()
    torch._C._set_only_lift_cpu_tensors(True)  # or torch.tensor(..., device="cuda") would go around the mode
    # `module.to("cuda")` gives new parameters: old ones cannot become an OnCuda.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        # The fused kernels of attention are chosen by the device that a tensor says it is on.
        with device_guard(), sdpa_kernel(SDPBackend.MATH), _Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before[0])
        torch.__future__.set_overwrite_module_params_on_conversion(before[1])


def to_cuda(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor there; inside ``fake_cuda``."""
    return tensor.to(DEVICE)


@contextlib.contextmanager
def device_guard() -> Iterator[None]:
    """torch's CPU builds do not know how to make a CUDA device the current one, which indexing asks for first of all.

    ``_ensureCUDADeviceGuardSet``, made for FakeTensorMode, puts something that does nothing in the place of CUDA's
    guard where that counts no devices; in CPU builds there is none to ask. So one is put there for a moment whose every
    method returns 0.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry, by c10::DeviceType
    guards, cuda = (ctypes.c_void_p * 2).in_dll(library, name), 1
    before = guards[cuda]
    nothing = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(lambda this: 0)
    methods = (ctypes.c_void_p * 64)(*[ctypes.cast(nothing, ctypes.c_void_p)] * 64)
    instance = ctypes.c_void_p(ctypes.addressof(methods))
    try:
        if before is None:
            guards[cuda] = ctypes.addressof(instance)
            torch._C._ensureCUDADeviceGuardSet()
            assert guards[cuda] != ctypes.addressof(instance)
        yield
    finally:
        guards[cuda] = before
