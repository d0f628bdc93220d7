"""CIFAR from every official form, damaged and hostile files, the download."""

import hashlib
import io
import os
import pickle
import re
import resource
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from structlin_nn.cli import main
from structlin_nn.data import ImageDataset, cifar, load_images

FORMS = [(name, number) for name in ("cifar10", "cifar100") for number in (0, 1)]


def check(data: ImageDataset, layout: Any, kind: str) -> None:
    test = len(data.test_labels)
    np.testing.assert_array_equal(np.concatenate([data.train_images, data.test_images]), layout.images)
    np.testing.assert_array_equal(np.concatenate([data.train_labels, data.test_labels]), layout.labels[kind])
    assert test == 3


def sign(monkeypatch: pytest.MonkeyPatch, layout: Any, name: str, number: int, archive: Path) -> None:
    """Let the sum of an archive be the published one."""
    md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    forms = list(cifar._FORMS[name])
    forms[number] = layout.form._replace(md5=md5)
    monkeypatch.setitem(cifar._FORMS, name, tuple(forms))


@pytest.mark.parametrize(("name", "number"), FORMS)
def test_every_form_at_every_place(tmp_path, layouts, name, number):
    layout = layouts(name, number)
    folder = layout.folder(tmp_path)
    for root in (folder, tmp_path):
        data = load_images(name, root)
        check(data, layout, layout.form.kinds[-1])
        assert (data.name, data.source) == (name, f"{folder} (md5 sums verified)")
        assert data.num_classes == {"cifar10": 10, "cifar100": 100}[name]


def test_root_by_environment(tmp_path, layouts, monkeypatch):
    layouts("cifar10", 0).folder(tmp_path)
    monkeypatch.setenv("STRUCTLIN_CIFAR10", str(tmp_path))
    assert load_images("cifar10").name == "cifar10"
    monkeypatch.delenv("STRUCTLIN_CIFAR10")
    with pytest.raises(FileNotFoundError, match="STRUCTLIN_CIFAR10"):
        load_images("cifar10")


def test_other_binary_data_are_read_where_nothing_is_verified(tmp_path, layouts):
    folder = layouts("cifar10", 0).folder(tmp_path)
    rows = np.fromfile(folder / "test_batch.bin", np.uint8).reshape(3, -1)
    rows[:2].tofile(folder / "test_batch.bin")
    with pytest.raises(ValueError, match=r"/test_batch\.bin \(6146 bytes\) has the md5 sum .*verify=False"):
        load_images("cifar10", folder)
    assert len(load_images("cifar10", folder, verify=False).test_labels) == 2
    rows[1, 0] = 10
    rows.tofile(folder / "test_batch.bin")
    with pytest.raises(ValueError, match="test image 1 has label 10, outside 0 to 9"):
        load_images("cifar10", folder, verify=False)
    (folder / "test_batch.bin").write_bytes(b"x" * 3074)
    with pytest.raises(ValueError, match=r"has 3074 bytes, not a multiple of 3073"):
        load_images("cifar10", folder, verify=False)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks test_batch\.bin"):
        load_images("cifar10", folder)


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was_run",)


@pytest.mark.parametrize(
    "hostile", [pickle.dumps(Runs()), b"\x80\x02Nr\xff\xff\xff\x1f.", b"\x80\x04\x8e\0\0\0\0\1\0\0\0."]
)
def test_no_pickle_is_loaded_that_is_not_the_official_one(tmp_path, layouts, monkeypatch, hostile):
    monkeypatch.chdir(tmp_path)
    folder = layouts("cifar100", 1).folder(tmp_path)
    (folder / "train").write_bytes(hostile)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="md5 sum"):
        load_images("cifar100", folder)
    with pytest.raises(ValueError, match="pickles, which are read only with verify=True"):
        load_images("cifar100", folder, verify=False)
    # In kB. Ten bytes can ask the unpickler for gigabytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18
    assert not Path("was_run").exists()


@pytest.mark.parametrize("raw", [pickle.dumps(Runs()), b"cos\nsystem\n(S'true'\ntR.", b"cnumpy\nload\n."])
def test_the_unpickler_knows_arrays_alone(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="which no image file needs"):
        cifar._Unpickler(io.BytesIO(raw)).load()
    assert not Path("was_run").exists()


def test_wrong_places(tmp_path):
    (tmp_path / "a.tar.gz").touch()
    for place in (tmp_path / "a.tar.gz", tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"is no folder: unpack it|does not exist|holds none of"):
            load_images("cifar10", place)


class TestDownload:
    @pytest.fixture
    def server(self, tmp_path):
        (tmp_path / "web").mkdir()
        handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    def test_download(self, server, layouts, tmp_path, monkeypatch, capsys):
        layout = layouts("cifar10", 0)
        archive = layout.archive(tmp_path / "web")
        with pytest.raises(ValueError, match="has the md5 sum"):
            cifar.download_cifar("cifar10", tmp_path / "out", url=server)
        assert list((tmp_path / "out").iterdir()) == []
        sign(monkeypatch, layout, "cifar10", 0, archive)
        assert main(["prepare", "cifar10", "--out", str(tmp_path / "out"), "--url", server]) == 0
        assert "md5 sum verified" in capsys.readouterr().out
        check(load_images("cifar10", tmp_path / "out"), layout, "label")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [layout.form.folder]
        # Files that are there are verified, and not downloaded again.
        archive.unlink()
        assert cifar.download_cifar("cifar10", tmp_path / "out", url=server).is_dir()
        (tmp_path / "out" / layout.form.folder / "test_batch.bin").write_bytes(b"x")
        with pytest.raises(ValueError, match="md5 sum"):
            cifar.download_cifar("cifar10", tmp_path / "out", url=server)

    def test_no_server(self, tmp_path, server, capsys):
        with pytest.raises(ConnectionError, match=re.escape(f"{server}/cifar-10-binary.tar.gz cannot be downloaded")):
            cifar.download_cifar("cifar10", tmp_path / "out", url=server)
        assert main(["prepare", "cifar10", "--out", str(tmp_path / "out"), "--url", server, "--json"]) == 1
        assert "by other means" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_real_data(name):
    """Where the environment says where they are."""
    if f"STRUCTLIN_{name.upper()}" not in os.environ:
        pytest.skip(f"STRUCTLIN_{name.upper()} is not set")
    data = load_images(name)
    assert data.train_images.shape == (50_000, 3, 32, 32)
    assert np.bincount(data.train_labels).tolist() == [50_000 // data.num_classes] * data.num_classes
