"""StructuredLinear against a float64 oracle, and everything that torch does to a module."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from helpers.layers import EACH, EXAMPLES
from torch import nn
from torch.nn import functional as F

import structlin
from structlin.execution import token_major as _token_major
from structlin.testing import dense_matrix, random_chain
from structlin_nn.torch import StructuredLinear

FEW = [
    ("dense", (7, 5), {}),
    ("low_rank", (7, 11), {"rank": 3}),
    ("kronecker", (35, 6), {}),
    ("block_tensor_train", (35, 6), {"rank": 2}),
    ("monarch", (10, 21), {"blocks": 3}),  # padded and cut
    ("toeplitz", (5, 7), {}),
    ("diagonal", (5, 5), {}),
]


def make(name: str, shape: tuple[int, int], options: dict, **more) -> StructuredLinear:
    """A layer with random bias and, where it has them, gains other than 1."""
    torch.manual_seed(0)
    layer = StructuredLinear(shape[1], shape[0], structure=name, **options, **more)
    with torch.no_grad():
        for parameter in (layer.bias, *(layer.gains or ())):
            if parameter is not None:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def matrix(layer: StructuredLinear) -> np.ndarray:
    """A in float64, from the stored parameters, without the layer's, the chain's or the operator's code."""
    factors = [f.detach().to(torch.float64).numpy() for f in layer.factors]
    if layer.rms_cap:
        sigmas = [s for s, f in zip(layer.cap_sigma, layer.structure.factors, strict=True) if f.trainable]
        gains = [1.0] * len(factors) if layer.gains is None else [g.item() for g in layer.gains]
        factors = [
            f * g * min(1.0, s / math.sqrt((f**2).sum() / f.size))
            for f, g, s in zip(factors, gains, sigmas, strict=True)
        ]
    for number, spec in enumerate(layer.structure.factors):
        if not spec.trainable:
            factors.insert(number, layer.get_buffer(f"index{number}").numpy())
    return dense_matrix(layer.structure, factors)


def expected(layer: StructuredLinear, x: torch.Tensor, A: np.ndarray | None = None) -> torch.Tensor:
    y = x.detach().to(torch.float64).numpy() @ (matrix(layer) if A is None else A).T
    return torch.from_numpy(y if layer.bias is None else y + layer.bias.detach().to(torch.float64).numpy())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "shape", "options"), EXAMPLES)
def test_values(name, shape, options, bias):
    layer = make(name, shape, options, bias=bias, dtype=torch.float64)
    A = matrix(layer)
    for lead in ((), (1,), (4,), (0,), (2, 3), (2, 0, 3)):
        x = torch.randn(*lead, shape[1], dtype=torch.float64)
        y = layer(x)
        assert y.shape == (*lead, shape[0])
        torch.testing.assert_close(y, expected(layer, x, A))


@pytest.mark.parametrize(("name", "shape", "options"), EXAMPLES)
def test_agrees_with_nn_linear_on_the_dense_matrix_of_its_operator(name, shape, options):
    layer = make(name, shape, options, dtype=torch.float64)
    assert layer.operator.dtype == torch.float64
    x = torch.randn(3, shape[1], dtype=torch.float64, requires_grad=True)
    ours, dense = layer(x), F.linear(x, layer.operator.to_dense(), layer.bias)
    torch.testing.assert_close(ours, dense)
    found, wanted = (torch.autograd.grad(y.square().sum(), (x, *layer.parameters())) for y in (ours, dense))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("name", "shape", "options"), FEW)
def test_input_that_is_not_contiguous(name, shape, options):
    layer = make(name, shape, options, dtype=torch.float64)
    base = torch.randn(2 * shape[1], 4, 3, dtype=torch.float64)
    x = base[::2].permute(2, 1, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), expected(layer, x))
    expanded = base[: shape[1], 0, :1].T.expand(5, shape[1])
    torch.testing.assert_close(layer(expanded), expected(layer, expanded))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str
)
@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize(("name", "shape", "options"), FEW)
def test_dtypes(name, shape, options, dtype, tolerance, cap):
    layer = make(name, shape, options, dtype=dtype, rms_cap=cap)
    x = torch.randn(4, shape[1], dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected(layer, x), rtol=tolerance, atol=tolerance)


