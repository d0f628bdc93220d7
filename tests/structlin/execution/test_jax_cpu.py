"""Chains in jax by the compiled passes: values, derivatives of every kind, batches, other devices, threads."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.designs import CASES
from helpers.jax_chains import calls, exactly
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import structlin as sl
from structlin.execution import jax_cpu as _jax
from structlin.execution import jax_ways
from structlin.execution.compiled import _plans, _rules, _target, _xla_runtime, xla
from structlin.execution.compiled._limits import limits
from structlin.execution.products import products
from structlin.testing import dense_matrix, random_chain

HOST = _target.host()
pytestmark = [
    pytest.mark.filterwarnings("error:.*runs instead:RuntimeWarning"),
    pytest.mark.skipif(HOST is None or _xla_runtime.unsupported() is not None, reason="nothing is compiled here"),
]


@pytest.fixture(autouse=True, scope="module")
def many_blocks():
    """However few tokens there are, in three shares of a few, each of several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRUCTLIN_EXECUTION", "compiled")
        for name, value in (("KEPT_WORK", 0), ("WASTE", 1e9), ("MORE", 1e9), ("SHARE", 8)):
            patch.setattr(_rules, name, value)
        for module in (_rules, _plans):
            patch.setattr(module, "COPIED_SHARE", 8)
        patch.setattr(xla, "threads", lambda: 3)
        forget()
        yield
    forget()


def forget():
    """What was lowered under other rules. Functions that a test makes are traced and lowered anew in any case."""
    _jax._jitted.cache_clear()
    xla.plan_of.cache_clear()


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(xla, "threads", lambda: request.param)
    forget()
    yield request.param
    forget()


@pytest.fixture(autouse=True)
def doubles():
    with jax.enable_x64(True):
        yield


def make(name, dtype="float64", tokens=101):
    shape, options = CASES[name]
    structure = sl.design(name, shape, **options)
    factors = sl.random_factors(structure, seed=1, backend="jax", dtype=dtype)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((tokens, shape[1])), dtype)
    return structure, list(factors), x


def portable(structure, rows=True):
    return lambda x, *factors: products(structure, factors, x, sl._arrays.ops("jax"), rows)


def compiled(structure, rows=True):
    return lambda x, *factors: jax_ways.run(structure, factors, x, rows=rows)


def close(found, wanted, tolerance=1e-11):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), found, wanted)


def weigh(function, weights):
    return lambda *inputs: (function(*inputs) * weights).sum()


def weights_of(structure, tokens=101):
    return np.random.default_rng(3).standard_normal((tokens, structure.d_out))


@cache
def exact_gradients(name):
    """The weighted sum of the values in doubles and all its gradients, by single products."""
    structure, factors, x = make(name)
    every = tuple(range(1 + len(factors)))
    return exactly(jax.value_and_grad(weigh(portable(structure), weights_of(structure)), every), x, *factors)


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, threads):
    structure, factors, x = make(name)
    matrix = dense_matrix(structure, factors)
    assert calls(compiled(structure), x, *factors) == 1
    close(compiled(structure)(x, *factors), np.asarray(x) @ matrix.T)
    weights = weights_of(structure)
    every = tuple(range(1 + len(factors)))
    found = jax.jit(jax.value_and_grad(weigh(compiled(structure), weights), every))
    assert calls(found, x, *factors) == 2
    close(found(x, *factors), exact_gradients(name))
    for k in every:  # only some gradients
        close(jax.grad(weigh(compiled(structure), weights), k)(x, *factors), exact_gradients(name)[1][k])


@pytest.mark.parametrize("name", CASES)
def test_columns(name):
    structure, factors, x = make(name)
    assert calls(compiled(structure, rows=False), x.T, *factors) == 1
    close(structure.apply_columns(factors, x.T), structure.apply(factors, x).T)
    weights = np.random.default_rng(3).standard_normal((structure.d_out, len(x)))
    every = tuple(range(1 + len(factors)))
    found = jax.grad(weigh(compiled(structure, rows=False), weights), every)(x.T, *factors)
    close(found, exactly(jax.grad(weigh(portable(structure, rows=False), weights), every), x.T, *factors))


