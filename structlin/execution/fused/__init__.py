"""Chains of two steps as one kernel, written in Triton, for GPUs.

They run where :class:`Form` fits a chain: Block Tensor-Trains, and Monarch matrices whose second step reads what the
first one writes. There are two kernels (:mod:`._kernels`). For up to :data:`FEW` tokens the time is that of reading the
factors, and what is between the steps stays in registers. For many tokens it goes through L2, a chunk of tokens at a
time. The traffic of both is derived here from sizes and tiles, so that the model says where they pay.

Triton is an optional dependency. It comes with torch for CUDA. No time of these kernels has been measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from structlin.execution._kept import kept
from structlin.execution.devices import ALIGNED, L2_SHARE, Device
from structlin.structure import Structure

__all__ = [
    "DTYPES",
    "FEW",
    "LEAST_SHARED",
    "MANY_DTYPES",
    "SHARED",
    "Form",
    "Tiles",
    "can_launch",
    "form_of",
    "has_triton",
    "run",
    "tiles",
]

FEW = 8  # tokens, up to which products on tensor cores would be of padding for the most part
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# For many tokens. In float32 the MACs take the time, which no kernel reduces, and Triton spills registers.
MANY_DTYPES = (torch.float16, torch.bfloat16)
_SUMS = 1 << 15  # of a program of 256 threads: with more, Triton spills registers (docs/gpu_kernels.py)
_TOKENS, _STAGES = (128, 64, 32), (3, 2)  # of one product, and loads ahead of it, the best ones first
SLOTS = 3  # chunks that have room between the steps: with two of them, a step waits for the one drawn just before
# Bytes of shared memory that one program can have, by the capability of the device (CUDA programming guide); 99 KB is
# what all devices from Ampere on have.
SHARED = {(8, 0): 163 << 10, (8, 7): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10}
LEAST_SHARED = 99 << 10


def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Form:
    """Sizes and strides of ``h[c,e,b] = sum_a L[b,c,e,a] x[b,a]``, ``y[c,d] = sum_eb R[c,d,e,b] h[c,e,b]``."""

    sizes: tuple[int, int, int, int, int]  # a, b, c, d, e
    left: tuple[int, int, int, int]  # strides of b, c, e, a
    right: tuple[int, int, int, int]  # strides of c, d, e, b
    d_in: int
    d_out: int

    @property
    def between(self) -> int:
        """Numbers of ``h`` for a token."""
        return self.sizes[1] * self.sizes[2] * self.sizes[4]

    def transposed(self) -> Form:
        """Return the chain that takes the gradient of y to that of x: the same with exchanged factors."""
        (a, b, c, d, e), (l_b, l_c, l_e, l_a), (r_c, r_d, r_e, r_b) = self.sizes, self.left, self.right
        return Form((d, c, b, a, e), (r_c, r_b, r_e, r_d), (l_b, l_a, l_e, l_c), self.d_out, self.d_in)


def _form(structure: Structure) -> Form | None:
    if len(structure.steps) != 2:
        return None
    (first, second), sizes = structure.steps, dict(structure.sizes)
    c, d, b, a = second.batch, second.free, first.batch, first.contracted
    e = "".join(x for x in first.free if x not in c)
    if first.carried or second.carried or first.output != second.input or any(len(x) != 1 for x in (a, b, c, d)):
        return None
    if len(e) > 1 or set(second.contracted) != {*e, b} or (first.input, second.output) != (b + a, c + d):
        return None

    def strides(factor: str, axes: Sequence[str]) -> Any:
        found, stride = {"": 0}, 1
        for axis in reversed(factor):
            found[axis] = stride
            stride *= sizes[axis]
        return tuple(found[axis] for axis in axes)

    left, right = strides(first.factor, (b, c, e, a)), strides(second.factor, (c, d, e, b))
    if left[3] != 1 or max(f.numel for f in structure.factors) >= 1 << 31:
        return None  # no wide loads of L, or offsets that 32 bits do not hold
    numbers = sizes[a], sizes[b], sizes[c], sizes[d], sizes[e] if e else 1
    return Form(numbers, left, right, structure.d_in, structure.d_out)


def form_of(structure: Structure) -> Form | None:
    """None where a chain has another form."""
    return kept(structure, ("fused",), lambda: (_form(structure),))[0]


@dataclass(frozen=True)
class Tiles:
    """How a kernel is launched: its ``grid``, constants, warps and stages, and the bytes that it reads again from L2.

    ``x_reads``, ``left_reads``, ``right_reads``: how many times x and each factor are read. ``macs``: with padding and
    the products that are computed again, of all tokens. ``between``: how many times what is between the steps is
    written and read.
    """

    few: bool
    grid: tuple[int, ...]
    constants: dict[str, int] = field(hash=False)
    warps: int
    stages: int
    x_reads: int
    left_reads: int
    right_reads: int
    macs: int
    between: int = 0


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def tiles(form: Form, tokens: int, item: int, device: Device) -> Tiles | None:
    """Return the launch for ``tokens`` tokens of ``item``-byte numbers on a device; None if no tile fits."""
    a, b, c, d, e = form.sizes
    if tokens <= FEW:
        block_d = min(_power(d), 32)
        parts = -(-d // block_d)
        block_a, block_k = min(_power(a), 64), min(_power(e * b), 32)
        constants = {"T": _power(tokens), "BLOCK_A": block_a, "BLOCK_K": block_k, "BLOCK_D": block_d}
        again = tokens * (c * b * e * a * parts + c * d * e * b)
        return Tiles(True, (c, parts), constants, 4, 1, c * parts, parts, 1, again)
    return _many(form, tokens, item, device.capability or (0, 0), device.l2, device.cores)


@lru_cache(maxsize=256)
def _many(
    form: Form, tokens: int, item: int, capability: tuple[int, int], l2: int, cores: int
) -> Tiles | None:  # fmt: skip
    """Return the launch that reads the fewest numbers from L2.

    A chunk is as large as :data:`SLOTS` of them fit into L2 beside the factors. It has so many parts that there is a
    ticket for each program.
    """
    a, b, c, d, e = form.sizes
    shared = SHARED.get(capability, LEAST_SHARED)
    steps = (a, c * e, b), (e * b, d, c)  # contracted, free, batch
    room = int(L2_SHARE * l2) // item - b * c * e * (a + d)
    best: tuple[float, Tiles] | None = None
    for most in _TOKENS[:2]:
        found = [_tile(k, n, item, shared, most) for k, n, _ in steps]
        made = [tile for tile in found if tile is not None]
        if len(made) < 2:
            continue
        times = [-(-n // tile[1]) for (_, n, _), tile in zip(steps, made, strict=True)]  # that a step reads its input
        tickets = sum(batch * count for (_, _, batch), count in zip(steps, times, strict=True))
        unit = max(tile[0] for tile in made)
        # A power of two for few tokens: each size of a chunk is compiled.
        units = min(room // (SLOTS * b * c * e * unit), _power(-(-tokens // unit)))
        if units < 1:
            continue
        warps = 8 if max(tile[0] * tile[1] for tile in made) > _SUMS // 4 else 4
        programs = cores * (min(2, shared // max(tile[4] for tile in made)) if warps == 4 else 1)
        parts = min(units, -(-2 * programs // (3 * tickets)))  # tickets of more than one chunk run at once
        span = units // parts * unit
        spans = -(-tokens // span)
        names = [f"{which}_{letter}" for which in ("FIRST", "SECOND") for letter in ("T", "N", "K", "STAGES")]
        constants = dict(zip(names, (*made[0][:4], *made[1][:4]), strict=True))
        constants |= {"UNIT": max(1, ALIGNED // item), "CHUNK": parts * span, "SPAN": span}
        macs = sum(
            -(-tokens // tile[0]) * tile[0] * batch * count * tile[1] * tile[2]
            for (_, _, batch), count, tile in zip(steps, times, made, strict=True)
        )
        launch = Tiles(False, (programs,), constants, warps, 1, times[0], spans, spans, macs, times[1] + 1)
        numbers = a * b * times[0] + b * c * e * times[1] + b * c * e * (a + d) / span  # that are read for a token
        if best is None or numbers < best[0]:
            best = numbers, launch
    return None if best is None else best[1]


def _tile(contracted: int, free: int, item: int, shared: int, most: int) -> tuple[int, ...] | None:
    """Return tokens, free and contracted axis, stages and bytes of one product: the fewest reads of its input first."""
    k = max(16, _power(contracted))
    found = []
    for t, n, stages in product(_TOKENS, _powers(16, min(_power(free), 256)), _STAGES):
        size = item * (stages * t * k + k * n + t * n)  # loads ahead, the factor, and the result in another layout
        if t <= most and t * n <= _SUMS and size <= shared:
            found.append((-(-free // n), -t, -stages, t, n, k, stages, size))
    return min(found)[3:] if found else None


def _powers(least: int, most: int) -> list[int]:
    """Powers of two from the one to the other; at least the first."""
    return [1 << k for k in range(least.bit_length() - 1, max(least, most).bit_length())]


def arguments(form: Form, bias: bool) -> dict[str, int]:
    """Return the constants of both kernels."""
    names = ("A", "B", "C", "D", "E", "L_B", "L_C", "L_E", "L_A", "R_C", "R_D", "R_E", "R_B", "HAS_BIAS")
    return dict(zip(names, (*form.sizes, *form.left, *form.right, int(bias)), strict=True))


def can_launch(x: Tensor) -> bool:
    """Whether kernels run on the device of ``x``: on CUDA, and on a CPU in Triton's interpreter."""
    if x.is_cuda:
        return True
    if not x.is_cpu or not has_triton():
        return False
    from structlin.execution.fused import _kernels

    return _kernels.INTERPRETED


