"""Operands that a layer cannot use raise an error, and what others hang on its factors runs. Nothing crashes.

Each case is a script in a process of its own, for few tokens and for many, which are run in different ways.
"""

from functools import cache

import pytest
import torch
from helpers.children import assert_ran, isolated

from structlin_nn.torch import StructuredLinear
from structlin_nn.torch.linear import FactorList, values

TOKENS = (2, 512)

# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "factors_on_meta": """
layer.factors = layer.factors.to("meta")
expect(ValueError, lambda: layer(x), ["factor W0 is on device meta", "the input is on cpu"])
""",
    "one_factor_on_meta": """
layer.factors[1] = nn.Parameter(layer.factors[1].to("meta"))
expect(ValueError, lambda: layer(x), ["factor W1 is on device meta", "the input is on cpu"])
""",
    "bias_on_meta": """
layer.bias = nn.Parameter(layer.bias.to("meta"))
expect(ValueError, lambda: layer(x), ["the bias is on device meta", "the input is on cpu"])
""",
    "input_on_meta": """
expect(ValueError, lambda: layer(x.to("meta")), ["factor W0 is on device cpu", "the input is on meta"])
""",
    "freed_first_factor": """
layer.factors[0].untyped_storage().resize_(0)
expect(ValueError, lambda: layer(x), ["storage of factor W0 has 0 bytes", "need 2048"])
""",
    "freed_last_factor": """
layer.factors[1].untyped_storage().resize_(0)
expect(ValueError, lambda: layer(x), ["storage of factor W1 has 0 bytes", "need 2048"])
""",
    "freed_bias": """
layer.bias.untyped_storage().resize_(0)
expect(ValueError, lambda: layer(x), ["storage of the bias has 0 bytes", "need 256"])
""",
    "freed_input": """
x = x[1:]  # whose address is not 0
x.untyped_storage().resize_(0)
expect(ValueError, lambda: layer(x), ["storage of the input has 0 bytes"])
""",
    "freed_input_that_is_padded": """
chain = structlin.Structure.parse("pa,pfra->frp; frp,ferp->fe", p=8, a=8, f=8, r=1, e=8, d_in=59)
x = torch.randn(tokens, 59)
x.untyped_storage().resize_(0)
expect(ValueError, lambda: StructuredLinear(59, 64, structure=chain)(x), ["storage of the input has 0 bytes"])
""",
    "wrong_shape_of_data": """
layer.factors[1].data = torch.randn(8, 8, 8, 1)
expect(ValueError, lambda: layer(x), ["factor W1 has shape (8, 8, 8, 1), expected (8, 8, 1, 8)"])
""",
    "wrong_shape_of_bias": """
layer.bias.data = torch.randn(63)
expect(ValueError, lambda: layer(x), ["the bias has shape (63,), expected (64,)"])
""",
    "wrong_shape_in_functional_call": """
call = torch.func.functional_call
for wrong in (torch.randn(8, 8, 8), layer.factors[0].detach()[:4]):
    expect(ValueError, lambda: call(layer, {"factors.0": wrong}, x), ["factor W0 has shape", "expected (8, 8, 1, 8)"])
""",
    "no_tensor": """
del layer.factors._parameters["1"]
layer.factors.register_parameter("1", None)
expect(TypeError, lambda: layer(x), ["factor W1 is None, expected a tensor of shape (8, 8, 1, 8)"])
""",
    "dtype_of_bias": """
layer.bias.data = layer.bias.data.double()
expect(ValueError, lambda: layer(x), ["the bias", "torch.float64", "torch.float32"])
""",
    "a_plain_matrix": """
layer = StructuredLinear(64, 64, structure="dense")
layer.bias = nn.Parameter(layer.bias.to("meta"))
expect(ValueError, lambda: layer(x), ["the bias is on device meta"])
""",
    "a_diagonal": """
layer = StructuredLinear(64, 64, structure="diagonal")
layer.factors[0].data = torch.ones(1)
expect(ValueError, lambda: layer(x), ["has shape (1,), expected (64,)"])
""",
}

# -- what gives the right values ---------------------------------------------------------------------------------------

RIGHT = {
    "everything_on_meta": """
