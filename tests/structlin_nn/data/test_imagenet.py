"""Labelled image files: sources, order, augmentation, damage."""

import hashlib
import io
import itertools
import random
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from structlin_nn.data import _cache, epoch_order, image_sources
from structlin_nn.data.image_transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageRecipe,
    TrainingView,
    decode,
    evaluation_view,
)
from structlin_nn.data.imagenet import ImageNetData, open_imagenet
from structlin_nn.data.tokens import IGNORE

PLAIN = ImageRecipe.plain(size=24)


@pytest.fixture
def tree(image_tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image_tree, tmp_path / "tree"))


@pytest.fixture
def shards(image_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image_shards, tmp_path / "shards"))


def digest_of(images: torch.Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def training(data: ImageNetData, epoch: int = 0, **changes: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    settings = {"batch_size": 4, "seed": 3, "recipe": PLAIN, **changes}
    return list(data.train_batches(epoch, **settings))  # type: ignore[arg-type]


def same(a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


class TestOpen:
    def test_tree(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        assert (data.format, data.train_size, data.val_size) == ("folder", 18, 9)
        assert (data.classes, data.num_classes) == (("bag", "boot", "coat"), 3)
        assert data.splits["train"].labels.tolist() == [0] * 5 + [1] * 6 + [2] * 7
        assert data.splits["val"].labels.tolist() == [0] * 2 + [1] * 3 + [2] * 4
        assert data.ignored == []

    def test_shards_hold_the_same_samples(self, image_tree: Path, image_shards: Path) -> None:
        tree, shards = open_imagenet(image_tree), open_imagenet(image_shards)
        assert (shards.format, shards.classes) == ("shards", ("0", "1", "2"))
        for split in ("train", "val"):
            a, b = tree.splits[split], shards.splits[split]
            assert a.labels.tolist() == b.labels.tolist()
            assert [a.read(i) for i in range(len(a.labels))] == [b.read(i) for i in range(len(b.labels))]
        assert "toy-train-0001.tar: " in shards.splits["train"].name(8)

    def test_shards_in_folders(self, image_shards: Path, tmp_path: Path) -> None:
        for split, folder in (("train", "train"), ("val", "validation")):
            (tmp_path / folder).mkdir()
            for number, shard in enumerate(sorted(image_shards.glob(f"*{split}*"))):
                shutil.copy(shard, tmp_path / folder / f"{number}.tar")
        data = open_imagenet(tmp_path)
        assert (data.format, data.train_size, data.val_size) == ("shards", 18, 9)

    def test_shards_of_webdataset(self, tmp_path: Path) -> None:
        webdataset = pytest.importorskip("webdataset")
        for split in ("train", "val"):
            with webdataset.TarWriter(str(tmp_path / f"a-{split}-0.tar")) as writer:
                for number in range(5):
                    writer.write({"__key__": f"{number:04d}", "png": _png(number), "cls": number % 2})
        data = open_imagenet(tmp_path)
        assert (data.train_size, data.num_classes) == (5, 2)
        assert [decode(data.splits["val"].read(i), "x").getpixel((0, 0)) for i in range(5)] == [
            (50 * i, 0, 0) for i in range(5)
        ]

    def test_index_of_many_shards_is_kept(self, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        expected = open_imagenet(shards)
        assert not (tmp_path / "cache").exists()
        monkeypatch.setattr(_cache, "SLOW_SECONDS", -1)
        assert open_imagenet(shards).digest == expected.digest
        kept = sorted((tmp_path / "cache/structlin").iterdir())
        assert len(kept) == 2

        original = image_sources._index_shards
        monkeypatch.setattr(image_sources, "_index_shards", lambda _: pytest.fail("the index was made again"))
        data = open_imagenet(shards)
        assert data.digest == expected.digest
        assert same(training(data), training(expected))
        monkeypatch.setattr(image_sources, "_index_shards", original)

        # A damaged index is made again, and so is that of shards that changed.
        kept[0].write_bytes(b"PK damaged")
        assert open_imagenet(shards).digest == expected.digest
        _write_tar(shards / "toy-val-0001.tar", {"a.png": _png(1), "a.cls": b"1"})
        assert open_imagenet(shards).val_size != expected.val_size
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
        assert open_imagenet(shards).train_size == expected.train_size

    def test_links_are_followed(self, tree: Path, image_tree: Path) -> None:
        shutil.move(tree / "train/bag", tree / "elsewhere")
        (tree / "train/bag").symlink_to(tree / "elsewhere")
        assert open_imagenet(tree).digest == open_imagenet(image_tree).digest

    def test_hugging_face(self, tmp_path: Path, image_tree: Path) -> None:
        datasets = pytest.importorskip("datasets")
        tree = open_imagenet(image_tree)
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(tree.classes))}
        )

        def rows(split: str) -> object:
            part = tree.splits[split]
            content = [{"bytes": part.read(i), "path": None} for i in range(len(part.labels))]
            return datasets.Dataset.from_dict({"image": content, "label": part.labels.tolist()}, features=features)

        datasets.DatasetDict({"train": rows("train"), "validation": rows("val")}).save_to_disk(str(tmp_path / "saved"))
        data = open_imagenet(tmp_path / "saved")
        assert (data.format, data.classes) == ("datasets", tree.classes)
        assert same(training(data), training(tree))
        with pytest.raises(ValueError, match="has the columns image, label, not 'picture'"):
            open_imagenet(tmp_path / "saved", image="picture")
        with pytest.raises(ValueError, match="3 classes, num_classes is 4"):
            open_imagenet(tmp_path / "saved", num_classes=4)
        assert open_imagenet(tmp_path / "saved").digest == data.digest

    def test_hugging_face_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"structlin\[text\]"):
            open_imagenet("somebody/something")

    def test_digest(self, tree: Path, image_tree: Path) -> None:
        before = open_imagenet(image_tree).digest
        assert open_imagenet(tree).digest == before
        shutil.move(tree / "train/bag/0.jpg", tree / "train/boot/00.jpg")
        assert open_imagenet(tree).digest != before

    def test_other_files_are_told(self, tree: Path) -> None:
        (tree / "train/bag/notes.txt").write_text("x")
        data = open_imagenet(tree)
        assert (data.train_size, data.ignored) == (18, [str(tree / "train/bag/notes.txt")])

    def test_num_classes(self, image_tree: Path, image_shards: Path) -> None:
        assert open_imagenet(image_shards, num_classes=10).num_classes == 10
        with pytest.raises(ValueError, match="label 2, outside num_classes 2"):
            open_imagenet(image_shards, num_classes=2)
        with pytest.raises(ValueError, match="has 3 classes, num_classes is 5"):
            open_imagenet(image_tree, num_classes=5)

    def test_bad_arguments(self, tree: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="unknown format 'tar'"):
            open_imagenet(tree, format="tar")
        with pytest.raises(ValueError, match="on_broken must be 'error' or 'skip'"):
            open_imagenet(tree, on_broken="ignore")
        with pytest.raises(FileNotFoundError, match="is no folder"):
            open_imagenet(tmp_path / "nowhere", format="folder")
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="holds no train/ and val/"):
            open_imagenet(tmp_path / "empty")

    def test_damaged_trees(self, tree: Path) -> None:
        (tree / "val/hat").mkdir()
        with pytest.raises(ValueError, match=r"1 classes that .* lacks, the first of them 'hat'"):
            open_imagenet(tree)
        (tree / "val/hat").rmdir()
        (tree / "train/hat").mkdir()
        with pytest.raises(ValueError, match=r"train/hat holds no image"):
            open_imagenet(tree)
        (tree / "train/hat").rmdir()
        for path in (tree / "val").rglob("*.*"):
            shutil.move(path, tree / "val" / f"{path.parent.name}{path.name}")
        for folder in (tree / "val").iterdir():
            if folder.is_dir():
                folder.rmdir()
        with pytest.raises(ValueError, match=r"val holds no folders"):
            open_imagenet(tree)
        shutil.rmtree(tree / "val")
        with pytest.raises(FileNotFoundError, match="lacks the folder val or validation"):
            open_imagenet(tree)

    def test_damaged_shards(self, shards: Path) -> None:
        path = shards / "toy-train-0001.tar"
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2])
        with pytest.raises(ValueError, match=r"toy-train-0001\.tar is (damaged, )?truncated"):
            open_imagenet(shards)
        path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"toy-train-0001\.tar"):
            open_imagenet(shards)
        _write_tar(path, {"a.png": _png(1)})
        with pytest.raises(ValueError, match=r"a lacks a label \(\.cls\)"):
            open_imagenet(shards)
        _write_tar(path, {"a.cls": b"1"})
        with pytest.raises(ValueError, match="a lacks an image"):
            open_imagenet(shards)
        _write_tar(path, {"a.png": _png(1), "a.cls": b"cat"})
        with pytest.raises(ValueError, match=r"a\.cls must hold the number of a class, got 'cat'"):
            open_imagenet(shards)
        _write_tar(path, {"a.png": _png(1), "a.jpg": _png(1), "a.cls": b"1"})
        with pytest.raises(ValueError, match="two images of one sample"):
            open_imagenet(shards)
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("a"))
        with pytest.raises(ValueError, match="compressed"):
            open_imagenet(shards)


