"""``structlin prepare``."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from structlin_nn.cli import main
from structlin_nn.data.imagenet import open_imagenet
from structlin_nn.data.tokens import open_tokens


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
    assert main(["prepare", *line.split()]) == code
    return capsys.readouterr()  # type: ignore[return-value]


class TestText:
    def test_pydoc(self, capsys: pytest.CaptureFixture[str]) -> None:
        out, _ = run("text --pydoc --out corpus --tokenizer bytes --workers 1 --quiet --json --name manual", capsys)
        found, data = json.loads(out), open_tokens("corpus")
        assert found == {
            "name": "manual", "folder": "corpus", "tokenizer": "bytes", "vocab_size": 257, "sha256": data.digest,
            "train_tokens": len(data.train), "val_tokens": len(data.val),
        }  # fmt: skip
        assert 8 * len(data.val) < len(data.train)
        # Finished: only opened.
        assert run("text --pydoc --out corpus --tokenizer bytes --name manual --json --quiet", capsys)[0] == out

    def test_pydoc_is_what_no_file_means(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, err = run("text --out corpus --tokenizer bytes --workers 1 --quiet", capsys)
        assert err == "no file is named: taking the text that Python ships (--pydoc)\n"
        assert open_tokens("corpus").name.startswith("pydoc-3.")

    def test_files_and_progress(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name in "ab":
            (folder / name).write_text(f"line of {name}\n" * 100)
        out, err = run("text a b --out corpus --tokenizer bytes --workers 1 --val-fraction 0.5", capsys)
        assert "1/1" in err
        assert "2,004 tokens" in err
        assert out == "corpus: 1,002 training and 1,002 validation tokens (bytes, vocabulary 257) in corpus\n"

    def test_bytes_where_no_vocabulary_is_at_hand(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise FileNotFoundError("no vocabulary here")

        monkeypatch.setattr("structlin_nn.data.bpe.GPT2Tokenizer", refuse)
        _, err = run("text --pydoc --out corpus --workers 1 --quiet", capsys)
        assert err == "tokens are bytes (--tokenizer bytes), because: no vocabulary here\n"
        assert open_tokens("corpus").tokenizer == "bytes"
        _, err = run("text --pydoc --out other --tokenizer gpt2", capsys, code=2)
        assert "no vocabulary here" in err

    def test_gpt2(self, capsys: pytest.CaptureFixture[str], gpt2_vocabulary: Path) -> None:
        pytest.importorskip("tiktoken")
        run(f"text --pydoc --out corpus --vocabulary {gpt2_vocabulary} --workers 1 --quiet", capsys)
        data = open_tokens("corpus")
        assert (data.tokenizer, data.vocab_size, data.end_of_text) == ("gpt2", 50257, 50256)

    def test_full_disk(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("structlin_nn.data.shards.os.fsync", full)
        monkeypatch.setattr("structlin_nn._files.os.fsync", full)
        _, err = run("text --pydoc --out corpus --tokenizer bytes --workers 1 --quiet", capsys, code=1)
        assert "No space left on device" in err
        assert not Path("corpus/train.bin").exists()


class TestOpenWebText:
    @pytest.fixture
    def saved(self, folder: Path) -> Path:
        datasets = pytest.importorskip("datasets")
        texts = [f"document {number} " * (number % 7 + 1) for number in range(300)]
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder / "saved"))
        return folder / "saved"

    def test_saved_data(self, saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        line = f"openwebtext --dataset {saved} --tokenizer bytes --val-fraction 0.1 --quiet --out"
        monkeypatch.setattr("structlin_nn.data.openwebtext.ROWS", 64)
        run(f"{line} corpus --workers 1", capsys)
        data = open_tokens("corpus")
        whole = [np.split(part, np.flatnonzero(part == 256) + 1)[:-1] for part in (data.train, data.val)]
        texts = [bytes(document[:-1].astype(np.uint8)).decode() for part in whole for document in part]
        assert sorted(texts) == sorted(f"document {number} " * (number % 7 + 1) for number in range(300))
        assert 10 < len(whole[1]) < 60
        run(f"{line} again --workers 2", capsys)
        assert open_tokens("again").digest == data.digest
        run(f"{line} third --workers 1 --seed 1", capsys)
        assert open_tokens("third").digest != data.digest

    def test_streamed_files(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("datasets")
        (folder / "files").mkdir()
        for number in range(3):
            rows = [{"text": f"file {number} row {row}"} for row in range(40)]
            (folder / f"files/{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = "openwebtext --dataset files --tokenizer bytes --val-fraction 0.2 --workers 1"
        _, err = run(f"{line} --out corpus", capsys)
        assert "3/3" in err
        data = open_tokens("corpus")
        assert (np.concatenate([data.train, data.val]) == 256).sum() == 120
        _, err = run(f"{line} --out other --column words", capsys, code=2)
        assert "is no text in the column 'words'" in err or "not 'words'" in err

    def test_damage(self, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
        line = "openwebtext --tokenizer bytes --workers 1 --quiet --out corpus --dataset"
        for rest, message in (
            ("no/such/data", "Hugging Face datasets cannot load the split 'train' of no/such/data"),
            (f"{saved} --column words", "has the columns text, not 'words'"),
            (f"{saved} --val-fraction 1.5", "val_fraction must be above 0 and below 1"),
            (f"{saved} --val-fraction 0.0000001", "the val split would be empty"),
        ):
            assert message in run(f"{line} {rest}", capsys, code=2)[1]


class TestImageNet:
    def test_check(self, image_tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out, _ = run(f"imagenet {image_tree} --workers 2", capsys)
        lines = [line.split() for line in out.splitlines()]
        assert ["train", "18", "3", "5", "to", "7", "0"] in lines
        assert ["val", "9", "3", "2", "to", "4", "0"] in lines

    def test_broken(self, image_tree: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tree = Path(shutil.copytree(image_tree, folder / "tree"))
        (tree / "train/bag/0.jpg").write_bytes(b"nothing")
        (tree / "train/bag/notes.md").touch()
        out, err = run("imagenet tree --workers 1 --json --quiet", capsys, code=1)
        found = json.loads(out)
        assert found["splits"]["train"] == {
            "images": 18, "classes": 3, "smallest_class": 5, "largest_class": 7, "broken": 1
        }  # fmt: skip
        assert list(found["broken"]) == ["tree/train/bag/0.jpg"]
        assert err.count("\n") == 2
        assert "broken: tree/train/bag/0.jpg (7 bytes) is a broken image" in err
        assert "left out: tree/train/bag/notes.md" in err
        _, err = run("imagenet tree --workers 1 --quiet --resize 20 --out small", capsys, code=2)
        assert "tree/train/bag/0.jpg (7 bytes) is a broken image" in err
        run("imagenet tree --workers 1 --quiet --resize 20 --out small --remove-broken", capsys)
        assert open_imagenet("small").train_size == 17

    @pytest.mark.parametrize("source", ["tree", "shards"])
    def test_resize(
        self, source: str, image_tree: Path, image_shards: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = f"imagenet {image_tree if source == 'tree' else image_shards} --resize 44 --out small --quiet"
        run(f"{line} --workers 2", capsys)
        before, after = open_imagenet(image_tree), open_imagenet("small")
        assert after.classes == (("bag", "boot", "coat") if source == "tree" else ("0", "1", "2"))
        for split in ("train", "val"):
            assert after.splits[split].labels.tolist() == before.splits[split].labels.tolist()
        copied = 0
        for index in range(before.train_size):
            old, new = (Image.open(io.BytesIO(data.splits["train"].read(index))) for data in (before, after))
            assert new.format == old.format
            if min(old.size) <= 44:
                assert before.splits["train"].read(index) == after.splits["train"].read(index)
                copied += 1
                continue
            assert min(new.size) == 44
            assert max(new.size) == 44 * max(old.size) // min(old.size)
            if new.format == "PNG":
                assert new.tobytes() == old.resize(new.size, Image.Resampling.BICUBIC).tobytes()
        assert 0 < copied < before.train_size

        # What is there is not made again; what is missing is.
        paths = sorted((folder / "small").rglob("*.*g"))
        times = {path: path.stat().st_mtime_ns for path in paths[1:]}
        paths[0].unlink()
        run(f"{line} --workers 1", capsys)
        assert paths[0].exists()
        assert {path: path.stat().st_mtime_ns for path in paths[1:]} == times
        assert "other settings" in run(line.replace("44", "45"), capsys, code=2)[1]

    def test_other_folder(self, image_tree: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "full").mkdir()
        (folder / "full/file").touch()
        assert "is not empty" in run(f"imagenet {image_tree} --resize 44 --out full", capsys, code=2)[1]


MISUSE = {
    "txt": "unknown kind 'txt', did you mean text?",
    "text": "--out DIR is needed",
    "text file --pydoc --out x": "--pydoc takes no files, got 'file'",
    "text --pydoc": "--out DIR is needed",
    "text --pydoc --out file": "file is a file, --out needs a folder",
    "text --pydoc --out x --workers 0": "--workers must be at least 1, got 0",
    "text --pydoc --out x --resize 3": "--resize is an option of imagenet, not of text",
    "text --pydoc --out x --column words": "--column is an option of openwebtext, not of text",
    "text nowhere --out x --tokenizer bytes": "nowhere does not exist",
    "text --pydoc --out x --tokenizer byte": "unknown tokenizer 'byte', did you mean bytes?",
    "openwebtext file --out x": "openwebtext takes no files, got 'file'",
    "openwebtext --out x --tokenizer auto": "--tokenizer auto is for text",
    "openwebtext --out x --pydoc": "--pydoc is an option of text, not of openwebtext",
    "imagenet": "imagenet takes one folder or data set, got 0",
    "imagenet . --resize 3": "--resize and --out belong together",
    "imagenet . --quality 3": "--quality and --remove-broken are for --resize",
    "imagenet .": "holds no train/ and val/ folder",
    "imagenet . --tokenizer bytes": "--tokenizer is an option of text and openwebtext, not of imagenet",
}


@pytest.mark.parametrize(("line", "message"), MISUSE.items(), ids=MISUSE)
def test_misuse(line: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").touch()
    out, err = run(line, capsys, code=2)
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["file"]
