"""Kernels in Triton: in the interpreter against float64, and compiled for devices that are not here."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import structlin
from structlin import execution
from structlin.execution import choice, fused, traffic
from structlin.execution.choice import Problem
from structlin.execution.torch_cuda import fused_way, strided_way

WITHOUT = "Triton is not installed; torch for CUDA installs it"


def test_which_chains_have_the_form() -> None:
    form = fused.form_of(structlin.design("block_tensor_train", (35, 24), rank=3))
    assert form is not None
    assert form.sizes == (4, 6, 5, 7, 3)  # a, b, c, d, e
    assert form.left == (5 * 3 * 4, 3 * 4, 4, 1)
    assert form.right == (7 * 3 * 6, 3 * 6, 6, 1)
    assert fused.form_of(structlin.design("monarch", (45, 27), blocks=3)) is not None
    for name, options in (("low_rank", {"rank": 3}), ("kronecker", {}), ("tensor_train", {"rank": 2, "cores": 3})):
        assert fused.form_of(structlin.design(name, (64, 64), **options)) is None
    assert fused.form_of(structlin.design("monarch", (30, 48), blocks=3)) is None  # regroups between the steps


@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 65536])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [64, 768, 1024, 4096])
def test_tiles(size: int, rank: int, tokens: int) -> None:
    """Products on tensor cores have sizes of 16 or more, and all operands fit where they are kept."""
    form = fused.form_of(structlin.design("block_tensor_train", (size, size), rank=rank))
    assert form is not None
    a, b, c, d, e = form.sizes
    for shared in (99 << 10, 227 << 10):
        found = fused.tiles(form, tokens, 2, 132, shared)
        if found is None:
            assert size == 4096
            continue
        sizes = found.constants
        assert found.few == (tokens <= fused.FEW)
        if found.few:
            assert sizes["T"] >= tokens
            assert found.grid == (c, math.ceil(d / sizes["BLOCK_D"]))
            continue
        assert sizes["BLOCK_C"] * sizes["BLOCK_E"] >= 16
        assert sizes["BLOCK_B"] * sizes["BLOCK_E"] >= 16
        assert min(sizes["BLOCK_A"], sizes["BLOCK_D"]) >= 16
        assert sizes["BLOCK_A"] >= a
        assert sizes["BLOCK_D"] >= d
        assert sizes["BLOCK_E"] >= e
        assert found.x_reads == math.ceil(c / sizes["BLOCK_C"])
        assert found.left_reads == math.ceil(tokens / sizes["BLOCK_T"])
        assert found.grid[0] <= 132
        assert found.macs >= form.sizes[4] * tokens * (a * b * c + b * c * d)


def test_the_model_knows_the_traffic_of_the_kernels() -> None:
    """x is read for each group of c, and the factors for each tile of tokens."""
    structure = structlin.design("block_tensor_train", (1024, 1024), rank=2)
    asked = Problem(structure, True, "torch", "cuda", "bfloat16", 65536, 1, False)
    found = traffic.predict(fused_way, asked, "h100", bias=False)
    (kernel,) = found.kernels
    launch = fused.tiles(fused.form_of(structure), 65536, 2, 132, 227 << 10)  # type: ignore[arg-type]
    assert launch is not None
    x, factors = 65536 * 1024 * 2, structure.num_params * 2
    assert kernel.read == launch.x_reads * x + launch.left_reads * factors
    assert kernel.written == x
    assert found.memory_bytes == 2 * x + factors
    trained = Problem(structure, True, "torch", "cuda", "bfloat16", 65536, 1, True)
    names = [k.name for k in traffic.predict(fused_way, trained, "h100", bias=False).kernels]
    assert names[0] == "fused"
    assert names.count("bmm") == 5  # what is between the steps is computed again


def test_no_measurement_no_default() -> None:
    """The kernels are named by a policy or not taken."""
    structure = structlin.design("block_tensor_train", (1024, 1024), rank=2)
    asked = Problem(structure, True, "torch", "cuda", "bfloat16", 65536, 1, False)
    assert choice.way_of(asked) is not fused_way
    assert fused_way not in [c.way for c in choice.candidates(asked)]
    with execution.using("fused,strided"):
        assert choice.way_of(asked) is (fused_way if fused.has_triton() else strided_way)


# -- in the interpreter ------------------------------------------------------------------------------------------------


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
def test_in_the_interpreter() -> None:
    """Runs the class below in a process of its own: Triton decides when it is imported whether it interprets."""
    if not fused.has_triton():
        pytest.skip(WITHOUT)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "TestInterpreter", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


def operands(structure: Any, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """The input, the bias and the factors."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(tokens, structure.d_in), (structure.d_out,), *(f.shape for f in structure.factors)]
    scales = [1.0, 1.0, *(1 / math.sqrt(f.fan_in) for f in structure.factors)]
    return [(s * torch.randn(shape, generator=generator)).to(dtype) for s, shape in zip(scales, shapes, strict=True)]


