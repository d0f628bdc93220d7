"""Input pipelines: images per second for ImageNet compared with timm's loader, and CIFAR's augmentation with kornia's.

    python benchmarks/input.py --out input

Images are those of an image tree (``--images``), or JPEG files of smooth noise with ImageNet's mean size (500 x 375),
which decode about as fast as photographs. Both loaders decode with Pillow, apply the transforms of the recipe, and
stack uint8 batches, in one process without workers (``--workers`` adds some). The result is the number of images per
second and core. timm's loader is ``timm.data.create_loader`` with its fast collation. Both are timed in turn, within
one run. kornia is optional.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _measure import machine, ratio, result_path, timings, write_result
from PIL import Image

from structlin_nn.data.augment import Augmentation
from structlin_nn.data.imagenet import ImageRecipe, open_imagenet


def make_tree(root: Path, number: int) -> Path:
    """Write an image tree of smooth noise, in ten classes."""
    rng = np.random.default_rng(0)
    for index in range(number):
        for split in ("train", "val") if index < 10 else ("train",):
            folder = root / split / str(index % 10)
            folder.mkdir(parents=True, exist_ok=True)
            layers = [
                np.asarray(
                    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize(
                        (500, 375), Image.Resampling.BICUBIC
                    ),
                    np.float32,
                )
                for side in (4, 16, 64, 200)
            ]
            file = io.BytesIO()
            Image.fromarray((sum(layers) / 4).astype(np.uint8)).save(file, "JPEG", quality=92)
            (folder / f"{index}.jpg").write_bytes(file.getvalue())
    return root


def images_a_second(tree: Path, workers: int, rounds: int, batch: int) -> dict[str, Any]:
    """Return the images per second of our loader and of timm's, timed in turn; a round has several batches."""
    from timm.data import create_dataset, create_loader

    recipe = ImageRecipe()
    ours = open_imagenet(tree).train_batches(batch_size=batch, seed=0, recipe=recipe, workers=workers)

    def endless() -> Any:
        dataset = create_dataset("", str(tree / "train"))
        loader = create_loader(
            dataset,
            (3, recipe.size, recipe.size),
            batch,
            is_training=True,
            auto_augment=recipe.rand_augment,
            interpolation="random",
            num_workers=workers,
            use_prefetcher=True,
            device=torch.device("cpu"),
            persistent_workers=workers > 0,
        )
        while True:
            yield from loader.loader  # uint8 images and labels, without the part on the device

    timms = endless()
    for operation in (
        ImageRecipe().transform().transforms[2].ops
    ):  # timm fails at posterize(0) with Pillow 13, so replace its function too
        if operation.name.startswith("Posterize"):
            import timm.data.auto_augment as auto

            auto.NAME_TO_OP[operation.name] = operation.aug_fn
    found: dict[str, list[float]] = {"ours": [], "timm": []}
    for number in range(rounds + 1):
        for name, batches in (("ours", ours), ("timm", timms)):
            # CPU time, which other processes do not affect. It does not include the time of workers.
            clock = time.perf_counter if workers else time.process_time
            start = clock()
            for _ in range(4):
                next(batches)
            if number:
                found[name].append(4 * batch / (clock() - start))
    rates = {name: median(values) for name, values in found.items()}
    return {
        "images_a_second": rates,
        "ratio": ratio(found["ours"], found["timm"]),
        "rounds": found,
        "workers": workers,
        "clock": "wall" if workers else "cpu",
    }


def cifar_step(batch: int, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of the augmentation of a batch: ours, and crop, flip and normalisation by kornia."""
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (batch,))
    mean, std = (0.5,) * 3, (0.25,) * 3
    ours, generator = Augmentation(mean, std, 10), torch.Generator().manual_seed(0)
    functions = {"ours": lambda: ours(images, labels, generator)}
    try:
        from kornia import augmentation as kornia
    except ImportError:
        pass
    else:
        theirs = kornia.AugmentationSequential(
            kornia.RandomResizedCrop((32, 32), (0.08, 1.0), (3 / 4, 4 / 3), cropping_mode="resample"),
            kornia.RandomHorizontalFlip(),
            kornia.Normalize(mean, std),
        )
        functions["kornia"] = lambda: theirs(images.float() / 255)
    times = timings(list(functions.values()), rounds, clock="cpu")
    return {name: 1e3 * median(seconds) for name, seconds in zip(functions, times, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, metavar="TREE", help="with train/CLASS and val/CLASS")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", metavar="NAME", help="the JSON file to write, or its name in results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tree = arguments.images or make_tree(Path(folder), 256)
        imagenet = images_a_second(tree, arguments.workers, arguments.rounds, arguments.batch)
    cifar = cifar_step(1024, arguments.rounds)
    rates = imagenet["images_a_second"]
    print(f"ImageNet: {rates['ours']:.1f} images a second, timm {rates['timm']:.1f}: ratio {imagenet['ratio']:.3f}")
    print("CIFAR, 1024 images: " + ", ".join(f"{name} {value:.2f} ms" for name, value in cifar.items()))
    if arguments.out:
        write_result(result_path(arguments.out), {"machine": machine("cpu"), "imagenet": imagenet, "cifar_ms": cifar})


if __name__ == "__main__":
    main()
