"""Texts and data sets of documents as tokens: splits, interruption, damage."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import structlin_nn
from structlin_nn.data import prepare as prepare_module
from structlin_nn.data.prepare import prepare_openwebtext, prepare_text, pydoc_documents
from structlin_nn.data.tokens import TokenData, open_tokens

END = 256


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two documents of 9,000 and 40,000 bytes, with lines and characters of several bytes."""
    rng = np.random.default_rng(0)
    found = []
    for number, size in enumerate((9_000, 40_000)):
        content = ""
        while len(content.encode()) < size:
            content += "".join(rng.choice(["the ", "naïve ", "你好", "x's\n", "\n\n", "\t z"], 50))
        found.append(tmp_path / f"{number}.txt")
        found[-1].write_text(content, encoding="utf-8", newline="")
    return found


def prepare(files: list[Path] | None, out: Path, **changes: Any) -> TokenData:
    return prepare_text(files, out, **{"tokenizer": "bytes", "workers": 1, **changes})


def documents(tokens: np.ndarray) -> list[bytes]:
    assert tokens[-1] == END
    places = np.flatnonzero(tokens == END)
    return [part[part != END].astype(np.uint8).tobytes() for part in np.split(tokens, places[:-1] + 1)]


class TestText:
    @pytest.mark.parametrize("workers", [1, 3])
    def test_each_document_is_divided(self, files: list[Path], tmp_path: Path, workers: int) -> None:
        data = prepare(files, tmp_path / "out", workers=workers)
        assert (data.vocab_size, data.tokenizer, data.end_of_text, data.name) == (257, "bytes", END, "out")
        for path, first, last in zip(files, documents(data.train), documents(data.val), strict=True):
            assert first + last == path.read_bytes()
            assert 0.085 < len(last) / len(first + last) < 0.13
            assert first.endswith(b"\n")
        meta = json.loads((tmp_path / "out" / "meta.json").read_text())
        for split, tokens in (("train", data.train), ("val", data.val)):
            assert meta[split] == {"tokens": len(tokens), "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]

    def test_a_file_that_is_named_twice_is_there_twice(self, files: list[Path], tmp_path: Path) -> None:
        data = prepare([files[0], files[0]], tmp_path / "out")
        assert len(documents(data.train)) == len(documents(data.val)) == 2

    def test_text_without_lines(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("你" * 1000, encoding="utf-8")
        data = prepare([tmp_path / "a"], tmp_path / "out", val_fraction=0.2501)
        assert documents(data.train)[0].decode() == "你" * 750
        assert documents(data.val)[0].decode() == "你" * 250

    def test_pydoc(self, tmp_path: Path) -> None:
        data = prepare(None, tmp_path / "out")
        text = b"".join(a + b for a, b in zip(documents(data.train), documents(data.val), strict=True))
        assert text.decode() == "".join(pydoc_documents().values())
        assert data.name.startswith("pydoc-3.")

    def test_finished_and_other_settings(self, files: list[Path], tmp_path: Path) -> None:
        first = prepare(files, tmp_path / "out")
        before = (tmp_path / "out/train.bin").stat().st_mtime_ns
        assert prepare(files, tmp_path / "out").digest == first.digest
        assert (tmp_path / "out/train.bin").stat().st_mtime_ns == before
        files[0].write_text("changed\n" * 100)
        with pytest.raises(FileExistsError, match="holds other tokens"):
            prepare(files, tmp_path / "out")
        (tmp_path / "other").mkdir()
        (tmp_path / "other/train.bin").write_bytes(b"12")
        with pytest.raises(FileExistsError, match="holds other tokens"):
            prepare(files, tmp_path / "other")
        assert (tmp_path / "other/train.bin").read_bytes() == b"12"

    def test_after_a_failure(self, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("structlin_nn._files.os.fsync", full)
            with pytest.raises(OSError, match="No space left"):
                prepare(files, tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [prepare_module.BEGUN]
        assert prepare(files, tmp_path / "out").digest == prepare(files, tmp_path / "whole").digest

    def test_damage(self, files: list[Path], tmp_path: Path) -> None:
        (tmp_path / "bad.txt").write_bytes(b"fine\n" * 10 + b"\xff" + b"fine\n" * 10)
        (tmp_path / "empty").touch()
        (tmp_path / "short").write_text("a")
        for given, options, error, message in (
            ([tmp_path / "bad.txt"], {}, ValueError, r"bad\.txt is not UTF-8 at byte 50"),
            ([], {}, ValueError, "at least one text file"),
            ([tmp_path / "nowhere"], {}, FileNotFoundError, "nowhere does not exist"),
            ([tmp_path], {}, ValueError, "is a folder; name its files"),
            ([tmp_path / "empty"], {}, ValueError, "empty is empty"),
            ([tmp_path / "short"], {}, ValueError, "the val split would be empty"),
            (files, {"val_fraction": 1.0}, ValueError, "val_fraction must be above 0 and below 1"),
        ):
            with pytest.raises(error, match=message):
                prepare(given, tmp_path / "out", **options)
            assert not (tmp_path / "out/train.bin").exists()


class TestDocuments:
    TEXTS = tuple(f"document {number} " * (number % 7 + 1) for number in range(300))

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.datasets = pytest.importorskip("datasets")
        self.datasets.disable_progress_bars()
        monkeypatch.setattr(prepare_module, "ROWS", 64)
        monkeypatch.setattr(self.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        self.datasets.Dataset.from_dict({"text": self.TEXTS}).save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"

    def prepare(self, source: Path, out: Path, **changes: Any) -> TokenData:
        settings = {"tokenizer": "bytes", "val_fraction": 0.1, "workers": 1, **changes}
        return prepare_openwebtext(out, dataset=source, **settings)

    def test_splits_are_those_of_nanogpt(self, saved: Path, tmp_path: Path) -> None:
        data = self.prepare(saved, tmp_path / "out")
        split = self.datasets.load_from_disk(str(saved)).train_test_split(test_size=0.1, seed=2357, shuffle=True)
        assert [raw.decode() for raw in documents(data.train)] == split["train"]["text"][:]
        assert [raw.decode() for raw in documents(data.val)] == split["test"]["text"][:]
        assert self.prepare(saved, tmp_path / "again", workers=2).digest == data.digest
        assert self.prepare(saved, tmp_path / "third", seed=1).digest != data.digest

    def test_interrupted(self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was tokenised is not tokenised again."""
        calls: list[str] = []
        original = prepare_module.load_tokenizer

        def counted(*arguments: Any) -> Any:
            tokenizer = original(*arguments)

            def encode(text: str) -> list[int]:
                calls.append(text)
                if len(calls) == 150:
                    raise KeyboardInterrupt
                return tokenizer.encode(text)

            return dataclasses.replace(tokenizer, encode=encode)

        monkeypatch.setattr(prepare_module, "_tokenizer", counted)
        with pytest.raises(KeyboardInterrupt):
            self.prepare(saved, tmp_path / "out")
        assert not (tmp_path / "out/train.bin").exists()
        data = self.prepare(saved, tmp_path / "out")
        # Of five pieces of 54 documents two were done.
        assert len(calls) == 150 + 300 - 2 * 54
        assert sorted(raw.decode() for raw in documents(data.train) + documents(data.val)) == sorted(self.TEXTS)

    def test_folders_of_files(self, tmp_path: Path) -> None:
        (tmp_path / "files").mkdir()
        for number in range(3):
            rows = [{"text": f"file {number} row {row}"} for row in range(40)]
            (tmp_path / f"files/{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = self.prepare(tmp_path / "files", tmp_path / "out")
        assert len(documents(data.train)) == 108
        assert len(documents(data.val)) == 12

    def test_damage(self, saved: Path, tmp_path: Path) -> None:
        for source, options, error, message in (
            (Path("no/such/data"), {}, FileNotFoundError, "datasets cannot load no/such/data"),
            (saved, {"column": "words"}, ValueError, "has the columns text, not 'words'"),
            (saved, {"val_fraction": 1.5}, ValueError, "val_fraction must be above 0 and below 1"),
            (saved, {"val_fraction": 0.9999}, ValueError, "300 documents are too few for val_fraction"),
        ):
            with pytest.raises(error, match=message):
                self.prepare(source, tmp_path / "out", **options)
        self.datasets.Dataset.from_dict({"text": [1, 2, 3, 4]}).save_to_disk(str(tmp_path / "numbers"))
        with pytest.raises(ValueError, match=r"the column 'text' holds .*, which is not text"):
            self.prepare(tmp_path / "numbers", tmp_path / "out", val_fraction=0.5)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """The same command makes the same files."""
    code = (
        "import sys; from structlin_nn.cli import main\n"
        "sys.exit(main(['prepare', 'text', '--pydoc', '--out', 'out', '--tokenizer', 'bytes']))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(structlin_nn.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / prepare_module.BEGUN).exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert open_tokens(tmp_path / "out").digest == prepare(None, tmp_path / "whole").digest
