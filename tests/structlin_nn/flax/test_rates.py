"""Multipliers for optax: those of torch's parameter groups, and the steps of torch's optimisers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from structlin_nn import models
from structlin_nn.convert import to_flax, to_torch
from structlin_nn.flax import ParameterRule, StructuredLinear, optimizer_for, parameter_rates, scale_by_rates
from structlin_nn.models import StructureConfig
from structlin_nn.models.flax import base_model, build_model
from structlin_nn.torch import ParameterRule as TorchRule
from structlin_nn.torch import parameter_groups

STRUCTURE = StructureConfig("block_tensor_train", {"rank": 2}, rms_cap=True)
_LAST = {"scale": "weight", "embedding": "weight", "kernel": "weight"}


def torch_name(name: str) -> str:
    parent, _, last = name.rpartition(".")
    return f"{parent}.{_LAST.get(last, last)}"


# Without the slow tests, each pair of values once.
@pytest.mark.parametrize(
    ("structure_aware", "optimizer", "name"),
    [
        pytest.param(aware, optimizer, name, marks=() if (i + j + k) % 2 == 0 else pytest.mark.slow)
        for i, aware in enumerate([True, False])
        for j, optimizer in enumerate(["adamw", "sgd"])
        for k, name in enumerate(["cifar-mlp", "cifar-vit"])
    ],
)
def test_are_those_of_torch(name: str, optimizer: str, structure_aware: bool) -> None:
    first = {"cifar-mlp": "input", "cifar-vit": "patch_embedding"}[name]
    common = {"optimizer": optimizer, "structure_aware": structure_aware, "extra_multipliers": {first: 0.1}}
    theirs = parameter_groups(
        models.build_model(name, width=128, structure=STRUCTURE, device="meta"),
        models.base_model(name, 64),
        lr=1.0,
        weight_decay=0.5,
        **common,
    )
    expected = {n: (g["multiplier"], g["weight_decay"] == 0.5) for g in theirs for n in g["names"]}
    ours = parameter_rates(
        nnx.eval_shape(lambda: build_model(name, width=128, structure=STRUCTURE, rngs=nnx.Rngs(0))),
        base_model(name, 64),
        **common,
    )
    assert {torch_name(n): (rule.multiplier, rule.decay) for n, rule in ours.rules.items()} == expected
    assert len({rule.multiplier for rule in ours.rules.values()}) > 2


def test_convolutions_and_general_layers_are_dense_layers() -> None:
    class Model(nnx.Module):
        def __init__(self, width: int) -> None:
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(3, width, (5, 5), rngs=rngs)
            self.attention = nnx.MultiHeadAttention(4, width, rngs=rngs)
            self.norm = nnx.BatchNorm(width, rngs=rngs)

    made = [nnx.eval_shape(lambda w=w: Model(w)) for w in (32, 8)]
    rates = parameter_rates(*made)
    assert rates.rules["conv.kernel"] == ParameterRule(1.0, True)
    assert rates.rules["attention.query.kernel"] == ParameterRule(0.25, True)
    assert rates.rules["attention.query.bias"] == ParameterRule(1.0, False)
    assert rates.rules["attention.out.kernel"] == ParameterRule(0.25, True)
    assert rates.rules["norm.scale"] == ParameterRule(1.0, False)
    assert "norm.mean" not in rates.rules
    sgd = parameter_rates(*made, optimizer="sgd")
    conv = parameter_groups(torch.nn.Conv2d(3, 32, 5), torch.nn.Conv2d(3, 8, 5), lr=1.0, optimizer="sgd")
    assert sgd.rules["conv.kernel"].multiplier == next(g["multiplier"] for g in conv if g["names"] == ["weight"])


class TestCoverage:
    @pytest.fixture
    def model(self) -> nnx.Module:
        class Model(nnx.Module):
            def __init__(self) -> None:
                rngs = nnx.Rngs(0)
                self.layer = StructuredLinear(6, 6, structure="low_rank", rank=2, rngs=rngs)
                self.table = nnx.Param(jnp.zeros((3, 4)))
                self.shift = nnx.Param(jnp.zeros(4))

        return nnx.eval_shape(Model)

    def test_a_parameter_of_unknown_kind_raises(self, model: nnx.Module) -> None:
        with pytest.raises(ValueError, match=r"no rule covers the parameters table \(3, 4\) of .*Model"):
            parameter_rates(model)
        rates = parameter_rates(model, rules={re.compile("tab.*"): ParameterRule(2.0)})
        assert rates.rules["table"] == ParameterRule(2.0, False)
        assert rates.rules["shift"] == ParameterRule(1.0, False)
        assert "layer.factors.*" in str(rates)

    def test_parameters_of_another_model_raise(self, model: nnx.Module) -> None:
        other = nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0))))
        rates = parameter_rates(other)
        with pytest.raises(ValueError, match=r"no rule covers the parameters layer.bias, layer.factors.0"):
            scale_by_rates(rates).init(nnx.state(model, nnx.Param))
        with pytest.raises(ValueError, match="no rule covers"):
            scale_by_rates(rates).update(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optax.EmptyState())

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"optimizer": "adamx"}, ValueError, "unknown optimizer 'adamx'"),
            ({"decay": ["facto"]}, ValueError, "facto"),
            ({"extra_multipliers": {"nothing": 2.0}}, ValueError, "nothing matches 'nothing'"),
            ({"extra_multipliers": {"layer": -0.5}}, ValueError, "must be finite and at least 0"),
            ({"rules": {"table": 2.0}}, TypeError, "must be a ParameterRule"),
        ],
    )
    def test_refuses(self, model: nnx.Module, arguments: dict, error: type[Exception], message: str) -> None:
        rules = {"table": ParameterRule(1.0), **arguments.pop("rules", {})}
        with pytest.raises(error, match=message):
            parameter_rates(model, rules=rules, **arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"momentum": 0.9}, "need optimizer='sgd'"),
            ({"optimizer": "sgd", "momentum": 1.0}, r"must lie in \[0, 1\)"),
            ({"optimizer": "sgd", "nesterov": True}, "above 0 with nesterov"),
            ({"betas": (0.9, 1.0)}, "betas"),
            ({"lr": -1.0}, "must not be negative"),
            ({"optimizer": "adam", "independent_decay": True}, "independent_decay"),
        ],
    )
    def test_optimizer_refuses(self, model: nnx.Module, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            optimizer_for(model, **{"lr": 0.1, "rules": {"table": ParameterRule(1.0)}, **arguments})

    def test_base_model_with_other_modules(self, model: nnx.Module) -> None:
        other = nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0))))
        with pytest.raises(ValueError, match=r"the base model lacks modules .*layer"):
            parameter_rates(model, other)


def test_shared_parameters_have_one_rule_under_every_name() -> None:
    def make() -> nnx.Module:
        layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        return nnx.Sequential(layer, nnx.relu, layer)

    model = nnx.eval_shape(make)
    rates = parameter_rates(model)
    assert rates.rules["layers.0.kernel"] is rates.rules["layers.2.kernel"]
    assert sum(rates.sizes.values()) == 20
    scale_by_rates(rates).init(nnx.state(model, nnx.Param))


@pytest.mark.parametrize(
    ("optimizer", "options", "torch_class", "torch_options"),
    [
        pytest.param("adamw", {}, torch.optim.AdamW, {}),
        pytest.param("adamw", {"independent_decay": True}, torch.optim.AdamW, {}, marks=pytest.mark.slow),
        pytest.param("adam", {}, torch.optim.Adam, {}, marks=pytest.mark.slow),
        pytest.param("sgd", {"momentum": 0.9}, torch.optim.SGD, {"momentum": 0.9}, marks=pytest.mark.slow),
        pytest.param(
            "sgd", {"momentum": 0.9, "nesterov": True, "independent_decay": True}, torch.optim.SGD,
            {"momentum": 0.9, "nesterov": True}, marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_steps_are_those_of_torch(optimizer: str, options: dict, torch_class, torch_options: dict) -> None:
    """Five steps on the same gradients give the same parameters in float64."""
    sizes = {"width": 12, "depth": 1, "input_shape": (1, 3, 3)}
    torch.manual_seed(0)
    theirs = models.build_model("cifar-mlp", structure=STRUCTURE, dtype=torch.float64, **sizes)
    made = {"structure": STRUCTURE, "param_dtype": jnp.float64, **sizes}
    ours = nnx.eval_shape(lambda: build_model("cifar-mlp", rngs=nnx.Rngs(0), **made))
    to_flax(theirs.state_dict(), ours)
    common = {"lr": 0.01, "weight_decay": 0.3, "optimizer": optimizer}
    bases = {key: value for key, value in sizes.items() if key != "width"}
    independent = {key: value for key, value in options.items() if key == "independent_decay"}
    groups = parameter_groups(theirs, models.base_model("cifar-mlp", 6, **bases), **common, **independent)
    step = torch_class(groups, **torch_options)
    tx = optimizer_for(ours, base_model("cifar-mlp", 6, **bases), **common, **options)
    state = nnx.Optimizer(ours, tx, wrt=nnx.Param)
    update = nnx.jit(lambda state, model, gradients: state.update(model, gradients))
    rng = np.random.default_rng(0)
    for _ in range(5):
        gradients = {name: rng.standard_normal(tuple(p.shape)) for name, p in theirs.named_parameters()}
        for name, parameter in theirs.named_parameters():
            parameter.grad = torch.from_numpy(gradients[name])
        step.step()
        paths, structure = jax.tree_util.tree_flatten_with_path(nnx.state(ours, nnx.Param))
        names = [torch_name(".".join(str(part.key) for part in path if hasattr(part, "key"))) for path, _ in paths]
        leaves = [jnp.asarray(gradients[name]) for name in names]
        update(state, ours, jax.tree_util.tree_unflatten(structure, leaves))
    final = to_torch(ours)
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_allclose(final[name].numpy(), tensor.numpy(), rtol=1e-9, atol=1e-12, err_msg=name)


def test_rule_of_torch_and_flax_is_one_class() -> None:
    assert ParameterRule is TorchRule


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_injected_hyperparameters(optimizer: str) -> None:
    """``optax.inject_hyperparams`` calls the function with arrays, and with traced ones under jit."""
    model = nnx.Sequential(StructuredLinear(16, 16, structure="monarch", blocks=4, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    gradients = jax.tree.map(jnp.ones_like, params)

    def make(lr: float, decay: float) -> optax.GradientTransformation:
        return optimizer_for(model, optimizer=optimizer, lr=lr, weight_decay=decay)

    found = []
    for transformation in (optax.inject_hyperparams(make)(lr=1e-3, decay=0.1), make(1e-3, 0.1)):
        state = transformation.init(params)
        found.append(jax.jit(transformation.update)(gradients, state, params)[0])
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        make(jnp.float32(-1.0), 0.1)
