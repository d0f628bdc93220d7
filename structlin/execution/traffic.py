"""The traffic of a way on a GPU: kernels, products, bytes of L2 and of memory, and the predicted time.

A way runs once on the meta device, and each operation that torch dispatches is recorded with its MACs and the bytes of
the arrays that it reads and writes. This applies to the forward and the backward pass of any way, also of a registered
one. Additional kernels of torch on CUDA are added: a matrix that cuBLAS cannot read by its strides is copied first, and
an array to which a product is added is written before.

The L2 is modelled as a cache of whole arrays that evicts the least recently used one. Half of its size is available
(:data:`.devices.L2_SHARE`), and larger arrays bypass it. Bytes of memory are those of arrays that are not in the cache
when they are read, and of written arrays that are evicted. Results are written at the end. Arrays between the steps are
written only if they are evicted.

The time of a kernel is the largest of three: its MACs at the peak rate, its bytes at the bandwidths of L2 and memory,
and the time from one launch to the next (:class:`.devices.Device`). The time of a call is the sum over its kernels.
This is the roofline model (Williams, Waterman and Patterson 2009, Roofline) with a second level of memory. It does not
model tiles: a kernel reads each operand once. So it is a lower bound, which is close for large products and for kernels
limited by memory.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from structlin.execution import choice
from structlin.execution.choice import Problem, Way
from structlin.execution.devices import DEVICES, L2_SHARE, Device, named

__all__ = [
    "Kernel",
    "Recorder",
    "Traffic",
    "assuming",
    "ceiling",
    "device_here",
    "explained",
    "fastest",
    "predict",
    "seconds",
]


@dataclass(frozen=True)
class Access:
    """``size`` bytes of one array, ``place``: which one."""

    place: tuple[int, int]
    size: int


@dataclass(frozen=True)
class Kernel:
    """A kernel: its MACs, and what it reads and writes. ``again``: bytes that it reads from L2 repeatedly."""

    name: str
    macs: int
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    again: int = 0

    @property
    def read(self) -> int:
        """Bytes."""
        return self.again + sum(a.size for a in self.reads)

    @property
    def written(self) -> int:
        """Bytes."""
        return sum(a.size for a in self.writes)


@dataclass(frozen=True)
class Traffic:
    """The cost of a call on a device.

    ``kernels`` are in order of execution. ``memory`` has the bytes of memory of each of them, and ``written_back`` the
    bytes of results that are written at the end. ``rates`` are MACs, bytes of memory and bytes of L2 per second.
    """

    device: Device
    dtype: str
    kernels: tuple[Kernel, ...]
    memory: tuple[int, ...]
    written_back: int

    @property
    def macs(self) -> int:
        """MACs of all kernels."""
        return sum(kernel.macs for kernel in self.kernels)

    @property
    def l2_bytes(self) -> int:
        """Bytes that kernels read and write, whether they are in L2 or not."""
        return sum(kernel.read + kernel.written for kernel in self.kernels)

    @property
    def memory_bytes(self) -> int:
        """Bytes that are read from and written to the main memory."""
        return sum(self.memory) + self.written_back

    @property
    def seconds(self) -> float:
        """Seconds of the call, the sum over its kernels."""
        rate, bandwidth, near = _rates(self.device, self.dtype)
        total = self.written_back / bandwidth
        for kernel, moved in zip(self.kernels, self.memory, strict=True):
            l2 = (kernel.read + kernel.written) / near
            total += max(kernel.macs / rate, moved / bandwidth, l2, self.device.launch)
        return total

    def efficiency(self, macs: int) -> float:
        """Return the time of ``macs`` MACs at the rate of large products, divided by the time of the call."""
        return macs / _rates(self.device, self.dtype)[0] / self.seconds


def ceiling(problem: Problem, device: Device | str) -> Traffic:
    """Return the forward pass as one kernel that keeps all activations on the chip: the least possible traffic."""
    on, structure = named(device), problem.structure
    item = getattr(torch, problem.dtype).itemsize
    sizes = [problem.tokens * structure.d_in, *(f.numel for f in structure.factors)]
    reads = tuple(Access((k, 0), size * item) for k, size in enumerate(sizes))
    writes = (Access((len(sizes), 0), problem.tokens * structure.d_out * item),)
    kernel = Kernel("fused", structure.macs * problem.tokens, reads, writes)
    return Traffic(on, problem.dtype, (kernel,), (kernel.read + kernel.written,), 0)


def _rates(device: Device, dtype: str) -> tuple[float, float, float]:
    """Return MACs, bytes of memory and bytes of L2 per second."""
    if dtype not in device.peak:  # complex and such: no way on CUDA has a rate of its own for them
        dtype = min(device.peak, key=lambda one: device.peak[one])
    bandwidth = device.bandwidth * device.reached[1]
    return device.peak[dtype] * device.reached[0] / 2, bandwidth, device.l2_bandwidth or bandwidth


_VIEWS = {"_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "is_same_size"}
_WRITE_ONLY = {"copy_", "zero_", "fill_"}  # of the array that they change
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}


class Recorder(TorchDispatchMode):
    """Records the kernels on CUDA of the operations within its ``with`` statement, on any device.

    Examples
    --------
    >>> with Recorder() as found:
    ...     y = torch.ones(5, 3, device="meta") @ torch.ones(3, 7, device="meta")
    >>> [(kernel.name, kernel.macs, kernel.read, kernel.written) for kernel in found.kernels[-1:]]
    [('mm', 105, 144, 140)]
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self._held: list[Any] = []  # storages, so that no place is used for two of them

    def __enter__(self) -> Any:
        _active.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _active.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in _VIEWS or name.startswith(("empty", "new_empty")):
            return found
        written = list(_tensors(found if kwargs.get("out") is None else kwargs["out"]))
        changed = args[0] if name in _WRITE_ONLY else None
        operands = [t for t in _tensors((args, {k: v for k, v in kwargs.items() if k != "out"})) if t is not changed]
        macs = 0
        if name in _PRODUCTS:
            macs = flop_registry[func.overloadpacket](*args, **kwargs, out_val=found) // 2
            operands = self._prepared(name, operands, written[0])
        self._add(name, macs, operands, written)
        if name in _PRODUCTS and not _readable(written[0]):
            self._copy(written[0])
        return found

    def _prepared(self, name: str, operands: list[Tensor], target: Tensor) -> list[Tensor]:
        """Return the operands of a product, after the copies that torch makes for cuBLAS."""
        *added, left, right = operands
        for operand in (left, right):
            if not _readable(operand):
                self._copy(operand)
        if added and not _same(added[0], target):
            if name == "addmm" and added[0].ndim == 1:  # added by cuBLASLt in the end of the product
                return operands
            self._add("copy_", 0, added, [target])
            added = [target]
        return [*added, left, right]

    def _copy(self, tensor: Tensor) -> None:
        """Record a copy of an array to another order, which replaces it."""
        access = self._access(tensor)
        self.kernels.append(Kernel("clone", 0, (access,), (access,)))

    def _add(
        self, name: str, macs: int, operands: Sequence[Tensor], written: Sequence[Tensor], again: int = 0
    ) -> None:  # fmt: skip
        reads, writes = (tuple(self._access(t) for t in tensors) for tensors in (operands, written))
        self.kernels.append(Kernel(name, macs, reads, writes, again))

    def _access(self, tensor: Tensor) -> Access:
        storage = tensor.untyped_storage()
        self._held.append(storage)
        numbers = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        return Access((storage._cdata, int(tensor.storage_offset())), numbers * tensor.element_size())