@pytest.mark.covering(2)
@pytest.mark.parametrize("kept", [0, 48, 101])
@pytest.mark.parametrize("name", CASES)
def test_activations_that_are_kept_change_nothing(name, kept, monkeypatch, threads):
    """None, those of some tokens, and all."""
    monkeypatch.setattr(xla.XLAChain, "kept_tokens", lambda *_: kept)
    forget()
    structure, factors, x = make(name)
    every = tuple(range(1 + len(factors)))
    close(jax.grad(weigh(compiled(structure), weights_of(structure)), every)(x, *factors), exact_gradients(name)[1])


@cache
def of_slices(structure):
    """Factors, inputs, weights and a bias; values and gradients by single products."""
    factors = sl.random_factors(structure, seed=1, backend="jax", dtype="float64")
    x, weights, bias = (
        jnp.asarray(np.random.default_rng(k).standard_normal(shape))
        for k, shape in enumerate([(101, structure.d_in), (101, structure.d_out), (structure.d_out,)])
    )
    wanted = exactly(jax.grad(weigh(portable(structure), weights), (0, 1, 2)), x, *factors)
    return factors, x, weights, bias, exactly(portable(structure), x, *factors), wanted


@pytest.mark.covering(2)
@pytest.mark.parametrize("kept", [0, 48, 101])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("most", [0, 900])
def test_slices_change_nothing(most, rows, kept, monkeypatch, threads):
    sizes = {"sums_slice": 8 * most, "factors_slice": 16 * most, "factors": 0}
    monkeypatch.setattr(_rules, "limits", lambda: replace(limits(), **sizes))
    monkeypatch.setattr(xla.XLAChain, "kept_tokens", lambda *_: kept)
    forget()
    structure = sl.Structure.parse("pa,pfra->frp; frp,ferp->fe", p=12, a=5, f=6, r=3, e=7)
    factors, x, weights, bias, exact, wanted = of_slices(structure)
    if rows:
        arguments, run = (x, *factors, bias), lambda x, *rest: jax_ways.run(structure, rest[:-1], x, rest[-1])
    else:
        arguments, run = (x.T, *factors), lambda x, *factors: jax_ways.run(structure, factors, x, rows=False).T
    of_chain = _jax.chain_of(structure, rows)
    assert (of_chain.back("float64", 1).count, of_chain.front("float64", False).count) == ((3, 2) if most else (12, 6))
    close(jax.jit(run)(*arguments), exact + (bias if rows else 0))
    every = tuple(range(len(arguments)))
    found = jax.grad(weigh(run, weights), every)(*arguments)
    close(found[: 1 + len(factors)], (wanted[0] if rows else wanted[0].T, *wanted[1:]))
    if rows:
        close(found[-1], weights.sum(0))
    forget()


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_other_dtypes(name, dtype):
    structure, factors, x = make(name, dtype)
    exact = [np.asarray(t).astype("float64") for t in (x, *factors)]
    weights = jnp.asarray(weights_of(structure), dtype)
    every = tuple(range(1 + len(factors)))

    def both(function):
        """Values and gradients."""
        loss = lambda *a: (function(*a) * weights).astype("float64").sum()  # noqa: E731
        return lambda *a: (function(*a), *jax.grad(loss, every)(*a))

    assert calls(both(compiled(structure)), x, *factors) >= 2
    found, wanted = jax.jit(both(compiled(structure)))(x, *factors), exactly(both(portable(structure)), *exact)
    tolerance = {"float32": 1e-5, "bfloat16": 0.03}[dtype]
    for got, true in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        assert np.linalg.norm(np.asarray(got).astype("float64") - true) < tolerance * np.linalg.norm(true)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_bias(name, dtype):
    structure, factors, x = make(name, dtype)
    bias = jnp.asarray(np.random.default_rng(4).standard_normal(structure.d_out), dtype)
    weights = jnp.asarray(weights_of(structure), dtype)

    def with_bias(bias, x, *factors):
        return jax_ways.run(structure, factors, x, bias)

    def by_hand(bias, x, *factors):
        return portable(structure)(x, *factors) + bias

    assert calls(with_bias, bias, x, *factors) == 1
    tolerance = 1e-11 if dtype == "float64" else 0.1
    close(with_bias(bias, x, *factors), exactly(by_hand, bias, x, *factors), tolerance)
    every = tuple(range(2 + len(factors)))

    def gradients(*operands):
        """By all operands, the bias, and x."""
        return [jax.grad(weigh(with_bias, weights), some)(*operands) for some in (every, 0, 1)]

    found = jax.jit(gradients)(bias, x, *factors)
    if dtype == "float64":
        wanted = exactly(jax.grad(weigh(by_hand, weights), every), bias, x, *factors)
        close(found, [wanted, *wanted[:2]])
    else:  # added up in float32
        exact = np.asarray(weights, "float32").sum(0)
        np.testing.assert_allclose(np.asarray(found[1], "float32"), exact, 1e-2)


