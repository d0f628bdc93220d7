"""What one call of a structured layer costs for few tokens, beside nn.Linear; and which way of running it costs least.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json

Calls alternate, in one run, and the ratios are of medians. The first table has the time of a call of
the layer in units of that of ``nn.Linear`` of the same sizes, eager and compiled by ``torch.compile``, with and without
recording gradients. The second has the ways that the layer chooses from, in units of ``nn.Linear`` called the same way:
the products one by one with the tokens in front (``token-major``), the contraction of structlin, and that as one node
``structlin::chain`` (``operator``); forward, and forward with backward. Seconds are not reported: they depend on the
machine and on what else runs on it.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from _measure import medians
from torch import Tensor, nn

from structlin._arrays import ops
from structlin.execution.token_major import token_major
from structlin_nn.torch import StructuredLinear
from structlin_nn.torch._operator import chain
from structlin_nn.torch._text import to_text

CASES = (
    ("dense", {}),
    ("low_rank", {"rank_fraction": 0.125}),
    ("kronecker", {}),
    ("tensor_train", {"rank": 8}),
    ("monarch", {"blocks": 4}),
    ("monarch", {"blocks": 16}),
    ("block_tensor_train", {"rank": 1}),
    ("block_tensor_train", {"rank": 4}),
)
Call = Callable[[], object]


def ratios(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Median time of each function, divided by that of the first."""
    found = medians(list(calls.values()), repeats)
    return {name: seconds / found[0] for name, seconds in zip(calls, found, strict=True)}


def make(name: str, options: dict, size: int) -> tuple[nn.Linear, StructuredLinear]:
    torch.manual_seed(0)
    return nn.Linear(size, size), StructuredLinear(size, size, structure=name, **options)


def overhead(size: int, repeats: int) -> list[dict]:
    """Rows of the first table, for one token."""
    rows = []
    x = torch.randn(1, size)
    for name, options in CASES:
        linear, layer = make(name, options, size)
        row: dict = {"structure": name, "options": options, "size": size}
        torch._dynamo.reset()
        for kind in ("eager", "compiled"):
            one, other = linear, layer
            if kind == "compiled":
                one, other = (torch.compile(m, fullgraph=True, dynamic=False) for m in (linear, layer))
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    found = ratios({"linear": lambda m=one: m(x), "layer": lambda m=other: m(x)}, repeats)
                row[f"{kind}_{'grad' if grad else 'no_grad'}"] = found["layer"]
        rows.append(row)
    return rows


def ways(name: str, options: dict, size: int, tokens: int, repeats: int, compiled: bool) -> dict:
    """A row of the second table."""
    linear, layer = make(name, options, size)
    structure, factors, bias = layer.structure, tuple(layer.factors), layer.bias
    text, plan, xp = to_text(structure), token_major(structure), ops("torch")
    x, gy = torch.randn(tokens, size, requires_grad=True), torch.randn(tokens, size)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": linear,
        "token-major": lambda x: plan(x, factors, bias),
        "contraction": lambda x: structure._rows(factors, x, xp) + bias,
        "operator": lambda x: chain(x, list(factors), text) + bias,
    }
    if compiled:
        torch._dynamo.reset()
        functions = {n: torch.compile(f, fullgraph=True, dynamic=False) for n, f in functions.items()}
    repeats = max(repeats, min(500, 2_000_000 // (size * tokens)))
    with torch.no_grad():
        forward = ratios({n: lambda f=f: f(x) for n, f in functions.items()}, repeats)
    both = ratios({n: lambda f=f: f(x).backward(gy) for n, f in functions.items()}, repeats)
    setting = {"structure": name, "options": options, "size": size, "tokens": tokens, "compiled": compiled}
    return {**setting, "forward": forward, "forward_backward": both}


def show(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def titled(row: dict) -> str:
    return " ".join([row["structure"], *(f"{k}={v}" for k, v in row["options"].items())])


def report(result: dict) -> str:
    """The tables of a result, also what the documentation shows."""
    kinds = ("eager_grad", "eager_no_grad", "compiled_grad", "compiled_no_grad")
    names = ("token-major", "contraction", "operator")
    calls = [(titled(r), *(f"{r[k]:.2f}" for k in kinds)) for r in result["calls"]]
    ways = [
        (
            titled(r), str(r["size"]), str(r["tokens"]), "compiled" if r["compiled"] else "eager",
            *(f"{r['forward'][n]:.2f} / {r['forward_backward'][n]:.2f}" for n in names),
        )
        for r in result["ways"]
    ]  # fmt: skip
    parts = []
    if calls:
        parts += ["one call with one token, d = 256, in units of nn.Linear", show(("structure", *kinds), calls)]
    if ways:
        parts += ["forward / forward + backward, in units of nn.Linear"]
        parts += [show(("structure", "d", "tokens", "mode", *names), ways)]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 64, 1024])
    parser.add_argument("--compiled-tokens", type=int, nargs="*", default=[1, 1024], help="empty: eager alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="where to write the JSON result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    calls = overhead(256, 100 * arguments.repeats)
    print(report({"calls": calls, "ways": []}), flush=True)
    rows = []
    for compiled, counts in ((False, arguments.tokens), (True, arguments.compiled_tokens)):
        for size in arguments.sizes:
            for tokens in counts:
                for name, options in CASES[1:]:
                    rows.append(ways(name, options, size, tokens, arguments.repeats, compiled))
    print(report({"calls": [], "ways": rows}))
    if arguments.out:
        setting = {"threads": arguments.threads, "repeats": arguments.repeats, "dtype": "float32"}
        machine = {"torch": torch.__version__, "machine": platform.machine(), "python": platform.python_version()}
        result = {"setting": setting, **machine, "calls": calls, "ways": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
