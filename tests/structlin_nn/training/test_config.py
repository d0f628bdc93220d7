"""Configurations: strict, and the paper's recipes."""

import json
from typing import Any

import pytest

from structlin_nn.training import config as module
from structlin_nn.training.config import (
    CONFIGS,
    RECIPES,
    GPT2TrainConfig,
    ImageNetTrainConfig,
    TrainConfig,
    overrides,
    recipe,
)


class TestStrictness:
    @pytest.mark.parametrize(
        ("key", "near"),
        [("widht", "width"), ("epoch", "epochs"), ("batchsize", "batch_size"), ("LR", "lr"), ("mix_up", "mixup")],
    )
    def test_unknown_key_names_the_nearest(self, key: str, near: str) -> None:
        with pytest.raises(ValueError, match=f"unknown key '{key}' .* did you mean '{near}'"):
            TrainConfig.from_dict({key: 1})

    def test_unknown_key_with_nothing_near(self) -> None:
        with pytest.raises(ValueError, match=r"unknown key 'zzz' in the configuration$"):
            TrainConfig.from_dict({"zzz": 1})

    @pytest.mark.parametrize(
        ("key", "value", "wanted"),
        [
            ("width", 64.0, "an integer"),
            ("width", "64", "an integer"),
            ("epochs", True, "an integer"),
            ("lr", "0.1", "a number"),
            ("lr", False, "a number"),
            ("augment", 1, "True or False"),
            ("augment", "no", "True or False"),
            ("structure", None, "a string"),
            ("betas", 0.9, "two numbers"),
            ("betas", (0.9, 0.99, 0.999), "two numbers"),
            ("options", [("rank", 2)], "a dictionary"),
            ("options", {"rank": object()}, "a number, a string"),
        ],
    )
    def test_wrong_type(self, key: str, value: Any, wanted: str) -> None:
        with pytest.raises(TypeError, match=f"{key}.* must be {wanted}.*, got "):
            TrainConfig.from_dict({key: value})

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("width", 0, "width must be at least 1, got 0"),
            ("epochs", -1, "epochs must be at least 1, got -1"),
            ("lr", 0, "lr must be positive, got 0.0"),
            ("lr", float("nan"), "lr must be finite, got nan"),
            ("betas", (0.9, 1.0), "betas must be two numbers from 0 to below 1"),
            ("label_smoothing", 1.5, "label_smoothing must be from 0 to 1, got 1.5"),
            ("warmup_epochs", 10, "warmup_epochs must be less than epochs, got 10.0"),
            ("device", "gpu", "device must be cpu, cuda or cuda:N, got 'gpu'"),
            ("device", "cuda:", "device must be cpu, cuda or cuda:N"),
            ("seed", -1, "seed must be at least 0, got -1"),
            ("weight_decay", 0.1, "weight_decay=0.1 needs optimizer='adamw'"),
            ("structure", "kroneker", "unknown structure 'kroneker', did you mean 'kronecker'"),
            ("optimizer", "adamm", "unknown optimizer 'adamm', did you mean 'adam'"),
            ("model", "cifar_mlp", "unknown model 'cifar_mlp', did you mean 'cifar-mlp'"),
            ("data_set", "cifar11", "unknown data_set 'cifar11', did you mean 'cifar10'"),
            ("options", {"rank": 2}, r"structure 'dense' has no option 'rank' \(it has none\)"),
        ],
    )
    def test_wrong_value(self, key: str, value: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TrainConfig.from_dict({key: value})

    def test_unknown_option_of_a_structure_names_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"no option 'rnak', did you mean 'rank'\? \(it has rank, rank_fraction\)"):
            TrainConfig(structure="low_rank", options={"rnak": 3})

    def test_is_frozen(self) -> None:
        with pytest.raises(AttributeError):
            TrainConfig().width = 3  # type: ignore[misc]

    def test_an_int_is_a_float_where_one_is_wanted(self) -> None:
        config = TrainConfig(lr=1)
        assert config.lr == 1.0
        assert type(config.lr) is float