layer, x = layer.to("meta"), x.detach().to("meta").requires_grad_()
y = layer(x)
assert y.is_meta
assert y.shape == (tokens, 64)
y.sum().backward()
assert x.grad.is_meta
""",
    "zero_tensors": """
bias = layer.bias.expand(tokens, 64)
zero = torch._efficientzerotensor(layer.factors[1].shape)
close(torch.func.functional_call(layer, {"factors.1": zero}, x), bias)
close(layer(torch._efficientzerotensor(tokens, 64)), bias)
""",
    "functional_tensors": """
wrap = torch._to_functional_tensor
wrapped = {name: wrap(parameter.detach()) for name, parameter in layer.named_parameters()}
close(torch._from_functional_tensor(torch.func.functional_call(layer, wrapped, wrap(x))), dense(layer, x))
""",
    "views_with_the_sign_turned": """
wanted = layer(x)
for parameter in layer.parameters():
    parameter.data = torch._neg_view(-parameter.data)
    assert parameter.is_neg()
close(layer(torch._neg_view(-x)), wanted)
""",
    "another_default_device_and_dtype": """
wanted = dense(layer, x)
gradients = torch.autograd.grad(wanted.sum(), [x, layer.bias])
def check():
    y = layer(x)
    assert y.device.type == "cpu"
    assert y.dtype == torch.float32
    close(y, wanted)
    close(torch.autograd.grad(y.sum(), [x, layer.bias]), gradients)
with torch.device("meta"):
    check()
torch.set_default_device("meta")
check()
torch.set_default_device(None)
torch.set_default_dtype(torch.float64)
check()
""",
    "pruning": """
from torch.nn.utils import prune
prune.l1_unstructured(layer.factors, "0", 0.5)
y = layer(x)
close(y, dense(layer, x))
y.sum().backward()
original, mask = layer.factors.get_parameter("0_orig"), layer.factors.get_buffer("0_mask")
assert mask.sum() == mask.numel() // 2
assert not original.grad[mask == 0].any()
with torch.no_grad():
    original.mul_(2)
close(layer(x) - layer.bias, 2 * (y - layer.bias))
prune.remove(layer.factors, "0")
assert list(layer.factors._parameters) == ["1", "0"]  # another order
close(layer(x), dense(layer, x))
""",
    "spectral_norm": """
torch.nn.utils.spectral_norm(layer.factors, "1", n_power_iterations=50)
y = layer(x)
close(torch.linalg.matrix_norm(getattr(layer.factors, "1").detach().reshape(8, -1), 2), torch.ones(()), 0.05)
layer.eval()
close(layer(x), dense(layer, x))
y.sum().backward()
assert layer.factors.get_parameter("1_orig").grad.norm() > 0
""",
    "weight_norm": """
wanted = layer(x)
torch.nn.utils.weight_norm(layer.factors, "0")
close(layer(x), wanted)
with torch.no_grad():
    layer.factors.get_parameter("0_g").mul_(3)
y = layer(x)
close(y - layer.bias, 3 * (wanted - layer.bias))
y.sum().backward()
assert layer.factors.get_parameter("0_v").grad.norm() > 0
""",
    "parametrization": """
from torch.nn.utils import parametrize
class Twice(nn.Module):
    def forward(self, factor):
        return 2 * factor
wanted = layer(x)
parametrize.register_parametrization(layer.factors, "0", Twice())
y = layer(x)
close(y - layer.bias, 2 * (wanted - layer.bias))
y.sum().backward()
assert layer.factors.parametrizations["0"].original.grad.norm() > 0
""",
    # What accelerate.cpu_offload does: each module with parameters of its own loads them before its forward.
    "offloading": """
def offload(module):
    held, run = {name: p.detach().clone() for name, p in module._parameters.items()}, module.forward
    def forward(*arguments):
        for name, value in held.items():
            module._parameters[name] = nn.Parameter(value)
        found = run(*arguments)
        for name, value in held.items():
            module._parameters[name] = nn.Parameter(value.to("meta"))
        return found
    module.forward = forward
    forward(*(() if module is not layer else (x,)))  # leaves nothing but the meta device