@pytest.mark.parametrize("name", ["block_tensor_train", "tensor_train", "block_diagonal"])
def test_second_derivatives_in_both_modes(name):
    structure, factors, x = make(name, tokens=5)
    check_grads(compiled(structure), (x, *factors), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "kept", "rows", "bias"),
    [
        pytest.param("block_tensor_train", 0, True, False, marks=pytest.mark.slow),
        ("block_tensor_train", 16, True, True),
        ("tensor_train", 0, False, False),
        pytest.param("butterfly", 16, True, False, marks=pytest.mark.slow),
    ],
)
def test_derivatives_along_directions(name, kept, rows, bias, monkeypatch):
    """Up to the third order, in every order of modes, with activations that are kept or not: all by compiled calls."""
    monkeypatch.setattr(xla.XLAChain, "kept_tokens", lambda *_: kept)
    forget()
    structure, factors, x = make(name, tokens=16)
    rng = np.random.default_rng(5)
    inputs = [x if rows else x.T, *factors, *([jnp.asarray(rng.standard_normal(structure.d_out))] * bias)]
    first, second, third = ([jnp.asarray(rng.standard_normal(t.shape)) for t in inputs] for _ in range(3))
    weights = jnp.asarray(rng.standard_normal((16, structure.d_out)))
    every = tuple(range(len(inputs)))

    def layer(x, *operands):
        return jax_ways.run(structure, operands[: len(factors)], x, operands[-1] if bias else None, rows)

    def by_hand(x, *operands):
        return portable(structure, rows)(x, *operands[: len(factors)]) + (operands[-1] if bias else 0)

    def along(function, directions):
        return lambda *inputs: jax.jvp(function, inputs, tuple(directions))[1]

    def pulled(function, directions):
        """The gradient of what a direction gives."""
        inner = lambda *inputs: sum((a * b).sum() for a, b in zip(function(*inputs), directions, strict=True))  # noqa: E731
        return jax.grad(inner, every)

    def results(function):
        loss = lambda *inputs: (jnp.sin(function(*inputs)) * (weights if rows else weights.T)).sum()  # noqa: E731
        gradients = jax.grad(loss, every)
        yield along(function, first)
        yield along(along(function, first), second)
        yield along(along(along(function, first), second), third)
        yield along(gradients, first)  # forward over reverse
        yield jax.grad(along(loss, first), every)  # reverse over forward
        yield pulled(gradients, first)  # reverse over reverse
        yield pulled(along(gradients, first), second)
        yield along(along(gradients, first), second)
        yield pulled(pulled(gradients, first), second)
        for k in every:  # of single operands
            yield lambda *inputs, k=k: along(lambda v: gradients(*inputs[:k], v, *inputs[k + 1 :]), [first[k]])(
                inputs[k]
            )

    exact = exactly(lambda *inputs: [wanted(*inputs) for wanted in results(by_hand)], *inputs)
    for found, wanted in zip(results(layer), exact, strict=True):
        traced = jax.jit(found).trace(*inputs)
        assert "dot_general" not in str(traced.jaxpr)
        lowered = traced.lower()
        assert "call @structlin_" in lowered.as_text()
        close(lowered.compile()(*inputs), wanted)
    forget()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block_tensor_train", "monarch", "block_diagonal"])
