"""CIFAR files of synthetic content in all their official forms, whose sums stand in for the published ones."""

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from structlin_nn.data import images as image_data

IMAGES = 3


@dataclass(frozen=True)
class Layout:
    """One official form, and the content that its files get: `images` and the labels of each kind, in order."""

    form: image_data._Form
    files: dict[str, bytes]
    images: np.ndarray
    labels: dict[str, np.ndarray]

    def folder(self, parent: Path) -> Path:
        place = parent / self.form.folder
        place.mkdir(parents=True)
        for name, raw in self.files.items():
            (place / name).write_bytes(raw)
        return place


def _pickle(content: dict[str, object]) -> bytes:
    """Pickle as Python 2 did for the official files: protocol 2, all text and bytes as 8-bit strings."""

    def string(raw: bytes) -> bytes:
        return b"T" + len(raw).to_bytes(4, "little") + raw

    def integer(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    out = b"\x80\x02}("
    for key, value in content.items():
        out += string(key.encode())
        if isinstance(value, np.ndarray):
            shape = b"(" + b"".join(integer(n) for n in value.shape) + b"t"
            dtype = b"cnumpy\ndtype\n(" + string(b"u1") + integer(0) + integer(1) + b"tR("
            dtype += integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
            out += b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t"
            out += string(b"b") + b"tR(" + integer(1) + shape + dtype + b"\x89" + string(value.tobytes()) + b"tb"
        else:
            assert isinstance(value, list)
            out += b"](" + b"".join(integer(n) for n in value) + b"e"
    out += b"u."
    # The oracle is the ordinary unpickler, on bytes written here.
    assert pickle.loads(out, encoding="latin1").keys() == content.keys()
    return out


def make_layout(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> Layout:
    """Random images and labels in the files of form `number`; three images in each, whose sums become the published."""
    form = image_data._FORMS[name][number]
    rng = np.random.default_rng([len(name), number])
    limits = {"label": 10, "coarse_label": 20, "fine_label": 100}
    total = IMAGES * len(form.files)
    images = rng.integers(0, 256, (total, 3, 32, 32), dtype=np.uint8)
    labels = {kind: rng.integers(0, limits[kind], total) for kind in form.kinds}
    files = {}
    for place, file in enumerate(form.files):
        part = slice(place * IMAGES, (place + 1) * IMAGES)
        flat = images[part].reshape(IMAGES, -1)
        if form.pickled:
            files[file] = _pickle({f"{kind}s": labels[kind][part].tolist() for kind in form.kinds} | {"data": flat})
        else:
            columns = [labels[kind][part].astype(np.uint8)[:, None] for kind in form.kinds]
            files[file] = np.hstack([*columns, flat]).tobytes()
    sums = {file: hashlib.md5(raw, usedforsecurity=False).hexdigest() for file, raw in files.items()}
    form = form._replace(files=sums)
    forms = list(image_data._FORMS[name])
    forms[number] = form
    monkeypatch.setitem(image_data._FORMS, name, tuple(forms))
    return Layout(form, files, images, labels)


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Layout]:
    return lambda name, number: make_layout(monkeypatch, name, number)
