"""The code for each kind of processor: what it may use, how it rounds, and that it runs on such a processor.

Processors that this machine is none of are those of ``qemu-x86_64``, which runs one program as if on another.
"""

import ctypes
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

import structlin as sl
from structlin.execution.compiled import _arrange, _writer
from structlin.execution.compiled._arrange import Arrangement, load_copies
from structlin.execution.compiled._emit import Emitter, Memory
from structlin.execution.compiled._ir import Code
from structlin.execution.compiled._program import make_program
from structlin.execution.compiled._target import (
    AVX2,
    AVX512,
    AVX512_BF16,
    CompileError,
    _binding,
    _warned,
    host,
    load,
    parsed,
    supported,
    warn_once,
)

HOST = host()
pytestmark = pytest.mark.skipif(HOST is None, reason="nothing is compiled here")
TARGETS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": AVX512_BF16}
STRUCTURES = {
    "btt": sl.design("block_tensor_train", (256, 192), rank=2),
    "monarch": sl.design("monarch", (96, 128), blocks=4),
    "low_rank": sl.design("low_rank", (70, 66), rank=8),
    "kronecker": sl.Structure.parse("ab,ca->cb; cb,db->cd", a=8, b=10, c=7, d=9, d_in=77, d_out=61),  # padded, cut
}


def of_host(name):
    if not set(TARGETS[name].features) <= set(HOST.features):
        pytest.skip(f"this processor is not {name}")
    return TARGETS[name]


@pytest.mark.parametrize("name", TARGETS)
def test_processors_whose_features_are_switched_off(name):
    """The name of a processor switches nothing on that its features do not say."""
    features = dict.fromkeys(TARGETS[name].features, True)
    found = supported({**features, "avx512fp16": True}, "sapphirerapids")
    assert (found.width, found.registers, found.features) == (
        TARGETS[name].width, TARGETS[name].registers, TARGETS[name].features
    )  # fmt: skip
    assert found.half_products == (name == "avx512bf16")
    assert found.tune == "sapphirerapids"
    assert supported({**features, "fma": False}, "sapphirerapids") is None


@pytest.fixture
def texts(monkeypatch):
    """The functions that are compiled, as LLVM's intermediate language."""
    found = []
    for module in (_arrange, _writer):
        monkeypatch.setattr(module, "load", lambda text, *_: found.append(text))
    return found


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", TARGETS)
def test_instructions(name, structure, dtype, texts):
    """Only those that the target has, and no call of a function that a process may not have."""
    chain = STRUCTURES[structure]
    target = supported(dict.fromkeys(TARGETS[name].features, True), "sapphirerapids")
    for rows in (True, False) if dtype in ("float32", "float64") else (True,):
        program = make_program(chain.steps, chain.sizes, chain.d_in, chain.d_out, rows, dtype, target)
        steps = tuple(range(len(chain.steps)))
        program.forward(rows, True)
        program.backward((True, *(True for _ in steps), rows), False)
        for kind in ("forward", "back", "gradients"):
            program.packing(kind, steps)
    assert len(texts) >= 5
    wide = False
    for text in texts:
        machine, module = parsed(text, target)
        assembly = machine.emit_assembly(module)
        assert not re.search(r"^\s*(call|jmp)q?\s+(\*|\w+@PLT|__\w+)", assembly, re.MULTILINE)
        assert ("zmm" in assembly) <= (name != "avx2")
        wide |= ("ymm" if name == "avx2" else "zmm") in assembly
        assert ("bf16" in assembly) <= (name == "avx512bf16")
    assert wide


PATTERNS = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
ELEMENTS = {torch.float32: "float", torch.bfloat16: "bfloat", torch.float16: "half"}


