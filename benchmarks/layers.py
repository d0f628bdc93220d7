"""Structured layers against dense ones, plain einsums and the layers of other libraries: time and memory.

    python benchmarks/layers.py --out benchmarks/results/layers.json
    python benchmarks/layers.py --sizes 1024 2304 4096 --tokens 1024 16384 --dtype bfloat16 --threads 2
    python benchmarks/layers.py --device cuda --dtype bfloat16 --sizes 4096 --ffn 4096

One run; within a row all implementations are called in turn, and ratios of the medians are reported: the speed-up
over `torch.nn.Linear` (an FFN: two of them), and the efficiency, which is the speed-up divided by the ratio of MACs,
dense to structured. Memory is what one forward and backward pass allocates at its peak, parameters included, as a
ratio to dense. Seconds are kept in the JSON only for dense: they depend on the machine and on what else runs there.

All layers have a bias. An implementation that is not there, or does not have the structure, is left out of its row, and
the JSON says why. torch-structured and tensorly-torch are measured where they can be imported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from _implementations import IMPLEMENTATIONS, AbsentError, build
from _measure import keep_memory, machine, medians, peak_memory
from torch import nn

from structlin_nn.torch import StructuredLinear

STRUCTURES: dict[str, tuple[str, dict[str, object]]] = {
    "low_rank": ("low_rank", {"rank_fraction": 0.125}),
    "kronecker": ("kronecker", {}),
    "monarch_4": ("monarch", {"blocks": 4}),
    "monarch_16": ("monarch", {"blocks": 16}),
    "tt_8": ("tensor_train", {"rank": 8}),
    "btt_1": ("block_tensor_train", {"rank": 1}),
    "btt_2": ("block_tensor_train", {"rank": 2}),
    "btt_4": ("block_tensor_train", {"rank": 4}),
    "btt_16": ("block_tensor_train", {"rank": 16}),
}
KINDS = ("forward", "forward_backward")


class Row:
    """One structure at one shape: widths (d, d) is a layer, (d, 4d, d) two layers, one after the other."""

    def __init__(self, label: str, widths: tuple[int, ...], tokens: int, device: str, dtype: torch.dtype) -> None:
        self.label, self.widths, self.tokens, self.device = label, widths, tokens, device
        name, options = STRUCTURES[label]
        place = {"device": device, "dtype": dtype}
        pairs = list(pairwise(widths))
        torch.manual_seed(0)
        self.dense = nn.Sequential(*(nn.Linear(*pair, **place) for pair in pairs))
        layers = [StructuredLinear(*pair, structure=name, **options, **place) for pair in pairs]
        self.x = torch.randn(tokens, widths[0], **place, requires_grad=True)
        self.gradient = torch.randn(tokens, widths[-1], **place)
        self.macs = sum(layer.structure.macs for layer in layers)
        self.mac_ratio = sum(a * b for a, b in pairs) / self.macs
        self.layers, self.name, self.options = layers, name, options
        self.modules: dict[str, nn.Module] = {}
        self.absent: dict[str, str] = {}

    def add(self, implementation: str) -> None:
        """Build an implementation, or note why it is not there."""
        try:
            module = build(implementation, self.layers, self.name, self.options)
        except AbsentError as error:
            self.absent[implementation] = str(error)
            return
        if implementation.startswith("einsum"):
            with torch.no_grad():
                expected, got = nn.Sequential(*self.layers)(self.x).float(), module(self.x).float()
            error = ((got - expected).norm() / expected.norm()).item()
            if not error < (2e-2 if self.x.dtype == torch.bfloat16 else 1e-4):
                raise AssertionError(f"{implementation} of {self.label} {self.widths}: relative error {error}")
        self.modules[implementation] = module

    def step(self, module: nn.Module) -> None:
        """Forward and backward pass, with fresh gradients."""
        module.zero_grad(set_to_none=True)
        self.x.grad = None
        module(self.x).backward(self.gradient)

    def held(self, module: nn.Module) -> int:
        """Bytes of the parameters and of the input."""
        return sum(t.numel() * t.element_size() for t in (*module.parameters(), self.x))

    def clear(self, module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        self.x.grad = None

    def memory(self, module: nn.Module) -> int:
        """Bytes held and allocated at the peak of a step."""
        self.clear(module)
        most = peak_memory(lambda: self.step(module), self.device)
        self.clear(module)
        return self.held(module) + most

    def measure(self, repeats: int, clock: str) -> dict[str, object]:
        """The row of the table."""
        modules = [self.dense, *self.modules.values()]
        with torch.no_grad():
            forward = medians([lambda m=m: m(self.x) for m in modules], repeats, self.device, clock)
        both = medians([lambda m=m: self.step(m) for m in modules], repeats, self.device, clock)
        memory = [self.memory(m) for m in modules]
        found: dict[str, dict[str, float]] = {}
        for n, name in enumerate(self.modules, start=1):
            speeds = {"forward": forward[0] / forward[n], "forward_backward": both[0] / both[n]}
            found[name] = {f"{kind}_speed_up": speeds[kind] for kind in KINDS}
            found[name] |= {f"{kind}_efficiency": speeds[kind] / self.mac_ratio for kind in KINDS}
            found[name]["memory_ratio"] = memory[n] / memory[0]
        row: dict[str, object] = {
            "structure": self.label, "options": self.options, "widths": self.widths, "tokens": self.tokens,
            "macs": self.macs, "mac_ratio": self.mac_ratio,
            "dense": {"forward_seconds": forward[0], "forward_backward_seconds": both[0], "memory_bytes": memory[0]},
            "implementations": found, "absent": self.absent,
        }  # fmt: skip
        if self.device == "cuda":
            row["roofline"] = self.roofline(forward)
        return row

    def roofline(self, forward: Sequence[float]) -> dict[str, object]:
        """Bytes that a forward pass must move, and which part of the time the slower of bytes and MACs explains.

        Bandwidth and rate are those that a copy and a square product reach on this device in this run.
        """
        size = self.x.element_size()
        sides = sum(self.tokens * (a + b) for a, b in pairwise(self.widths))
        moved = size * (sides + sum(f.numel() for layer in self.layers for f in layer.factors))
        block = torch.empty(1 << 28, device=self.device, dtype=torch.uint8)
        square = torch.randn(8192, 8192, device=self.device, dtype=self.x.dtype)
        copied, product = medians([lambda: block.clone(), lambda: square @ square], 5, self.device)
        floor = max(moved * copied / (2 * block.numel()), self.macs * self.tokens * product / 8192**3)
        fractions = {name: floor / seconds for name, seconds in zip(self.modules, forward[1:], strict=True)}
        return {"bytes": moved, "floor_seconds": floor, "fraction_of_floor": fractions}


def table(rows: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
    """Efficiency (and speed-up) of each implementation: forward, forward + backward; memory relative to dense."""
    head = ["structure", "shape", "tokens", "MACs", *(f"{n} fwd | f+b | memory" for n in names)]
    cells = [head]
    for row in rows:
        shape = "-".join(map(str, row["widths"]))
        line = [str(row["structure"]), shape, str(row["tokens"]), f"1/{row['mac_ratio']:.1f}"]
        for name in names:
            found = row["implementations"].get(name)
            line.append(
                "-" if found is None else
                f"{found['forward_efficiency']:.2f} (x{found['forward_speed_up']:.1f}) | "
                f"{found['forward_backward_efficiency']:.2f} (x{found['forward_backward_speed_up']:.1f}) | "
                f"{found['memory_ratio']:.2f}"
            )  # fmt: skip
        cells.append(line)
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def report(result: dict) -> str:
    """What the documentation shows of a result."""
    names = dict.fromkeys(name for row in result["rows"] for name in row["implementations"])
    return table(result["rows"], list(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024], help="d of the layers d -> d")
    parser.add_argument("--ffn", type=int, nargs="*", default=[], help="d of the pairs d -> 4d -> d")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=list(STRUCTURES))
    parser.add_argument(
        "--implementations", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS),
        help="structlin is always measured",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"],
        help="cpu: time on cores, for one thread on a machine that others use too",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="where to write the JSON result; rows are added as they are measured")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if arguments.clock == "cpu" and (arguments.device == "cuda" or arguments.threads > 1):
        parser.error("--clock cpu is for --device cpu with --threads 1: it adds up the time of all threads")
    torch.set_num_threads(arguments.threads)
    names = list(dict.fromkeys(["structlin", *arguments.implementations]))
    setting = {k: getattr(arguments, k) for k in ("device", "dtype", "threads", "repeats", "clock")}
    setting["memory_kept"] = keep_memory()
    rows: list[dict[str, object]] = []
    for tokens in arguments.tokens:
        for widths in [(d, d) for d in arguments.sizes] + [(d, 4 * d, d) for d in arguments.ffn]:
            for label in arguments.structures:
                row = Row(label, widths, tokens, arguments.device, getattr(torch, arguments.dtype))
                for name in names:
                    row.add(name)
                rows.append(row.measure(arguments.repeats, arguments.clock))
                shown = [n for n in names if n in row.modules]
                print(table(rows[-1:], shown), flush=True)
                if arguments.out:
                    result = {"setting": setting, "machine": machine(arguments.device), "rows": rows}
                    _write(arguments.out, json.dumps(result, indent=1) + "\n")
    print("\n" + table(rows, names))


def _write(path: Path, text: str) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
