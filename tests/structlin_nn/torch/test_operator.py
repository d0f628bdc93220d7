"""The operator ``structlin::chain`` against a float64 oracle, and everything that torch asks of an operator."""

import json

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from helpers import layers
from helpers.children import output
from torch.utils.flop_counter import FlopCounterMode

import structlin
from structlin.execution._gradients import chain_gradients, gradient_macs
from structlin.execution.torch_cpu import chain_of
from structlin.structure import AbstractStructure
from structlin.testing import dense_matrix, random_chain
from structlin_nn.torch import StructuredLinear
from structlin_nn.torch._operator import chain, chain_backward, from_text, to_text

EXAMPLES = [structlin.design(name, shape, **options) for name, shape, options in layers.EXAMPLES]
CHAINS = [structure for structure in EXAMPLES if isinstance(structure, structlin.Structure)]
FEW = [
    pytest.param(structlin.design(name, shape, **options), id=name)
    for name, shape, options in (
        ("low_rank", (7, 11), {"rank": 3}),
        ("kronecker", (35, 6), {}),
        ("block_tensor_train", (35, 6), {"rank": 2}),
        ("monarch", (10, 21), {"blocks": 3}),  # padded and cut
        ("monarch", (33, 44), {"blocks": 4}),  # regrouped
    )
]


