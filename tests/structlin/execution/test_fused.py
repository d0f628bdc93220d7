"""Kernels in Triton: in the interpreter against float64, and compiled for devices that are not here."""

import importlib
import math
import multiprocessing
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.children import output
from torch import Tensor

import structlin
from structlin import execution
from structlin.execution import choice, fused, traffic
from structlin.execution.choice import Problem
from structlin.execution.devices import DEVICES
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
@pytest.mark.parametrize("on", ["l40s", "h100", "b200"])
def test_tiles(size: int, rank: int, tokens: int, on: str) -> None:
    """All operands fit where they are kept: in shared memory, and what is between the steps in L2."""
    device = DEVICES[on]
    form = fused.form_of(structlin.design("block_tensor_train", (size, size), rank=rank))
    assert form is not None
    for one in (form, form.transposed()):
        a, b, c, d, e = one.sizes
        found = fused.tiles(one, tokens, 2, device)
        assert found is not None
        sizes = found.constants
        assert found.few == (tokens <= fused.FEW)
        if found.few:
            assert sizes["T"] >= tokens
            assert found.grid == (c, math.ceil(d / sizes["BLOCK_D"]))
            continue
        for which, contracted, free in (("FIRST", a, c * e), ("SECOND", e * b, d)):
            t, n, k, stages = (sizes[f"{which}_{letter}"] for letter in ("T", "N", "K", "STAGES"))
            assert min(n, k, 32) >= 16
            assert k >= contracted
            assert n < 2 * max(free, 16)
            assert 2 * (stages * t * k + k * n + t * n) <= fused.SHARED.get(device.capability or (0, 0), 99 << 10)
            assert sizes["SPAN"] % t == 0
        assert sizes["CHUNK"] % sizes["SPAN"] == 0
        held = fused.SLOTS * sizes["CHUNK"] * one.between + b * c * e * (a + d)
        assert 2 * held <= device.l2 / 2
        assert found.x_reads == math.ceil(c * e / sizes["FIRST_N"])
        assert found.between == 1 + math.ceil(d / sizes["SECOND_N"])
        assert found.left_reads == found.right_reads == math.ceil(tokens / sizes["SPAN"])
        assert found.macs >= e * tokens * (a * b * c + b * c * d)


def test_the_transposed_chain() -> None:
    form = fused.form_of(structlin.design("block_tensor_train", (35, 24), rank=3))
    assert form is not None
    back = form.transposed()
    assert back.sizes == (7, 5, 6, 4, 3)
    assert (back.d_in, back.d_out, back.between) == (35, 24, form.between)
    assert back.transposed() == form


def test_what_has_no_tile() -> None:
    structure = structlin.design("block_tensor_train", (1024, 1024), rank=2)
    for tokens, fits in ((fused.FEW, True), (fused.FEW + 1, False)):
        asked = Problem(structure, True, "torch", "cuda", "float32", tokens, 1, False)
        assert fused_way.fits(asked, DEVICES["h100"]) is fits
    form = fused.form_of(structlin.design("monarch", (4096, 4096), blocks=2))
    assert form is not None
    assert fused.tiles(form, 65536, 2, DEVICES["h100"]) is None