def test_jvp_and_higher_derivatives(name):
    structure, factors, x = make(name, tokens=2)

    def loss(function):
        return lambda *inputs: jnp.sin(function(*inputs)).sum()

    rng = np.random.default_rng(5)
    tangents = [jnp.asarray(rng.standard_normal(t.shape)) for t in (x, *factors)]
    close(
        jax.jvp(compiled(structure), (x, *factors), tuple(tangents)),
        jax.jvp(portable(structure), (x, *factors), tuple(tangents)),
    )
    close(
        jax.linearize(compiled(structure), x, *factors)[1](*tangents),
        jax.linearize(portable(structure), x, *factors)[1](*tangents),
    )
    third = lambda f, k: jax.jacfwd(jax.hessian(f, k), k)  # noqa: E731
    for of in (jax.hessian, lambda f, k: jax.jacrev(jax.jacrev(f, k), k), third):
        close(of(loss(compiled(structure)), (0, 1))(x, *factors), of(loss(portable(structure)), (0, 1))(x, *factors))


@pytest.mark.parametrize(("name", "rows"), [("block_tensor_train", True), ("monarch", False), ("blast", True)])
def test_vmap(name, rows):
    """Over x: still one call, of more tokens. Over factors, or both, and over gradients of single examples."""
    structure, factors, x = make(name, tokens=12)
    x = x if rows else x.T
    batch = jnp.stack([x, 2 * x, x - 1])
    many = [jnp.stack([f, f + 1, -f]) for f in factors]
    none = (None,) * len(factors)

    def agree(change, *inputs):
        close(jax.jit(change(compiled(structure, rows)))(*inputs), exactly(change(portable(structure, rows)), *inputs))

    for at, inputs in (
        ((0, *none), (batch, *factors)),
        ((2, *none), (jnp.moveaxis(batch, 0, 2), *factors)),
        ((None, *(0,) * len(factors)), (x, *many)),
        ((0, *(0,) * len(factors)), (batch, *many)),
    ):
        agree(partial(jax.vmap, in_axes=at), *inputs)
    assert calls(jax.vmap(compiled(structure, rows), (0, *none)), batch, *factors) == 1
    agree(lambda f: jax.vmap(jax.vmap(f, (0, *none)), (1, *none)), batch[:, None], *factors)
    for wanted in (0, 1, tuple(range(1 + len(factors)))):
        agree(
            lambda f, wanted=wanted: jax.vmap(jax.grad(lambda *a: jnp.sin(f(*a)).sum(), wanted), (0, *none)),
            batch,
            *factors,
        )
    for wanted in (0, 1):
        agree(
            lambda f, wanted=wanted: jax.grad(lambda *a: jnp.sin(jax.vmap(f, (0, *none))(*a)).sum(), wanted),
            batch,
            *factors,
        )


@pytest.mark.parametrize("name", ["block_tensor_train", "butterfly", "block_diagonal"])
def test_transposition(name):
    """Linear in x and in each factor, and the gradients in that of the output."""
    structure, factors, x = make(name, tokens=6)
    y = exactly(portable(structure), x, *factors)
    inputs = [x, *factors]

    def transposed(f):
        for k, operand in enumerate(inputs):
            yield jax.linear_transpose(lambda v, k=k: f(*inputs[:k], v, *inputs[k + 1 :]), operand)(y)
        back = jax.vjp(f, x, *factors)[1]
        yield jax.linear_transpose(back, y)(back(y))

    close([*transposed(compiled(structure))], exactly(lambda: [*transposed(portable(structure))]))


@pytest.mark.parametrize("name", ["block_tensor_train", "monarch"])
def test_inside_other_transformations(name):
    """scan, checkpoint, cond and while."""
    structure, factors, x = make(name, tokens=30)
    stacked = [jnp.stack([f, f * 2]) for f in factors]

    def layers(function, change):
        def loss(x, stacked):
            def layer(carried, own):
                return carried + function(x, *own).sum(), function(x, *own).mean()

            total, means = jax.lax.scan(change(layer), 0.0, stacked)
            return total + jax.lax.cond(means[0] > 0, lambda: function(x, *factors).sum(), lambda: means[1])

        return jax.value_and_grad(loss, (0, 1))

    wanted = exactly(layers(portable(structure), lambda f: f), x, stacked)
    for change in (lambda f: f, jax.checkpoint):
        close(jax.jit(layers(compiled(structure), change))(x, stacked), wanted)


