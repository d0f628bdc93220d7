"""Projection of trained layers onto structures, and the way back."""

import copy
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.layers import Tied
from helpers.refusals import refused
from torch import nn

import structlin
from structlin_nn.counting import count
from structlin_nn.torch import StructuredLinear, _project_layers, project_linear, replace_linear, to_dense_linear


def mlp(seed: int = 0, dtype: torch.dtype | None = None) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(24, 40, dtype=dtype), nn.ReLU(), nn.Linear(40, 36, dtype=dtype), nn.ReLU(),
        nn.Linear(36, 6, dtype=dtype),
    )  # fmt: skip


def skewed(batches: int = 4, rows: int = 60) -> list[torch.Tensor]:
    """Inputs that lie mostly in a few directions."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0] * 0.7 ** torch.arange(24)
    return [torch.randn(rows, 24, generator=generator) @ mixing.mT for _ in range(batches)]


def dense(layer: nn.Module) -> np.ndarray:
    """(d_out, d_in) by pushing unit vectors through, in float64."""
    layer = copy.deepcopy(layer).double()
    eye = torch.eye(layer.in_features, dtype=torch.float64)
    with torch.no_grad():
        return (layer(eye) - layer(torch.zeros_like(eye))).numpy().T


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())


STRUCTURES = [
    ("low_rank", {"rank": 4}),
    ("block_tensor_train", {"rank": 1}),
    ("block_tensor_train", {"cores": 3, "rank": 1}),
    ("tensor_train", {"rank": 2}),
    ("kronecker", {}),
    ("monarch", {"blocks": 2}),
    ("block_diagonal", {"blocks": 4}),
]


@pytest.mark.parametrize(("name", "options"), STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("calibrated", [False, True])
def test_weights_that_have_the_structure_are_recovered(name, options, dtype, calibrated):
    model = mlp(dtype=dtype)
    data = [x.to(dtype) for x in skewed()]
    replace_linear(model, name, layers="all_but_last", **options)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.bias.normal_()
    expected, before = [layer(data[0]) for layer in (model, model[0])], [dense(model[i]) for i in (0, 2)]
    assert to_dense_linear(model) == ("0", "2")
    assert isinstance(model[0], nn.Linear)
    tight = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close([layer(data[0]) for layer in (model, model[0])], expected, rtol=10 * tight, atol=tight)

    report = project_linear(
        model, name, calibration=data if calibrated else None, damping=1e-3, max_sweeps=1000, tolerance=0.0, **options
    )
    assert [layer.names for layer in report.layers] == [("0",), ("2",)]
    for layer, line, W in zip((model[0], model[2]), report.layers, before, strict=True):
        assert isinstance(layer, StructuredLinear)
        assert layer.factors[0].dtype == dtype
        assert line.weight_error < tight
        np.testing.assert_allclose(dense(layer), W, atol=tight * np.abs(W).max())
        assert (line.output_error is None) != calibrated
    torch.testing.assert_close(model(data[0]), expected[0], rtol=10 * tight, atol=10 * tight)


def test_errors_are_those_of_the_layers():
    model, data = mlp(), skewed()
    original = copy.deepcopy(model)
    report = project_linear(model, "low_rank", rank=3, calibration=data, layers="all")
    inputs = [torch.cat(data), original[:2](torch.cat(data)), original[:4](torch.cat(data))]
    assert [line.names for line in report.layers] == [("0",), ("2",), ("4",)]
    for place, line, x in zip((0, 2, 4), report.layers, inputs, strict=True):
        W, A, x = dense(original[place]), dense(model[place]), x.detach().double().numpy().T
        norm = np.linalg.norm
        assert line.weight_error == pytest.approx(norm(W - A) / norm(W), rel=1e-5)
        assert line.output_error == pytest.approx(norm((W - A) @ x) / norm(W @ x), rel=1e-4)
        assert line.params_after == sum(p.numel() for p in model[place].parameters())
        assert torch.equal(model[place].bias, original[place].bias)


@pytest.mark.parametrize(("name", "options"), STRUCTURES[:2] + STRUCTURES[3:])
def test_calibration_lowers_the_error_of_the_outputs(name, options):
    data, held_out = skewed(), torch.cat(skewed(8)[4:])
    errors = []
    for calibration in (None, data):
        model = mlp()
        with torch.no_grad():
            exact = model[0](held_out)
            project_linear(model, name, calibration=calibration, **options)
            errors.append(((model[0](held_out) - exact).norm() / exact.norm()).item())
    plain, weighted = errors
    assert weighted < 0.95 * plain


def test_calibrated_low_rank_is_the_best_there_is():
    """Eckart-Young for the outputs: no matrix of rank 4 does better on the data."""
    data, model = skewed(), mlp()
    x = torch.cat(data).double().numpy().T
    W = dense(model[0])
    report = project_linear(model, "low_rank", rank=4, calibration=data, damping=0.0, layers="0")
    values = np.linalg.svd(W @ x, compute_uv=False)
    assert report.layers[0].output_error == pytest.approx(np.linalg.norm(values[4:]) / np.linalg.norm(values), rel=1e-3)


def test_damping_keeps_directions_that_the_data_lack():
    data = [torch.randn(50, 3, generator=torch.Generator().manual_seed(2)) @ torch.eye(3, 24)]
    W = dense(mlp()[0])
    kept = []
    for damping in (0.0, 0.01):
        model = mlp()
        project_linear(model, "low_rank", rank=10, calibration=data, damping=damping, layers="0")
        kept.append(np.linalg.norm(dense(model[0])[:, 3:]) / np.linalg.norm(W[:, 3:]))
        np.testing.assert_allclose(dense(model[0])[:, :3], W[:, :3], atol=0.02)
    assert kept[1] > kept[0] + 0.2


@pytest.mark.parametrize(
    ("name", "options"),
    [("low_rank", {}), ("block_tensor_train", {}), ("tensor_train", {}), ("monarch", {}), ("blast", {"blocks": 2})],
)
@pytest.mark.parametrize("fraction", [0.5, 0.9, 1.0])
def test_budget_is_kept_and_used(name, options, fraction):
    model = mlp()
    if name == "monarch" and fraction == 0.5:
        with pytest.raises(ValueError, match="the cheapest forms of the chosen layers need 2,352 MACs"):
            project_linear(model, name, mac_fraction=fraction, layers="all", **options)
        return
    before = count(model, torch.zeros(1, 24)).macs()
    report = project_linear(model, name, mac_fraction=fraction, layers="all", **options)
    assert before == report.macs_before == 24 * 40 + 40 * 36 + 36 * 6
    assert report.max_macs == int(fraction * before)
    after = count(model, torch.zeros(1, 24)).macs()
    assert after == report.macs_after <= report.max_macs
    if fraction == 1.0:
        assert {line.weight_error for line in report.layers} == {0.0}
        assert not any(isinstance(m, StructuredLinear) for m in model)


def test_a_larger_budget_gives_a_smaller_error():
    errors = []
    for budget in (800, 1200, 1600, 2000):
        report = project_linear(mlp(), "low_rank", max_macs=budget, calibration=skewed())
        assert report.macs_after <= budget
        # the next rank of either layer would not fit
        for line in report.layers:
            more = sum(line.shape) if line.structure is not None else 10**9
            assert report.macs_after + more > budget or line.macs_after + more >= line.macs_before
        errors.append(sum(line.output_error**2 for line in report.layers))
    assert errors == sorted(errors, reverse=True)


def test_budget_goes_where_it_counts():
    """A layer of rank 2 gets rank 2, and the other one all the rest."""
    model = mlp()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(40, 2) @ torch.randn(2, 24))
    report = project_linear(model, "low_rank", max_macs=2 * 64 + 12 * 76)
    assert [line.options for line in report.layers] == [{"rank": 2}, {"rank": 12}]


def test_shared_layers_count_at_each_place():
    shared = nn.Linear(30, 30)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(30, 30))
    report = project_linear(model, "low_rank", max_macs=1000, layers="all")
    assert report.macs_before == 2700
    assert model[0] is model[2]
    assert isinstance(model[0], StructuredLinear)
    assert count(model, torch.zeros(1, 30)).macs() == report.macs_after <= 1000
    assert report.layers[0].names == ("0", "2")
    assert to_dense_linear(model) == ("0", "3")
    assert model[0] is model[2]


@pytest.mark.parametrize(("name", "least"), [("low_rank", 0.8), ("tensor_train", 0.3)])
def test_budget_of_parameters(name, least):
    """Of what is stored: one layer at two places counts once. No form that needs more MACs than dense is taken."""
    shared = nn.Linear(30, 30)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(30, 24))
    report = project_linear(model, name, param_fraction=0.4, layers="all")
    stored = sum(f.numel() for m in (model[0], model[3]) if isinstance(m, StructuredLinear) for f in m.factors)
    stored += sum(m.weight.numel() for m in (model[0], model[3]) if type(m) is nn.Linear)
    assert report.max_params == int(0.4 * (900 + 720))
    assert report.max_macs is None
    assert least * report.max_params < stored <= report.max_params
    assert report.to_dict()["max_params"] == 648
    again = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 24))
    assert project_linear(again, name, max_params=648, layers="all").max_params == 648
    with pytest.raises(TypeError, match=r"max_params must be an integer, got 0\.5"):
        project_linear(again, name, max_params=0.5, layers="all")


@pytest.mark.parametrize("name", ["low_rank", "block_tensor_train"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_target_error_is_met_by_the_cheapest_form(name, calibrated):
    data = skewed() if calibrated else None
    model = mlp()
    report = project_linear(model, name, target_error=0.5, calibration=data, damping=1e-9, restarts=0)
    for line in report.layers:
        error = line.output_error if calibrated else line.weight_error
        assert error <= 0.5 + 1e-6
        if line.structure is None:
            assert "0.5" in line.reason
            continue
        ((option, value),) = line.options.items()
        cheaper = value - 1
        if cheaper:
            again = project_linear(
                mlp(), name, layers=line.names[0], calibration=data, damping=1e-9, restarts=0, **{option: cheaper}
            ).layers[0]
            assert (again.output_error if calibrated else again.weight_error) > 0.5


def test_layers_that_gain_nothing_stay_dense():
    model = mlp()
    kept = model[4]
    report = project_linear(model, "low_rank", rank=8, layers="all")  # 8 * (36 + 6) > 36 * 6
    assert model[4] is kept
    assert [line.structure is None for line in report.layers] == [False, False, True]
    assert report.layers[2].macs_after == 216
    assert "stays dense: 4 (with 336 MACs it would save nothing" in str(report)
    before = mlp().state_dict()
    model = mlp()
    with pytest.raises(ValueError, match="saves nothing in any layer: '0' takes 960 MACs, structured 1,280"):
        project_linear(model, "low_rank", rank=20)
    assert unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_projected_in_full(dtype):
    model = mlp().to(dtype)
    exact = copy.deepcopy(model).double()
    report = project_linear(model, "low_rank", rank=6, layers="0", calibration=[x.to(dtype) for x in skewed()])
    project_linear(exact, "low_rank", rank=6, layers="0", calibration=[x.to(dtype).double() for x in skewed()])
    assert {p.dtype for p in model.parameters()} == {dtype}
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(dense(model[0]), dense(exact[0]), atol=4 * eps)
    assert report.layers[0].weight_error > 0


def test_everything_else_is_kept():
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[2] = nn.Sequential(nn.Linear(40, 36, bias=False), nn.Dropout(0.5))
    model.train()
    model[2].eval()
    state = torch.get_rng_state()
    project_linear(model, "low_rank", rank=3, calibration=skewed())
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from the global generator"
    assert [f.requires_grad for f in model[0].factors] == [False, False]
    assert model[0].bias.requires_grad
    assert model[2][0].bias is None
    assert [m.training for m in (model, model[0], model[2], model[2][0], model[2][1])] == [True, True] + [False] * 3
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_calibration_leaves_running_statistics_alone():
    model = nn.Sequential(nn.Linear(24, 40), nn.BatchNorm1d(40), nn.Dropout(0.9), nn.Linear(40, 36)).train()
    before = copy.deepcopy(model[1].state_dict())
    report = project_linear(model, "low_rank", rank=3, layers="all", calibration=skewed())
    assert all(torch.equal(v, before[k]) for k, v in model[1].state_dict().items())
    assert model[2].training
    assert report.layers[1].output_error > 0


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 30), nn.Linear(24, 30)

    def forward(self, x, y=None):
        return self.a(input=x) + (0 if y is None else self.b(y))


@pytest.mark.parametrize("kind", [tuple, list, dict, "forward"])
def test_kinds_of_batches(kind):
    torch.manual_seed(0)
    model, plain = TwoInputs(), skewed()
    reference = copy.deepcopy(model)
    x, y = plain[0], plain[1] * 3
    batch = {"x": x, "y": y} if kind in (dict, "forward") else kind((x, y))
    forward = (lambda m, b: m(b["x"], y=b["y"])) if kind == "forward" else None
    report = project_linear(model, "low_rank", rank=3, layers="all", calibration=(b for b in [batch]), forward=forward)
    for line, data in zip(report.layers, (x, y), strict=True):
        W, A = dense(reference.get_submodule(line.names[0])), dense(model.get_submodule(line.names[0]))
        data = data.double().numpy().T
        assert line.output_error == pytest.approx(
            np.linalg.norm((W - A) @ data) / np.linalg.norm(W @ data), rel=1e-4
        )  # fmt: skip


def test_tied_weights_are_left_alone_unless_asked():
    model = Tied(50, 24)
    report = project_linear(model, "low_rank", rank=4, layers="all")
    assert report.skipped == (("head", "tied to embedding.weight"),)
    assert model.head.weight is model.embedding.weight
    assert isinstance(model.body, StructuredLinear)
    assert "left alone: head (tied to embedding.weight)" in str(report)
    with pytest.raises(ValueError, match="all selected layers are tied"):
        project_linear(Tied(50, 24), "low_rank", rank=4, layers="head")
    table = model.embedding.weight.clone()
    report = project_linear(model, "low_rank", rank=4, layers="head", tied=True, calibration=[torch.arange(50)])
    assert isinstance(model.head, StructuredLinear)
    assert torch.equal(model.embedding.weight, table)
    assert report.layers[0].output_error < 1


@pytest.mark.parametrize("gain", [None, False])
def test_capped_layers_hold_the_projection(gain):
    model, plain = mlp(), mlp()
    with torch.no_grad():
        for m in (model, plain):
            m[0].weight.mul_(30 if gain is None else 0.01)
            m[2].weight.mul_(0.01)
    report = project_linear(model, "low_rank", rank=4, rms_cap=True, gain=gain)
    project_linear(plain, "low_rank", rank=4)
    for place in (0, 2):
        np.testing.assert_allclose(dense(model[place]), dense(plain[place]), rtol=1e-4, atol=1e-5)
    assert (model[0].gains is not None) == (gain is None)
    if gain is None:
        assert model[0].gains[0] > 1
        assert model[2].gains[0].item() == 1
    x = skewed()[0]
    expected = model(x)
    to_dense_linear(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert report.layers[0].weight_error == pytest.approx(
        np.linalg.norm(dense(plain[0]) - dense(_scaled(gain))) / np.linalg.norm(dense(_scaled(gain))), rel=1e-4
    )  # fmt: skip


def _scaled(gain):
    layer = mlp()[0]
    with torch.no_grad():
        layer.weight.mul_(30 if gain is None else 0.01)
    return layer


def test_a_cap_that_is_too_low_without_gains_is_an_error():
    model = mlp()
    with torch.no_grad():
        model[0].weight.mul_(30)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layer '0' \(24 -> 40\): the RMS of factor 0 is .* times its cap"):
        project_linear(model, "low_rank", rank=4, rms_cap=True, gain=False)
    assert unchanged(model, before)


def test_a_structure_or_a_function_in_place_of_a_name():
    structure = structlin.Structure.parse("i,ri->r; r,or->o", i=24, r=3, o=40)
    model, named = mlp(), mlp()
    project_linear(model, structure, layers="0")
    project_linear(named, "low_rank", rank=3, layers="0")
    np.testing.assert_allclose(dense(model[0]), dense(named[0]), atol=1e-6)
    seen = []

    def choose(name, layer):
        seen.append(name)
        return structlin.design("low_rank", (layer.out_features, layer.in_features), rank=2)

    project_linear(mlp(), choose)
    assert seen == ["0", "2"]
    with pytest.raises(ValueError, match=r"layer '2' .* cannot hold"):
        project_linear(mlp(), structure)
    with pytest.raises(ValueError, match="target_error chooses ranks, so structure must be a name"):
        project_linear(mlp(), structure, layers="0", target_error=0.1)
    with pytest.raises(TypeError, match="structure must be"):
        project_linear(mlp(), 3)


def test_report_is_plain_data():
    report = project_linear(mlp(), "tensor_train", target_error=0.9, calibration=skewed(), layers="all")
    record = json.loads(json.dumps(report.to_dict()))
    assert record == report.to_dict()
    assert record["macs_before"] == report.macs_before
    assert [line["names"] for line in record["layers"]] == [["0"], ["2"], ["4"]]
    text = str(report).splitlines()
    head = "layer shape form weight error output error MACs after params after"
    assert " ".join(text[0].split()) == head
    assert len({len(line) for line in text[:5]}) == 1


BAD = [
    (
        {"rank": 3, "mac_fraction": 0.5},
        "give at most one of rank, target_error, max_macs, mac_fraction, max_params, param_fraction, got rank",
    ),
    ({"mac_fraction": 0.5, "param_fraction": 0.5}, "got mac_fraction, param_fraction"),
    ({"param_fraction": 0.01}, "the cheapest forms of the chosen layers need 140 parameters, more than the budget of"),
    ({"param_fraction": 0.0}, r"param_fraction must lie in \(0, 1\], got 0.0"),
    ({"target_error": 0.1, "max_macs": 100}, "got target_error, max_macs"),
    ({"target_error": -1.0}, "target_error must be a number of at least 0, got -1.0"),
    ({"mac_fraction": 1.5}, r"mac_fraction must lie in \(0, 1\], got 1.5"),
    ({"mac_fraction": 0.01}, "the cheapest forms of the chosen layers need 140 MACs, more than the budget of 24"),
    ({"rank": 3, "damping": -1}, "damping must be"),
    ({"rank": 3, "max_sweeps": 0}, "max_sweeps must be an integer of at least 1"),
    ({"rank": 3, "blocks": 3}, "layer '0' .*has no option 'blocks'"),
    ({"mac_fraction": 0.5, "blocks": 3}, "layer '0' .*has no option 'blocks'"),
    ({"rank": 3, "layers": "nothing"}, "no linear layer matches 'nothing'; the linear layers are 0, 2, 4"),
    ({"rank": 3, "calibration": []}, "calibration has no batches"),
    ({"rank": 3, "calibration": [torch.full((2, 24), torch.nan)]}, "the inputs of layer '0' are not finite"),
    ({"rank": 3, "calibration": [torch.zeros(2, 24)]}, "all inputs of layer '0' are 0"),
    ({"rank": 3, "forward": lambda m, b: m(b)}, "forward runs batches of calibration, which is missing"),
    ({"rank": 3, "gain": True}, "gain=True needs rms_cap=True"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=[w for _, w in BAD])
def test_bad_calls_change_nothing(options, words):
    model = mlp().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        project_linear(model, "low_rank", **options)
    assert unchanged(model, before)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layers_that_cannot_be_projected():
    with pytest.raises(ValueError, match="unknown structure 'low_rang'"):
        project_linear(mlp(), "low_rang")
    with pytest.raises(TypeError, match=r"max_macs must be an integer, got 0\.5"):
        project_linear(mlp(), "low_rank", max_macs=0.5)
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    refused(ValueError, "the weight of layer '2' is not finite", project_linear, model, "low_rank", rank=3)
    refused(ValueError, "'0' is on the meta device", project_linear, mlp().to("meta"), "low_rank", rank=3)
    refused(ValueError, "the model itself is a linear layer", project_linear, nn.Linear(24, 40), "low_rank", rank=3)
    model = mlp()
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layer '0' has hooks"):
        project_linear(model, "low_rank", rank=3, layers="0")
    ((name, reason),) = project_linear(model, "low_rank", rank=3).skipped
    assert (name, type(model[0]), type(model[2])) == ("0", nn.Linear, StructuredLinear)
    assert "has hooks" in reason
    model = nn.ModuleDict({"used": nn.Linear(24, 24), "unused": nn.Linear(24, 24)})
    with pytest.raises(ValueError, match="the calibration data do not reach unused"):
        project_linear(model, "low_rank", rank=3, layers="all", calibration=skewed(), forward=lambda m, b: m["used"](b))


def test_an_error_in_a_late_layer_leaves_the_early_ones(monkeypatch):
    model = mlp().half()
    before = copy.deepcopy(model.state_dict())
    scale = iter([1.0, 1e5])

    def solve(structure, problem, settings):
        return SimpleNamespace(factors=[next(scale) * np.ones(f.shape) for f in structure.factors])

    monkeypatch.setattr(_project_layers, "solve", solve)
    with pytest.raises(ValueError, match=r"layer '2' \(40 -> 36\): a factor of the projection overflows torch.float16"):
        project_linear(model, "block_diagonal", blocks=2)
    assert unchanged(model, before)


def test_to_dense_refuses_what_it_would_lose():
    with pytest.raises(ValueError, match="no structured layers"):
        to_dense_linear(mlp())
    with pytest.raises(ValueError, match="model itself"):
        to_dense_linear(StructuredLinear(4, 4, structure="low_rank"))

    def two() -> nn.Sequential:
        return nn.Sequential(*(StructuredLinear(12, 12, structure="low_rank", rank=2) for _ in range(2)))

    model = two()
    model[1].factors[0] = model[0].factors[0]
    with pytest.raises(ValueError, match=re.escape("'0' shares 1.factors.0; its replacement would untie them")):
        to_dense_linear(model)
    model = two()
    model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layer '1' has hooks"):
        to_dense_linear(model)
    assert isinstance(model[0], StructuredLinear)
    with pytest.raises(ValueError, match="meta device"):
        to_dense_linear(two().to("meta"))


@pytest.mark.parametrize("name", [n for n in structlin.structure_names() if n != "dense"])
def test_every_structure_goes_back_to_dense(name):
    shape, options = structlin.structure_class(name).examples[0]
    torch.manual_seed(0)
    layer = StructuredLinear(shape[1], shape[0], structure=name, **options)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    model = nn.Sequential(layer.eval())
    for p in layer.factors:
        p.requires_grad_(False)
    x = torch.randn(5, shape[1])
    expected = model(x)
    to_dense_linear(model)
    assert type(model[0]) is nn.Linear
    assert not model[0].training
    assert not model[0].weight.requires_grad
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