def test_complex():
    layer = StructuredLinear(6, 35, structure="block_tensor_train", rank=2, dtype=torch.complex128)
    x = torch.randn(3, 6, dtype=torch.complex128)
    dense = dense_matrix(layer.structure, [f.detach().numpy() for f in layer.factors])
    torch.testing.assert_close(layer(x), torch.from_numpy(x.numpy() @ dense.T))


def of_leaves(layer: StructuredLinear):
    """The layer as a function of its input and its parameters."""
    names = [name for name, _ in layer.named_parameters()]
    return lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x,))


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize(("name", "shape", "options"), FEW)
def test_gradients(name, shape, options, cap):
    layer = make(name, shape, options, dtype=torch.float64, rms_cap=cap)
    with torch.no_grad():  # the cap has a kink where the RMS equals sigma: stay clear of it, on either side
        for number, factor in enumerate(layer.factors):
            factor.mul_(0.7 if number else 1.5)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of_leaves(layer), (x, *layer.parameters()), fast_mode=True)


def test_second_derivatives():
    layer = make("block_tensor_train", (15, 6), {"rank": 2}, dtype=torch.float64, rms_cap=True)
    with torch.no_grad():
        layer.factors[0].mul_(2)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    call = of_leaves(layer)
    assert torch.autograd.gradgradcheck(lambda *leaves: call(*leaves).sin(), (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize(("name", "shape", "options"), FEW)
def test_few_and_many_tokens_agree(name, shape, options):
    """Which way the products are run depends on the number of tokens."""
    layer = make(name, shape, options, dtype=torch.float64)
    x = torch.randn(5000, shape[1], dtype=torch.float64, requires_grad=True)
    parts = [layer(part) for part in x.split(7)]
    torch.testing.assert_close(torch.cat(parts), layer(x))
    torch.testing.assert_close(layer(x), expected(layer, x))
    leaves = (x, *layer.parameters())
    together = torch.autograd.grad(layer(x).sin().sum(), leaves)
    torch.testing.assert_close(together, torch.autograd.grad(sum(p.sin().sum() for p in parts), leaves))


def test_parametrised_factors_and_bias():
    """Factors and bias are looked up where torch.nn.utils.parametrize puts them."""

    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    layer = make("block_tensor_train", (35, 6), {"rank": 2}, dtype=torch.float64)
    x, before = torch.randn(3, 6, dtype=torch.float64), layer.bias.detach().clone()
    y = layer(x) - before
    torch.nn.utils.parametrize.register_parametrization(layer.factors, "1", Doubled())
    torch.testing.assert_close(layer(x), 2 * y + before)
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    torch.testing.assert_close(layer(x), 2 * y + 2 * before)


# -- the RMS cap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize(("name", "shape", "options"), FEW)
def test_cap_holds_in_every_path(name, shape, options, gain):
    layer = make(name, shape, options, dtype=torch.float64, rms_cap=True, gain=gain)
    assert (layer.gains is not None) == gain
    with torch.no_grad():
        layer.factors[0].mul_(3)  # now capped
        for factor in list(layer.factors)[1:]:
            factor.mul_(0.25)  # now not
    A = torch.from_numpy(matrix(layer))
    x = torch.randn(3, shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x) - layer.bias, x @ A.T)
    torch.testing.assert_close(layer.operator.to_dense(), A)
    torch.testing.assert_close(layer.operator @ x.T, A @ x.T)
    torch.testing.assert_close(layer.operator.T.to_dense(), A.T)
    effective = [f.detach() for f in layer.effective_factors()]
    torch.testing.assert_close(torch.from_numpy(dense_matrix(layer.structure, effective)), A)


def test_cap_bounds_the_rms_by_the_initial_deviation():
    layer = StructuredLinear(768, 1024, rms_cap=True, gain=False)
    assert layer.cap_sigma == structlin.init_std(layer.structure)
    with torch.no_grad():
        for factor in layer.factors:
            factor.mul_(10)
    for factor, sigma in zip(layer.effective_factors(), layer.cap_sigma, strict=True):
        assert factor.square().mean().sqrt().item() == pytest.approx(sigma, rel=1e-5)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_cap_never_asks_for_a_value(checkpoint):
    """On the meta device there is none: a synchronisation with the host would raise."""
    layer = StructuredLinear(768, 1024, rms_cap=True, checkpoint=checkpoint, device="meta")
    layer(torch.empty(3, 768, device="meta", requires_grad=True)).sum().backward()
    assert {p.grad.device.type for p in layer.parameters()} == {"meta"}


def test_capped_zero_initialised_layer_learns():
    layer = StructuredLinear(64, 64, structure="low_rank", rms_cap=True, zero_init=True, rule="rank_corrected")
    assert layer.init_std[-1] == 0
    assert layer.cap_sigma == (layer.init_std[0], structlin.init_std(layer.structure)[-1])
    layer(torch.randn(5, 64)).sum().backward()
    for parameter in layer.parameters():
        assert torch.isfinite(parameter.grad).all()
    assert layer.factors[-1].grad.abs().max() > 0


def test_cap_in_half_precision_neither_overflows_nor_underflows():
    for scale in (1e-4, 300.0):
        layer = StructuredLinear(64, 64, structure="dense", rms_cap=True, dtype=torch.float16, bias=False)
        with torch.no_grad():
            layer.factors[0].mul_(scale)
        torch.testing.assert_close(
            layer.effective_factors()[0].double(), torch.from_numpy(matrix(layer)), rtol=2e-3, atol=1e-6
        )


# -- autocast ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cap", "tokens", "checkpoint"), [(False, 4, False), (True, 600, False), (True, 4, True)])
@pytest.mark.parametrize(("name", "shape", "options"), FEW)
def test_autocast(name, shape, options, cap, tokens, checkpoint):
    layer = make(name, shape, options, rms_cap=cap, checkpoint=checkpoint)
    x = torch.randn(2, tokens, shape[1], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == nn.Linear(shape[1], shape[0])(x).dtype == torch.bfloat16
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected(layer, x), rtol=4e-2, atol=4e-2)
    y.float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    assert x.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert layer(x).dtype == torch.float32


def test_autocast_leaves_float64_alone():
    layer, x = make("block_tensor_train", (35, 6), {}, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), expected(layer, x))


