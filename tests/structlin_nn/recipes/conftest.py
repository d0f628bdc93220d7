"""Small real data: images in CIFAR's own format and as a tree, and a text, so that runs take a second."""

import json
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from structlin_nn.data import load_images
from structlin_nn.recipes import cifar, gpt2, imagenet


@pytest.fixture(scope="session")
def text_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes of a text that every Python installation has, as token files: 60,000 to train on, 401 to evaluate."""
    folder = tmp_path_factory.mktemp("tokens")
    raw = np.frombuffer(Path(pydoc_data.topics.__file__).read_bytes()[:60401], dtype=np.uint8).astype("<u2")
    raw[:60000].tofile(folder / "train.bin")
    raw[60000:].tofile(folder / "val.bin")
    (folder / "meta.json").write_text(
        json.dumps({"version": 1, "vocab_size": 256, "name": "topics", "tokenizer": "bytes"})
    )
    return folder


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image tree of three classes of the embedded images: 96 to train on, 21 to evaluate."""
    data = load_images("fashion")
    folder = tmp_path_factory.mktemp("tree")
    for split, images, labels, number in (
        ("train", data.train_images, data.train_labels, 32),
        ("val", data.test_images, data.test_labels, 7),
    ):
        for label, name in ((1, "trousers"), (8, "bag"), (9, "boot")):
            place = folder / split / name
            place.mkdir(parents=True)
            for count, image in enumerate(images[labels == label][:number]):
                Image.fromarray(image[0]).save(place / f"{count}.png")
    return folder


@pytest.fixture(scope="session")
def gpt2_config() -> gpt2.Config:
    """Ten steps with everything on."""
    return gpt2.Config(
        width=32, base_width=32, depth=1, heads=2, context=16, batch_size=16, steps=10, warmup_steps=3, lr=3e-3,
        structure="block_tensor_train", options={"rank": 2}, rms_cap=True, optimizer="adamw", weight_decay=0.1,
        clip=0.5, ema=0.9, accumulate=2, eval_every=5, eval_sequences=24, whole_validation=True,
        final_lr=0.0, betas=(0.9, 0.999), threads=1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def imagenet_config() -> imagenet.Config:
    """Six steps in an epoch; crops, flips, mixup."""
    return imagenet.Config(
        width=32, base_width=32, depth=2, heads=2, patch=8, image_size=32, batch_size=16, epochs=2, lr=3e-3,
        structure="monarch", augment="", erasing=0.0, color_jitter=0.0, workers=0, threads=1, eval_every=1,
        warmup_epochs=0.0, optimizer="adam", weight_decay=0.0, betas=(0.9, 0.999), clip=0.0,
    )  # fmt: skip


@pytest.fixture(scope="session")
def config() -> cifar.Config:
    """Seven steps in an epoch; everything that draws random numbers is on."""
    return cifar.Config(
        data_set="cifar10", width=24, structure="block_tensor_train", epochs=3, batch_size=32, eval_every=2, threads=1
    )
