"""CIFAR from every official form, damaged and hostile files, and the real data where given."""

import dataclasses
import hashlib
import io
import os
import tarfile

import numpy as np
import pytest

from structlin_nn.data import cifar, load_images
from structlin_nn.data.cifar import load_cifar10, load_cifar100

FORMS = [(dataset, form) for dataset in ("cifar10", "cifar100") for form in ("binary", "python")]
LOAD = {"cifar10": load_cifar10, "cifar100": load_cifar100}


def assert_same(data, layout, kind):
    np.testing.assert_array_equal(data.train_images, layout.train_images)
    np.testing.assert_array_equal(data.test_images, layout.test_images)
    np.testing.assert_array_equal(data.train_labels, layout.train_labels[kind])
    np.testing.assert_array_equal(data.test_labels, layout.test_labels[kind])
    for array in (data.train_images, data.test_images, data.train_labels, data.test_labels):
        assert array.flags.writeable
        assert array.flags.c_contiguous


@pytest.mark.parametrize(("dataset", "form"), FORMS)
@pytest.mark.parametrize("place", ["folder", "parent of folder", "archive", "parent of archive", "dotted archive"])
def test_every_form_at_every_place(tmp_path, layouts, dataset, form, place):
    layout = layouts(dataset, form)
    if "folder" in place:
        root = layout.write_folder(tmp_path)
    else:
        root = layout.write_archive(tmp_path, prefix="./" if "dotted" in place else "")
    data = LOAD[dataset](root.parent if "parent" in place else root, verify=False)
    assert_same(data, layout, "labels" if dataset == "cifar10" else "fine_labels")
    assert data.name == dataset
    assert data.source == f"{root} (not verified)"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_pickled_anew_by_python_3(tmp_path, layouts, protocol):
    layout = layouts("cifar10", "python", protocol)
    layout.write_folder(tmp_path)
    assert_same(load_cifar10(tmp_path, verify=False), layout, "labels")


@pytest.mark.parametrize("form", ["binary", "python"])
def test_fine_and_coarse_labels(tmp_path, layouts, form):
    layout = layouts("cifar100", form, images=50)
    layout.write_folder(tmp_path)
    fine = load_images("cifar100", tmp_path, verify=False)
    coarse = load_images("cifar100", tmp_path, labels="coarse", verify=False)
    assert_same(fine, layout, "fine_labels")
    assert_same(coarse, layout, "coarse_labels")
    assert (fine.name, fine.num_classes) == ("cifar100", 100)
    assert (coarse.name, coarse.num_classes) == ("cifar100-coarse", 20)
    assert not np.array_equal(fine.train_labels, coarse.train_labels)


def test_class_names():
    assert len(set(cifar.CIFAR10_CLASSES)) == 10
    assert len(set(cifar.CIFAR100_FINE_CLASSES)) == 100
    assert len(set(cifar.CIFAR100_COARSE_CLASSES)) == 20
    # The names of all three are in alphabetical order in the official files, and so are the labels.
    for names in (cifar.CIFAR10_CLASSES, cifar.CIFAR100_FINE_CLASSES, cifar.CIFAR100_COARSE_CLASSES):
        assert list(names) == sorted(names)


def test_folders_come_first_and_binary_before_python(tmp_path, layouts):
    layouts("cifar10", "python", images=4).write_archive(tmp_path)
    layouts("cifar10", "binary", images=5).write_archive(tmp_path)
    assert len(load_cifar10(tmp_path, verify=False).test_images) == 5 + 5
    layouts("cifar10", "python", images=6).write_folder(tmp_path)
    assert len(load_cifar10(tmp_path, verify=False).test_images) == 6 + 5
    layouts("cifar10", "binary", images=7).write_folder(tmp_path)
    assert len(load_cifar10(tmp_path, verify=False).test_images) == 7 + 5


def test_the_environment_variable_gives_the_place(tmp_path, layouts, monkeypatch):
    for name in ("cifar10", "cifar100"):
        monkeypatch.delenv(f"STRUCTLIN_{name.upper()}", raising=False)
        with pytest.raises(FileNotFoundError, match=f"STRUCTLIN_{name.upper()}.*fashion"):
            load_images(name)
        layout = layouts(name, "binary")
        monkeypatch.setenv(f"STRUCTLIN_{name.upper()}", str(layout.write_folder(tmp_path)))
        assert len(load_images(name, verify=False).test_images) == len(layout.test_images)


def official(layout, monkeypatch):
    """Let the synthetic files pass for the official ones: their sizes and sums take the place of the real."""
    table = "_CIFAR10" if layout.dataset == "cifar10" else "_CIFAR100"
    forms = []
    for form in getattr(cifar, table):
        if form.folder == layout.folder:
            files = tuple(
                cifar._File(name, len(raw), hashlib.md5(raw).hexdigest()) for name, raw in layout.files.items()
            )
            form = dataclasses.replace(form, files=files)
        forms.append(form)
    monkeypatch.setattr(cifar, table, tuple(forms))


