"""The check tells right parametrisations from wrong ones, of named models and of one's own."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from structlin_nn.cli import main
from structlin_nn.models import MODELS, StructureConfig
from structlin_nn.scale_check import ScaleCheck, builder_of, check_scale
from structlin_nn.torch import ParameterRule

WIDTHS = (64, 256, 1024)


def verdicts(found: ScaleCheck) -> dict[str, str]:
    return {layer.name: layer.verdict for layer in found.layers}


def check(structure: str = "dense", aware: bool = True, **settings: Any) -> ScaleCheck:
    chosen = builder_of("cifar-mlp", structure=StructureConfig(structure))
    return check_scale(**{**chosen, "widths": WIDTHS, "structure_aware": aware, "seeds": 2, **settings})


@pytest.mark.slow
def test_structure_aware_is_flat_and_naive_is_not() -> None:
    aware, naive = (check("block_tensor_train", aware) for aware in (True, False))
    assert aware.passed
    assert not naive.passed
    features = "output (input)"
    slopes = [{layer.name: layer.change_slope for layer in found.layers}[features] for found in (aware, naive)]
    assert slopes[0] > -0.15
    assert slopes[1] < -0.2
    assert verdicts(naive)["blocks.1.up"] == "vanishes"


@pytest.mark.slow
def test_dense_is_flat_under_both_rules_and_not_without_base_widths() -> None:
    aware, naive = (check("dense", aware, seeds=1) for aware in (True, False))
    assert aware.passed
    assert aware.layers == naive.layers
    undone = check("dense", seeds=1, extra_multipliers=None, base=None)
    assert not undone.passed, "one rate for all widths"
    assert verdicts(undone)["output"] == "grows"


def test_a_slope_is_that_of_the_rate() -> None:
    """With rates times width**1/2 too large at every layer, changes grow by that half more."""
    right = check("dense", seeds=1, steps=1, lr=1e-5)
    features = {layer.name: layer.change_slope for layer in right.layers}
    assert features["output"] == pytest.approx(0, abs=0.1)

    def build(width: int) -> tuple[nn.Module, torch.Tensor]:
        return Scaled(width), torch.randn(8, 5)

    found = check_scale(build, widths=WIDTHS, base=build(64)[0], base_width=64, steps=1, lr=1e-5, optimizer="sgd")
    assert [layer.initial_slope for layer in found.layers] == pytest.approx([0.5, 0.5, 1], abs=0.15)
    assert found.layers[0].verdict in ("grows", "starts growing", "vanishes")
    assert not found.passed


class Scaled(nn.Module):
    """Outputs of the first layer grow with width**1/2, those of the second with width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, width, bias=False), nn.Linear(width, 3, bias=False)
        nn.init.normal_(self.first.weight, std=width**0.5)
        nn.init.normal_(self.second.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize(("name", "optimizer"), list(zip(MODELS, ("muon", "adamw", "sgd", "muon"), strict=True)))
def test_all_models_can_be_checked(name: str, optimizer: str) -> None:
    chosen = builder_of(name, structure=StructureConfig("monarch", {"blocks": 2}, rms_cap=True), base_width=16)
    found = check_scale(**chosen, widths=(16, 32), optimizer=optimizer, seeds=1, steps=2)
    assert found.base_width == 16
    assert len(found.layers) >= 6
    assert all(len(layer.change) == 2 and len(layer.change[0]) == 2 for layer in found.layers)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["model"] == name


def test_frozen_layers_are_fixed() -> None:
    def build(width: int) -> tuple[nn.Module, torch.Tensor]:
        model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))
        model[0].requires_grad_(False)
        return model, torch.ones(4, 5)

    found = check_scale(build, widths=(16, 64), base=build(16)[0], base_width=16, seeds=1)
    assert verdicts(found)["0"] == verdicts(found)["2 (input)"] == "fixed"
    assert verdicts(found)["2"] != "fixed"


def test_nothing_is_left_behind() -> None:
    """The same numbers again, whatever was drawn before, and torch's generator as it was."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = check("low_rank", seeds=1, widths=(16, 32))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    assert check("low_rank", seeds=1, widths=(16, 32)) == first


SOURCE = """
import torch
from torch import nn

def mlp(width):
    return nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4)), x

x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))

def no_model(width):
    return width

def no_inputs(width):
    return nn.Linear(3, 3)

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_models.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    return "my_models"


