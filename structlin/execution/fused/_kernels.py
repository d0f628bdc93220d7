"""Kernels in Triton for chains of two steps whose activation stays on the chip. This module needs Triton.

Both compute, with the letters of a Block Tensor-Train, ``h[c,e,b] = sum_a L[b,c,e,a] x[b,a]`` and
``y[c,d] = sum_eb R[c,d,e,b] h[c,e,b] + bias[c,d]`` for each token. A program owns some c, for which it needs all of x
but only parts of L and R that no other program needs. Strides of the factors are arguments. ``a`` is contiguous in L
for wide loads, and ``b`` in R.

Sums are in float32, and nothing is added by atomic operations: the same sizes give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "few_tokens", "many_tokens"]


@triton.jit
def few_tokens(
    x_ptr, l_ptr, r_ptr, bias_ptr, y_ptr, tokens, d_in, d_out, x_row,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    L_B: tl.constexpr, L_C: tl.constexpr, L_E: tl.constexpr, L_A: tl.constexpr,
    R_C: tl.constexpr, R_D: tl.constexpr, R_E: tl.constexpr, R_B: tl.constexpr,
    HAS_BIAS: tl.constexpr, T: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program for each c and block of d, for all (up to T) tokens: reads each factor once for all of them.

    Products are sums over tiles in registers: for so few tokens the bytes of the factors are all there is.
    """
    c = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.arange(0, T)
    rows = t.to(tl.int64)[:, None, None] * x_row
    sums = tl.zeros((T, BLOCK_D), dtype=tl.float32)
    for start in range(0, E * B, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)  # e and b in the order in which R has them: b innermost
        e, b, inside = k // B, k % B, k < E * B
        h = tl.zeros((T, BLOCK_K), dtype=tl.float32)
        for first in range(0, A, BLOCK_A):
            a = first + tl.arange(0, BLOCK_A)
            there = inside[:, None] & (a < A)[None, :]
            at = (b * L_B + e * L_E)[:, None] + (a * L_A)[None, :] + c.to(tl.int64) * L_C
            left = tl.load(l_ptr + at, mask=there, other=0.0).to(tl.float32)
            column = (b * A)[:, None] + a[None, :]
            given = (t < tokens)[:, None, None] & (there & (column < d_in))[None, :, :]
            x = tl.load(x_ptr + rows + column[None, :, :], mask=given, other=0.0).to(tl.float32)
            h += tl.sum(x * left[None, :, :], axis=2)
        at = (d * R_D)[:, None] + (e * R_E + b * R_B)[None, :] + c.to(tl.int64) * R_C
        right = tl.load(r_ptr + at, mask=(d < D)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        sums += tl.sum(h[:, None, :] * right[None, :, :], axis=2)
    row = c * D + d
    written = (d < D) & (row < d_out)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + row, mask=written, other=0.0).to(tl.float32)[None, :]
    at = t.to(tl.int64)[:, None] * d_out + row[None, :]
    tl.store(y_ptr + at, sums.to(y_ptr.dtype.element_ty), mask=(t < tokens)[:, None] & written[None, :])


@triton.jit
def many_tokens(
    x_ptr, l_ptr, r_ptr, bias_ptr, y_ptr, tokens, d_in, d_out, x_row,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    L_B: tl.constexpr, L_C: tl.constexpr, L_E: tl.constexpr, L_A: tl.constexpr,
    R_C: tl.constexpr, R_D: tl.constexpr, R_E: tl.constexpr, R_B: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Run persistent programs, each over tiles of BLOCK_T tokens and BLOCK_C values of c until none are left.

    For BLOCK_B values of b at a time a tile of h is a batched product of x and L; rounded to the dtype of x, it meets
    R in another one. Both run on tensor cores. The sums of y stay in registers.
    """
    groups: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    a, d = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_D)
    b0 = tl.arange(0, BLOCK_B)
    ce = tl.arange(0, BLOCK_C * BLOCK_E)
    be = tl.arange(0, BLOCK_B * BLOCK_E)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T) * groups, tl.num_programs(0)):
        t = (tile // groups) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        first = (tile % groups) * BLOCK_C
        c = first + tl.arange(0, BLOCK_C)
        c_of, e_of = first + ce // BLOCK_E, ce % BLOCK_E
        sums = tl.zeros((BLOCK_C, BLOCK_T, BLOCK_D), dtype=tl.float32)
        for start in tl.range(0, B, BLOCK_B, num_stages=STAGES):
            b = start + b0
            column = (b * A)[:, None, None] + a[None, None, :]
            given = (t < tokens)[None, :, None] & ((b < B)[:, None, None] & (a < A)[None, None, :] & (column < d_in))
            x = tl.load(x_ptr + (t * x_row)[None, :, None] + column, mask=given, other=0.0)
            at = (b * L_B)[:, None, None] + (c_of * L_C + e_of * L_E)[None, :, None] + (a * L_A)[None, None, :]
            there = (b < B)[:, None, None] & ((c_of < C) & (e_of < E))[None, :, None] & (a < A)[None, None, :]
            left = tl.load(l_ptr + at, mask=there, other=0.0)
            h = tl.dot(x, tl.permute(left, (0, 2, 1)), input_precision="ieee")  # (b, t, ce)
            h = tl.reshape(h, (BLOCK_B, BLOCK_T, BLOCK_C, BLOCK_E))
            h = tl.reshape(tl.permute(h, (2, 1, 3, 0)), (BLOCK_C, BLOCK_T, BLOCK_E * BLOCK_B))
            h = h.to(x_ptr.dtype.element_ty)
            b_of, e_in = start + be % BLOCK_B, be // BLOCK_B  # b innermost, as in R
            at = (c * R_C)[:, None, None] + (d * R_D)[None, :, None] + (e_in * R_E + b_of * R_B)[None, None, :]
            there = (c < C)[:, None, None] & (d < D)[None, :, None] & ((b_of < B) & (e_in < E))[None, None, :]
            right = tl.load(r_ptr + at, mask=there, other=0.0)
            sums = tl.dot(h, tl.permute(right, (0, 2, 1)), sums, input_precision="ieee")  # (c, t, d)
        row = (c * D)[:, None] + d[None, :]
        written = (c < C)[:, None] & (d < D)[None, :] & (row < d_out)
        if HAS_BIAS:
            sums += tl.load(bias_ptr + row, mask=written, other=0.0).to(tl.float32)[:, None, :]
        at = (t * d_out)[None, :, None] + row[:, None, :]
        inside = (t < tokens)[None, :, None] & written[:, None, :]
        tl.store(y_ptr + at, sums.to(y_ptr.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(few_tokens, triton.JITFunction)
"""Whether ``TRITON_INTERPRET=1`` was set when Triton was imported."""
