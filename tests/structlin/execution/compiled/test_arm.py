"""The code for 64-bit Arm: no calls of functions that a process may not have, and, under qemu, right numbers.

A program in C (``run_table.c``) that is compiled and linked for Arm runs the copies and both passes.
"""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import structlin as sl
from structlin._arrays import ops
from structlin.execution.compiled import _arrange, _writer
from structlin.execution.compiled._program import make_program
from structlin.execution.compiled._target import NEON, TARGETS, supported
from structlin.execution.products import products

TRIPLE = "aarch64-unknown-linux-gnu"
COMPILER, QEMU = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
STRUCTURES = {
    "btt": sl.design("block_tensor_train", (128, 96), rank=2),
    "monarch": sl.design("monarch", (96, 128), blocks=4),
    "low_rank": sl.design("low_rank", (70, 66), rank=8),
    "kronecker": sl.Structure.parse("ab,ca->cb; cb,db->cd", a=8, b=10, c=7, d=9, d_in=77, d_out=61),  # padded, cut
}
TOLERANCE = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 8e-3, "float16": 1e-3}
TOKENS = 53


@pytest.fixture(scope="module")
def llvm():
    found = pytest.importorskip("llvmlite.binding")
    try:
        found.initialize_all_targets()
        found.initialize_all_asmprinters()
        found.Target.from_triple(TRIPLE)
    except RuntimeError:
        pytest.skip("this build of LLVM does not compile for Arm")
    return found


@pytest.fixture
def texts(monkeypatch):
    """The functions that are compiled, as LLVM's intermediate language, each with its name."""
    found = []
    for module in (_arrange, _writer):
        monkeypatch.setattr(module, "load", lambda text, name, *_: found.append((text, name)) or len(found) - 1)
    return found


def made(structure, dtype, rows):
    """The program and the numbers of its functions: both passes, and the three kinds of copies."""
    program = make_program.__wrapped__(
        structure.steps, structure.sizes, structure.d_in, structure.d_out, rows, dtype, NEON
    )
    steps = tuple(range(len(structure.steps)))
    forward, backward = program.forward(False, False), program.backward((True, *(True for _ in steps), False), False)
    return program, forward, backward, {k: program.packing(k, steps) for k in ("forward", "back", "gradients")}


def compiled(llvm, text, kind):
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(cpu=NEON.cpu, opt=3)
    module = llvm.parse_assembly(f'target triple = "{TRIPLE}"\n{text}', llvm.create_context())
    module.verify()
    return getattr(machine, kind)(module)


def test_architectures():
    """On Arm the instructions that all processors have, whatever more there are."""
    found = supported({"neon": True, "sve": True}, "neoverse-v2", TARGETS["aarch64"])
    assert (found.width, found.features, found.tune) == (16, (), "neoverse-v2")
    assert TARGETS["arm64"] == TARGETS["aarch64"]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_instructions(llvm, texts, dtype):
    for structure in STRUCTURES.values():
        made(structure, dtype, True)
    for text, _ in texts:
        assembly = compiled(llvm, text, "emit_assembly")
        assert not re.findall(r"^\s*(?:bl|b)\s+_*[a-zA-Z]\w*", assembly, re.MULTILINE)
    assert any("fmla" in compiled(llvm, text, "emit_assembly") for text, _ in texts)


def numbers(tensor):
    return tensor.view(torch.int16 if tensor.dtype is torch.bfloat16 else tensor.dtype).numpy().tobytes()


