"""Sampling: distributions, ends, and the command."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from structlin_nn.cli import main
from structlin_nn.data.prepare import prepare_text
from structlin_nn.generate import generate, sample
from structlin_nn.models import GPT2, StructureConfig, build_model

SIZES = {"depth": 2, "heads": 3, "vocabulary": 42, "context": 16}


def make(**changes: object) -> GPT2:
    """A model whose branches and head are drawn, for what is zero at initialisation would hide mistakes."""
    torch.manual_seed(0)
    structure = StructureConfig("block_tensor_train", {"rank": 2})
    model = build_model("gpt2", width=24, **{"structure": structure, **SIZES, **changes})  # type: ignore[arg-type]
    assert isinstance(model, GPT2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.double()


def by_hand(model: GPT2, tokens: Tensor, count: int) -> Tensor:
    """The likeliest continuation, by a whole forward pass for each token."""
    for _ in range(count):
        with torch.no_grad():
            logits = model(tokens[:, -model.config.context :])
        assert isinstance(logits, Tensor)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens


def test_batches_and_lengths_beyond_the_context() -> None:
    model = make()
    tokens = torch.randint(42, (4, 5))
    expected = by_hand(model, tokens, 25)
    assert torch.equal(generate(model, tokens, 25, temperature=0), expected)
    for row in range(4):
        assert torch.equal(generate(model, tokens[row : row + 1], 25, temperature=0), expected[row : row + 1])
    long = torch.randint(42, (2, 20))
    assert torch.equal(generate(model, long, 3, temperature=0), by_hand(model, long, 3))


def test_the_seed_decides() -> None:
    model, tokens = make(), torch.randint(42, (2, 4))
    a, b, c = (generate(model, tokens, 20, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


class TestSampling:
    logits = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0])

    def shares(self, **settings: object) -> Tensor:
        rows = self.logits.expand(200_000, 5)
        drawn = sample(rows, generator=torch.Generator().manual_seed(0), **settings)  # type: ignore[arg-type]
        return torch.bincount(drawn, minlength=5) / len(rows)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_temperature(self, temperature: float) -> None:
        expected = torch.softmax(self.logits.double() / temperature, 0)
        torch.testing.assert_close(self.shares(temperature=temperature).double(), expected, rtol=0, atol=0.005)

    @pytest.mark.parametrize(("k", "kept"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (9, [0, 1, 2, 3, 4])])
    def test_top_k(self, k: int, kept: list[int]) -> None:
        self._check(self.shares(top_k=k), kept)

    def test_top_p(self) -> None:
        probability = torch.softmax(self.logits, 0)
        first, second = float(probability[0]), float(probability[0] + probability[2])
        for p, kept in (
            (1e-6, [0]),
            (first - 0.01, [0]),
            (first + 0.01, [0, 2]),
            (second - 0.01, [0, 2]),
            (second + 0.01, [0, 1, 2]),
            (1.0, [0, 1, 2, 3, 4]),
        ):
            self._check(self.shares(top_p=p), kept)

    def test_top_p_after_top_k(self) -> None:
        # Of the two likeliest, the first has 0.73: alone enough for 0.7, and not of all five, where it has 0.53.
        self._check(self.shares(top_k=2, top_p=0.7), [0])
        self._check(self.shares(top_p=0.7), [0, 2])

    def _check(self, shares: Tensor, kept: list[int]) -> None:
        expected = torch.zeros(5)
        expected[kept] = torch.softmax(self.logits[kept], 0)
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.005)
        assert shares.nonzero().flatten().tolist() == kept

    def test_not_finite(self) -> None:
        for value in (math.nan, -math.inf):
            with pytest.raises(ValueError, match="logits are not finite"):
                sample(torch.full((1, 3), value))


def counts(tokens: Tensor) -> Tensor:
    """A model that counts up, modulo 10, of a vocabulary of 12."""
    return 50.0 * torch.nn.functional.one_hot((tokens + 1) % 10, 12)


class TestEnds:
    def test_finished_rows_are_filled(self) -> None:
        tokens = torch.tensor([[3], [7], [9]])
        found = generate(counts, tokens, 6, temperature=0, eos=9)
        assert found.tolist() == [[3, 4, 5, 6, 7, 8, 9], [7, 8, 9, 9, 9, 9, 9], [9, 0, 1, 2, 3, 4, 5]]

    def test_ends_early(self) -> None:
        assert generate(counts, torch.tensor([[6], [7]]), 50, eos=9).tolist() == [[6, 7, 8, 9], [7, 8, 9, 9]]

    def test_no_new_tokens(self) -> None:
        tokens = torch.tensor([[1, 2]], dtype=torch.int32)
        found = generate(counts, tokens, 0)
        assert (found.tolist(), found.dtype) == ([[1, 2]], torch.int64)

    def test_vocabulary(self) -> None:
        def padded(tokens: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(torch.full_like(tokens, 11), 12) * 50.0

        assert generate(padded, torch.tensor([[1]]), 1, temperature=0).tolist() == [[1, 11]]
        found = generate(padded, torch.zeros(500, 1, dtype=torch.int64), 1, vocab_size=10)
        assert found.max() < 10

    def test_mode_and_gradients(self) -> None:
        model = make()
        model.train()
        found = generate(model, torch.zeros(1, 2, dtype=torch.int64), 2)
        assert model.training
        assert not found.requires_grad

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"tokens": torch.zeros(1, 2)}, TypeError, "integer tensor, got torch.float32"),
            ({"tokens": torch.zeros(2, dtype=torch.int64)}, ValueError, r"shape \(batch, length\)"),
            ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, r"got \(1, 0\)"),
            ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be an integer of at least 0"),
            ({"top_k": 0}, ValueError, "top_k must be a positive integer"),
            ({"top_p": 0.0}, ValueError, "top_p must be above 0"),
            ({"temperature": -1.0}, ValueError, "temperature must be finite"),
        ],
    )
    def test_bad_arguments(self, settings: dict[str, object], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            generate(counts, **{"tokens": torch.zeros(1, 1, dtype=torch.int64), "max_new_tokens": 1, **settings})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "a.txt").write_text("abcdefghij " * 200)
    prepare_text([folder / "a.txt"], folder / "tokens", tokenizer="bytes", workers=1)
    line = (
        f"train gpt2 --data {folder}/tokens --out {folder}/run --quiet --width 32 --heads 2 --depth 1 --context 16"
        " --batch-size 8 --steps 60 --warmup-steps 5 --eval-every 60 --eval-sequences 8 --lr 0.03 --device cpu"
    )
    assert main(line.split()) == 0
    return folder / "run"


class TestCommand:
    def run(self, line: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert main(["generate", *line.split()]) == code
        return capsys.readouterr()  # type: ignore[return-value]

    def test_continues_what_it_learned(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out, _ = self.run(f"{trained} --prompt abcd --tokens 12 --temperature 0", capsys)
        assert out == "abcdefghij abcde\n"

    def test_samples(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        line = f"{trained} --samples 3 --tokens 9 --temperature 3 --json --endless --seed"
        out = self.run(f"{line} 1", capsys)[0]
        found = json.loads(out)
        assert (found["tokenizer"], len(found["samples"])) == ("bytes", 3)
        assert [len(entry["tokens"]) for entry in found["samples"]] == [9] * 3
        assert len({entry["text"] for entry in found["samples"]}) == 3
        assert self.run(f"{line} 1", capsys)[0] == out
        assert self.run(f"{line} 2", capsys)[0] != out

    def test_misuse(self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for line, message in (
            ("", "the following arguments are required: MODEL"),
            (f"{trained} --tokens -1", "max_new_tokens must be an integer of at least 0, got -1"),
            (f"{trained} --temperature -1", "temperature must be finite"),
            (f"{trained} --average", "has no average of its weights"),
            (f"{tmp_path}", "holds no trained model: a trained model is a folder of"),
            (f"{trained} --device nowhere", "--device must be cpu, cuda or cuda:N, got 'nowhere'"),
            (f"{trained} --samples 0", "--samples: must be a positive integer, got '0'"),
        ):
            assert message in self.run(line, capsys, code=2)[1]
