"""`structlin replace`, models by name, and structures of installed packages."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import structlin
from structlin import registry
from structlin_nn.cli import main
from structlin_nn.models import StructureConfig
from structlin_nn.models.named import build_named, open_named

LLAMA = [
    f"--model-option={name}={value}" for name, value in {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 48,
    }.items()
]  # fmt: skip


def test_a_model_of_transformers(capsys):
    pytest.importorskip("transformers")
    code = main(["replace", "hf:llama", "--structure", "low_rank", "--rank", "2", *LLAMA, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert len(found["layers"]) == 14
    assert {(row["name"], row["role"]) for row in found["dense"]} == {
        ("model.embed_tokens.weight", "embedding"), ("lm_head.weight", "not chosen"),
    }  # fmt: skip
    assert found["layers"][0]["params_after"] == 2 * (32 + 32)


@pytest.mark.parametrize("form", ["type", "folder"])
def test_unknown_options_of_a_configuration(form, tmp_path, misuse):
    """A configuration of transformers stores any name, so that a misspelt size would change nothing."""
    transformers = pytest.importorskip("transformers")
    name = "gpt2"
    if form == "folder":
        transformers.GPT2Config(n_layer=1).save_pretrained(tmp_path)
        name = str(tmp_path)
    with pytest.raises(ValueError, match=r"has no 'n_layers' \(did you mean n_layer\?\)"):
        open_named(f"hf:{name}", n_layers=1)
    for known in ({"n_layer": 1}, {"num_hidden_layers": 1}, {"n_layer": 1, "attn_implementation": "eager"}):
        model = open_named(f"hf:{name}", n_embd=32, n_head=2, vocab_size=48, **known)
        assert len(model.transformer.h) == 1
    wrong = "check-scale hf:gpt2 --width-option n_embed --base-width 64 --widths 64,128"
    assert "has no 'n_embed' (did you mean n_embd?)" in misuse(wrong)


def test_a_model_for_images_without_a_size_of_images():
    """The recipes state the size of their images, which convolutions do not need."""
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = build_named("hf:resnet", 5, StructureConfig(), image_size=32, **sizes)
    assert isinstance(model.model, transformers.ResNetForImageClassification)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = build_named("hf:vit", 5, StructureConfig(), image_size=32, patch_size=8, **small)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_a_model_of_timm(cli):
    pytest.importorskip("timm")
    options = ["--layers", "*.fc1", "--model-option", "depth=1"]
    text = cli("replace", "timm:vit_tiny_patch16_224", "--structure", "monarch", "--blocks", "4", *options).out
    assert "blocks.0.mlp.fc1" in text
    assert "stays dense: patch_embed.proj.weight (convolution of 16 x 16" in text


def test_a_model_of_ones_own(tmp_path, monkeypatch, capsys, cli):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\ndef make(width=12):\n"
        "    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, 3))\ndef number():\n    return 3\n"
    )
    arguments = ["--structure", "low_rank", "--rank", "30", "--model-option", "width=24"]
    text = cli("replace", "my_models:make", *arguments)
    assert "24 x 24" in text.out
    assert "warning: 1 of 1 structured layers cost more than dense" in text.err
    assert next(open_named("my_models:make").parameters()).is_meta
    assert next(open_named("my_models:make", device=None).parameters()).device == torch.get_default_device()
    for model, words in (
        ("my_models:mkae", "module my_models has no 'mkae' (did you mean make?)"),
        ("my_model:make", "my_model:make cannot be imported"),
        ("my_models:number", "must give a torch.nn.Module, got a int"),
        ("gpt2", "a model is timm:NAME, hf:CONFIG"),
        ("hf:llamma", "transformers has no model type 'llamma' (did you mean llama?)"),
    ):
        assert main(["replace", model, "--structure", "low_rank"]) == 2, model
        assert words in capsys.readouterr().err
    assert "unknown structure 'low_rnk'" in cli("replace", "my_models:make", "--structure", "low_rnk", code=2).err


@pytest.mark.parametrize("json_", [False, True])
def test_every_warning_is_printed_on_stderr(json_, tmp_path, monkeypatch, cli):
    """Warnings of any category and text, in a run that succeeds and in one that fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "warned_models", raising=False)
    (tmp_path / "warned_models.py").write_text(
        "import warnings\nfrom torch import nn\nclass Own(nn.Sequential):\n    def named_modules(self, *a, **k):\n"
        "        warnings.warn('names are\\nslow', DeprecationWarning)\n        return super().named_modules(*a, **k)\n"
        "def make():\n    return Own(nn.Linear(24, 24), nn.Linear(24, 3))\n"
    )
    command = ["replace", "warned_models:make", "--structure", "low_rank", *["--json"][:json_]]
    text = cli(*command, "--rank", "30")
    assert "warning" not in text.out
    assert not json_ or json.loads(text.out)["layers"]
    assert "warning: names are slow\n" in text.err
    assert "warning: 1 of 1 structured layers cost more than dense" in text.err
    assert "warning: names are slow\n" in cli(*command, "--rank", "30", "--dearer", "error", code=2).err


def test_structures_of_installed_packages(monkeypatch):
    def load():
        @structlin.register("installed_here")
        class Installed(structlin.LowRank):
            pass

    def broken():
        raise ImportError("no module named elsewhere")

    points = [SimpleNamespace(value="good", load=load), SimpleNamespace(value="bad", load=broken)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "structlin.structures" else [])
    monkeypatch.setattr(registry, "_installed_loaded", False)
    try:
        with pytest.warns(UserWarning, match="entry point 'bad' cannot be loaded: ImportError"):
            assert structlin.structure_class("installed_here").name == "installed_here"
        assert "installed_here" in structlin.structure_names()
    finally:
        structlin.unregister("installed_here")
