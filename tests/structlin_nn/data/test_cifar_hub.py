"""CIFAR from Hugging Face datasets, and its download."""

import dataclasses
import hashlib
import io
import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from structlin_nn.cli import main
from structlin_nn.data import cifar, cifar_hub, load_images
from structlin_nn.data.cifar_hub import download_cifar, load_cifar_hub


def official(layout: Any, form: Any) -> Any:
    """The form of the official files, with the sizes and sums of synthetic ones."""
    files = tuple(
        dataclasses.replace(
            file,
            size=len(layout.files[file.name]),
            md5=hashlib.md5(layout.files[file.name], usedforsecurity=False).hexdigest(),
        )
        for file in form.files
    )
    return dataclasses.replace(form, files=files)


class TestHub:
    @pytest.fixture(autouse=True)
    def datasets(self) -> Any:
        return pytest.importorskip("datasets")

    @pytest.fixture(params=["cifar10", "cifar100"])
    def layout(self, request: pytest.FixtureRequest, layouts: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
        layout = layouts(request.param, "binary", images=4)
        if layout.dataset == "cifar10":
            # As the official ones, all training files have the same number of images.
            names = [name for name in layout.files if name.startswith("data")]
            for name in names:
                layout.files[name] = layout.files[name][: 4 * 3073]
            count = [0, 4, 9, 15, 22]
            keep = np.concatenate([np.arange(first, first + 4) for first in count])
            layout = dataclasses.replace(
                layout,
                train_images=layout.train_images[keep],
                train_labels={kind: values[keep] for kind, values in layout.train_labels.items()},
            )
        form = official(layout, cifar.BINARY_FORMS[layout.dataset])
        monkeypatch.setitem(cifar.BINARY_FORMS, layout.dataset, form)
        return layout

    def save(self, datasets: Any, layout: Any, folder: Path, order: np.ndarray | None = None, **changes: Any) -> Path:
        columns = {"labels": "label", "fine_labels": "fine_label", "coarse_labels": "coarse_label"}

        def rows(images: np.ndarray, labels: dict[str, np.ndarray], order: np.ndarray) -> Any:
            content: dict[str, Any] = {"img": [_png(images[place]) for place in order]}
            content |= {columns[kind]: values[order].tolist() for kind, values in labels.items()}
            return datasets.Dataset.from_dict(content | changes).cast_column("img", datasets.Image())

        train = np.arange(len(layout.train_images)) if order is None else order
        parts = {
            "train": rows(layout.train_images, layout.train_labels, train),
            "test": rows(layout.test_images, layout.test_labels, np.arange(len(layout.test_images))),
        }
        datasets.DatasetDict(parts).save_to_disk(str(folder))
        return folder

    def test_arrays_are_those_of_the_files(self, datasets: Any, layout: Any, tmp_path: Path) -> None:
        place = self.save(datasets, layout, tmp_path / "saved")
        kinds = {"cifar10": {"fine": "labels"}, "cifar100": {"fine": "fine_labels", "coarse": "coarse_labels"}}
        for labels, kind in kinds[layout.dataset].items():
            given = {} if layout.dataset == "cifar10" else {"labels": labels}
            for root in (place, f"hf:{place}"):
                data = load_images(layout.dataset, root, **given)
                np.testing.assert_array_equal(data.train_images, layout.train_images)
                np.testing.assert_array_equal(data.test_images, layout.test_images)
                np.testing.assert_array_equal(data.train_labels, layout.train_labels[kind])
                np.testing.assert_array_equal(data.test_labels, layout.test_labels[kind])
                assert data.source.endswith("(md5 sums verified)")

    def test_files_in_another_order(self, datasets: Any, layout: Any, tmp_path: Path) -> None:
        if layout.dataset == "cifar100":
            pytest.skip("one training file")
        order = np.arange(20).reshape(5, 4)[[3, 2, 1, 4, 0]].ravel()
        data = load_cifar_hub("cifar10", self.save(datasets, layout, tmp_path / "saved", order))
        np.testing.assert_array_equal(data.train_images, layout.train_images)

    def test_other_content(self, datasets: Any, layout: Any, tmp_path: Path) -> None:
        order = np.arange(len(layout.train_images))
        order[[0, 1]] = order[[1, 0]]
        place = self.save(datasets, layout, tmp_path / "swapped", order)
        with pytest.raises(ValueError, match=r"images 0 to 3 are those of no official file.*verify=False"):
            load_cifar_hub(layout.dataset, place)
        data = load_cifar_hub(layout.dataset, place, verify=False)
        np.testing.assert_array_equal(data.train_images, layout.train_images[order])
        short = self.save(datasets, layout, tmp_path / "short", np.arange(4))
        if layout.dataset == "cifar10":
            with pytest.raises(ValueError, match="has 4 images, the official files have 20"):
                load_cifar_hub(layout.dataset, short)

    def test_missing(self, datasets: Any, layout: Any, tmp_path: Path) -> None:
        place = self.save(datasets, layout, tmp_path / "saved")
        other = "cifar100" if layout.dataset == "cifar10" else "cifar10"
        with pytest.raises(ValueError, match=r"has the columns .*, not"):
            load_cifar_hub(other, place, verify=False)
        datasets.load_from_disk(str(place))["train"].save_to_disk(str(tmp_path / "one"))
        with pytest.raises(ValueError, match="is one split"):
            load_cifar_hub(layout.dataset, tmp_path / "one")
        with pytest.raises(FileNotFoundError, match="cannot load no/such/data"):
            load_images(layout.dataset, "hf:no/such/data")

    def test_size_and_labels(self, datasets: Any, tmp_path: Path) -> None:
        for size, label, message in ((31, 3, "31 x 31 pixels, not 32 x 32"), (32, 10, "has label 10, outside 0 to 9")):
            rows = datasets.Dataset.from_dict(
                {"img": [_png(np.zeros((3, size, size), np.uint8))], "label": [label]}
            ).cast_column("img", datasets.Image())
            folder = tmp_path / f"{size}"
            datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(folder))
            with pytest.raises(ValueError, match=message):
                load_cifar_hub("cifar10", folder, verify=False)

    @pytest.mark.slow
    def test_real_cifar10(self, datasets: Any, tmp_path: Path) -> None:
        root = os.environ.get("STRUCTLIN_CIFAR10")
        if not root:
            pytest.skip("needs STRUCTLIN_CIFAR10")
        expected = load_images("cifar10", root)
        layout = type("", (), {})()
        layout.train_images, layout.test_images = expected.train_images, expected.test_images
        layout.train_labels, layout.test_labels = {"labels": expected.train_labels}, {"labels": expected.test_labels}
        # The order of the files in the official archive, which the data set on the hub has too.
        order = np.arange(50000).reshape(5, 10000)[[3, 2, 1, 4, 0]].ravel()
        data = load_images("cifar10", self.save(datasets, layout, tmp_path / "saved", order))
        np.testing.assert_array_equal(data.train_images, expected.train_images)
        np.testing.assert_array_equal(data.train_labels, expected.train_labels)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        raw = source.read()
        outputfile.write(raw[:-5] if "broken" in self.path else raw)


