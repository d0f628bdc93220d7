"""The layer as code of others sees it: its weight, its place in graphs, and what it says to wrong input."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import structlin
from structlin_nn.torch import StructuredLinear, replace_linear


@pytest.mark.parametrize("name", structlin.structure_names())
def test_weight_is_the_matrix(name):
    (d_out, d_in), options = structlin.structure_class(name).examples[0]
    layer = StructuredLinear(d_in, d_out, structure=name, dtype=torch.float64, **options)
    assert layer.weight.shape == (d_out, d_in)
    expected = layer.operator.to_dense()
    torch.testing.assert_close(layer.weight, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    x = torch.randn(5, d_in, dtype=torch.float64)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 2, "rms_cap": True}], ids=["plain", "capped"])
def test_gradients_through_the_weight(options):
    layer = StructuredLinear(12, 6, structure="block_tensor_train", dtype=torch.float64, **options)
    x, target = torch.randn(7, 12, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    ((layer(x) - target) ** 2).sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    ((F.linear(x, layer.weight, layer.bias) - target) ** 2).sum().backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_weight_has_dtype_and_device_of_the_factors(dtype):
    layer = StructuredLinear(12, 6, structure="low_rank", rank=2, dtype=dtype)
    assert layer.weight.dtype == dtype
    assert StructuredLinear(12, 6, structure="low_rank", device="meta").weight.is_meta


def test_weight_is_not_assigned():
    layer = StructuredLinear(12, 6, structure="low_rank", rank=2)
    for value in (torch.ones(6, 12), nn.Parameter(torch.ones(6, 12)), None):
        with pytest.raises(AttributeError, match=r"computed from its factors and cannot be assigned.*12 -> 6"):
            layer.weight = value
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        nn.init.normal_(layer.weight)  # as initialisation hooks do
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


class ReadsTheWeight(nn.Module):
    """As the attention of BEiT and SwinV2 of timm."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(24))
        self.head = nn.Linear(24, 2)

    def forward(self, x):
        return self.head(F.linear(x, self.qkv.weight, self.q_bias))


def test_parents_may_read_the_weight():
    model = ReadsTheWeight()
    replace_linear(model, "low_rank", rank=2)
    model(torch.randn(3, 8)).sum().backward()
    assert model.qkv.factors[0].grad.any()


def test_a_graph_of_fx_calls_the_layer():
    model = nn.Sequential(StructuredLinear(8, 8, structure="monarch"), nn.ReLU(), StructuredLinear(8, 4, rms_cap=True))
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    x = torch.randn(4, 8)
    assert torch.equal(graph(x), model(x))
    graph(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_trace():
    model = nn.Sequential(StructuredLinear(8, 8, structure="monarch"), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 8)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), model(x))