def test_one_program_in_many_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    structure, factors, x = make("block_tensor_train", tokens=3000)
    weights = weights_of(structure, len(x))
    run = jax.jit(jax.grad(weigh(compiled(structure), weights), (0, 1)))
    wanted = exactly(jax.grad(weigh(portable(structure), weights), (0, 1)), x, *factors)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: run(x, *factors), range(64)):
            close(found, wanted, 1e-9)


def test_repeated_runs_give_the_same_bits():
    structure, factors, x = make("monarch", "float32", tokens=500)
    run = jax.jit(jax.grad(lambda *a: jnp.sin(compiled(structure)(*a)).sum(), (0, 1)))
    first = run(x, *factors)
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, run(x, *factors), first)


def test_what_is_left_to_single_products():
    structure, factors, x = make("block_tensor_train")
    run = compiled(structure)
    assert calls(run, x, *factors) == 1
    assert calls(run, x.astype("float32"), *factors) == 0  # mixed dtypes are promoted as jax does
    assert run(x.astype("float32"), *factors).dtype == "float64"
    assert calls(run, x[:0], *factors) == 0
    assert run(x[:0], *factors).shape == (0, structure.d_out)
    assert calls(run, x.astype("complex128"), *[f.astype("complex128") for f in factors]) == 0
    exported = jax.export.export(jax.jit(run))(x, *factors)
    assert "structlin_" not in exported.mlir_module()
    close(exported.call(x, *factors), run(x, *factors))
    (tokens,) = jax.export.symbolic_shape("tokens")
    any_ = jax.export.export(jax.jit(run))(jax.ShapeDtypeStruct((tokens, structure.d_in), x.dtype), *factors)
    close(any_.call(x, *factors), run(x, *factors))
    other = jax.jit(run).trace(x, *factors).lower(lowering_platforms=("cuda",)).as_text()
    assert "structlin_" not in other
    assert "dot_general" in other


def test_gradients_on_other_platforms_do_without_what_is_kept(monkeypatch):
    monkeypatch.setattr(xla.XLAChain, "kept_tokens", lambda *_: 48)
    forget()
    structure, factors, x = make("block_tensor_train")
    run = jax.jit(jax.grad(lambda *a: jnp.sin(compiled(structure)(*a)).sum(), (0, 1)))
    exported = jax.export.export(run)(x, *factors)
    close(exported.call(x, *factors), run(x, *factors))


def test_programs_are_the_same_text_in_every_process():
    """It is what XLA's cache of compiled programs is searched for."""
    structure, factors, x = make("monarch")
    one, other, again = (
        jax.jit(lambda *a: compiled(structure)(*a)).lower(x[:tokens], *factors).as_text() for tokens in (101, 100, 101)
    )
    assert one == again != other
    assert hex(id(structure))[2:] not in one


@settings(max_examples=settings.default.max_examples // 3, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.booleans())
def test_random_chains_agree(seed, tokens, rows):
    structure = random_chain(np.random.default_rng(seed))
    factors = sl.random_factors(structure, seed=seed, backend="jax", dtype="float64")
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((tokens, structure.d_in)))
    x = x if rows else x.T
    every = tuple(range(1 + len(factors)))
    found, wanted = (
        jax.value_and_grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), every)
        for f in (compiled(structure, rows), portable(structure, rows))
    )
    close(found(x, *factors), exactly(wanted, x, *factors), 1e-9)


def test_the_code_for_short_registers(monkeypatch):
    if HOST.width != 64:
        pytest.skip("they are short here")
    for module in (_rules, xla):
        monkeypatch.setattr(module, "host", lambda: _target.AVX2)
    forget()
    structure, factors, x = make("block_tensor_train", "float32")
    found = jax.grad(lambda *a: jnp.sin(compiled(structure)(*a)).sum(), (0, 1, 2))(x, *factors)
    close(found, exactly(jax.grad(lambda *a: jnp.sin(portable(structure)(*a)).sum(), (0, 1, 2)), x, *factors), 1e-3)
    forget()
