"""Code is freed with the structures that it was compiled for."""

import ctypes
import gc
import subprocess
import sys
import weakref

import pytest
import torch

import structlin as sl
from structlin import execution
from structlin.execution._kept import STRUCTURES
from structlin.execution.compiled._program import make_program
from structlin.execution.compiled._target import host
from structlin.execution.compiled.passes import FusedChain
from structlin_nn.torch import StructuredLinear

HOST = host()
pytestmark = pytest.mark.skipif(HOST is None, reason="nothing is compiled here")


def test_code_is_freed_with_the_last_reference():
    """At once, not when cycles of references are looked for."""
    structure = sl.design("monarch", (48, 48), blocks=4)
    sizes = (structure.steps, structure.sizes, structure.d_in, structure.d_out)
    program = make_program.__wrapped__(*sizes, True, "float32", HOST)
    run, packing = program.forward(False, False), program.packing("forward", (0, 1))
    code = [weakref.ref(function.loaded) for function in (run.run, packing.run)]
    assert program.forward(False, False) is run
    gc.disable()
    try:
        del program, packing
        assert code[0]() is not None
        assert code[1]() is None
        del run
        assert code[0]() is None
    finally:
        gc.enable()


def run(number):
    """Both passes of a structure that no other number has."""
    structure = sl.Structure.parse("pa,pfra->frp; frp,ferp->fe", p=8, a=6 + number, f=8, r=2, e=9)
    factors = sl.random_factors(structure, seed=1, backend="torch", dtype=torch.float32)
    x, gy = torch.randn(64, structure.d_in), torch.randn(64, structure.d_out)
    chain = FusedChain(structure.steps, structure.sizes, structure.d_in, structure.d_out, True)
    y = chain.forward(x, factors)
    assert len(chain.backward(gy, x, factors, [True, True, True, False])) == 4
    return y


def run_layer(number):
    """A training step of a layer that no other number has, which is gone afterwards."""
    structure = sl.Structure.parse("pa,pfra->frp; frp,ferp->fe", p=8, a=6 + number, f=8, r=2, e=9)
    layer = StructuredLinear(8 * (6 + number), 72, structure=structure)
    with execution.using("compiled"):
        layer(torch.randn(64, layer.in_features)).square().mean().backward()


def resident():
    """Bytes of this process in memory, without what the C library keeps of freed memory."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def grow(run, least):
    """How much memory 120 structures leave behind, and how much 120 more after ``least`` of them."""
    torch.set_num_threads(1)
    run(0)
    found = [resident()]
    for numbers in (range(1, 1 + least), range(1 + least, 121 + least)):
        for number in numbers:
            run(number)
        gc.collect()
        found.append(resident())
    assert found[1] - found[0] < 60 << 20, found
    assert found[2] - found[1] < 6 << 20, found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_structures_leave_no_code_behind():
    """In a process of its own."""
    subprocess.run([sys.executable, "-P", __file__, "structures"], check=True, timeout=590)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_layers_leave_a_bounded_number_of_structures_behind():
    """Caches hold structures, but the code of the latest alone."""
    subprocess.run([sys.executable, "-P", __file__, "layers"], check=True, timeout=590)


if __name__ == "__main__":
    grow(*{"structures": (run, 120), "layers": (run_layer, STRUCTURES)}[sys.argv[1]])
