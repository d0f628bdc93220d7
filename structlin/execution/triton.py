"""Fused products of two-step chains on CUDA, in Triton. Never required: see :func:`suits`.

For Block Tensor-Train of two cores and Monarch, ``y[t, f, e] = sum_(r, p) h[t, f, r, p] W1[f, e, r, p] + b[f, e]``
with ``h[t, f, r, p] = sum_a x[t, p, a] W0[p, f, r, a]``. Unfused, h (p f r numbers for each token; for a square matrix
of rank 1 as many as the input has) is written to memory, permuted and read again. Here a program takes a tile of tokens
and of f, makes one tile of h after the other, and sums their products with W1 in registers: h never leaves the chip,
forward or backward. The price is that x is read once for each tile of f; programs of the same tokens run side by side,
so that all but the first reading come from the L2 cache.

The backward pass makes h again. The gradient of x is the same product with the factors in exchanged roles, and so are
the gradients of the two factors to one another: two kernels do all. Gradients of factors are summed over shares of the
tokens, each in a fixed order: equal inputs give equal bits.

What the rule refuses runs as it does without Triton. Its constants are estimates from bytes and registers. They have
not been measured on a device, so the way ``triton`` runs only where a policy names it (:mod:`.choice`).
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from structlin._arrays import ops
from structlin.execution.choice import Problem, Way, register
from structlin.execution.products import products
from structlin.structure import AbstractStructure, Structure

__all__ = ["chain", "suits"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_RANK, MAX_BLOCK = 16, 128
L2_OVER_DRAM = 3  # how much faster a byte comes from the L2 cache than from memory, at least
_PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the axes. The input has ``d_in <= p a`` columns, the output ``d_out <= f e``."""

    d_in: int
    d_out: int
    p: int
    a: int
    f: int
    r: int
    e: int

    def swapped(self) -> Sizes:
        """Of the transposed chain."""
        return Sizes(self.d_out, self.d_in, self.f, self.e, self.p, self.r, self.a)


