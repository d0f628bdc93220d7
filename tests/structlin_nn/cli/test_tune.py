"""``structlin tune``: a table or JSON of timings, files of timings, and one line on misuse."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from structlin import execution
from structlin.execution import choice, race, wisdom
from structlin_nn.cli import main

Run = Callable[..., tuple[int, str, str]]
MODULE = """
import torch
from torch import nn

def make(width):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)), torch.ones(4, width)

def by_name(width):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(width, width), nn.Linear(width, 3)

        def forward(self, *, features, rows):
            assert rows.dtype == torch.int64
            return self.last(self.first(features)[rows])

    return Model(), {"features": torch.ones(4, width), "rows": torch.arange(2)}

class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None

def pair(width):
    return nn.Sequential(nn.Linear(width, width), Pair(width, 3)), torch.ones(4, width)

def no_inputs(width):
    return nn.Linear(width, 3)
"""
OWN = "tune_models:make --width 8 --structure low_rank --rank 2"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, a module of models, and timings that take little time."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "tune_models.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "work").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("STRUCTLIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STRUCTLIN_EXECUTION", raising=False)
    monkeypatch.setattr(wisdom, "_MEMORY", {})
    monkeypatch.setattr(race, "MOST_ROUNDS", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with execution.using("compare"):  # as by default
        yield tmp_path / "cache"
    torch.set_num_threads(threads)
    choice.forget()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(line: str) -> tuple[int, str, str]:
        code = main(["tune", *line.split()])
        return code, *capsys.readouterr()

    return call


def problems() -> set[str]:
    """The problems whose timings are kept."""
    execution.export_wisdom("all.json")
    _, text = wisdom._opened(Path("all.json").read_text(encoding="utf-8"))
    return {key for key in json.loads(text)["records"] if "tokens=" in key}


class TestTable:
    def test_of_a_named_model(self, run: Run) -> None:
        code, out, err = run("cifar-mlp --width 16 --structure block_tensor_train --rank 2 --batch-size 4 --depth 2")
        assert code == 0
        lines = out.splitlines()
        head = re.split(r" {2,}", lines[0])
        assert head == ["shape", "tokens", "pass", "fastest", "ms", "next (times as long)", "chain"]
        assert set(lines[1]) == {"-", " "}
        end = lines.index("")
        rows = [re.split(r" {2,}", line) for line in lines[2:end]]
        assert len(rows) >= 4
        names = {way.name for way in choice.ways("torch")}
        for shape, tokens, kind, best, seconds, behind, chain in rows:
            assert re.fullmatch(r"\d+x\d+", shape)
            assert tokens == "4"
            assert kind in ("forward", "train")
            assert best in names
            assert float(seconds) > 0
            name, ratio = re.fullmatch(r"(\S+) \((\d+\.\d\d)\)", behind).groups()  # type: ignore[union-attr]
            assert name in names - {best}
            assert float(ratio) >= 1
            assert chain.startswith("ba,bcea->ceb; ceb,cdeb->cd ")
        assert [row[2] for row in rows] == ["forward", "train"] * (len(rows) // 2)  # the rows of a layer together
        assert max(map(len, lines)) <= 132
        assert lines[end + 1] == f"{len(rows)} problems: device cpu; dtype float32; threads 1"
        assert lines[end + 2] == f"kept in {execution.wisdom_folder()}"
        assert "problem" in err.rpartition("\r")[2]  # the progress bar

    def test_long_chains_are_cut(self, run: Run) -> None:
        code, out, _ = run("tune_models:make --width 64 --structure tensor_train --cores 6 --rank 2")
        assert code == 0
        table = out.partition("\n\n")[0].splitlines()
        assert any(line.endswith("...") for line in table)
        assert max(map(len, table)) <= 120

    def test_without_chains(self, run: Run) -> None:
        code, out, _ = run("tune_models:make --width 8")
        assert code == 0
        assert out == "nothing to tune: the model has no layer that is a chain of einsums; give --structure\n"


class TestModels:
    def test_own_function(self, run: Run, cache: Path) -> None:
        code, out, _ = run(OWN)
        assert code == 0
        assert "2 problems" in out
        assert cache in execution.wisdom_folder().parents
        kept = problems()
        # On a slow machine the run that finds the problems compares some ways first.
        assert {key.split(" 8x8 ")[1] for key in kept if " 8x8 " in key and " among " not in key} == {
            f"rows torch cpu float32 tokens=4 threads=1 {kind}" for kind in ("forward", "train")
        }

    @pytest.mark.parametrize("function", ["make", "by_name"])
    def test_dtype_of_inputs(self, run: Run, function: str) -> None:
        code, out, err = run(f"tune_models:{function} --width 8 --structure monarch --blocks 2 --dtype bfloat16 --json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert len(found) == 2
        assert all(" bfloat16 tokens=4 " in key for key in found)

    def test_threads(self, run: Run) -> None:
        code, out, _ = run(f"{OWN} --threads 2")
        assert code == 0
        assert "threads 2" in out

    def test_later_choices_are_by_the_timings(self, run: Run) -> None:
        found = json.loads(run(f"{OWN} --json")[1])
        for key, seconds in found.items():
            assert wisdom.read(key) == seconds
            assert set(seconds) <= {way.name for way in choice.ways("torch")}
            assert all(0 < value < 10 for value in seconds.values())
        text = json.loads(run(f"{OWN} --json")[1])
        assert set(text) == set(found)


class TestFiles:
    def test_round_trip(self, run: Run) -> None:
        code, out, _ = run(f"{OWN} --export wisdom.json")
        assert code == 0
        count = int(re.search(r"wrote (\d+) records to wisdom.json", out)[1])  # type: ignore[index]
        kept = problems()
        assert kept
        assert run("--forget")[:2] == (0, f"deleted {count} records in {execution.wisdom_folder()}\n")
        assert problems() == set()
        assert run("--import wisdom.json") == (0, f"added {count} records of wisdom.json\n", "")
        assert problems() == kept
        assert run("--export again.json")[:2] == (0, f"wrote {count} records to again.json\n")
        assert Path("again.json").read_text() == Path("wisdom.json").read_text()

    def test_forget_comes_before_import(self, run: Run) -> None:
        wisdom.write("one", {"products": 1.0})
        assert run("--export wisdom.json")[1] == "wrote 1 record to wisdom.json\n"
        wisdom.write("two", {"products": 1.0})
        code, out, _ = run("--forget --import wisdom.json --export again.json")
        assert code == 0
        assert [line.split()[:2] for line in out.splitlines()] == [["deleted", "2"], ["added", "1"], ["wrote", "1"]]

    def test_json_is_alone_on_stdout(self, run: Run) -> None:
        code, out, err = run(f"{OWN} --json --forget --export wisdom.json")
        assert code == 0
        assert len(json.loads(out)) == 2
        assert [line.split()[0] for line in err.splitlines()] == ["deleted", "wrote"]

    def test_another_machine(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        wisdom.write("one", {"products": 1.0})
        assert run("--export wisdom.json")[0] == 0
        monkeypatch.setattr(wisdom, "processor", lambda: {"machine": "other", "name": "other"})
        code, out, err = run("--import wisdom.json")
        assert (code, out) == (2, "")
        assert "was measured on" in err
        assert "give --any-machine to import it anyway" in err
        assert run("--import wisdom.json --any-machine")[:2] == (0, "added 1 record of wisdom.json\n")


MISUSE = {
    "": "give a model to tune, or --export, --import or --forget",
    "--width 8": "give a model to tune",
    "--forget --width 8": "--width and --structure need a model",
    "cifar-mlp": "--width is needed: the width of the model",
    "cifar-mpl --width 8": "unknown model 'cifar-mpl' (did you mean cifar-mlp?)",
    "cifar-mlp --width 0": "width must be a positive integer, got 0",
    "cifar-mlp --width 8 --heads 2": "model 'cifar-mlp' has no size 'heads'",
    "cifar-mlp --width 8 --structure kronekcer": "unknown structure 'kronekcer'",
    "cifar-mlp --width 8 --structure monarch --rank 2": "structure 'monarch' has no option 'rank'",
    "cifar-mlp --width 8 --layers al": "unknown layers 'al' (did you mean all?)",
    "cifar-mlp --width 8 --dtype bfloat": "unknown dtype 'bfloat' (did you mean bfloat16?)",
    "cifar-mlp --width 8 --batch-size 0": "--batch-size: must be a positive integer, got '0'",
    "cifar-mlp --width 8 --threads -1": "--threads: must be a positive integer, got '-1'",
    "cifar-mlp --width 8 --thread 1": "unknown option --thread (did you mean --threads?)",
    "cifar-mlp --width 8 --any-machine": "--any-machine is an option of --import",
    "cifar-mlp --width 8 --export no/wisdom.json": "--export no/wisdom.json: the folder no does not exist",
    "--import no.json": "No such file or directory: 'no.json'",
    "--import text": "text is not an export of wisdom",
    "tune_models:none --width 8": "module tune_models has no 'none'",
    "no_models:make --width 8": "no_models:make cannot be imported (No module named 'no_models')",
    "tune_models:no_inputs --width 8": "add a method example_input(batch)); return (model, inputs)",
    "tune_models:make --width 8 --rank 2": "structure 'dense' has no option 'rank'",
    "tune_models:make --width 8 --depth 2": "depth is a size of the named models",
    "tune_models:pair --width 8": "must return logits (batch, ..., classes), or an object with logits, got tuple",
}


@pytest.mark.parametrize(("line", "message"), MISUSE.items(), ids=MISUSE)
def test_misuse_is_one_line_and_code_2(line: str, message: str, misuse) -> None:
    Path("text").write_text("text")
    wisdom.write("one", {"products": 1.0})
    err = misuse("tune", *line.split())
    assert err.startswith("structlin tune: ")
    assert message in err
    assert err.endswith("--help)\n")
    assert wisdom.read("one") == {"products": 1.0}  # nothing is deleted