class TestTraining:
    def test_order_and_shapes(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        batches = training(data)
        assert len(batches) == data.train_steps(4) == 4
        order = epoch_order(3, 0, 18)[:16]
        assert torch.cat([labels for _, labels in batches]).tolist() == data.splits["train"].labels[order].tolist()
        for images, labels in batches:
            assert (images.shape, images.dtype, labels.dtype) == ((4, 3, 24, 24), torch.float32, torch.int64)

    def test_whole_crop_is_the_resized_image(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        recipe = ImageRecipe.plain(
            size=24, crop_scale=(1.0, 1.0), crop_ratio=(0.1, 10.0), flip=0.0, interpolation="bilinear"
        )
        # Of the square images, a crop of the whole area with another ratio never fits: it is the whole image.
        images, _ = training(data, recipe=recipe, batch_size=18)[0]
        checked = 0
        for place, index in enumerate(epoch_order(3, 0, 18)):
            image = decode(data.splits["train"].read(int(index)), "x")
            if image.width != image.height:
                continue
            pixels = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR), np.float64) / 255
            expected = (pixels - IMAGENET_MEAN) / IMAGENET_STD
            np.testing.assert_allclose(images[place].permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-5)
            checked += 1
        assert checked > 3

    def test_flip(self) -> None:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
        settings = {"size": 9, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
        plain = TrainingView(ImageRecipe.plain(**settings, flip=0.0))(image, (0,))  # type: ignore[arg-type]
        flipped = TrainingView(ImageRecipe.plain(**settings, flip=1.0))(image, (0,))  # type: ignore[arg-type]
        assert torch.equal(flipped, plain.flip(2))
        half = [TrainingView(ImageRecipe.plain(**settings))(image, (seed,)) for seed in range(40)]  # type: ignore[arg-type]
        assert 8 < sum(torch.equal(view, flipped) for view in half) < 32

    def test_seed_epoch_and_sample_decide(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        first = training(data)
        assert same(first, training(data))
        assert not same(first, training(data, epoch=1))
        assert not same(first, training(data, seed=4))

    def test_resume_within_an_epoch(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        assert same(training(data)[3:], training(data, start_batch=3))
        assert training(data, start_batch=4) == []
        with pytest.raises(ValueError, match="start_batch 5 is outside an epoch of 4 batches"):
            training(data, start_batch=5)

    def test_processes_share_batches(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        parts = [training(data, rank=rank, world_size=2) for rank in range(2)]
        merged = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in zip(parts[0], parts[1], strict=True)]
        assert same(merged, training(data))

    def test_workers_change_nothing(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        assert same(training(data, workers=2), training(data))

    def test_global_generators_are_left_alone(self, image_tree: Path) -> None:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        expected = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        training(open_imagenet(image_tree))
        assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002

    def test_bad_arguments(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        for changes, message in (
            ({"batch_size": 19}, "18 images are less than one batch of 19"),
            ({"world_size": 3}, "batch_size 4 .* cannot be shared equally by 3"),
            ({"workers": -1}, "workers must not be negative"),
            ({"seed": -1}, "seed must not be negative"),
        ):
            with pytest.raises(ValueError, match=message):
                training(data, **changes)
        with pytest.raises(TypeError, match="recipe must be an ImageRecipe"):
            training(data, recipe="rand")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"crop_scale": (0.0, 1.0)}, "crop_scale must be"),
            ({"interpolation": "nearest"}, "interpolation must be random, bilinear or bicubic"),
            ({"random_erasing": 1.5}, "random_erasing must be from 0 to 1"),
            ({"mixup": -1.0}, "mixup must be finite"),
            ({"size": 0}, "size must be at least 1"),
        ],
    )
    def test_bad_recipes(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ImageRecipe(**changes)  # type: ignore[arg-type]

    def test_mix(self) -> None:
        recipe = ImageRecipe(mixup=0.2, smoothing=0.1)
        images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])
        mixed, targets = recipe.mix(images, labels, 3, (0, 0, 1))
        weight = ((mixed - images.flip(0)) / (images - images.flip(0))).median().item()
        one_hot = 0.9 * torch.eye(3)[labels] + 0.1 / 3
        torch.testing.assert_close(targets, weight * one_hot + (1 - weight) * one_hot.flip(0), atol=1e-5, rtol=0)
        assert torch.equal(recipe.mix(images, labels, 3, (0, 0, 1))[0], mixed)
        assert not torch.equal(recipe.mix(images, labels, 3, (0, 0, 2))[0], mixed)
        assert torch.equal(ImageRecipe.plain().mix(images, labels, 3, (0,))[1], torch.eye(3)[labels])


