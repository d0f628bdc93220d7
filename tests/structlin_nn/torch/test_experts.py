"""Layers of all experts of a mixture: against a matrix for each expert in float64, and as part of models."""

from __future__ import annotations

import copy
import json
import math
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.layers import EACH
from torch import Tensor, nn

from structlin.testing import dense_matrix
from structlin_nn import scale_check
from structlin_nn.torch import (
    ExpertLinear,
    Muon,
    StructuredExperts,
    StructuredLinear,
    count,
    fuse_mlps,
    load_structured,
    parameter_groups,
    project_linear,
    replace_linear,
    save_structured,
    to_dense_linear,
    unpack_linear,
)
from structlin_nn.torch._project_calibration import gather
from structlin_nn.torch.unpack import ExpertLayers

PADDED = [("monarch", (10, 21), {"blocks": 3}), ("block_tensor_train", (35, 6), {"rank": 2})]
EXPERTS = 4
SIZES = ([3, 0, 1, 2], [2, 2, 2, 2], [0, 0, 5, 0], [0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0])


def make(name: str, shape: tuple[int, int], options: dict[str, Any], **more: Any) -> StructuredExperts:
    """Layers with random biases, and gains other than 1 if there are any."""
    torch.manual_seed(0)
    layer = StructuredExperts(EXPERTS, shape[1], shape[0], structure=name, **options, **more)
    with torch.no_grad():
        for parameter in (layer.bias, *(layer.gains or ())):
            if parameter is not None:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def matrices(layer: StructuredExperts, factors: list[Tensor] | None = None) -> list[np.ndarray]:
    """The matrix of each expert in float64, from the stored parameters."""
    given = iter([f.detach().double() for f in (layer.factors if factors is None else factors)])
    gains = iter(layer.gains or ())
    stacked = []
    for number, spec in enumerate(layer.structure.factors):
        if not spec.trainable:
            stacked.append(layer.get_buffer(f"index{number}").numpy())
            continue
        factor = next(given).numpy().copy()
        if layer.rms_cap:
            gain = next(gains).detach().double().numpy() if layer.gains is not None else np.ones((EXPERTS, 1))
            for e in range(EXPERTS):
                rms = math.sqrt((factor[e] ** 2).mean())
                factor[e] *= gain[e, 0] * min(1.0, layer.cap_sigma[number] / rms)
        stacked.append(factor)
    return [dense_matrix(layer.structure, [f[e] for f in stacked]) for e in range(EXPERTS)]


def products(made: list[np.ndarray], x: Tensor, sizes: list[int]) -> Tensor:
    owner = np.repeat(np.arange(EXPERTS), sizes)
    y = [made[e] @ row for e, row in zip(owner, x.detach().double().numpy(), strict=True)]
    return torch.from_numpy(np.array(y).reshape(len(x), len(made[0])))


@pytest.mark.parametrize(("name", "shape", "options"), [*EACH, *PADDED])
def test_rows_and_gradients_are_those_of_a_matrix_for_each_expert(name, shape, options):
    layer = make(name, shape, options, dtype=torch.float64)
    bias, made, step, ends = layer.bias.detach(), matrices(layer), 1e-4, []
    torch.testing.assert_close(layer.weight.detach(), torch.from_numpy(np.stack(made)))
    for number, factor in enumerate(layer.factors):  # moved in a direction, and back
        along, others = torch.randn_like(factor), [f.detach() for f in layer.factors]
        moved = (factor.detach() + sign * step * along for sign in (1, -1))
        ends.append((along, *(matrices(layer, [*others[:number], f, *others[number + 1 :]]) for f in moved)))
    for sizes in SIZES:
        x = torch.randn(sum(sizes), shape[1], dtype=torch.float64, requires_grad=True)
        y = layer(x, sizes)
        shift = bias.repeat_interleave(torch.tensor(sizes), dim=0)
        torch.testing.assert_close(y, products(made, x, sizes) + shift, rtol=1e-10, atol=1e-10)
        gy = torch.randn_like(y)
        gx, *grads = torch.autograd.grad(y, [x, *layer.parameters()], gy, allow_unused=True)
        for e, (rows, own) in enumerate(zip(gx.split(sizes), gy.split(sizes), strict=True)):
            torch.testing.assert_close(rows, own @ torch.from_numpy(made[e]), rtol=1e-10, atol=1e-10)
        held = dict(zip((n for n, _ in layer.named_parameters()), grads, strict=True))
        sums = torch.stack([own.sum(0) for own in gy.split(sizes)])
        torch.testing.assert_close(held["bias"], sums, rtol=1e-10, atol=1e-10)
        for number, (along, *both) in enumerate(ends):
            found = held[f"factors.{number}"]
            assert not found[[size == 0 for size in sizes]].any()
            plus, minus = (products(end, x, sizes) for end in both)
            expected = ((plus - minus) / (2 * step) * gy).sum()  # the derivative in that direction
            torch.testing.assert_close((found * along).sum(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "shape", "options"), [*PADDED, ("low_rank", (7, 11), {"rank": 3})])
