"""Chains in jax where something is not as usual: executables of other processes, wrong calls, failures, many sizes."""

import os
import pickle
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.children import assert_ran, isolated, output
from helpers.jax_chains import STRUCTURE, calls, close, exactly, gradients, inputs, portable, run
from jax.experimental import serialize_executable

import structlin as sl
from structlin.execution import jax_cpu, jax_ways
from structlin.execution.compiled import _arrange, _plans, _program, _rules, _target, _writer, _xla_runtime, xla

HOST = _target.host()
needs_passes = pytest.mark.skipif(
    HOST is None or _xla_runtime.unsupported() is not None, reason="nothing is compiled here"
)
OTHER_FEATURES = HOST is not None and HOST.width == 64


@pytest.fixture(autouse=True, scope="module")
def by_passes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRUCTLIN_EXECUTION", "compiled")
        yield


@pytest.fixture(autouse=True)
def fresh():
    """Nothing that another test traced, and no warning that it gave."""
    for cached in (jax_cpu._jitted, xla.plan_of, _target._warned):
        cached.cache_clear()
    STRUCTURE._kept.clear()
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def others(saved, tmp_path_factory):
    """The lines that scripts in processes of their own write. These are forked before jax has any device."""
    cache = tmp_path_factory.mktemp("cache")
    start = "import jax\nfrom jax._src import xla_bridge\nassert not xla_bridge.backends_are_initialized()\n"
    cached = {f"cache {number} {how}": how for number, how in enumerate(("run", "run", "refuse"))}
    scripts = {
        "new": READ.format(saved=saved) + NEW,
        "nothing": READ.format(saved=saved) + NOTHING,
        "wrong": WRONG,
        **{name: CACHED.format(folder=cache, how=how) for name, how in cached.items()},
    }
    scripts = {name: start + textwrap.dedent(script) for name, script in scripts.items()}
    found = isolated(scripts)
    assert os.listdir(cache)
    return found


def written(others, name):
    assert_ran(others[name])
    return others[name][1].splitlines()


# -- executables of other processes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file with an executable of the gradients, its inputs and its results."""
    path, operands = tmp_path_factory.mktemp("saved") / "executable", inputs()
    lowered = jax.jit(gradients(run)).lower(*operands)
    assert "@structlin_chain" in lowered.as_text()
    compiled = lowered.compile()
    results = jax.tree.map(np.asarray, (operands, compiled(*operands)))
    path.write_bytes(pickle.dumps((serialize_executable.serialize(compiled), *results)))
    return path


READ = """
    import pickle, sys
    import jax, numpy as np
    from jax.experimental import serialize_executable
    executable, operands, wanted = pickle.loads(open("{saved}", "rb").read())
    def check():
        found = serialize_executable.deserialize_and_load(*executable)(*operands)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)
        return "same"
    def attempt():
        try:
            return check()
        except jax.errors.JaxRuntimeError as error:
            return str(error).replace("\\n", " ")
"""
NEW = """
    assert "structlin.execution.jax_cpu" not in sys.modules
    print(attempt())
    import structlin.execution.jax_cpu
    print(attempt())
"""
NOTHING = """
    assert "llvmlite" not in sys.modules
    sys.modules["llvmlite"] = None
    import structlin.execution.jax_cpu
    print(attempt())
"""


@needs_passes
def test_an_executable_runs_in_a_new_process(others):
    """Before the import XLA says what is missing, and after it nothing is."""
    *_, before, after = written(others, "new")
    assert "structlin_chain" in before
    assert after == "same"


@needs_passes
def test_an_executable_in_a_process_that_compiles_nothing(others):
    found = written(others, "nothing")[-1]
    assert "structlin: " in found
    assert "llvmlite is missing" in found


@needs_passes
def test_an_executable_of_another_version(saved, monkeypatch):
    executable, operands, wanted = pickle.loads(saved.read_bytes())
    close(serialize_executable.deserialize_and_load(*executable)(*operands), wanted)
    monkeypatch.setattr(xla, "FORMAT", xla.FORMAT + 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"structlin: .*another version.*compile it again"):
        serialize_executable.deserialize_and_load(*executable)


