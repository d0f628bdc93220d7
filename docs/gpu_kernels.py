"""The table of compiled kernels in docs/gpu.md. It needs Triton, but no device.

python docs/gpu_kernels.py --write
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import structlin
from structlin.execution import fused
from structlin.execution.devices import Device, named
from structlin.execution.fused import _kernels

DOCUMENT = Path(__file__).parent / "gpu.md"
BEGIN, END = "<!-- made by docs/gpu_kernels.py -->", "<!-- end kernels -->"
ON = ("a100", "l40s", "h100", "b200")
# Label, structure, width, options, tokens, and whether it is the kernel for the gradient of x.
CASES: tuple[tuple[str, str, int, dict[str, Any], int, bool], ...] = (
    ("BTT 2, 4096", "block_tensor_train", 4096, {"rank": 2}, 1, False),
    ("BTT 2, 4096", "block_tensor_train", 4096, {"rank": 2}, 8, False),
    ("BTT 1, 1024", "block_tensor_train", 1024, {"rank": 1}, 65536, False),
    ("BTT 4, 1024", "block_tensor_train", 1024, {"rank": 4}, 65536, False),
    ("BTT 3, 768, gradient", "block_tensor_train", 768, {"rank": 3}, 65536, True),
    ("BTT 2, 4096", "block_tensor_train", 4096, {"rank": 2}, 65536, False),
    ("BTT 4, 4096", "block_tensor_train", 4096, {"rank": 4}, 65536, False),
    ("BTT 4, 4096, gradient", "block_tensor_train", 4096, {"rank": 4}, 65536, True),
    ("Monarch 16, 4096", "monarch", 4096, {"blocks": 16}, 65536, False),
    ("Monarch 16, 4096, gradient", "monarch", 4096, {"blocks": 16}, 65536, True),
)
BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_COUNTED = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "LDG.E.128", "STL", "LDL")


@dataclass(frozen=True)
class Compiled:
    """Resources of a kernel, and numbers of some instructions in its program."""

    registers: int
    stack: int
    shared: int
    limit: int
    instructions: dict[str, int]

    @property
    def tensor_cores(self) -> int:
        return sum(self.instructions[name] for name in ("HMMA", "HGMMA", "UTCHMMA"))

    @property
    def asynchronous(self) -> int:
        """Number of asynchronous copies from memory to shared memory."""
        return self.instructions["LDGSTS"] + self.instructions["UTMALDG"]

    @property
    def spills(self) -> int:
        return self.instructions["STL"] + self.instructions["LDL"]


def compiled(name: str, size: int, options: dict[str, Any], tokens: int, gradient: bool, device: Device,
             dtype: str = "bf16") -> Compiled | None:  # fmt: skip
    """Compile a kernel for a square chain with a bias, or for its gradient; return None if no tile fits."""
    form = fused.form_of(structlin.design(name, (size, size), **options))
    assert form is not None
    form = form.transposed() if gradient else form
    launch = fused.tiles(form, tokens, BITS[dtype] // 8, device)
    if launch is None:
        return None
    pointers = ("x_ptr", "l_ptr", "r_ptr", "bias_ptr", "y_ptr")
    signature = {**dict.fromkeys(pointers, f"*{dtype}"), **dict.fromkeys(("tokens", "d_in", "d_out", "x_row"), "i32")}
    kernel = _kernels.few_tokens if launch.few else _kernels.many_tokens
    if not launch.few:
        signature |= {"h_ptr": f"*{dtype}", "h_units": "i32", "slots": "i32", "counters": "*i32"}
    constants = {**fused.arguments(form, not gradient), **launch.constants}
    unaligned = ("tokens", "h_units", "slots")
    aligned = {(k,): [["tt.divisibility", 16]] for k, argument in enumerate(signature) if argument not in unaligned}
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, aligned)
    assert device.capability is not None
    target = GPUTarget("cuda", 10 * device.capability[0] + device.capability[1], 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = triton.compile(source, target=target, options={"num_warps": launch.warps, "num_stages": launch.stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        program = _tool("nvdisasm", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    counts = {one: len(re.findall(rf"\b{re.escape(one)}\b", program)) for one in _COUNTED}
    limit = fused.SHARED.get(device.capability, fused.LEAST_SHARED)
    return Compiled(int(found[1]), int(found[2]), made.metadata.shared, limit, counts)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def table() -> str:
    rows: list[Sequence[str]] = [
        ("kernel", "tokens", "compiled for", "registers", "spills", "shared memory, KB", "tensor cores", "async copies")
    ]
    for label, *case in CASES:
        tokens = case[3]
        for device in map(named, ON):
            made = compiled(*case, device)
            assert device.capability is not None
            place = f"sm_{device.capability[0]}{device.capability[1]}"
            if made is None:
                rows.append((label, f"{tokens}", place, "no tile fits", "", "", "", ""))
                continue
            names = [n for n in ("HMMA", "HGMMA", "UTCHMMA") if made.instructions[n]]
            cores = f"{made.tensor_cores} {', '.join(names)}".strip()
            rows.append((
                label, f"{tokens}", place, f"{made.registers}", f"{made.spills}",
                f"{made.shared / 1024:.0f} of {made.limit / 1024:.0f}", cores,
                f"{made.asynchronous}",
            ))  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table to docs/gpu.md instead of printing it")
    if not parser.parse_args().write:
        print(table())
        return
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    text = f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
