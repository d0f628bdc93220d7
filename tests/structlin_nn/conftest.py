"""Small image trees and shards of real images (the embedded ones, in colour and of several sizes); run records."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from structlin import execution
from structlin_nn.cli import main
from structlin_nn.data import load_images
from structlin_nn.records import RecordWriter

CLASSES = ("bag", "boot", "coat")
SIZES = ((60, 40), (40, 52), (48, 48))


def pictures() -> dict[str, list[tuple[str, int, Image.Image]]]:
    """(path in its split, label, image): 5, 6 and 7 training images of three classes, and 2, 3, 4 to validate."""
    data = load_images("fashion")
    found: dict[str, list[tuple[str, int, Image.Image]]] = {"train": [], "val": []}
    for split, images, labels, least in (
        ("train", data.train_images, data.train_labels, 5),
        ("val", data.test_images, data.test_labels, 2),
    ):
        for label, (name, original) in enumerate(zip(CLASSES, (8, 9, 4), strict=True)):
            for number, index in enumerate(np.flatnonzero(labels == original)[: least + label]):
                grey = images[index, 0]
                colour = np.stack([grey, 255 - grey, np.roll(grey, 5, 1)], axis=-1)
                image = Image.fromarray(colour).resize(SIZES[number % 3], Image.Resampling.BICUBIC)
                found[split].append((f"{name}/{number}.{'png' if number % 2 else 'jpg'}", label, image))
    return found


def encoded(path: str, image: Image.Image) -> bytes:
    file = io.BytesIO()
    if path.endswith("jpg"):
        image.save(file, "JPEG", quality=95)
    else:
        image.save(file, "PNG")
    return file.getvalue()


def write_tree(root: Path) -> Path:
    for split, samples in pictures().items():
        for path, _, image in samples:
            place = root / split / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(encoded(path, image))
    return root


def write_shards(root: Path, per_shard: int = 7) -> Path:
    """The same samples in the same order, as PNG files in shards."""
    root.mkdir(parents=True, exist_ok=True)
    for split, samples in pictures().items():
        for number in range(0, len(samples), per_shard):
            with tarfile.open(root / f"toy-{split}-{number // per_shard:04d}.tar", "w") as archive:
                for path, label, image in samples[number : number + per_shard]:
                    key = path.rpartition(".")[0]
                    for name, raw in ((f"{key}.cls", str(label).encode()), (f"{key}.png", encoded("png", image))):
                        member = tarfile.TarInfo(name)
                        member.size = len(raw)
                        archive.addfile(member, io.BytesIO(raw))
    return root


@pytest.fixture(autouse=True, scope="module")
def one_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ways to run products are not compared, which takes most of the time of small models. Layers and recipes take the
    way that is estimated to be the fastest, other tests take one way, and so do the processes that a test starts.
    """
    policy = "estimate" if request.path.parent.name in ("torch", "flax", "recipes") else "products"
    with pytest.MonkeyPatch.context() as patch, execution.using(policy):
        patch.setenv("STRUCTLIN_EXECUTION", policy)
        yield


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with the classes bag, boot and coat: 18 and 9 images. Not to be changed: copy it."""
    return write_tree(tmp_path_factory.mktemp("images") / "tree")


@pytest.fixture(scope="session")
def image_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples of `image_tree` in the same order, as shards. Not to be changed: copy it."""
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


@pytest.fixture(scope="session")
def small_cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded images in CIFAR's own format: 240 to train on and 60 to test, to be read without verification."""
    data = load_images("fashion").as_32x32_rgb()
    folder = tmp_path_factory.mktemp("data") / "cifar-10-batches-bin"
    folder.mkdir()

    def write(name: str, images: np.ndarray, labels: np.ndarray) -> None:
        rows = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(len(images), -1)], axis=1)
        (folder / name).write_bytes(rows.tobytes())

    for number in range(5):
        part = slice(48 * number, 48 * number + 48)
        write(f"data_batch_{number + 1}.bin", data.train_images[part], data.train_labels[part])
    write("test_batch.bin", data.test_images[:60], data.test_labels[:60])
    return folder


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes the record of a run that never was: structure, width, what it cost and how its error fell."""

    def write(
        structure: str = "dense", width: int = 64, *, errors: Sequence[float] = (0.9, 0.5), macs: int = 1000,
        steps: int = 10, last_step: int | None = None, statistics: Any = None, **config: Any,
    ) -> Path:  # fmt: skip
        """Evaluations at equal distances from step 0 to the last; `macs` are those of the whole run."""
        path = tmp_path / f"run{len(list(tmp_path.glob('*.jsonl')))}.jsonl"
        counts = {"params": 10 * width, "forward_macs": macs // 30, "training_macs": macs // 10, "steps": steps}
        header = {key: {} for key in ("data", "versions", "hardware")} | {
            "started": "", "task": "cifar", "seed": 0, "structures": [], "counts": counts,
            "config": {"structure": structure, "width": width, "options": {}, "lr": 1e-3, **config},
        }  # fmt: skip
        writer = RecordWriter.create(path, header)
        reached = steps if last_step is None else last_step
        for number, error in enumerate(errors):
            share = number / max(len(errors) - 1, 1)
            line = {"step": round(share * reached), "training_macs": round(share * macs), "lr": 1e-3, "seconds": share}
            values = {f"{kind}_{name}": error for kind in ("train", "test", "batch") for name in ("loss", "error")}
            writer.append({"epoch": number, "samples": number, "statistics": statistics} | line | values)
        return path

    return write


@pytest.fixture(scope="session")
def gpt2_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """merges.txt and vocab.json of GPT-2's form and size, with pairs and fours of bytes for its words."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    singles = [chr(byte) for byte in visible] + [chr(256 + n) for n in range(256 - len(visible))]
    letters = "etaoinshrdlu"
    pairs = [(a, b) for a in letters for b in letters]
    pairs += [(a + b, c + d) for a, b in pairs[:40] for c, d in pairs[:40]]
    pairs += [(a, b) for a in singles for b in singles if not (a in letters and b in letters)]
    pairs = pairs[:50000]
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs), encoding="utf-8", newline=""
    )
    words = [*singles, *(a + b for a, b in pairs), "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    assert len(vocabulary) == 50257
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return folder


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a line of the command ``structlin`` and further words: what it prints, if it ends with the code."""

    def run(line: str, *more: object, code: int = 0) -> Any:
        capsys.readouterr()
        found = main([*line.split(), *map(str, more)])
        printed = capsys.readouterr()
        assert found == code, printed.err
        return printed

    return run


@pytest.fixture
def misuse(cli: Callable[..., Any]) -> Callable[..., str]:
    """Run a wrong line: the one line that it prints on stderr, and nothing on stdout."""

    def run(line: str, *more: object) -> str:
        out, err = cli(line, *more, code=2)
        assert (out, err.count("\n")) == ("", 1), err
        return err

    return run


@pytest.fixture
def full_disk() -> Callable[[int], Any]:
    """A context with a maximum size of files: writing more bytes fails, as on a full disk."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