def arrays(structure: AbstractStructure, tokens: int = 4, dtype: str = "float64", seed: int = 0):
    """x and the factors, as leaves that require gradients."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, structure.d_in, dtype=getattr(torch, dtype), requires_grad=True)
    factors = structlin.random_factors(structure, seed=seed, backend="torch", dtype=dtype)
    return x, [f.requires_grad_() for f in factors]


def caller(structure):
    """The operator as a function of the leaves."""

    return lambda x, *factors: chain(x, list(factors), to_text(structure))


@pytest.mark.parametrize("structure", CHAINS)
def test_values_and_gradients(structure):
    for tokens in (4, 0):
        x, factors = arrays(structure, tokens)
        A = torch.from_numpy(dense_matrix(structure, [f.detach() for f in factors]))
        y = chain(x, factors, to_text(structure))
        torch.testing.assert_close(y, x @ A.T)
        weight = torch.randn_like(y)
        found = torch.autograd.grad((y * weight).sum(), (x, *factors))
        wanted = torch.autograd.grad((structure.apply(factors, x) * weight).sum(), (x, *factors))
        torch.testing.assert_close(found[0], weight @ A)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("number", [12, pytest.param(40, marks=pytest.mark.slow)])
def test_values_and_gradients_of_any_chain(number):
    rng = np.random.default_rng(0)
    for seed in range(number):
        structure = random_chain(rng)
        x, factors = arrays(structure, 3, seed=seed)
        y = chain(x, factors, to_text(structure))
        torch.testing.assert_close(y, x @ torch.from_numpy(dense_matrix(structure, factors)).T)
        found = torch.autograd.grad(y.sin().sum(), (x, *factors))
        wanted = torch.autograd.grad(structure.apply(factors, x).sin().sum(), (x, *factors))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("structure", FEW)
def test_any_selection_of_gradients(structure):
    x, factors = arrays(structure)
    every = (x, *factors)
    wanted = torch.autograd.grad(structure.apply(factors, x).sin().sum(), every)
    for mask in range(1, 2 ** len(every)):
        for number, leaf in enumerate(every):
            leaf.requires_grad_(bool(mask >> number & 1))
        chosen = [leaf for leaf in every if leaf.requires_grad]
        found = torch.autograd.grad(chain(x, factors, to_text(structure)).sin().sum(), chosen)
        torch.testing.assert_close(found, [w for n, w in enumerate(wanted) if mask >> n & 1])


@pytest.mark.parametrize("structure", FEW)
def test_complex(structure):
    x, factors = arrays(structure, dtype="complex128")
    assert torch.autograd.gradcheck(caller(structure), (x, *factors), fast_mode=True)


@pytest.mark.parametrize("structure", CHAINS)
def test_second_derivatives(structure):
    x, factors = arrays(structure, 2)
    call = caller(structure)
    every = (x, *factors)
    assert torch.autograd.gradcheck(call, every, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *given: call(*given).sin(), every, fast_mode=True)


def test_third_derivatives():
    structure = structlin.design("block_tensor_train", (15, 6), rank=2)
    x, factors = arrays(structure, 2)

    def third(function):
        (first,) = torch.autograd.grad(function(x, factors).sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), factors[0], create_graph=True)
        return torch.autograd.grad(second.sin().sum(), (x, *factors))

    found = third(lambda x, f: chain(x, f, to_text(structure)))
    torch.testing.assert_close(found, tuple(third(lambda x, f: structure.apply(f, x))))


def test_several_gradients_at_once():
    structure = structlin.design("block_tensor_train", (35, 6), rank=2)
    x, factors = arrays(structure, 3)
    y = chain(x, factors, to_text(structure))
    rows = torch.eye(35, dtype=torch.float64)[:, None].expand(35, 3, 35)
    jacobian, weight = torch.autograd.grad(y, (x, factors[1]), rows, is_grads_batched=True)
    torch.testing.assert_close(jacobian[:, 1], torch.from_numpy(dense_matrix(structure, factors)))
    torch.testing.assert_close(weight[7], torch.autograd.grad(structure.apply(factors, x)[:, 7].sum(), factors[1])[0])


@pytest.mark.parametrize("structure", FEW[2:4])
def test_torchs_own_checks(structure):
    x, factors = arrays(structure)
    torch.library.opcheck(chain, (x, factors, to_text(structure)))
    needs = [t.requires_grad for t in (x, *factors)]
    gy = torch.randn(4, structure.d_out, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(chain_backward, (gy, x, factors, to_text(structure), needs))


@pytest.mark.parametrize("structure", FEW)
def test_vmap(structure):
    torch.manual_seed(0)
    text = to_text(structure)
    factors = [torch.stack([f, *[f.flip(0)] * 2]) for f in structlin.random_factors(structure, backend="torch", seed=0)]
    x = torch.randn(3, 4, structure.d_in)
    each = [structure.apply([f[i] for f in factors], x[i]) for i in range(3)]
    every = torch.func.vmap(lambda x, f: chain(x, f, text))(x, factors)
    torch.testing.assert_close(every, torch.stack(each))
    first = [f[0] for f in factors]
    turned = torch.func.vmap(lambda x: chain(x, first, text), in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(turned, structure.apply(first, x))


def test_forward_mode_is_refused():
    """torch would take the derivative to be zero."""
    structure = structlin.design("low_rank", (7, 5), rank=2)
    x, factors = arrays(structure)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: chain(x, [f.detach() for f in factors], to_text(structure)), (x,), (x,))


@pytest.mark.parametrize("structure", FEW)
def test_flops(structure):
    x, factors = arrays(structure, 7)
    with FlopCounterMode(display=False) as forward:
        y = chain(x, factors, to_text(structure))
    assert forward.get_total_flops() == 2 * 7 * structure.macs
    every = (x, *factors)
    for mask in range(1, 2 ** len(every)):
        needs = [bool(mask >> n & 1) for n in range(len(every))]
        chosen = [leaf for leaf, need in zip(every, needs, strict=True) if need]
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(y.sum(), chosen, retain_graph=True)
        # All factors require gradients, so the operator computes them even if they are not requested.
        assert backward.get_total_flops() == 2 * 7 * gradient_macs(structure, [True] * len(every))
        with FlopCounterMode(display=False) as done:
            chain_gradients(structure, torch.ones_like(y), x.detach(), [f.detach() for f in factors], needs)
        assert done.get_total_flops() == 2 * 7 * gradient_macs(structure, needs)


def test_flops_against_formulas():
    structure = structlin.design("block_tensor_train", (35, 6), rank=2)
    first, second = (f.numel for f in structure.factors)
    assert gradient_macs(structure, [True, True, True]) == 2 * (first + second) + first  # the first again
    assert gradient_macs(structure, [True, False, False]) == first + second
    assert gradient_macs(structure, [False, True, False]) == second + first
    assert gradient_macs(structure, [False, False, True]) == first + second
    assert gradient_macs(structure, [False, True, True]) == first + 2 * second + first


def test_the_contractions_own_backward_pass():
    structure = structlin.design("block_tensor_train", (96, 64), rank=2)
    x, factors = arrays(structure, 700)
    plain = [t.detach() for t in (x, *factors)]
    gy = torch.randn(700, 96, dtype=torch.float64)
    for needs in ([True] * 3, [False, True, True], [True, False, True], [False, False, True]):
        with FlopCounterMode(display=False) as counter:  # which sees only products of torch
            chain_of(structure).chunked.backward(gy, plain[0], plain[1:], [*needs, False])
        found = chain_backward(gy, plain[0], plain[1:], to_text(structure), needs)
        assert counter.get_total_flops() == 2 * 700 * gradient_macs(structure, needs)
        torch.testing.assert_close(found, tuple(chain_gradients(structure, gy, plain[0], plain[1:], needs)))


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", CHAINS)
def test_text(structure):
    assert from_text(to_text(structure)) == structure
    transposed = structure.transpose()
    assert from_text(to_text(transposed)) == transposed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("btt", "does not describe a chain"),
        ("[1]", "does not describe a chain"),
        ("{}", "does not describe a chain"),
        ('{"chain": "i,oi->o"}', "does not describe a chain"),
        (json.dumps({"chain": "i,oi->o", "sizes": {"i": 3}, "d_in": 3, "d_out": 4}), "no size given for axis 'o'"),
    ],
)
def test_bad_text(text, words):
    with pytest.raises(ValueError, match=words):
        from_text(text)


def test_wrong_shapes_in_a_traced_graph():
    structure = structlin.design("low_rank", (7, 5), rank=2)
    _, factors = arrays(structure)
    with torch.device("meta"):
        wrong, meta = torch.empty(3, 6), [torch.empty(f.shape) for f in factors]
    with pytest.raises(ValueError, match=r"x of shape \(tokens, 5\), got \(3, 6\)"):
        torch.ops.structlin.chain(wrong, meta, to_text(structure))


# -- the layer's option ------------------------------------------------------------------------------------------------


def saved(layer, x):
    """What is kept for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    return kept


