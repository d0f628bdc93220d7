"""What a parameter is that no layer of torch's own holds: tables, vectors, recurrent weights, experts."""

import re

import pytest
import torch
from helpers.layers import assert_covers, decays, multipliers
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from structlin_nn.torch import ParameterRule, StructuredLinear, parameter_groups


class Positions(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 9, width))
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.layer = nn.Linear(width, width)


def test_tables_and_vectors_go_by_their_names():
    model, base = Positions(8), Positions(4)
    groups = parameter_groups(model, base, lr=1, weight_decay=0.1)
    assert multipliers(groups) == {"positions": 1, "token": 1, "layer.weight": 0.5, "layer.bias": 1}
    assert {name for name, decay in decays(groups).items() if decay} == {"layer.weight"}
    for name, shape, kind in (
        ("cls_token", (1, 1, 8), "embedding"), ("pos_embed", (1, 5, 8), "embedding"),
        ("rel_pos_h", (7, 8), "embedding"),
        ("relative_position_bias_table", (49, 8), "embedding"), ("logit_scale", (8, 1, 1), "vector"),
        ("gate_up_proj_bias", (4, 8), "bias"), ("attention_bias", (8, 3), "bias"), ("gamma", (8,), "vector"),
    ):  # fmt: skip
        module = nn.Module()
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        wider = nn.Module()
        wider.register_parameter(name, nn.Parameter(torch.zeros([2 * n if n == 8 else n for n in shape])))
        (group,) = parameter_groups(wider, module, lr=1, weight_decay=0.1, decay=[kind])
        assert (group["multiplier"], group["weight_decay"]) == (1, 0.1), name


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_are_linear(kind):
    model, base = kind(8, 32, num_layers=2), kind(8, 16, num_layers=2)
    found = multipliers(parameter_groups(model, base, lr=1))
    assert found["weight_ih_l0"] == 1
    assert found["weight_hh_l0"] == found["weight_ih_l1"] == found["weight_hh_l1"] == 0.5
    assert {value for name, value in found.items() if "bias" in name} == {1}
    found = multipliers(parameter_groups(model, base, lr=1, optimizer="sgd"))
    assert found["weight_ih_l0"] == (32 / 8) / (16 / 8)
    assert found["weight_hh_l0"] == 1
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    groups = parameter_groups(model, base, lr=1, optimizer="muon", adam_lr=1)
    by_muon = {n: m for g in groups if g["matrices"] for n, m in zip(g["names"], g["matrices"], strict=True)}
    assert by_muon["weight_ih_l0"] == ((0, 1), gates, 32, 8)
    assert len(by_muon) == 4
    assert_covers(groups, model)


def test_projected_lstm_cells_and_bilinear_layers():
    model, base = nn.LSTM(8, 32, proj_size=6), nn.LSTM(8, 16, proj_size=6)
    assert multipliers(parameter_groups(model, base, lr=1))["weight_hr_l0"] == 0.5
    found = multipliers(parameter_groups(nn.GRUCell(8, 32), nn.GRUCell(8, 16), lr=1))
    assert (found["weight_ih"], found["weight_hh"], found["bias_ih"]) == (1, 0.5, 1)
    found = multipliers(parameter_groups(nn.Bilinear(3, 8, 5), nn.Bilinear(3, 2, 5), lr=1))
    assert found == {"weight": 1 / 4, "bias": 1}


def test_weight_normalised_layers():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
    base = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    found = multipliers(parameter_groups(model, base, lr=1))
    assert found == {"bias": 1, "parametrizations.weight.original0": 1, "parametrizations.weight.original1": 0.5}


class Experts(nn.Module):
    """As transformers holds those of Mixtral, and transposed, as of GPT-OSS."""

    def __init__(self, width: int, transposed: bool = False) -> None:
        super().__init__()
        self.num_experts = 3
        up, down = (3, 2 * 5, width), (3, width, 5)
        if transposed:
            up, down = ((a, c, b) for a, b, c in (up, down))
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.zeros(shape)) for shape in (up, down))


