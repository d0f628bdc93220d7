"""``torch.jit.script`` of layers and of models that contain them."""

import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from structlin_nn.torch import StructuredLinear
from structlin_nn.torch.pointwise import StructuredPointwise

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
STRUCTURES = {
    "dense": {}, "low_rank": {"rank": 3}, "block_tensor_train": {"rank": 2}, "monarch": {"blocks": 4}, "kronecker": {},
    "tensor_train": {"rank": 2, "cores": 3, "factorization": ((3, 2, 3), (2, 3, 4))},
    "blast": {"rank": 2, "blocks": 2},
}  # fmt: skip


def scripted(module):
    """Return the module after scripting, saving and loading."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize(("name", "options"), STRUCTURES.items(), ids=STRUCTURES)
@pytest.mark.parametrize("bias", [True, False])
def test_values_gradients_and_state(name, options, bias):
    shape = (24, 18) if name == "tensor_train" else (22, 14)  # Monarch pads both sizes
    torch.manual_seed(0)
    model = nn.Sequential(StructuredLinear(*shape, bias, dtype=torch.float64, structure=name, **options), nn.Tanh())
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    layer, twin = model[0], scripted(model)
    assert model[0] is layer
    assert type(layer) is StructuredLinear
    assert list(twin.state_dict()) == list(model.state_dict())
    for lead in ((), (5,), (2, 3), (2, 0)):
        x = torch.randn(*lead, shape[0], dtype=torch.float64, requires_grad=True)
        found, expected = twin(x), model(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(y.sum(), [x, *m.parameters()]) for y, m in ((found, twin), (expected, model))]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)
    with pytest.raises(torch.jit.Error, match=f"must have size in_features = {shape[0]}"):
        twin(torch.ones(3, 2 * shape[0], dtype=torch.float64))


class ReadsWeight(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


def test_a_parent_reads_the_weight():
    model = ReadsWeight(StructuredLinear(14, 22, structure="monarch", blocks=4, dtype=torch.float64))
    x = torch.randn(3, 14, dtype=torch.float64)
    torch.testing.assert_close(scripted(model)(x), model.layer(x))


def test_pointwise_and_autocast():
    layer = StructuredPointwise(12, 10, stride=(1, 1), structure="low_rank", rank=2)
    x = torch.randn(2, 12, 3, 5)
    torch.testing.assert_close(scripted(layer)(x), layer(x))
    linear = StructuredLinear(12, 10, structure="monarch", blocks=2)
    twin = scripted(linear)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = twin(x.mT.reshape(-1, 12)), linear(x.mT.reshape(-1, 12))
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_layers_that_cannot_be_scripted():
    def low_rank(**options):
        return StructuredLinear(8, 6, structure="low_rank", rank=2, **options)

    normed = low_rank()
    parametrizations.weight_norm(normed.factors, "0")
    for layer, words in (
        (StructuredLinear(8, 8, structure="circulant"), "not a chain of einsums: Circulant"),
        (low_rank(rms_cap=True), "it caps its factors"),
        (low_rank(checkpoint=True), "it has checkpoint=True"),
        (StructuredPointwise(8, 6, stride=(2, 1), structure="low_rank", rank=2), r"it has stride \(2, 1\)"),
        (normed, "parametrizations"),
    ):
        with pytest.raises(TypeError, match=words + ".*use torch.export.export"):
            torch.jit.script(nn.Sequential(layer))