# -- initialisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["paper", "rank_corrected"])
@pytest.mark.parametrize("zero_init", [False, True])
@pytest.mark.parametrize(
    ("name", "options"), [("dense", {}), ("low_rank", {"rank": 64}), ("block_tensor_train", {"rank": 4})]
)
def test_initial_deviations(name, options, rule, zero_init):
    torch.manual_seed(0)
    layer = StructuredLinear(768, 1024, structure=name, rule=rule, zero_init=zero_init, **options)
    assert layer.init_std == structlin.init_std(layer.structure, rule=rule, zero_last=zero_init)
    for factor, std in zip(layer.factors, layer.init_std, strict=True):
        if std == 0:
            assert not factor.any()
        else:  # the deviation of n normal numbers is known to 1 / sqrt(2 n)
            assert factor.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * factor.numel()))
            assert abs(factor.mean().item()) < 5 * std / math.sqrt(factor.numel())
    assert (layer.init_std[-1] == 0) == zero_init
    assert not layer.bias.any()


@pytest.mark.parametrize(("name", "shape", "options"), [*FEW, ("permutation", (13, 13), {})])
def test_seed_reproduces(name, shape, options):
    def draw(seed):
        torch.manual_seed(seed)
        return StructuredLinear(shape[1], shape[0], structure=name, rms_cap=name != "permutation", **options)

    first, second, other = draw(1).state_dict(), draw(1).state_dict(), draw(2).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_generator_is_the_only_source_of_randomness():
    layer = StructuredLinear(6, 35, structure="block_tensor_train")
    before = torch.get_rng_state()
    layer.reset_parameters(torch.Generator().manual_seed(3))
    first = copy.deepcopy(layer.state_dict())
    layer.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], value) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize(("name", "shape", "options"), EACH)