@dataclass(frozen=True)
class _Layout:
    """How the factors of a structure give W0 of shape (p, f, r, a) and W1 of shape (f, e, r, p).

    By ``orders``, permutations of their axes; or, for a Monarch matrix whose blocks do not divide its inner size, by
    ``picks``: element (p, f, r) of the intermediate vector is number ``picks[p, f, r]`` of it in row-major order, or
    nothing at all (-1).
    """

    sizes: Sizes
    orders: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    picks: np.ndarray | None = None

    def factors(self, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Views where the axes merge; differentiable."""
        n, (w0, w1) = self.sizes, factors
        if self.orders is not None:
            w0, w1 = (w.permute(order) for w, order in zip(factors, self.orders, strict=True))
            return w0.reshape(n.p, n.f, n.r, n.a), w1.reshape(n.f, n.e, n.r, n.p)
        assert self.picks is not None
        picks = torch.from_numpy(self.picks).to(w0.device)
        there = (picks >= 0).to(w0.dtype)
        number = picks.clamp(min=0)
        first = w0.reshape(-1, n.a)[number] * there[..., None]  # (p, f, r, a)
        # W1 is (l, o, g), and element u of the vector has g = u // l.
        second = w1.gather(2, (number // n.f).permute(1, 2, 0).reshape(n.f, 1, -1).expand(-1, n.e, -1))
        return first, second.reshape(n.f, n.e, n.r, n.p) * there.permute(1, 2, 0)[:, None]


@lru_cache(maxsize=1024)
def _layout(structure: AbstractStructure) -> _Layout | None:
    """None for a structure that is no such chain."""
    if not isinstance(structure, Structure) or len(structure.steps) != 2:
        return None
    first, second = structure.steps
    size = dict(structure.sizes)
    if first.carried or second.carried:
        return None

    def product(axes: str) -> int:
        return math.prod(size[a] for a in axes)

    def among(axes: str, role: str) -> str:
        return "".join(a for a in axes if a in role)

    p, a, e = among(first.input, first.batch), among(first.input, first.contracted), among(second.output, second.free)
    if first.output != second.input:
        q, f, g = first.free, second.batch, second.contracted
        single = all(len(axes) == 1 for axes in (p, a, q, f, g, e))
        ordered = (first.input, first.factor, first.output) == (p + a, p + q + a, p + q)
        ordered &= (second.input, second.factor, second.output) == (g + f, f + e + g, f + e)
        if not (single and ordered):
            return None
        held: dict[tuple[int, int], list[int]] = {}
        for number in range(size[p] * size[q]):
            held.setdefault((number // size[q], number % size[f]), []).append(number)
        most = max(map(len, held.values()))
        picks = np.full((size[p], size[f], most), -1)
        for place, numbers in held.items():
            picks[place][: len(numbers)] = numbers
        sizes = Sizes(structure.d_in, structure.d_out, size[p], size[a], size[f], most, size[e])
        return _Layout(sizes, picks=picks)
    f, r = among(second.output, second.batch), among(first.output, among(first.free, second.contracted))
    if set(second.contracted) != {*p, *r} or set(first.free) != {*f, *r}:
        return None
    if first.input != p + a or second.output != f + e or not p or not f:
        return None
    orders = (
        tuple(first.factor.index(axis) for axis in p + f + r + a),
        tuple(second.factor.index(axis) for axis in f + e + r + p),
    )
    across = (product(axes) for axes in (p, a, f, r, e))
    return _Layout(Sizes(structure.d_in, structure.d_out, *across), orders)


# -- the rule ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles, powers of 2, and the number of warps."""

    t: int
    p: int
    a: int
    f: int
    r: int
    e: int
    warps: int

    def keywords(self) -> dict[str, int]:
        """As the kernels take them."""
        named = {f"B{axis.upper()}": getattr(self, axis) for axis in "tpafre"}
        return {**named, "num_warps": self.warps, "num_stages": 1}

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory: for the operands of one product, or a change of layout of the sum, and one of h.

        At least what the compiler takes (a test compiles the kernels and compares).
        """
        first = self.p * self.a * (self.t + self.f * self.r)
        second = self.f * self.p * self.r * (self.t + self.e)
        total = self.f * max(self.t, self.p * self.r) * self.e
        change = self.p * self.t * self.f * self.r
        return max(itemsize * first, itemsize * second, 4 * total) + itemsize * change


def _power(n: int, low: int, high: int) -> int:
    return min(high, max(low, 1 << (n - 1).bit_length()))


def tiles(sizes: Sizes) -> Tiles:
    """Tiles of a product. Each is at least 16 in all directions that a product of tiles has, as tensor cores need it.

    More of f means fewer readings of x, more of anything more registers: compiled for compute capability 9.0, these
    leave nothing of the sums (f, t, e) to memory.
    """
    r = _power(sizes.r, 1, MAX_RANK)
    f = 16 if r == 1 else 8
    e = _power(sizes.e, 16, 1024 // f)
    return Tiles(t=16, p=16 // r, a=_power(sizes.a, 16, 32), f=f, r=r, e=e, warps=8 if f * e >= 512 else 4)


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def fits(sizes: Sizes, itemsize: int, shared: int) -> bool:
    """Whether fusing is possible with ``shared`` bytes of shared memory, and likely to pay.

    - Rank at most 16, and blocks of at most 128 rows and columns: no tile of h is made more than twice. Larger blocks
      make batched products that are fast by themselves.
    - The operands' tiles fit into shared memory, forward and (with the roles exchanged) backward.
    - The bytes that are read again from the L2 cache cost less than those of h that are not written and read.

    >>> square = Sizes(d_in=4096, d_out=4096, p=64, a=64, f=64, r=1, e=64)
    >>> fits(square, 2, shared=227 * 1024), fits(square, 2, shared=16 * 1024)
    (True, False)
    """
    if sizes.r > MAX_RANK or max(sizes.a, sizes.e) > MAX_BLOCK:
        return False
    for own in (sizes, sizes.swapped()):
        tile = tiles(own)
        if tile.shared_bytes(itemsize) > shared:
            return False
        rows, hidden = own.p * own.a, own.p * own.f * own.r
        if rows * -(-own.f // tile.f) > L2_OVER_DRAM * (rows + 2 * hidden):
            return False
    return True


def suits(structure: AbstractStructure, x: Tensor) -> bool:
    """Whether :func:`chain` takes ``x`` (..., d_in) and is likely to be faster than two batched products.

    With Triton installed: a plain CUDA tensor of bfloat16, float16 or float32, on a device
    of compute capability 8.0 or more; a structure that :func:`fits`; outside of ``torch.compile`` (which fuses by
    itself), ``torch.func`` transformations, forward-mode differentiation and dispatch modes (which count or fake
    operations).

    >>> import structlin
    >>> suits(structlin.design("block_tensor_train", (4096, 4096)), torch.ones(2, 4096))
    False
    """
    if not x.is_cuda:
        return False
    if x.dtype not in DTYPES or x.numel() == 0 or type(x) not in _PLAIN or not available():
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch.autograd.forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
        return False
    layout = _layout(structure)
    if layout is None:
        return False
    device: Any = torch.cuda.get_device_properties(x.device)  # torch's stubs lack a field
    return device.major >= 8 and fits(layout.sizes, x.element_size(), device.shared_memory_per_block_optin)


class TritonWay(Way):
    """The fused kernels, where a policy names them."""

    name = "triton"
    explicit = True

    def supports(self, problem: Problem) -> bool:
        known = problem.dtype in ("bfloat16", "float16", "float32") and problem.device == "cuda" and problem.rows
        return known and available() and _layout(problem.structure) is not None

    def seconds(self, problem: Problem) -> float:
        return math.inf  # not known: it was not measured on a device

    def run(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, rows: bool
    ) -> Tensor:  # fmt: skip
        if suits(structure, x):
            return chain(x, factors, structure, bias)
        y = products(structure, factors, x, ops("torch"), rows)
        return y if bias is None else y + bias


register(TritonWay())


# -- the product -------------------------------------------------------------------------------------------------------


def chain(x: Tensor, factors: Sequence[Tensor], structure: AbstractStructure, bias: Tensor | None = None) -> Tensor:
    """``A x + b`` for row-major x: (..., d_in) -> (..., d_out), in the dtype of x, summed in float32.

    Differentiable any number of times; the backward pass is fused too, that of the backward pass is not. Runs on CUDA,
    or on a CPU in Triton's interpreter (``TRITON_INTERPRET=1`` before triton is imported). Float32 products follow
    ``torch.set_float32_matmul_precision``.

    Raises:
        ValueError: a structure that is no Block Tensor-Train of two cores, Monarch or like chain; wrong shapes; dtypes
            that differ or are none of bfloat16, float16 and float32; tensors that are not on CUDA.
        ModuleNotFoundError: Triton is not installed.
    """
    layout = _layout(structure)
    if layout is None:
        raise ValueError(f"no fused product for {structure!r}: it needs two steps as 'pa,pfra->frp; frp,ferp->fe'")
    structure.check(factors)
    sizes = layout.sizes
    if x.shape[-1:] != (sizes.d_in,):
        raise ValueError(f"the last axis of the input must have size {sizes.d_in}, got shape {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (sizes.d_out,):
        raise ValueError(f"bias must have shape ({sizes.d_out},), got {tuple(bias.shape)}")
    given = [x, *factors, *(() if bias is None else (bias,))]
    if x.dtype not in DTYPES or any(t.dtype != x.dtype for t in given):
        raise ValueError(f"one dtype of bfloat16, float16, float32 is needed, got {[str(t.dtype) for t in given]}")
    if not _interpreted() and any(not t.is_cuda for t in given):
        raise ValueError(f"CUDA tensors are needed, got {[str(t.device) for t in given]}")
    w0, w1 = layout.factors(factors)
    y = _Chain.apply(x.reshape(-1, sizes.d_in), w0, w1, bias, sizes)
    return y.reshape(*x.shape[:-1], sizes.d_out)


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w0: Tensor, w1: Tensor, bias: Tensor | None, sizes: Sizes) -> Tensor:
        ctx.sizes = sizes
        ctx.save_for_backward(x, w0, w1)
        return _product(x, w0, w0.stride(), w1, w1.stride(), sizes, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w0, w1 = ctx.saved_tensors
        sizes, needs = ctx.sizes, ctx.needs_input_grad
        gx: Tensor | None
        g0: Tensor | None = None
        g1: Tensor | None = None
        gb = g.float().sum(0).to(g.dtype) if needs[3] else None
        if torch.is_grad_enabled() or _batched(g):
            gx, g0, g1 = _differentiable_gradients(g, x, w0, w1, sizes)
            return gx, g0, g1, gb, None
        # In the transposed chain W1 has the place of W0, with its axes (f, e, r, p) read as (p, a, r, f).
        near, far = _reordered(w1.stride(), (0, 3, 2, 1)), _reordered(w0.stride(), (0, 3, 2, 1))
        swapped = sizes.swapped()
        gx = _product(g, w1, near, w0, far, swapped, None) if needs[0] else None
        if needs[2]:
            g1 = _factor_gradient(x, w0, w0.stride(), g, sizes).to(w1.dtype)
        if needs[1]:  # of the transposed chain: axes (p, a, r, f)
            g0 = _factor_gradient(g, w1, near, x, swapped).permute(0, 3, 2, 1).to(w0.dtype)
        return gx, g0, g1, gb, None


def _batched(g: Tensor) -> bool:
    """Whether ``g`` stands for several gradients (``is_grads_batched``), which the kernels do not take."""
    return torch._C._functorch.is_batchedtensor(g) or torch._C._functorch.is_legacy_batchedtensor(g)


def _reordered(strides: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    return tuple(strides[i] for i in order)


def _rows(x: Tensor) -> Tensor:
    """With columns next to one another."""
    return x if x.stride(1) == 1 else x.contiguous()


def _settings(x: Tensor) -> dict[str, Any]:
    from structlin.execution._triton_kernels import INTERPRETED

    exact = x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    # The interpreter has no products of bfloat16.
    return {"UPCAST": INTERPRETED and x.dtype == torch.bfloat16, "PRECISION": "ieee" if exact else "tf32"}


def _product(
    x: Tensor, w0: Tensor, s0: Sequence[int], w1: Tensor, s1: Sequence[int], sizes: Sizes, bias: Tensor | None
) -> Tensor:
    """``s0`` are strides of W0's axes (p, f, r, a), ``s1`` those of W1's axes (f, e, r, p)."""
    from structlin.execution._triton_kernels import forward_kernel

    x, n, tile = _rows(x), sizes, tiles(sizes)
    y = x.new_empty((len(x), n.d_out))
    if not len(x):
        return y
    grid = (-(-n.f // tile.f), -(-len(x) // tile.t), -(-n.e // tile.e))
    held = y if bias is None else bias.contiguous()
    with _device(x):
        forward_kernel[grid](
            x, w0, w1, held, y, len(x), n.d_in, n.d_out, n.p, n.a, n.f, n.r, n.e, x.stride(0), y.stride(0), *s0, *s1,
            BIAS=bias is not None, **_settings(x), **tile.keywords(),
        )  # fmt: skip
    return y


def _factor_gradient(x: Tensor, w0: Tensor, s0: Sequence[int], g: Tensor, sizes: Sizes) -> Tensor:
    """(f, e, r, p) in float32, from the input and W0 of the chain and the gradient of its output."""
    from structlin.execution._triton_kernels import gradient_kernel

    x, g, n, tile = _rows(x), _rows(g), sizes, tiles(sizes)
    blocks = (-(-n.p // tile.p) * -(-n.r // tile.r), -(-n.f // tile.f), -(-n.e // tile.e))
    share, count = shares(len(x), math.prod(blocks), tile.t, x.device)
    out = x.new_zeros((count, n.f, n.e, n.r, n.p), dtype=torch.float32)
    if count:
        grid = (blocks[0], blocks[1], blocks[2] * count)
        with _device(x):
            gradient_kernel[grid](
                x, w0, g, out, len(x), n.d_in, n.d_out, n.p, n.a, n.f, n.r, n.e, x.stride(0), g.stride(0), share,
                *s0, *out.stride(), **_settings(x), **tile.keywords(),
            )  # fmt: skip
    return out.sum(0)


def shares(tokens: int, blocks: int, tile: int, device: torch.device) -> tuple[int, int]:
    """Tokens of a share (a multiple of the tile), and how many shares: about four programs for each processor.

    A share has at least 16 tiles where there are so many, for each costs a copy of the gradient.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = max(1, -(-4 * processors // blocks))
    share = max(-(-tokens // wanted), min(tokens, 16 * tile))
    share = -(-share // tile) * tile
    return share, -(-tokens // share) if share else 0


def _device(x: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _differentiable_gradients(
    g: Tensor, x: Tensor, w0: Tensor, w1: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """By ordinary products, which can be differentiated in turn."""
    n, t = sizes, len(x)
    xs = F.pad(x, (0, n.p * n.a - n.d_in)).view(t, n.p, n.a).transpose(0, 1)
    gs = F.pad(g, (0, n.f * n.e - n.d_out)).view(t, n.f, n.e).transpose(0, 1)
    v0, v1 = w0.reshape(n.p, n.f * n.r, n.a), w1.reshape(n.f, n.e, n.r * n.p)
    h = (xs @ v0.mT).view(n.p, t, n.f, n.r).permute(2, 1, 3, 0).reshape(n.f, t, n.r * n.p)
    gh = (gs @ v1).view(n.f, t, n.r, n.p).permute(3, 1, 0, 2).reshape(n.p, t, n.f * n.r)
    gx = (gh @ v0).transpose(0, 1).reshape(t, n.p * n.a)
    gx = gx if gx.shape[1] == n.d_in else gx[:, : n.d_in]
    return gx, (gh.mT @ xs).view(w0.shape), (gs.mT @ h).view(w1.shape)
