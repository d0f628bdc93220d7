"""Configurations: strict, and the paper's recipes."""

import json
from typing import Any

import pytest

from structlin_nn.training import config as module
from structlin_nn.training.config import RECIPES, TrainConfig, recipe


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

    def test_options_of_the_structure(self) -> None:
        assert recipe("cifar-mlp", structure="tensor_train").options == {"rank": 16, "factorization": "greedy"}
        assert recipe("cifar-vit", structure="tensor_train").options == {"rank": 8, "factorization": "greedy"}
        assert recipe("cifar-vit", structure="monarch", options={"blocks": 16}).options == {"blocks": 16}
        assert recipe("cifar-vit", structure="blast").options == {}
        given = recipe("cifar-mlp", structure="block_tensor_train", options={"rank": 2}).options
        assert given == {"rank": 2, "factorization": "greedy"}

    def test_know_only_fields_and_models(self) -> None:
        for values in RECIPES.values():
            TrainConfig.from_dict(values)
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
        assert all(RECIPES[name]["layers"] == MODELS[name].layers for name in module.MODELS)