class TestEvaluation:
    def test_view(self) -> None:
        # 60 x 40, shortest side to floor(28 / 0.875) = 32: 48 x 32; the centre 28 x 28 starts at (10, 2).
        pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        resized = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC), np.float64) / 255
        expected = (resized[2:30, 10:38] - IMAGENET_MEAN) / IMAGENET_STD
        np.testing.assert_allclose(evaluation_view(image, 28).permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_every_image_once(self, image_tree: Path, workers: int) -> None:
        data = open_imagenet(image_tree)
        batches = list(data.val_batches(4, size=28, workers=workers))
        assert [len(labels) for _, labels in batches] == [4, 4, 1]
        assert torch.cat([labels for _, labels in batches]).tolist() == data.splits["val"].labels.tolist()
        views = torch.cat([images for images, _ in batches])
        for index, view in enumerate(views):
            assert torch.equal(view, evaluation_view(decode(data.splits["val"].read(index), "x"), 28))

    def test_processes_get_equal_shapes(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        parts = [list(data.val_batches(4, rank=rank, world_size=2, size=28)) for rank in range(2)]
        whole = list(data.val_batches(4, size=28))
        for a, b, (images, labels) in zip(*parts, whole, strict=True):
            assert a[0].shape == b[0].shape
            together, truth = torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])
            assert torch.equal(truth[truth != IGNORE], labels)
            assert torch.equal(together[truth != IGNORE], images)
            assert not together[truth == IGNORE].any()
        assert (torch.cat([y for part in parts for _, y in part]) == IGNORE).sum() == 1

    def test_bad_crop(self, image_tree: Path) -> None:
        with pytest.raises(ValueError, match="crop must be above 0 and at most 1"):
            next(open_imagenet(image_tree).val_batches(1, crop=1.5))