@needs_passes
def test_an_executable_where_the_compiler_fails(saved, monkeypatch):
    executable, operands, wanted = pickle.loads(saved.read_bytes())
    fail(monkeypatch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="structlin: the compiler is broken"):
        serialize_executable.deserialize_and_load(*executable)
    monkeypatch.undo()
    close(serialize_executable.deserialize_and_load(*executable)(*operands), wanted)


@needs_passes
@pytest.mark.skipif(not OTHER_FEATURES, reason="this processor has the fewest features")
def test_an_executable_of_a_processor_with_other_features(saved, monkeypatch):
    """The passes are compiled for this processor. If they need more memory than is available, an error states it."""
    executable, operands, wanted = pickle.loads(saved.read_bytes())
    for module in (_rules, xla):
        monkeypatch.setattr(module, "host", lambda: _target.AVX2)
    made = []
    original = xla.words
    monkeypatch.setattr(xla, "words", lambda call, plan, room: made.append(plan.target) or original(call, plan, room))
    try:
        close(serialize_executable.deserialize_and_load(*executable)(*operands), wanted)
    except jax.errors.JaxRuntimeError as error:
        assert "compiled for another processor" in str(error)  # noqa: PT017
    else:
        assert set(made) == {_target.AVX2}


@needs_passes
def test_memory_that_is_too_small_for_the_processor_at_hand(monkeypatch):
    operands, reserve = inputs(), xla.Plan.reserve
    executable = serialize_executable.serialize(jax.jit(run).lower(*operands).compile())
    monkeypatch.setattr(xla.Plan, "reserve", lambda self, size, *array: reserve(self, 2 * size, *array))
    xla.plan_of.cache_clear()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"another processor.*compile it again"):
        serialize_executable.deserialize_and_load(*executable)


@needs_passes
def test_more_memory_than_the_passes_need(monkeypatch):
    """Of an executable that was compiled for a processor whose passes need more."""
    operands = inputs()
    with monkeypatch.context() as patch:
        reserve = xla.Plan.reserve
        patch.setattr(xla.Plan, "reserve", lambda self, size, *array: reserve(self, 3 * size, *array))
        executable = serialize_executable.serialize(jax.jit(run).lower(*operands).compile())
    xla.plan_of.cache_clear()
    close(serialize_executable.deserialize_and_load(*executable)(*operands), exactly(portable, *operands))


CACHED = """
    import sys, warnings
    warnings.simplefilter("error")
    import jax, jax.numpy as jnp, numpy as np
    import structlin as sl
    from structlin.execution.compiled import _xla_runtime, xla
    jax.config.update("jax_compilation_cache_dir", "{folder}")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    asked = []
    def prepare(text):
        asked.append(text)
        if "{how}" == "refuse" and len(asked) == 1:
            raise RuntimeError("not on this processor")
        return xla._prepare(text)
    _xla_runtime._PREPARE[:] = [prepare]
    structure = sl.design("monarch", (256, 256), blocks=4)
    factors = sl.random_factors(structure, backend="jax", seed=0)
    x = jnp.ones((500, 256))
    run = jax.jit(jax.grad(lambda x, f: jnp.sin(structure.apply(f, x)).sum()))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        print(np.asarray(run(x, factors)).sum())
    print(len(asked), *(w.message for w in found))
"""


@needs_passes
def test_the_cache_of_compiled_programs(others):
    """Another process runs what it finds there, and compiles again what it cannot run."""
    first, second, third = (written(others, name)[-2:] for name in others if name.startswith("cache"))
    assert first[0] == second[0] == third[0]
    assert first[1] == second[1]  # so many plans, and no warning
    assert "not on this processor" in third[1]


# -- calls that no trace makes -----------------------------------------------------------------------------------------