class TestPlainValues:
    def test_survive_json(self) -> None:
        config = TrainConfig(
            structure="block_tensor_train",
            options={"rank": (2, 3), "cores": 3, "factorization": ((2, 2, 6), (3, 2, 4))},
            betas=(0.8, 0.9),
        )
        again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert again.differences(config) == []

    def test_differences_are_named(self) -> None:
        config = TrainConfig(structure="monarch", options={"blocks": 4})
        other = config.replace(options={"blocks": 2}, width=32)
        assert config.differences(other) == ["width", "options"]

    def test_replace_is_checked(self) -> None:
        with pytest.raises(ValueError, match="did you mean 'seed'"):
            TrainConfig().replace(sed=1)


class TestRecipes:
    def test_are_the_papers(self) -> None:
        mlp, vit = recipe("cifar-mlp"), recipe("cifar-vit")
        assert (mlp.epochs, mlp.batch_size, mlp.base_width, mlp.lr, mlp.input_lr_mult) == (500, 1024, 64, 3e-3, 0.1)
        assert (vit.epochs, vit.batch_size, vit.base_width, vit.lr, vit.input_lr_mult) == (200, 256, 64, 1e-3, 1.0)
        for config in (mlp, vit):
            assert (config.augment, config.mixup, config.label_smoothing) == (True, 0.8, 0.3)
            assert (config.optimizer, config.weight_decay, config.structure_aware) == ("adam", 0.0, True)

    def test_of_imagenet_and_gpt2_are_the_papers(self) -> None:
        vit, gpt2 = recipe("imagenet-vit"), recipe("gpt2")
        assert (vit.batch_size, vit.epochs, vit.warmup_epochs, vit.lr, vit.weight_decay) == (3072, 300, 5, 2e-3, 0.05)
        assert (vit.betas, vit.clip, vit.mixup, vit.label_smoothing) == ((0.9, 0.95), 1.0, 0.2, 0.1)
        assert (vit.augment, vit.erasing, vit.color_jitter) == ("rand-m9-mstd0.5-inc1", 0.25, 0.4)
        assert (gpt2.batch_size, gpt2.context, gpt2.steps, gpt2.depth, gpt2.heads) == (480, 512, 600_000, 12, 12)
        assert (gpt2.layers, gpt2.betas, gpt2.clip, gpt2.optimizer) == ("all", (0.9, 0.95), 1.0, "adamw")
        btt = recipe("gpt2", structure="block_tensor_train", width=1024)
        assert (btt.rms_cap, btt.options) == (True, {"rank": 4, "factorization": "greedy"})
        assert not recipe("gpt2", structure="block_tensor_train", rms_cap=False).rms_cap
        assert not gpt2.rms_cap

    def test_of_a_model_of_timm(self) -> None:
        config = recipe("timm:vit_small_patch32_224", structure="monarch")
        assert isinstance(config, ImageNetTrainConfig)
        assert (config.width, config.base_width, config.epochs) == (0, 0, 300)
        with pytest.raises(ValueError, match="timm:x has its own width: width and base_width must be 0, got 64 and 0"):
            recipe("timm:x", width=64)

    def test_options_of_the_structure(self) -> None:
        assert recipe("cifar-mlp", structure="tensor_train").options == {"rank": 16, "factorization": "greedy"}
        assert recipe("cifar-vit", structure="tensor_train").options == {"rank": 8, "factorization": "greedy"}
        assert recipe("cifar-vit", structure="monarch", options={"blocks": 16}).options == {"blocks": 16}
        assert recipe("cifar-vit", structure="blast").options == {}
        given = recipe("cifar-mlp", structure="block_tensor_train", options={"rank": 2}).options
        assert given == {"rank": 2, "factorization": "greedy"}

    def test_know_only_fields_and_models(self) -> None:
        for model, values in RECIPES.items():
            assert CONFIGS[model].from_dict(values).replace(model=model) == recipe(model)
        with pytest.raises(ValueError, match="unknown model 'cifar', did you mean"):
            recipe("cifar")
        with pytest.raises(ValueError, match="unknown key 'widht'"):
            recipe("cifar-mlp", widht=3)

    def test_choices_are_those_of_the_packages(self) -> None:
        from structlin.scale import RULES
        from structlin_nn.data import DATASETS
        from structlin_nn.models import LAYER_PRESETS, MODELS

        assert set(module.DATA_SETS) == set(DATASETS)
        assert set(module.MODELS) <= set(MODELS)
        assert set(module.LAYERS) == set(LAYER_PRESETS)
        assert set(module.RULES) == set(RULES)
        assert set(CONFIGS) == set(MODELS)
        assert all(recipe(name).layers == MODELS[name].layers for name in CONFIGS)
        assert all(recipe(name).base_width == MODELS[name].base_width for name in CONFIGS)


