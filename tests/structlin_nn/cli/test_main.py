"""The command line: one line on misuse, exit code 2, JSON where a table is printed."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.children import output

import structlin
import structlin_nn
from structlin_nn import counting, models
from structlin_nn._replacement import PRESETS
from structlin_nn.cli import common, main
from structlin_nn.cli.count import PRODUCT_DTYPES
from structlin_nn.cli.main import COMMANDS
from structlin_nn.cli.train import parse

Captured = Callable[[], tuple[str, str]]


@pytest.fixture
def captured(capsys: pytest.CaptureFixture[str]) -> Captured:
    return lambda: tuple(capsys.readouterr())  # type: ignore[return-value]


MISUSE = {
    "": "a command is needed: demo, prepare, train, ",
    "trian": "unknown command 'trian' (did you mean train?)",
    "--hlep": "unknown option --hlep (did you mean --help?)",
    "structures --jsn": "unknown option --jsn (did you mean --json?)",
    "structures extra": "unrecognized arguments: extra",
    "count": "the following arguments are required: MODEL, --width",
    "count cifar-mlp": "the following arguments are required: --width",
    "count cifar-mlp --width": "argument --width: expected one argument",
    "count cifar-mlp --width 6.5": "argument --width: invalid int value: '6.5'",
    "count cifar-mlp --widht 64": "unknown option --widht (did you mean --width?)",
    "count --widht 64 cifar-mlp": "unknown option --widht (did you mean --width?)",
    "count cifar-mlp --wid 64": "unknown option --wid (did you mean --width?)",
    "count cifar-mpl --width 64": "unknown model 'cifar-mpl' (did you mean cifar-mlp?)",
    "count cifar-mlp --width 64 --structure monarch --rank 2": "structure 'monarch' has no option 'rank'",
    "count cifar-mlp --width 64 --structure kronekcer": "unknown structure 'kronekcer'",
    "count cifar-mlp --width 64 --heads 4": "model 'cifar-mlp' has no size 'heads'",
    "count cifar-mlp --width 0": "width must be a positive integer, got 0",
    "count cifar-mlp --width 64 --structure kronecker --factorization gready": "unknown factorization 'gready'",
    "count cifar-mlp --width 64 --structure low_rank --rank x": "must be an integer or several with commas, got 'x'",
    "count cifar-mlp --width 64 --structure einsum --option theta": "must be NAME=JSON, got 'theta'",
    "count cifar-mlp --width 64 --structure einsum --option theta=[1": "the value of theta must be JSON",
    "count cifar-mlp --width 64 --structure low_rank --rank 2 --option rank=3": "the structure is given twice: 2 and 3",
    "train": "the following arguments are required: NAME",
    "train cifr": "unknown name 'cifr' (did you mean cifar?)",
    "train cifar --data nowhere": "nowhere does not exist; expected cifar-10-batches-bin",
    "train cifar --data nowhere --data-set cifar100": "nowhere does not exist; expected cifar-100-binary",
    "train cifar --data nowhere --data-set fashion": "fashion is embedded in the package and takes no root",
    "train cifar --data-set fashion --unverified": "fashion is embedded in the package and always verified",
    "train cifar --data-set cifar10": "no place given for cifar10",
    "train cifar --width 29 --structure kronecker": "29 cannot be split into 2 factors by rule 'greedy'",
    "train cifar --batch-size 20000": "10000 images are less than one batch of 20000",
    "demo --seed -1": "seed must be at least 0, got -1",
    "demo --workers 0": "argument --workers: must be a positive integer, got '0'",
    "demo --out file": "--out must be a folder, and file is a file",
    "demo --qick": "unknown option --qick (did you mean --quick?)",
}


@pytest.mark.parametrize(("line", "message"), MISUSE.items(), ids=MISUSE)
def test_misuse_is_one_line_and_code_2(line: str, message: str, misuse, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    err = misuse(line)
    assert err.startswith("structlin")
    assert message in err
    assert err.endswith("--help)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names_are_those_of_the_library() -> None:
    assert tuple(models.MODELS) == common.MODELS
    assert common.LAYERS == tuple(models.LAYER_PRESETS) == tuple(PRESETS)
    assert (*counting.DEVICES, "cpu") == common.DEVICES
    assert set(common.SIZES) <= {name for spec in models.MODELS.values() for name in spec.options}
    assert all(hasattr(torch, name) for name in (*common.DTYPES, *PRODUCT_DTYPES))


def test_an_error_of_the_system_is_no_misuse(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"{COMMANDS['structures']}.run", full)
    assert main(["structures"]) == 1
    assert captured() == ("", "structlin structures: [Errno 28] No space left on device\n")


class TestHelp:
    @pytest.mark.parametrize("command", ["", *COMMANDS])
    def test_has_examples_that_parse(self, command: str, captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
        assert main([*command.split(), "--help"]) == 0
        out, err = captured()
        assert err == ""
        whole = re.sub(r"\\\n *", "", out)
        examples = [line.strip().split("  ")[0] for line in whole.splitlines() if line.startswith("  structlin ")]
        assert len(examples) >= 2
        for example in examples:
            words = shlex.split(example)[1:]
            if words[0] == "train":
                if "--init-from" not in words and words[1] not in ("--list", "NAME"):
                    parse(words[1], words[2:])
                continue
            monkeypatch.setattr(f"{COMMANDS[words[0]]}.run", lambda arguments: 0)
            assert main(words) == 0, example

    def test_imports_neither_torch_nor_jax(self) -> None:
        code = (
            "import sys; from structlin_nn.cli import main\n"
            "for line in (['--help'], ['train', '--help'], ['demo', '--help'], ['count', '--help']): main(line)\n"
            "print([name for name in ('torch', 'jax', 'cola', 'matplotlib', 'numpy') if name in sys.modules])"
        )
        assert output("-c", code, PYTHONPATH=str(Path(structlin_nn.__file__).parents[1])).splitlines()[-1] == "[]"

    def test_version(self, captured: Captured) -> None:
        assert main(["--version"]) == 0
        assert captured()[0].startswith("structlin ")


class TestStructures:
    def test_json_has_them_all(self, captured: Captured) -> None:
        assert main(["structures", "--json"]) == 0
        found = json.loads(captured()[0])
        assert [entry["name"] for entry in found] == list(structlin.structure_names())
        assert all(set(entry) == {"name", "summary", "formula", "parameters", "options", "source"} for entry in found)
        monarch = next(entry for entry in found if entry["name"] == "monarch")
        assert monarch["options"] == {"blocks": 4}
        assert monarch["formula"] == structlin.Monarch.formula

    def test_list_shows_them_all(self, captured: Captured) -> None:
        assert main(["structures"]) == 0
        out, err = captured()
        assert err == ""
        for name in structlin.structure_names():
            assert f"\n{name}\n" in out
            assert " ".join(structlin.structure_class(name).formula.split()) in " ".join(out.split())

    def test_a_closed_pipe_is_no_error(self) -> None:
        code = (
            "import sys; from structlin_nn.cli import main, structures; structures.run = lambda _: print('x' * 99)\n"
            "sys.exit(main(['structures']))"
        )
        environment = os.environ | {"PYTHONPATH": str(Path(structlin_nn.__file__).parents[1])}
        with subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            errors = process.stderr.read()
        assert process.returncode == 0
        assert errors == b""


class TestCount:
    def test_json(self, captured: Captured) -> None:
        line = "count cifar-mlp --width 128 --structure block_tensor_train --rank 2 --factorization greedy --json"
        assert main(line.split()) == 0
        record = json.loads(captured()[0])
        chain = [(128, 3072), *[(512, 128), (128, 512)] * 3]
        options = {"rank": 2, "factorization": "greedy"}
        macs = [structlin.design("block_tensor_train", shape, **options).macs for shape in chain]
        assert record["forward_macs"] == sum(macs) + 128 * 10
        assert [layer["macs"] for layer in record["layers"]] == [*macs, 1280]

    @pytest.mark.parametrize(
        "line",
        [
            "cifar-vit --width 64 --structure low_rank --rank-fraction 0.1 --num-classes 100 --layers intermediate",
            "imagenet-vit --width 64 --base-width 32 --structure monarch --blocks 4 --depth 1 --heads 2 --head-dim 16",
            "gpt2 --width 96 --structure tensor_train --rank 3 --cores 3 --rms-cap --layers all --depth 1 --context 16",
            "cifar-mlp --width 60 --structure block_tensor_train --cores 3 --rank 2,3 --optimizer sgd",
            "cifar-mlp --width 64 --structure einsum --option theta=[0.5,0,0.5,0,0.5,0.5,0]",
        ],
    )
    def test_options_reach_the_count(self, line: str, captured: Captured) -> None:
        assert main(["count", *line.split(), "--json"]) == 0
        record = json.loads(captured()[0])
        words = line.split()
        assert record["model"] == words[0]
        assert str(record["width"]) == words[2]
        for flag, key in (("--layers", "layers_preset"), ("--optimizer", "optimizer"), ("--base-width", "base_width")):
            if flag in words:
                assert str(record[key]) == words[words.index(flag) + 1]
        for flag in ("--num-classes", "--heads", "--head-dim", "--depth", "--context"):
            if flag in words:
                assert str(record["sizes"][flag[2:].replace("-", "_")]) == words[words.index(flag) + 1]
        assert record["rms_cap"] == ("--rms-cap" in words)
        assert main(["count", *words]) == 0
        assert f"{record['forward_macs']:,}" in captured()[0]