WRONG = """
    import jax, jax.numpy as jnp, numpy as np
    import structlin as sl
    from structlin.execution import jax_cpu
    from structlin.execution.compiled import xla
    structure = sl.design("monarch", (64, 64), blocks=4)
    factors = sl.random_factors(structure, backend="jax", seed=0)
    x = jnp.ones((300, 64))
    call = xla.Call(jax_cpu.chain_of(structure, True), "float32", 300, 2, 0)
    plan = xla.plan_of(call)
    numbers = [n for _, n in xla._arrays(call, plan)]
    fit = [jax.ShapeDtypeStruct(*spec) for spec in (*plan.results, ((numbers[-1],), "uint8"))]
    def attempt(operands=(x, *factors), results=fit, **attributes):
        attributes = attributes or {"plan": call.text(numbers)}
        function = jax.jit(lambda *operands: jax.ffi.ffi_call(xla.TARGET, results)(*operands, **attributes))
        try:
            jax.block_until_ready(function(*operands))
            print("well")
        except jax.errors.JaxRuntimeError as error:
            print(str(error).replace("\\n", " "))
    y, scratch = fit
    attempt()
    attempt((x[:200], *factors))
    attempt((x, factors[0]))
    attempt((x, *factors, x))
    attempt((x.astype("int32"), *factors))
    attempt((x.astype("bfloat16"), *factors))
    attempt((x, factors[0][:1], factors[1]))
    attempt(results=[scratch, y])
    attempt(results=[y])
    attempt(results=[y, jax.ShapeDtypeStruct((64,), "uint8")])
    attempt(results=[jax.ShapeDtypeStruct((299, 64), "float32"), scratch])
    attempt(plan="no description")
    attempt(plan="[1, 2]")
    attempt(plan='{"format": 1}')
    attempt(plan=call.text(numbers).replace('"tokens": 300', '"tokens": -1'))
    attempt(plan=call.text(numbers).replace('"float32"', '"float16"'))
    attempt(plan=call.text(numbers).replace('"needs": null', '"needs": [false, false, false, false]'))
    attempt(plan=call.text(numbers).replace('"kept": 0', '"kept": 400'))
    attempt(plan=call.text(numbers).replace('["', '["z'))
    attempt(plan=call.text(numbers[1:]))
    attempt(plan=np.int64(3))
    attempt(plan=call.text(numbers), more="attributes")
    attempt()
"""


@needs_passes
def test_wrong_calls_end_in_errors(others):
    """The number of arrays, their dtypes and sizes, and what a description says: nothing runs that does not fit."""
    first, *wrong, last = written(others, "wrong")[-23:]
    assert first == last == "well"
    arrays, descriptions = wrong[:10], wrong[10:]
    assert len(descriptions) == 11
    assert all("structlin: the arrays of a call are not those" in line for line in arrays)
    assert all("structlin: " in line for line in descriptions)


# -- failures of the compiler, and of what it needs --------------------------------------------------------------------


def fail(patch):
    """Of all code but that of the handler, which is there already."""

    def broken(*_):
        raise _target.CompileError("the compiler is broken")

    for module in (_arrange, _writer, _xla_runtime):
        patch.setattr(module, "load", broken)
    for cached in (_program.make_program, xla.plan_of, _plans.add, _plans.fill):
        cached.cache_clear()
    STRUCTURE._kept.clear()


def warned(function, *operands):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        results = [function(*operands) for _ in range(2)]
    close(*results, 0)
    return results[0], [str(w.message) for w in found]


@needs_passes
def test_a_compiler_that_fails_is_no_error(monkeypatch):
    operands = inputs()
    wanted = exactly(portable, *operands), exactly(gradients(portable), *operands)
    fail(monkeypatch)
    found, messages = warned(run, *operands)
    close(found, wanted[0])
    assert len(messages) == 1
    assert "the compiler is broken" in messages[0]
    assert "XLA's own products run" in messages[0]
    for function in (gradients(run), jax.jit(gradients(run))):
        found, messages = warned(function, *operands)
        close(found, wanted[1])
        assert messages == []
    assert calls(gradients(run), *operands) == 0


