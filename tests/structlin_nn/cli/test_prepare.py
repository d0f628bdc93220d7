"""``structlin prepare``."""

import io
import json
import shutil
from pathlib import Path

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
        out, _ = run("text --pydoc --out corpus --tokenizer bytes --workers 1 --json --name manual", capsys)
        data = open_tokens("corpus")
        assert json.loads(out) == {
            "name": "manual", "folder": "corpus", "tokenizer": "bytes", "vocab_size": 257, "sha256": data.digest,
            "train_tokens": len(data.train), "val_tokens": len(data.val),
        }  # fmt: skip

    def test_files(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name in "ab":
            (folder / name).write_text(f"line of {name}\n" * 100)
        out, _ = run("text a b --out corpus --tokenizer bytes --val-fraction 0.5", capsys)
        assert "1,002 training and 1,002 validation tokens, vocabulary 257), bytes tokens, in corpus" in out

    def test_bytes_where_no_vocabulary_is_at_hand(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiktoken = pytest.importorskip("tiktoken")

        def refuse(_: str) -> None:
            raise OSError("no network here")

        monkeypatch.setattr(tiktoken, "get_encoding", refuse)
        _, err = run("text --out corpus", capsys)
        assert "no file is named: taking the text that Python ships" in err
        assert "tokens are bytes (--tokenizer bytes), because: " in err
        assert open_tokens("corpus").tokenizer == "bytes"
        assert "no network here" in run("text --pydoc --out other --tokenizer gpt2", capsys, code=2)[1]

    def test_gpt2(self, capsys: pytest.CaptureFixture[str], gpt2_vocabulary: Path) -> None:
        pytest.importorskip("tiktoken")
        run(f"text --pydoc --out corpus --vocabulary {gpt2_vocabulary}", capsys)
        data = open_tokens("corpus")
        assert (data.tokenizer, data.vocab_size, data.end_of_text) == ("gpt2", 50257, 50256)

    def test_full_disk(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("structlin_nn._files.os.fsync", full)
        assert "No space left on device" in run("text --pydoc --out corpus --tokenizer bytes", capsys, code=1)[1]


def test_openwebtext(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"words": [f"document {number}" for number in range(30)]}).save_to_disk("saved")
    line = "openwebtext --dataset saved --tokenizer bytes --val-fraction 0.1 --workers 1 --out corpus"
    out, _ = run(f"{line} --column words --json", capsys)
    assert json.loads(out)["name"] == "saved"
    assert (open_tokens("corpus").val == 256).sum() == 3
    assert "has the columns words, not 'text'" in run(line, capsys, code=2)[1]


class TestImageNet:
    @pytest.fixture(autouse=True)
    def vision(self) -> None:
        pytest.importorskip("torchvision")

    def test_check(self, image_tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out, _ = run(f"imagenet {image_tree} --workers 2", capsys)
        lines = [line.split() for line in out.splitlines()]
        assert ["train", "18", "3", "5", "7", "0"] in lines
        assert ["val", "9", "3", "2", "4", "0"] in lines

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
        assert "broken: tree/train/bag/0.jpg (7 bytes) is a broken image" in err
        assert "not an image by its name, left out: tree/train/bag/notes.md" in err
        for workers in (1, 2):
            _, err = run(f"imagenet tree --workers {workers} --quiet --resize 20 --out small", capsys, code=2)
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
        (folder / "full").mkdir()
        (folder / "full/file").touch()
        assert "is not empty" in run(f"imagenet {image_tree} --resize 44 --out full", capsys, code=2)[1]


MISUSE = {
    "txt": "unknown name 'txt', did you mean text?",
    "text": "required: --out",
    "text file --pydoc --out x": "--pydoc takes no files, got 'file'",
    "text --pydoc --out file": "file is a file, a folder is needed",
    "text --pydoc --out x --workers 0": "must be a whole number of at least 1, got '0'",
    "text --pydoc --out x --resize 3": "unknown option --resize",
    "text nowhere --out x --tokenizer bytes": "nowhere does not exist",
    "text --pydoc --out x --tokenizer byte": "unknown tokenizer 'byte', did you mean bytes?",
    "openwebtext file --out x": "unrecognized arguments: file",
    "openwebtext --out x --tokenizer auto": "unknown tokenizer 'auto'",
    "imagenet": "required: SOURCE",
    "imagenet . --resize 3": "--resize and --out belong together",
    "imagenet . --quality 3": "--quality and --remove-broken are for --resize",
    "imagenet .": "holds no train/ and val/ folder",
}


@pytest.mark.parametrize(("line", "message"), MISUSE.items(), ids=MISUSE)
def test_misuse(line: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").touch()
    out, err = run(line, capsys, code=2)
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["file"]
