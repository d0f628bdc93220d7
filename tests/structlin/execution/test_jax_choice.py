"""The choice of a way in jax: timings, policies, pins, and what runs while a program is traced."""

from __future__ import annotations

import textwrap
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.children import output

import structlin as sl
from structlin import execution
from structlin.execution import choice, jax_cpu, jax_ways, models, rates, tuning, wisdom
from structlin.execution.choice import Problem
from structlin.execution.compiled import xla

STRUCTURE = sl.design("block_tensor_train", (48, 40), rank=2)
FLAT = (1e-10,) * len(rates.BLOCKS)
INVENTED = rates.Rates(FLAT, FLAT, run=1e-10, single=1e-10, read=1e-10, fresh=1e-9, call=1e-6, item=1e-8)
CALIBRATED = jax_ways._calibrated
NAMES = [way.name for way in choice.ways("jax")]


@pytest.fixture(autouse=True)
def _invented_machine(own_wisdom, monkeypatch):
    """Estimates are of an invented machine."""
    monkeypatch.setattr(models, "rates", lambda *_: INVENTED)
    monkeypatch.setattr(jax_ways, "_calibrated", lambda *_: {})


@pytest.fixture
def measured(monkeypatch) -> list[Problem]:
    """The problems that are measured in a test."""
    found: list[Problem] = []
    original = tuning.measure

    def measure(problem: Problem, *arguments, **keywords):
        found.append(problem)
        return original(problem, *arguments, **keywords)

    monkeypatch.setattr(tuning, "measure", measure)
    return found


def problem(tokens: int = 64, train: bool = False, dtype: str = "float32", structure=STRUCTURE) -> Problem:
    return Problem(structure, True, "jax", "cpu", dtype, tokens, xla.threads(), train)


def names(problem: Problem) -> list[str]:
    return [c.way.name for c in choice.candidates(problem)]


def inputs(tokens: int = 64, dtype: str = "float32"):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, STRUCTURE.d_in)), dtype)
    return x, list(sl.random_factors(STRUCTURE, seed=2, backend="jax", dtype=dtype))


def apply(x, factors):
    return STRUCTURE.apply(factors, x)


def exactly(x, factors):
    """By single products in doubles, which XLA compiles as one."""
    doubles = [np.asarray(t).astype("float64") for t in (x, *factors)]
    return np.asarray(jax.jit(lambda x, *factors: jax_cpu.single(STRUCTURE, factors, x, None, True))(*doubles))


def traced(function, *operands) -> str:
    """The way that a function takes, by the operations of its trace: each way has its own."""
    text = str(jax.make_jaxpr(lambda *a: function(*a))(*operands))
    if "structlin_chain" in text:
        return "compiled"
    return "dense" if "eq" in text else "products"  # a comparison makes the identity


def invent(fastest: str, asked: Problem) -> None:
    wisdom.write(asked.key, {name: 1e-3 if name == fastest else 2e-3 for name in names(asked)})
    choice.forget()


@pytest.mark.parametrize("fastest", NAMES)
def test_the_choice_follows_invented_timings(fastest: str, measured) -> None:
    asked = problem()
    if fastest not in names(asked):
        pytest.skip("nothing is compiled here")
    invent(fastest, asked)
    operands = inputs()
    assert traced(apply, *operands) == fastest
    assert execution.decisions() == {asked.key: fastest}
    np.testing.assert_allclose(apply(*operands), exactly(*operands), rtol=1e-4, atol=1e-4)
    assert measured == []


