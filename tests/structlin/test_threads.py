"""Threads of OpenBLAS: one for stacks of small matrices, and torch's number for tensors."""

import cola
import numpy as np
import pytest

import structlin as sl
from structlin import _lapack, _threads

controller = _threads._controller()
pytestmark = pytest.mark.skipif(not controller.lib_controllers, reason="NumPy and SciPy bring no OpenBLAS")


def numbers() -> list[int]:
    return [library.num_threads for library in controller.lib_controllers]


@pytest.fixture(autouse=True)
def two_threads():
    with controller.limit(limits=2):
        if min(numbers()) < 2:
            pytest.skip("OpenBLAS has one thread here")
        yield


@pytest.fixture
def seen(monkeypatch):
    """Return a list to which the wrapped decompositions append the numbers of threads."""
    found = []

    def watched(function):
        def run(*args, **options):
            found.append(numbers())
            return function(*args, **options)

        return run

    original = _lapack._lapack_function
    monkeypatch.setattr(_lapack, "_lapack_function", lambda *names: watched(original(*names)))
    return found


def spd(*shape: int) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((*shape, shape[-1]))
    return x @ x.swapaxes(-1, -2) / shape[-1] + np.eye(shape[-1])


@pytest.mark.parametrize(("shape", "inside"), [((128, 96), 1), ((3, 40), 2), ((2, 400), 2), ((600,), 2)])
def test_stacks_of_small_matrices_take_one_thread(seen, shape, inside):
    a = spd(*shape)
    b = np.ones((*shape, 1))
    x = _lapack.lapack(a).cholesky_solve(a, b)
    assert seen
    assert {number for each in seen for number in each} == {inside}
    assert set(numbers()) == {2}
    np.testing.assert_allclose(a @ x, b, atol=1e-9)


def test_the_limit_ends_with_an_error():
    with pytest.raises(np.linalg.LinAlgError):
        _threads.linalg.cholesky(-spd(128, 96))
    assert set(numbers()) == {2}


def test_no_library_gets_more_threads():
    with controller.limit(limits=1), _threads.limited(2):
        assert set(numbers()) == {1}


@pytest.mark.parametrize("threads", [1, 2])
def test_views_of_tensors_take_the_threads_of_torch(seen, threads):
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.from_numpy(spd(1, 600))
        x = sl.solve(cola.PSD(sl.BlockDiagonal(a)), torch.ones(600, dtype=a.dtype))
    finally:
        torch.set_num_threads(before)
    assert seen == [[threads] * len(controller.lib_controllers)]
    torch.testing.assert_close(a[0] @ x, torch.ones(600, dtype=a.dtype))
