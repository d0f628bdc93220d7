"""The fused chain: its rule, its sizes, and its values in the interpreter and on CUDA."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import structlin
from structlin.execution import triton as _triton
from structlin.execution.triton import Sizes, Tiles, chain, fits, suits, tiles

CHAINS = [
    ("block_tensor_train", (35, 6), {"rank": 2}, Sizes(6, 35, p=3, a=2, f=5, r=2, e=7)),
    ("monarch", (44, 88), {"blocks": 2}, Sizes(88, 44, p=2, a=44, f=2, r=11, e=22)),
    ("monarch", (10, 7), {"blocks": 3}, Sizes(7, 10, p=3, a=3, f=3, r=1, e=4)),
    ("monarch", (44, 40), {"blocks": 4}, Sizes(40, 44, p=4, a=10, f=4, r=3, e=11)),
    ("monarch", (23, 14), {"blocks": 3}, Sizes(14, 23, p=3, a=5, f=3, r=2, e=8)),
]


def test_importing_it_does_not_import_the_kernels():
    code = "import sys, structlin.execution.triton; sys.exit('structlin.execution._triton_kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("name", "shape", "options", "sizes"), CHAINS)
def test_sizes_and_factors_of_the_chains(name, shape, options, sizes):
    """The one form that the kernels know, multiplied out without them; and its gradients."""
    structure = structlin.design(name, shape, **options)
    layout = _triton._layout(structure)
    assert layout.sizes == sizes
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(f.shape, generator=generator, dtype=torch.float64) for f in structure.factors]
    x = torch.randn(9, shape[1], generator=generator, dtype=torch.float64)
    g = torch.randn(9, shape[0], generator=generator, dtype=torch.float64)
    given = [t.requires_grad_() for t in (x, *factors)]
    expected = structure.apply(factors, x)
    w0, w1 = layout.factors(factors)
    xs = F.pad(x, (0, sizes.p * sizes.a - sizes.d_in)).view(9, sizes.p, sizes.a)
    y = torch.einsum("tpa,pfra,ferp->tfe", xs, w0, w1).reshape(9, -1)[:, : sizes.d_out]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, given, g), torch.autograd.grad(expected, given, g))
    gx, g0, g1 = _triton._differentiable_gradients(g, x, w0, w1, sizes)
    wanted = torch.autograd.grad(torch.einsum("tpa,pfra,ferp->tfe", xs, w0, w1).reshape(9, -1)[:, : sizes.d_out],
                                 [x, w0, w1], g)  # fmt: skip
    torch.testing.assert_close((gx, g0, g1), wanted)


def test_other_structures_are_refused():
    for name, shape, options in (
        ("low_rank", (8, 6), {"rank": 2}),
        ("kronecker", (8, 6), {}),
        ("block_tensor_train", (8, 12), {"cores": 3}),
        ("blast", (8, 12), {"blocks": 2, "rank": 2}),
        ("circulant", (8, 8), {}),
        ("butterfly", (8, 8), {}),
        ("dense", (8, 6), {}),
    ):
        structure = structlin.design(name, shape, **options)
        assert _triton._layout(structure) is None
        factors = [torch.zeros(f.shape) for f in structure.factors]
        with pytest.raises(ValueError, match="no fused product for"):
            chain(torch.zeros(2, structure.d_in), factors, structure)


def test_the_rule():
    square = Sizes(4096, 4096, 64, 64, 64, 1, 64)
    assert fits(square, 2, shared=227 * 1024)
    assert fits(Sizes(4096, 16384, 64, 64, 128, 1, 128), 2, shared=163 * 1024)
    assert not fits(square, 2, shared=16 * 1024), "no room"
    assert not fits(Sizes(4096, 4096, 4, 1024, 4, 256, 1024), 2, shared=227 * 1024), "large blocks"
    assert not fits(Sizes(2**16, 2**16, 512, 128, 512, 1, 128), 2, shared=227 * 1024), "too many readings of x"
    structure = structlin.design("block_tensor_train", (4096, 4096))
    assert not suits(structure, torch.ones(2, 4096)), "on a CPU"
    assert not suits(structure, torch.ones(2, 4096, device="meta"))


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 16, 40])
@pytest.mark.parametrize("block", [1, 16, 50, 128, 300])
def test_tiles_are_powers_that_tensor_cores_take(rank, block):
    tile = tiles(Sizes(7 * block, 9 * block, 7, block, 9, rank, block))
    sizes = [getattr(tile, axis) for axis in "tpafre"]
    assert all(n & (n - 1) == 0 for n in sizes)
    assert min(tile.t, tile.a, tile.e, tile.f * tile.r, tile.p * tile.r) >= 16
    assert isinstance(tile, Tiles)


def test_shares_cover_all_tokens():
    for tokens in (0, 1, 15, 16, 17, 255, 256, 257, 5000):
        for blocks in (1, 3, 100):
            share, count = _triton.shares(tokens, blocks, 16, torch.device("cpu"))
            assert share * (count - 1) < tokens <= share * count or tokens == count == 0
            assert share % 16 == 0


def test_bad_input():
    structure = structlin.design("block_tensor_train", (35, 6), rank=2)
    factors = [torch.zeros(f.shape) for f in structure.factors]
    with pytest.raises(ValueError, match="must have size 6"):
        chain(torch.zeros(2, 7), factors, structure)
    with pytest.raises(ValueError, match="one dtype of"):
        chain(torch.zeros(2, 6).half(), factors, structure)
    with pytest.raises(ValueError, match="one dtype of"):
        chain(torch.zeros(2, 6).double(), [f.double() for f in factors], structure)
    with pytest.raises(ValueError, match=r"bias must have shape \(35,\)"):
        chain(torch.zeros(2, 6), factors, structure, torch.zeros(6))
    with pytest.raises(ValueError, match="factor W0 of"):
        chain(torch.zeros(2, 6), [factors[0][:, :, :1], factors[1]], structure)
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(ValueError, match="CUDA tensors are needed"):
            chain(torch.zeros(2, 6), factors, structure)


@pytest.mark.slow
def test_in_the_interpreter():
    pytest.importorskip("triton")
    cases = Path(__file__).with_name("interpreted_triton.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 28
    assert "skipped" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_devices_within_the_shared_memory_stated(capability):
    """Without a device: to machine code, tensor cores included."""
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.backends.compiler")
    from structlin.execution import _triton_kernels as kernels

    if kernels.INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    target = compiler.GPUTarget("cuda", capability, 32)
    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    for rank, block in ((1, 128), (4, 64)):
        for dtype, kind in types.items():
            tile = tiles(Sizes(64 * block, 64 * block, 64, block, 64, rank, block))
            for kernel in (kernels.forward_kernel, kernels.gradient_kernel):
                options = tile.keywords()
                held = {k: options.pop(k) for k in ("num_warps", "num_stages")}
                options |= {"UPCAST": False, "PRECISION": "ieee"}
                options |= {"BIAS": True} if kernel is kernels.forward_kernel else {}
                pointers = dict.fromkeys(("x", "w0", "w1", "bias", "y", "g"), kind) | {"out": "*fp32"}
                signature = {n: "constexpr" if n in options else pointers.get(n, "i32") for n in kernel.arg_names}
                source = triton.compiler.ASTSource(kernel, signature, constexprs=options)
                made = triton.compile(source, target=target, options=held)
                assert made.metadata.shared <= tile.shared_bytes(dtype.itemsize)
                assert ("mma.sync" in made.asm["ptx"]) == (dtype == torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [(n, s, o) for n, s, o, _ in CHAINS]
    + [
        ("block_tensor_train", (1024, 768), {"rank": 1}),
        ("block_tensor_train", (768, 3072), {"rank": 4}),
        ("block_tensor_train", (4096, 4096), {"rank": 1}),
        ("block_tensor_train", (300, 210), {"rank": 16}),
    ],
)
@pytest.mark.parametrize("tokens", [1, 37, 1000])
def test_on_cuda_against_float64(name, shape, options, tokens, dtype, monkeypatch):
    pytest.importorskip("triton")
    structure = structlin.design(name, shape, **options)
    monkeypatch.setenv("STRUCTLIN_TRITON", "1")
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=generator, device="cuda")).to(dtype).requires_grad_()

    factors = [normal(*f.shape, scale=f.fan_in**-0.5) for f in structure.factors]
    x, bias, g = normal(tokens, shape[1]), normal(shape[0]), normal(tokens, shape[0]).detach()
    assert suits(structure, x)
    with FlopCounterMode(display=False):
        assert not suits(structure, x), "operations are counted"
    monkeypatch.delenv("STRUCTLIN_TRITON")
    assert not suits(structure, x), "by default"
    y = chain(x, factors, structure, bias)
    found = [y, *torch.autograd.grad(y, [x, *factors, bias], g, retain_graph=True)]
    again = torch.autograd.grad(y, [x, *factors, bias], g)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], again, strict=True))
    inputs = [t.detach().double().requires_grad_() for t in (x, *factors, bias)]
    exact = structure.apply(inputs[1:-1], inputs[0]) + inputs[-1]
    expected = [exact, *torch.autograd.grad(exact, inputs, g.double())]
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    for value, wanted in zip(found, expected, strict=True):
        assert ((value.double() - wanted).norm() / wanted.norm()).item() < limit
