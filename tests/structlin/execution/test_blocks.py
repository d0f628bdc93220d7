"""Blocks of a network as one pass: values and gradients against float64, for each norm, activation and structure."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import structlin
from structlin import execution
from structlin.execution import choice, tuning, wisdom
from structlin.execution.blocks import BlockProblem, TorchBlock, torch_block
from structlin.execution.compiled import _activations
from structlin.execution.compiled._emit import Emitter, Memory
from structlin.execution.compiled._ir import Code
from structlin.execution.compiled._product import BYTES
from structlin.execution.compiled._target import CompileError, host, load
from structlin.structure import Structure

if host() is None:
    pytest.skip("the compiler for this processor is not there", allow_module_level=True)

# The largest error of an output or a gradient, relative to its largest entry. In bfloat16 the input, the factors and
# the results are rounded, and activations between the products of a chain.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
Operands = list[Tensor | None]


def design(name: str, d_in: int, d_out: int, **options: int) -> Structure:
    found = structlin.design(name, (d_out, d_in), **options)
    assert isinstance(found, Structure)
    return found


btt = partial(design, "block_tensor_train", rank=2)
monarch, kronecker = partial(design, "monarch", blocks=4), partial(design, "kronecker")
low_rank, tensor_train = partial(design, "low_rank", rank=5), partial(design, "tensor_train", cores=3, rank=3)


def block_of(first: list[Structure], second: Structure | None, **settings: Any) -> TorchBlock:
    count = len(first) + (second is not None)
    settings.setdefault("activation", None if second is None else "gelu")
    settings.setdefault("biases", (True,) * count)
    if settings.get("norm"):
        settings.setdefault("eps", 1e-5)
    return torch_block(tuple(first), second, **settings)


def operands_of(block: TorchBlock, dtype: torch.dtype, seed: int = 0) -> Operands:
    """Weight and bias of the norm, biases and factors, exact in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    d_in = block.first[0].d_in
    found: Operands = [normal(d_in) if there else None for there in block.affine]
    found += [normal(s.d_out) if there else None for s, there in zip(block.structures, block.biases, strict=True)]
    return found + [normal(*f.shape, scale=f.fan_in**-0.5) for s in block.structures for f in s.factors]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def check(block: TorchBlock, tokens: int, dtype: torch.dtype, kind: str = "0") -> None:
    """Outputs and gradients by the pass against those layer after layer in float64."""
    operands = operands_of(block, dtype)
    x = torch.randn(tokens, block.first[0].d_in, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = [None if t is None else t.double().requires_grad_() for t in (x, *operands)]
    assert wide[0] is not None
    expected = block.layers(wide[0], wide[1:], by_products)
    gradients = [torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype) for y in expected]
    wanted = torch.autograd.grad(expected, [t for t in wide if t is not None], [g.double() for g in gradients])

    assert block.plain(x, operands)
    kept: list[Tensor] = []
    found = block.run(x, operands, kind, kept)
    assert bool(kept) == kind.endswith("kept")
    for got, want in zip(found, expected, strict=True):
        assert got.dtype is dtype
        assert error(got, want.detach()) < TOLERANCE[dtype]
    pairs = zip(block.backward(gradients, x, operands, kind, kept), (x, *operands), strict=True)
    for got, want in zip([g for g, t in pairs if t is not None], wanted, strict=True):
        assert got is not None
        assert got.dtype is dtype
        assert got.shape == want.shape
        assert error(got, want) < TOLERANCE[dtype]


def by_products(structure: Structure, x: Tensor, factors: Any, bias: Tensor | None) -> Tensor:
    with execution.using("products"):
        y = structure.apply(factors, x)
    return y if bias is None else y + bias