def checkpointed(name, size):
    """A layer with checkpoints, and one without that has its parameters."""
    torch.manual_seed(0)
    layer, plain = (
        StructuredLinear(size, size, structure=name, checkpoint=c, dtype=torch.float64) for c in (True, False)
    )
    plain.load_state_dict(layer.state_dict())
    return layer, plain


@pytest.mark.parametrize("tokens", [1, 700])
@pytest.mark.parametrize("name", ["block_tensor_train", "kronecker", "tensor_train", "low_rank", "butterfly"])
def test_checkpoint_keeps_only_the_input(name, tokens):
    layer, plain = checkpointed(name, 32)
    assert "checkpoint=True" in repr(layer)
    x = torch.randn(tokens, 32, dtype=torch.float64, requires_grad=True)
    kept = [x, *layer.factors]
    assert [t.data_ptr() for t in saved(layer, x)] == [t.data_ptr() for t in kept]
    with structlin.execution.using("products"):  # which autograd keeps activations of
        assert sum(t.numel() for t in saved(plain, x)) > sum(t.numel() for t in kept)
    results = []
    for one in (layer, plain):
        y = one(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, *one.parameters()))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["toeplitz", "circulant", "diagonal", "permutation"])
def test_checkpoint_of_what_is_no_chain(name):
    layer, plain = checkpointed(name, 9)
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    if name in ("toeplitz", "circulant"):
        assert any("complex" in str(t.dtype) for t in saved(plain, x))
    assert not any("complex" in str(t.dtype) for t in saved(layer, x))
    results = []
    for one in (layer, plain):
        (gx,) = torch.autograd.grad(one(x).sin().sum(), x, create_graph=True)
        results.append((gx, *torch.autograd.grad(gx.square().sum(), (x, *one.factors))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("structure", EXAMPLES)
def test_transformations_of_the_layer(structure, checkpoint):
    torch.manual_seed(0)
    layer = StructuredLinear(*structure.shape[::-1], structure=structure, dtype=torch.float64, checkpoint=checkpoint)
    x, v = torch.randn(2, 3, structure.d_in, dtype=torch.float64)
    A = layer.operator.to_dense().detach()
    _, tangent = torch.func.jvp(layer, (x,), (v,))
    torch.testing.assert_close(tangent, v @ A.T)
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).sum())(x), torch.ones(3, A.shape[0]).double() @ A)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), A)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x[0]), A)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, v))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, v @ A.T)
    parameters = dict(layer.named_parameters())
    x0 = x[:1]

    def loss(parameters, row):
        return torch.func.functional_call(layer, parameters, (row,)).sin().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    alone = torch.autograd.grad(loss(parameters, x0), list(parameters.values()))
    for name, gradient in zip(parameters, alone, strict=True):
        torch.testing.assert_close(each[name][0], gradient)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("tokens", [2, 900])
