"""``structlin prepare``."""

import json
from pathlib import Path

import pytest

from structlin_nn.data.tokens import open_tokens


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestText:
    def test_pydoc(self, cli) -> None:
        out, _ = cli("prepare text --pydoc --out corpus --tokenizer bytes --workers 1 --json --name manual")
        data = open_tokens("corpus")
        assert json.loads(out) == {
            "name": "manual", "folder": "corpus", "tokenizer": "bytes", "vocab_size": 257, "sha256": data.digest,
            "train_tokens": len(data.train), "val_tokens": len(data.val),
        }  # fmt: skip

    def test_files(self, folder: Path, cli) -> None:
        for name in "ab":
            (folder / name).write_text(f"line of {name}\n" * 100)
        out, _ = cli("prepare text a b --out corpus --tokenizer bytes --val-fraction 0.5")
        assert "1,002 training and 1,002 validation tokens, vocabulary 257), bytes tokens, in corpus" in out

    def test_bytes_where_no_vocabulary_is_at_hand(self, cli, monkeypatch: pytest.MonkeyPatch) -> None:
        tiktoken = pytest.importorskip("tiktoken")

        def refuse(_: str) -> None:
            raise OSError("no network here")

        monkeypatch.setattr(tiktoken, "get_encoding", refuse)
        _, err = cli("prepare text --out corpus")
        assert "no file is given: using Python's documentation" in err
        assert "using bytes as tokens (--tokenizer bytes): " in err
        assert open_tokens("corpus").tokenizer == "bytes"
        assert "no network here" in cli("prepare text --pydoc --out other --tokenizer gpt2", code=2)[1]

    def test_gpt2(self, cli, gpt2_vocabulary: Path) -> None:
        pytest.importorskip("tiktoken")
        cli(f"prepare text --pydoc --out corpus --vocabulary {gpt2_vocabulary}")
        data = open_tokens("corpus")
        assert (data.tokenizer, data.vocab_size, data.end_of_text) == ("gpt2", 50257, 50256)

    def test_full_disk(self, cli, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("structlin_nn._files.os.fsync", full)
        assert "No space left on device" in cli("prepare text --pydoc --out corpus --tokenizer bytes", code=1)[1]


def test_openwebtext(folder: Path, cli) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"words": [f"document {number}" for number in range(30)]}).save_to_disk("saved")
    line = "openwebtext --dataset saved --tokenizer bytes --val-fraction 0.1 --workers 1 --out corpus"
    out, _ = cli(f"prepare {line} --column words --json")
    assert json.loads(out)["name"] == "saved"
    assert (open_tokens("corpus").val == 256).sum() == 3
    assert "has the columns words, not 'text'" in cli(f"prepare {line}", code=2)[1]


MISUSE = {
    "txt": "unknown name 'txt' (did you mean text?)",
    "text": "required: --out",
    "text file --pydoc --out x": "--pydoc takes no files, got 'file'",
    "text --pydoc --out file": "must be a folder, and file is a file",
    "text --pydoc --out x --workers 0": "must be a positive integer, got '0'",
    "text --pydoc --out x --resize 3": "unknown option --resize",
    "text nowhere --out x --tokenizer bytes": "nowhere does not exist",
    "text --pydoc --out x --tokenizer byte": "unknown tokenizer 'byte' (did you mean bytes?)",
    "openwebtext file --out x": "unrecognized arguments: file",
    "openwebtext --out x --tokenizer auto": "unknown tokenizer 'auto'",
}


@pytest.mark.parametrize(("line", "message"), MISUSE.items(), ids=MISUSE)
def test_misuse(line: str, message: str, folder: Path, misuse) -> None:
    (folder / "file").touch()
    assert message in misuse(f"prepare {line}")
    assert [path.name for path in folder.iterdir()] == ["file"]
