"""Chains of two steps as one kernel, written in Triton, for GPUs: what is between the steps stays on the chip.

They run where :class:`Form` fits a chain: Block Tensor-Trains, and Monarch matrices whose second step reads what the
first one writes. There are two kernels (:mod:`._kernels`): for up to :data:`FEW` tokens, where the time is that of
reading the factors, and for many. The traffic of both is derived here from sizes and tiles, so that the model says
where they pay.

Triton is an optional dependency. It comes with torch for CUDA. No time of these kernels has been measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from structlin.execution._kept import kept
from structlin.structure import Structure

__all__ = [
    "DTYPES",
    "FEW",
    "LEAST_SHARED",
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
# Numbers of a program of 256 threads, whose threads have 255 registers each: sums of y, those with a tile of h, and the
# operands of both products. With more, Triton spills registers (docs/gpu_kernels.py).
_SUMS, _LIVE, _OPERANDS = 1 << 15, 44 << 10, 48 << 10
WARPS, STAGES = 8, 2
# Of shared memory for each number of the operands of a tile: one for the loads ahead, and a half at most for what
# Triton brings into another layout. tests/structlin/execution/test_fused.py compares with what it takes.
_BUFFERS = 1.5
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

    ``x_reads``, ``left_reads``, ``right_reads``: how many times x and each factor are read. ``macs``: with the products
    that are computed again, of all tokens.
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


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def tiles(form: Form, tokens: int, item: int, programs: int, shared: int = LEAST_SHARED) -> Tiles | None:
    """Return the launch for ``tokens`` tokens of ``item``-byte numbers on ``programs`` cores; None if no tile fits."""
    a, b, c, d, e = form.sizes
    if tokens <= FEW:
        block_d = min(_power(d), 32)
        parts = -(-d // block_d)
        block_a, block_k = min(_power(a), 64), min(_power(e * b), 32)
        constants = {"T": _power(tokens), "BLOCK_A": block_a, "BLOCK_K": block_k, "BLOCK_D": block_d}
        again = tokens * (c * b * e * a * parts + c * d * e * b)
        return Tiles(True, (c, parts), constants, 4, 1, c * parts, parts, 1, again)
    # Each of the three sizes of a product on tensor cores is 16 or more.
    block_a, block_d, block_e = max(16, _power(a)), max(16, _power(d)), _power(e)
    least = max(1, 16 // block_e)
    best: tuple[tuple[float, int], dict[str, int]] | None = None
    for block_t, block_b, block_c in product((64, 32), _powers(least, min(_power(b), 8)), _powers(least, _power(c))):
        sums, h = block_c * block_t * block_d, block_b * block_t * block_c * block_e
        operands = block_b * block_t * block_a, block_b * block_c * block_e * block_a, h // block_t * block_d
        if sums > _SUMS or sums + h > _LIVE or sum(operands) > _OPERANDS:
            continue
        if _BUFFERS * sum(operands) * item > shared:
            continue
        numbers = a * b * -(-c // block_c) + (a * b * c * e + b * c * d * e) / block_t  # that are read for a token
        rank = numbers, -block_b
        if best is None or rank < best[0]:
            sizes = block_t, block_a, block_b, block_c, block_d, block_e, STAGES
            names = (*(f"BLOCK_{letter}" for letter in "TABCDE"), "STAGES")
            best = rank, dict(zip(names, sizes, strict=True))
    if best is None:
        return None
    made = best[1]
    groups, parts = -(-c // made["BLOCK_C"]), -(-tokens // made["BLOCK_T"])
    each = -(-b // made["BLOCK_B"]) * made["BLOCK_B"] * made["BLOCK_C"] * block_e * (block_a + block_d)
    macs = parts * made["BLOCK_T"] * groups * each
    return Tiles(False, (min(programs, groups * parts),), made, WARPS, STAGES, groups, parts, parts, macs)


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


def run(form: Form, launch: Tiles, x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """(tokens, d_in) -> (tokens, d_out), without gradients. All operands are plain, factors are contiguous."""
    from structlin.execution.fused import _kernels

    tokens = x.shape[0]
    y = x.new_empty((tokens, form.d_out))
    x = x if x.stride(1) == 1 else x.contiguous()
    if tokens:
        kernel: Any = _kernels.few_tokens if launch.few else _kernels.many_tokens
        kernel[launch.grid](
            x, left, right, bias if bias is not None else y, y, tokens, form.d_in, form.d_out, x.stride(0),
            **arguments(form, bias is not None), **launch.constants,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    return y
