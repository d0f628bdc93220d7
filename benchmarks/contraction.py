"""How fast structured products are against a dense one of the same shape, forward and forward + backward, on a CPU.

    python benchmarks/contraction.py --out benchmarks/results/contraction.json

Interleaved repeats in one run; reported are ratios of medians. For each structure: the ratio of MACs to dense, the
speed-up over `torch.nn.functional.linear`, and the efficiency, speed-up divided by the ratio of MACs. `portable` is
the plan that all libraries run; for torch on a CPU there are `chunked`, by the BLAS, and `fused`, compiled for the
chain, which is taken where there are enough tokens. Seconds are not reported: they depend on the machine and on what
else runs on it.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from _measure import medians
from torch.nn import functional as F

import structlin as sl
from structlin._arrays import ops

CASES = (
    ("low_rank", {"rank_fraction": 0.125}),
    ("kronecker", {}),
    ("tensor_train", {"rank": 8}),
    ("monarch", {"blocks": 4}),
    ("monarch", {"blocks": 16}),
    ("block_tensor_train", {"rank": 1}),
    ("block_tensor_train", {"rank": 2}),
    ("block_tensor_train", {"rank": 4}),
    ("block_tensor_train", {"rank": 16}),
)


WAYS = ("portable", "chunked", "fused")


def measure(name: str, options: dict, size: int, tokens: int, dtype: torch.dtype, repeats: int, clock: str) -> dict:
    """One row of the table."""
    structure = sl.design(name, (size, size), **options)
    weight = torch.randn(size, size, dtype=dtype, requires_grad=True)
    factors = [f.requires_grad_() for f in sl.random_factors(structure, backend="torch", dtype=dtype)]
    x = torch.randn(tokens, size, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, size, dtype=dtype)
    xp = ops("torch")

    cpu = structure._cpu_rows
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "dense": lambda: F.linear(x, weight),
        "portable": lambda: structure._portable(factors, x, xp),
    }
    if cpu._chunked.merges:
        calls["chunked"] = lambda: cpu(cpu._chunked, x, factors)
    if cpu._fused._program(dtype) is not None:
        calls["fused"] = lambda: cpu(cpu._fused, x, factors)
    forward = list(calls.values())
    with torch.no_grad():
        ahead = medians(forward, repeats, clock=clock)
    both = medians([lambda f=f: f().backward(gradient) for f in forward], repeats, clock=clock)
    ratio = size * size / structure.macs
    row = {"structure": name, "options": options, "size": size, "tokens": tokens, "mac_ratio": ratio}
    for kind, found in (("forward", ahead), ("forward_backward", both)):
        for way, seconds in zip(list(calls)[1:], found[1:], strict=True):
            row[f"{kind}_{way}"] = {"speed_up": found[0] / seconds, "efficiency": found[0] / seconds / ratio}
    return row


def table(rows: list[dict]) -> str:
    """Efficiencies (speed-ups) by row."""
    head = ("structure", "d", "tokens", "MAC ratio", *(f"{kind} {way}" for kind in ("fwd", "f+b") for way in WAYS))
    cells = [head]
    for row in rows:
        options = " ".join(f"{k}={v}" for k, v in row["options"].items())
        values = [row.get(f"{k}_{p}") for k in ("forward", "forward_backward") for p in WAYS]
        shown = [f"{v['efficiency']:.2f} (x{v['speed_up']:.2f})" if v else "-" for v in values]
        cells.append(
            (f"{row['structure']} {options}", str(row["size"]), str(row["tokens"]), f"{row['mac_ratio']:.2f}", *shown)
        )
    widths = [max(len(c[i]) for c in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def report(result: dict) -> str:
    """What the documentation shows of a result."""
    return table(result["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 2304])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: time on cores, one thread only")
    parser.add_argument("--out", type=Path, help="where to write the JSON result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for size in arguments.sizes:
        for name, options in CASES:
            dtype = getattr(torch, arguments.dtype)
            rows.append(measure(name, options, size, arguments.tokens, dtype, arguments.repeats, arguments.clock))
    print(table(rows))
    if arguments.out:
        setting = {
            "dtype": arguments.dtype,
            "threads": arguments.threads,
            "repeats": arguments.repeats,
            "clock": arguments.clock,
        }
        machine = {"torch": torch.__version__, "machine": platform.machine(), "python": platform.python_version()}
        arguments.out.write_text(json.dumps({"setting": setting, **machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
