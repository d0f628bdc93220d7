"""The recipes in flax are those in torch, to rounding; an interrupted run is bit-identical to one that was not."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from structlin_nn.checkpoints import read_checkpoint
from structlin_nn.recipes import recipe_module
from structlin_nn.records import read_record
from structlin_nn.trained import load_trained, open_trained


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs of one configuration share what XLA compiles, without optimization."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def both(name: str, config: Any, options: dict[str, Any], folder: Path) -> list[tuple[list[float], Any]]:
    """Losses and record of the recipe in torch and in flax."""
    found = []
    for module in (recipe_module(name), recipe_module(f"flax_{name}")):
        losses: list[float] = []
        result = module.train(
            module.Config.from_dict(config.to_dict()),
            module.Options(**options, quiet=True, out=folder / module.__name__),
            watch=lambda run, loss, losses=losses: losses.append(loss),
        )
        found.append((losses, read_record(result.record)))
    return found


def assert_close(found: list[tuple[list[float], Any]]) -> None:
    (one, torchs), (two, flaxs) = found
    assert two == pytest.approx(one, rel=2e-4)
    for a, b in zip(torchs.evaluations, flaxs.evaluations, strict=True):
        for key in (key for key in a if key.endswith("loss")):
            assert b[key] == (None if a[key] is None else pytest.approx(a[key], rel=1e-3)), key
        assert b["statistics"]["gains"] == pytest.approx(a["statistics"]["gains"], rel=2e-2, abs=1e-4)
    assert flaxs.header["counts"] == torchs.header["counts"]
    assert flaxs.header["structures"] == torchs.header["structures"]
    assert (torchs.header["recipe"], f"flax_{torchs.header['recipe']}") == (
        torchs.header["task"],
        flaxs.header["recipe"],
    )
    assert "flax" in flaxs.header["versions"]


# One network for all tests of cifar, so that it is compiled once.
MLP = {"epochs": 2, "width": 32, "depth": 1, "rms_cap": True, "accumulate": 2, "ema": 0.9, "clip": 0.5}
VIT = {**MLP, "model": "cifar-vit", "optimizer": "adamw", "weight_decay": 0.05}


@pytest.mark.parametrize("changes", [MLP, pytest.param(VIT, marks=pytest.mark.slow)], ids=["mlp", "vit"])
def test_cifar_is_the_run_in_torch(changes: dict[str, Any], config: Any, small_cifar: Path, tmp_path: Path) -> None:
    config = config.replace(**changes)
    assert_close(both("cifar", config, {"data": small_cifar, "unverified": True}, tmp_path))


def test_gpt2_is_the_run_in_torch(gpt2_config: Any, text_tokens: Path, tmp_path: Path) -> None:
    config = gpt2_config.replace(steps=6, eval_every=3, warmup_steps=2, depth=1, accumulate=1)
    assert_close(both("gpt2", config, {"data": text_tokens}, tmp_path))


@pytest.mark.parametrize("name", ["cifar", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_resumed_results_are_bit_identical(
    name: str, config: Any, gpt2_config: Any, small_cifar: Path, text_tokens: Path, tmp_path: Path
) -> None:
    module = recipe_module(f"flax_{name}")
    config, more = {
        "cifar": (config.replace(**MLP), {"data": small_cifar, "unverified": True}),
        "gpt2": (
            gpt2_config.replace(ema=0.9, clip=0.5, depth=1, structure="low_rank", options={}), {"data": text_tokens},
        ),
    }[name]  # fmt: skip
    config, options = module.Config.from_dict(config.to_dict()), module.Options(quiet=True, **more)
    losses: dict[str, list[float]] = {"whole": [], "part": []}

    def note(which: str, end: int) -> Any:
        return lambda run, loss: losses[which].append(loss) or run.step == end

    module.train(config, replace(options, out=tmp_path / "whole"), watch=note("whole", 99))
    module.train(config, replace(options, out=tmp_path / "part"), watch=note("part", 9))
    module.train(config, replace(options, out=tmp_path / "part", resume=True), watch=note("part", 99))
    assert losses["whole"] == losses["part"]
    one, two = (read_record(tmp_path / which / "record.jsonl").evaluations for which in losses)
    assert [line | {"seconds": 0, "training_seconds": 0} for line in one] == [
        line | {"seconds": 0, "training_seconds": 0} for line in two
    ]


# Threads of orbax whose event loop is closed after the error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_the_last_checkpoint(
    config: Any, small_cifar: Path, tmp_path: Path, full_disk: Callable[[int], Any]
) -> None:
    module = recipe_module("flax_cifar")
    options = module.Options(data=small_cifar, unverified=True, quiet=True, out=tmp_path / "run", resume=True)
    own = module.Config.from_dict(config.replace(**MLP).to_dict())
    module.train(own, options, watch=lambda run, loss: run.step == 2)
    with ExitStack() as stack:

        def fill(run: Any, loss: float | None) -> None:
            if run.step == 3:
                stack.enter_context(full_disk(3_000))

        with pytest.raises(OSError, match="could not be written: File too large"):
            module.train(own, replace(options, checkpoint_minutes=0), watch=fill)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000000002"]
    assert module.train(own, options).finished


def test_damage_and_another_recipe(config: Any, small_cifar: Path, tmp_path: Path) -> None:
    module = recipe_module("flax_cifar")
    options = module.Options(data=small_cifar, unverified=True, quiet=True, out=tmp_path / "run")
    own = module.Config.from_dict(config.replace(**MLP).to_dict())
    module.train(own, options, watch=lambda run, loss: run.step == 2)
    with pytest.raises(ValueError, match="is one of flax_cifar, and this is one of cifar"):
        recipe_module("cifar").train(config, replace(options, resume=True))
    for load in (load_trained, open_trained):
        with pytest.raises(ValueError, match=r"is one of flax, which cannot be loaded as a torch model"):
            load(tmp_path / "run")
    place, state = read_checkpoint(tmp_path / "run")
    path = max((place / name for name in state["files"]), key=lambda path: path.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="has another checksum"):
        module.train(own, replace(options, resume=True))
    with pytest.raises(ValueError, match="jax does not have the device 'cuda'"):
        module.train(own.replace(device="cuda"), replace(options, out=tmp_path / "other"))
    with pytest.raises(ValueError, match="init_from is for the recipes in torch"):
        module.train(own, replace(options, init_from="x", out=tmp_path / "other"))