def test_meta_device(name, shape, options, cap):
    cap = cap and name != "permutation"
    layer = StructuredLinear(shape[1], shape[0], structure=name, device="meta", rms_cap=cap, **options)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer(torch.empty(2, 3, shape[1], device="meta")).shape == (2, 3, shape[0])
    layer.to_empty(device="cpu")
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    direct = StructuredLinear(shape[1], shape[0], structure=name, rms_cap=cap, **options)
    for (key, ours), value in zip(layer.state_dict().items(), direct.state_dict().values(), strict=True):
        assert torch.equal(ours, value), key


def test_index_is_a_permutation_and_no_parameter():
    torch.manual_seed(0)
    layer = StructuredLinear(13, 13, structure="permutation", bias=False)
    assert list(layer.parameters()) == []
    assert sorted(layer.index0.tolist()) == list(range(13))
    assert list(layer.state_dict()) == ["index0"]
    assert layer.double().index0.dtype == torch.int64
    x = torch.randn(2, 13)
    assert torch.equal(layer(x), x[:, layer.index0])
    assert isinstance(layer.operator, structlin.Permutation)


# -- copies and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(("name", "shape", "options"), EACH)
def test_copies_and_files(name, shape, options, checkpoint, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    more = {"rms_cap": name != "permutation", "checkpoint": checkpoint, **options}
    layer = make(name, shape, more)
    x = torch.randn(3, shape[1])
    y = layer(x)
    state = layer.state_dict()
    for key, value in state.items():
        assert type(value) is torch.Tensor, key
        assert vars(value) == {}, key
    torch.save(state, tmp_path / "layer.pt")
    safetensors.save_file(state, tmp_path / "layer.safetensors")
    loaded, read = (StructuredLinear(shape[1], shape[0], structure=name, **more) for _ in range(2))
    loaded.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    with torch.device("meta"):
        late = StructuredLinear(shape[1], shape[0], structure=name, **more)
    read.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    late.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"), assign=True)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded, read, late]
    for other in others:
        assert torch.equal(other(x), y)
        assert other.structure == layer.structure
        assert repr(other) == repr(layer)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
    assert torch.equal(layer(x), y)


def test_operator_shows_the_live_parameters():
    layer = make("block_tensor_train", (35, 6), {"rank": 2}, dtype=torch.float64)
    operator = layer.operator
    assert isinstance(operator, structlin.BlockTensorTrain)
    with torch.no_grad():
        layer.factors[1].mul_(2)
    torch.testing.assert_close(operator.to_dense(), torch.from_numpy(matrix(layer)))
    layer.double().to(torch.float32)
    assert layer.operator.dtype == torch.float32


def test_structure_of_ones_own():
    chain = structlin.Structure.parse("ij,ai->ja; ja,bj->ab", i=2, j=3, a=5, b=7)
    layer = StructuredLinear(6, 35, structure=chain, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), expected(layer, x))
    assert repr(chain) in repr(layer)
    assert type(layer.operator) is structlin.StructuredOperator


def test_repr():
    layer = StructuredLinear(6, 35, structure="block_tensor_train", rank=2, rms_cap=True, zero_init=True)
    assert repr(layer).splitlines()[1].strip() == (
        "in_features=6, out_features=35, bias=True, structure=block_tensor_train rank=2, rms_cap=True, gain=True, "
        "zero_init=True"
    )


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (6, 5), (0,), (2, 3, 7)])
def test_input_of_the_wrong_size(shape):
    layer = StructuredLinear(6, 35, structure="block_tensor_train")
    with pytest.raises(ValueError, match=r"in_features = 6, got shape"):
        layer(torch.randn(shape))


