"""Configurations: strict, plain values, and the paper's recipes."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from structlin_nn.recipes import MODELS, cifar, flax_cifar, gpt2, imagenet, recipe
from structlin_nn.recipes._config import overrides
from structlin_nn.recipes._torch import Steps


class TestStrictness:
    @pytest.mark.parametrize(("key", "near"), [("widht", "width"), ("btach_size", "batch_size")])
    def test_unknown_key_names_the_nearest(self, key: str, near: str) -> None:
        with pytest.raises(ValueError, match=rf"unknown key '{key}' in the configuration \(did you mean {near}"):
            cifar.Config.from_dict({key: 1})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("width", 1.5), ("width", True), ("width", "64"), ("lr", "0.1"), ("augment", 1), ("betas", (0.9,)),
            ("options", [1]), ("options", {"rank": object()}), ("rms_cap", "yes"), ("data_set", 3),
        ],
    )  # fmt: skip
    def test_wrong_type(self, key: str, value: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=rf"{key}|options are"):
            cifar.Config(structure="low_rank", **{key: value})

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"width": 0}, "width must be at least 1, got 0"),
            ({"lr": float("nan")}, "lr must be finite"),
            ({"lr": 0.0}, "lr must be positive"),
            ({"structure": "monach"}, r"unknown structure 'monach' \(did you mean monarch"),
            ({"layers": "most"}, "unknown layers 'most'"),
            ({"weight_decay": 0.1}, "needs optimizer='adamw'"),
            ({"schedule": "constant", "final_lr": 0.1}, "is the end of a cosine"),
            ({"device": "gpu"}, "device must be cpu, cuda or cuda:N, got 'gpu'"),
            ({"ema": 1.0}, "ema must be from 0 to below 1"),
            ({"model": "cifar-vit", "bias": False}, "bias=False is for cifar-mlp"),
            ({"optimizer": "muon"}, "adam_lr and optimizer='muon' must be given together"),
            ({"structure": "monarch", "options": {"blcoks": 4}}, r"no option 'blcoks' \(did you mean blocks"),
        ],
    )
    def test_wrong_value(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            cifar.Config(**values)

    @pytest.mark.parametrize(
        ("kind", "values", "message"),
        [
            (gpt2.Config, {"steps": 10}, "warmup_steps must be less than steps"),
            (gpt2.Config, {"width": 8}, "width 8 is smaller than the number of heads 12"),
            (
                imagenet.Config,
                {"model": "resnet"},
                r"unknown model 'resnet'; one of imagenet-vit, timm:NAME, hf:CONFIG",
            ),
            (flax_cifar.Config, {"precision": "bfloat16"}, "precision must be 'float32' in flax, got 'bfloat16'"),
            (flax_cifar.Config, {"compile": True}, "compile must be False in flax"),
            (flax_cifar.Config, {"model": "my:model"}, "model must be cifar-mlp or cifar-vit in flax"),
            (gpt2.Config, {"model": "hf:gpt2", "depth": 3}, "depth is a size of gpt2"),
            (
                gpt2.Config,
                {"model": "hf:gpt2", "width": 64},
                "hf:gpt2 has its own width: width must be omitted, got 64",
            ),
            (cifar.Config, {"model": "timm:vit_tiny", "base_width": 32}, "base_width must be omitted, got 32"),
            (gpt2.Config, {"model": "timm:vit_tiny"}, "timm has no language models"),
            (gpt2.Config, {"model_options": {"n_layer": 2}}, "model_options are for other models than gpt2"),
        ],
    )
    def test_of_other_recipes(self, kind: Any, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            kind(**values)


def test_plain_values_survive_json() -> None:
    config = cifar.Config(structure="low_rank", options={"rank": [2, 3]}, betas=(0.5, 1e-3), lr=1)
    again = cifar.Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.options == {"rank": (2, 3)}
    assert isinstance(again.lr, float)


def test_continuing() -> None:
    config = gpt2.Config(width=96)
    config.replace(accumulate=4, recompute=True).check_continues(config, "x")
    with pytest.raises(ValueError, match="the run in x has another configuration: width was 96 and is 192"):
        config.replace(width=192).check_continues(config, "x")
    with pytest.raises(ValueError, match=r"is one of structlin_nn\.recipes\.cifar, and this is one of .*gpt2"):
        config.check_continues(cifar.Config(), "x")


class TestRecipes:
    def test_are_the_papers(self) -> None:
        mlp, vit = recipe("cifar-mlp"), recipe("cifar-vit")
        assert (mlp.epochs, mlp.batch_size, mlp.lr, mlp.input_lr_mult, mlp.base_width) == (500, 1024, 3e-3, 0.1, 64)
        assert (vit.epochs, vit.batch_size, vit.lr, vit.input_lr_mult, vit.base_width) == (200, 256, 1e-3, 1.0, 64)
        assert {(c.mixup, c.label_smoothing, c.augment, c.optimizer) for c in (mlp, vit)} == {(0.8, 0.3, True, "adam")}
        image, text = recipe("imagenet-vit"), recipe("gpt2")
        assert (image.batch_size, image.epochs, image.lr, image.weight_decay, image.clip) == (3072, 300, 2e-3, 0.05, 1)
        assert (text.batch_size, text.steps, text.lr, text.betas) == (480, 600_000, 6e-4, (0.9, 0.95))
        assert (text.decay_embeddings, text.base_expansion, image.base_expansion) == (True, 0, 0)
        assert set(MODELS) == {"cifar-mlp", "cifar-vit", "imagenet-vit", "gpt2"}

    def test_of_a_model_of_timm(self) -> None:
        config = recipe("timm:vit_small", structure="monarch")
        assert (config.width, config.base_width, config.options) == (0, 0, {})

    def test_of_a_library(self) -> None:
        config = gpt2.Config(model="hf:gpt2", model_options={"n_layer": 2})
        assert (config.width, config.base_width, config.model_options) == (0, 0, {"n_layer": 2})
        assert gpt2.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_compilation_and_tf32_are_stated(self) -> None:
        """On a GPU models are compiled by default, and products of float32 are in TensorFloat-32."""
        assert [cifar.Config(device=d).compile for d in ("cpu", "cuda", "cuda:1")] == [False, True, True]
        assert cifar.Config(device="cuda", compile=False).compile is False
        assert flax_cifar.Config(device="cuda").compile is False
        assert cifar.Config().to_dict()["tf32"] is True

    def test_the_rate_of_the_first_layer_is_the_papers(self) -> None:
        models = ("cifar-mlp", "cifar-vit", "my_models:make")
        assert [cifar.Config(model=model).input_lr_mult for model in models] == [0.1, 1.0, 1.0]
        assert cifar.extra_multipliers(cifar.Config(input_lr_mult=0)) == {"input": 0.0}, (
            "a rate of zero can be asked for"
        )
        with pytest.raises(ValueError, match="input_lr_mult must be at least 0, got -1"):
            cifar.Config(input_lr_mult=-1)
        with pytest.raises(ValueError, match="input_lr_mult is for cifar-mlp and cifar-vit"):
            cifar.extra_multipliers(cifar.Config(model="my_models:make", input_lr_mult=0.5))

    def test_options_of_the_structure(self) -> None:
        assert recipe("cifar-mlp", structure="tensor_train", options={"rank": 3}).options == {
            "rank": 3, "factorization": "greedy",
        }  # fmt: skip
        assert recipe("cifar-vit", structure="low_rank", options={"rank": 3}).options == {"rank": 3}
        with pytest.raises(ValueError, match=r"unknown model 'gtp2' \(did you mean gpt2"):
            recipe("gtp2")


class TestOverrides:
    def test_values(self) -> None:
        given = ["lr=1e-3", "options.rank=[2,3]", "options.factorization=greedy", "augment=false", "model=cifar-vit"]
        assert overrides(cifar.Config, given) == {
            "lr": 1e-3, "options": {"rank": [2, 3], "factorization": "greedy"}, "augment": False, "model": "cifar-vit",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("given", "message"),
        [("lr", "must be NAME=VALUE"), ("lr.a=1", "unknown key 'lr.a'"), ("widht=1", "did you mean width")],
    )
    def test_mistakes(self, given: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            overrides(cifar.Config, [given])

    def test_twice(self) -> None:
        with pytest.raises(ValueError, match=r"options\.rank is given twice"):
            overrides(cifar.Config, ["options.rank=1", "options.rank=2"])


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        ({}, [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
        ({"final_lr": 0.1}, [1 / 3, 2 / 3, 1, 0.868198, 0.55, 0.231802]),
        ({"schedule": "constant"}, [1 / 3, 2 / 3, 1, 1, 1, 1]),
    ],
)
def test_shares_of_the_learning_rate(changes: dict[str, Any], shares: list[float]) -> None:
    """Six steps, two of them of warm-up, beside numbers by hand."""
    run: Any = SimpleNamespace(config=cifar.Config(**changes), steps=6, warmup=2)
    assert [Steps.share(run, step) for step in range(6)] == pytest.approx(shares, abs=1e-6)
