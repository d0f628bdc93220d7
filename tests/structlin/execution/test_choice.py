"""The choice of a way: policies, timings, estimates, pins, and the records on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.children import output
from torch.utils.checkpoint import checkpoint

import structlin as sl
from structlin import execution
from structlin.execution import choice, tuning, wisdom
from structlin.execution.choice import Problem, Way

STRUCTURE = sl.design("block_tensor_train", (48, 40), rank=2)
pytestmark = pytest.mark.usefixtures("own_wisdom")


def problem(tokens: int = 64, train: bool = False, dtype: str = "float32", structure=STRUCTURE) -> Problem:
    return execution.problem_of(structure, tokens, train=train, dtype=dtype, threads=1)


def names(problem: Problem) -> list[str]:
    return [c.way.name for c in choice.candidates(problem)]


class TestPolicy:
    def test_words(self) -> None:
        assert choice.policy_of("measure") == choice.Policy("measure")
        assert choice.policy_of("chunked, products") == choice.Policy("compare", ("chunked", "products"))
        assert choice.policy_of("estimate,chunked") == choice.Policy("estimate", ("chunked",))
        assert choice.policy_of("measure,-dense") == choice.Policy("measure", (), ("dense",))

    @pytest.mark.parametrize("text", ["fast", "", "estimate,-fast", "-", "--dense"])
    def test_unknown_words_are_named(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"neither a mode \(compare, estimate, measure\) nor a way \(.*products"):
            choice.policy_of(text)

    def test_environment_and_argument(self, monkeypatch) -> None:
        monkeypatch.setenv("STRUCTLIN_EXECUTION", "products")
        assert choice.choose(problem()).name == "products"
        with execution.using("token_major"):
            assert choice.choose(problem()).name == "token_major"
        assert choice.choose(problem()).name == "products"

    def test_a_wrong_environment_is_an_error_of_the_call(self, monkeypatch) -> None:
        monkeypatch.setenv("STRUCTLIN_EXECUTION", "quick")
        factors = sl.random_factors(STRUCTURE, backend="torch", dtype="float32", seed=0)
        with pytest.raises(ValueError, match="'quick' is neither a mode"):
            STRUCTURE.apply(factors, torch.ones(3, 40))

    @pytest.mark.parametrize("name", ["products", "token_major", "batched", "chunked", "compiled", "dense"])
    @pytest.mark.parametrize("train", [False, True])
    def test_a_named_way_runs_and_is_right(self, name: str, train: bool) -> None:
        structure = sl.design("block_tensor_train", (96, 60), rank=2)
        factors = sl.random_factors(structure, seed=1, backend="torch", dtype="float64")
        factors = [f.requires_grad_(train) for f in factors]
        x = torch.randn(37, 60, dtype=torch.float64)
        y = structure.apply([f.detach() for f in factors], x)
        with execution.using(name), execution.recording() as met:
            found = structure.apply(factors, x)
            assert name in names(met[0])
            assert list(execution.decisions([structure]).values())[-1:] == [name] or not met[0].train
        torch.testing.assert_close(found.detach(), y)

    def test_a_way_that_cannot_run_a_chain_gives_way_to_the_others(self) -> None:
        plain = sl.design("low_rank", (48, 40), rank=3)  # chunked passes need batch or carried axes
        with execution.using("chunked"):
            assert choice.choose(problem(structure=plain)).name != "chunked"

    def test_nothing_left(self) -> None:
        every = ",".join(f"-{name}" for name in names(problem()))
        with execution.using(every), pytest.raises(ValueError, match="leaves no way to run"):
            choice.choose(problem())


class TestTimings:
    @pytest.mark.parametrize("fastest", ["products", "token_major", "chunked", "dense"])
    def test_the_choice_follows_invented_timings(self, fastest: str) -> None:
        asked = problem()
        wisdom.write(asked.key, {name: 1e-3 if name == fastest else 2e-3 for name in names(asked)})
        choice.forget()
        assert choice.choose(asked).name == fastest
        assert "the least measured time" in execution.explain(STRUCTURE, 64, train=False, threads=1)

    def test_the_choice_follows_invented_estimates(self, monkeypatch) -> None:
        for way in choice.ways("torch"):
            monkeypatch.setattr(way, "seconds", lambda problem, way=way: 1.0 if way.name == "dense" else 5.0)
        assert choice.choose(problem()).name == "dense"

    def test_timings_of_one_way_alone_decide_nothing(self) -> None:
        asked = problem()
        estimated = names(asked)[0]
        other = names(asked)[-1]
        wisdom.write(asked.key, {other: 1e-9})
        choice.forget()
        assert choice.choose(asked).name == estimated

    def test_timings_belong_to_one_problem(self) -> None:
        asked = problem()
        wisdom.write(asked.key, {name: 1.0 if name == "dense" else 2.0 for name in names(asked)})
        choice.forget()
        assert choice.choose(asked).name == "dense"
        others = [
            problem(128),
            problem(train=True),
            problem(dtype="float64"),
            execution.problem_of(STRUCTURE, 64, threads=2),
        ]
        for other in others:
            assert other.key != asked.key
            assert choice.timings(other) == {}

    @pytest.mark.parametrize("train", [False, True])
    def test_measure_times_every_way_once(self, train: bool) -> None:
        asked = problem(train=train)
        with execution.using("measure"):
            way = choice.choose(asked)
        found = choice.timings(asked)
        assert set(found) == set(names(asked))
        assert way.name == min(found, key=lambda name: found[name])
        assert all(0 < seconds < 10 for seconds in found.values())
        again = dict(found)
        with execution.using("measure"):
            choice.choose(asked)
        assert choice.timings(asked) == again

    def test_measuring_leaves_generators_and_threads_alone(self) -> None:
        torch.manual_seed(3)
        expected, threads = torch.rand(4), torch.get_num_threads()
        torch.manual_seed(3)
        tuning.measure(problem())
        assert torch.equal(torch.rand(4), expected)
        assert torch.get_num_threads() == threads

    def test_a_way_that_fails_is_left_out(self, monkeypatch) -> None:
        way = next(way for way in choice.ways("torch") if way.name == "dense")

        def fail(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(way, "run", fail)
        found = tuning.measure(problem())
        assert "dense" not in found
        assert "products" in found

    def test_tune_meets_the_problems_of_a_call(self, capsys) -> None:
        factors = [f.requires_grad_() for f in sl.random_factors(STRUCTURE, backend="torch", dtype="float32", seed=0)]

        def run() -> None:
            with torch.no_grad():
                STRUCTURE.apply(factors, torch.ones(5, 40))
            STRUCTURE.apply(factors, torch.ones(33, 40)).sum().backward()

        found = execution.tune(run, progress=False)
        assert [("tokens=8" in key, "forward" in key) for key in found] == [(True, True), (False, False)]
        assert all("products" in timed for timed in found.values())


LONG = sl.design("block_tensor_train", (192, 180), rank=2)


class TestCompare:
    """The default policy: ways whose estimates are close are timed, if a call takes a millisecond or more."""

    @pytest.fixture
    def timed(self, monkeypatch) -> list[list[str]]:
        """Invented estimates and timings: of the ways that are close, the last one is the fastest."""
        monkeypatch.setattr(choice, "MOST", 2)
        estimates = {"products": 2e-3, "token_major": 3e-3, "compiled": 3.5e-3, "chunked": 7.9e-3, "dense": 8.1e-3}
        for way in choice.ways("torch"):
            monkeypatch.setattr(way, "seconds", lambda problem, way=way: estimates.get(way.name, 1.0))
            monkeypatch.setattr(way, "least", lambda problem: 0.0)
        met: list[list[str]] = []

        def race(problem: Problem, among: list[Way], budget: float, cold: bool) -> dict[str, float]:
            met.append([way.name for way in among])
            return {way.name: 1.0 / (k + 1) for k, way in enumerate(among)}

        monkeypatch.setattr(tuning, "_race", race)
        return met

    def test_close_ways_are_timed_once(self, timed) -> None:
        asked = problem(structure=LONG)
        assert choice.choose(asked).name == "chunked"
        assert timed == [["products", "token_major", "chunked"]]  # not the third one, which is compiled first
        wisdom._MEMORY.clear()
        assert choice.choose(asked).name == "chunked"  # from the disk
        assert len(timed) == 1
        assert choice.timings(asked) == {}  # `measure` still times all
        assert "the least time of those compared" in execution.explain(LONG, 64, train=False, threads=1)

    def test_another_process_that_was_first_decides(self, timed) -> None:
        asked = problem(structure=LONG)
        names = ["products", "token_major", "chunked"]
        monkey = {name: 1.0 if name == "token_major" else 2.0 for name in names}

        def later() -> dict[str, float]:
            choice.record_of(asked.key, names, lambda: monkey)  # written while this process measures
            wisdom._MEMORY.clear()
            return dict.fromkeys(names, 1.0)

        assert choice.record_of(asked.key, names, later) == monkey
        assert choice.choose(asked).name == "token_major"
        assert timed == []

    def test_policy_estimate_uses_estimates_alone(self, timed) -> None:
        with execution.using("estimate"):
            assert choice.choose(problem(structure=LONG)).name == "products"
        assert timed == []

    def test_excluded_ways_are_not_timed(self, timed) -> None:
        with execution.using("-token_major"):
            assert choice.choose(problem(structure=LONG)).name == "chunked"
        assert timed == [["products", "compiled", "chunked"]]

    def test_short_calls_and_clear_estimates_cost_nothing(self, timed, monkeypatch) -> None:
        short, clear = ({"products": least, "dense": other} for least, other in ((0.2e-3, 0.25e-3), (2e-3, 8.1e-3)))
        for estimates in (short, clear):
            for way in choice.ways("torch"):
                monkeypatch.setattr(way, "seconds", lambda problem, way=way, e=estimates: e.get(way.name, 1.0))
            choice.forget()
            assert choice.choose(problem(structure=LONG)).name == "products"
        assert timed == []

    def test_for_real(self, monkeypatch) -> None:
        monkeypatch.setattr(choice, "WORTH", 0.0)
        monkeypatch.setattr(choice, "CLOSE", 1e9)
        monkeypatch.setattr(choice, "FAR", 1e9)
        asked = problem(structure=LONG, train=True)
        found = enumerate(choice.candidates(asked, within=1e9))
        names = [c.way.name for place, c in found if place < choice.MOST or c.way.group != "compiled"]
        way = choice.choose(asked)
        found = choice.timings_of(f"{asked.key} among {', '.join(sorted(names))}")
        assert found.keys() == set(names)
        assert way.name == min(found, key=lambda name: found[name])
        assert execution.decisions() == {asked.key: way.name}  # from which a resumed run chooses

    @pytest.mark.parametrize("policy", ["compare", "measure"])
    def test_timings_inside_an_activation_checkpoint(self, monkeypatch, policy) -> None:
        """Its hooks count the tensors that the layer saves, and not those of the measurement."""
        monkeypatch.setattr(choice, "WORTH", 0.0)
        monkeypatch.setattr(choice, "CLOSE", 1e9)
        factors = [f.requires_grad_() for f in sl.random_factors(LONG, seed=0, backend="torch")]
        x, seen = torch.randn(64, LONG.d_in, requires_grad=True), []
        with execution.using(policy):
            y = checkpoint(lambda x: LONG.apply(factors, x), x, use_reentrant=False)
            (found,) = torch.autograd.grad(y.square().sum(), x)
            way = next(iter(execution.decisions().values()))
            with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
                y = LONG.apply(factors, x)
        (expected,) = torch.autograd.grad(y.square().sum(), x)
        assert torch.equal(found, expected), way
        assert seen  # hooks of a call see what it saves
        assert wisdom._MEMORY  # something was timed

    def test_timings_while_hooks_on_saved_tensors_are_disabled(self, monkeypatch) -> None:
        monkeypatch.setattr(choice, "WORTH", 0.0)
        with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
            choice.choose(problem(structure=LONG, train=True))
        assert wisdom._MEMORY


class TestRegistry:
    def test_one_module_adds_a_way(self, monkeypatch) -> None:
        monkeypatch.setattr(choice, "_WAYS", dict(choice._WAYS))
        calls = []

        class Mine(Way):
            name = "mine"

            def supports(self, problem: Problem) -> bool:
                return True

            def seconds(self, problem: Problem) -> float:
                return 0.0

            def run(self, structure, factors, x, bias, rows):
                calls.append(x.shape)
                return x.new_zeros(x.shape[0], structure.d_out)

        execution.register(Mine())
        factors = sl.random_factors(STRUCTURE, backend="torch", dtype="float32", seed=0)
        assert STRUCTURE.apply(factors, torch.ones(3, 40)).eq(0).all()
        assert calls == [(3, 40)]
        with pytest.raises(ValueError, match="named 'mine' is already registered"):
            execution.register(Mine())

    @pytest.mark.parametrize("name", ["estimate", "-mine", "a b", ""])
    def test_names(self, name: str) -> None:
        way = type("W", (choice.ways("torch")[0].__class__,), {"name": name})()
        with pytest.raises(ValueError, match="needs a name"):
            execution.register(way)


class TestPins:
    def test_a_pin_goes_before_timings(self) -> None:
        asked = problem()
        wisdom.write(asked.key, {name: 1.0 if name == "dense" else 2.0 for name in names(asked)})
        execution.pin({asked.key: "products"})
        assert choice.choose(asked).name == "products"
        assert execution.decisions() == {asked.key: "products"}

    def test_decisions_go_round(self) -> None:
        with execution.using("token_major"):
            choice.choose(problem())
            choice.choose(problem(structure=sl.design("kronecker", (48, 40))))
        kept = json.loads(json.dumps(execution.decisions([STRUCTURE])))
        assert list(kept.values()) == ["token_major"]
        execution.pin(kept)
        assert choice.choose(problem()).name == "token_major"

    def test_what_is_no_decision(self) -> None:
        with pytest.raises(ValueError, match="name of a way"):
            execution.pin({"a": 3})  # type: ignore[dict-item]


class TestWisdom:
    def test_other_processes_read_it(self) -> None:
        asked = problem()
        wisdom.write(asked.key, {"dense": 1.0, "products": 2.0})
        code = f"from structlin.execution import wisdom; print(wisdom.read({asked.key!r}))"
        assert output("-c", code).strip() == str({"dense": 1.0, "products": 2.0})

    def test_damage_is_seen(self) -> None:
        wisdom.write("a key", {"dense": 1.0})
        (path,) = wisdom.folder().glob("*.json")
        data = path.read_bytes()
        for place in range(0, len(data), 7):
            flipped = bytearray(data)
            flipped[place] ^= 1
            path.write_bytes(bytes(flipped))
            wisdom._MEMORY.clear()
            with pytest.warns(RuntimeWarning, match="ignored and will be measured again"):
                assert wisdom.read("a key") is None

    def test_the_first_of_two_processes_wins_where_asked(self) -> None:
        assert wisdom.write("rates", [1.0], keep=True) == [1.0]
        wisdom._MEMORY.clear()
        assert wisdom.write("rates", [2.0], keep=True) == [1.0]
        assert wisdom.write("rates", [3.0]) == [3.0]
        assert not list(wisdom.folder().glob("*.tmp"))

    def test_a_folder_that_cannot_be_written(self, tmp_path, monkeypatch) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("STRUCTLIN_CACHE", str(tmp_path / "file"))
        assert wisdom.write("a key", [1]) == [1]
        assert wisdom.read("a key") == [1]

    def test_export_and_import(self, tmp_path) -> None:
        wisdom.write("one", {"dense": 1.0})
        wisdom.write("two", {"dense": 2.0})
        file = tmp_path / "wisdom.json"
        assert execution.export_wisdom(file) == 2
        assert execution.clear_wisdom() == 2
        assert wisdom.read("one") is None
        assert execution.import_wisdom(file) == 2
        assert wisdom.read("two") == {"dense": 2.0}

    def test_of_another_processor(self, tmp_path, monkeypatch) -> None:
        wisdom.write("one", {"dense": 1.0})
        file = tmp_path / "wisdom.json"
        execution.export_wisdom(file)
        monkeypatch.setattr(wisdom, "processor", lambda: {"name": "another", "machine": "x"})
        with pytest.raises(ValueError, match="any_machine=True"):
            execution.import_wisdom(file)
        assert execution.import_wisdom(file, any_machine=True) == 1

    def test_what_is_no_export(self, tmp_path) -> None:
        file = tmp_path / "wisdom.json"
        for text in ("", "{}", '{"record": "{}", "sha256": "0"}'):
            file.write_text(text)
            with pytest.raises(ValueError, match="not an export of wisdom"):
                execution.import_wisdom(file)

    def test_processors_and_versions_have_folders_of_their_own(self, monkeypatch) -> None:
        here = wisdom.folder()
        monkeypatch.setattr(wisdom, "versions", lambda: {"torch": "0.1"})
        assert wisdom.folder() != here
        assert Path(os.environ["STRUCTLIN_CACHE"]) in here.parents


class TestExplain:
    def test_all_ways_with_times(self) -> None:
        tuning.measure(problem())
        text = execution.explain(STRUCTURE, 50, train=False, threads=1)
        head, *rows = text.splitlines()
        assert "tokens=64" in head
        assert {row.split()[0] for row in rows[1:]} == set(names(problem()))
        assert sum("<-" in row for row in rows) == 1

    def test_layers_say_their_dtype(self) -> None:
        from structlin_nn.torch import StructuredLinear

        layer = StructuredLinear(40, 48, structure="monarch", blocks=4, dtype=torch.float64)
        assert " float64 " in execution.explain(layer, 7)

    @pytest.mark.parametrize("grad", [False, True])
    def test_operators_say_the_problem_of_their_products(self, grad: bool) -> None:
        factors = [torch.ones(f.shape, dtype=torch.float64, requires_grad=grad) for f in STRUCTURE.factors]
        A = sl.StructuredOperator(STRUCTURE, factors)
        with choice.recording() as met:
            A @ torch.ones(STRUCTURE.d_in, 7, dtype=torch.float64)
        (key,) = (problem.key for problem in met)
        assert execution.explain(A, 7).splitlines()[0] == key

    def test_numpy_has_no_choice(self) -> None:
        A = sl.StructuredOperator(STRUCTURE, [np.ones(f.shape) for f in STRUCTURE.factors])
        assert "NumPy: products run by single steps" in execution.explain(A, 7)
        assert " columns torch cuda " in execution.explain(A, 7, on="h100")
        with pytest.raises(ValueError, match="without a choice"):
            execution.problem_of(STRUCTURE, 7, library="numpy")

    @pytest.mark.parametrize(
        ("what", "tokens"), [(3, 4), (STRUCTURE, 0), (STRUCTURE, 2.5), (sl.Toeplitz(np.ones(3)), 2)]
    )
    def test_wrong_arguments(self, what: object, tokens: int) -> None:
        with pytest.raises((TypeError, ValueError), match=r"structlin.Structure|at least 1|must be an integer"):
            execution.explain(what, tokens)
