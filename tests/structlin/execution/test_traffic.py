"""The traffic model against counts written out here, and against the operations of torch for real tensors."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import structlin
from structlin import execution
from structlin.execution import traffic
from structlin.execution.choice import Problem
from structlin.execution.devices import DEVICES, Device, named
from structlin.execution.torch_cuda import strided_l2_way, strided_way
from structlin.execution.torch_ways import Dense, products_way, token_major_way

# What an H100 reaches: 700 TFLOP/s and 3.0 TB/s.
H100 = replace(DEVICES["h100"], peak={"bfloat16": 700e12}, bandwidth=3.0e12, reached=(1.0, 1.0))
TOKENS, D = 65536, 4096


def problem(name: str, tokens: int = TOKENS, train: bool = False, dtype: str = "bfloat16", **options: int) -> Problem:
    return Problem(structlin.design(name, (D, D), **options), True, "torch", "cuda", dtype, tokens, 1, train)


@pytest.mark.parametrize(
    ("name", "options", "two_products", "fused"),
    [
        ("block_tensor_train", {"rank": 1}, 0.14, 0.27),
        ("block_tensor_train", {"rank": 2}, 0.18, 0.55),
        ("block_tensor_train", {"rank": 4}, 0.22, 1.0),
        ("monarch", {"blocks": 16}, 0.55, 1.0),
        ("monarch", {"blocks": 4}, 1.0, 1.0),
        ("low_rank", {"rank": 512}, 1.0, 1.0),
    ],
)
def test_ceilings(name: str, options: dict[str, int], two_products: float, fused: float) -> None:
    """The ceiling of efficiency at d = 4096 in bfloat16 with many tokens: time of the MACs over time of the bytes."""
    asked = problem(name, **options)
    macs = asked.structure.macs * TOKENS
    found = traffic.predict(strided_way, asked, H100, bias=False)
    assert found.efficiency(macs) == pytest.approx(two_products, abs=0.006)
    assert traffic.ceiling(asked, H100).efficiency(macs) == pytest.approx(fused, abs=0.006)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_bytes_against_formulas(rank: int) -> None:
    """Of each token 8 KB of input and output and 8 r KB between the steps, and 2 * 64^3 r numbers of factors."""
    asked = problem("block_tensor_train", rank=rank)
    x, h, factors = TOKENS * D * 2, TOKENS * D * rank * 2, 2 * 64**3 * rank * 2
    found = traffic.predict(strided_way, asked, H100, bias=False)
    assert [(k.name, k.macs) for k in found.kernels] == [("bmm", TOKENS * 64**3 * rank)] * 2
    assert [(k.read, k.written) for k in found.kernels] == [(x + factors // 2, h), (h + factors // 2, x)]
    assert found.memory_bytes == found.l2_bytes == 2 * x + 2 * h + factors
    # With a bias the output is written before, and read and written by the product that adds to it.
    biased = traffic.predict(strided_way, asked, H100)
    assert [k.name for k in biased.kernels] == ["bmm", "copy_", "baddbmm"]
    assert biased.l2_bytes == found.l2_bytes + 2 * x + 2 * D
    # Other orders of axes copy the activation in the middle, for more than one vector each, and the output.
    copies = 2 * x + (2 * h if rank > 1 else 0)
    assert traffic.predict(products_way, asked, H100, bias=False).l2_bytes == found.l2_bytes + copies
    assert traffic.predict(token_major_way, asked, H100, bias=False).l2_bytes == found.l2_bytes + 2 * x + 2 * h


def test_a_training_step_against_formulas() -> None:
    """Backward, each step reads its input, its factor and the gradient of its output, the latter twice."""
    asked = problem("block_tensor_train", rank=1, train=True)
    x = TOKENS * D * 2  # and so is what is between the steps
    found = traffic.predict(strided_way, asked, H100, bias=False)
    assert len(found.kernels) == 6
    assert found.macs == 3 * asked.structure.macs * TOKENS
    factor = 64**3 * 2
    assert found.l2_bytes == 12 * x + 2 * factor + 4 * factor
    assert found.efficiency(found.macs) == pytest.approx(0.137, abs=0.002)


def test_chunks_stay_in_l2() -> None:
    """What is between the steps neither goes to memory nor comes from it; the factors are read once."""
    asked = problem("block_tensor_train", rank=2)
    found = traffic.predict(strided_l2_way, asked, H100, bias=False)
    whole = traffic.predict(strided_way, asked, H100, bias=False)
    x, factors = TOKENS * D * 2, 2 * 64**3 * 2 * 2
    assert found.memory_bytes == 2 * x + factors
    assert found.macs == whole.macs
    chunks = len(found.kernels) // 2
    assert found.l2_bytes == whole.l2_bytes + (chunks - 1) * factors
    # In a CUDA graph, where a launch takes less, this is faster than all at once.
    graph = replace(H100, launch=1.5e-6)
    assert traffic.predict(strided_l2_way, asked, graph, bias=False).seconds < 0.7 * whole.seconds
    # Without a known L2 nothing stays, and there are no chunks.
    nothing = replace(H100, l2=0)
    assert traffic.predict(strided_l2_way, asked, nothing, bias=False).memory_bytes == whole.l2_bytes


def test_few_tokens_stay_in_l2_and_take_the_time_of_launches() -> None:
    asked = problem("block_tensor_train", tokens=8, rank=1)
    found = traffic.predict(strided_way, asked, H100, bias=False)
    assert found.memory_bytes == 2 * 8 * D * 2 + 2 * 64**3 * 2
    assert found.seconds == pytest.approx(2 * H100.launch, rel=0.02)


def test_the_cache() -> None:
    cache = traffic._L2(100)
    of = lambda place, size: traffic.Access((place, 0), size)  # noqa: E731
    assert cache.take(of(1, 60), False) == 60
    assert cache.take(of(1, 60), False) == 0
    assert cache.take(of(2, 30), True) == 0
    assert cache.take(of(3, 200), False) == 200  # passes through
    assert cache.take(of(3, 200), True) == 200
    assert cache.take(of(1, 60), False) == 0
    assert cache.take(of(4, 40), False) == 40 + 30  # the second one goes, and is written
    assert cache.finish({1, 2, 3, 4}) == 0
    assert cache.take(of(5, 10), True) == 0  # the first one goes, which was only read
    assert cache.finish({5}) == 10
    assert cache.finish({1}) == 0


@pytest.mark.parametrize("way", [strided_way, products_way, token_major_way, Dense()], ids=lambda way: way.name)
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_real_tensors_take_the_same_kernels(way: execution.Way, rows: bool, trained: bool) -> None:
    structure = structlin.design("block_tensor_train", (35, 24), rank=3)
    asked = Problem(structure, rows, "torch", "cuda", "float32", 13, 1, trained)
    if not way.supports(asked):
        assert not rows
        return
    predicted = traffic.predict(way, asked, "h100")
    factors = [torch.randn(f.shape, requires_grad=trained) for f in structure.factors]
    x = torch.randn((13, structure.d_in) if rows else (structure.d_in, 13), requires_grad=trained)
    bias = torch.randn(structure.d_out, requires_grad=trained) if rows else None
    with torch.set_grad_enabled(trained), traffic.Recorder() as found:
        y = way.run(structure, factors, x, bias, rows)
        if trained:
            torch.autograd.grad(y, [x, *factors, *([bias] if rows else [])], torch.empty_like(y))
    described = [
        [(k.name, k.macs, k.read, k.written) for k in kernels] for kernels in (found.kernels, predicted.kernels)
    ]
    assert described[0] == described[1]
    wanted = structure.macs * 13 * (3 if trained else 1)
    assert predicted.macs == wanted or way.name == "dense"


def test_copies_that_cublas_needs() -> None:
    """A matrix none of whose strides is 1, and an array that a product adds to."""
    a, b, c, d = torch.ones(4, 6, 2)[..., 0], torch.ones(6, 5), torch.ones(5), torch.ones(5, 5)
    with traffic.Recorder() as found:
        _ = a @ b
        _ = torch.addmm(c, b.mT, b)
        _ = torch.addmm(d, b.mT, b)
    names = [k.name for k in found.kernels]
    assert names == ["clone", "mm", "addmm", "copy_", "addmm"]


# -- devices -----------------------------------------------------------------------------------------------------------


def test_unknown_and_own_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown device 'h300'; one of a100, "):
        execution.explain(structlin.design("monarch", (64, 64), blocks=4), 8, on="h300")
    with pytest.raises(ValueError, match="traffic on a GPU is predicted for torch, got library='jax'"):
        execution.explain(structlin.design("monarch", (64, 64), blocks=4), 8, on="h100", library="jax")
    with pytest.raises(ValueError, match="must be positive"):
        Device("broken", {"float32": 1e12}, 0.0, None, "nowhere")
    with pytest.raises(ValueError, match="must not be negative"):
        Device("broken", {"float32": 1e12}, 1e12, None, "nowhere", l2=-1)
    mine = Device("mine", {"float32": 1e12}, 1e11, None, "made up")
    monkeypatch.setitem(DEVICES, "mine", mine)
    assert named("mine") is mine
    text = execution.explain(structlin.design("monarch", (64, 64), blocks=4), 1024, on="mine", train=False)
    assert "predicted for mine, not measured" in text
    assert text.splitlines()[3].split()[:2] == ["strided", "2"]


def test_devices_by_what_the_driver_tells() -> None:
    def told(name: str, cores: int) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, multi_processor_count=cores, L2_cache_size=60 << 20, total_memory=24 << 30, major=8, minor=9
        )

    assert traffic.known(told("NVIDIA H100 80GB HBM3", 132)) is DEVICES["h100"]
    assert traffic.known(told("NVIDIA A100-SXM4-80GB", 108)) is DEVICES["a100"]
    assert traffic.known(told("NVIDIA GeForce RTX 4090", 128)) is DEVICES["rtx4090"]
    assert traffic.known(told("NVIDIA L40S", 142)) is DEVICES["l40s"]
    other = traffic.known(told("NVIDIA Something", 66))
    assert other.bandwidth == DEVICES["h100"].bandwidth / 2
    assert (other.l2, other.capability) == (60 << 20, (8, 9))


def test_tf32_is_the_rate_where_it_is_allowed() -> None:
    asked = problem("low_rank", tokens=4096, rank=1024, dtype="float32")
    strict = traffic.predict(strided_way, asked, "a100", bias=False)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        allowed = traffic.predict(strided_way, asked, "a100", bias=False)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert (strict.dtype, allowed.dtype) == ("float32", "tfloat32")
    assert 4 < strict.seconds / allowed.seconds <= 8.01


@pytest.mark.slow
def test_the_tables_of_the_document_are_what_the_model_says() -> None:
    """After a change: python docs/gpu_tables.py --write."""
    text = (Path(__file__).parents[3] / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert importlib.import_module("gpu_tables").written(text) == text
