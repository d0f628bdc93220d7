"""Kernels in Triton for chains of two steps. This module needs Triton.

Both compute, with the letters of a Block Tensor-Train, ``h[c,e,b] = sum_a L[b,c,e,a] x[b,a]`` and
``y[c,d] = sum_eb R[c,d,e,b] h[c,e,b] + bias[c,d]`` for each token. Strides of the factors are arguments, so that the
gradient of x is the same kernel with exchanged factors.

Sums are in float32, and only counters are atomic: the same sizes give the same bits.
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
def _wait(counter, wanted):
    """Wait until ``wanted`` tickets of a step are done; their stores are visible afterwards."""
    while tl.atomic_add(counter, 0, sem="acquire") < wanted:
        pass


@triton.jit
def _done(counter):
    """Tell that a ticket is done, after all threads have written."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _product(
    source, source_step, given, weight, added, target, target_step, kept, start, loaded, stored,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``target[t, n] = sum_k source[t, k] weight[k, n] + added[n]`` from ``start`` on.

    Rows from ``loaded`` on are read as zeros, and rows from ``stored`` on are not written.
    """
    for first in tl.range(start, stored, BLOCK_T, num_stages=STAGES):
        t = first + tl.arange(0, BLOCK_T)
        rows, at = (t < loaded)[:, None], t.to(tl.int64)[:, None]
        part = tl.load(source[None, :] + at * source_step, mask=rows & given[None, :], other=0.0)
        sums = tl.dot(part, weight, input_precision="ieee") + added[None, :]
        rows = (t < stored)[:, None]
        tl.store(target[None, :] + at * target_step, sums.to(part.dtype), mask=rows & kept[None, :])


@triton.jit
def many_tokens(
    x_ptr, l_ptr, r_ptr, bias_ptr, y_ptr, tokens, d_in, d_out, x_row, h_ptr, h_units, slots, counters,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    L_B: tl.constexpr, L_C: tl.constexpr, L_E: tl.constexpr, L_A: tl.constexpr,
    R_C: tl.constexpr, R_D: tl.constexpr, R_E: tl.constexpr, R_B: tl.constexpr,
    HAS_BIAS: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr,
    FIRST_T: tl.constexpr, FIRST_N: tl.constexpr, FIRST_K: tl.constexpr, FIRST_STAGES: tl.constexpr,
    SECOND_T: tl.constexpr, SECOND_N: tl.constexpr, SECOND_K: tl.constexpr, SECOND_STAGES: tl.constexpr,
):  # fmt: skip
    """Run persistent programs, which draw tickets until none are left.

    A ticket is a part of one step, for SPAN tokens of a chunk, with one tile of a factor, which stays on the chip. The
    first step of a chunk is drawn before the second step of the previous chunk. A ticket waits only for tickets that
    were drawn before it, so that the programs never wait for each other in a circle, however many of them run.

    ``h`` has the order (c, e, b, tokens). It has rows of UNIT * ``h_units`` tokens, with room for ``slots`` chunks.
    """
    firsts: tl.constexpr = B * ((C * E + FIRST_N - 1) // FIRST_N) * (CHUNK // SPAN)
    seconds: tl.constexpr = C * ((D + SECOND_N - 1) // SECOND_N) * (CHUNK // SPAN)
    parts: tl.constexpr = CHUNK // SPAN
    h_row = h_units.to(tl.int64) * UNIT
    chunks = tl.cdiv(tokens, CHUNK)
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    while ticket < (chunks + 1) * (firsts + seconds):
        stage, place = ticket // (firsts + seconds), ticket % (firsts + seconds)
        second = place >= firsts
        if second:
            chunk, place = stage - 1, place - firsts
        else:
            chunk = stage
        done = counters + 1 + 2 * chunk  # of the first step, and then of the second one
        start = (place % parts) * SPAN
        count = tl.minimum(tokens - chunk * CHUNK, start + SPAN)
        place = place // parts
        aligned = tl.cdiv(count, UNIT) * UNIT
        held = h_ptr + (chunk % slots) * CHUNK
        if second:
            if chunk >= 0:
                c, first, n = place % C, place // C * SECOND_N, tl.arange(0, SECOND_N)
                k = tl.arange(0, SECOND_K)
                at = (k // B * R_E + k % B * R_B)[:, None] + (n * R_D)[None, :]
                n += first
                inside = (k < E * B)[:, None] & (n < D)[None, :]
                right = tl.load(r_ptr + c * R_C + first * R_D + at, mask=inside, other=0.0)
                row = c * D + n
                written = (n < D) & (row < d_out)
                if HAS_BIAS:
                    added = tl.load(bias_ptr + row, mask=written, other=0.0).to(tl.float32)
                else:
                    added = tl.zeros((SECOND_N,), dtype=tl.float32)
                y = y_ptr + (chunk * CHUNK).to(tl.int64) * d_out + row
                _wait(done, firsts)
                _product(held + (c * (E * B) + k) * h_row, 1, k < E * B, right, added, y, d_out, written,
                         start, aligned, count, SECOND_T, SECOND_STAGES)  # fmt: skip
                _done(done + 1)
        else:
            if chunk < chunks:
                b, n = place % B, place // B * FIRST_N + tl.arange(0, FIRST_N)
                k = tl.arange(0, FIRST_K)
                e, c, there = n // C, n % C, n < E * C
                at = (k * L_A)[:, None] + (c * L_C + e * L_E)[None, :]
                left = tl.load(l_ptr + b * L_B + at, mask=(k < A)[:, None] & there[None, :], other=0.0)
                column = b * A + k
                x = x_ptr + (chunk * CHUNK).to(tl.int64) * x_row + column
                if chunk >= slots:
                    _wait(done - 2 * slots + 1, seconds)
                added = tl.zeros((FIRST_N,), dtype=tl.float32)
                _product(x, x_row, (k < A) & (column < d_in), left, added, held + ((c * E + e) * B + b) * h_row, 1,
                         there, start, count, aligned, FIRST_T, FIRST_STAGES)  # fmt: skip
                _done(done)
        ticket = tl.atomic_add(counters, 1, sem="relaxed")


INTERPRETED = not isinstance(few_tokens, triton.JITFunction)
"""Whether ``TRITON_INTERPRET=1`` was set when Triton was imported."""