class TestDownload:
    @pytest.fixture
    def served(self, layouts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """Address of a server with the archive as it is, cut off, and with another content."""
        layout = layouts("cifar10", "binary")
        for name in ("whole", "broken", "other"):
            (tmp_path / name).mkdir()
            archive = layout.write_archive(tmp_path / name)
        raw = archive.read_bytes()
        for name in ("whole", "broken"):
            (tmp_path / name / archive.name).write_bytes(raw)
        (tmp_path / "other" / archive.name).write_bytes(raw[:-1] + b"x")
        md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        monkeypatch.setitem(
            cifar.BINARY_FORMS, "cifar10", dataclasses.replace(cifar.BINARY_FORMS["cifar10"], archive_md5=md5)
        )
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        server.server_close()

    def test_whole(self, served: str, tmp_path: Path) -> None:
        calls: list[tuple[int, int]] = []
        path = download_cifar("cifar10", tmp_path / "out", url=f"{served}/whole", advance=lambda *n: calls.append(n))
        size = path.stat().st_size
        assert calls[-1] == (size, size)
        assert load_images("cifar10", tmp_path / "out", verify=False).num_classes == 10
        # What is there is verified, and not downloaded again.
        assert download_cifar("cifar10", tmp_path / "out", url="http://127.0.0.1:1") == path
        path.write_bytes(b"changed")
        with pytest.raises(ValueError, match="it is damaged"):
            download_cifar("cifar10", tmp_path / "out", url=f"{served}/whole")

    @pytest.mark.parametrize(
        ("kind", "error", "message"),
        [
            ("broken", ConnectionError, r"broke off after \d+ of \d+ bytes"),
            ("other", ValueError, "the official archive has"),
            ("nothing", ConnectionError, "404"),
        ],
    )
    def test_damage_leaves_nothing(
        self, served: str, tmp_path: Path, kind: str, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            download_cifar("cifar10", tmp_path / "out", url=f"{served}/{kind}")
        assert list((tmp_path / "out").iterdir()) == []

    def test_offline(self, tmp_path: Path) -> None:
        with pytest.raises(ConnectionError, match=r"cannot be downloaded .* by other means"):
            download_cifar("cifar10", tmp_path, url="http://127.0.0.1:1/")
        with pytest.raises(ValueError, match="unknown data set 'mnist'"):
            download_cifar("mnist", tmp_path)

    def test_official_address(self) -> None:
        assert re.fullmatch(r"https://www\.cs\.toronto\.edu/~kriz/", cifar_hub.URL)

    def test_command(
        self, served: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["prepare", "cifar10", "--out", "data", "--url", f"{served}/whole"]) == 0
        out, err = capsys.readouterr()
        assert "md5 sum verified; train with --data data" in out
        assert "100%" in err
        assert main(["prepare", "cifar10", "--out", "offline", "--url", "http://127.0.0.1:1"]) == 1
        assert "cannot be downloaded" in capsys.readouterr().err
        assert main(["prepare", "cifar10", "--out", "bad", "--url", f"{served}/other"]) == 2
        assert main(["prepare", "cifar10", "x", "--out", "data"]) == 2
        assert main(["prepare", "text", "--pydoc", "--out", "data", "--url", "x"]) == 2
        assert "--url is an option of cifar10 and cifar100, not of text" in capsys.readouterr().err


def _png(image: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}