class TestOverrides:
    def test_values(self) -> None:
        given = ["lr=1e-3", "model=cifar-vit", "betas=[0.8, 0.9]", "augment=false", "options.rank=[2, 3]", "epochs=2"]
        changes = overrides(TrainConfig, [*given, "options.factorization=greedy", "structure=block_tensor_train"])
        config = TrainConfig.from_dict(changes)
        assert (config.lr, config.model, config.betas, config.augment) == (1e-3, "cifar-vit", (0.8, 0.9), False)
        assert config.options == {"rank": (2, 3), "factorization": "greedy"}
        assert overrides(GPT2TrainConfig, ['options={"rank": 4}']) == {"options": {"rank": 4}}

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("batchsize=3", "unknown key 'batchsize' in 'batchsize=3', did you mean 'batch_size'"),
            ("width", "'width' must be KEY=VALUE"),
            ("width=a", "the value in 'width=a' must be JSON"),
            ("lr.x=1", "unknown key 'lr.x'"),
            ("options.=1", "unknown key 'options.'"),
        ],
    )
    def test_mistakes(self, given: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            overrides(TrainConfig, [given])

    def test_twice(self) -> None:
        with pytest.raises(ValueError, match="sets lr a second time"):
            overrides(TrainConfig, ["lr=1", "lr=2"])

    def test_of_a_wrong_type_are_left_to_the_configuration(self) -> None:
        with pytest.raises(TypeError, match=r"width must be an integer, got 1\.5"):
            TrainConfig.from_dict(overrides(TrainConfig, ["width=1.5"]))


class TestContinuing:
    def test_execution_may_differ(self) -> None:
        TrainConfig(accumulate=4, recompute=True).check_continues(TrainConfig(), "run")
        with pytest.raises(ValueError, match=r"clip was 0\.0 and is 1\.0"):
            TrainConfig(clip=1.0).check_continues(TrainConfig(), "run")

    def test_another_pipeline(self) -> None:
        with pytest.raises(ValueError, match="the run in run trains gpt2, and this is cifar"):
            TrainConfig().check_continues(GPT2TrainConfig(), "run")

    @pytest.mark.parametrize(
        ("kind", "values", "message"),
        [
            (TrainConfig, {"ema": 1.0}, "ema must be from 0 to below 1"),
            (TrainConfig, {"precision": "fp16"}, "unknown precision 'fp16', did you mean 'float16'"),
            (TrainConfig, {"schedule": "constant", "final_lr": 0.1}, "schedule='constant' has none"),
            (TrainConfig, {"model": "cifar-vit", "bias": False}, "bias=False is for cifar-mlp"),
            (GPT2TrainConfig, {"warmup_steps": 5, "steps": 5}, "warmup_steps must be less than steps"),
            (GPT2TrainConfig, {"width": 4, "heads": 8}, "has no room for 8 heads"),
            (ImageNetTrainConfig, {"model": "resnet50"}, "model must be imagenet-vit or timm:NAME"),
            (ImageNetTrainConfig, {"erasing": 2}, "erasing must be from 0 to 1"),
        ],
    )
    def test_values_out_of_range(self, kind: Any, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            kind.from_dict(values)