def test_the_choice_follows_invented_estimates(monkeypatch) -> None:
    for fastest in names(problem()):
        for way in choice.ways("jax"):
            seconds = 1.0 if way.name == fastest else 2.0
            monkeypatch.setattr(way, "seconds", lambda problem, seconds=seconds: seconds)
        choice.forget()
        assert traced(apply, *inputs()) == fastest


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_named_way_is_right_for_rows_and_columns(name: str, dtype: str) -> None:
    if name not in names(problem(dtype=dtype)):
        pytest.skip("nothing is compiled here")
    x, factors = inputs(37, dtype)
    bias = jnp.asarray(np.random.default_rng(3).standard_normal(48), dtype)
    exact = exactly(x, factors)
    tolerance = 1e-10 if dtype == "float64" else 0.1
    with execution.using(name):
        rows = jax_ways.run(STRUCTURE, factors, x, bias)
        columns = jax_ways.run(STRUCTURE, factors, x.T, rows=False)
        made = execution.decisions()
    assert made[problem(dtype=dtype).key] == name
    of_columns = replace(problem(dtype=dtype), rows=False)
    assert (made[of_columns.key] == name) == (name in names(of_columns))
    rows, columns, bias = (np.asarray(t).astype("float64") for t in (rows, columns, bias))
    np.testing.assert_allclose(rows, exact + bias, tolerance, tolerance)
    np.testing.assert_allclose(columns.T, exact, tolerance, tolerance)


def test_explain() -> None:
    invent("dense", problem())
    text = execution.explain(STRUCTURE, 50, train=False, library="jax")
    assert text.splitlines()[0] == problem().key
    (taken,) = [line for line in text.splitlines() if "<-" in line]
    assert taken.split()[0] == "dense"
    A = sl.StructuredOperator(STRUCTURE, [jnp.ones(f.shape, "float32") for f in STRUCTURE.factors])
    assert execution.explain(A, 50).splitlines()[0] == replace(problem(), rows=False).key


def test_policies(monkeypatch) -> None:
    operands = inputs()
    with execution.using("dense"):
        assert traced(apply, *operands) == "dense"
        with execution.using("products"):
            assert traced(apply, *operands) == "products"
    monkeypatch.setenv("STRUCTLIN_EXECUTION", "-compiled,-compiled-chunked,-dense")
    assert traced(apply, *operands) == "products"
    monkeypatch.setenv("STRUCTLIN_EXECUTION", "quick")
    with pytest.raises(ValueError, match="'quick' is neither a mode"):
        apply(*operands)


def test_jit_keeps_what_it_traced() -> None:
    """So the guide says."""
    function, operands = jax.jit(apply), inputs()
    with execution.using("dense"):
        function(*operands)
    assert list(execution.decisions().values()) == ["dense"]
    with execution.using("products"):
        function(*operands)
    assert list(execution.decisions().values()) == ["dense"]


def test_pins_go_before_timings() -> None:
    asked = problem()
    invent("dense", asked)
    assert traced(apply, *inputs()) == "dense"
    execution.pin({asked.key: "products"})
    assert traced(apply, *inputs()) == "products"
    assert execution.decisions([STRUCTURE]) == {asked.key: "products"}


def scanned(x, factors):
    def body(carried, _):
        return carried + apply(x, factors).sum(), None

    return jax.lax.scan(body, jnp.zeros((), x.dtype), None, length=2)[0]


TRANSFORMED = {
    "eager": apply,
    "jit": jax.jit(apply),
    "grad": jax.grad(lambda x, factors: apply(x, factors).sum(), (0, 1)),
    "jit of grad": jax.jit(jax.grad(lambda x, factors: jnp.sin(apply(x, factors)).sum(), (0, 1))),
    "vmap": jax.vmap(apply, (0, None)),
    "jit of vmap": jax.jit(jax.vmap(apply, (0, None))),
    "scan": scanned,
    "checkpoint": jax.jit(jax.grad(jax.checkpoint(lambda x, factors: jnp.sin(apply(x, factors)).sum()))),
}


@pytest.mark.parametrize("how", TRANSFORMED)
def test_measuring_within_a_trace(how: str, measured) -> None:
    """All ways are timed once, on arrays with values, and the result is right."""
    jax.clear_caches()
    x, factors = inputs()
    x = jnp.stack([x, 2 * x]) if "vmap" in how else x
    with execution.using("measure"):
        found = TRANSFORMED[how](x, factors)
    assert measured == [problem()]
    timed = choice.timings(problem())
    assert set(timed) == set(names(problem()))
    assert execution.decisions() == {problem().key: min(timed, key=lambda name: timed[name])}
    jax.clear_caches()
    with execution.using("products"):
        wanted = jax.jit(lambda *operands: TRANSFORMED[how](*operands))(x, factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, wanted)