def test_flops_of_the_layer(checkpoint, tokens):
    """In the forward pass 2 * MACs; in the backward pass what is done, the intermediates computed again included."""
    for name in ("block_tensor_train", "monarch", "kronecker", "low_rank", "tensor_train"):
        layer = StructuredLinear(64, 64, structure=name, checkpoint=checkpoint)
        x = torch.randn(tokens, 64, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            y = layer(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        macs = layer.structure.macs
        assert forward.get_total_flops() == 2 * tokens * macs, name
        again = gradient_macs(layer.structure, [True] * (1 + len(layer.factors)))
        done = backward.get_total_flops()
        if checkpoint:
            assert done == 2 * tokens * again, name
        elif tokens == 2:
            assert done == 2 * tokens * 2 * macs, name
        else:  # some of the activations may have been kept
            assert 2 * tokens * 2 * macs <= done <= 2 * tokens * again, name


@pytest.mark.parametrize("checkpoint", [False, True])
def test_deterministic_mode(checkpoint):
    """torch fills memory that is not written with NaN in this mode, and refuses what is not deterministic."""
    torch.use_deterministic_algorithms(True)
    try:
        for name in structlin.structure_names():
            shape, options = structlin.structure_class(name).examples[0]
            layer = StructuredLinear(shape[1], shape[0], structure=name, checkpoint=checkpoint, **options)
            x = torch.randn(900, shape[1], requires_grad=True)
            runs = [torch.autograd.grad(layer(x).sin().sum(), (x, *layer.parameters())) for _ in range(2)]
            for first, second in zip(*runs, strict=True):
                assert torch.isfinite(first).all()
                assert torch.equal(first, second)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("name", "cap"),
    [("dense", True), ("low_rank", False), ("block_tensor_train", True), ("monarch", False), ("toeplitz", True)],
)
def test_checkpointed_layer_traces_as_one_graph(name, cap):
    shape, options = structlin.structure_class(name).examples[1]
    layer = StructuredLinear(
        shape[1], shape[0], structure=name, checkpoint=True, rms_cap=cap, dtype=torch.float64, **options
    )
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (3, 5, 8):
        x = torch.randn(tokens, shape[1], dtype=torch.float64, requires_grad=True)
        found, wanted = (
            torch.autograd.grad(call(x).sin().sum(), (x, *layer.parameters())) for call in (compiled, layer)
        )
        torch.testing.assert_close(found, wanted)
    assert counter.frame_count == 1
    if isinstance(layer.structure, structlin.Structure) and name != "dense":
        assert any("structlin.chain" in str(node.target) for node in counter.graphs[0].graph.nodes)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["block_tensor_train", "low_rank"])