for options in ({}, {"rms_cap": True}):
    layer = StructuredLinear(64, 64, **options)
    wanted = layer(x)
    gradient = torch.autograd.grad(wanted.sum(), x)
    for module in (layer.factors, layer.gains, layer):
        if module is not None:
            offload(module)
    assert all(parameter.is_meta for parameter in layer.parameters())
    y = layer(x)
    close(y, wanted, 0)
    close(torch.autograd.grad(y.sum(), x), gradient, 0)
""",
    "accelerate": """
import copy
try:
    from accelerate import cpu_offload, dispatch_model
except ImportError:
    print("no accelerate")
else:
    for options in ({}, {"rms_cap": True}):
        layer = StructuredLinear(64, 64, **options)
        wanted = layer(x)
        gradient = torch.autograd.grad(wanted.sum(), x)
        moved = cpu_offload(copy.deepcopy(layer), execution_device=torch.device("cpu"))
        assert moved.factors[0].is_meta
        y = moved(x)
        close(y, wanted, 0)
        close(torch.autograd.grad(y.sum(), x), gradient, 0)
        model = nn.Sequential(layer, nn.ReLU(), copy.deepcopy(layer))
        wanted = model(x)
        dispatch_model(model, {"0": "cpu", "2": "cpu"}, main_device="cpu", force_hooks=True)
        close(model(x), wanted, 0)
""",
    "hooks_of_the_list": """
seen = []
layer.factors.register_forward_hook(lambda module, inputs, factors: seen.append(len(factors)))
close(layer(x), dense(layer, x))
assert seen == [2, 2]
layer.factors.register_forward_hook(lambda module, inputs, factors: tuple(2 * factor for factor in factors))
y = layer(x)
assert seen == [2, 2, 2]
close(y, dense(layer, x))
""",
    "hooks_on_saved_tensors": """
gy = torch.randn(tokens, 64)
operands = [x, *layer.parameters()]
wanted = torch.autograd.grad(layer(x), operands, gy)
keep = lambda tensor: tensor
for pack, unpack in (
    (lambda tensor: tensor.bfloat16(), keep),
    (lambda tensor: tensor.bfloat16(), lambda tensor: tensor.float()),
    (lambda tensor: tensor.double(), keep),
    (keep, lambda tensor: torch.stack((tensor, tensor), -1)[..., 0]),  # other strides
    (keep, lambda tensor: torch.nn.Parameter(tensor)),
):
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = layer(x)
    try:
        close(torch.autograd.grad(y, operands, gy), wanted, 0.02)
    except RuntimeError as error:  # torch's own products refuse other dtypes, as those of nn.Linear do
        assert tokens == 2
        assert "dtype" in str(error) or "scalar type" in str(error)
for unpack in (lambda tensor: tensor.reshape(-1), lambda tensor: tensor.to("meta")):
    with torch.autograd.graph.saved_tensors_hooks(keep, unpack):
        y = layer(x)
    try:
        torch.autograd.grad(y, operands, gy)
    except (IndexError, RuntimeError, ValueError):
        pass
    else:
        raise AssertionError("no error")
""",
    "traced": """
layer.eval()
for grad in (False, True):
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layer, x.detach(), check_trace=False)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not any("empty" in kind or "as_strided" in kind for kind in kinds), kinds
    for count in (tokens, tokens + 3):
        other = torch.randn(count, 64)
        close(traced(other), dense(layer, other))
""",
    "gradients_of_every_kind": """
import torch.autograd.forward_ad as forward_ad
x = x.detach().double().requires_grad_()
for checkpoint in (False, True):
    layer = StructuredLinear(64, 64, dtype=torch.float64, checkpoint=checkpoint)
    operands, y = [x, *layer.parameters()], layer(x)
    gy, tangent = torch.randn_like(y), torch.randn_like(y)
    def pull(gradient, **options):
        return torch.autograd.grad(y, operands, gradient, retain_graph=True, **options)
    with forward_ad.dual_level():  # the forward pass was outside of it
        tangents = [forward_ad.unpack_dual(t).tangent for t in pull(forward_ad.make_dual(gy, tangent))]
    close(tangents, pull(tangent), 1e-12)
    batched = pull(torch.stack((gy, tangent)), is_grads_batched=True)
    for k, one in enumerate((gy, tangent)):
        close([g[k] for g in batched], pull(one), 1e-12)
    gx, *_ = pull(gy, create_graph=True)
    close(gx, pull(gy)[0], 1e-12)
    (found,) = torch.autograd.grad(gx.square().sum(), layer.factors[0])
    matrix = layer.operator.to_dense()
    (wanted,) = torch.autograd.grad((gy @ matrix).square().sum(), layer.factors[0])
    close(found, wanted, 1e-11)
