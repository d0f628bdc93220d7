"""``structlin compress``: from a trained model to a file, and on from there."""

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from structlin_nn.cli import main
from structlin_nn.compress import compress
from structlin_nn.data import load_images
from structlin_nn.models import build_model, load_model, save_model
from structlin_nn.models.files import make_timm
from structlin_nn.records import read_record
from structlin_nn.torch import StructuredLinear, read_structured
from structlin_nn.trained import open_trained

TRAIN = "--batch-size 500 --mixup 0 --label-smoothing 0 --no-augment --threads 1 --quiet"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dense MLP, trained for an epoch on the embedded images."""
    folder = tmp_path_factory.mktemp("runs") / "dense"
    assert main(f"train cifar --width 32 --depth 2 --epochs 1 --steps 20 {TRAIN} --out {folder}".split()) == 0
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    raw = np.frombuffer(Path(pydoc_data.topics.__file__).read_bytes()[:30000], dtype=np.uint8).astype("<u2")
    raw[:27000].tofile(folder / "train.bin")
    raw[27000:].tofile(folder / "val.bin")
    (folder / "meta.json").write_text(json.dumps({"version": 1, "vocab_size": 257, "name": "t", "tokenizer": "bytes"}))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "small.safetensors"


@pytest.fixture
def as_json(cli: Any) -> Any:
    return lambda line: json.loads(cli(line, "--json").out)


def test_a_run(trained: Path, out: Path, as_json) -> None:
    line = f"compress {trained} --structure low_rank --mac-fraction 0.3 --calibrate 600 --layers blocks.* --out {out}"
    found = as_json(line)
    model = load_model(out)
    ranks = {n: m.options["rank"] for n, m in model.named_modules() if getattr(m, "options", {}).get("rank")}
    assert ranks == {row["names"][0]: row["options"]["rank"] for row in found["report"]["layers"]}
    assert len(set(ranks.values())) > 1
    assert {type(m) for m in model.modules() if hasattr(m, "in_features")} == {StructuredLinear}
    before, after = found["before"]["costs"], found["after"]["costs"]
    saved = found["report"]["macs_before"] - found["report"]["macs_after"]
    assert before["forward_macs"] - after["forward_macs"] == saved > 0.69 * found["report"]["macs_before"]
    assert after["params"] == sum(p.numel() for p in model.parameters())
    assert found["calibration_samples"] == 600

    data = load_images("fashion").as_32x32_rgb()
    pixels = torch.from_numpy(data.test_images).float() / 255
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    with torch.no_grad():
        wrong = (model((pixels - mean) / deviation).argmax(1).numpy() != data.test_labels).mean()
    assert found["after"]["quality"]["test_error"] == pytest.approx(wrong, abs=1e-3)
    last = read_record(trained / "record.jsonl").evaluations[-1]
    assert found["before"]["quality"]["test_error"] == last["test_error"]
    assert found["after"]["quality"]["test_error"] < last["test_error"] + 0.1
    said = json.loads(read_structured(out).metadata["compress"])
    assert said["after"]["quality"] == found["after"]["quality"]
    assert str(trained.parent) not in json.dumps(said)


def test_table(trained: Path, out: Path, cli) -> None:
    line = f"compress {trained} --structure monarch --blocks 4 --calibrate 0 --evaluate 100 --layers *.up --out {out}"
    text, _ = cli(line)
    rows = text.splitlines()
    assert rows[0].split()[:3] == ["layer", "shape", "form"]
    assert [row.split()[0] for row in rows[1:3]] == ["blocks.0.up", "blocks.1.up"]
    assert "the whole model" in text
    assert "test error" in text
    assert "not calibrated" in text
    assert text.splitlines()[-1] == f"{out}: {out.stat().st_size:,} bytes"


def test_other_layers_stay_structured(trained: Path, out: Path, as_json, cli) -> None:
    whole, part = out.with_name("whole.safetensors"), f"compress {out} --structure low_rank"
    as_json(f"compress {trained} --structure low_rank --rank 4 --calibrate 0 --layers blocks.* --out {out}")
    found = as_json(f"{part} --rank 2 --layers blocks.0.* --out {whole}")
    before, after = (found[key]["costs"] for key in ("before", "after"))
    assert {row["names"][0] for row in found["report"]["layers"]} == {"blocks.0.up", "blocks.0.down"}
    # Rank 2 in place of 4 in two layers of 32 x 128, and 128 x 32 features.
    assert before["forward_macs"] - after["forward_macs"] == 2 * 2 * (32 + 128)
    held = {n: m.options.get("rank") for n, m in load_model(whole).named_modules() if isinstance(m, StructuredLinear)}
    assert [held[f"blocks.{n}.up"] for n in range(2)] == [2, 4]
    dear = out.with_name("dear.safetensors")
    assert "more MACs than before" in cli(f"{part} --rank 20 --layers blocks.0.* --out {dear}")[1]


def test_an_error_leaves_the_model(trained: Path) -> None:
    found = open_trained(trained)
    before = {name: value.clone() for name, value in found.model.state_dict().items()}
    with pytest.raises(ValueError, match="no linear layer matches"):
        compress(found, "low_rank", layers="nothing", rank=2)
    assert all(torch.equal(value, before[name]) for name, value in found.model.state_dict().items())


def test_further_training_lowers_the_loss(trained: Path, out: Path, as_json, cli) -> None:
    as_json(f"compress {trained} --structure low_rank --rank 2 --calibrate 0 --layers blocks.* --out {out}")
    folder = out.parent / "further"
    line = f"train cifar --init-from {out} --epochs 1 {TRAIN} --lr 1e-3 --out {folder}"
    cli(line)
    record = read_record(folder / "record.jsonl")
    first, last = record.evaluations[0], record.evaluations[-1]
    assert last["train_loss"] < 0.9 * first["train_loss"]
    said = record.header
    assert said["init_from"] == {
        "file": out.name, "sha256": read_structured(out).sha256, "structured_layers": 4,
    }  # fmt: skip
    assert (said["config"]["structure"], said["config"]["options"]) == ("low_rank", {"rank": 2})
    assert (said["config"]["width"], said["config"]["depth"]) == (32, 2)
    assert said["counts"]["params"] == sum(p.numel() for p in load_model(out).parameters())
    # A compressed run can be compressed again, and a resumed run no longer needs the file.
    again = out.with_name("again.safetensors")
    found = as_json(f"compress {folder} --structure low_rank --rank 1 --layers blocks.* --out {again}")
    assert found["after"]["costs"]["forward_macs"] < found["before"]["costs"]["forward_macs"]
    out.unlink()
    line = f"train cifar --epochs 1 {TRAIN} --lr 1e-3 --out {folder} --resume"
    assert "resuming" in cli(line.replace("--quiet", "")).err


def test_gpt2(tokens: Path, out: Path, tmp_path: Path, as_json, cli) -> None:
    """Published form: biases, tied head, no normalised queries."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=257, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    line = f"compress {tmp_path / 'gpt2'} --data {tokens} --structure low_rank --param-fraction 0.6 --evaluate 16"
    found = as_json(f"{line} --calibrate 10 --out {out}")
    assert found["calibration_samples"] == 10
    assert found["before"]["quality"]["val_tokens"] == 16 * 16
    assert found["report"]["params_after"] < 0.7 * found["report"]["params_before"]
    assert len(found["report"]["layers"]) == 12
    cli(f"{line} --calibrate 0 --untie --out {out.with_name('untied.safetensors')}")
    assert read_structured(out.with_name("untied.safetensors")).build["config"]["tied"] is False

    train = (
        f"train gpt2 --data {tokens} --init-from {out} --steps 30 --warmup-steps 3 --batch-size 8 --eval-every 30 "
        "--eval-sequences 32 --lr 3e-3 --threads 1 --quiet"
    )
    cli(f"{train} --out {tmp_path / 'run'}")
    record = read_record(tmp_path / "run" / "record.jsonl")
    assert record.header["config"]["tied"] is True
    assert record.header["config"]["qk_norm"] is False
    assert record.evaluations[-1]["val_loss"] < record.evaluations[0]["val_loss"] - 0.3
    loss = found["after"]["quality"]["val_loss"]
    assert record.evaluations[0]["val_loss"] == pytest.approx(loss, abs=0.05)  # on other pieces
    text, _ = cli(f"generate {tmp_path / 'run'} --prompt ab --tokens 5")
    assert text.startswith("ab")
    text, _ = cli(f"generate {out} --tokenizer bytes --prompt ab --tokens 5")
    assert text.startswith("ab")
    assert "give --tokenizer" in cli(f"generate {out} --prompt ab", code=2)[1]


