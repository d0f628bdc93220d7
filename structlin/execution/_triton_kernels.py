"""Kernels in Triton; imported only where Triton is there.

Axes, each with its size: t tokens, p and a of the input (column ``p A + a``), f and e of the output (column
``f E + e``), r the rank. Tiles have sizes BT, BP, BA, BF, BE, BR. All sums are in float32.
"""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _intermediate(
    x, w0, t, p, f, r, tokens, d_in, P, A, F, R, x_row, w0_p, w0_f, w0_r, w0_a,
    BT: tl.constexpr, BP: tl.constexpr, BA: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h[p, t, (f, r)] = sum_a x[t, p, a] w0[p, f, r, a], for vectors t, p and (f, r) of length BN."""
    h = tl.zeros((BP, BT, BN), dtype=tl.float32)
    for a0 in range(0, A, BA):
        a = a0 + tl.arange(0, BA)
        column = p[:, None] * A + a[None, :]
        inside = (p < P)[:, None] & (a < A)[None, :] & (column < d_in)
        rows = x + t.to(tl.int64)[None, :, None] * x_row + column[:, None, :]
        xs = tl.load(rows, mask=inside[:, None, :] & (t < tokens)[None, :, None], other=0.0)
        columns = (f * w0_f + r * w0_r)[None, None, :]
        held = w0 + p[:, None, None] * w0_p + a[None, :, None] * w0_a + columns
        kept = ((p < P)[:, None] & (a < A)[None, :])[:, :, None] & ((f < F) & (r < R))[None, None, :]
        ws = tl.load(held, mask=kept, other=0.0)
        if UPCAST:
            xs, ws = xs.to(tl.float32), ws.to(tl.float32)
        h = tl.dot(xs, ws, h, input_precision=PRECISION)
    return h


@triton.jit
def forward_kernel(
    x, w0, w1, bias, y, tokens, d_in, d_out, P, A, F, R, E, x_row, y_row,
    w0_p, w0_f, w0_r, w0_a, w1_f, w1_e, w1_r, w1_p,
    BT: tl.constexpr, BP: tl.constexpr, BA: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
    BIAS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[t, f, e] = sum_(r, p) h[t, f, r, p] w1[f, e, r, p] + bias[f, e]; one program: tiles of f, t and e.

    Programs that differ in f alone are neighbours: they read the same rows of x while these are in the cache.
    """
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    free = tl.arange(0, BF * BR)
    inner = tl.arange(0, BP * BR)
    total = tl.zeros((BF, BT, BE), dtype=tl.float32)
    for r0 in range(0, R, BR):
        for p0 in range(0, P, BP):
            h = _intermediate(
                x, w0, t, p0 + tl.arange(0, BP), tl.program_id(0) * BF + free // BR, r0 + free % BR,
                tokens, d_in, P, A, F, R, x_row, w0_p, w0_f, w0_r, w0_a, BT, BP, BA, BF * BR, UPCAST, PRECISION,
            )  # fmt: skip
            h = h.to(x.dtype.element_ty).reshape(BP, BT, BF, BR).permute(2, 1, 0, 3).reshape(BF, BT, BP * BR)
            p, r = p0 + inner // BR, r0 + inner % BR
            held = w1 + f[:, None, None] * w1_f + e[None, None, :] * w1_e + (r * w1_r + p * w1_p)[None, :, None]
            kept = (f < F)[:, None, None] & (e < E)[None, None, :] & ((p < P) & (r < R))[None, :, None]
            ws = tl.load(held, mask=kept, other=0.0)
            if UPCAST:
                h, ws = h.to(tl.float32), ws.to(tl.float32)
            total = tl.dot(h, ws, total, input_precision=PRECISION)
    column = f[:, None] * E + e[None, :]
    inside = (f < F)[:, None] & (e < E)[None, :] & (column < d_out)
    if BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[:, None, :]
    rows = y + t.to(tl.int64)[None, :, None] * y_row + column[:, None, :]
    tl.store(rows, total.to(y.dtype.element_ty), mask=inside[:, None, :] & (t < tokens)[None, :, None])


@triton.jit
def gradient_kernel(
    x, w0, g, out, tokens, d_in, d_out, P, A, F, R, E, x_row, g_row, share,
    w0_p, w0_f, w0_r, w0_a, out_s, out_f, out_e, out_r, out_p,
    BT: tl.constexpr, BP: tl.constexpr, BA: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[s, f, e, r, p] = sum_t g[t, f, e] h[t, f, r, p], in float32, over the share s of the tokens.

    One program: tiles of f and (r, p), all tokens of a share. Each element of ``out`` is written once, so that the
    sum over the shares, made afterwards, does not depend on the order in which programs run.
    """
    blocks_p = tl.cdiv(P, BP)
    blocks_e = tl.cdiv(E, BE)
    p0 = tl.program_id(0) % blocks_p * BP
    r0 = tl.program_id(0) // blocks_p * BR
    f0 = tl.program_id(1) * BF
    s = tl.program_id(2) // blocks_e
    e = tl.program_id(2) % blocks_e * BE + tl.arange(0, BE)
    f = f0 + tl.arange(0, BF)
    free = tl.arange(0, BF * BR)
    column = f[:, None] * E + e[None, :]
    inside = (f < F)[:, None] & (e < E)[None, :] & (column < d_out)
    total = tl.zeros((BF, BP * BR, BE), dtype=tl.float32)
    stop = tl.minimum((s + 1) * share, tokens)
    for t0 in range(s * share, stop, BT):
        t = t0 + tl.arange(0, BT)
        h = _intermediate(
            x, w0, t, p0 + tl.arange(0, BP), f0 + free // BR, r0 + free % BR,
            stop, d_in, P, A, F, R, x_row, w0_p, w0_f, w0_r, w0_a, BT, BP, BA, BF * BR, UPCAST, PRECISION,
        )  # fmt: skip
        h = h.to(x.dtype.element_ty).reshape(BP, BT, BF, BR).permute(2, 0, 3, 1).reshape(BF, BP * BR, BT)
        rows = g + t.to(tl.int64)[None, :, None] * g_row + column[:, None, :]
        gs = tl.load(rows, mask=inside[:, None, :] & (t < stop)[None, :, None], other=0.0)
        if UPCAST:
            h, gs = h.to(tl.float32), gs.to(tl.float32)
        total = tl.dot(h, gs, total, input_precision=PRECISION)
    inner = tl.arange(0, BP * BR)
    p, r = p0 + inner // BR, r0 + inner % BR
    place = out + s.to(tl.int64) * out_s + f[:, None, None] * out_f + e[None, None, :] * out_e
    kept = (f < F)[:, None, None] & (e < E)[None, None, :] & ((p < P) & (r < R))[None, :, None]
    tl.store(place + (r * out_r + p * out_p)[None, :, None], total, mask=kept)
