"""Counts of torch models, against FlopCounterMode and against formulas written out here."""

import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import structlin
from structlin_nn.counting import backward_macs, count, count_model, format_count
from structlin_nn.models import MODELS, StructureConfig, build_model
from structlin_nn.torch import StructuredLinear

SMALL: dict[str, dict[str, Any]] = {
    "cifar-mlp": {"width": 24, "num_classes": 8},
    "cifar-vit": {"width": 24, "heads": 3, "head_dim": 10, "num_classes": 8},
    "imagenet-vit": {"width": 20, "depth": 2, "num_classes": 9},
    "gpt2": {"width": 24, "depth": 2, "heads": 3, "head_dim": 10, "vocabulary": 35, "context": 9},
}
STRUCTURES = {
    "dense": {},
    "low_rank": {"rank": 3},
    "monarch": {"blocks": 3},
    "block_tensor_train": {"rank": 2},
    "tensor_train": {"rank": 3},
    "kronecker": {},
}


def torch_flops(model: nn.Module, *inputs: torch.Tensor, train: bool) -> int:
    """Of the matrix products and convolutions that torch itself counts, with attention made of plain products."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        output = model(*inputs)
        if train:
            output.sum().backward()
    return counter.get_total_flops()


# Without the slow tests, each model with three structures, and each structure with two models.
@pytest.mark.parametrize(
    ("name", "structure"),
    [
        pytest.param(name, structure, marks=() if (i + j) % 2 == 0 else pytest.mark.slow)
        for i, name in enumerate(MODELS)
        for j, structure in enumerate(STRUCTURES)
    ],
)
def test_models_against_torch(name: str, structure: str) -> None:
    """Forward and training, exactly: the MACs that the structure promises are those that torch carries out."""
    config = StructureConfig(structure, STRUCTURES[structure], layers="intermediate")
    model = build_model(name, structure=config, device="meta", **SMALL[name])
    x = model.example_input(3, device="meta")
    counted = count(model, x)
    assert 2 * counted.macs() == torch_flops(model, x, train=False)
    assert 2 * counted.training_macs == torch_flops(model, x, train=True)
    assert counted.macs() == counted.macs("linear") + counted.macs("attention")
    record = count_model(name, structure=structure, layers="intermediate", options=STRUCTURES[structure], **SMALL[name])
    assert 3 * record["forward_macs"] == counted.macs()
    assert 3 * record["training_macs"] == counted.training_macs


@pytest.mark.parametrize("name", MODELS)
def test_training_is_three_times_forward_but_for_the_data(name: str) -> None:
    """The pixels of the MLP need no gradient; the ViT has a norm before its first layer, GPT-2 embeddings."""
    record = count_model(name, structure="low_rank", options={"rank": 3}, layers="all", **SMALL[name])
    missing = 3072 * 3 if name == "cifar-mlp" else 0
    assert record["training_macs"] == 3 * record["forward_macs"] - missing


def test_vit_against_formulas() -> None:
    w, heads, size, classes, tokens = 24, 3, 10, 8, 17
    record = count_model("cifar-vit", **SMALL["cifar-vit"])
    per_token = 4 * w * heads * size + 2 * 4 * w * w
    attention = 2 * heads * tokens * tokens * size
    assert record["attention_macs"] == 3 * attention
    assert record["head_macs"] == w * classes
    assert record["forward_macs"] == 16 * 192 * w + 3 * (tokens * per_token + attention) + w * classes
    assert record["embedding_params"] == (tokens + 1) * w
    norms = 2 * 192 + 2 * w + 3 * (4 * w + 4 * size) + 2 * w
    biases = w + 3 * (w + 4 * w + w) + classes
    weights = 192 * w + 3 * (4 * w * heads * size + 8 * w * w) + w * classes
    assert record["trainable_params"] == norms + biases + weights + (tokens + 1) * w
    assert record["tokens"] == tokens
    assert [layer["rows"] for layer in record["layers"]] == [16] + [tokens] * 18 + [1]


def test_gpt2_at_base_width() -> None:
    """The published GPT-2 small: 124 M parameters with a tied head of 38.6 M; no bias, 512 positions, untied here."""
    record = count_model("gpt2", width=768)
    d, v, t = 768, 50304, 512
    assert record["head_params"] == d * v
    assert record["embedding_params"] == (v + t) * d
    assert record["trainable_params"] == (2 * v + t) * d + 12 * (12 * d * d + 2 * d + 2 * 64) + d
    assert record["attention_macs"] == 12 * 2 * t * t * d, "no discount for the causal mask"
    assert record["forward_macs"] == t * (12 * 12 * d * d + d * v) + record["attention_macs"]
    assert {f["lr_multiplier"] for layer in record["layers"] for f in layer["factors"]} == {1.0}


def test_record() -> None:
    record = count_model(
        "gpt2", width=48, heads=2, structure="block_tensor_train", options={"rank": 2, "factorization": "greedy"},
        rms_cap=True, base_width=96, vocabulary=60, context=7, depth=2,
    )  # fmt: skip
    assert json.loads(json.dumps(record))["model"] == "gpt2"
    assert record["base_width"] == 96
    assert [layer["name"] for layer in record["layers"]][:7] == [
        "blocks.0.attention.query",
        "blocks.0.attention.key",
        "blocks.0.attention.value",
        "blocks.0.attention.out",
        "blocks.0.up",
        "blocks.0.down",
        "blocks.1.attention.query",
    ]
    assert [layer["gains"] for layer in record["layers"]] == [0, 0, 2, 2, 2, 2] * 2 + [2]
    up, down = record["layers"][4:6]
    assert up["params"] == sum(f["numel"] for f in up["factors"]) + 2
    for layer, base_in in ((up, 96), (down, 4 * 96)):
        for f in layer["factors"]:
            assert f["lr_multiplier"] == pytest.approx(base_in / (f["fan_in"] * 2))
            assert f["numel"] == f["fan_in"] * f["fan_out"] * f["blocks"]
    assert down["factors"][1]["init_std"] == 0 < down["factors"][0]["init_std"]
    total = sum(layer["params"] for layer in record["layers"])
    assert total + sum(math.prod(p["shape"]) for p in record["other_params"]) == record["trainable_params"]
    assert {p["lr_multiplier"] for p in record["other_params"]} == {1.0}
    assert sum(layer["macs"] for layer in record["layers"]) + record["attention_macs"] == record["forward_macs"]
    assert record["uncounted_ops"]["aten.native_layer_norm"] == 4 * 2 + 1
    table = format_count(record)
    assert f"{record['forward_macs']:,}" in table
    assert f"{record['trainable_params']:,}" in table
    for layer in record["layers"]:
        assert layer["name"] in table


def test_optimisers_and_rules() -> None:
    keys = {"width": 256, "structure": "block_tensor_train", "options": {"rank": 4}}
    adam, sgd = (count_model("cifar-mlp", optimizer=o, **keys)["layers"][1] for o in ("adam", "sgd"))
    for a, s in zip(adam["factors"], sgd["factors"], strict=True):
        assert a["lr_multiplier"] == pytest.approx(64 / (2 * a["fan_in"]))
        assert s["lr_multiplier"] == pytest.approx(s["blocks"] * s["fan_out"] / s["fan_in"] * 64 / 256)
    paper, corrected = (count_model("cifar-vit", rule=rule, **keys)["layers"] for rule in ("paper", "rank_corrected"))
    (first, last), (same, raised) = (layers[2]["factors"] for layers in (paper, corrected))  # a key projection
    assert (first["init_std"], math.sqrt(4) * last["init_std"]) == (same["init_std"], raised["init_std"])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"name": "gpt3"}, "unknown model 'gpt3'"),
        ({"structure": "btt"}, "unknown structure 'btt'"),
        ({"options": {"rank": 2}}, "structure 'dense' has no option 'rank'"),
        (
            {"structure": "monarch", "options": {"factorization": "greedy"}},
            "structure 'monarch' has no option 'factorization'",
        ),
        ({"structure": "low_rank", "options": {"blocks": 2}}, "structure 'low_rank' has no option 'blocks'"),
        (
            {"structure": "kronecker", "options": {"rank_fraction": 0.5}},
            "structure 'kronecker' has no option 'rank_fraction'",
        ),
        ({"heads": 2}, "model 'cifar-mlp' has no size 'heads'"),
        ({"name": "gpt2", "num_classes": 2}, "model 'gpt2' has no size 'num_classes'"),
        ({"layers": "last"}, "unknown layers 'last'"),
        ({"rule": "kaiming"}, "unknown rule 'kaiming'"),
        ({"optimizer": "lbfgs"}, "unknown optimizer 'lbfgs'"),
        ({"structure": "block_tensor_train", "width": 31}, "31 cannot be split"),
    ],
)
def test_errors(keywords: dict[str, Any], message: str) -> None:
    arguments = {"name": "cifar-mlp", "width": 48} | keywords
    name = arguments.pop("name")
    with pytest.raises(ValueError, match=message):
        count_model(name, **arguments)


# -- other models --------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Convolutions, attention written out and called, a tied weight, a frozen and a reused layer, a vector product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2)
        self.mix = nn.Conv1d(6, 8, 2)
        self.upward = nn.ConvTranspose1d(8, 10, 3, stride=2)
        self.structured = StructuredLinear(10, 12, structure="kronecker")
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.upward(self.mix(self.stem(x).flatten(2))).transpose(1, 2)
        x = self.frozen(self.frozen(self.structured(x)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        scores = (x @ x.transpose(1, 2)).softmax(-1)
        return F.linear(scores @ x, self.frozen.weight) @ self.scale


def test_any_module() -> None:
    torch.manual_seed(0)
    model = Mixed()
    x = torch.randn(2, 3, 7, 9)
    counted = count(model, x)
    assert 2 * counted.macs() == torch_flops(model, x, train=False) + 2 * VECTOR
    # torch leaves products with a vector out. The gradient of the matrix is an outer product, which adds up nothing.
    assert 2 * counted.training_macs == torch_flops(model, x, train=True) + 2 * 2 * VECTOR
    kinds = {(c.name, c.kind): c for c in counted.calls}
    assert kinds["frozen", "linear"].calls == 2
    assert kinds["frozen", "linear"].macs == 2 * 2 * TOKENS * 144
    assert kinds["frozen", "linear"].backward_macs == 2 * 2 * TOKENS * 144, "a frozen weight has no gradient"
    assert kinds["stem", "convolution"].macs == 2 * 6 * 3 * 4 * 27
    assert kinds["stem", "convolution"].backward_macs == 2 * 6 * 3 * 4 * 27, "nor has the data"
    assert kinds["", "product"].macs == 2 * 2 * TOKENS * TOKENS * 12
    assert kinds["structured", "linear"].rows == 2 * TOKENS
    assert kinds["attention", "attention"].macs == 2 * 2 * TOKENS * TOKENS * 12
    assert counted.trainable_params == sum(p.numel() for p in model.parameters()) - 156
    assert counted.embedding_params == 0


TOKENS = 2 * (12 - 1 - 1) + 3  # 3 x 4 positions, less 1, upsampled
VECTOR = 2 * TOKENS * 12


def test_attention_is_counted_whatever_carries_it_out() -> None:
    """Fused, plain and meta attention, and calls through nn.MultiheadAttention, come to the same MACs."""

    class Attend(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=False)

    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    expected = 2 * 3 * 5 * 7 * (8 + 4)
    for device in ("cpu", "meta"):
        for backends in ([SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            with sdpa_kernel(backends):
                counted = count(Attend(), *(t.to(device) for t in (q, k, v)))
            assert counted.macs("attention") == counted.macs() == expected
            assert counted.calls[0].backward_macs == 0
    scores, values = 2 * 3 * 5 * 7 * 8, 2 * 3 * 5 * 7 * 4
    for needed, backward in {
        (True, True, True): 2 * scores + 2 * values,
        (True, False, False): scores + values,
        (False, False, True): values,
    }.items():
        leaves = [t.requires_grad_(need) for t, need in zip((q, k, v), needed, strict=True)]
        assert count(Attend(), *leaves).calls[0].backward_macs == backward
        assert torch_flops(Attend(), *leaves, train=True) == 2 * (scores + values + backward)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(2, 5, 16)
    plain = count(layer, x).macs()
    assert 2 * plain == torch_flops(layer, x, train=False)
    assert count(layer.to("meta"), x.to("meta")).macs() == plain


def test_work_that_is_no_product() -> None:
    """FFTs are listed in FLOPs, apart; a capped layer costs no more products."""
    model = nn.Sequential(StructuredLinear(6, 9, structure="toeplitz"), StructuredLinear(9, 9, structure="diagonal"))
    counted = count(model, torch.randn(4, 6))
    assert counted.macs() == 0
    toeplitz, diagonal = (m.structure for m in model)
    setup = sum(toeplitz.setup_flops.values())
    assert setup > 0
    assert counted.other_flops == 4 * (sum(toeplitz.other_flops.values()) + 9) + setup
    assert sum(diagonal.other_flops.values()) == 9
    free, capped = (
        count(StructuredLinear(6, 8, structure="monarch", blocks=2, rms_cap=cap), torch.zeros(5, 6)) for cap in (0, 1)
    )
    assert free.training_macs == capped.training_macs > 0


def test_ways_to_count() -> None:
    """A causal mask, fused attention, shared states, and products of 8 bits."""
    sizes = {"width": 24, "depth": 2, "heads": 3, "head_dim": 10, "vocabulary": 35, "context": 9}
    plain = count_model("gpt2", strict=True, **sizes)
    causal = count_model("gpt2", causal_discount=True, **sizes)
    assert (plain["attention_macs"], causal["attention_macs"]) == (2 * 2 * 3 * 81 * 10, 2 * 2 * 3 * 45 * 10)
    flash = count_model("gpt2", flash_backward=True, **sizes)
    assert flash["training_macs"] - plain["training_macs"] == flash["recomputed_macs"] == plain["attention_macs"] // 2
    shared = count_model("gpt2", batch_size=2, zero_stage=3, devices=4, device="h100", **sizes)
    whole = count_model("gpt2", batch_size=2, device="h100", activation_dtype="float8_e4m3fn", **sizes)
    assert shared["bytes"]["weights"] == -(-whole["bytes"]["weights"] // 4)
    assert shared["roofline"]["update"] == pytest.approx(whole["roofline"]["update"] / 4)
    assert "ZeRO stage 3" in format_count(shared)
    assert whole["roofline"]["dtype"] == "float8_e4m3fn"
    toeplitz = count_model("cifar-mlp", width=64, structure="toeplitz", batch_size=3, steps=5)
    assert toeplitz["run"]["training_flops_per_step"] > 2 * 3 * toeplitz["training_macs"]
    assert toeplitz["run"]["training_flops"] == 5 * toeplitz["run"]["training_flops_per_step"]
    assert toeplitz["training_other_flops"] > 2 * toeplitz["other_flops"]


def test_inference_and_keywords() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Embedding(3, 6)).eval()

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = StructuredLinear(4, 6, structure="low_rank", rank=2)
            self.table = nn.Embedding(5, 4)

        @torch.inference_mode()
        def forward(self, *, tokens: torch.Tensor) -> torch.Tensor:
            return self.inner(x=self.table(tokens)) @ torch.ones(6, 3)

    counted = count(Keyword(), tokens=torch.zeros(2, 7, dtype=torch.int64))
    assert counted.macs() == 14 * (2 * 10 + 18)
    assert counted.embedding_params == 20
    assert counted.uncounted_ops["aten.embedding"] == 1
    assert count(model[:2], torch.zeros(3, 4)).uncounted_ops.keys() == {"aten._native_batch_norm_legit_no_training"}
    with pytest.raises(TypeError, match="model must be a torch module, got <class"):
        count(StructuredLinear, torch.zeros(3))


def test_hooks_are_removed_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(5, 2))
    with pytest.raises(RuntimeError):
        count(model, torch.zeros(1, 4))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_backward_of_a_chain() -> None:
    chain = structlin.design("tensor_train", (30, 24), rank=2)
    first, second = (f.numel * f.carried for f in chain.factors)
    assert first != second
    assert backward_macs(chain, True, (True, True)) == 2 * chain.macs
    assert backward_macs(chain, False, (True, True)) == first + 2 * second
    assert backward_macs(chain, False, (False, True)) == second
    assert backward_macs(chain, True, (False, False)) == chain.macs
    assert backward_macs(chain, False, (False, False)) == 0


def test_traffic_of_structured_layers_on_a_gpu() -> None:
    """The seconds are those of the fastest way for each layer; a CPU has no such model."""
    from structlin.execution.choice import Problem
    from structlin.execution.devices import DEVICES
    from structlin.execution.traffic import fastest

    sizes: dict[str, Any] = {"width": 64, "structure": "block_tensor_train", "options": {"rank": 2}}
    sizes["batch_size"] = 128
    record = count_model("cifar-mlp", device="h100", dtype="bfloat16", **sizes)
    found = record["traffic"]
    assert [row["name"] for row in found["layers"]] == [row["name"] for row in record["layers"]]
    assert found["seconds"] == sum(row["seconds"] for row in found["layers"])
    layer = record["layers"][1]
    structure = structlin.design("block_tensor_train", (layer["out_features"], layer["in_features"]), rank=2)
    way, traffic = fastest(Problem(structure, True, "torch", "cuda", "bfloat16", 128, 1, True), DEVICES["h100"])
    row = found["layers"][1]
    assert (row["way"], row["kernels"], row["seconds"]) == (way.name, len(traffic.kernels), traffic.seconds)
    text = format_count(record)
    assert "structured layers of a training step, predicted for NVIDIA H100 SXM 80 GB, bfloat16" in text
    assert "traffic" not in count_model("cifar-mlp", device="cpu", **sizes)
