"""The models against the same models in NumPy and float64, and what training needs of them."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.layers import losses
from helpers.refusals import refused
from scipy.special import erf, softmax
from torch import nn
from torch.nn import functional as F

from structlin_nn.models import MODELS, StructureConfig, build_model
from structlin_nn.torch import StructuredLinear

# Sizes differ pairwise, so that a mixed-up axis shows.
SMALL: dict[str, dict[str, Any]] = {
    "cifar-mlp": {"width": 24, "depth": 2, "num_classes": 8, "input_shape": (3, 4, 6)},
    "cifar-vit": {
        "width": 24, "depth": 2, "heads": 3, "head_dim": 10, "num_classes": 8, "input_shape": (2, 8, 12), "patch": 4,
    },
    "imagenet-vit": {"width": 20, "depth": 1, "num_classes": 9, "input_shape": (3, 6, 4), "patch": 2},
    "gpt2": {"width": 24, "depth": 2, "heads": 3, "head_dim": 10, "vocabulary": 35, "context": 9},
}  # fmt: skip
STRUCTURES = [
    StructureConfig(),
    StructureConfig("block_tensor_train", {"rank": 2}, rms_cap=True, layers="all"),
    StructureConfig("low_rank", {"rank": 3}, rule="rank_corrected"),
    StructureConfig("monarch", {"blocks": 3}, layers="intermediate"),
    StructureConfig("kronecker", layers="intermediate"),
]
ids = [s.name for s in STRUCTURES]
# Without the slow tests, each model with two or three structures, and each structure with two models.
SOME = [
    pytest.param(name, s, id=f"{name}-{s.name}", marks=() if (i + j) % 2 == 0 else pytest.mark.slow)
    for i, name in enumerate(MODELS)
    for j, s in enumerate(STRUCTURES)
]


def test_a_model_on_meta_gets_the_order_of_its_pixels() -> None:
    expected, model = build("cifar-mlp"), build("cifar-mlp", device="meta").to_empty(device="cpu")
    model.permutation.fill_(-1)
    model.reset_buffers()
    assert torch.equal(model.permutation, expected.permutation)


def build(name: str, structure: StructureConfig | None = None, **more: Any) -> nn.Module:
    return build_model(name, structure=structure, **{**SMALL[name], **more})


def sample(model: nn.Module, batch: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = model.example_input(batch)
    if x.is_floating_point():
        return torch.randn(x.shape, generator=generator)
    return torch.randint(model.config.vocabulary, x.shape, generator=generator)


def shake(model: nn.Module) -> nn.Module:
    """Random values everywhere, so that nothing hides behind a zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


# -- the oracle ----------------------------------------------------------------------------------------------------


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def linear(layer: StructuredLinear, x: np.ndarray) -> np.ndarray:
    y = x @ array(layer.operator.to_dense()).T
    return y if layer.bias is None else y + array(layer.bias)


def norm(layer: nn.LayerNorm, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * array(layer.weight)
    return y if layer.bias is None else y + array(layer.bias)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / math.sqrt(2))) / 2


def attention(layer: nn.Module, x: np.ndarray, heads: int, size: int, causal: bool) -> np.ndarray:
    batch, tokens, _ = x.shape
    y = np.zeros((batch, tokens, heads * size))
    q, k, v = (linear(part, x) for part in (layer.query, layer.key, layer.value))
    for head in range(heads):
        cut = slice(head * size, (head + 1) * size)
        scores = norm(layer.query_norm, q[..., cut]) @ norm(layer.key_norm, k[..., cut]).swapaxes(1, 2) * (8 / size)
        if causal:
            scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
        y[..., cut] = softmax(scores, axis=-1) @ v[..., cut]
    return linear(layer.out, y)


def transformer(model: nn.Module, x: np.ndarray, causal: bool) -> np.ndarray:
    heads, size = model.config.heads, model.config.head_dim
    for block in model.blocks:
        x = x + attention(block.attention, norm(block.attention_norm, x), heads, size, causal)
        x = x + linear(block.down, gelu(linear(block.up, norm(block.ffn_norm, x))))
    return norm(model.norm, x)