@pytest.mark.parametrize(("dataset", "form"), FORMS)
def test_verified_files_load_and_one_wrong_bit_is_found(tmp_path, layouts, monkeypatch, dataset, form):
    layout = layouts(dataset, form)
    official(layout, monkeypatch)
    folder = layout.write_folder(tmp_path)
    data = LOAD[dataset](folder)
    assert_same(data, layout, "labels" if dataset == "cifar10" else "fine_labels")
    assert "md5 sums verified" in data.source

    name, raw = list(layout.files.items())[-1]
    damaged = bytearray(raw)
    damaged[len(raw) // 2] ^= 1
    (folder / name).write_bytes(damaged)
    with pytest.raises(ValueError, match="md5 sum") as caught:
        LOAD[dataset](folder)
    message = str(caught.value)
    assert str(folder / name) in message
    assert hashlib.md5(raw).hexdigest() in message
    assert hashlib.md5(damaged).hexdigest() in message
    assert "verify=False" in message
    LOAD[dataset](folder, verify=False)


def test_a_verified_archive_loads_and_another_one_does_not(tmp_path, layouts, monkeypatch):
    layout = layouts("cifar10", "python")
    path = layout.write_archive(tmp_path)
    with pytest.raises(ValueError, match="md5 sum") as caught:
        load_cifar10(path)
    message = str(caught.value)
    assert "c58f30108f718f92721af3b95e74349a" in message
    assert hashlib.md5(path.read_bytes()).hexdigest() in message
    assert "verify=False" in message

    official(layout, monkeypatch)
    sums = tuple(
        dataclasses.replace(form, archive_md5=hashlib.md5(path.read_bytes()).hexdigest())
        if form.archive == path.name
        else form
        for form in cifar._CIFAR10
    )
    monkeypatch.setattr(cifar, "_CIFAR10", sums)
    assert_same(load_cifar10(path), layout, "labels")


def test_a_file_of_the_official_size_with_other_content(tmp_path, layouts):
    folder = layouts("cifar10", "binary").write_folder(tmp_path)
    os.truncate(folder / "data_batch_1.bin", 30_730_000)
    with pytest.raises(ValueError, match=r"data_batch_1\.bin has the md5 sum .*5dd7e06a14cb22eb9f671a540d1b7c25"):
        load_cifar10(folder)


@pytest.mark.parametrize(
    ("dataset", "form", "name", "size"),
    [
        ("cifar10", "binary", "data_batch_1.bin", 30730000),
        ("cifar10", "python", "data_batch_1", 31035704),
        ("cifar100", "binary", "train.bin", 153700000),
        ("cifar100", "python", "train", 155249918),
    ],
)
def test_a_wrong_size_names_file_expected_and_actual(tmp_path, layouts, dataset, form, name, size):
    layout = layouts(dataset, form)
    folder = layout.write_folder(tmp_path)
    with pytest.raises(ValueError, match=f"has {len(layout.files[name])} bytes, the official file has {size}") as e:
        LOAD[dataset](folder)
    assert str(folder / name) in str(e.value)


def test_a_missing_file_is_named(tmp_path, layouts):
    folder = layouts("cifar10", "binary").write_folder(tmp_path)
    (folder / "data_batch_3.bin").unlink()
    (folder / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_3\.bin, test_batch\.bin"):
        load_cifar10(folder, verify=False)


def test_a_place_without_the_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; expected cifar-10-batches-bin"):
        load_cifar10(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds none of cifar-100-binary"):
        load_cifar100(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="holds none of cifar-100-binary"):
        load_cifar100(tmp_path)
    (tmp_path / "some.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"some\.tar\.gz has not the name of an official archive"):
        load_cifar10(tmp_path / "some.tar.gz")
    (tmp_path / "cifar-10-batches-bin").mkdir()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_1\.bin"):
        load_cifar10(tmp_path)


@pytest.mark.parametrize("cut", [1, 3073 - 1, 3 * 3073])
def test_a_truncated_binary_file(tmp_path, layouts, cut):
    layout = layouts("cifar10", "binary")
    folder = layout.write_folder(tmp_path)
    whole = layout.files["data_batch_1.bin"]
    (folder / "data_batch_1.bin").write_bytes(whole[:-cut])
    with pytest.raises(ValueError, match=f"has {len(whole) - cut} bytes, expected a multiple of 3073 .30730000"):
        load_cifar10(folder, verify=False)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_pickle(tmp_path, layouts, keep):
    layout = layouts("cifar10", "python")
    folder = layout.write_folder(tmp_path)
    (folder / "data_batch_2").write_bytes(layout.files["data_batch_2"][:keep])
    with pytest.raises(ValueError, match=r"data_batch_2 \(\d+ bytes\): the pickle is damaged"):
        load_cifar10(folder, verify=False)


@pytest.mark.parametrize("form", ["binary", "python"])
def test_a_truncated_or_damaged_archive(tmp_path, layouts, form):
    path = layouts("cifar10", form).write_archive(tmp_path)
    raw = path.read_bytes()
    for content in (raw[:-100], raw[: len(raw) // 2], raw[:5], b"", b"no archive", b"\x1f\x8b" + b"\x00" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"\({len(content)} bytes\) is damaged or truncated"):
            load_cifar10(path, verify=False)


def test_an_archive_without_one_of_the_files(tmp_path, layouts):
    layout = layouts("cifar100", "binary")
    del layout.files["test.bin"]
    with pytest.raises(FileNotFoundError, match=r"lacks cifar-100-binary/test\.bin"):
        load_cifar100(layout.write_archive(tmp_path), verify=False)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_no_file_is_refused(tmp_path, layouts, kind):
    (tmp_path / "secret").write_bytes(layouts("cifar100", "binary").files["train.bin"])
    path = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("cifar-100-binary/train.bin")
        member.type, member.linkname = kind, str(tmp_path / "secret")
        archive.addfile(member)
    with pytest.raises(ValueError, match=r"train\.bin is no regular file"):
        load_cifar100(path, verify=False)


def test_nothing_of_an_archive_is_written(tmp_path, layouts, monkeypatch):
    layout = layouts("cifar10", "binary")
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    path = inside / layout.archive
    with tarfile.open(path, "w:gz") as archive:
        for name in ("../../evil", "/evil-of-a-test", f"{layout.folder}/../../../data_batch_1.bin"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
        for name, raw in layout.files.items():
            member = tarfile.TarInfo(f"{layout.folder}/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    monkeypatch.chdir(inside)
    assert_same(load_cifar10(path, verify=False), layout, "labels")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", layout.archive]


def test_a_member_too_large_is_not_read(tmp_path, layouts, monkeypatch):
    path = layouts("cifar10", "binary").write_archive(tmp_path)
    monkeypatch.setattr(cifar, "_MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="more than the 1000 that are read at most"):
        load_cifar10(path, verify=False)


@pytest.mark.parametrize(("dataset", "form"), FORMS)
def test_a_label_outside_the_classes(tmp_path, layouts, python2_pickle, dataset, form):
    layout = layouts(dataset, form)
    folder = layout.write_folder(tmp_path)
    name, raw = next(iter(layout.files.items()))
    kind, value = ("labels", 10) if dataset == "cifar10" else ("fine_labels", 100)
    pixels = np.zeros((2, 3072), np.uint8)
    if form == "binary":
        record = len(raw) // 3
        damaged = bytearray(raw)
        damaged[2 * record - 3072 - 1] = value
        (folder / name).write_bytes(damaged)
    else:
        labels = {"coarse_labels": [0, 0]} if dataset == "cifar100" else {}
        (folder / name).write_bytes(python2_pickle({"data": pixels, **labels, kind: [0, value]}))
    with pytest.raises(ValueError, match=rf"{name}: image 1 has {kind} {value}, outside 0 to {value - 1}"):
        LOAD[dataset](folder, verify=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": [1]}, r"'data' must be a uint8 array of shape \(N, 3072\) with N >= 1, got NoneType"),
        ({"data": np.zeros((1, 3071), np.uint8), "labels": [1]}, r"got \(1, 3071\)"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, r"got \(0, 3072\)"),
        ({"data": np.zeros(3072, np.uint8), "labels": [1]}, r"got \(3072,\)"),
        ({"data": np.zeros((1, 3072), np.uint8)}, "'labels' must be a list of integers"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [b"x"]}, "'labels' must be a list of integers"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "2 images and 1 labels"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}, "labels range from -1 to -1"),
    ],
)
def test_a_pickle_of_other_content(tmp_path, layouts, python2_pickle, content, message):
    folder = layouts("cifar10", "python").write_folder(tmp_path)
    (folder / "data_batch_4").write_bytes(python2_pickle(content))
    with pytest.raises(ValueError, match=f"data_batch_4.*{message}"):
        load_cifar10(folder, verify=False)


def test_a_hostile_pickle_is_named_and_not_run(tmp_path, layouts):
    folder = layouts("cifar10", "python").write_folder(tmp_path)
    marker = tmp_path / "was_run"
    (folder / "data_batch_5").write_bytes(b"cos\nmkdir\n(V" + str(marker).encode() + b"\ntR.")
    with pytest.raises(ValueError, match=r"data_batch_5 .*asks for os\.mkdir"):
        load_cifar10(folder, verify=False)
    assert not marker.exists()


@pytest.mark.skipif(not os.environ.get("STRUCTLIN_CIFAR10"), reason="STRUCTLIN_CIFAR10 gives no CIFAR-10 files")
def test_the_real_cifar10():
    data = load_images("cifar10")
    assert data.train_images.shape == (50000, 3, 32, 32)
    assert data.test_images.shape == (10000, 3, 32, 32)
    assert np.bincount(data.train_labels).tolist() == [5000] * 10
    assert np.bincount(data.test_labels).tolist() == [1000] * 10
    assert data.train_labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert data.test_labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    np.testing.assert_allclose(data.mean, (0.4914, 0.4822, 0.4465), atol=5e-5)
    np.testing.assert_allclose(data.std, (0.2470, 0.2435, 0.2616), atol=5e-5)
