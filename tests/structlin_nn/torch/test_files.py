"""Files of models with structured layers: the same function comes back, and nothing else is taken for it."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layers import EACH
from helpers.refusals import refused
from safetensors.torch import load_file, save_file
from torch import nn

import structlin
from structlin_nn.torch import (
    StructuredLinear,
    load_structured,
    project_linear,
    read_structured,
    replace_linear,
    save_structured,
)

SIZES = (12, 20, 8)


def dense(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20, bias), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 8))


def same(a: nn.Module, b: nn.Module, x: torch.Tensor | None = None) -> bool:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(3)) if x is None else x
    with torch.no_grad():
        return torch.equal(a(x), b(x))


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rewrite(path: Path, change: Any) -> None:
    """Change what the file says of its layers, and nothing else."""
    found, data = header(path)
    described = json.loads(found["__metadata__"]["structlin"])
    described = change(described) or described
    found["__metadata__"]["structlin"] = json.dumps(described)
    text = json.dumps(found).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = dense()
    replace_linear(model, "block_tensor_train", rank=2, layers="0")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save_structured(model, path, metadata={"note": "a test"})
    return model, path


class TestRoundTrip:
    @pytest.mark.parametrize(("name", "shape", "options"), EACH)
    def test_every_structure(self, name: str, shape: tuple[int, int], options: dict[str, Any], path: Path) -> None:
        d_out, d_in = shape
        torch.manual_seed(1)
        layer = StructuredLinear(d_in, d_out, structure=name, **options)
        model = nn.Sequential(layer, nn.Tanh())
        save_structured(model, path)
        torch.manual_seed(2)
        again = load_structured(lambda: nn.Sequential(nn.Linear(d_in, d_out), nn.Tanh()), path)
        assert again[0].structure == layer.structure
        assert again[0].init_std == layer.init_std
        assert same(again, model, torch.randn(3, d_in))

    @pytest.mark.parametrize(
        "options",
        [
            {"rank": (2, 3), "cores": 3, "factorization": ((5, 2, 2), (3, 2, 2))},
            {"rank": 2, "rms_cap": True},
            {"rank": 2, "rms_cap": True, "gain": False, "zero_init": True},
            {"rank": 2, "rule": "rank_corrected", "checkpoint": True},
        ],
    )
    def test_options_of_a_layer(self, options: dict[str, Any], path: Path) -> None:
        torch.manual_seed(1)
        layer = StructuredLinear(12, 20, structure="tensor_train", **options)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter += torch.randn_like(parameter)
        save_structured(nn.Sequential(layer), path)
        again = load_structured(nn.Sequential(nn.Linear(12, 20)), path)[0]
        assert repr(again) == repr(layer)
        assert again.cap_sigma == layer.cap_sigma
        assert again.checkpoint == layer.checkpoint
        assert same(again, layer)

    def test_a_chain_without_a_name(self, path: Path) -> None:
        mine = structlin.Structure.parse("pa,pfra->frp; frp,ferp->fe", p=3, a=4, f=2, r=2, e=10)
        model = nn.Sequential(StructuredLinear(12, 20, structure=mine))
        save_structured(model, path)
        again = load_structured(nn.Sequential(nn.Linear(12, 20)), path)
        assert again[0].structure == mine
        assert same(again, model)

    def test_projected_layers_with_ranks_of_their_own(self, path: Path) -> None:
        def build() -> nn.Sequential:
            return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

        torch.manual_seed(0)
        model = build()
        project_linear(model, "low_rank", mac_fraction=0.4)
        ranks = [layer.options["rank"] for layer in model if isinstance(layer, StructuredLinear)]
        assert len(set(ranks)) > 1
        save_structured(model, path)
        again = load_structured(build, path)
        assert [layer.options["rank"] for layer in again if isinstance(layer, StructuredLinear)] == ranks
        assert same(again, model, torch.randn(3, 48))

    def test_the_file_is_plain_safetensors(self, saved: tuple[nn.Module, Path]) -> None:
        model, path = saved
        tensors = load_file(path)
        assert tensors.keys() == model.state_dict().keys()
        assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())
        found = read_structured(path)
        assert found.metadata == {"note": "a test"}
        assert [form["names"] for form in found.layers] == [["0"]]
        assert found.linear == ["3"]
        assert found.build is None
        assert found.shapes["0.bias"] == (20,)

    def test_values_take_dtype_and_place_of_the_model(self, saved: tuple[nn.Module, Path]) -> None:
        model, path = saved
        wide = load_structured(dense().double(), path)
        assert {p.dtype for p in wide.parameters()} == {torch.float64}
        torch.testing.assert_close(wide(torch.ones(2, 12).double()).float(), model(torch.ones(2, 12)))

    def test_half_precision_is_kept(self, path: Path) -> None:
        model = nn.Sequential(StructuredLinear(12, 20, structure="low_rank", rank=3, dtype=torch.bfloat16))
        save_structured(model, path)
        assert read_structured(path).dtypes["0.factors.0"] == "BF16"
        assert same(load_structured(nn.Sequential(nn.Linear(12, 20, dtype=torch.bfloat16)), path), model,
                    torch.ones(2, 12, dtype=torch.bfloat16))  # fmt: skip

    def test_what_the_layer_was_is_kept(self, saved: tuple[nn.Module, Path]) -> None:
        _, path = saved
        model = dense().eval()
        model[0].weight.requires_grad_(False)
        load_structured(model, path)
        assert not model[0].training
        assert not any(f.requires_grad for f in model[0].factors)
        assert model[0].bias.requires_grad

    def test_into_a_structured_model(self, saved: tuple[nn.Module, Path]) -> None:
        model, path = saved
        equal = dense()
        replace_linear(equal, "block_tensor_train", rank=2, layers="0")
        kept = equal[0]
        assert load_structured(equal, path)[0] is kept
        assert same(equal, model)
        other = dense()
        replace_linear(other, "monarch", blocks=4, layers="all")
        assert same(load_structured(other, path), model)
        assert type(other[3]) is nn.Linear

    def test_one_layer_at_two_places(self, path: Path) -> None:
        def build() -> nn.Sequential:
            linear = nn.Linear(12, 12)
            return nn.Sequential(linear, nn.ReLU(), linear)

        model = build()
        replace_linear(model, "kronecker", layers="all")
        save_structured(model, path)
        assert len(load_file(path)) == 3
        again = load_structured(build, path)
        assert again[0] is again[2]
        assert same(again, model)
        with pytest.raises(ValueError, match="a layer has the names 0, 2 in the file, but 0 in the model"):
            load_structured(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)), path)

    def test_hugging_face_gpt2(self, path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=8)
        model = transformers.GPT2LMHeadModel(config).eval()
        project_linear(model, "low_rank", rank=3, layers="*mlp*")
        save_structured(model, path)
        assert read_structured(path).aliases == {"lm_head.weight": "transformer.wte.weight"}
        again = load_structured(transformers.GPT2LMHeadModel(config).eval(), path)
        ids = torch.randint(40, (2, 8))
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert again.lm_head.weight is again.transformer.wte.weight
        untied = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**{**config.to_dict(), "tie_word_embeddings": False})
        )
        with pytest.raises(ValueError, match=r"tied to transformer\.wte\.weight in the file, but not in the model"):
            load_structured(untied, path)

    def test_ties_that_the_file_lacks(self, path: Path) -> None:
        class Pair(nn.Module):
            def __init__(self, tied: bool) -> None:
                super().__init__()
                self.a, self.b = nn.Embedding(6, 12), nn.Linear(12, 6, bias=False)
                self.c = nn.Linear(12, 12)
                if tied:
                    self.b.weight = self.a.weight

        model = Pair(tied=False)
        replace_linear(model, "low_rank", rank=2, layers="c")
        save_structured(model, path)
        with pytest.raises(ValueError, match=r"tied to a\.weight in the model, but not in the file"):
            load_structured(Pair(tied=True), path)
        assert type(load_structured(Pair(tied=False), path)) is Pair


class TestRefused:
    def test_untouched_where_the_model_is_another(self, saved: tuple[nn.Module, Path]) -> None:
        _, path = saved
        wrong: list[tuple[nn.Module, str]] = [
            (nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 8)), "12 -> 24 with a bias"),
            (dense(bias=False), "12 -> 20 without a bias in the model"),
            (nn.Sequential(nn.GELU(), nn.Linear(12, 20)), "a GELU, not a linear layer, at '0'"),
            (nn.ModuleDict({"head": nn.Linear(12, 20)}), "no layer at '0'; its linear layers are head"),
            (nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.LayerNorm(20)), "the model lacks, 3.bias"),
            (nn.Sequential(*dense(), nn.LayerNorm(8)), "the file lacks 4.bias, 4.weight"),
            (nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 9)), r"\(8, 20\) in the file"),
        ]
        for model, message in wrong:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            with pytest.raises(ValueError, match=message):
                load_structured(model, path)
            after = model.state_dict()
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], value) for name, value in before.items())

    def test_other_kinds_of_models(self, saved: tuple[nn.Module, Path]) -> None:
        _, path = saved
        with pytest.raises(ValueError, match=r"torch\.float32 in the file, but torch\.complex64 in the model"):
            load_structured(dense().to(torch.complex64), path)
        refused(ValueError, "meta device", load_structured, dense().to("meta"), path)
        refused(TypeError, r"a torch\.nn.Module or a function that returns one", load_structured, "model", path)
        refused(TypeError, r"must return a torch\.nn.Module, got 3", load_structured, lambda: 3, path)
        hooked = dense()
        hooked[0].register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="has hooks"):
            load_structured(hooked, path)

    def test_damaged_files(self, saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
        _, path = saved
        raw = path.read_bytes()
        broken = tmp_path / "broken.safetensors"
        for content in (b"", raw[:6], raw[:200], raw[:-10], b"\xff" * 100, b"PK\x03\x04" + raw):
            broken.write_bytes(content)
            with pytest.raises(ValueError, match="damaged"):
                load_structured(dense(), broken)
        flipped = bytearray(raw)
        flipped[-5] ^= 1
        broken.write_bytes(bytes(flipped))
        with pytest.raises(ValueError, match="the checksum of its tensors differs"):
            load_structured(dense(), broken)
        assert isinstance(load_structured(dense(), broken, verify=False)[0], StructuredLinear)
        with pytest.raises(FileNotFoundError, match="missing"):
            load_structured(dense(), tmp_path / "none.safetensors")
        (tmp_path / "model.pt").write_bytes(raw)
        with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
            load_structured(dense(), tmp_path / "model.pt")
        save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
        with pytest.raises(ValueError, match="does not describe structured layers"):
            read_structured(tmp_path / "plain.safetensors")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d: d.update(version=2), "must be of version 1, got 2"),
            (lambda d: d.update(layers={}), "layers must be a list"),
            (lambda d: d.update(linear=["0"]), "'0' is described twice"),
            (lambda d: d.update(linear=[3]), "linear must be a list of names"),
            (lambda d: d.update(aliases={"x": "y"}), "aliases must name tensors of the file"),
            (lambda d: d.update(build=[1]), "build must be an object or null"),
            (lambda d: d["layers"][0].pop("rule") and None, "must be described by names"),
            (lambda d: d["layers"][0].update(bias=1), "entry bias of a layer has the wrong type, got 1"),
            (lambda d: d["layers"][0].update(in_features=True), "wrong type"),
            (lambda d: d["layers"][0].update(names=[]), "names of a layer must not be empty"),
            (lambda d: d["layers"][0].update(structure="none_such"), "import the module that registers it"),
            (lambda d: d["layers"][0].update(structure=None, chain={"a": 1}), "does not describe a chain"),
            (lambda d: d["layers"][0]["options"].update(rank=3), "another version of this structure wrote"),
            (lambda d: d["layers"][0]["options"].update(rank=10**15), "."),
            (lambda d: d["layers"][0]["options"].update(depth=3), "no option 'depth'"),
            (lambda d: d["layers"][0]["options"].update(rank="2"), "rank"),
            (lambda d: [d], "must be of version 1, got None"),
        ],
    )  # fmt: skip
    def test_untrue_descriptions(self, change: Any, message: str, saved: tuple[nn.Module, Path]) -> None:
        _, path = saved
        rewrite(path, change)
        with pytest.raises(ValueError, match=message):
            read_structured(path)

    def test_what_cannot_be_written(self, path: Path) -> None:
        layer = StructuredLinear(12, 20, structure="low_rank", rank=2)
        cases: list[tuple[nn.Module, dict[str, Any], str]] = [
            (layer, {}, "put it in a container"),
            (dense(), {}, "no structured layers"),
            (nn.Sequential(StructuredLinear(12, 20, device="meta")), {}, "on the meta device"),
            (nn.Sequential(layer), {"metadata": {"format": "x"}}, "with keys other than format"),
            (nn.Sequential(layer), {"metadata": {"a": 3}}, "strings"),
            (nn.Sequential(layer), {"build": {"a": {3}}}, "JSON"),
        ]  # fmt: skip
        for model, options, message in cases:
            with pytest.raises(ValueError, match=message):
                save_structured(model, path, **options)
        with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
            save_structured(nn.Sequential(layer), path.with_suffix(".bin"))
        parametrized = nn.Sequential(StructuredLinear(12, 20, structure="low_rank", rank=2))
        nn.utils.parametrize.register_parametrization(parametrized[0].factors, "0", nn.Identity())
        with pytest.raises(ValueError, match="has parametrizations"):
            save_structured(parametrized, path)
        assert not path.exists()

    def test_an_error_leaves_the_last_file(self, saved: tuple[nn.Module, Path], full_disk: Any) -> None:
        model, path = saved
        before = path.read_bytes()
        with full_disk(1000), pytest.raises(OSError, match="File too large"):
            save_structured(model, path)
        assert path.read_bytes() == before
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]