def oracle(name: str, model: nn.Module, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    data = x.numpy().astype(np.float64 if x.is_floating_point() else np.int64)
    if name == "cifar-mlp":
        pixels = data.reshape(len(data), -1)[:, model.permutation.numpy()]
        features = gelu(linear(model.input, pixels))
        for block in model.blocks:
            features = features + linear(block.down, gelu(linear(block.up, norm(block.norm, features))))
        return linear(model.output, features), features
    if name == "gpt2":
        features = transformer(model, array(model.tokens.weight)[data] + array(model.positions.weight), causal=True)
        return linear(model.head, features), features
    batch, _, height, width = data.shape
    p = model.config.patch
    patches = np.stack(
        [
            data[:, :, i : i + p, j : j + p].transpose(0, 2, 3, 1).reshape(batch, -1)
            for i in range(0, height, p)
            for j in range(0, width, p)
        ],
        axis=1,
    )
    h = norm(model.embedding_norm, linear(model.patch_embedding, norm(model.patch_norm, patches)))
    token = np.broadcast_to(array(model.class_token.weight), (batch, 1, model.config.width))
    h = np.concatenate([token, h], axis=1) + array(model.positions.weight)
    features = transformer(model, h, causal=False)[:, 0]
    return linear(model.head, features), features


@pytest.mark.parametrize("structure", STRUCTURES, ids=ids)
@pytest.mark.parametrize("name", MODELS)
def test_forward(name: str, structure: StructureConfig) -> None:
    model = shake(build(name, structure))
    x = sample(model)
    logits, features = model(x, return_features=True)
    expected, hidden = oracle(name, model, x)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(array(logits) / scale, expected / scale, atol=2e-5)
    np.testing.assert_allclose(array(features), hidden, atol=2e-5 * max(1, np.abs(hidden).max()))
    assert torch.equal(model(x), logits)


# -- initialisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES, ids=ids)
@pytest.mark.parametrize("name", MODELS)
def test_zero_initialised_layers(name: str, structure: StructureConfig) -> None:
    """Logits and residual branches are zero, by the last-applied factor alone."""
    model = build(name, structure)
    assert not model(sample(model)).any()
    zero = {"down", "out", "output", "head"} | ({"query"} if name != "gpt2" else set())
    for path, layer in model.named_modules():
        if isinstance(layer, StructuredLinear):
            flags = [bool(f.any()) for f in layer.factors]
            assert flags == [True] * (len(flags) - 1) + [path.rpartition(".")[2] not in zero], path
            assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize("structure", ["dense", "block_tensor_train"])
def test_scale_of_the_features_of_the_mlp(structure: str) -> None:
    """gelu of a Gaussian whose variance the spectral rule gives: prod min(1, fan_out / fan_in) over the factors."""
    torch.manual_seed(0)
    model = build_model("cifar-mlp", width=768, structure=StructureConfig(structure))
    _, features = model(torch.randn(64, 3, 32, 32), return_features=True)
    std = math.sqrt(math.prod(min(1.0, f.fan_out / f.fan_in) for f in model.input.structure.factors))
    z = np.linspace(-8, 8, 4001)
    weights = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    expected = math.sqrt((gelu(std * z) ** 2 * weights).sum())
    assert features.square().mean().sqrt().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", ["cifar-vit", "imagenet-vit", "gpt2"])
def test_features_of_transformers_have_rms_one(name: str) -> None:
    model = build(name, StructureConfig("block_tensor_train"))
    x = sample(model)
    _, features = model(x, return_features=True)
    rms = features.square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), atol=1e-3, rtol=0)
    stream = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Embedding)])
    assert stream.std().item() == pytest.approx(1, rel=0.2)