@pytest.mark.parametrize("how", TRANSFORMED)
def test_nothing_is_measured_under_estimate(how: str, measured) -> None:
    jax.clear_caches()
    x, factors = inputs()
    TRANSFORMED[how](jnp.stack([x, 2 * x]) if "vmap" in how else x, factors)
    assert measured == []
    assert list(execution.decisions()) == [problem().key]
    assert choice.timings(problem()) == {}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("train", [False, True])
def test_timings_with_gradients_and_without(train: bool, dtype: str) -> None:
    with jax.enable_x64(False):
        found = tuning.measure(problem(train=train, dtype=dtype))
    assert set(found) == set(names(problem(dtype=dtype)))
    assert all(0 < seconds < 10 for seconds in found.values())


def test_tune_meets_the_problems_of_a_call() -> None:
    found = execution.tune(lambda: jax.jit(lambda *a: apply(*a))(*inputs(33)), progress=False)
    assert list(found) == [problem().key]
    assert "products" in found[problem().key]


def test_a_way_that_is_not_compiled_is_not_timed(monkeypatch) -> None:
    """Single products, which run in its place, are not taken for it."""
    if "compiled" not in names(problem()):
        pytest.skip("nothing is compiled here")

    def broken(*_):
        raise xla.CompileError("the compiler is broken")

    monkeypatch.setattr(xla, "plan_of", broken)
    found = tuning.measure(problem())
    assert "products" in found
    assert "compiled" not in found


def test_calls_without_a_choice() -> None:
    """Mixed dtypes, no tokens, and numbers of tokens that are symbols."""
    x, factors = inputs()
    with execution.using("dense"):
        assert apply(x.astype("float64"), factors).shape == (64, 48)
        assert apply(x[:0], factors).shape == (0, 48)
        (tokens,) = jax.export.symbolic_shape("tokens")
        jax.export.export(jax.jit(apply))(jax.ShapeDtypeStruct((tokens, 40), x.dtype), factors)
    assert execution.decisions() == {}


def test_the_machine_is_calibrated_once(monkeypatch, measured) -> None:
    """From timings on disk where they are there, and otherwise by measuring two small chains, once."""
    calibrated = CALIBRATED.__wrapped__
    small, medium = (problem(tokens, structure=structure) for structure, tokens in (models.TINY, models.MEDIUM))
    calibrated("float32", xla.threads(), False)
    assert measured == [small, medium]
    calibrated("float32", xla.threads(), False)
    assert measured == [small, medium]
    for asked, seconds in ((small, 1e-5), (medium, 256e-5)):
        wisdom.write(asked.key, dict.fromkeys(names(asked), seconds))
    found = calibrated("float32", xla.threads(), False)
    for way in (c.way for c in choice.candidates(medium)):
        call, factor = found[way.name]
        assert call == 1e-5
        assert call + factor * way.model(medium) == pytest.approx(256e-5)


def test_rates_of_xla() -> None:
    found = rates._measured("float32", xla.threads(), "jax")
    assert len(found.columns) == len(found.rows) == len(rates.BLOCKS)
    for seconds in (*found.columns, *found.rows, found.run, found.single, found.read, found.fresh):
        assert 1e-13 < seconds < 1e-6
    assert found.columns[0] > found.columns[-1]


WITHOUT_TORCH = """
    import sys
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "torch":
                raise ImportError("torch is not to be imported")
    sys.meta_path.insert(0, Blocked())
    import jax, jax.numpy as jnp, numpy as np
    import structlin as sl
    from structlin import execution
    structure = sl.design("monarch", (64, 64), blocks=4)
    factors = sl.random_factors(structure, backend="jax", seed=0)
    x = jnp.ones((300, 64))
    found = jax.jit(lambda x, f: structure.apply(f, x))(x, factors)
    with execution.using("products"):
        wanted = structure.apply(factors, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert "torch" not in sys.modules
    print(*execution.decisions().values())
"""


def test_without_torch() -> None:
    assert output("-c", textwrap.dedent(WITHOUT_TORCH)).split()[-1] == "products"