def test_low_precision_rounds_as_one_layer_does(name, shape, options, dtype):
    layer = make(name, shape, options, dtype=dtype)
    limit, made = 40 * torch.finfo(dtype).eps, matrices(layer)
    for sizes in SIZES[:3]:
        x = torch.randn(sum(sizes), shape[1], dtype=dtype)
        expected = products(made, x, sizes) + layer.bias.detach().double().repeat_interleave(torch.tensor(sizes), 0)
        y = layer(x, sizes)
        assert y.dtype is dtype
        assert (y.double() - expected).norm() <= limit * expected.norm()
        with torch.autocast("cpu", torch.bfloat16):
            cast = layer.float()(x.float(), sizes)
        layer.to(dtype)
        assert cast.dtype is torch.bfloat16
        assert (cast.double() - expected).norm() <= 40 * 2**-8 * expected.norm()


@pytest.mark.parametrize("gain", [True, False])
def test_caps_and_gains_are_those_of_each_expert(gain):
    layer = make("block_tensor_train", (12, 12), {"rank": 2}, rms_cap=True, gain=gain, dtype=torch.float64)
    with torch.no_grad():
        layer.factors[0][1].mul_(5)  # one expert beyond its cap
        layer.factors[1][2].mul_(0.2)
    x, sizes = torch.randn(6, 12, dtype=torch.float64), SIZES[0]
    expected = products(matrices(layer), x, sizes) + layer.bias.detach().repeat_interleave(torch.tensor(sizes), 0)
    torch.testing.assert_close(layer(x, sizes), expected)
    dense = torch.from_numpy(np.stack(matrices(layer)))
    torch.testing.assert_close(layer.weight.detach(), dense)
    torch.testing.assert_close(torch.stack([one.to_dense() for one in layer.operators()]).detach(), dense)


def test_initial_values_and_updates_are_those_of_single_layers():
    torch.manual_seed(0)
    layer = StructuredExperts(64, 24, 24, structure="monarch", blocks=3, zero_init=False)
    for factor, std in zip(layer.factors, layer.init_std, strict=True):
        assert abs(factor.std().item() / std - 1) < 0.05
    model = nn.ModuleList([StructuredExperts(EXPERTS, 8, 12, structure="monarch", blocks=2)])
    alone = nn.ModuleList([StructuredLinear(8, 12, structure="monarch", blocks=2) for _ in range(EXPERTS)])
    with torch.no_grad():
        for e, single in enumerate(alone):
            for own, stacked in zip(single.parameters(), model[0].parameters(), strict=True):
                own.copy_(stacked[e])
    x = torch.randn(6, 8)
    model[0](x, SIZES[0]).square().sum().backward()
    sum(single(rows).square().sum() for single, rows in zip(alone, x.split(SIZES[0]), strict=True)).backward()
    for one in (model, alone):
        Muon(parameter_groups(one, lr=0.1, optimizer="muon", adam_lr=0.01)).step()
    for e, single in enumerate(alone):
        for own, stacked in zip(single.parameters(), model[0].parameters(), strict=True):
            torch.testing.assert_close(stacked[e], own, rtol=1e-4, atol=1e-5)