def test_gains_follow_the_cap() -> None:
    model = build("gpt2", StructureConfig("block_tensor_train", rms_cap=True))
    gains = {n.rpartition(".")[2]: m.gains for n, m in model.named_modules() if isinstance(m, StructuredLinear)}
    assert all(gains[name] is None for name in ("query", "key"))
    assert all(len(gains[name]) == 2 for name in ("value", "out", "up", "down", "head"))
    left = build("cifar-vit", StructureConfig("block_tensor_train", rms_cap=True))
    assert left.head.gains is None, "layers left dense are not capped"
    assert len(left.patch_embedding.gains) == 2


@pytest.mark.parametrize(
    ("preset", "dense"),
    [(None, {"head"}), ("all", set()), ("all_but_last", {"head"}), ("intermediate", {"patch_embedding", "head"})],
)
def test_presets(preset: str | None, dense: set[str]) -> None:
    model = build("cifar-vit", StructureConfig("low_rank", {"rank": 2}, layers=preset))
    found = {n for n, m in model.named_modules() if isinstance(m, StructuredLinear) and len(m.factors) == 1}
    assert found == dense
    assert len(build("gpt2", StructureConfig("low_rank", {"rank": 2})).head.factors) == 2


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "structure"), SOME)
def test_every_parameter_learns_and_the_loss_falls(name: str, structure: StructureConfig) -> None:
    torch.manual_seed(0)
    model = build(name, structure)
    x = sample(model)
    classes = model(x).shape[-1]
    target = x.flatten() if name == "gpt2" else torch.arange(len(x)) % classes
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    start = [p.detach().clone() for p in model.parameters()]
    first, *_, last = losses(optimiser, lambda: F.cross_entropy(model(x).flatten(0, -2), target), 40)
    assert first == pytest.approx(math.log(classes), rel=1e-4)
    assert last < 0.5 * first
    still = [n for (n, p), q in zip(model.named_parameters(), start, strict=True) if torch.equal(p, q)]
    assert not still


@pytest.mark.parametrize("name", MODELS)
def test_language_model_sees_no_later_token(name: str) -> None:
    """Only GPT-2 is causal; the class token of a ViT sees every patch."""
    model = shake(build(name))
    x = sample(model, batch=1)
    changed = x.clone()
    changed[..., -1] = (changed[..., -1] + 1) % 7
    before, after = model(x), model(changed)
    if name == "gpt2":
        assert torch.equal(before[:, :-1], after[:, :-1])
        assert not torch.equal(before[:, -1], after[:, -1])
    else:
        assert not torch.equal(before, after)


def test_shorter_sequences_are_prefixes() -> None:
    model = shake(build("gpt2"))
    x = sample(model)
    torch.testing.assert_close(model(x[:, :4]), model(x)[:, :4])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "aot_eager") for name in MODELS), ("cifar-mlp", "inductor"), ("gpt2", "inductor")]
)
def test_compiles_as_one_graph(name: str, backend: str) -> None:
    structure = StructureConfig("block_tensor_train", {"rank": 2}, rms_cap=True, layers="intermediate")
    model = shake(build(name, structure, depth=1))
    x = sample(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    gradients = []
    for f in (model, compiled):
        model.zero_grad()
        y = f(x)
        y.square().mean().backward()
        gradients.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, eager, atol=1e-3 * max(1.0, eager.abs().max().item()), rtol=1e-3)


# -- state, devices, dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_state_round_trip(name: str) -> None:
    structure = StructureConfig("block_tensor_train", rms_cap=True)
    model, other = shake(build(name, structure)), build(name, structure)
    x = sample(model)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(x), other(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    if name == "cifar-mlp":
        assert "permutation" in model.state_dict()


@pytest.mark.parametrize("name", MODELS)
def test_meta(name: str) -> None:
    structure = StructureConfig("block_tensor_train", {"rank": 2})
    meta = build(name, structure, device="meta")
    assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}
    assert meta(meta.example_input(3, device="meta")).device.type == "meta"
    with torch.device("meta"):
        assert {t.device.type for t in build(name, structure).state_dict().values()} == {"meta"}


