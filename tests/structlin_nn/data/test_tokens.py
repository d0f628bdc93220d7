"""Token files, random batches and whole splits."""

import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from structlin_nn.data import _cache
from structlin_nn.data import tokens as tokens_module
from structlin_nn.data.tokens import IGNORE, TokenBatches, TokenData, TokenWindows, open_tokens, token_vocabulary


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
        assert open_tokens(folder, name="other").name == "other"
        with pytest.raises(ValueError, match=r"vocab_size 400 was given, .*meta\.json says 300"):
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
        with pytest.raises(ValueError, match=rf"{name} has {len(raw) - 1} bytes, which is odd"):
            open_tokens(folder)
        path.write_bytes(b"")
        with pytest.raises(ValueError, match=rf"{name} is empty"):
            open_tokens(folder)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=rf"{name} is missing"):
            open_tokens(folder)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="is no folder"):
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
        with pytest.raises(ValueError, match=r"holds 999 tokens, meta\.json says 1000"):
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

    def test_sums_that_took_long_are_kept(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        expected = open_tokens(folder).digest
        assert not (tmp_path / "cache").exists()
        monkeypatch.setattr(_cache, "SLOW_SECONDS", -1)
        assert open_tokens(folder).digest == expected
        scan = tokens_module._scan
        monkeypatch.setattr(tokens_module, "_scan", lambda *_: pytest.fail("tokens were read again"))
        assert open_tokens(folder).digest == expected
        # meta.json is still compared with them, and another vocabulary or a damaged file asks for a new look.
        (folder / "meta.json").write_text(json.dumps({"version": 1, "train": {"tokens": 1000, "sha256": "0" * 64}}))
        with pytest.raises(ValueError, match=r"train\.bin has the sha256 sum .*, meta\.json says 0000"):
            open_tokens(folder)
        (folder / "meta.json").unlink()
        monkeypatch.setattr(tokens_module, "_scan", scan)
        with pytest.raises(ValueError, match="outside the vocabulary of 200"):
            open_tokens(folder, vocab_size=200)
        (kept,) = (tmp_path / "cache/structlin").iterdir()
        for damage in ("{", "[]", "{}"):
            kept.write_text(damage)
            assert open_tokens(folder).digest == expected
        changed = np.fromfile(folder / "val.bin", "<u2")
        changed[3] ^= 1
        changed.tofile(folder / "val.bin")
        os.utime(folder / "val.bin", ns=(1, 1))
        assert open_tokens(folder).digest != expected
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
        assert open_tokens(folder).vocab_size == 50257

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is damaged"),
            ("[]", "got 'list'"),
            ('{"version": 2}', "version 1, got 2"),
            ('{"version": 1, "vocab_size": "many"}', "vocab_size is 'many'"),
            ('{"version": 1, "vocab_size": 0}', "at least 1, got 0"),
            ('{"version": 1, "train": 3}', "train must tell"),
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

    def batches(self, **changes: int) -> TokenBatches:
        return TokenBatches(self.tokens, **{"block_size": 7, "batch_size": 6, "seed": 3, **changes})  # type: ignore[arg-type]

    def test_pieces_of_the_text(self) -> None:
        batches = self.batches()
        for step in range(5):
            x, y = next(batches)
            assert x.shape == y.shape == (6, 7)
            assert x.dtype == y.dtype == torch.int64
            for row, start in enumerate(batches.offsets(step)):
                assert x[row].tolist() == self.tokens[start : start + 7].tolist()
                assert y[row].tolist() == self.tokens[start + 1 : start + 8].tolist()

    def test_every_place_is_drawn_evenly(self) -> None:
        batches = TokenBatches(self.tokens[:20], block_size=7, batch_size=1300, seed=0)
        counts = np.bincount(batches.offsets(0), minlength=13)
        assert len(counts) == 13
        # 12 degrees of freedom: beyond 40 once in 10,000 seeds, and this seed is fixed.
        assert ((counts - 100) ** 2 / 100).sum() < 40

    def test_the_last_token_is_reached(self) -> None:
        batches = TokenBatches(self.tokens[:8], block_size=7, batch_size=2, seed=0)
        assert next(batches)[1][:, -1].tolist() == [int(self.tokens[7])] * 2

    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 6]), st.integers(0, 1000))
    def test_processes_share_one_batch(self, seed: int, world: int, step: int) -> None:
        whole = self.batches(seed=seed).batch(step)
        parts = [self.batches(seed=seed, rank=rank, world_size=world).batch(step) for rank in range(world)]
        for i in range(2):
            assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])

    def test_seeds_and_steps_differ(self) -> None:
        first = self.batches().offsets(0)
        assert (self.batches().offsets(1) != first).any()
        assert (self.batches(seed=4).offsets(0) != first).any()

    def test_order_is_fixed_for_ever(self) -> None:
        assert self.batches().offsets(2).tolist() == [int(n) for n in self._independent(3, 2)]

    def _independent(self, seed: int, step: int) -> list[int]:
        raw = np.random.Philox(np.random.SeedSequence([seed, step])).random_raw(6)
        return [int(n) % (537 - 7) for n in raw]

    def test_resume_in_another_number_of_processes(self) -> None:
        batches = self.batches()
        for _ in range(3):
            next(batches)
        state = json.loads(json.dumps(batches.state_dict()))
        expected = [next(batches) for _ in range(2)]
        resumed = [self.batches(rank=rank, world_size=2) for rank in range(2)]
        for part in resumed:
            part.load_state_dict(state)
        for x, _ in expected:
            assert torch.equal(torch.cat([next(part)[0] for part in resumed]), x)

    def test_foreign_state(self) -> None:
        state = self.batches().state_dict()
        with pytest.raises(ValueError, match="seed is 4 here and 3 in the state"):
            self.batches(seed=4).load_state_dict(state)
        with pytest.raises(ValueError, match="keys"):
            self.batches().load_state_dict({"step": 1})
        with pytest.raises(ValueError, match="step must not be negative"):
            self.batches().load_state_dict({**state, "step": -1})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"block_size": 537}, "537 tokens are too few"),
            ({"block_size": 0}, "block_size must be at least 1"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"world_size": 4}, "batch_size 6 .* cannot be shared equally by 4"),
            ({"rank": 2, "world_size": 2}, "rank must be below world_size 2, got 2"),
            ({"seed": -1}, "seed must not be negative"),
        ],
    )
    def test_bad_values(self, changes: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.batches(**changes)

    def test_bad_tokens(self, folder: Path) -> None:
        bad: list[object] = [np.zeros(9), np.zeros((3, 3), dtype=np.uint16), [1, 2, 3]]
        for tokens in bad:
            with pytest.raises(TypeError, match="integer array of one axis"):
                TokenBatches(tokens, block_size=2, batch_size=1, seed=0)  # type: ignore[arg-type]
        data: TokenData = open_tokens(folder)
        with pytest.raises(TypeError, match=r"pass data\.train or data\.val"):
            TokenWindows(data, 2, 1)  # type: ignore[arg-type]


class TestWindows:
    @settings(deadline=None, max_examples=60)
    @given(st.integers(2, 90), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4))
    def test_every_token_is_a_target_once(self, size: int, block: int, per_process: int, world: int) -> None:
        tokens = np.arange(1000, 1000 + size, dtype=np.uint16)
        parts = [list(w) for w in (TokenWindows(tokens, block, per_process * world, r, world) for r in range(world))]
        assert {len(part) for part in parts} == {len(TokenWindows(tokens, block, per_process * world))}
        for batches in zip(*parts, strict=True):
            assert len({x.shape for x, _ in batches}) == 1
            assert batches[0][0].shape[0] <= per_process
        seen = torch.cat([y[y != IGNORE] for part in parts for _, y in part])
        assert seen.sort().values.tolist() == list(range(1001, 1000 + size))
        for part in parts:
            for x, y in part:
                assert (y - x)[y != IGNORE].eq(1).all()
                assert world > 1 or (y != IGNORE).all()

    def test_mean_loss_is_that_of_the_split(self) -> None:
        # A model that knows only the token before: its loss does not depend on how the text is cut.
        tokens = np.random.default_rng(2).integers(0, 11, 58).astype(np.uint16)
        table = torch.randn(11, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        log_probabilities = table.log_softmax(1).numpy()
        expected = -np.mean([log_probabilities[a, b] for a, b in itertools.pairwise(tokens)])
        for world in (1, 2):
            total = 0.0
            for rank in range(world):
                windows = TokenWindows(tokens, 5, 4, rank, world)
                for x, y in windows:
                    total += float(F.cross_entropy(table[x].flatten(0, 1), y.flatten(), reduction="sum"))
            assert total / windows.targets == pytest.approx(expected, rel=1e-12)

    def test_too_short(self) -> None:
        with pytest.raises(ValueError, match="at least 2 tokens"):
            TokenWindows(np.zeros(1, dtype=np.uint16), 4, 1)