""",
    "failing_compiler": """
import warnings
from structlin.execution.compiled import _writer
from structlin.execution.compiled._target import CompileError
def fail(*arguments):
    raise CompileError("LLVM did not compile")
_writer.load = fail
layer, x = StructuredLinear(48, 64), x[:, :48].detach().requires_grad_()  # not compiled yet
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
close(y, dense(layer, x))
close(gradient, torch.autograd.grad(dense(layer, x).sum(), x)[0])
assert len(caught) <= 1
""",
}

COMPILED_AUTOGRAD = """
gy, operands = torch.randn(tokens, 64), [x, *layer.parameters()]
wanted = torch.autograd.grad(layer(x), operands, gy)
with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
    layer(x).backward(gy)
close([operand.grad for operand in operands], wanted)
"""

START = """
tokens = {tokens}
layer, x = StructuredLinear(64, 64, structure="block_tensor_train"), torch.randn(tokens, 64, requires_grad={gradient})
"""


def start(name, tokens):
    return START.format(tokens=tokens, gradient=name in RIGHT and name != "views_with_the_sign_turned")


SCRIPTS = {
    f"{name}-{tokens}": start(name, tokens) + script
    for name, script in {**REFUSED, **RIGHT}.items()
    for tokens in TOKENS
}  # fmt: skip


WARM = f"""
layer = StructuredLinear(64, 64, structure="block_tensor_train")
for tokens in {TOKENS}:
    for gradient in (False, True):
        x = torch.randn(tokens, 64, requires_grad=gradient)
        layer(x).sum().backward()
    with torch.no_grad():
        layer(x)
"""


@cache
def results():
    return run({"": WARM, **SCRIPTS})


def run(scripts):
    return isolated(scripts, STRUCTLIN_EXECUTION="compiled,chunked")  # the ways that take addresses


@pytest.mark.parametrize("name", SCRIPTS)
def test_operands_of_every_kind(name):
    assert_ran(results()[name])


@pytest.mark.slow
@pytest.mark.parametrize("tokens", TOKENS)
def test_compiled_autograd(tokens):
    script = START.format(tokens=tokens, gradient=True) + COMPILED_AUTOGRAD
    assert_ran(*run({"compiled autograd": script}).values())


# -- the list of factors -----------------------------------------------------------------------------------------------


def test_factors_are_read_by_name():
    layer = StructuredLinear(6, 35, structure="block_tensor_train", rank=2)
    first, second = layer.factors
    assert values(layer.factors) == (first, second)
    assert layer.factors() == (first, second)
    held = layer.factors._parameters
    held["0"] = held.pop("0")
    assert list(held) == ["1", "0"]
    assert [f is g for f, g in zip(values(layer.factors), (first, second), strict=True)] == [True, True]


def test_the_list_looks_like_any_other():
    layer = StructuredLinear(6, 35, structure="block_tensor_train", rms_cap=True)
    plain = torch.nn.ParameterList(layer.factors)
    assert repr(layer.factors) == repr(plain)
    assert list(layer.state_dict()) == ["bias", "factors.0", "factors.1", "gains.0", "gains.1"]
    assert type(layer.factors) is type(layer.gains) is FactorList
    assert isinstance(layer.factors, torch.nn.ParameterList)


def test_another_list_takes_its_place():
    layer = StructuredLinear(6, 35, structure="block_tensor_train")
    x = torch.randn(3, 6)
    wanted = layer(x)
    layer.factors = torch.nn.ParameterList(layer.factors)
    assert torch.equal(layer(x), wanted)


def test_a_layer_without_factors():
    layer = StructuredLinear(6, 6, structure="permutation")
    assert values(layer.factors) == ()
    assert layer(torch.randn(3, 6)).shape == (3, 6)