_active: list[Recorder] = []


def note(name: str, macs: int, operands: Sequence[Tensor], written: Sequence[Tensor], again: int) -> None:
    """Record a kernel that torch does not dispatch, where something records."""
    for recorder in _active[-1:]:
        recorder._add(name, macs, operands, written, again)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for one in tree:
            yield from _tensors(one)


def _same(a: Tensor, b: Tensor) -> bool:
    return (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() == b.storage_offset()
        and a.stride() == b.stride()
    )


def _readable(matrix: Tensor) -> bool:
    """Whether cuBLAS reads a matrix, or a batch of them, by its strides: one is 1, and the other leaves no overlap."""
    (m, n), (down, along) = matrix.shape[-2:], matrix.stride()[-2:]
    return (along == 1 and down >= max(1, n)) or (down == 1 and along >= max(1, m))


class _L2:
    """A cache of whole arrays. ``take`` returns the bytes of memory that a kernel reads and evicts."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        self.held: OrderedDict[tuple[int, int], tuple[int, bool]] = OrderedDict()  # bytes, and whether they are newer

    def take(self, access: Access, write: bool) -> int:
        size, dirty = self.held.pop(access.place, (0, False))
        self.used -= size
        moved = 0 if write else max(0, access.size - size)
        size = max(size, access.size)
        if size > self.size:
            return moved + (access.size if write else 0)
        self.held[access.place] = size, dirty or write
        self.used += size
        while self.used > self.size:
            _, (left, newer) = self.held.popitem(last=False)
            self.used -= left
            moved += left if newer else 0
        return moved

    def finish(self, places: set[int]) -> int:
        """Return the bytes of results that are not written yet; ``places``: their storages."""
        return sum(size for (place, _), (size, newer) in self.held.items() if newer and place in places)


def traffic(kernels: Sequence[Kernel], results: Sequence[Tensor], device: Device, dtype: str) -> Traffic:
    """Return the cost of recorded kernels on a device, including writing ``results`` to memory."""
    cache, memory = _L2(int(L2_SHARE * device.l2)), []
    for kernel in kernels:
        read = sum(cache.take(access, False) for access in kernel.reads)
        memory.append(read + sum(cache.take(access, True) for access in kernel.writes))
    places = {t.untyped_storage()._cdata for t in results}
    return Traffic(device, dtype, tuple(kernels), tuple(memory), cache.finish(places))


def predict(way: Way, problem: Problem, device: Device | str | None = None, *, bias: bool = True) -> Traffic:
    """Return the traffic of a way for a problem on a device, by default the one that is here (:func:`device_here`).

    Parameters
    ----------
    way
        Any way of torch.
    problem
        Of torch; with the backward pass if ``problem.train``, of all gradients.
    device
        Or its name (:data:`structlin.execution.devices.DEVICES`).
    bias
        With a bias, where the problem is of rows.

    Raises
    ------
    ValueError
        An unknown device.
    """
    on = named(device or device_here())
    with assuming(on):
        kernels, results = _recorded(way, problem, bias)
    dtype = "tfloat32" if problem.dtype == "float32" and torch.backends.cuda.matmul.allow_tf32 else problem.dtype
    return traffic(kernels, results, on, dtype)


def seconds(way: Way, problem: Problem) -> float:
    """Return the predicted time of a call of a way on the device that is here."""
    device = device_here()
    return _seconds(way, problem, device.name, torch.backends.cuda.matmul.allow_tf32)


@lru_cache(maxsize=4096)
def _seconds(way: Way, problem: Problem, name: str, tf32: bool) -> float:
    return predict(way, problem).seconds


def _recorded(way: Way, problem: Problem, bias: bool) -> tuple[list[Kernel], list[Tensor]]:
    structure, kind = problem.structure, getattr(torch, problem.dtype)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta", requires_grad=problem.train)

    with (
        torch.inference_mode(False), torch.set_grad_enabled(problem.train), torch.autocast("cuda", enabled=False),
        torch.autocast("cpu", enabled=False),
    ):  # fmt: skip
        factors = [empty(*f.shape) for f in structure.factors]
        x = empty(*((problem.tokens, structure.d_in) if problem.rows else (structure.d_in, problem.tokens)))
        ends = empty(structure.d_out) if bias and problem.rows else None
        shape = (problem.tokens, structure.d_out) if problem.rows else (structure.d_out, problem.tokens)
        gradient = torch.empty(shape, dtype=kind, device="meta")
        with Recorder() as found:
            y = way.run(structure, factors, x, ends, problem.rows)
            results = [y]
            if problem.train:
                given = [x, *factors] if ends is None else [x, *factors, ends]
                results += torch.autograd.grad(y, given, gradient)
    return found.kernels, results


# -- the device that is here -------------------------------------------------------------------------------------------

_assumed: ContextVar[Device | None] = ContextVar("assumed", default=None)


@contextmanager
def assuming(device: Device) -> Iterator[None]:
    """Predict within a ``with`` statement as if this device were here."""
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)


def device_here() -> Device:
    """Return the current CUDA device: from the table by name, otherwise from the driver; an H100 if there is none."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    return _of_index(torch.cuda.current_device()) if torch.cuda.is_available() else DEVICES["h100"]


