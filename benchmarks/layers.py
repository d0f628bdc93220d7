"""Structured layers against dense ones, plain einsums and the layers of other libraries: time and memory.

    python benchmarks/layers.py --out layers --plot layers.png
    python benchmarks/layers.py --sizes 1024 2304 --tokens 1 8 32 1024 --dtype bfloat16 --threads 2 --ways
    python benchmarks/layers.py --device cuda --dtype bfloat16 --sizes 4096 --ffn 4096 --out layers

In each row all implementations are timed in turn. The result has medians over rounds of the speed-up over
`torch.nn.Linear` (two of them for an FFN) and of the efficiency, which is the speed-up divided by the ratio of MACs,
dense to structured. Memory is the peak allocation of one forward and backward pass, with parameters, relative to dense.
Seconds and GFLOP/s (two operations for each MAC) are stored only for dense.

`--execution`, a policy of `structlin.execution`, determines the way that runs the layers. With `measure`, the ways are
tuned before a row is measured. Rates and timings are stored in a temporary folder, unless STRUCTLIN_CACHE is set.
`--ways` also times each way that can run the row, and compares the chosen way and the way with the smallest estimate
with the fastest one.

All layers have a bias. An implementation that is not installed, or does not have the structure, is left out of the row,
and the JSON file states the reason. torch-structured and tensorly-torch are measured if they are installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from _implementations import IMPLEMENTATIONS, AbsentError, build
from _measure import aligned, describe, keep_memory, machine, peak_memory, ratio, result_path, timings, write_result
from plot_layers import plot
from torch import nn

from structlin import execution
from structlin.execution import choice
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
KINDS = {"forward": 1, "forward_backward": 3}  # and dense products in each
DTYPES = ("float32", "float64", "bfloat16", "float16")
WAY = "way:"  # prefix of the name of a way that is measured as an implementation


class Row:
    """One structure at one shape: widths (d, d) is a layer, (d, 4d, d) two layers, one after the other."""

    def __init__(
        self, label: str, widths: tuple[int, ...], tokens: int, device: str, dtype: torch.dtype, compiled: bool
    ) -> None:
        self.label, self.widths, self.tokens, self.device, self.compiled = label, widths, tokens, device, compiled
        name, options = STRUCTURES[label]
        place = {"device": device, "dtype": dtype}
        pairs = list(pairwise(widths))
        torch.manual_seed(0)
        torch._dynamo.reset()
        self.dense = self._compile(nn.Sequential(*(nn.Linear(*pair, **place) for pair in pairs)))
        layers = [StructuredLinear(*pair, structure=name, **options, **place) for pair in pairs]
        self.x = torch.randn(tokens, widths[0], **place, requires_grad=True)
        self.gradient = torch.randn(tokens, widths[-1], **place)
        self.macs = sum(layer.structure.macs for layer in layers)
        self.dense_macs = sum(a * b for a, b in pairs)
        self.mac_ratio = self.dense_macs / self.macs
        self.layers, self.name, self.options = layers, name, options
        self.modules: dict[str, nn.Module] = {}
        self.absent: dict[str, str] = {}

    def _compile(self, module: nn.Module) -> nn.Module:
        return torch.compile(module, dynamic=False) if self.compiled else module

    def add(self, implementation: str) -> None:
        """Build an implementation, or record why it is missing."""
        try:
            module = self._compile(build(implementation, self.layers, self.name, self.options))
        except AbsentError as error:
            self.absent[implementation] = str(error)
            return
        if implementation.startswith("einsum"):
            with torch.no_grad():
                expected, got = nn.Sequential(*self.layers)(self.x).float(), module(self.x).float()
            error = ((got - expected).norm() / expected.norm()).item()
            if not error < (2e-2 if self.x.dtype.itemsize == 2 else 1e-4):
                raise AssertionError(f"{implementation} of {self.label} {self.widths}: relative error {error}")
        self.modules[implementation] = module

    def step(self, module: nn.Module) -> None:
        """Run the forward and the backward pass, with new gradients."""
        self.clear(module)
        module(self.x).backward(self.gradient)

    def clear(self, module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        self.x.grad = None

    def held(self, module: nn.Module) -> int:
        """Return the bytes of the parameters and of the input."""
        return sum(t.numel() * t.element_size() for t in (*module.parameters(), self.x))

    def memory(self, module: nn.Module) -> int:
        """Return the bytes in use at the peak of a step."""
        self.clear(module)
        most = peak_memory(lambda: self.step(module), self.device)
        self.clear(module)
        return self.held(module) + most

    def call(self, kind: str, module: nn.Module) -> None:
        if kind == "forward":
            with torch.no_grad():
                module(self.x)
        else:
            self.step(module)

    def measure(self, repeats: int, clock: str, ways: bool) -> dict[str, object]:
        """Return the row of the table."""
        found: dict[str, dict[str, float]] = {}
        dense: dict[str, float] = {}
        chosen: dict[str, dict[str, object]] = {}
        forward: dict[str, list[float]] = {}
        for kind, products in KINDS.items():
            problems = self.problems(kind)
            chosen[kind] = choices(problems)
            modules = {"dense": self.dense, **self.modules}
            if ways:
                modules |= {WAY + name: self.modules["structlin"] for name in able(problems)}
            seconds = timings(
                [partial(self.call, kind, module) for module in modules.values()], repeats, self.device, clock,
                [partial(execution.using, name.removeprefix(WAY)) if name.startswith(WAY) else nullcontext
                 for name in modules],
            )  # fmt: skip
            times = dict(zip(modules, seconds, strict=True))
            dense[f"{kind}_seconds"] = median = statistics.median(times["dense"])
            dense[f"{kind}_gflops"] = 2e-9 * products * self.dense_macs * self.tokens / median
            for name in list(times)[1:]:
                speed = ratio(times["dense"], times[name])
                found.setdefault(name, {})[f"{kind}_speed_up"] = speed
                found[name][f"{kind}_efficiency"] = speed / self.mac_ratio
            if ways:
                chosen[kind] |= against_best(times, chosen[kind])
            forward = forward or times
        memory = {name: self.memory(module) for name, module in modules.items() if not name.startswith(WAY)}
        for name in self.modules:
            found[name]["memory_ratio"] = memory[name] / memory["dense"]
        row: dict[str, object] = {
            "structure": self.label, "options": self.options, "widths": self.widths, "tokens": self.tokens,
            "macs": self.macs, "mac_ratio": self.mac_ratio, "ways": chosen,
            "dense": {**dense, "memory_bytes": memory["dense"]}, "implementations": found, "absent": self.absent,
        }  # fmt: skip
        if self.device == "cuda":
            row["roofline"] = self.roofline({name: statistics.median(forward[name]) for name in self.modules})
        return row

    def problems(self, kind: str) -> list[execution.Problem]:
        """Return the problems of the layers of this library, in order."""
        with execution.recording() as met:
            self.call(kind, self.modules["structlin"])
        return list(dict.fromkeys(met))

    def roofline(self, forward: Mapping[str, float]) -> dict[str, object]:
        """Return the bytes that a forward pass must move, and the lower bound on its time as a fraction of the time.

        Bandwidth and rate are those of a copy and of a square product on this device in this run.
        """
        size = self.x.element_size()
        sides = sum(self.tokens * (a + b) for a, b in pairwise(self.widths))
        moved = size * (sides + sum(f.numel() for layer in self.layers for f in layer.factors))
        block = torch.empty(1 << 28, device=self.device, dtype=torch.uint8)
        square = torch.randn(8192, 8192, device=self.device, dtype=self.x.dtype)
        copied, product = map(statistics.median, timings([lambda: block.clone(), lambda: square @ square], 5, "cuda"))
        floor = max(moved * copied / (2 * block.numel()), self.macs * self.tokens * product / 8192**3)
        fractions = {name: floor / seconds for name, seconds in forward.items()}
        return {"bytes": moved, "floor_seconds": floor, "fraction_of_floor": fractions}


def able(problems: Sequence[execution.Problem]) -> list[str]:
    """Return the ways that can run all of the problems."""
    names = [{c.way.name for c in choice.candidates(problem)} for problem in problems]
    return sorted(set.intersection(*names)) if names else []


def choices(problems: Sequence[execution.Problem]) -> dict[str, object]:
    """Return the chosen way of each layer, that of the smallest estimate, and the fastest one (None: not measured)."""
    found: dict[str, list[str | None]] = {"taken": [], "least_estimate": [], "least_measured": []}
    for problem in problems:
        found["taken"].append(choice.choose(problem).name)  # measures under the policy measure
        found["least_estimate"].append(choice.candidates(problem)[0].way.name)
        timed = choice.timings(problem)
        found["least_measured"].append(min(timed, key=timed.__getitem__) if timed else None)
    return dict(found)


def against_best(times: Mapping[str, Sequence[float]], chosen: Mapping[str, object]) -> dict[str, object]:
    """Return the fastest way, and the relative times of the chosen way and of the way with the smallest estimate.

    If the layers of a row have different ways, the whole row is compared, and the ratio for estimates that differ is
    not known.
    """
    medians = {name: statistics.median(seconds) for name, seconds in times.items() if name.startswith(WAY)}
    if not medians:
        return {}
    best = min(medians, key=medians.__getitem__)
    found: dict[str, object] = {"best": best.removeprefix(WAY)}
    for key, otherwise in (("taken", "structlin"), ("least_estimate", "")):
        (first, *others) = chosen[key]  # type: ignore[misc]
        name = WAY + first if {first} >= set(others) and WAY + first in times else otherwise
        found[f"{key}_to_best"] = ratio(times[name], times[best]) if name else None
    return found


def table(rows: Sequence[Mapping], names: Sequence[str]) -> str:
    """Format efficiency (and speed-up) of each implementation, forward and forward + backward, and relative memory."""
    cells = [["structure", "shape", "tokens", "MACs", "dense GFLOP/s", "way, time to best (by estimate)",
              *(f"{n} fwd | f+b | memory" for n in names)]]  # fmt: skip
    for row in rows:
        rates = [row["dense"].get(f"{kind}_gflops") for kind in KINDS]
        line = [
            row["structure"], "-".join(map(str, row["widths"])), str(row["tokens"]), f"1/{row['mac_ratio']:.1f}",
            "-" if None in rates else " | ".join(f"{rate:.3g}" for rate in rates),
            " | ".join(way_shown(row.get("ways", {}).get(kind, {})) for kind in KINDS),
        ]  # fmt: skip
        for name in names:
            found, parts = row["implementations"].get(name, {}), []
            for kind in KINDS:
                known = f"{kind}_efficiency" in found
                parts.append(f"{found[f'{kind}_efficiency']:.2f} (x{found[f'{kind}_speed_up']:.1f})" if known else "-")
            parts.append(f"{found['memory_ratio']:.2f}" if "memory_ratio" in found else "-")
            line.append(" | ".join(parts) if found else "-")
        cells.append(line)
    return aligned(cells)


def way_shown(chosen: Mapping) -> str:
    text = "+".join(dict.fromkeys(chosen.get("taken", ()))) or "-"
    shown = [chosen.get(f"{key}_to_best") for key in ("taken", "least_estimate")]
    return text if shown[0] is None else f"{text} {shown[0]:.2f} ({'-' if shown[1] is None else f'{shown[1]:.2f}'})"


def report(result: Mapping) -> str:
    """Format a result as the table of the documentation."""
    names = dict.fromkeys(name for row in result["rows"] for name in row["implementations"])
    return table(result["rows"], [name for name in names if not name.startswith(WAY)])


def missed(rows: Sequence[Mapping], key: str, most: float = 1.05) -> str:
    """Return in how many cases the chosen way takes at most ``most`` times as long as the fastest one."""
    found = [row["ways"][kind].get(f"{key}_to_best") for row in rows for kind in KINDS]
    known = [value for value in found if value is not None]
    return f"{sum(value <= most for value in known)} of {len(known)} at most {most:g}, most {max(known, default=1):.2f}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024], help="d of the layers d -> d")
    parser.add_argument("--ffn", type=int, nargs="*", default=[], help="d of the pairs d -> 4d -> d")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=list(STRUCTURES))
    parser.add_argument(
        "--implementations", nargs="*", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS),
        help="structlin is always measured",
    )  # fmt: skip
    parser.add_argument("--execution", default="measure", metavar="POLICY", help="compare, estimate, measure, or ways")
    parser.add_argument("--ways", action="store_true", help="measure every way that can run a row, too")
    parser.add_argument(
        "--compiled", action="store_true", help="all modules under torch.compile, dense ones as well"
    )  # fmt: skip
    parser.add_argument("--keep-memory", action="store_true", help="make the process keep the memory that it frees")
    parser.add_argument("--repeats", type=int, default=9, help="rounds; fast functions are timed in more rounds")
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"],
        help="cpu: CPU time, for one thread on a machine with other processes",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="NAME", help="where to write the JSON result, after each row: a file, or a name in results/"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw the efficiencies")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    if arguments.clock == "cpu" and (arguments.device == "cuda" or arguments.threads > 1):
        parser.error("--clock cpu is for --device cpu with --threads 1: it adds up the time of all threads")
    if arguments.compiled and arguments.ways:
        parser.error("--ways cannot be combined with --compiled, because a compiler does not use ways")
    try:
        choice.policy_of(arguments.execution)
    except ValueError as error:
        parser.error(f"--execution: {error}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    os.environ["STRUCTLIN_EXECUTION"] = arguments.execution
    names = list(dict.fromkeys(["structlin", *arguments.implementations]))
    if arguments.compiled and "einsum" in names:
        names = [name for name in names if name != "einsum_compiled"]  # all modules are compiled
    options = ("device", "dtype", "threads", "repeats", "clock", "execution", "compiled")
    setting = {option: getattr(arguments, option) for option in options}
    setting["allocator"] = "keeps freed memory" if arguments.keep_memory and keep_memory() else "default"
    rows: list[dict] = []
    result = {"setting": setting, "machine": machine(arguments.device), "rows": rows}
    print(describe(result), flush=True)
    for tokens in arguments.tokens:
        for widths in [(d, d) for d in arguments.sizes] + [(d, 4 * d, d) for d in arguments.ffn]:
            for label in arguments.structures:
                dtype = getattr(torch, arguments.dtype)
                row = Row(label, widths, tokens, arguments.device, dtype, arguments.compiled)
                for name in names:
                    row.add(name)
                rows.append(row.measure(arguments.repeats, arguments.clock, arguments.ways))
                print(report({"rows": rows[-1:]}), flush=True)
                if arguments.out:
                    write_result(result_path(arguments.out, arguments.device), result)
    print("\n" + report(result))
    if arguments.ways:
        print("\ntime relative to the fastest way: " + missed(rows, "taken"))
        print("by estimate alone: " + missed(rows, "least_estimate"))
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("STRUCTLIN_CACHE", folder)  # results do not depend on earlier timings
        sys.exit(main())