class TestOwnModels:
    def test_replaced(self, own: str) -> None:
        chosen = builder_of(
            f"{own}:mlp", base_width=64, structure=StructureConfig("block_tensor_train", layers="intermediate")
        )
        aware, naive = (check_scale(**chosen, widths=WIDTHS, structure_aware=a, seeds=2) for a in (True, False))
        slopes = [{layer.name: layer.change_slope for layer in found.layers}["2"] for found in (aware, naive)]
        assert abs(slopes[0]) < 0.2
        assert slopes[1] < slopes[0] - 0.1

    def test_command(self, own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["check-scale", f"{own}:mlp", "--base-width", "16", "--widths", "16,64", "--seeds", "1", "--naive"]
        words += ["--structure", "monarch", "--blocks", "2", "--plot", str(tmp_path / "check.png")]
        code = main(words)
        out, err = capsys.readouterr()
        assert err == ""
        assert code in (0, 1)
        assert "naive learning rates" in out
        assert "structure-aware learning rates" in out
        assert (tmp_path / "check.png").stat().st_size > 10_000
        assert main([*words, "--json"]) == code
        naive, aware = json.loads(capsys.readouterr().out)
        assert (naive["structure_aware"], aware["structure_aware"]) == (False, True)
        assert aware["passed"] is (code == 0)
        assert [layer["name"] for layer in aware["layers"]] == ["0", "2", "4 (input)", "4"]

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("my_models:nothing", "module my_models has no 'nothing'"),
            ("no_such_module:mlp", "no_such_module:mlp cannot be imported"),
            ("my_models:", "given as package.module:function, got 'my_models:'"),
            ("my_models:number", "must be a function of a width, got 3"),
            ("my_models:no_model", "must return a torch module or .module, inputs., got int$"),
        ],
    )
    def test_paths(self, own: str, path: str, message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            builder_of(path, base_width=16)

    def test_no_inputs(self, own: str) -> None:
        chosen = builder_of(f"{own}:no_inputs", base_width=16)
        with pytest.raises(
            ValueError, match=r"model at width 16 states no inputs .*add a method example_input\(batch\)"
        ):
            check_scale(**chosen, widths=(16, 32))


class TestModelsOfLibraries:
    def test_transformers(self, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("transformers")
        words = ["check-scale", "hf:gpt2", "--width-option", "n_embd", "--base-width", "32", "--widths", "32,64"]
        for option in ("n_layer=1", "n_head=2", "vocab_size=48", "n_positions=8"):
            words += ["--model-option", option]
        code = main([*words, "--structure", "low_rank", "--seeds", "1", "--steps", "2", "--layers", "all", "--json"])
        (found,) = json.loads(capsys.readouterr().out)
        assert code in (0, 1)
        assert found["widths"] == [32, 64]
        assert {"transformer.wte", "transformer.h.0.mlp.c_fc", "lm_head"} <= {
            layer["name"] for layer in found["layers"]
        }

    def test_timm_with_a_rule_for_all_parameters(self) -> None:
        pytest.importorskip("timm")
        sizes = {"depth": 1, "num_heads": 2, "img_size": 32, "num_classes": 5}
        chosen = builder_of(
            "timm:vit_tiny_patch16_224", base_width=16, structure=StructureConfig("monarch", {"blocks": 2}),
            width_option="embed_dim", model_options=sizes,
        )  # fmt: skip
        settings: dict[str, Any] = {**chosen, "widths": (16, 32), "seeds": 1, "steps": 1}
        slow, usual = check_scale(**settings, rules={"*": ParameterRule(1e-6)}), check_scale(**settings)
        assert max(slow.layers[-1].change[0]) < 1e-3 * min(usual.layers[-1].change[0])

    def test_width_option(self) -> None:
        with pytest.raises(ValueError, match="hf:gpt2 needs width_option, the argument that sets its width"):
            builder_of("hf:gpt2", base_width=16)
        with pytest.raises(ValueError, match=r"my_models:mlp is called with the width"):
            builder_of("my_models:mlp", base_width=16, width_option="n_embd")


def test_command_reports_by_its_code(capsys: pytest.CaptureFixture[str], cli) -> None:
    words = ["check-scale", "cifar-mlp", "--widths", "32,128", "--seeds", "1", "--depth", "1"]
    assert main(words) == 0
    assert "all layers are flat" in capsys.readouterr().out
    assert "layers are not flat (slopes from -0.0001 to 0.0001)" in cli(*words, "--threshold", "0.0001", code=1).out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": (64,)}, r"widths must be two or more positive numbers in ascending order, got \(64,\)"),
        ({"widths": (64, 32)}, r"got \(64, 32\)"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; one of adam, adamw, sgd, muon"),
        ({"lr": 0}, "lr must be positive and finite, got 0"),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"seeds": 1.5}, r"seeds must be a positive integer, got 1\.5"),
        ({"threshold": -1}, "threshold must be positive and finite, got -1"),
        ({"lr": 1e30, "optimizer": "sgd"}, "are not finite at width 64 and rate 1e[+]30; try a lower lr"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(**settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("cifar-mpl", "unknown model 'cifar-mpl' (did you mean cifar-mlp?)"),
        ("cifar-mlp --widths a,b", "must be an integer or several with commas, got 'a,b'"),
        ("cifar-mlp --widths 64", "--widths must be two or more numbers with commas, got 64"),
        ("cifar-mlp --structure kronekcer", "unknown structure 'kronekcer'"),
        ("cifar-mlp --structure monarch --rank 2", "structure 'monarch' has no option 'rank'"),
        ("cifar-mlp --heads 2", "model 'cifar-mlp' has no size 'heads'"),
        ("my_models:mlp", "my_models:mlp needs base_width, the width at which its learning rate was tuned"),
        ("cifar-mlp --width-option width", "width_option and model_options are for models by timm:NAME"),
        ("cifar-mlp --parameter-rule *=x", "the value of * must be JSON, got 'x'"),
        ("my_models:mlp --base-width 16 --depth 2", "depth is a size of the named models"),
        ("my_models:mlp --base-width 16 --rank 2", "structure 'dense' has no option 'rank'"),
    ],
)
def test_misuse(words: str, message: str, own: str, cli) -> None:
    out, err = cli("check-scale", *words.split(), code=2)
    assert message in err
    assert out == ""
    assert err.count("\n") == 1