@lru_cache(maxsize=64)
def _of_index(index: int) -> Device:
    return known(torch.cuda.get_device_properties(index))


def known(properties: Any) -> Device:
    """Return the device of the table that has these properties; one that is unknown is an H100 scaled to them."""
    words = properties.name.upper().replace("-", " ").split()
    for key, device in DEVICES.items():
        if key.upper() in words or (key == "rtx4090" and "4090" in words):
            return device
    base = DEVICES["h100"]
    part = properties.multi_processor_count / 132  # of an H100 SXM
    peak = {dtype: rate * part for dtype, rate in base.peak.items()}
    l2 = int(getattr(properties, "L2_cache_size", 0)) or base.l2
    capability = properties.major, properties.minor
    return Device(properties.name, peak, base.bandwidth * part, properties.total_memory, "scaled from an H100", l2,
                  base.l2_bandwidth * part, capability, cores=properties.multi_processor_count)  # fmt: skip


# -- tables ------------------------------------------------------------------------------------------------------------


def fastest(problem: Problem, device: Device | str) -> tuple[Way, Traffic]:
    """Return the way of the least predicted time on a device, as the policy allows, and its traffic, without a bias."""
    found = _predicted(problem, device)
    return min(found, key=lambda one: one[1].seconds)


def _predicted(problem: Problem, device: Device | str) -> list[tuple[Way, Traffic]]:
    """Return the ways that can run a problem of CUDA, by their predicted times."""
    on = named(device)
    with assuming(on):
        ways = [c.way for c in choice.candidates(problem, choice.policy_of(choice.policy_text()))]
        found = [(way, predict(way, problem, on, bias=False)) for way in ways]
    return sorted(found, key=lambda one: one[1].seconds)


def explained(problem: Problem, device: Device | str) -> str:
    """Return a table of the ways for a problem: kernels, bytes, MACs and times on a device, each predicted.

    The efficiency is that of the MACs of the chain, of which a training step has three times as many.
    """
    on = named(device)
    macs = problem.structure.macs * problem.tokens * (3 if problem.train else 1)
    rows = [("way", "kernels", "memory", "L2", "GMACs", "efficiency", "predicted")]
    rows += [
        (
            way.name, f"{len(found.kernels):,}", f"{found.memory_bytes / 1e6:,.1f} MB",
            f"{found.l2_bytes / 1e6:,.1f} MB", f"{found.macs / 1e9:,.4g}", f"{found.efficiency(macs):.2f}",
            f"{found.seconds * 1e6:,.1f} us",
        )
        for way, found in _predicted(problem, on)
    ]  # fmt: skip
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if k else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([problem.key, f"predicted for {on.name}, not measured", *lines])