@pytest.mark.parametrize("name", MODELS)
def test_dtype_and_autocast(name: str) -> None:
    model = build(name, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    shake(model)
    x = sample(model)
    x = x.double() if x.is_floating_point() else x
    np.testing.assert_allclose(array(model(x)), oracle(name, model, x)[0], atol=1e-10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = shake(build(name))
        x = sample(single)
        rough = single(x)
    np.testing.assert_allclose(rough.detach().float(), single(x).detach(), atol=0.1 * single(x).abs().max().item())


def test_pixel_order_is_fixed() -> None:
    a, b = (build("cifar-mlp", **sizes) for sizes in ({"width": 8}, {"width": 16, "num_classes": 3}))
    assert torch.equal(a.permutation, b.permutation)
    assert sorted(a.permutation.tolist()) == list(range(3 * 4 * 6))
    assert a.permutation.tolist() != list(range(3 * 4 * 6))
    model = build_model("cifar-mlp", width=8)
    assert model.permutation[:4].tolist() == PIXELS


PIXELS = torch.randperm(3072, generator=torch.Generator().manual_seed(0))[:4].tolist()


# -- errors --------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    refused(ValueError, "unknown model 'resnet'; one of cifar-mlp", build_model, "resnet", width=8)
    with pytest.raises(ValueError, match="'gpt2' has no size 'num_classes'; its sizes are depth, heads"):
        build_model("gpt2", width=8, num_classes=10)
    refused(ValueError, "'cifar-mlp' has no size 'heads'", build_model, "cifar-mlp", width=8, heads=2)
    with pytest.raises(TypeError, match="structure must be a StructureConfig, got 'dense'"):
        build_model("gpt2", width=8, structure="dense")
    refused(ValueError, "width must be a positive integer, got 0", build_model, "cifar-mlp", width=0)
    refused(ValueError, r"depth must be a positive integer, got 1\.5", build_model, "cifar-mlp", width=4, depth=1.5)
    refused(ValueError, "width 4 is smaller than the number of heads 8", build_model, "cifar-vit", width=4)
    refused(ValueError, "patches of 7 x 7 do not tile images of 32 x 32", build_model, "cifar-vit", width=16, patch=7)
    with pytest.raises(ValueError, match=r"\(channels, height, width\) in positive integers, got \(32, 32\)"):
        build_model("cifar-vit", width=16, input_shape=(32, 32))
    with pytest.raises(ValueError, match="unknown layers 'first'; one of all, all_but_last, intermediate"):
        StructureConfig(layers="first")
    refused(ValueError, "unknown rule 'xavier'", StructureConfig, rule="xavier")
    refused(ValueError, "unknown structure 'sparse'", StructureConfig, "sparse")
    refused(ValueError, "structure 'dense' has no option 'rank'; it has none", StructureConfig, "dense", {"rank": 1})
    refused(TypeError, "rms_cap must be True or False, got 1", StructureConfig, rms_cap=1)
    with pytest.raises(ValueError, match=r"images of shape \(batch, \*\(3, 4, 6\)\) are needed, got \(2, 3, 6, 4\)"):
        build("cifar-mlp")(torch.zeros(2, 3, 6, 4))
    refused(ValueError, "images of shape", build("cifar-vit"), torch.zeros(2, 96))
    with pytest.raises(ValueError, match=r"length up to 9\) are needed, got torch.int64 of shape \(1, 10\)"):
        build("gpt2")(torch.zeros(1, 10, dtype=torch.int64))
    refused(ValueError, r"got torch.float32 of shape \(1, 3\)", build("gpt2"), torch.zeros(1, 3))


def test_configurations_compare_and_hash() -> None:
    a, b = (StructureConfig("low_rank", {"rank": rank}) for rank in (1, 2))
    assert a == copy.deepcopy(a) != b
    assert len({a, copy.deepcopy(a), b}) == 2