def test_timm(out: Path, tmp_path: Path, as_json, cli) -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = make_timm("vit_tiny_patch16_224", num_classes=3, img_size=32).eval()
    weights = tmp_path / "vit.safetensors"
    save_file(model.state_dict(), weights)
    data = load_images("fashion")
    for split, number in (("train", 8), ("val", 3)):
        for label, name in ((1, "a"), (8, "b"), (9, "c")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for count, image in enumerate(data.train_images[data.train_labels == label][:number]):
                Image.fromarray(image[0]).save(folder / f"{count}.png")
    line = f"compress timm:vit_tiny_patch16_224 --weights {weights} --image-size 32 --structure low_rank --rank 20"
    found = as_json(f"{line} --layers *.mlp.fc1 --data {tmp_path / 'images'} --calibrate 20 --out {out}")
    assert found["build"]["options"] == {"num_classes": 3, "img_size": 32}
    assert found["calibration_samples"] == 20
    assert found["before"]["quality"].keys() == {"val_loss", "val_error", "val_top5_error"}
    again = load_model(out)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(again(x), model(x))
        assert isinstance(again.blocks[3].mlp.fc1, StructuredLinear)
        torch.testing.assert_close(again.blocks[3].mlp.fc2.weight, model.blocks[3].mlp.fc2.weight)
    _, text = cli(f"{line} --layers *.fc1 --num-classes 4 --out {out} --overwrite", code=2)
    assert "head.weight has shape (3, 192) in the file, but (4, 192) in the model" in text
    line = f"compress timm:resnet18 --weights {weights} --structure low_rank --rank 2 --out {out} --overwrite"
    _, text = cli(line, code=2)
    assert "is not of timm's resnet18" in text


def test_a_model_of_timm_normalises_in_its_own_way(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from structlin_nn.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
    from structlin_nn.trained import open_trained

    model = make_timm("vit_tiny_patch16_224", img_size=32)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    opened = open_trained("timm:vit_tiny_patch16_224", weights=tmp_path / "vit.safetensors", image_size=32)
    assert opened.scale == ((0.5,) * 3, (0.5,) * 3)
    pixels = torch.rand(2, 3, 4, 4)
    theirs = (pixels - 0.5) / 0.5
    ours = (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    torch.testing.assert_close(opened.rescaled(ours), theirs)


def test_misuse(trained: Path, tokens: Path, out: Path, tmp_path: Path, cli) -> None:
    small = "--structure low_rank --rank 2 --calibrate 0 --evaluate 0 --layers blocks.*"
    taken = tmp_path / "taken.safetensors"
    save_model(build_model("cifar-mlp", width=8, depth=1), taken)
    before = taken.read_bytes()
    for line, message in (
        (f"{tmp_path / 'none'} {small} --out {out}", "is missing: a trained model is a folder of `structlin train`"),
        (f"{tmp_path} {small} --out {out}", "holds no trained model"),
        (f"{trained} {small} --out {out.with_suffix('.pt')}", "--out must be a .safetensors file, got 'small.pt'"),
        (f"{trained} {small} --out {taken}", "exists already: add --overwrite"),
        (f"{trained} {small} --out {tmp_path / 'no' / 'x.safetensors'}", "no does not exist"),
        (f"{trained} {small} --device nowhere --out {out}", "--device must be cpu, cuda or cuda:N, got 'nowhere'"),
        (f"{trained} --structure lowrank --out {out}", "unknown structure 'lowrank'"),
        (f"{trained} {small} --mac-fraction 0.5 --out {out}", "got rank, mac_fraction"),
        (f"{trained} {small} --blocks 3 --out {out}", "has no option 'blocks'"),
        (f"{trained} {small} --exclude nothing --out {out}", "no linear layer matches 'nothing'"),
        (f"{trained} {small} --calibrate -1 --out {out}", "--calibrate must be at least 0, got -1"),
        (f"{trained} {small} --average --out {out}", "has no average"),
        (f"{trained} {small} --untie --out {out}", "has no option untie"),
        (f"{trained} {small} --weights {taken} --out {out}", "has no option weights"),
        (f"{trained} {small} --device cuda:99 --out {out}", "does not exist"),
        (f"timm:vit_tiny_patch16_224 {small} --out {out}", "needs weights, a .safetensors file"),
        (f"{taken} --structure low_rank --rank 1 --calibrate 9 --out {out}", "--calibrate needs --data"),
        (f"{taken} --structure low_rank --rank 1 --data {tokens} --data-set cifar10 --out {out}", "cifar"),
        (f"{taken} --structure low_rank --rank 1 --context 3 --data-set fashion --out {out}", "takes images"),
        (f"{taken} --structure low_rank --rank 900 --out {out}", "saves nothing in any layer"),
    ):
        _, text = cli(f"compress {line}", code=2)
        assert message in text, line
        assert text.count("\n") == 1
    assert not out.exists()
    assert taken.read_bytes() == before