class TestBroken:
    @pytest.fixture
    def broken(self, tree: Path) -> Path:
        path = tree / "train/boot/2.jpg"
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2])
        (tree / "val/bag/0.jpg").write_bytes(b"not an image")
        return tree

    @pytest.mark.parametrize("workers", [0, 1])
    def test_error_names_the_file(self, broken: Path, workers: int) -> None:
        data = open_imagenet(broken)
        with pytest.raises(ValueError, match=r"boot/2\.jpg \(\d+ bytes\) is a broken image"):
            training(data, workers=workers)
        with pytest.raises(ValueError, match=r"bag/0\.jpg \(12 bytes\) is a broken image"):
            list(data.val_batches(3, size=8, workers=workers))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_skip_counts_and_tells(self, broken: Path, workers: int) -> None:
        data = open_imagenet(broken, on_broken="skip")
        with pytest.warns(UserWarning, match=r"skipped: .*boot/2\.jpg") as caught:
            batches = training(data, batch_size=6, workers=workers)
        assert sum("skipped" in str(warning.message) for warning in caught) == 1
        assert sum(len(labels) for _, labels in batches) == 17
        with pytest.warns(UserWarning, match=r"skipped: .*bag/0\.jpg"):
            assert sum(len(labels) for _, labels in data.val_batches(3, size=8)) == 8
        assert sorted(Path(name).name for name in data.broken) == ["0.jpg", "2.jpg"]

    def test_nothing_left(self, broken: Path) -> None:
        data = open_imagenet(broken, on_broken="skip")
        with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="all 1 images of a batch"):
            next(data.val_batches(1, size=8))

    def test_shard_that_shrank(self, shards: Path) -> None:
        data = open_imagenet(shards)
        path = shards / "toy-val-0000.tar"
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(ValueError, match=r"toy-val-0000\.tar: .* is truncated"):
            list(data.val_batches(3, size=8))