@needs_passes
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_compiler_that_fails_in_one_direction(monkeypatch, when):
    """Activations that a compiled pass kept are for a compiled pass, and those that none kept are for none."""
    monkeypatch.setattr(xla.XLAChain, "kept_tokens", lambda *_: 96)
    operands = inputs()
    wanted = exactly(portable, *operands), exactly(gradients(portable), *operands)
    if when == "before":
        with monkeypatch.context() as patch:
            fail(patch)
            with pytest.warns(RuntimeWarning, match="the compiler is broken"):
                y, back = jax.vjp(run, *operands)
        found = back(jnp.cos(y))
    else:
        y, back = jax.vjp(run, *operands)
        fail(monkeypatch)
        with pytest.warns(RuntimeWarning, match="the compiler is broken"):
            found = back(jnp.cos(y))
    close(y, wanted[0])
    close(found, wanted[1])


@needs_passes
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize(
    "structure",
    [
        STRUCTURE,
        sl.design("tensor_train", (30, 24), cores=3, rank=2),
        sl.design("kronecker", (35, 6)),
        sl.Structure.parse("pa,pfra->frp; frp,ferp->fe", p=12, a=5, f=6, r=3, e=7),
    ],
    ids=["monarch", "tensor_train", "kronecker", "parsed"],
)
def test_activations_are_kept_in_one_layout(monkeypatch, structure, rows):
    """By the passes and by the single products: either may read what the other kept."""
    monkeypatch.setattr(_rules, "WASTE", 1e9)
    x, factors = inputs(101, structure=structure)
    x = x if rows else x.T
    parameters = {"structure": structure, "rows": rows, "bias": False, "kept": 48}
    widths = jax_cpu.chain_of(structure, rows).given("float32").schedule.widths[1:-1]
    found = jax.jit(lambda *a: jax_cpu._chain.bind(*a, **parameters))(x, *factors)
    wanted = jax.jit(lambda *a: jax_cpu._chain_portable(*a, **parameters))(x, *factors)
    assert len(found) == len(wanted) == len(structure.steps)
    close(found[0], wanted[0])
    for one, other, width in zip(found[1:], wanted[1:], widths, strict=True):  # what is behind them is nothing
        close(one.reshape(48, -1)[:, :width], other.reshape(48, -1)[:, :width])


@needs_passes
def test_batches_of_the_bias_alone(monkeypatch):
    """The gradients of the factors do not depend on the bias, and read what is kept."""
    monkeypatch.setattr(xla.XLAChain, "kept_tokens", lambda *_: 96)
    x, factors = inputs()
    biases = jnp.asarray(np.random.default_rng(3).standard_normal((5, 64)), "float32")
    weights = jnp.asarray(np.random.default_rng(4).standard_normal((300, 64)), "float32")

    def loss(function):
        return lambda bias, factors: (function(x, factors, bias) * weights).sum()

    ours = loss(lambda x, factors, bias: jax_ways.run(STRUCTURE, factors, x, bias))
    plain = loss(lambda x, factors, bias: portable(x, factors) + bias)
    found, wanted = (jax.vmap(jax.value_and_grad(f, (0, 1)), (0, None)) for f in (ours, plain))
    close(found(biases, factors), exactly(wanted, biases, factors))


@needs_passes
@pytest.mark.parametrize("what", ["version", "header", "system", "handler", "program"])
def test_what_is_missing_is_no_error(monkeypatch, what, tmp_path):
    """An unknown interface of XLA, no header of it, no POSIX functions, a name that is taken, and anything else."""
    operands = inputs()
    wanted = exactly(gradients(portable), *operands)
    if what == "version":
        monkeypatch.setattr(_xla_runtime, "VERSIONS", {1: ()})
    elif what == "header":
        monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    elif what == "system":
        monkeypatch.setattr(_xla_runtime.ctypes, "CDLL", lambda _: SimpleNamespace(malloc=1))
    elif what == "handler":

        def refuse(*_, **__):
            raise ValueError("another handler has this name")

        monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
        monkeypatch.setattr(_xla_runtime, "_REFUSED", [])
        _xla_runtime.register(xla._prepare)
    else:
        monkeypatch.setattr(xla.XLAChain, "program", lambda *_: {}["nothing"])
    cached = (_xla_runtime.version, _xla_runtime.unsupported, _xla_runtime._native)
    try:
        for function in cached:
            function.cache_clear()
        found, messages = warned(gradients(run), *operands)
        close(found, wanted)
        assert len(messages) == 1
        assert calls(run, *operands) == 0
    finally:
        monkeypatch.undo()
        for function in cached:
            function.cache_clear()


