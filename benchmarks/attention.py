"""Attention on a CPU: torch's fused kernel against batched products, forward, and forward and backward.

    python benchmarks/attention.py --out attention
    python benchmarks/attention.py --dtype float32 --tokens 50 256

`structlin_nn.models.networks.attend` chooses between the two. The result has the milliseconds of the fused kernel
and the speed-up of the products, as medians over rounds in which both run in turn. A batch has about 1024 tokens.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from _measure import aligned, describe, machine, ratio, result_path, timings, write_result
from torch import Tensor
from torch.nn import functional as F

from structlin_nn.models.networks import attend_by_products

HEADS, HEAD_DIM = 12, 64


def fused(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def row(tokens: int, causal: bool, dtype: torch.dtype, repeats: int, clock: str) -> dict[str, object]:
    batch = max(1, 1024 // tokens)
    # As projections leave them: the heads of a token side by side.
    operands = [
        torch.randn(batch, tokens, HEADS, HEAD_DIM, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)
    ]
    gradient = torch.randn(batch, HEADS, tokens, HEAD_DIM, dtype=dtype)
    found: dict[str, object] = {"tokens": tokens, "batch": batch, "causal": causal}
    for train in (False, True):

        def call(attend: Callable[..., Tensor], train: bool = train) -> None:
            with torch.set_grad_enabled(train):
                y = attend(*operands, causal=causal, scale=HEAD_DIM**-0.5)
            if train:
                torch.autograd.grad(y, operands, gradient)

        kernel, products = timings([lambda: call(fused), lambda: call(attend_by_products)], repeats, clock=clock)
        kind = "forward_backward" if train else "forward"
        found[kind] = {"milliseconds": 1e3 * statistics.median(kernel), "speed_up": ratio(kernel, products)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[50, 256, 1024, 2048])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: time on cores, for one thread")
    parser.add_argument("--out", metavar="NAME", help="where to write the JSON: a file, or a name in results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = {name: getattr(arguments, name) for name in ("dtype", "threads", "repeats", "clock")}
    result: dict[str, object] = {"setting": setting, "machine": machine()}
    print(describe(result))
    rows = [
        row(tokens, causal, getattr(torch, arguments.dtype), arguments.repeats, arguments.clock)
        for tokens in arguments.tokens
        for causal in (False, True)
    ]
    cells = [["tokens", "causal", "forward", "by products", "forward and backward", "by products"]]
    for one in rows:
        times = [one[kind] for kind in ("forward", "forward_backward")]
        figures = [text for t in times for text in (f"{t['milliseconds']:.2f} ms", f"x{t['speed_up']:.2f}")]  # type: ignore[index]
        cells.append([str(one["tokens"]), str(one["causal"]), *figures])
    print(aligned(cells))
    if arguments.out:
        write_result(result_path(arguments.out), {**result, "rows": rows})


if __name__ == "__main__":
    main()