def experts(kind: str, dtype: torch.dtype = torch.float64, **sizes: int) -> nn.ModuleDict:
    """The experts of one block of a model of transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_local_experts": EXPERTS, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8, "head_dim": 6, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": 2, **sizes}  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **sizes)
    config._experts_implementation = "eager"  # grouped products have no float64
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    held = model.model.layers[0].mlp.experts
    for parameter in held.parameters():
        nn.init.normal_(parameter, std=0.4)
    return nn.ModuleDict({"experts": held})


ROUTINGS = {
    "two of four": [[0, 3], [3, 1], [1, 0], [0, 1], [3, 0]],
    "one token": [[2, 1]],
    "all to one": [[2], [2], [2]],
    "three of four": [[0, 1, 2], [3, 2, 1]],
    "equal": [[0, 1], [2, 3], [1, 0], [3, 2]],
    "some elsewhere": [[0, EXPERTS], [EXPERTS, EXPERTS], [1, 3]],
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_mixture_is_the_sum_over_the_chosen_experts(kind, routing):
    model = experts(kind)
    replace_linear(model, "low_rank", rank=3, layers="*", unpack=True)
    block = model["experts"]
    weights = {name: block.get_submodule(name).weight.detach() for name in ("gate_up_proj", "down_proj")}
    biases = {name: block.get_submodule(name).bias for name in weights}
    chosen = torch.tensor(ROUTINGS[routing])
    x = torch.randn(len(chosen), 12, dtype=torch.float64, requires_grad=True)
    share = torch.rand(chosen.shape, dtype=torch.float64, requires_grad=True)

    def affine(name: str, e: int, row: Tensor) -> Tensor:
        y = weights[name][e] @ row
        return y if biases[name] is None else y + biases[name][e].detach()

    def gate(h: Tensor) -> Tensor:
        if kind == "mixtral":
            left, right = h.chunk(2)
            return left * torch.sigmoid(left) * right
        left, right = h[::2].clamp(max=block.limit), h[1::2].clamp(-block.limit, block.limit)
        return (right + 1) * left * torch.sigmoid(left * block.alpha)

    rows = []
    for t, row in enumerate(chosen.tolist()):
        parts = [share[t, k] * affine("down_proj", e, gate(affine("gate_up_proj", e, x[t])))
                 for k, e in enumerate(row) if e < EXPERTS]  # fmt: skip
        rows.append(sum(parts, torch.zeros(12, dtype=torch.float64)))
    expected, found = torch.stack(rows), block(x, chosen, share)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gy = torch.randn_like(found)
    wanted = torch.autograd.grad(expected, [x, share], gy)
    torch.testing.assert_close(torch.autograd.grad(found, [x, share], gy), wanted, rtol=1e-8, atol=1e-8)


def test_only_the_chosen_experts_are_computed():
    model = experts("mixtral", torch.float32)
    report = replace_linear(model, "monarch", blocks=2, layers="*", unpack=True, dearer="allow")
    block, chosen = model["experts"], torch.tensor([[0, 2], [2, 0], [2, 0]])
    with torch.no_grad():
        for layer in (block.gate_up_proj, block.down_proj):
            for factor in layer.factors:
                factor[[1, 3]] = torch.nan
    y = block(torch.randn(3, 12), chosen, torch.rand(3, 2))
    assert torch.isfinite(y).all()
    y.sum().backward()
    for layer in (block.gate_up_proj, block.down_proj):
        assert all(torch.isfinite(f.grad).all() and not f.grad[[1, 3]].any() for f in layer.factors)
    macs = sum(row.structure.macs for row in report.layers)
    found = count(block, torch.randn(3, 12, requires_grad=True), chosen, torch.rand(3, 2))
    assert found.macs() == 6 * macs
    assert found.training_macs == 3 * 6 * macs
    there = count(copy.deepcopy(block).to("meta"), *(t.to("meta") for t in (torch.randn(3, 12), chosen)),
                  torch.rand(3, 2, device="meta"))  # fmt: skip
    assert there.macs() == 6 * macs
    again = block(torch.zeros(0, 12), chosen[:0], torch.zeros(0, 2))
    assert again.shape == (0, 12)


def test_a_compiled_block_is_that_of_eager_calls():
    model = experts("mixtral")
    replace_linear(model, "block_tensor_train", rank=1, layers="*", unpack=True, dearer="allow")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, chosen, share: 2 * model["experts"](x.sin(), chosen, share), backend="aot_eager")
    for routing in ROUTINGS.values():
        chosen = torch.tensor(routing)
        x = torch.randn(len(chosen), 12, dtype=torch.float64, requires_grad=True)
        share = torch.rand(chosen.shape, dtype=torch.float64)
        y, expected = compiled(x, chosen, share), 2 * model["experts"](x.sin(), chosen, share)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(*(torch.autograd.grad(one.square().sum(), x)[0] for one in (y, expected)))


def test_layers_are_copied_moved_and_described():
    layer = make("monarch", (8, 8), {"blocks": 2})
    x = torch.randn(6, 8)
    expected = layer(x, SIZES[0])
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, SIZES[0]), expected)
    there = StructuredExperts(EXPERTS, 8, 8, structure="monarch", blocks=2, device="meta").to_empty(device="cpu")
    there.load_state_dict(layer.state_dict())
    assert torch.equal(there(x, SIZES[0]), expected)
    for sizes in SIZES[:2]:
        part = torch.randn(8, 16)[: sum(sizes), ::2]
        assert torch.equal(layer(part, sizes), layer(part.contiguous(), sizes))
    assert repr(layer).startswith(f"StructuredExperts(\n  num_experts={EXPERTS}, in_features=8, out_features=8")
    assert repr(ExpertLinear(2, 3, 4)) == "ExpertLinear(num_experts=2, in_features=3, out_features=4, bias=True)"


def test_wrong_uses_are_errors():
    layer = make("low_rank", (8, 8), {"rank": 2})
    for one in (layer, ExpertLinear(EXPERTS, 8, 8)):
        for x, sizes in ((torch.ones(6, 8), [3, 3]), (torch.ones(6, 8), [1, 2, 3, 1]), (torch.ones(2, 3, 8), SIZES[0])):
            with pytest.raises(ValueError, match=r"the input must have the rows of 4 experts.*got shape"):
                one(x, sizes)
    for kind in (StructuredExperts, ExpertLinear):
        with pytest.raises(ValueError, match="num_experts must be"):
            kind(0, 8, 8)
    for one in (layer, ExpertLinear(EXPERTS, 8, 8)):
        with pytest.raises(ValueError, match="in_features = 8"):
            one(torch.ones(6, 9), SIZES[0])
        with pytest.raises(ValueError, match="the input must have the rows of 4 experts"):
            one(torch.ones(6, 8), [7, -1, 0, 0])
    with pytest.raises(AttributeError, match=r"call operators\(\)"):
        _ = layer.operator
    assert not hasattr(layer, "operator")
    with pytest.raises(TypeError, match="cannot compile StructuredExperts"):
        torch.jit.script(layer)


def test_arguments_may_be_given_by_name_in_any_order():
    """To counts and to calibration too."""
    for layer in (make("low_rank", (8, 8), {"rank": 2}), ExpertLinear(EXPERTS, 8, 8)):
        found = count(layer, sizes=SIZES[0], x=torch.ones(6, 8))
        assert found.macs() == count(layer, torch.ones(6, 8), SIZES[0]).macs() > 0
        moments = gather(
            nn.ModuleDict({"layer": layer}), {layer: "layer"}, [torch.ones(6, 8)],
            lambda model, x: model["layer"](sizes=[*SIZES[1][:3], 0], x=x), {},
        )  # fmt: skip
        assert moments[layer].shape == (EXPERTS, 8, 8)


def test_measurements_of_scale_do_not_mix_experts(monkeypatch):
    """Rows of layers of experts are sorted by expert: if one token changes its expert, rows of other tokens move."""
    model = experts("mixtral", torch.float32)
    replace_linear(model, "low_rank", rank=3, layers="*", unpack=True, rms_cap=True)
    with scale_check._outputs(model) as noted:
        model["experts"](torch.randn(3, 12), torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.rand(3, 2))
    assert {name: value.shape for name, value in noted.items()} == {
        "experts": (3, 12), "experts (input)": (3, 12),
    }  # fmt: skip


def test_the_report_lists_weights_named_bias():
    """Biases of experts have two axes, and so can a table of another module that is named so."""
    model = experts("gpt_oss", torch.float32)
    model.register_parameter("bias", nn.Parameter(torch.ones(16, 16)))
    report = replace_linear(model, "low_rank", rank=3, layers="*gate_up_proj", unpack=True)
    assert [name for name, *_ in report.dense] == ["bias", "experts.down_proj.weight"]
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_adapters_on_experts_are_refused():
    peft = pytest.importorskip("peft")
    from structlin_nn.torch.peft import StructuredAdapterConfig, lora_config

    model = experts("mixtral", torch.float32)
    replace_linear(model, "low_rank", rank=3, layers="*", unpack=True)
    for config in (
        lora_config(r=2, target_modules=["down_proj"]),
        StructuredAdapterConfig(structure="low_rank", structure_options={"rank": 2}, target_modules=["down_proj"]),
    ):
        with pytest.raises(ValueError, match="adapters on StructuredExperts are not supported"):
            peft.get_peft_model(copy.deepcopy(model), config)


def test_no_mlp_is_made_of_experts():
    model = nn.ModuleDict({"mlp": nn.Module()})
    model["mlp"].up_proj = make("low_rank", (8, 8), {"rank": 2}, device="meta")
    model["mlp"].down_proj, model["mlp"].act_fn = copy.deepcopy(model["mlp"].up_proj), nn.GELU()
    assert fuse_mlps(model) == {}


# -- files -------------------------------------------------------------------------------------------------------------


def test_files_have_the_number_of_experts(tmp_path):
    model, path = experts("gpt_oss"), tmp_path / "experts.safetensors"
    replace_linear(model, "low_rank", rank=3, layers="*down_proj", unpack=True)
    save_structured(model, path)
    inputs = torch.randn(3, 12, dtype=torch.float64), torch.tensor([[0], [3], [1]]), torch.ones(3, 1)
    expected = model["experts"](*inputs)
    both = experts("gpt_oss")  # the dense layer of the file replaces a structured one
    replace_linear(both, "low_rank", rank=3, layers="*", unpack=True)
    for other in (experts("gpt_oss"), both):
        again = load_structured(other, path)["experts"]
        assert type(again.gate_up_proj) is ExpertLinear
        assert torch.equal(again(*inputs), expected)
    with pytest.raises(ValueError, match=r"of 4 experts in the file, but .* of 3 experts in the model"):
        load_structured(experts("gpt_oss", num_local_experts=3), path)
    with pytest.raises(ValueError, match="of 4 experts in the file"):
        load_structured(nn.ModuleDict({"experts": nn.ModuleDict({"gate_up_proj": nn.Linear(12, 32),
                                                                 "down_proj": nn.Linear(16, 12)})}), path)  # fmt: skip


# -- projection --------------------------------------------------------------------------------------------------------


def block_of_rank(rank: int) -> nn.ModuleDict:
    """Experts whose up-projections have ranks 1, 2, ..., at most ``rank``."""
    model = experts("mixtral")
    with torch.no_grad():
        weight = model["experts"].gate_up_proj
        for e in range(EXPERTS):
            u, s, v = torch.linalg.svd(weight[e], full_matrices=False)
            s[min(e + 1, rank) :] = 0
            weight[e] = u @ torch.diag(s) @ v
    return model


def routed(model: nn.ModuleDict, batch: Tensor) -> Tensor:
    chosen = (torch.arange(len(batch))[:, None] + torch.arange(2)) % (EXPERTS - 1)  # the last is never chosen
    return model["experts"](batch, chosen, torch.full((len(batch), 2), 0.5, dtype=batch.dtype))


@pytest.mark.parametrize("calibrated", [False, True])
def test_projection_gives_all_experts_the_form_that_the_worst_needs(calibrated):
    model = block_of_rank(3)
    batches = [torch.randn(32, 12, dtype=torch.float64) for _ in range(2)]
    before = routed(model, batches[0])
    given: dict[str, Any] = {"calibration": batches, "forward": routed} if calibrated else {}
    report = project_linear(
        model, "low_rank", layers="*gate_up_proj", target_error=1e-6, unpack=True, rms_cap=True, **given
    )
    (line,) = report.layers
    assert (line.options, line.experts, line.shape) == ({"rank": 3}, EXPERTS, (32, 12))
    assert line.params_before == EXPERTS * 32 * 12
    assert line.params_after == EXPERTS * (3 * 44 + 2)
    assert (line.macs_before, line.macs_after) == (32 * 12, 3 * 44)
    assert "4 x 32 x 12" in str(report)
    assert line.weight_error < 1e-6
    torch.testing.assert_close(routed(model, batches[0]), before)
    layer = model["experts"].gate_up_proj
    assert isinstance(layer, StructuredExperts)
    assert bool(report.notes) is calibrated
    if calibrated:
        assert line.output_error < 1e-6
        assert report.notes == (
            "experts.gate_up_proj: the calibration data have no input other than 0 for expert 3; the second moments "
            "are those of the inputs of the other experts",
        )
    to_dense_linear(model)
    assert type(model["experts"]).__name__ == "MixtralExperts"
    torch.testing.assert_close(routed(model, batches[0]), before)


def _note(seen: list[Any], module: nn.Module, args: Any) -> None:
    seen.append(args)


def test_calibration_weighs_each_expert_by_its_own_inputs():
    """The error of the outputs over all routed vectors is the one that the report states; it is below the plain one."""
    errors = {}
    spread = 0.7 ** torch.arange(12, dtype=torch.float64)
    batch = torch.randn(64, 12, dtype=torch.float64) * spread
    for calibrated in (False, True):
        model = experts("mixtral")
        unpack_linear(model)
        weight = model["experts"].gate_up_proj.weight.detach().clone()
        seen: list[tuple[Tensor, list[int]]] = []
        handle = model["experts"].gate_up_proj.register_forward_pre_hook(partial(_note, seen))
        routed(model, batch)
        handle.remove()
        given: dict[str, Any] = {"calibration": [batch], "forward": routed, "damping": 1e-6} if calibrated else {}
        report = project_linear(model, "low_rank", rank=4, layers="*gate_up_proj", **given)
        ((x, sizes),) = seen
        new = model["experts"].gate_up_proj.weight.detach()
        rows = [(row @ (weight[e] - new[e]).mT, row @ weight[e].mT) for e, row in enumerate(x.split(sizes))]
        wrong, whole = (torch.cat(part).norm() for part in zip(*rows, strict=True))
        errors[calibrated] = float(wrong / whole)
        if calibrated:  # the expert without vectors counts as one with one
            assert report.layers[0].output_error == pytest.approx(errors[True], rel=0.02)
    assert errors[True] < 0.8 * errors[False]


@pytest.mark.parametrize("budget", [{"param_fraction": 0.5}, {"mac_fraction": 0.5}, {"max_params": 1500}], ids=str)
@pytest.mark.parametrize("name", ["low_rank", "block_tensor_train"])
def test_budgets_count_the_parameters_of_all_experts(name, budget):
    model = block_of_rank(12)
    model["head"] = nn.Linear(12, 12, bias=False, dtype=torch.float64)
    report = project_linear(model, name, layers="all", unpack=True, **budget)
    assert report.params_before == EXPERTS * (32 * 12 + 12 * 16) + 144
    assert report.macs_before == 32 * 12 + 12 * 16 + 144
    assert any(line.structure is not None for line in report.layers)
    if "mac_fraction" in budget:
        assert report.macs_after <= report.macs_before / 2
    else:
        assert report.params_after <= budget.get("max_params", report.params_before / 2)
    after = sum(p.numel() for p in model.parameters())
    assert report.params_after == after


def test_generation_is_that_of_the_dense_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, num_local_experts=EXPERTS, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config._experts_implementation = "eager"
    model = transformers.MixtralForCausalLM(config).double().eval()
    replace_linear(model, "low_rank", rank=4, layers="*.experts.*", unpack=True)
    assert isinstance(model.model.layers[0].mlp.experts, ExpertLayers)
    dense = copy.deepcopy(model)
    assert len(to_dense_linear(dense)) == 4
    prompt = torch.arange(3, 13).view(2, 5)
    made, expected = (
        one.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        for one in (model, dense)
    )
    assert torch.equal(made, expected)