@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed):
    model, base = Experts(8, transposed), Experts(4, transposed)
    assert multipliers(parameter_groups(model, base, lr=1)) == {"gate_up_proj": 0.5, "down_proj": 1}
    found = multipliers(parameter_groups(model, base, lr=1, optimizer="sgd"))
    assert found == {"gate_up_proj": (10 / 8) / (10 / 4), "down_proj": (8 / 5) / (4 / 5)}
    groups = parameter_groups(model, lr=1, optimizer="muon")
    order = (0, 2, 1) if transposed else (0, 1, 2)
    assert [m for g in groups for m in g["matrices"]] == [(order, 3, 10, 8), (order, 3, 8, 5)]


MODELS = {
    "vit": ("timm", "vit_tiny_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 2}),
    "beit": ("timm", "beit_base_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 2}),
    "gpt2": ("transformers", "gpt2", {"n_embd": 24, "n_layer": 1, "n_head": 2, "vocab_size": 40}),
    "mamba": ("transformers", "mamba", {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 40, "state_size": 4}),
    "mixtral": ("transformers", "mixtral", {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 40, "num_local_experts": 3,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_models_need_no_rules(name, optimizer):
    library, kind, sizes = MODELS[name]
    found = pytest.importorskip(library)
    if library == "timm":
        model = found.create_model(kind, num_classes=3, **sizes)
    else:
        model = found.AutoModelForCausalLM.from_config(found.AutoConfig.for_model(kind, **sizes))
    more = {"adam_lr": 1e-3} if optimizer == "muon" else {}
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1, optimizer=optimizer, **more)
    assert_covers(groups, model)
    decayed = {name for name, decay in decays(groups).items() if decay}
    assert {name.rpartition(".")[2] for name in decayed} <= {"weight", "gate_up_proj", "down_proj"}
    assert not any("embeddings" in name or "embed_tokens" in name or "wte" in name for name in decayed)


def weight_norm(factors: nn.Module) -> None:
    parametrizations.weight_norm(factors, "1", dim=1)


def spectral_norm(factors: nn.Module) -> None:
    parametrizations.spectral_norm(factors, "1")


def pruned(factors: nn.Module) -> None:
    prune.l1_unstructured(factors, "1", 0.5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize(
    ("change", "name", "extra"),
    [
        (pruned, "1_orig", None),
        (spectral_norm, "parametrizations.1.original", None),
        (weight_norm, "parametrizations.1.original1", "parametrizations.1.original0"),
    ],
)
def test_parameters_of_a_changed_factor_have_its_rule(change, name, extra, optimizer):
    def net():
        torch.manual_seed(0)
        layers = [StructuredLinear(35, 24, structure="low_rank", rank=3, rms_cap=True), nn.Tanh(), nn.Linear(24, 5)]
        return nn.Sequential(*layers)

    base = nn.Sequential(nn.Linear(14, 8), nn.Tanh(), nn.Linear(8, 5)).to("meta")
    options = {"adam_lr": 0.1} if optimizer == "muon" else {}
    model = net()
    change(model[0].factors)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    groups = parameter_groups(model, base, lr=1, weight_decay=0.1, optimizer=optimizer, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # spectral norm iterates
    assert_covers(groups, model)
    plain = "adamw" if optimizer == "muon" else optimizer  # Adam updates what is not the factor itself
    wanted = multipliers(parameter_groups(net(), base, lr=1, optimizer=plain))
    assert multipliers(groups)[f"0.factors.{name}"] == wanted["0.factors.1"] != 1
    assert decays(groups)[f"0.factors.{name}"] == 0.1
    if extra is not None:  # norms, as those of nn.Linear
        assert multipliers(groups)[f"0.factors.{extra}"] == 1
        assert decays(groups)[f"0.factors.{extra}"] == 0
    if optimizer == "adamw":
        trained = torch.optim.AdamW(groups)
        model(torch.ones(2, 35)).sum().backward()
        trained.step()
        trained.step()


def test_a_parametrization_of_another_shape_needs_a_rule():
    class Doubled(nn.Module):
        def forward(self, half):
            return torch.cat([half, half])

        def right_inverse(self, whole):
            return whole[: len(whole) // 2]

    model = nn.Sequential(StructuredLinear(35, 24, structure="low_rank", rank=4))
    parametrize.register_parametrization(model[0].factors, "0", Doubled(), unsafe=True)
    name = "0.factors.parametrizations.0.original"
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*rules"):
        parameter_groups(model, lr=1)
    groups = parameter_groups(model, lr=1, rules={name: ParameterRule(0.25, True)})
    assert_covers(groups, model)
    assert multipliers(groups)[name] == 0.25