@needs_passes
def test_no_warning_where_nothing_is_to_be_compiled(monkeypatch):
    for module in (_rules, xla, _xla_runtime):
        monkeypatch.setattr(module, "host", lambda: None)
    operands = inputs()
    found, messages = warned(gradients(run), *operands)
    close(found, exactly(gradients(portable), *operands))
    assert messages == []


# -- many sizes --------------------------------------------------------------------------------------------------------

SIZES = """
    import gc, sys
    import jax, jax.numpy as jnp, numpy as np
    import structlin as sl
    from structlin.execution import jax_ways
    from structlin.execution.compiled import _xla_runtime
    from structlin.execution.products import products
    structure = sl.design("monarch", (64, 64), blocks=4)
    factors = sl.random_factors(structure, backend="jax", seed=0)
    ways = {
        "passes": lambda x, factors: jax_ways.run(structure, factors, x),
        "products": lambda x, factors: products(structure, factors, x, sl._arrays.ops("jax")),
    }
    run = jax.jit(ways[sys.argv[1]])
    def memory():
        gc.collect()
        return int(open("/proc/self/statm").read().split()[1]) * 4096
    def several(sizes):
        for tokens in sizes:
            jax.block_until_ready(run(np.ones((tokens, 64), "float32"), factors))
    several(range(300, 320))
    before = memory()
    several(range(320, 520))
    grown, states = memory() - before, len(_xla_runtime.STATES)
    largest = max((8 * len(words) for _, words, _ in _xla_runtime.STATES.values()), default=0)
    targets = {line.split("@structlin_")[1].split("(")[0] for tokens in (300, 400)
               for line in run.lower(np.ones((tokens, 64), "float32"), factors).as_text().splitlines()
               if "@structlin_" in line}
    jax.clear_caches()
    several([300])
    print(grown, states, largest, len(targets), len(_xla_runtime.STATES))
"""


@needs_passes
@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not say how much memory is used")
def test_two_hundred_sizes_take_no_more_than_the_executables():
    """One target for all, a small table for each, which goes with its executable."""
    grown, states, largest, targets, left = map(int, output("-c", textwrap.dedent(SIZES), "passes").split())
    usual, *_ = map(int, output("-c", textwrap.dedent(SIZES), "products").split())
    assert grown < 1.2 * usual + (8 << 20)
    assert (states, targets, left) == (220, 1, 1)
    assert largest < 4096


@needs_passes
def test_states_go_with_their_executables():
    x, factors = inputs()
    function = jax.jit(run)
    kept = function.lower(x, factors).compile()
    for tokens in range(250, 260):
        function(x[:tokens], factors)
    assert len(_xla_runtime.STATES) > 10
    jax.clear_caches()
    function(x[:200], factors)
    assert 2 <= len(_xla_runtime.STATES) < 8
    xla.plan_of.cache_clear()
    close(kept(x, factors), exactly(portable, x, factors))


@needs_passes
def test_executables_come_and_go_while_others_run():
    x, factors = inputs(900)
    wanted = exactly(portable, x, factors)
    lasting = jax.jit(run)

    def once(number):
        tokens = 300 + number % 7 * 50
        own = jax.jit(lambda x, factors: run(x, factors)).lower(x[:tokens], factors).compile()
        xla.plan_of.cache_clear()
        results = own(x[:tokens], factors), lasting(x, factors)
        del own
        return (tokens, *results)

    with ThreadPoolExecutor(4) as pool:
        for tokens, one, other in pool.map(once, range(40)):
            close((one, other), (wanted[:tokens], wanted))


@needs_passes
def test_the_end_of_a_process_with_runs_in_flight():
    """Executables outlive what Python frees when it ends."""
    script = (
        SIZES.split("    ways =")[0]
        + """
    x = jnp.ones((20000, 64))
    run = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, x: jax_ways.run(structure, factors, x) * 0.5, x))
    jax.held = run, run.lower(x).compile()
    jax.block_until_ready(run(x))
    jax.found = [run(x + k) for k in range(4)]
    """
    )
    output("-c", textwrap.dedent(script))
