"""The tables of docs/gpu.md: kernels, bytes and times of the ways on GPUs, predicted by the traffic model.

python docs/gpu_tables.py --write
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlin
from structlin.execution import choice
from structlin.execution.choice import Problem
from structlin.execution.devices import DEVICES
from structlin.execution.torch_cuda import fused_way, strided_l2_way, strided_way
from structlin.execution.traffic import ceiling, fastest, predict

DOCUMENT = Path(__file__).parent / "gpu.md"
D, TOKENS, DTYPE = 4096, 65536, "bfloat16"
GRAPH = 1.5e-6  # assumed seconds from one kernel to the next in a CUDA graph
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "BTT 1": ("block_tensor_train", {"rank": 1}),
    "BTT 2": ("block_tensor_train", {"rank": 2}),
    "BTT 4": ("block_tensor_train", {"rank": 4}),
    "Monarch 16": ("monarch", {"blocks": 16}),
    "Monarch 4": ("monarch", {"blocks": 4}),
    "low rank 512": ("low_rank", {"rank": 512}),
}
WAYS = ("strided", "strided-l2", "products", "token_major")


def problem(name: str, options: dict[str, Any], train: bool = False) -> Problem:
    return Problem(structlin.design(name, (D, D), **options), True, "torch", "cuda", DTYPE, TOKENS, 1, train)


def ways() -> list[Sequence[str]]:
    """Return kernels, bytes per token, and efficiency, eager and in a graph, of each structure and way on an H100."""
    eager = DEVICES["h100"]
    graph = replace(eager, launch=GRAPH)
    rows: list[Sequence[str]] = [
        ("structure", "way", "kernels", "memory, KB a token", "L2, KB a token", "efficiency", "in a CUDA graph")
    ]
    known = {way.name: way for way in choice.ways("torch")}
    for label, (name, options) in CASES.items():
        asked = problem(name, options)
        macs = asked.structure.macs * TOKENS
        for way in WAYS:
            if not known[way].supports(asked):
                continue
            found = predict(known[way], asked, eager, bias=False)
            again = predict(known[way], asked, graph, bias=False)
            sizes = [f"{size / TOKENS / 1024:.0f}" for size in (found.memory_bytes, found.l2_bytes)]
            rows.append((label, f"`{way}`", f"{len(found.kernels)}", *sizes, f"{found.efficiency(macs):.2f}",
                         f"{again.efficiency(macs):.2f}"))  # fmt: skip
        least = ceiling(asked, eager)
        size = f"{least.memory_bytes / TOKENS / 1024:.0f}"
        part = f"{least.efficiency(macs):.2f}"
        rows.append((label, "one perfect kernel", "1", size, size, part, part))
    return rows


def devices() -> list[Sequence[str]]:
    """Return the milliseconds of a training step of a layer by its fastest way, and the ratio to a dense layer."""
    rows: list[Sequence[str]] = [("structure", *(device.name.removeprefix("NVIDIA ") for device in DEVICES.values()))]
    dense = {key: fastest(problem("dense", {}, True), device)[1].seconds for key, device in DEVICES.items()}
    rows.append(("dense", *(f"{1e3 * seconds:.1f}" for seconds in dense.values())))
    for label, (name, options) in CASES.items():
        cells = []
        for key, device in DEVICES.items():
            way, found = fastest(problem(name, options, True), device)
            cells.append(f"{1e3 * found.seconds:.2f} `{way.name}` ({found.seconds / dense[key]:.2f})")
        rows.append((label, *cells))
    return rows


def kernels() -> list[Sequence[str]]:
    """Return microseconds and KB of L2 per token of the ways and the kernels in Triton; then those with gradients."""
    rows: list[Sequence[str]] = [
        ("structure", "d", "tokens", "`strided`", "`strided-l2`", "`fused`", "step: `strided`", "step: `fused`")
    ]
    for label in ("BTT 1", "BTT 2", "BTT 4", "Monarch 16"):
        name, options = CASES[label]
        for size in (1024, 2048, 4096):
            structure = structlin.design(name, (size, size), **options)
            for tokens in (1, TOKENS):
                cells = []
                passes = (strided_way, False), (strided_l2_way, False), (fused_way, False)
                for way, train in (*passes, (strided_way, True), (fused_way, True)):
                    asked = Problem(structure, True, "torch", "cuda", DTYPE, tokens, 1, train)
                    if not way.fits(asked, DEVICES["h100"]) or (train and tokens == 1):
                        cells.append("-")
                        continue
                    found = predict(way, asked, "h100")
                    cells.append(f"{1e6 * found.seconds:.0f} ({found.l2_bytes / tokens / 1024:.0f})")
                rows.append((label, f"{size}", f"{tokens}", *cells))
    return rows


TABLES: dict[str, Callable[[], list[Sequence[str]]]] = {"ways": ways, "devices": devices, "kernels": kernels}


def markdown(rows: list[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def written(text: str) -> str:
    """Return the document with new tables."""
    for name, rows in TABLES.items():
        begin, end = (
            f"<!-- made by docs/gpu_tables.py: {name} -->",
            f"<!-- end {name} -->" if name != "kernels" else "<!-- end kernels table -->",
        )
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{markdown(rows())}\n\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables to docs/gpu.md instead of printing them")
    if parser.parse_args().write:
        DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(markdown(rows()) for rows in TABLES.values()))


if __name__ == "__main__":
    main()