class Job:
    """Buffers, and calls of functions on them."""

    def __init__(self):
        self.buffers, self.calls = [], []

    def buffer(self, content):
        """The number of a buffer with these bytes, or of so many zeros."""
        self.buffers.append(bytes(content))
        return len(self.buffers) - 1

    def call(self, function, table, *rest):
        self.calls.append((function, len(table), *table, *rest))

    def packed(self, packing, originals, sizes):
        """The buffers of copies, of these sizes, and the table of originals and copies."""
        copies = [
            self.buffer(size) if copied else held
            for copied, held, size in zip(packing.sizes, originals, sizes, strict=True)
        ]
        return copies, [k for pair in zip(originals, copies, strict=True) if pair[0] != pair[1] for k in pair]

    def copy(self, packing, table):
        if table:
            self.call(packing.run, table, 0, 1, 1)

    def write(self, path):
        words = [len(self.buffers), *map(len, self.buffers)]
        after = [len(self.calls), *(word for call in self.calls for word in call)]
        path.write_bytes(
            struct.pack(f"<{len(words)}q", *words) + b"".join(self.buffers) + struct.pack(f"<{len(after)}q", *after)
        )


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="gcc for 64-bit Arm is not installed")
@pytest.mark.skipif(QEMU is None, reason="qemu-aarch64 is not installed")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_on_arm(llvm, texts, dtype, tmp_path):
    """Both passes, with all copies, against float64; for rows and, but in 16 bits, for columns."""
    job, expected = Job(), []
    for structure in STRUCTURES.values():
        for rows in (True, False) if dtype in ("float32", "float64") else (True,):
            program, forward, backward, packings = made(structure, dtype, rows)
            factors = sl.random_factors(structure, seed=1, backend="torch", dtype=dtype)
            generator = torch.Generator().manual_seed(2)
            x, gy = (torch.randn(TOKENS, d, generator=generator).to(factors[0].dtype) for d in structure.shape[::-1])
            turned = (lambda t: t) if rows else (lambda t: t.mT.contiguous())
            own = [job.buffer(numbers(f)) for f in factors]
            ends = [job.buffer(numbers(turned(t))) for t in (x, gy)]
            y, gx = (job.buffer(t.numel() * t.itemsize) for t in (gy, x))
            ahead, table = job.packed(packings["forward"], own, packings["forward"].sizes)
            job.copy(packings["forward"], table)
            back, table = job.packed(packings["back"], own, packings["back"].sizes)
            job.copy(packings["back"], table)
            scratch = job.buffer(max(forward.scratch, backward.scratch))
            job.call(forward.run, [ends[0], y, scratch, *ahead], 0, TOKENS, TOKENS)
            grads = [job.buffer(f.numel() * f.itemsize) for f in factors]
            sizes = [f.numel() * program.size for f in factors]
            sums, table = job.packed(packings["gradients"], grads, sizes)
            job.call(backward.run, [*ends, scratch, gx, *back, *sums, *ahead[:-1]], 0, TOKENS, TOKENS)
            pairs = zip(table[1::2], table[::2], strict=True)  # from the sums to the gradients
            job.copy(packings["gradients"], [k for pair in pairs for k in pair])
            doubles = [t.double().requires_grad_() for t in (x, *factors)]
            exact = products(structure, doubles[1:], doubles[0], ops("torch"))
            wanted = (exact.detach(), *torch.autograd.grad(exact, doubles, gy.double()))
            expected += [
                (place, turned(want) if k < 2 else want)
                for k, (place, want) in enumerate(zip((y, gx, *grads), wanted, strict=True))
            ]
    objects = []
    for number, (text, name) in enumerate(texts):
        objects.append(tmp_path / f"f{number}.o")
        objects[-1].write_bytes(compiled(llvm, text.replace(f"@{name}(", f"@f{number}("), "emit_object"))
    names = [f"f{k}" for k in range(len(texts))]
    (tmp_path / "functions.c").write_text(
        "typedef void function(void **, long, long, long);\n"
        f"extern function {', '.join(names)};\nfunction *const functions[] = {{{', '.join(names)}}};\n"
    )
    program = tmp_path / "run_table"
    sources = [Path(__file__).with_name("run_table.c"), tmp_path / "functions.c"]
    subprocess.run([COMPILER, "-static", "-O1", "-o", program, *sources, *objects], check=True)
    job.write(tmp_path / "job")
    subprocess.run([QEMU, program, tmp_path / "job"], check=True, timeout=300)
    content, start, held = (tmp_path / "job.out").read_bytes(), 0, []
    for buffer in job.buffers:
        held.append(content[start : start + len(buffer)])
        start += len(buffer)
    for place, want in expected:
        kind = {"float32": np.float32, "float64": np.float64, "bfloat16": np.int16, "float16": np.float16}[dtype]
        found = torch.from_numpy(np.frombuffer(held[place], kind).copy())
        found = (found.view(torch.bfloat16) if dtype == "bfloat16" else found).double().view(want.shape)
        assert (found - want).norm() <= TOLERANCE[dtype] * want.norm()