# Structure, sizes, norm (kind, weight and bias), activation, gated, biases, residual, tokens, threads. Sizes that
# monarch pads; an odd number of tokens, and more than a block; each norm, activation and structure at least once.
MLPS = [
    (btt, 24, 40, None, (False, False), "gelu", False, True, False, 37, 1),
    (btt, 24, 40, "layer", (True, True), "silu", True, True, True, 150, 2),
    (monarch, 37, 53, "layer", (True, True), "silu", False, True, True, 37, 1),
    (monarch, 30, 70, "rms", (True, False), "gelu_tanh", True, False, True, 37, 1),
    (low_rank, 30, 70, "layer", (False, False), "gelu", False, True, False, 51, 1),
    (kronecker, 30, 70, "rms", (False, False), "relu", False, False, True, 20, 1),
    (tensor_train, 30, 210, "layer", (True, False), "gelu", True, True, False, 1, 1),
]


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", MLPS, ids=lambda case: f"{case[0].args[0]}-{case[3]}-{case[5]}-{case[6]}")
@pytest.mark.parametrize("kind", ["0", "0kept"])
@pytest.mark.parametrize("half", [False, True], ids=["whole", "half"])
def test_mlp(case: Any, dtype: torch.dtype, half: bool, kind: str) -> None:
    make, d, hidden, norm, affine, activation, gated, bias, residual, tokens, threads = case
    first = [make(d, hidden)] * (1 + gated)
    block = block_of(
        first, make(hidden, d), activation=activation, norm=norm, affine=affine, residual=residual,
        biases=(bias,) * (2 + gated),
    )  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if half:
            assert block.half is not None
            block = block.half
        check(block, tokens, dtype, kind)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_projections_of_one_input(dtype: torch.dtype) -> None:
    """Layers of different structures, sizes and biases; one pads the input."""
    first = [btt(30, 30), monarch(30, 22), low_rank(30, 10)]
    check(block_of(first, None, biases=(True, False, True), norm="layer", affine=(True, True)), 37, dtype)
    check(block_of(first[:1], None, norm="rms", affine=(True, False)), 37, dtype)
    check(block_of(first[1:], None, biases=(False, True)), 3, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["0kept", "halfkept"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_second_backward_pass_gives_the_same_gradients(gated: bool, kind: str, dtype: torch.dtype) -> None:
    """Activations that the forward pass has stored are read, and not written."""
    block = block_of([btt(24, 40)] * (1 + gated), btt(40, 24), norm="layer", affine=(True, True), residual=True)
    operands, x = operands_of(block, dtype), torch.randn(101, 24, dtype=dtype, requires_grad=True)
    wanted = [x, *(t.requires_grad_() for t in operands if t is not None)]
    (y,) = block.by_pass(kind, x, operands, True)
    first, second = (torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("kind", "train"), [("half", False), ("half", True), ("halfkept", True)])
def test_a_pass_up_to_the_hidden_features(gated: bool, kind: str, train: bool) -> None:
    """Then the second layer by its own way. Only the derivatives, or the outputs of two layers, are stored, or none."""
    block = block_of([btt(24, 40)] * (1 + gated), btt(40, 24), norm="rms", affine=(True, False), residual=True)
    operands = [None if t is None else t.requires_grad_(train) for t in operands_of(block, torch.float64)]
    x, saved = torch.randn(9, 24, dtype=torch.float64, requires_grad=train), []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with execution.using("products"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        (y,) = block.by_pass(kind, x, operands, train)
    (expected,) = block.layers(x, operands, by_products)
    torch.testing.assert_close(y, expected)
    if not train:
        return
    given = {t.data_ptr() for t in (x, *operands) if t is not None}
    own = {t.data_ptr(): t.shape for t in saved if t.data_ptr() not in given}
    stored = list(own.values()).count(torch.Size([9, 40]))  # the second layer saves a view with more axes
    assert stored == (1 + gated if "kept" in kind else 0)
    wanted = [t for t in (x, *operands) if t is not None]
    gy = torch.randn_like(y)
    first, second = (torch.autograd.grad(out, wanted, gy, create_graph=True) for out in (y, expected))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(*(torch.autograd.grad(sum(g.sum() for g in one), x)[0] for one in (first, second)))


@pytest.mark.parametrize("size", ["2", "16", "48", "16kept", "48kept"])
def test_blocks_of_tokens(size: str) -> None:
    check(block_of([btt(24, 40)], btt(40, 24), norm="layer", residual=True), 101, torch.float64, size)


def test_stored_activations_are_no_more_than_those_of_dense_layers() -> None:
    """Input and output of the activation function; activations within the second layer are stored if they fit."""
    small = block_of([btt(24, 40)], low_rank(40, 24))
    large = block_of([btt(24, 40)], design("block_tensor_train", 40, 24, rank=9))
    for block, arrays in ((small, 2), (large, 1)):
        program = block.program(torch.float32, "0kept")
        assert program is not None
        places = program.stored()
        assert len(places) == arrays
        assert sum(program.programs[n].schedule.widths[k] for n, k in places) <= 2 * 40
        check(block, 37, torch.float64, "0kept")
    assert block_of([btt(24, 40)], None).program(torch.float32, "0kept") is None


@pytest.mark.parametrize("policy", ["compiled", "compiled,-kept"])
def test_memory_of_a_training_step(policy: str) -> None:
    """The hidden features are stored once, in the dtype of the input, and not at all with `-kept`."""
    block = block_of([btt(24, 40)], design("block_tensor_train", 40, 24, rank=9), activation="relu")
    operands = [None if t is None else t.requires_grad_() for t in operands_of(block, torch.float32)]
    x, saved = torch.randn(9, 24), []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with execution.using(policy), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        assert block(x, operands) is not None
    given = {t.data_ptr() for t in (x, *operands) if t is not None}
    stored = [(t.dtype, len(t), t.shape[1] < 64) for t in saved if t.data_ptr() not in given]
    assert stored == ([] if "kept" in policy else [(torch.float32, 9, True)])
    saved.clear()
    with execution.using(policy), torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        assert block(x, operands) is not None
    assert saved == []


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    """The backward pass overwrites a copy of the stored activations, not these."""
    block = block_of([btt(24, 40)] * 2, btt(40, 24), activation="silu", norm="rms", affine=(True, False))
    operands = [None if t is None else t.requires_grad_() for t in operands_of(block, torch.float64)]
    x = torch.randn(9, 24, dtype=torch.float64, requires_grad=True)
    y = call(block, x, operands)[0]
    wanted = [t for t in (x, *operands) if t is not None]
    first = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(y.sum(), wanted), rtol=0, atol=0)


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t[:, ::2], lambda t: t.mT.contiguous().mT])
def test_stored_activations_that_hooks_change_are_computed_again(change: Any) -> None:
    block = block_of([btt(24, 40)], btt(40, 24))
    operands = [None if t is None else t.requires_grad_() for t in operands_of(block, torch.float32)]
    x = torch.randn(9, 24, requires_grad=True)
    program = block.program(torch.float32, "0kept")
    assert program is not None
    rows = program.stored_rows()

    def unpack(t: Tensor) -> Tensor:
        return change(t) if t.ndim == 2 and t.shape[1] in rows else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = call(block, x, operands)[0]
    wanted = [t for t in (x, *operands) if t is not None]
    expected = torch.autograd.grad(block.layers(x, operands, by_products)[0].sum(), wanted)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), wanted), expected, rtol=1e-4, atol=1e-5)