def test_many_tokens_are_one_node_of_a_compiled_graph(name, dynamic):
    layer = StructuredLinear(1024, 1024, structure=name)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=dynamic)
    for tokens in (1040, 8, *((1100, 9) if dynamic else ())):
        x = torch.randn(tokens, 1024, requires_grad=True)
        leaves = (x, *layer.parameters())
        found, wanted = (torch.autograd.grad(call(x).sin().sum(), leaves) for call in (compiled, layer))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    nodes = [any("structlin.chain" in str(n.target) for n in graph.graph.nodes) for graph in counter.graphs]
    if name == "low_rank":  # as fast by single products
        assert not any(nodes)
    else:
        assert nodes == [True, False]  # one graph for many tokens, and one for few


def test_compiled_transformation():
    layer = StructuredLinear(6, 35, structure="block_tensor_train", checkpoint=True, dtype=torch.float64)
    x, v = (torch.randn(4, 6, dtype=torch.float64) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, v: torch.func.jvp(layer, (x,), (v,))[1], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, v), layer(v) - layer.bias)


def test_compiled_second_derivatives_of_one_token():
    layer = StructuredLinear(16, 16, structure="monarch", blocks=4, dtype=torch.float64)
    x = torch.randn(16, dtype=torch.float64)
    hessian = torch.func.hessian(lambda x: layer(x).square().sum())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(lambda x: hessian(x), backend="aot_eager")(x), hessian(x))


# -- export ------------------------------------------------------------------------------------------------------------


def exported(layer, path):
    sizes = {0: torch.export.Dim("batch", max=4096), 1: torch.export.Dim("length", max=4096)}
    example = torch.randn(3, 4, layer.in_features)
    program = torch.export.export(layer, (example,), dynamic_shapes={"x": sizes})
    torch.export.save(program, path)
    return program


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", ["dense", "block_tensor_train", "monarch", "toeplitz", "permutation"])
def test_export(name, checkpoint, tmp_path):
    shape, options = structlin.structure_class(name).examples[0]
    layer = StructuredLinear(shape[1], shape[0], structure=name, checkpoint=checkpoint, **options)
    program = exported(layer, tmp_path / "layer.pt2")
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    is_chain = isinstance(layer.structure, structlin.Structure) and name != "dense"
    assert any("structlin" in target for target in targets) == (checkpoint and is_chain)
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for lead in ((3, 4), (5, 2), (7, 9)):
        x = torch.randn(*lead, shape[1])
        torch.testing.assert_close(loaded(x), layer(x))


READ = """
import sys, torch
if sys.argv[2] == "structlin":
    import structlin_nn.torch
x, y = torch.load(sys.argv[1] + "/data.pt")
torch.testing.assert_close(torch.export.load(sys.argv[1] + "/layer.pt2").module()(x), y)
assert ("structlin" in sys.modules) == (sys.argv[2] == "structlin")
print("agrees")
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
def test_export_is_read_by_another_process(checkpoint, tmp_path):
    """One with the operator where structlin_nn.torch is imported, any other anywhere."""
    layer = StructuredLinear(21, 10, structure="monarch", blocks=3, checkpoint=checkpoint)
    exported(layer, tmp_path / "layer.pt2")
    x = torch.randn(2, 5, 21)
    torch.save((x, layer(x).detach()), tmp_path / "data.pt")
    assert output("-c", READ, tmp_path, "structlin" if checkpoint else "alone") == "agrees\n"


@pytest.mark.slow
@pytest.mark.parametrize("cap", [False, True])
def test_compiled_with_inductor(cap):
    """Forward, backward and dynamic batch, the operator and the plain products, against eager."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        StructuredLinear(48, 96, structure="block_tensor_train", rank=2, checkpoint=True, rms_cap=cap),
        torch.nn.GELU(),
        StructuredLinear(96, 42, structure="toeplitz", checkpoint=True, rms_cap=cap),
        StructuredLinear(42, 42, structure="permutation"),
        StructuredLinear(42, 10, structure="tensor_train", rank=3, rms_cap=cap),
    )
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (8, 5, 700):
        x = torch.randn(batch, 48, requires_grad=True)
        results = []
        for call in (model, compiled):
            y = call(x)
            results.append((y, *torch.autograd.grad(y.square().mean(), (x, *model.parameters()))))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
