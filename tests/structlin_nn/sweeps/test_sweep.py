"""Sweeps: what they expand to, and those of the paper."""

import ast
from pathlib import Path

import pytest
from helpers.refusals import refused

import structlin_nn.configs
from structlin_nn.cli.train import parse
from structlin_nn.recipes import recipe
from structlin_nn.recipes.cifar import Config, Options
from structlin_nn.sweeps import Sweep, find, grid, merge, names, zipped
from structlin_nn.sweeps.local import Job
from structlin_nn.sweeps.submit import command, words


class TestOverlays:
    def test_grid(self) -> None:
        assert len(grid(a=[1, 2], b=[3], c=[4, 5, 6])) == 6
        assert grid() == [{}]

    def test_mistakes(self) -> None:
        refused(ValueError, r"equally many values, got \{'a': 2, 'b': 1\}", zipped, a=[1, 2], b=[3])
        refused(ValueError, "a is set by two", merge, [{"a": 1}], [{"a": 2}])
        refused(ValueError, "has no overlays", Sweep(name="x", about="", model="cifar-mlp", overlays=[]).runs)

    def test_runs_that_differ_need_names_that_do(self) -> None:
        overlays = [{"structure": "monarch", "options": {}, "width": 8}, {"structure": "monarch", "width": 8.0}]
        with pytest.raises(TypeError, match="width must be int"):
            Sweep(name="x", about="", model="cifar-mlp", overlays=overlays).runs()
        same = [{"structure": "kronecker", "options": {"factorization": rule}} for rule in ("greedy", "balanced")]
        with pytest.raises(ValueError, match="two runs of sweep 'x' have the name 'kronecker' and differ in options"):
            Sweep(name="x", about="", model="cifar-mlp", overlays=same).runs()

    def test_changes_go_before_overlays(self) -> None:
        sweep = Sweep(name="x", about="", model="cifar-mlp", overlays=grid(width=[8, 16], seed=[0, 1]))
        runs = sweep.runs({"seed": 7, "epochs": 1, "eval_every": 1})
        assert {name: (config.width, config.seed) for name, config in runs.items()} == {"w8": (8, 7), "w16": (16, 7)}


class TestPaper:
    """The sweeps of `structlin_nn.configs`."""

    def test_names(self) -> None:
        assert names() == ["cifar-mlp", "cifar-vit", "delta-h", "gpt2", "imagenet", "lr-landscape"]
        with pytest.raises(ValueError, match=r"unknown sweep 'deltah' \(did you mean delta-h"):
            find("deltah")

    @pytest.mark.parametrize("name", names())
    def test_files_say_command_time_and_result(self, name: str) -> None:
        sweep = find(name)
        assert sweep.name == name
        path = Path(structlin_nn.configs.__path__[0]) / f"{name.replace('-', '_')}.py"
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text is not None
        for word in (f"structlin sweep {name}", "\nTime: ", "\nPaper: ", "\nResult: "):
            assert word in text
        configs = sweep.runs()
        assert len(configs) == len(sweep.overlays)
        assert {type(config) for config in configs.values()} == {type(recipe(sweep.model))}

    def test_widths_of_the_paper(self) -> None:
        """Those for which the paper reports results."""
        btt, monarch = "block_tensor_train", "monarch"
        greedy = {"factorization": "greedy"}
        paper = [
            *[("dense", {}, width) for width in (80, 192, 384)],
            *[(btt, {"rank": 1, **greedy}, width) for width in (256, 784, 1936)],
            *[(btt, {"rank": 2, **greedy}, width) for width in (144, 484, 1296)],
            *[(monarch, {"blocks": 4}, width) for width in (140, 316, 632)],
            *[(monarch, {"blocks": 16}, width) for width in (632, 1264)],
        ]
        assert [(c.structure, c.options, c.width) for c in find("imagenet").runs().values()] == paper
        gpt2 = list(find("gpt2").runs().values())
        assert [c.width for c in gpt2] == [384, 512, 768, 1024, 1536, 2048, 2560]
        assert [c.structure for c in gpt2] == ["dense"] * 3 + [btt] * 4
        assert [c.rms_cap for c in gpt2] == [False] * 3 + [True] * 4
        assert {c.steps * c.batch_size * c.context for c in gpt2} == {600_000 * 480 * 512}

    def test_delta_h_is_the_papers(self) -> None:
        configs = find("delta-h").runs()
        assert {(c.depth, c.bias, c.steps, c.batch_size, c.lr) for c in configs.values()} == {
            (2, False, 500, 1024, 3e-3)
        }
        assert {c.width for c in configs.values()} >= {16, 4096}
        assert all(c.structure_aware for c in configs.values() if c.structure == "dense")
        assert len(configs) == 5 * (1 + 4 * 2)


class TestCommands:
    @pytest.mark.parametrize("name", names())
    def test_give_the_configuration_back(self, name: str) -> None:
        for config in list(find(name).runs({"seed": 3}).values())[::5]:
            job = Job(config, None)
            made = words(Job(config, job.recipe.Options(out=Path("x"), data=Path("y"))))
            module, again, options = parse(made[2], made[3:])
            assert module is job.recipe
            assert again == config
            assert (options.out, options.data, options.resume, options.quiet) == (Path("x"), Path("y"), True, True)

    def test_command(self, tmp_path: Path) -> None:
        config = Config(width=8, structure="monarch", options={"blocks": 2})
        job = Job(config, Options(out=tmp_path / "a b", data=Path("my data"), unverified=True))
        text = command(job, ["torchrun", "--no-python"])
        assert text.startswith("torchrun --no-python structlin train cifar-mlp --structure monarch --data-set ")
        assert "--options blocks=2" in text
        assert "--data 'my data' --unverified" in text
        assert f"--out '{tmp_path / 'a b'}' --resume --quiet" in text
        from structlin_nn.recipes import imagenet

        timm = command(Job(recipe("timm:vit_x"), imagenet.Options(out=tmp_path, data=Path("d"))))
        assert timm.startswith("structlin train imagenet --model timm:vit_x --data d")