def test_the_model_knows_the_traffic_of_the_kernels() -> None:
    """What is between the steps goes to memory only where the gradients of the factors need it."""
    structure = structlin.design("block_tensor_train", (1024, 1024), rank=2)
    asked = Problem(structure, True, "torch", "cuda", "bfloat16", 65536, 1, False)
    found = traffic.predict(fused_way, asked, "h100", bias=False)
    assert [k.name for k in found.kernels] == ["zeros", "fused"]
    kernel = found.kernels[1]
    launch = fused.tiles(fused.form_of(structure), 65536, 2, DEVICES["h100"])  # type: ignore[arg-type]
    assert launch is not None
    assert (launch.x_reads, launch.between) == (1, 2)
    x, factors = 65536 * 1024 * 2, structure.num_params * 2
    h = 2 * x
    assert kernel.read == x + launch.left_reads * factors + 2 * h
    assert kernel.written == x
    assert found.memory_bytes == 2 * x + factors
    trained = Problem(structure, True, "torch", "cuda", "bfloat16", 65536, 1, True)
    step = traffic.predict(fused_way, trained, "h100", bias=False)
    assert [k.name for k in step.kernels] == ["zeros", "fused", "zeros", "fused", "bmm", "bmm"]
    assert [step.kernels[k].written for k in (1, 3)] == [x + h, x + h]
    assert step.macs == 3 * structure.macs * 65536
    assert step.seconds < traffic.predict(strided_way, trained, "h100", bias=False).seconds


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
    command = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "TestInterpreter", __file__)
    assert " passed" in output(*command, cwd=Path(__file__).parents[3], TRITON_INTERPRET="1")


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


def close(found: Tensor, wanted: Tensor) -> None:
    """Assert that float16 has an error of some roundings: of the operands between the steps, and of the result."""
    assert found.dtype is torch.float16
    assert (found.double() - wanted).norm() <= 3 * 2.0**-11 * wanted.norm()


def chain(a: int, b: int, c: int, d: int, e: int) -> Any:
    return structlin.Structure.parse("ba,bcea->ceb; ceb,cdeb->cd", a=a, b=b, c=c, d=d, e=e)


# So few programs and bytes of L2 that a few hundred tokens are many chunks of some sizes.
SMALL = replace(DEVICES["h100"], cores=3, l2=1 << 21)
SIZES = [(4, 6, 5, 7, 3), (8, 8, 8, 8, 1), (33, 3, 2, 17, 2), (5, 9, 20, 3, 4), (20, 5, 3, 40, 20)]


@pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
class TestInterpreter:
    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("tokens", [1, 7, 70, 450])
    @pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2.0**-23), (torch.float16, 2.0**-11)])
    def test_values(self, sizes: tuple[int, ...], tokens: int, dtype: torch.dtype, eps: float) -> None:
        structure = chain(*sizes)
        x, bias, *factors = operands(structure, tokens, dtype)
        form = fused.form_of(structure)
        assert form is not None
        launch = fused.tiles(form, tokens, x.element_size(), SMALL)
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
            x, bias, *factors = operands(structure, tokens, torch.float16)
            close(fused_way.run(structure, factors, x, bias, True), by_einsum(structure, x, factors, bias))

    @pytest.mark.parametrize("tokens", [3, 33])
    def test_rows_apart_and_columns_apart(self, tokens: int) -> None:
        structure = chain(4, 6, 5, 7, 3)
        wide, bias, *factors = operands(structure, tokens, torch.float16)
        room = torch.full((tokens, 50), math.nan, dtype=torch.float16)
        room[:, 3:27] = wide
        for x in (room[:, 3:27], wide.T.contiguous().T):
            close(fused_way.run(structure, factors, x, bias, True), by_einsum(structure, wide, factors, bias))

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

    @pytest.mark.parametrize("tokens", [5, 11, 300])
    @pytest.mark.parametrize(("name", "shape", "options"), [
        ("block_tensor_train", (35, 24), {"rank": 3}),
        ("monarch", (44, 26), {"blocks": 3}),
    ])  # fmt: skip
    def test_gradients(
        self, name: str, shape: tuple[int, int], options: dict[str, int], tokens: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also with padding, and where only some are needed: for x alone nothing is kept between the steps."""
        structure = structlin.design(name, shape, **options)
        launched: list[bool] = []
        launch = fused.run
        monkeypatch.setattr(fused, "run", lambda *given: launched.append(given[-1] is not None) or launch(*given))
        gy = torch.randn((tokens, structure.d_out), generator=torch.Generator().manual_seed(2)).half()
        for asked in ([0, 1, 2, 3], [0], [0, 1], [0, 2], [0, 3], [2], [3]):
            x, bias, *factors = leaves = operands(structure, tokens, torch.float16)
            needed = [leaves[k].requires_grad_() for k in asked]
            launched.clear()
            with traffic.assuming(replace(SMALL, l2=1 << 17)):
                y = fused_way.run(structure, factors, x, bias, True)
                found = torch.autograd.grad(y, needed, gy)
            # One launch forward, which keeps what the second factor needs, and one for x and what the first one needs.
            backward = [2 in asked] if 0 in asked else []
            assert launched == ([3 in asked, *backward] if tokens > fused.FEW else [False])
            wanted = torch.autograd.grad(by_einsum(structure, x, factors, bias), needed, gy.double())
            for one, other in zip(found, wanted, strict=True):
                close(one, other)

    def test_programs_at_once(self) -> None:
        """Three processes draw tickets of one launch, each of them slow at times: the others have to wait for it."""
        from structlin.execution.fused import _kernels

        structure, tokens = chain(33, 3, 2, 17, 2), 1500
        x, bias, left, right = operands(structure, tokens, torch.float32)
        form = fused.form_of(structure)
        assert form is not None
        launch = fused.tiles(form, tokens, 4, replace(SMALL, l2=1 << 15))
        assert launch is not None
        chunk = launch.constants["CHUNK"]
        chunks = math.ceil(tokens / chunk)
        assert chunks > 2 * fused.SLOTS
        y = torch.zeros(tokens, form.d_out).share_memory_()
        h = torch.full((form.between * fused.SLOTS * chunk,), math.nan).share_memory_()
        counters = torch.zeros(1 + 2 * chunks, dtype=torch.int32).share_memory_()

        def program(number: int) -> None:
            fast, sometimes = _kernels._product, random.Random(number)
            _kernels._product = lambda *given: time.sleep(0.2 * (sometimes.random() < 0.2)) or fast(*given)
            units = fused.SLOTS * chunk // launch.constants["UNIT"]
            kernel: Any = _kernels.many_tokens
            kernel[1,](
                x, left, right, bias, y, tokens, form.d_in, form.d_out, x.stride(0), h, units, fused.SLOTS, counters,
                **fused.arguments(form, True), **launch.constants,
            )  # fmt: skip

        started = [multiprocessing.get_context("fork").Process(target=program, args=(k,)) for k in range(3)]
        for process in started:
            process.start()
        for process in started:
            process.join(120)
            assert process.exitcode == 0
        wanted = by_einsum(structure, x, [left, right], bias)
        torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-5)
        assert counters[1::2].unique().numel() == counters[2::2].unique().numel() == 1  # each ticket once

    def test_no_tokens(self) -> None:
        structure = chain(4, 6, 5, 7, 3)
        x, bias, *factors = operands(structure, 0, torch.float16)
        assert fused_way.run(structure, factors, x, bias, True).shape == (0, 35)


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels() -> Any:
    if not fused.has_triton():
        pytest.skip(WITHOUT)
    return importlib.import_module("gpu_kernels")


@pytest.mark.slow
@pytest.mark.parametrize(("on", "dtype", "products"), [
    ("a100", "bf16", "HMMA"), ("l40s", "bf16", "HMMA"), ("h100", "bf16", "HGMMA"), ("b200", "bf16", "UTCHMMA"),
    ("h100", "fp16", "HGMMA"),
])  # fmt: skip
def test_compiled(kernels: SimpleNamespace, on: str, dtype: str, products: str) -> None:
    """Nothing is spilled, shared memory suffices, products use the tensor cores of the device, and loads run ahead."""
    for _, *case in kernels.CASES:
        found = kernels.compiled(*case, DEVICES[on], dtype)
        assert found is not None
        assert found.spills == found.stack == 0
        assert found.registers <= 255
        assert found.shared <= found.limit
        if case[3] > fused.FEW:
            assert found.instructions[products] > 0
            assert found.tensor_cores == found.instructions[products]
            assert found.asynchronous > 0
        assert found.instructions["LDG.E.128"] >= 2  # wide loads of both factors