def numbers():
    """float32 of every kind: random bits, halfway between two of bfloat16 and beside that, subnormal ones, NaN."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=generator)
    upper = bits >> 16 << 16
    small = bits & 0x807FFFFF  # no exponent
    special = torch.tensor([0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0x7F7FFFFF, 0x7F7F8000, 0, 1, 0x8000])
    every = torch.cat([bits, upper, upper + 0x7FFF, upper + 0x8000, upper + 0x8001, small, special, special | 1 << 31])
    return every.to(torch.int32).view(torch.float32)


def copied(source, element, target, dtype, lanes):
    """Converted number by number, or in vectors with a shorter last one."""
    made = torch.empty(source.shape, dtype=dtype)
    kinds = [ELEMENTS[kind] for kind in (source.dtype, dtype)]
    if lanes > 1:
        run = load_copies([(Arrangement(tuple(source.shape), (0,)), *kinds)], target, "float")
        run((ctypes.c_void_p * 2)(source.data_ptr(), made.data_ptr()), 0, 1, 1)
        return made
    code = Code()
    emitter = Emitter(code, target, "float", 0, 1)
    ends = [Memory(code.value(f"load ptr, ptr {code.at('ptr', '%table', k)}"), kinds[k]) for k in range(2)]
    code.loop(0, "%count", 1, lambda k, _: emitter.store_some(ends[1], k, emitter.load_some(ends[0], k, 1), 1))
    text = code.function("convert", "ptr %table, i64 %count", target.attributes)
    run = load(text, "convert", target, [ctypes.c_void_p, ctypes.c_int64])
    run((ctypes.c_void_p * 2)(source.data_ptr(), made.data_ptr()), len(source))
    return made


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("name", TARGETS)
def test_bfloat16_to_float32(name, lanes):
    target = of_host(name)
    for source in (PATTERNS, PATTERNS[:-3]):
        found = copied(source, "float", target, torch.float32, lanes)
        assert torch.equal(found.view(torch.int32), source.view(torch.int16).to(torch.int32) << 16)


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("name", TARGETS)
def test_float32_to_bfloat16(name, lanes):
    """As torch rounds; a NaN is a quiet one. AVX512-BF16 takes subnormal numbers for zero."""
    target, source = of_host(name), torch.cat([numbers(), PATTERNS.float()])
    found, expected = copied(source, "bfloat", target, torch.bfloat16, lanes), source.to(torch.bfloat16)
    nan = source.isnan()
    assert nan.any()
    assert (found[nan].view(torch.int16) & 0x7FC0 == 0x7FC0).all()
    if target.half_products:
        expected = torch.where(source.abs() < torch.finfo(torch.float32).tiny, source * 0, source).to(torch.bfloat16)
    assert torch.equal(found[~nan].view(torch.int16), expected[~nan].view(torch.int16))


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("name", TARGETS)
def test_float16(name, lanes):
    """Every number as torch converts it, and float32 as torch rounds it; numbers above 65519 become infinite."""
    target, patterns = of_host(name), PATTERNS.view(torch.float16)
    wide = copied(patterns[:-3], "float", target, torch.float32, lanes)
    torch.testing.assert_close(wide, patterns[:-3].float(), rtol=0, atol=0, equal_nan=True)
    near = patterns.float()
    between = (near[:-1] + near[1:]) / 2  # halfway: ties to even
    source = torch.cat([numbers(), near, between, torch.tensor([65519.0, 65520.0, -65520.0, 2.0**-25, 2.0**-24])])
    found, expected = copied(source, "half", target, torch.float16, lanes), source.to(torch.float16)
    assert torch.equal(found.isnan(), source.isnan())
    assert torch.equal(found[~source.isnan()].view(torch.int16), expected[~source.isnan()].view(torch.int16))


def test_what_llvm_does_not_compile():
    """What is wrong, what calls a function that there is not, and what has no such function."""
    absent = "declare void @absent_()\ndefine void @f() {\n call void @absent_()\n ret void\n}"
    for text in ("define void @f() {", absent):
        with pytest.raises(CompileError, match="'f'"):
            load(text, "f", HOST, [])
    with pytest.raises(CompileError, match="'g'"):
        load("define void @f() {\n ret void\n}", "g", HOST, [])


def test_a_broken_compiler_is_left_alone(monkeypatch):
    llvm = pytest.importorskip("llvmlite.binding")

    def broken():
        raise OSError("no such library")

    monkeypatch.setattr(llvm, "initialize_native_target", broken)
    assert _binding.__wrapped__() is None


def test_one_warning_for_the_process():
    _warned.cache_clear()
    error = CompileError("LLVM did not compile 'f': no memory")
    with pytest.warns(RuntimeWarning, match="'f': no memory. The BLAS runs instead"):
        warn_once(error, "The BLAS")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_once(error, "The BLAS")
    _warned.cache_clear()


SCRIPT = """
import sys
sys.modules["jax"] = None  # it needs AVX
import torch
import structlin as sl
from structlin._arrays import ops
from structlin.execution.compiled._target import host
from structlin.execution.compiled.passes import FusedChain
from structlin.execution.products import products

target = host()
assert str(target and target.width) == sys.argv[1], target
structures = {
    "btt": sl.design("block_tensor_train", (128, 96), rank=2),
    "monarch": sl.design("monarch", (96, 128), blocks=4),
    "low_rank": sl.design("low_rank", (70, 66), rank=8),
    "kronecker": sl.Structure.parse("ab,ca->cb; cb,db->cd", a=8, b=10, c=7, d=9, d_in=77, d_out=61),
}
tolerances = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 8e-3}
torch.set_num_threads(1)
for name, structure in structures.items():
    for dtype, tolerance in tolerances.items():
        factors = sl.random_factors(structure, seed=1, backend="torch", dtype=dtype)
        generator = torch.Generator().manual_seed(2)
        x, gy = (torch.randn(53, d, generator=generator).to(dtype) for d in structure.shape[::-1])
        doubles = [t.double().requires_grad_() for t in (x, *factors)]
        y = products(structure, doubles[1:], doubles[0], ops("torch"))
        wanted = (y, *torch.autograd.grad(y, doubles, gy.double()))
        if target is None:
            given = [t.requires_grad_() for t in (x, *factors)]
            y = structure.apply(given[1:], given[0])
            found = (y, *torch.autograd.grad(y, given, gy))
        else:
            chain = FusedChain(structure.steps, structure.sizes, structure.d_in, structure.d_out, True)
            needs = [True] * (1 + len(factors)) + [False]
            found = (chain.forward(x, factors), *chain.backward(gy, x, factors, needs)[:-1])
        for got, exact in zip(found, wanted, strict=True):
            assert got.dtype == dtype
            error = (got.double() - exact).norm() / exact.norm()
            assert error < tolerance, (name, dtype, error)
            print(name, dtype, float(error))
"""
QEMU = shutil.which("qemu-x86_64")


@pytest.mark.slow
@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed")
@pytest.mark.parametrize(("cpu", "width"), [("Haswell-noTSX", 32), ("EPYC-Rome", 32), ("Nehalem", None)])
def test_on_other_processors(cpu, width):
    """Both passes, on processors with AVX2 alone; without that, nothing is compiled and torch's own products run."""
    run = [QEMU, "-cpu", cpu, sys.executable, "-c", SCRIPT, str(width)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 * 3 * 4
