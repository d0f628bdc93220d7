"""Errors, budgets and second moments of weights and inputs whose squares overflow or underflow."""

import copy
import re

import pytest
import torch
from torch import nn

from structlin_nn.torch import project_linear
from structlin_nn.torch._project_calibration import gather

SCALES = ((1e160, 1.0), (1e-170, 1.0), (1.0, 1e120), (1.0, 1e-120), (1e90, 1e90), (1e-90, 1e-90), (1e200, 1e130))


def model(scale: float) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(36, 48), nn.Tanh(), nn.Linear(48, 30)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale)
    return made


def inputs() -> torch.Tensor:
    return torch.randn(100, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("weights", [1.0, 1e160, 1e-170])
def test_reported_errors_of_weights(weights):
    made = model(weights)
    before = copy.deepcopy(made)
    report = project_linear(made, "low_rank", rank=3, layers="all")
    assert len(report.layers) == 2
    for line in report.layers:
        name = line.names[0]
        old = before.get_submodule(name).weight.detach() / weights
        new = torch.from_numpy(made.get_submodule(name).operator.to_dense().numpy(force=True)) / weights
        assert line.weight_error == pytest.approx(float((old - new).norm() / old.norm()), rel=1e-9)
        assert 0.5 < line.weight_error < 1


@pytest.mark.parametrize(("weights", "data"), [(1.0, 1.0), *SCALES])
def test_reported_errors_of_outputs(weights, data):
    made = model(weights)
    old = made[0].weight.detach() / weights
    report = project_linear(made, "low_rank", rank=3, layers="0", calibration=[inputs() * data])
    new = torch.from_numpy(made[0].operator.to_dense().numpy(force=True)) / weights
    expected = float((inputs() @ (old - new).T).norm() / (inputs() @ old.T).norm())
    assert report.layers[0].output_error == pytest.approx(expected, rel=1e-9)
    assert 0.5 < expected < 1


@pytest.mark.parametrize("structure", ["low_rank", "monarch"])
@pytest.mark.parametrize("choice", [{"mac_fraction": 0.9}, {"target_error": 0.6}])
@pytest.mark.parametrize(("weights", "data"), SCALES)
def test_choices_do_not_depend_on_the_scale(structure, choice, weights, data):
    def chosen(weights: float, data: float) -> list:
        given = {"calibration": [inputs() * data], "layers": "0"} if calibrated else {"layers": "all"}
        report = project_linear(model(weights), structure, **choice, **given)
        return [(line.options, round(line.weight_error, 6)) for line in report.layers]

    calibrated = data != 1
    assert chosen(weights, data) == chosen(1.0, 1.0)


@pytest.mark.parametrize(("scale", "dtype"), [
    (1.0, torch.float32), (1e-25, torch.float32), (1e25, torch.float32), (1e25, torch.bfloat16),
    (1e-25, torch.bfloat16), (1e4, torch.float16), (1e120, torch.float64), (1e25, torch.complex64),
])  # fmt: skip
def test_second_moments_are_exact(scale, dtype):
    """In float64, of what the layer gets; of half precision in float32, whose products of such numbers are exact."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, dtype=dtype)
    batches = [(torch.randn(rows, 6, dtype=torch.promote_types(dtype, torch.float64)) * scale).to(dtype) for rows in
               (9, 40)]  # fmt: skip
    rows = torch.cat(batches).to(torch.promote_types(dtype, torch.float64)) / scale
    found = gather(layer, {layer: "layer"}, batches, None)[layer] / scale**2
    tolerance = 1e-6 if dtype in (torch.bfloat16, torch.float16) else 1e-14
    torch.testing.assert_close(found, rows.mT @ rows.conj() / len(rows), rtol=tolerance, atol=tolerance)


def test_what_is_wrong_with_the_inputs():
    layer = nn.Linear(6, 4).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    for scale in (1e-170, 1e170):
        largest = re.escape(f"{scale * float(x.abs().max()):.3g}")
        with pytest.raises(ValueError, match=f"layer 'layer' overflow or underflow float64: .* is {largest}; scale"):
            gather(layer, {layer: "layer"}, [x * scale], None)
    with pytest.raises(ValueError, match="the inputs of layer 'layer' are not finite"):
        gather(layer, {layer: "layer"}, [x, torch.full_like(x, torch.inf)], None)
    found = gather(layer, {layer: "layer"}, [x, torch.zeros(0, 6).double(), torch.zeros(1, 6).double()], None)[layer]
    torch.testing.assert_close(found, x.mT @ x / 10)