def run(
    form: Form, launch: Tiles, x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, h: Tensor | None = None
) -> Tensor:  # fmt: skip
    """(tokens, d_in) -> (tokens, d_out), without gradients. All operands are plain, factors are contiguous.

    ``h``: where the kernel for many tokens is to leave what is between the steps, in the order (c, e, b, tokens).
    """
    from structlin.execution.fused import _kernels

    tokens = x.shape[0]
    y = x.new_empty((tokens, form.d_out))
    x = x if x.stride(1) == 1 else x.contiguous()
    if not tokens:
        return y
    given: tuple[Any, ...] = x, left, right, y if bias is None else bias, y, tokens, form.d_in, form.d_out, x.stride(0)
    kernel: Any = _kernels.few_tokens
    if not launch.few:
        kernel, chunk = _kernels.many_tokens, launch.constants["CHUNK"]
        chunks = -(-tokens // chunk)
        slots = min(SLOTS, chunks) if h is None else chunks
        h = x.new_empty(form.between * slots * chunk) if h is None else h
        counters = torch.zeros(1 + 2 * chunks, dtype=torch.int32, device=x.device)
        given = *given, h, h.numel() // form.between // launch.constants["UNIT"], slots, counters
    kernel[launch.grid](
        *given, **arguments(form, bias is not None), **launch.constants,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return y