def by_einsum(structure: Any, x: Tensor, factors: list[Tensor], bias: Tensor | None) -> Tensor:
    """In float64, step by step."""
    sizes, y = dict(structure.sizes), x.double()
    y = torch.nn.functional.pad(y, (0, structure.padding[0]))
    for step, factor in zip(structure.steps, factors, strict=True):
        y = y.reshape(len(y), *(sizes[a] for a in step.input))
        y = torch.einsum(f"...{step.input},{step.factor}->...{step.output}", y, factor.double())
    y = y.reshape(len(y), -1)[:, : structure.d_out]
    return y if bias is None else y + bias.double()


def chain(a: int, b: int, c: int, d: int, e: int) -> Any:
    return structlin.Structure.parse("ba,bcea->ceb; ceb,cdeb->cd", a=a, b=b, c=c, d=d, e=e)


SIZES = [(4, 6, 5, 7, 3), (8, 8, 8, 8, 1), (33, 3, 2, 17, 2), (5, 9, 20, 3, 4), (20, 5, 3, 40, 20)]


@pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
class TestInterpreter:
    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("tokens", [1, 7, 70])
    @pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2.0**-23), (torch.float16, 2.0**-11)])
    def test_values(self, sizes: tuple[int, ...], tokens: int, dtype: torch.dtype, eps: float) -> None:
        structure = chain(*sizes)
        x, bias, *factors = operands(structure, tokens, dtype)
        form = fused.form_of(structure)
        assert form is not None
        launch = fused.tiles(form, tokens, x.element_size(), 3, 227 << 10)
        assert launch is not None
        for b in (bias, None):
            y = fused.run(form, launch, x, *factors, b)
            wanted = by_einsum(structure, x, factors, b)
            assert y.dtype is dtype
            assert (y.double() - wanted).norm() <= 2 * eps * wanted.norm()

    @pytest.mark.parametrize("tokens", [3, 33])
    def test_monarch_and_padding(self, tokens: int) -> None:
        for shape in ((45, 27), (44, 26)):
            structure = structlin.design("monarch", shape, blocks=3)
            assert structure.padding == (45 - shape[0], 27 - shape[1])
            x, bias, *factors = operands(structure, tokens, torch.float32)
            y = fused_way.run(structure, factors, x, bias, True)
            torch.testing.assert_close(y.double(), by_einsum(structure, x, factors, bias), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("tokens", [3, 33])
    def test_rows_apart_and_columns_apart(self, tokens: int) -> None:
        structure = chain(4, 6, 5, 7, 3)
        wide, bias, *factors = operands(structure, tokens, torch.float32)
        room = torch.full((tokens, 50), math.nan)
        room[:, 3:27] = wide
        for x in (room[:, 3:27], wide.T.contiguous().T):
            y = fused_way.run(structure, factors, x, bias, True)
            torch.testing.assert_close(y.double(), by_einsum(structure, wide, factors, bias), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("tokens", [2, 9])
    def test_offsets_beyond_32_bits(self, tokens: int) -> None:
        """Rows so far apart that the last ones are more than 2^31 numbers away. Only their pages are touched."""
        structure = chain(4, 6, 5, 7, 3)
        wide, bias, *factors = operands(structure, tokens, torch.float16)
        apart = (1 << 31) // (tokens - 1) + 8
        try:
            room = torch.empty(apart * (tokens - 1) + 24, dtype=torch.float16)
        except RuntimeError:
            pytest.skip("4 GB of addresses are not to be had")
        x = room.as_strided((tokens, 24), (apart, 1))
        x.copy_(wide)
        y = fused_way.run(structure, factors, x, bias, True)
        wanted = by_einsum(structure, wide, factors, bias)
        assert (y.double() - wanted).norm() <= 2.0**-10 * wanted.norm()

    def test_gradients(self) -> None:
        structure = chain(4, 6, 5, 7, 3)
        leaves = [t.requires_grad_() for t in operands(structure, 11, torch.float32)]
        x, bias, *factors = leaves
        y = fused_way.run(structure, factors, x, bias, True)
        gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        wanted = torch.autograd.grad(by_einsum(structure, x, factors, bias), leaves, gy.double())
        for found, other in zip(torch.autograd.grad(y, leaves, gy), wanted, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)

    def test_no_tokens(self) -> None:
        structure = chain(4, 6, 5, 7, 3)
        x, bias, *factors = operands(structure, 0, torch.float32)
        assert fused_way.run(structure, factors, x, bias, True).shape == (0, 35)


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels() -> Any:
    if not fused.has_triton():
        pytest.skip(WITHOUT)
    path = Path(__file__).parents[3] / "docs" / "gpu_kernels.py"
    spec = importlib.util.spec_from_file_location("gpu_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_kernels"] = module
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("gpu_kernels")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_compiled(kernels: SimpleNamespace, capability: tuple[int, int], dtype: str) -> None:
    """Nothing is spilled, shared memory suffices, products run on tensor cores, and loads run ahead of them."""
    seen = 0
    for _, name, size, options, tokens in kernels.CASES:
        found = kernels.compiled(name, size, options, tokens, capability, dtype)
        if found is None:
            assert capability == (8, 9)  # which has the least shared memory
            continue
        assert found.spills == found.stack == 0
        assert found.registers <= 255
        assert found.shared <= found.limit
        if tokens > fused.FEW:
            seen += 1
            assert found.tensor_cores > 0
            assert found.asynchronous > 0
        else:
            assert found.instructions["LDG.E.128"] >= 2  # wide loads of both factors
    assert seen >= 3
