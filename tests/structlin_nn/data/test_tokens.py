"""Token files, random batches and whole splits."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structlin_nn.data import tokens as tokens_module
from structlin_nn.data.tokens import IGNORE, evaluation_batches, open_tokens, token_batch, token_vocabulary


def write(folder: Path, train: np.ndarray, val: np.ndarray, **meta: object) -> Path:
    folder.mkdir(exist_ok=True)
    train.astype("<u2").tofile(folder / "train.bin")
    val.astype("<u2").tofile(folder / "val.bin")
    if meta:
        (folder / "meta.json").write_text(json.dumps({"version": 1, **meta}), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    return write(tmp_path / "corpus", rng.integers(0, 300, 1000), rng.integers(0, 300, 101))


def stated(folder: Path) -> dict[str, dict[str, object]]:
    """What meta.json says of the two splits."""
    raw = {name: (folder / f"{name}.bin").read_bytes() for name in ("train", "val")}
    return {name: {"tokens": len(b) // 2, "sha256": hashlib.sha256(b).hexdigest()} for name, b in raw.items()}


class TestOpen:
    def test_files_of_nanogpt(self, folder: Path) -> None:
        data = open_tokens(folder)
        assert (data.vocab_size, data.name, len(data.train), len(data.val)) == (50257, "corpus", 1000, 101)
        assert data.train.dtype == np.uint16
        assert isinstance(data.train, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            data.train[0] = 1
        rng = np.random.default_rng(0)
        assert data.train.tolist() == rng.integers(0, 300, 1000).tolist()

    def test_meta(self, folder: Path) -> None:
        splits = stated(folder)
        meta = {"version": 1, "name": "toy", "vocab_size": 300, "tokenizer": "bytes", "end_of_text": 256, **splits}
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        data = open_tokens(folder)
        assert (data.vocab_size, data.name, data.tokenizer, data.end_of_text) == (300, "toy", "bytes", 256)
        assert token_vocabulary(folder) == 300
        with pytest.raises(ValueError, match=r"vocab_size is 400, but .*meta\.json states 300"):
            open_tokens(folder, vocab_size=400)

    def test_digest_is_that_of_the_tokens(self, folder: Path, tmp_path: Path) -> None:
        digest = open_tokens(folder).digest
        train, val = np.fromfile(folder / "train.bin", "<u2"), np.fromfile(folder / "val.bin", "<u2")
        assert open_tokens(write(tmp_path / "copy", train, val), vocab_size=300).digest == digest
        val[3] ^= 1
        assert open_tokens(write(tmp_path / "other", train, val)).digest != digest

    @pytest.mark.parametrize("name", ["train.bin", "val.bin"])
    def test_missing_empty_odd(self, folder: Path, name: str) -> None:
        path = folder / name
        raw = path.read_bytes()
        path.write_bytes(raw[:-1])
        with pytest.raises(ValueError, match=rf"{name} has {len(raw) - 1} bytes; .*empty or truncated"):
            open_tokens(folder)
        path.write_bytes(b"")
        with pytest.raises(ValueError, match=rf"{name} has 0 bytes"):
            open_tokens(folder)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=rf"{name} is missing"):
            open_tokens(folder)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            open_tokens(tmp_path / "nowhere")

    def test_token_out_of_range(self, tmp_path: Path) -> None:
        tokens = np.arange(50)
        tokens[17] = 299
        write(tmp_path, np.arange(50), tokens)
        with pytest.raises(ValueError, match=r"val\.bin: token 17 is 299, outside the vocabulary of 256"):
            open_tokens(tmp_path, vocab_size=256)
        tokens[17] = 50257
        write(tmp_path, np.arange(50), tokens)
        with pytest.raises(ValueError, match="token 17 is 50257, outside the vocabulary of 50257"):
            open_tokens(tmp_path)

    def test_truncated_or_changed_under_meta(self, folder: Path) -> None:
        splits = stated(folder)
        (folder / "meta.json").write_text(json.dumps({"version": 1, **splits}), encoding="utf-8")
        raw = bytearray((folder / "train.bin").read_bytes())
        (folder / "train.bin").write_bytes(raw[:-2])
        with pytest.raises(ValueError, match=r"has 999 tokens, meta\.json states 1000"):
            open_tokens(folder, digest="x")
        raw[7] ^= 1
        (folder / "train.bin").write_bytes(raw)
        with pytest.raises(ValueError, match="sha256"):
            open_tokens(folder)

    def test_what_another_process_found_is_believed(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = open_tokens(folder)
        monkeypatch.setattr(tokens_module, "_scan", lambda *_: pytest.fail("tokens were read"))
        again = open_tokens(folder, digest=data.digest)
        assert again.digest == data.digest
        assert again.val.tolist() == data.val.tolist()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is damaged"),
            ("[]", "is damaged"),
            ('{"version": 2}', "not of version 1"),
            ('{"version": 1, "vocab_size": 0}', "at least 1, got 0"),
            ('{"version": 1, "end_of_text": "many"}', "is damaged"),
            ('{"version": 1, "train": 3}', "is damaged"),
        ],
    )
    def test_damaged_meta(self, folder: Path, text: str, message: str) -> None:
        (folder / "meta.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            open_tokens(folder)

    def test_pickles_are_not_read(self, folder: Path) -> None:
        (folder / "meta.pkl").write_bytes(b"cos\nabort\n(tR.")
        with pytest.raises(ValueError, match=r"meta\.pkl.*not read: pass vocab_size"):
            open_tokens(folder)
        assert open_tokens(folder, vocab_size=300).vocab_size == 300

    def test_vocabulary_must_fit(self, folder: Path) -> None:
        assert open_tokens(folder, vocab_size=2**16).vocab_size == 2**16
        for size, error in ((2**16 + 1, ValueError), (0, ValueError), (1.5, TypeError)):
            with pytest.raises(error, match="vocab_size must be"):
                open_tokens(folder, vocab_size=size)  # type: ignore[arg-type]


class TestBatches:
    tokens = np.random.default_rng(1).integers(0, 2**16, 537).astype(np.uint16)

    def batch(self, **changes: int) -> tuple[np.ndarray, np.ndarray]:
        settings = {"block_size": 7, "batch_size": 6, "seed": 3, "step": 0, **changes}
        return token_batch(self.tokens, **settings)  # type: ignore[arg-type]

    def test_pieces_of_the_text(self) -> None:
        for step in range(5):
            x, y = self.batch(step=step)
            assert x.shape == y.shape == (6, 7)
            assert x.dtype == y.dtype == np.int64
            # The places are fixed for ever.
            raw = np.random.Philox(np.random.SeedSequence([3, step])).random_raw(6)
            for row, start in enumerate(int(n) % (537 - 7) for n in raw):
                assert x[row].tolist() == self.tokens[start : start + 7].tolist()
                assert y[row].tolist() == self.tokens[start + 1 : start + 8].tolist()

    def test_every_place_is_drawn_evenly(self) -> None:
        tokens = np.arange(20, dtype=np.uint16)
        x, y = token_batch(tokens, block_size=7, batch_size=1300, seed=0, step=0)
        counts = np.bincount(x[:, 0], minlength=13)
        assert len(counts) == 13
        # 12 degrees of freedom: beyond 40 once in 10,000 seeds, and this seed is fixed.
        assert ((counts - 100) ** 2 / 100).sum() < 40
        assert y.max() == 19

    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 6]), st.integers(0, 1000))
    def test_processes_share_one_batch(self, seed: int, world: int, step: int) -> None:
        whole = self.batch(seed=seed, step=step)
        parts = [self.batch(seed=seed, step=step, rank=rank, world_size=world) for rank in range(world)]
        for i in range(2):
            np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), whole[i])

    def test_seeds_and_steps_differ(self) -> None:
        first, _ = self.batch()
        assert (self.batch(step=1)[0] != first).any()
        assert (self.batch(seed=4)[0] != first).any()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"block_size": 537}, "537 tokens are too few"),
            ({"block_size": 0}, "block_size must be at least 1"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"world_size": 4}, "batch_size 6 .* cannot be shared equally by 4"),
            ({"rank": 2, "world_size": 2}, "rank must be below world_size 2, got 2"),
            ({"seed": -1}, "seed must not be negative"),
            ({"step": -1}, "step must not be negative"),
        ],
    )
    def test_bad_values(self, changes: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.batch(**changes)

    def test_bad_tokens(self, folder: Path) -> None:
        for tokens in (np.zeros(9), np.zeros((3, 3), dtype=np.uint16), [1, 2, 3], open_tokens(folder)):
            with pytest.raises(TypeError, match="integer array of one axis"):
                token_batch(tokens, block_size=2, batch_size=1, seed=0, step=0)  # type: ignore[arg-type]


class TestEvaluation:
    tokens = np.random.default_rng(2).integers(0, 11, 358).astype(np.uint16)

    @settings(deadline=None, max_examples=60)
    @given(st.integers(2, 90), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4))
    def test_every_token_is_a_target_once(self, size: int, block: int, each: int, world: int) -> None:
        tokens = np.arange(1000, 1000 + size, dtype=np.uint16)
        parts = [
            list(evaluation_batches(tokens, block_size=block, batch_size=each * world, rank=rank, world_size=world))
            for rank in range(world)
        ]
        for batches in zip(*parts, strict=True):
            assert len({x.shape for x, _ in batches}) == 1
            assert batches[0][0].shape[0] <= each
        seen = np.concatenate([y[y != IGNORE] for part in parts for _, y in part])
        assert sorted(seen.tolist()) == list(range(1001, 1000 + size))
        for x, y in itertools.chain(*parts):
            assert (y - x)[y != IGNORE].tolist() == [1] * int((y != IGNORE).sum())
            assert world > 1 or (y != IGNORE).all()
            assert (x >= 0).all()  # inputs of rows that only fill a batch are tokens, too

    @settings(deadline=None, max_examples=40)
    @given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 4))
    def test_the_pieces_do_not_depend_on_the_batch(self, sequences: int, each: int, world: int) -> None:
        """However many parts a step has, and whatever the processes: losses of one record are of one set."""

        def pieces(batch_size: int, world: int) -> list[list[int]]:
            size = {"block_size": 5, "batch_size": batch_size, "sequences": sequences, "world_size": world}
            parts = [evaluation_batches(self.tokens, rank=rank, **size) for rank in range(world)]
            return sorted(y.tolist() for part in parts for _, rows in part for y in rows if y[0] != IGNORE)

        assert pieces(each * world, world) == pieces(sequences, 1)
        assert len(pieces(each * world, world)) == sequences

    def test_mean_loss_is_that_of_the_split(self) -> None:
        # A model that knows only the token before: its loss does not depend on how the text is cut.
        table = np.log(np.random.default_rng(0).dirichlet(np.ones(11), 11))
        expected = np.mean([table[a, b] for a, b in itertools.pairwise(self.tokens)])
        for world in (1, 2):
            total = 0.0
            for rank in range(world):
                for x, y in evaluation_batches(self.tokens, block_size=5, batch_size=4, rank=rank, world_size=world):
                    total += table[x[y != IGNORE], y[y != IGNORE]].sum()
            assert total / (len(self.tokens) - 1) == pytest.approx(expected, rel=1e-12)

    def test_refuses_before_the_first_batch(self) -> None:
        with pytest.raises(ValueError, match="at least 2 tokens"):
            evaluation_batches(np.zeros(1, dtype=np.uint16), block_size=4, batch_size=1)
        with pytest.raises(ValueError, match="sequences must be at least 1"):
            evaluation_batches(self.tokens, block_size=4, batch_size=1, sequences=0)
