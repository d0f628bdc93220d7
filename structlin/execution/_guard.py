"""Checks of torch's tensors before their memory is read or written by address.

The compiled passes take addresses of operands, and the chunked ones take views at offsets into their storages. Neither
detects a tensor whose memory does not match its shape. So every operand is checked here first. A wrong operand raises
ValueError. An operand without memory of its own, such as a functional tensor or a subclass, is left to the products of
torch. So are all operands while a transformation observes or records the single products.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from structlin.structure import AbstractStructure

__all__ = ["Guard", "addressable", "as_kept", "guard_of", "recording", "shield", "to_shield", "transforming", "watched"]

TensorGuards: Any = None
with suppress(ImportError):  # torch.compile's checks in C++; not public, so a version of torch may lack them
    from torch._C._dynamo.guards import TensorGuards

_PARAMETER = torch.nn.Parameter
_tracing = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling
_shielded: set[Any] = set()
_measurements = threading.local()  # .depth: that run in a thread


def _compiling() -> bool:
    return _is_compiling() and not getattr(_measurements, "depth", 0)


def to_shield(owner: Any) -> bool:
    """Return, once, whether a derivative must be kept from ``torch.compile``: True if the compiler is imported.

    Dynamo reads the saved tensors of a function that it compiles once more, which activation checkpoints do not allow.
    The forward pass asks, because ``torch.compiler.disable`` imports the compiler, which takes seconds.
    """
    if "torch._dynamo" not in sys.modules or owner in _shielded:
        return False
    _shielded.add(owner)
    return True


def shield(function: Any) -> None:
    """Keep ``torch.compile`` from compiling the backward pass of an ``autograd.Function`` from now on."""
    if to_shield(function):
        function.backward = staticmethod(torch.compiler.disable(function.backward))


def recording() -> bool:
    """Whether torch records the calls of operators, for a graph that it runs later."""
    return _compiling() or _tracing() is not None


def transforming() -> bool:
    """Whether tensors carry more than their memory holds: batches and tangents of ``torch.func``, dual numbers."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def watched() -> bool:
    """Whether something observes the single products: transformations, tracers, dispatch modes, or autocast."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or transforming()
        or _tracing() is not None
        or torch.is_autocast_enabled("cpu")
    )


@contextmanager
def apart(train: bool, device: str = "cpu") -> Iterator[None]:
    """Run a measurement apart from the call during which it is made.

    Neither inference mode nor autocast applies, and hooks on saved tensors, as those of activation checkpoints, do not
    see the tensors of the measurement. A compiler that asks for a choice does not record it, and its modes do not see
    it. Gradients are recorded if ``train``.
    """
    # While hooks are disabled there are none, and none can be set.
    disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None
    hooks = nullcontext() if disabled else torch.autograd.graph.saved_tensors_hooks(_same, _same)
    _measurements.depth = getattr(_measurements, "depth", 0) + 1
    try:
        with (
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.set_grad_enabled(train),
            torch.autocast(device, enabled=False),
            hooks,
        ):
            yield
    finally:
        _measurements.depth -= 1


def _same(tensor: Tensor) -> Tensor:
    return tensor


def addressable(tensor: Tensor, name: str = "the tensor") -> bool:
    """Whether the memory of a tensor may be read by address: it is plain, on the CPU, and holds all elements.

    Raises ValueError if the storage of a plain tensor is smaller than its shape and strides need; ``name`` is the
    subject of the message.
    """
    kind = tensor.__class__
    if kind is not _PARAMETER and kind is not Tensor:
        return False
    try:
        if tensor.is_contiguous() and not tensor.storage_offset():
            needed = tensor.nbytes
        else:
            needed = _needed(tensor)
        if tensor.untyped_storage().nbytes() < needed:
            raise ValueError(_no_memory(name, tensor))
        # Zero tensors, functional ones and those on the meta device have no address.
        return bool(tensor.data_ptr() or not needed) and tensor.is_cpu and not tensor.is_neg()
    except RuntimeError:  # sparse, opaque, nested and batched tensors have no storage, no address, or no shape
        return False


def as_kept(tensors: Sequence[Tensor], expected: Sequence[tuple[torch.dtype, torch.Size]]) -> bool:
    """Whether hooks on saved tensors have not changed the activations; otherwise they are computed again."""
    return all(
        addressable(tensor, "an activation") and tensor.dtype is dtype and tensor.shape == shape
        and tensor.is_contiguous()
        for tensor, (dtype, shape) in zip(tensors, expected, strict=True)
    )  # fmt: skip


class Guard:
    """The operands of one structure: its factors, and a bias of size d_out after them."""

    def __init__(self, structure: AbstractStructure) -> None:
        self._structure, factors = structure, structure.factors
        self._names = (*(f"factor {factor.name}" for factor in factors), "the bias")
        self._shapes = (*(torch.Size(factor.shape) for factor in factors), torch.Size((structure.d_out,)))
        self._numels = (*(factor.numel for factor in factors), structure.d_out)
        self._real = (*(factor.trainable for factor in factors), True)
        self._all_real = all(self._real)
        self._passed: dict[tuple[object, ...], Any] = {}  # guards that accept operands like those that passed

    def __reduce__(self) -> tuple[object, ...]:
        return guard_of, (self._structure,)

    def check(self, x: Tensor, operands: Sequence[Tensor]) -> None:
        """Raise ValueError if a factor, or the bias, has the wrong shape, or another device or dtype than ``x``.

        ``operands`` are the factors and the bias, or fewer of them. A tensor whose storage was freed raises too. Index
        factors have an integer dtype. Under autocast dtypes may differ.
        """
        if self._all_real and x.is_cpu and not _compiling() and _tracing() is None:
            dtype = x.dtype
            try:
                for tensor, shape in zip(operands, self._shapes, strict=False):
                    if (
                        tensor.dtype is not dtype
                        or tensor.shape != shape
                        or not tensor.is_cpu
                        or not tensor.untyped_storage().nbytes()
                    ):
                        break
                else:
                    if x.untyped_storage().nbytes() or not x.numel():
                        return
            except (AttributeError, RuntimeError):  # no tensor, or one without a storage
                pass
        self._explain(x, operands)

    def _explain(self, x: Tensor, operands: Sequence[Tensor]) -> None:
        """Check tensors of all devices and kinds; this takes longer."""
        traced = not _compiling() and _tracing() is not None  # then sizes are tensors
        recorded = traced or _compiling()
        if not recorded and _is_freed(x):
            raise ValueError(_no_memory("the input", x))
        for name, shape, real, tensor in zip(self._names, self._shapes, self._real, operands, strict=False):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is {tensor!r}, expected a tensor of shape {tuple(shape)}")
            if not traced and tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
            if tensor.device != x.device:
                raise ValueError(f"{name} is on device {tensor.device}, the input is on {x.device}")
            if real and tensor.dtype is not x.dtype and not torch.is_autocast_enabled(x.device.type):
                raise ValueError(
                    f"the input is {x.dtype}, the parameters are {tensor.dtype} ({name}): convert one of them, "
                    "or use torch.autocast"
                )
            if not real and (tensor.is_floating_point() or tensor.is_complex()):
                raise ValueError(f"{name} is {tensor.dtype}, expected an integer dtype")
            if not recorded and _is_freed(tensor):
                raise ValueError(_no_memory(name, tensor))

    def plain(self, x: Tensor, operands: Sequence[Tensor]) -> bool:
        """Whether :meth:`check` and :meth:`addressable` pass and all operands are contiguous, by one short loop.

        If False, call the two: an operand may still be valid.
        """
        if not self._all_real:
            return False
        dtype, item, kind = x.dtype, x.itemsize, x.__class__
        try:  # a tensor without storage or address raises; what follows is written out, since calls would take longer
            if (
                (kind is not Tensor and kind is not _PARAMETER)
                or not x.is_cpu
                or not x.is_contiguous()
                or x.untyped_storage().nbytes() < (x.storage_offset() + x.numel()) * item
                or not x.data_ptr()
                or x.is_neg()
            ):
                return False
            key = dtype, len(operands), torch.is_inference_mode_enabled()
            known = self._passed.get(key)
            alike = known is not None and known.check(*operands)
            if not (alike or self._alike(dtype, operands)):
                return False
            for tensor, numel in zip(operands, self._numels, strict=False):  # memory can be freed at any time
                if tensor.untyped_storage().nbytes() < (tensor.storage_offset() + numel) * item:
                    return False
                if not tensor.data_ptr():
                    return False
        except RuntimeError:
            return False
        if not alike and TensorGuards is not None and operands:
            shapes, strides = [list(t.shape) for t in operands], [list(t.stride()) for t in operands]
            self._passed[key] = TensorGuards(
                *operands, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides
            )  # fmt: skip
        return True

    def _alike(self, dtype: torch.dtype, operands: Sequence[Tensor]) -> bool:
        """Whether all operands are plain, contiguous tensors of the CPU, with this dtype and the right shapes."""
        return all(
            (tensor.__class__ is _PARAMETER or tensor.__class__ is Tensor)
            and tensor.dtype is dtype
            and tensor.shape == shape
            and tensor.is_cpu
            and tensor.is_contiguous()
            and not tensor.is_neg()
            for tensor, shape in zip(operands, self._shapes, strict=False)
        )

    def addressable(self, x: Tensor, operands: Sequence[Tensor]) -> bool:
        """Whether the memory of ``x`` and of operands that :meth:`check` has passed may be read by address.

        Raises ValueError if a storage is too small.
        """
        return addressable(x, "the input") and all(map(addressable, operands, self._names))

    def holds(self, dtype: torch.dtype, factors: Sequence[Tensor]) -> bool:
        """Whether factors that autograd returns are unchanged, and may be read by address."""
        return all(
            addressable(tensor) and tensor.dtype is dtype and tensor.shape == shape
            for tensor, shape in zip(factors, self._shapes, strict=False)
        )


@lru_cache(maxsize=4096)
def guard_of(structure: AbstractStructure) -> Guard:
    """Return the guard of a structure; made once."""
    return Guard(structure)


def _needed(tensor: Tensor) -> int:
    """Return the bytes of the storage up to the last element."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + last + 1) * tensor.itemsize


def _is_freed(tensor: Tensor) -> bool:
    if tensor.__class__ is not _PARAMETER and tensor.__class__ is not Tensor:
        return False
    try:
        return tensor.untyped_storage().nbytes() == 0 and tensor.numel() > 0
    except RuntimeError:
        return False


def _no_memory(name: str, tensor: Tensor) -> str:
    return (
        f"the storage of {name} has {tensor.untyped_storage().nbytes()} bytes, but shape {tuple(tensor.shape)}, "
        f"strides {tensor.stride()} and offset {tensor.storage_offset()} need {_needed(tensor)}"
    )