@pytest.mark.parametrize(("name", "shape", "options"), FEW)
def test_input_of_another_dtype(name, shape, options):
    layer = make(name, shape, options)
    with pytest.raises(ValueError, match=r"input is torch.float64, the parameters are torch.float32"):
        layer(torch.randn(2, shape[1], dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((6, 35), {"structure": structlin.design("dense", (35, 6)), "rank": 2}, ValueError, "options rank"),
        ((6, 6), {"structure": "permutation", "rms_cap": True}, ValueError, "no trainable factors"),
        ((6, 6), {"structure": "permutation", "zero_init": True}, ValueError, "zero_init=True.*no trainable factors"),
        ((6, 7), {"structure": "block_tensor_train"}, ValueError, "7"),
        ((6, 6, "monarch"), {}, TypeError, "bias must be True or False, got 'monarch'; write structure="),
    ],
)
def test_bad_arguments(arguments, options, error, words):
    with pytest.raises(error, match=words):
        StructuredLinear(*arguments, **options)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cap"),
    [*((name, False) for name in structlin.structure_names()), ("block_tensor_train", True), ("dense", True)],
)
def test_traces_as_one_graph(name, cap):
    shape, options = structlin.structure_class(name).examples[0]
    layer = make(name, shape, options, rms_cap=cap, dtype=torch.float64)
    A = matrix(layer)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for lead in ((3,), (5,), (2, 4), (7, 2)):
        x = torch.randn(*lead, shape[1], dtype=torch.float64)
        torch.testing.assert_close(compiled(x), expected(layer, x, A))
    assert counter.frame_count <= 2  # one for each number of axes


# Without the slow tests, not every structure without a bias.
@pytest.mark.parametrize(
    ("name", "bias"),
    [
        pytest.param(name, bias, marks=() if bias or name in {few for few, *_ in FEW} else pytest.mark.slow)
        for name in structlin.structure_names()
        for bias in (True, False)
    ],
)
def test_a_single_token_in_a_graph(name, bias):
    shape, options = structlin.structure_class(name).examples[0]
    layer = make(name, shape, options, dtype=torch.float64)
    layer.bias = layer.bias if bias else None
    A = matrix(layer)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for lead in ((), (1,), (1, 1)):
        x = torch.randn(*lead, shape[1], dtype=torch.float64, requires_grad=True)
        leaves = [x, *layer.parameters()]
        torch.testing.assert_close(compiled(x), expected(layer, x, A))
        found, wanted = (torch.autograd.grad(call(x).sin().sum(), leaves) for call in (compiled, layer))
        torch.testing.assert_close(found, wanted)
    assert counter.frame_count


def test_a_single_token_of_any_chain_in_a_graph():
    rng = np.random.default_rng(0)
    for seed in range(30):
        structure = random_chain(np.random.default_rng(seed))
        plan = _token_major.token_major(structure)
        factors = structlin.random_factors(structure, seed=seed, backend="torch", dtype=torch.float64)
        x, bias = torch.from_numpy(rng.standard_normal((1, structure.d_in))), torch.ones(structure.d_out).double()
        torch.testing.assert_close(plan.single(x, factors, bias), structure.apply(factors, x) + bias)
        torch.testing.assert_close(plan.single(x, factors, None), structure.apply(factors, x))


@pytest.mark.slow
@pytest.mark.parametrize(("cap", "autocast"), [(True, False), (False, True)])
def test_compiled_forward_and_backward(cap, autocast):
    torch.manual_seed(0)
    model = nn.Sequential(
        StructuredLinear(48, 96, structure="block_tensor_train", rank=2, rms_cap=cap),
        nn.GELU(),
        StructuredLinear(96, 42, structure="monarch", blocks=5, rms_cap=cap),
        StructuredLinear(42, 10, structure="dense", rms_cap=cap),
    )
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    tolerance = {"rtol": 0.05, "atol": 0.05} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    for batch in (8, 5):
        x = torch.randn(batch, 48)
        results = []
        for call in (model, compiled):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = call(x)
            y.float().square().mean().backward()
            results.append([y.detach().float(), *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(*results, **tolerance)
