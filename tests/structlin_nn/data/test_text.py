"""Text as tokens: splitting, cutting into pieces, interruption, damage."""

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
from structlin_nn.data import text as text_module
from structlin_nn.data.bpe import GPT2Tokenizer
from structlin_nn.data.shards import WORK, Interrupted, run_parallel
from structlin_nn.data.text import prepare_text, pydoc_documents
from structlin_nn.data.tokens import TokenData

END = 256


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two documents of 9,000 and 40,000 bytes, with lines, characters of several bytes and runs of white space."""
    rng = np.random.default_rng(0)
    words = ["the", "naïve", "你好", "x's", "  y", "\u3000", "\n", "\n", "\n\n", "\t z", "value=3"]
    gaps = [" ", "\n", " ", "", "  "]
    found = []
    for number, size in enumerate((9_000, 40_000)):
        content = ""
        while len(content.encode()) < size:
            content += "".join(
                f"{word}{gap}" for word, gap in zip(rng.choice(words, 50), rng.choice(gaps, 50), strict=True)
            )
        path = tmp_path / f"{number}.txt"
        path.write_text(content, encoding="utf-8", newline="")
        found.append(path)
    return found


def prepare(files: list[Path] | None, out: Path, **changes: Any) -> TokenData:
    return prepare_text(files, out, **{"tokenizer": "bytes", "workers": 1, **changes})  # type: ignore[arg-type]


def documents(tokens: np.ndarray, end: int = END) -> list[bytes]:
    assert tokens[-1] == end
    places = np.flatnonzero(tokens == end)
    return [part[part != end].astype(np.uint8).tobytes() for part in np.split(tokens, places[:-1] + 1)]


class TestSplit:
    def test_each_document_is_divided(self, files: list[Path], tmp_path: Path) -> None:
        data = prepare(files, tmp_path / "out")
        assert (data.vocab_size, data.tokenizer, data.end_of_text, data.name) == (257, "bytes", END, "out")
        train, val = documents(data.train), documents(data.val)
        assert len(train) == len(val) == 2
        for path, first, last in zip(files, train, val, strict=True):
            assert first + last == path.read_bytes()
            assert 0.085 < len(last) / len(first + last) < 0.13
            assert first.endswith(b"\n")

    def test_text_without_lines(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("你" * 1000, encoding="utf-8")
        data = prepare([tmp_path / "a"], tmp_path / "out", val_fraction=0.2501)
        train, val = documents(data.train)[0], documents(data.val)[0]
        assert (train + val).decode() == "你" * 1000
        assert train.decode() == "你" * 750

    def test_pydoc(self, tmp_path: Path) -> None:
        data = prepare(None, tmp_path / "out")
        text = b"".join(a + b for a, b in zip(documents(data.train), documents(data.val), strict=True))
        assert text.decode() == "".join(pydoc_documents().values())
        assert data.name.startswith("pydoc-3.")

    def test_sums_are_in_meta(self, files: list[Path], tmp_path: Path) -> None:
        data = prepare(files, tmp_path / "out")
        meta = json.loads((tmp_path / "out" / "meta.json").read_text())
        for split, tokens in (("train", data.train), ("val", data.val)):
            assert meta[split] == {"tokens": len(tokens), "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]


class TestPieces:
    def test_cutting_changes_no_token(
        self, files: list[Path], tmp_path: Path, gpt2_vocabulary: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("tiktoken")
        settings = {"tokenizer": "gpt2", "vocabulary": gpt2_vocabulary}
        whole = prepare(files, tmp_path / "whole", **settings)
        monkeypatch.setattr(text_module, "PIECE", 700)
        monkeypatch.setattr(text_module, "SHARD", 2_000)
        calls: list[tuple[int, int, int]] = []
        cut = prepare(files, tmp_path / "cut", **settings, advance=lambda *numbers: calls.append(numbers))
        assert calls[-1][0] == calls[-1][1] > 10
        assert calls[-1][2] == len(whole.train) + len(whole.val)
        assert cut.digest == whole.digest
        # And the tokens are those of the text as a whole.
        tokenizer = GPT2Tokenizer(gpt2_vocabulary)
        end = np.flatnonzero(whole.train == 50256)[0]
        size = len(tokenizer.decode(whole.train[:end].tolist()))
        text = files[0].read_bytes().decode()
        assert tokenizer.encode(text[:size]) == whole.train[:end].tolist()

    def test_processes_change_nothing(self, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(text_module, "PIECE", 2_000)
        monkeypatch.setattr(text_module, "SHARD", 5_000)
        one = prepare(files, tmp_path / "one")
        assert prepare(files, tmp_path / "two", workers=2).digest == one.digest


class TestResume:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(text_module, "PIECE", 2_000)
        monkeypatch.setattr(text_module, "SHARD", 5_000)

    def test_after_a_failure(self, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = prepare(files, tmp_path / "whole").digest
        original = text_module._Encode.__call__
        made: list[int] = []

        def fail_at_four(self: Any, number: int) -> Any:
            if number == 4 and not made.count(-1):
                made.append(-1)
                raise OSError(28, "No space left on device")
            made.append(number)
            return original(self, number)

        monkeypatch.setattr(text_module._Encode, "__call__", fail_at_four)
        with pytest.raises(OSError, match="No space left"):
            prepare(files, tmp_path / "out")
        assert not (tmp_path / "out/train.bin").exists()
        with pytest.raises(FileExistsError, match="another preparation was begun"):
            prepare(files, tmp_path / "out", val_fraction=0.2)
        assert prepare(files, tmp_path / "out").digest == expected
        assert [number for number in made if number >= 0] == sorted(set(made) - {-1})

    def test_finished(self, files: list[Path], tmp_path: Path) -> None:
        first = prepare(files, tmp_path / "out")
        before = (tmp_path / "out/train.bin").stat().st_mtime_ns
        assert prepare(files, tmp_path / "out").digest == first.digest
        assert (tmp_path / "out/train.bin").stat().st_mtime_ns == before
        files[0].write_text("changed\n" * 100)
        with pytest.raises(FileExistsError, match="holds other tokens"):
            prepare(files, tmp_path / "out")

    def test_files_of_others_are_left_alone(self, files: list[Path], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/train.bin").write_bytes(b"12")
        with pytest.raises(FileExistsError, match=r"token files without meta\.json"):
            prepare(files, tmp_path / "out")
        assert (tmp_path / "out/train.bin").read_bytes() == b"12"

    @pytest.mark.parametrize(("workers", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT), (2, signal.SIGKILL)])
    def test_after_a_signal(self, tmp_path: Path, workers: int, number: signal.Signals) -> None:
        code = (
            "import sys, time\n"
            "from structlin_nn.data import text\n"
            "text.PIECE = text.SHARD = 20_000\n"
            "original = text._Encode.__call__\n"
            "text._Encode.__call__ = lambda self, n: (time.sleep(0.1), original(self, n))[1]\n"
            "from structlin_nn.cli import main\n"
            f"sys.exit(main(['prepare', 'text', '--pydoc', '--out', 'out', '--tokenizer', 'bytes', '--quiet',"
            f" '--workers', '{workers}']))"
        )
        environment = os.environ | {"PYTHONPATH": str(Path(structlin_nn.__file__).parents[1])}
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
        work = tmp_path / "out" / WORK
        deadline = time.monotonic() + 60
        while len(list(work.glob("*.tokens"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 128 + number
            assert f"{number.name}; what is done is kept".encode() in err
        done = {path: path.stat().st_mtime_ns for path in work.glob("*.tokens")}
        assert 3 <= len(done) < len(json.loads((work / "job.json").read_text())["documents"])
        again = code.replace("time.sleep(0.1)", "0")
        subprocess.run([sys.executable, "-c", again], cwd=tmp_path, env=environment, check=True, capture_output=True)
        expected = prepare(None, tmp_path / "whole")
        assert (tmp_path / "out/train.bin").read_bytes() == expected.train.tobytes()
        assert (tmp_path / "out/val.bin").read_bytes() == expected.val.tobytes()


class TestDamage:
    def test_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"fine\n" * 10 + b"\xff" + b"fine\n" * 10)
        with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 at byte 50"):
            prepare([tmp_path / "a.txt"], tmp_path / "out")

    def test_files(self, tmp_path: Path) -> None:
        (tmp_path / "empty").touch()
        for given, error, message in (
            ([], ValueError, "at least one text file"),
            ([tmp_path / "nowhere"], FileNotFoundError, "nowhere does not exist"),
            ([tmp_path], ValueError, "is a folder; name its files"),
            ([tmp_path / "empty"], ValueError, "empty is empty"),
        ):
            with pytest.raises(error, match=message):
                prepare(given, tmp_path / "out")

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
    def test_fraction(self, files: list[Path], tmp_path: Path, fraction: float) -> None:
        with pytest.raises(ValueError, match="val_fraction must be above 0 and below 1"):
            prepare(files, tmp_path / "out", val_fraction=fraction)

    def test_too_short_for_two_splits(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("ab")
        with pytest.raises(ValueError, match="the val split would be empty"):
            prepare([tmp_path / "a"], tmp_path / "out", val_fraction=0.1)
        assert prepare([tmp_path / "a"], tmp_path / "out", val_fraction=0.5).val.tolist() == [98, END]


class TestParallel:
    def test_the_first_error_ends_it(self) -> None:
        for workers in (1, 2):
            with pytest.raises(ValueError, match="invalid literal"):
                run_parallel(int, ["1", "x", *["2"] * 50], workers=workers)

    def test_interrupted(self) -> None:
        done: list[str] = []

        def note(item: str, _: int) -> None:
            done.append(item)
            if len(done) == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        for workers in (1, 2):
            done.clear()
            with pytest.raises(Interrupted, match="SIGTERM"):
                run_parallel(int, map(str, range(1000)), workers=workers, done=note)
            assert 3 <= len(done) < 50
