"""Checkpoints between torch and flax."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from structlin_nn import models
from structlin_nn.convert import to_flax, to_torch
from structlin_nn.flax import StructuredLinear
from structlin_nn.models import StructureConfig
from structlin_nn.models.flax import build_model


class TorchNet(torch.nn.Module):
    """A module of each kind that is laid out differently in flax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, (3, 2), groups=2)
        self.norm = torch.nn.GroupNorm(3, 6)
        self.linear = torch.nn.Linear(6, 5)
        self.rms = torch.nn.RMSNorm(5, eps=1e-6)
        self.table = torch.nn.Embedding(7, 5)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.conv(x)).mean((2, 3))
        return self.rms(self.linear(h)) + self.table(tokens)


class FlaxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(4, 6, (3, 2), feature_group_count=2, padding="VALID", rngs=rngs)
        self.norm = nnx.GroupNorm(6, num_groups=3, epsilon=1e-5, rngs=rngs)
        self.linear = nnx.Linear(6, 5, rngs=rngs)
        self.rms = nnx.RMSNorm(5, epsilon=1e-6, rngs=rngs)
        self.table = nnx.Embed(7, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)  # its keys are no part of a checkpoint

    def __call__(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        h = self.norm(self.conv(x)).mean((1, 2))
        return self.rms(self.linear(h)) + self.table(tokens)


@pytest.fixture(scope="module")
def net() -> tuple[TorchNet, FlaxNet]:
    torch.manual_seed(0)
    theirs, ours = TorchNet(), FlaxNet(nnx.Rngs(0))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    to_flax(theirs.state_dict(), ours)
    return theirs, ours


def test_every_kind_of_module(net: tuple[TorchNet, FlaxNet]) -> None:
    theirs, ours = net
    rng = np.random.default_rng(0)
    x, tokens = rng.standard_normal((2, 4, 5, 6)).astype(np.float32), np.array([1, 6])
    expected = theirs(torch.from_numpy(x), torch.from_numpy(tokens)).detach().numpy()
    found = nnx.jit(lambda m, x, t: m(x, t))(ours, jnp.asarray(x.transpose(0, 2, 3, 1)), jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    state = to_torch(ours)
    assert set(state) == set(theirs.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_files(tmp_path: Path, dtype: str) -> None:
    structure = StructureConfig("monarch", {"blocks": 4}, rms_cap=True)
    sizes = {"width": 16, "depth": 1, "input_shape": (1, 4, 4)}
    torch.manual_seed(0)
    theirs = models.build_model("cifar-mlp", structure=structure, dtype=getattr(torch, dtype), **sizes)
    save_file(theirs.state_dict(), tmp_path / "torch.safetensors")
    made = {"structure": structure, "param_dtype": dtype, **sizes}
    ours = nnx.eval_shape(lambda: build_model("cifar-mlp", rngs=nnx.Rngs(0), **made))
    to_flax(load_file(tmp_path / "torch.safetensors"), ours)
    save_file(to_torch(ours), tmp_path / "flax.safetensors")
    again = load_file(tmp_path / "flax.safetensors")
    assert {name: t.dtype for name, t in again.items()} == {n: t.dtype for n, t in theirs.state_dict().items()}
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.state_dict().items())
    theirs.load_state_dict(again)


def changed(state: dict, **changes) -> dict:
    return {name: value for name, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear.bias": None}, "the state lacks linear.bias"),
        ({"other": torch.zeros(1)}, "no place for other"),
        ({"linear.weight": torch.zeros(6, 5)}, r"linear.weight has shape \(5, 6\) in the layout of flax"),
        ({"linear.bias": torch.zeros(5, dtype=torch.float64)}, "float64 in the state and float32 in the flax model"),
        ({"linear.bias": torch.zeros(5, dtype=torch.int64)}, "int64 in the state and float32"),
    ],
)
def test_refuses_what_does_not_fit(net: tuple[TorchNet, FlaxNet], changes: dict, message: str) -> None:
    theirs, ours = net
    before = np.asarray(ours.linear.kernel[...])
    with pytest.raises(ValueError, match=message):
        to_flax(changed(theirs.state_dict(), **changes), ours)
    np.testing.assert_array_equal(ours.linear.kernel[...], before)


def test_modules_without_counterpart_and_stacked_layers() -> None:
    attention = nnx.eval_shape(lambda: nnx.Sequential(nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"layers.0.\w+.\w+ belongs to a LinearGeneral"):
        to_torch(attention)

    def stack(rngs: nnx.Rngs) -> StructuredLinear:
        return StructuredLinear(4, 4, structure="low_rank", rank=2, rngs=rngs)

    stacked = nnx.eval_shape(lambda: nnx.split_rngs(splits=3)(nnx.vmap(stack))(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=re.escape("factors.0 has shape (3, 2, 4)")):
        to_flax({}, stacked)


def test_shared_parameters() -> None:
    def make() -> nnx.Module:
        layer = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
        return nnx.Sequential(layer, layer)

    model = make()
    state = to_torch(model)
    assert set(state) == {"layers.0.weight", "layers.1.weight"}
    to_flax({"layers.1.weight": np.eye(2, dtype=np.float32)}, model)
    np.testing.assert_array_equal(model.layers[0].kernel[...], np.eye(2))
    with pytest.raises(ValueError, match="are one parameter in flax"):
        to_flax({**state, "layers.0.weight": torch.zeros(2, 2)}, model)


def test_an_abstract_model_has_no_values() -> None:
    with pytest.raises(ValueError, match="has no values, because the model is abstract"):
        to_torch(nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))))