def call(block: TorchBlock, x: Tensor, operands: Operands) -> tuple[Tensor, ...]:
    with execution.using("compiled"):
        found = block(x, operands)
    assert found is not None
    return found


def test_derivatives_of_first_and_second_order() -> None:
    block = block_of([btt(6, 12)], btt(12, 6), activation="gelu_tanh", norm="layer", affine=(True, True), residual=True)
    tensors = [torch.randn(3, 6, dtype=torch.float64), *operands_of(block, torch.float64)]
    given = [t.requires_grad_() for t in tensors if t is not None]

    def run(*values: Tensor) -> Tensor:
        return call(block, values[0], list(values[1:]))[0]

    assert torch.autograd.gradcheck(run, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


def test_only_what_needs_a_gradient_gets_one() -> None:
    block = block_of([btt(24, 40)], btt(40, 24), norm="layer", affine=(True, True))
    operands = operands_of(block, torch.float32)
    x = torch.randn(9, 24, requires_grad=True)
    operands[-1] = operands[-1].requires_grad_()  # type: ignore[union-attr]
    call(block, x, operands)[0].sum().backward()
    assert x.grad is not None
    assert operands[-1].grad is not None  # type: ignore[union-attr]
    assert all(t is None or t.grad is None for t in operands[:-1])


def test_an_output_that_is_not_used_counts_as_zero() -> None:
    block = block_of([btt(24, 40), btt(24, 10)], None)
    operands = operands_of(block, torch.float64)
    x = torch.randn(9, 24, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(call(block, x, operands)[1].sum(), x)
    expected = torch.autograd.grad(block.layers(x, operands, by_products)[1].sum(), x)[0]
    torch.testing.assert_close(found, expected)


def test_hooks_on_saved_tensors_go_another_way() -> None:
    """What a hook makes of the input is not read by address; gradients are those of torch's products."""
    block = block_of([btt(24, 40)], btt(40, 24))
    operands = [None if t is None else t.requires_grad_() for t in operands_of(block, torch.float64)]
    x = torch.randn(9, 24, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        y = call(block, x, operands)[0]
    (found,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(block.layers(x, operands, by_products)[0].sum(), x)
    torch.testing.assert_close(found, expected)


def test_operands_that_have_no_plain_memory_are_refused() -> None:
    block = block_of([btt(24, 40)], btt(40, 24), norm="layer", affine=(True, True))
    operands = operands_of(block, torch.float32)
    x = torch.randn(9, 24)
    assert block.plain(x, operands)
    wrong = [
        (x.to("meta"), operands),
        (x.double(), operands),
        (x[:, :20], operands),
        (x[None], operands),
        (x[:0], operands),
        (torch._efficientzerotensor(9, 24), operands),
        (torch._neg_view(x), operands),
        (x, [torch.ones(23), *operands[1:]]),
        (x, [operands[0], torch.zeros(24, dtype=torch.float64), *operands[2:]]),
        (x, [*operands[:-1], torch.ones(3)]),
        (x, [*operands[:2], torch.zeros(39), *operands[3:]]),
    ]
    for values, others in wrong:
        assert not block.plain(values, others)
        assert block(values, others) is None
    freed = torch.randn(24)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="storage"):
        block.plain(x, [freed, *operands[1:]])
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x, operands) is None


def test_a_compiler_that_fails_means_layer_after_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    block = TorchBlock((btt(24, 40),), btt(40, 24), "gelu", (True, True))

    def fail(*_: object) -> None:
        raise CompileError("no such instruction")

    monkeypatch.setattr(TorchBlock, "run", fail)
    operands, x = operands_of(block, torch.float32), torch.randn(9, 24)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        with execution.using("compiled"):
            assert block(x, operands) is None
            monkeypatch.undo()
            assert block(x, operands) is None  # nor is it tried again


@pytest.fixture
def cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTLIN_CACHE", str(tmp_path))
    choice.forget_measured()


@contextmanager
def pinned(problem: BlockProblem, way: str) -> Iterator[None]:
    choice.pin({problem.key: way})
    try:
        yield
    finally:
        choice._pinned.clear()
        choice.forget()


@pytest.mark.parametrize("way", ["compiled", "compiled-48", "compiled-near", "compiled-tiles", "compiled-tiles-64"])
def test_the_estimate_keeps_the_instructions_of_the_layers(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A block runs by tiles if its layers do, in blocks of whatever number of tokens."""
    block = block_of([btt(24, 40)], btt(40, 24))
    problem = BlockProblem(block, "bfloat16", 64, 1, False)
    monkeypatch.setattr(choice, "way_of", lambda _: next(w for w in choice.ways("torch") if w.name == way))
    monkeypatch.setattr(BlockProblem, "kinds", lambda self: ["0", "16", "48", "tiles"])
    assert problem.estimate() == ("block-tiles" if "tiles" in way else "block-0")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("train", [False, True])
def test_layers_in_slices_are_compared_with_passes_in_several_sizes_of_blocks(
    monkeypatch: pytest.MonkeyPatch, train: bool
) -> None:
    block = block_of([btt(24, 40)], btt(40, 24))
    problem = BlockProblem(block, "float32", 64, torch.get_num_threads(), train)
    monkeypatch.setattr(choice, "WORTH", 0.0)
    monkeypatch.setattr(choice, "way_of", lambda _: next(w for w in choice.ways("torch") if w.name == "compiled-near"))
    end = "kept" if train else ""
    passes = dict.fromkeys(f"block-{kind}" for kind in (f"0{end}", "0", f"48{end}", f"half{end}"))
    assert problem.close() == [*passes, "separate"]
    assert set(problem.measure(problem.close(), 0.01)) == {*passes, "separate"}
    if train:
        with execution.using("-kept"):
            assert problem.close() == ["block-0", "block-48"]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("train", [False, True])
def test_a_half_is_timed_if_only_the_first_layer_is_compiled(monkeypatch: pytest.MonkeyPatch, train: bool) -> None:
    """Only beside passes that can run: a half by tiles, for layers by tiles, cannot run in float32."""
    block = block_of([btt(24, 40)], btt(40, 24))
    problem = BlockProblem(block, "float32", 64, torch.get_num_threads(), train)
    ways = {way.name: way for way in choice.ways("torch")}
    first = "compiled"
    monkeypatch.setattr(choice, "WORTH", 0.0)
    monkeypatch.setattr(choice, "way_of", lambda p: ways[first if p.structure == block.first[0] else "products"])
    half = "block-halfkept" if train else "block-half"
    assert problem.close() == [half, "separate"]
    assert set(problem.measure(problem.close(), 0.01)) == {half, "separate"}
    first = "compiled-tiles"
    assert problem.estimate() == "separate"


def test_a_half_whose_backward_pass_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    block = TorchBlock((btt(24, 44),), btt(44, 24), "gelu", (True, True))
    operands, x = operands_of(block, torch.float64), torch.randn(9, 24, dtype=torch.float64, requires_grad=True)

    def fail(*_: object) -> None:
        raise CompileError("no such instruction")

    monkeypatch.setattr(TorchBlock, "backward", fail)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        (y,) = block.by_pass("halfkept", x, operands, True)
        found = torch.autograd.grad(y.sum(), x)
    expected = torch.autograd.grad(block.layers(x, operands, by_products)[0].sum(), x)
    torch.testing.assert_close(found, expected)
    assert "halfkept" not in BlockProblem(block, "float64", 9, 1, True).kinds()


@pytest.mark.usefixtures("cache")
def test_timings_are_apart_from_the_call_that_needs_them() -> None:
    """Hooks on saved tensors do not see them, and autocast does not apply."""
    block = block_of([btt(24, 40)], btt(40, 24))
    problem, seen = BlockProblem(block, "float32", 64, 1, True), []
    with (
        torch.autograd.graph.saved_tensors_hooks(seen.append, lambda _: None),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        found = problem.measure()
    assert seen == []
    assert found["separate"] > 0


@pytest.mark.usefixtures("cache")
def test_the_choice_follows_timings_and_pins() -> None:
    block = block_of([btt(24, 40)], btt(40, 24))
    problem = BlockProblem(block, "float32", 64, torch.get_num_threads(), False)
    operands, x = operands_of(block, torch.float32), torch.randn(50, 24)
    wisdom.write(problem.key, {"separate": 1.0, "block-0": 2.0, "block-16": 3.0})
    choice.forget()
    assert block(x, operands) is None
    assert choice.decisions()[problem.key] == "separate"
    wisdom.write(problem.key, {"separate": 1.0, "block-0": 0.9, "block-16": 0.3})
    choice.forget()
    assert block.kind(x.dtype, len(x), False) == "16"
    with pinned(problem, "block-0"):
        assert block.kind(x.dtype, len(x), False) == "0"
        assert choice.decisions([block.first[0]])[problem.key] == "block-0"
    with pinned(problem, "block-tiles"):  # of bfloat16 alone
        assert block(x, operands) is None


@pytest.mark.usefixtures("cache")
def test_choices_without_stored_activations() -> None:
    """`-kept` excludes them from timings and pins; timings without them do not decide for other policies."""
    block = block_of([btt(24, 40)], btt(40, 24))
    problem = BlockProblem(block, "float32", 64, torch.get_num_threads(), True)
    times = {"separate": 3.0, "block-0": 2.0, "block-16": 2.5}
    wisdom.write(problem.key, times | {"block-0kept": 1.0, "block-halfkept": 1.5})
    choice.forget()
    with execution.using("measure"):
        assert choice.settle(problem) == "block-0kept"
    with execution.using("measure,-kept"):
        assert choice.settle(problem) == "block-0"
    with pinned(problem, "block-0kept"), execution.using("measure,-kept"):
        assert choice.settle(problem) == "block-0"
        assert choice.decisions()[problem.key] == "block-0"
    wisdom.write(problem.key, times | {"separate": 0.5})
    choice.forget()
    with execution.using("measure,-kept"):
        assert choice.settle(problem) == "block-0"  # separate layers store the hidden features
    inference = replace(problem, train=False)
    wisdom.write(inference.key, {"separate": 0.5, "block-0": 1.0})
    with execution.using("measure,-kept"):
        assert choice.settle(inference) == "separate"
    wisdom.write(problem.key, times)
    choice.forget()
    with execution.using("measure"):
        choice.settle(problem)
    assert {"block-0kept", "block-halfkept"} <= set(choice.timings_of(problem.key))
    with pinned(problem, "block-halfkept"):
        with execution.using("measure,-kept"):
            assert choice.settle(problem) == "separate"  # a half that stores nothing is not for training
            assert block.kind(torch.float32, 64, True) is None
        with execution.using("measure"):
            assert block.kind(torch.float32, 64, True) == "halfkept"
    assert "half" in BlockProblem(block, "float32", 64, 1, False).kinds()


@pytest.mark.usefixtures("cache")
def test_a_pass_that_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    block = TorchBlock((btt(24, 40),), btt(40, 24), "gelu", (True, True))
    run = TorchBlock.run

    def fail(self: TorchBlock, x: Tensor, operands: Operands, kind: str = "0", kept: Any = None) -> Any:
        if kind.endswith("kept"):
            raise MemoryError
        return run(self, x, operands, kind, kept)

    monkeypatch.setattr(TorchBlock, "run", fail)
    found = BlockProblem(block, "float32", 64, 1, True).measure()
    assert "block-0" in found
    assert not any(name.endswith("kept") for name in found)


@pytest.mark.usefixtures("cache")
def test_measuring_times_all_answers() -> None:
    block = block_of([btt(24, 40)], btt(40, 24))
    operands, x = operands_of(block, torch.float32), torch.randn(50, 24, requires_grad=True)
    found = tuning.tune(lambda: block(x, operands), progress=False)
    (key,) = [key for key in found if key.startswith("block")]
    kinds = {"0", "16", "48", "0kept", "16kept", "48kept", "halfkept"}
    assert set(found[key]) == {"separate", *(f"block-{kind}" for kind in kinds)}
    assert all(0 < seconds < 10 for seconds in found[key].values())


# -- activations -------------------------------------------------------------------------------------------------------

FUNCTIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(_activations.ACTIVATIONS))
def test_activation_functions_and_their_derivatives(name: str, dtype: torch.dtype) -> None:
    """To rounding, at numbers of all sizes, zeros, infinities and NaN."""
    target = host()
    assert target is not None
    element = "float" if dtype is torch.float32 else "double"
    code = Code()
    emitter = Emitter(code, target, element, "%n", 1)

    def vector(k: Any, _: Any) -> None:
        x, y, slope = (Memory(f"%{name}", element) for name in ("x", "y", "s"))
        value, derivative = _activations.activation(name, emitter, emitter.load(x, k, emitter.lanes))
        emitter.store(y, k, value, emitter.lanes)
        emitter.store(slope, k, derivative, emitter.lanes)

    code.loop(0, "%n", emitter.lanes, vector)
    text = code.function("f", "ptr %x, ptr %y, ptr %s, i64 %n", target.attributes)
    run = load(text, "f", target, [*[ctypes.c_void_p] * 3, ctypes.c_int64])
    special = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-30, -1e-30, 1e30, -1e30, 90.0, -90.0, 710, -710])
    spread = torch.cat((torch.linspace(-12, 12, 4001), torch.logspace(-8, 2, 400), -torch.logspace(-8, 2, 400)))
    x = torch.cat((special, spread)).to(dtype)
    x = torch.cat((x, x.new_zeros(-len(x) % (64 // BYTES[element]))))
    y, slope = torch.empty_like(x), torch.empty_like(x)
    run(x.data_ptr(), y.data_ptr(), slope.data_ptr(), len(x))

    wide = x.double().requires_grad_()
    expected = FUNCTIONS[name](wide)
    (derivative,) = torch.autograd.grad(expected.sum(), wide)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected.detach(), rtol=4 * eps, atol=4 * eps, equal_nan=True)
    usual = x.abs() < 1e4  # beyond, torch's own derivatives have products of zero and infinity
    torch.testing.assert_close(slope[usual].double(), derivative[usual], rtol=32 * eps, atol=32 * eps)
