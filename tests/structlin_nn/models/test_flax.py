"""The models in flax: the same function as in torch, from the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch.nn import functional as F

from structlin_nn import models
from structlin_nn.convert import to_flax, to_torch
from structlin_nn.flax import optimizer_for
from structlin_nn.models import StructureConfig
from structlin_nn.models.flax import MODELS, base_model, build_model
from structlin_nn.torch import parameter_groups

BTT = StructureConfig("block_tensor_train", {"rank": 2}, rms_cap=True)


def pair(name: str, structure: StructureConfig, dtype: str, **sizes):
    """A model in torch and in flax with the same parameters, none of them zero."""
    torch.manual_seed(0)
    theirs = models.build_model(name, structure=structure, dtype=getattr(torch, dtype), **sizes)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = nnx.eval_shape(lambda: build_model(name, structure=structure, param_dtype=dtype, rngs=nnx.Rngs(0), **sizes))
    to_flax(theirs.state_dict(), ours)
    return theirs, ours


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("cifar-mlp", {"width": 16, "depth": 2, "input_shape": (2, 4, 6)}),
        pytest.param(
            "cifar-vit",
            {"width": 24, "depth": 2, "heads": 3, "input_shape": (2, 8, 12), "patch": 4},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_outputs_and_gradients_are_those_of_torch(name: str, sizes: dict) -> None:
    theirs, ours = pair(name, BTT, "float64", **sizes)
    x = np.random.default_rng(0).standard_normal((3, *sizes["input_shape"]))
    expected = theirs(torch.from_numpy(x))
    expected.sin().sum().backward()
    run = nnx.jit(nnx.value_and_grad(lambda m, x: (lambda y: (jnp.sin(y).sum(), y))(m(x)), has_aux=True))
    (_, logits), gradients = run(ours, jnp.asarray(x))
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-10, atol=1e-10)
    holder = nnx.merge(nnx.graphdef(ours), gradients, nnx.state(ours, nnx.Not(nnx.Param)))
    ours_by_name = to_torch(holder)
    for parameter_name, parameter in theirs.named_parameters():
        found = ours_by_name[parameter_name].numpy()
        scale = max(1.0, float(parameter.grad.abs().max()))
        np.testing.assert_allclose(found, parameter.grad.numpy(), atol=1e-9 * scale, err_msg=parameter_name)


@pytest.mark.parametrize("name", [n if n == "cifar-vit" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
@pytest.mark.parametrize("layers", ["all", "intermediate"])
def test_parameters_are_those_of_torch(name: str, layers: str) -> None:
    structure = StructureConfig("monarch", {"blocks": 4}, layers=layers, rms_cap=True)
    theirs = models.build_model(name, width=64, structure=structure, device="meta").state_dict()
    ours = nnx.eval_shape(lambda: build_model(name, width=64, structure=structure, rngs=nnx.Rngs(0)))
    sizes = sum(array.size for array in jax.tree.leaves(nnx.state(ours)))
    assert sizes == sum(tensor.numel() for tensor in theirs.values())


@pytest.mark.slow
def test_zero_initialised_layers_are_those_of_torch() -> None:
    ours = build_model("cifar-mlp", width=8, depth=1, input_shape=(1, 2, 2), rngs=nnx.Rngs(0))
    theirs = models.build_model("cifar-mlp", width=8, depth=1, input_shape=(1, 2, 2))
    zero = {name for name, tensor in theirs.state_dict().items() if not tensor.any()}
    assert {name for name, tensor in to_torch(ours).items() if not tensor.any()} == zero


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'gtp2' \(did you mean gpt2\?\); one of cifar-mlp, cifar-vit"):
        build_model("gtp2", width=64, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="has no size 'heds'"):
        base_model("cifar-vit", heds=3)
    model = nnx.eval_shape(lambda: build_model("cifar-mlp", width=8, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"\(batch, \*\(3, 32, 32\)\)"):
        model(jnp.zeros((2, 3, 8, 8)))


@pytest.mark.slow
def test_twenty_steps_give_the_losses_of_torch() -> None:
    """float32, Adam with structure-aware rates, the same parameters and batches: 1e-4 relative."""
    sizes = {"width": 64}
    torch.manual_seed(0)
    theirs = models.build_model("cifar-mlp", structure=BTT, **sizes)
    ours = nnx.eval_shape(lambda: build_model("cifar-mlp", structure=BTT, rngs=nnx.Rngs(0), **sizes))
    to_flax(theirs.state_dict(), ours)
    common = {"lr": 3e-3, "weight_decay": 0.01, "extra_multipliers": {"input": 0.1}}
    optimizer = torch.optim.AdamW(parameter_groups(theirs, models.base_model("cifar-mlp", 32), **common))
    tx = optimizer_for(ours, base_model("cifar-mlp", 32), **common)
    state = nnx.Optimizer(ours, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, state: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        def loss(model: nnx.Module) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        state.update(model, gradients)
        return value

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((10, 3, 32, 32))
    found, expected = [], []
    for _ in range(20):
        y = rng.integers(0, 10, 64)
        x = (centres[y] + rng.standard_normal((64, 3, 32, 32))).astype(np.float32)
        found.append(float(step(ours, state, jnp.asarray(x), jnp.asarray(y))))
        value = F.cross_entropy(theirs(torch.from_numpy(x)), torch.from_numpy(y))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        expected.append(value.item())
    assert expected[-1] < 0.7 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
