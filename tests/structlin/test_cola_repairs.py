"""Repairs of CoLA beside others: caches of plum, rules from outside, another plum, several devices of jax."""

import os
from pathlib import Path

import cola
import numpy as np
import plum
import torch
from cola.ops import Dense, LinearOperator, Permutation
from helpers.children import output, run
from hypothesis import given, settings
from hypothesis import strategies as st

import structlin
from structlin import _cola_compat


def test_rules_registered_from_outside_still_win():
    class Mine(Dense):
        pass

    @plum.dispatch
    def add(A: Mine, B: LinearOperator):
        return "mine"

    @plum.dispatch
    def kron(A: Mine, B: LinearOperator):
        return "mine"

    A, B = Mine(torch.eye(2)), Dense(torch.eye(2))
    assert A + B == "mine"
    assert cola.kron(A, B) == "mine"
    assert not isinstance(B + A, str)


def test_importing_structlin_installs_once():
    assert _cola_compat.install() == ()


def test_the_repairs_outlive_a_clearing_of_plums_caches():
    plum.dispatch.clear_cache()
    A = Dense(torch.eye(2))
    assert torch.equal((A + A - 3 * A).to_dense(), -torch.eye(2))
    sign, value = cola.linalg.slogdet(-2.0 * cola.PSD(Dense(torch.eye(3))))
    assert (float(sign), float(value)) == (-1, float(3 * torch.tensor(2.0).log()))


def test_plum_over_colas_fork_is_named_as_the_cause(tmp_path):
    fake = tmp_path / "plum"
    fake.mkdir()
    (fake / "__init__.py").write_text("class Dispatcher:\n    def __call__(self, method=None, precedence=0): ...\n")
    path = f"{tmp_path}{os.pathsep}{Path(structlin.__file__).parents[1]}"
    done = run("-c", "import structlin", PYTHONPATH=path)
    assert done.returncode != 0
    assert "ImportError: plum-dispatch has replaced cola-plum-dispatch" in done.stderr
    assert "pip install --force-reinstall --no-deps cola-plum-dispatch" in done.stderr


def test_installing_starts_no_array_library_and_several_jax_devices_work():
    code = """if True:
        import cola, jax, jax.numpy as jnp, structlin
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
        first, second = jax.devices()
        A = structlin.LowRank.random((4, 4), backend="jax", seed=0).to(second)
        assert A.device == second
        M = A @ A.T + cola.ops.I_like(A)
        y = jax.jit(lambda M, x: 2 * M @ x)(M, jax.device_put(jnp.ones(4), second))
        assert y.devices() == {second}
    """
    flags = "--xla_force_host_platform_device_count=2"
    output("-c", code, PYTHONPATH=str(Path(structlin.__file__).parents[1]), XLA_FLAGS=flags)


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(7)))
def test_the_sign_of_a_permutation(perm):
    for make in (np.array, torch.tensor):
        sign, value = cola.linalg.slogdet(Permutation(make(perm)))
        assert float(sign) == round(np.linalg.det(np.eye(7)[perm]))
        assert float(value) == 0