class TestTimm:
    @pytest.fixture(autouse=True)
    def needs_timm(self) -> None:
        pytest.importorskip("torchvision")
        pytest.importorskip("timm")

    def test_recipe_of_the_paper(self, image_tree: Path) -> None:
        data = open_imagenet(image_tree)
        first = training(data, recipe=ImageRecipe(size=32), workers=2)
        assert first[0][0].shape == (4, 3, 32, 32)
        assert same(first, training(data, recipe=ImageRecipe(size=32)))
        assert not same(first, training(data, recipe=ImageRecipe(size=32, rand_augment=None, color_jitter=0)))

    def test_generators_are_left_alone(self) -> None:
        view = TrainingView(ImageRecipe(size=16, random_erasing=1.0))
        image = Image.linear_gradient("L").convert("RGB")
        before = random.getstate(), torch.get_rng_state()
        view(image, (0,))
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])

    def test_erasing_erases(self) -> None:
        image = Image.new("RGB", (40, 40), (255, 0, 0))
        views = [TrainingView(ImageRecipe.plain(size=32, random_erasing=p))(image, (5,)) for p in (0.0, 1.0)]
        changed = (views[0] != views[1]).any(0).float().mean()
        assert 0.01 < changed < 0.4

    def test_jitter_as_in_timm(self) -> None:
        """timm leaves colour jitter out where there is rand-augment, unless it is forced."""
        counts = [
            len(TrainingView(ImageRecipe(rand_augment=ra, color_jitter=j, force_color_jitter=f)).changes)
            for ra, j, f in itertools.product((None, "rand-m9"), (0.0, 0.4), (False, True))
        ]
        assert counts == [0, 0, 1, 1, 1, 1, 1, 2]

    def test_evaluation_view_is_that_of_timm(self) -> None:
        from timm.data import create_transform

        pixels = np.random.default_rng(0).integers(0, 256, (333, 250, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        transform = create_transform(224, is_training=False, interpolation="bicubic", crop_pct=0.875)
        torch.testing.assert_close(evaluation_view(image), transform(image), rtol=0, atol=1e-5)

    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "timm.data.auto_augment", None)
        with pytest.raises(ImportError, match=r"rand-augment needs timm and torchvision: .*structlin\[vision\]"):
            TrainingView(ImageRecipe())


def _png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (50 * number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def _write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, raw in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
