"""Operators of NumPy arrays need neither torch nor jax, and warn of neither: in processes of their own."""

import pytest
from helpers.children import output

SCRIPT = """
import copy, pickle, sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "jax", "jaxlib"):
            raise ImportError(f"{name} is not installed")

if sys.argv[1] == "without":
    sys.meta_path.insert(0, Blocked())

import cola
import numpy as np
import structlin as sl

warnings.simplefilter("error")
rng = np.random.default_rng(0)

def positive(n):
    a = rng.standard_normal((n, n))
    return a @ a.T + n * np.eye(n)

K, D = sl.Kronecker(positive(3), positive(4)), sl.Diagonal(np.arange(1.0, 13))
M, B = sl.Monarch.random((12, 12), blocks=2, seed=0), sl.BlockTensorTrain.random((12, 12), rank=2, seed=0)
L, P = sl.LowRank.random((12, 12), rank=2, seed=0), sl.Permutation(rng.permutation(12))
operators = {
    "kronecker": K, "diagonal": D, "monarch": M, "btt": B, "low rank": L, "permutation": P, "sum": K + D,
    "woodbury": L + D, "product": K @ M, "scaled": 2.0 * K, "blocks": cola.ops.BlockDiag(K, M), "difference": K - D,
    "slice": M[:5, :7], "positive": cola.PSD(K + D), "toeplitz": sl.design("toeplitz", (12, 12)) and
    sl.Toeplitz.random((12, 12), seed=0),
}
assert type(cola.inv(K)) is sl.Kronecker  # the rules are there without an import of structlin.linalg
assert sl.solve is sl.linalg.solve is cola.solve
functions = {
    "to_dense": lambda A: A.to_dense(), "product": lambda A: A @ np.ones(A.shape[1]),
    "rows": lambda A: np.ones(A.shape[0]) @ A, "dense minus": lambda A: (np.ones(A.shape) - A).to_dense(),
    "plus dense": lambda A: (A + np.ones(A.shape)).to_dense(), "adjoint": lambda A: A.H.to_dense(),
    "asarray": np.asarray, "scipy": lambda A: sl.to_scipy(A) @ np.ones(A.shape[1]), "repr": lambda A: (str(A), repr(A)),
    "pickle": lambda A: pickle.loads(pickle.dumps(A)).to_dense(), "copy": lambda A: copy.deepcopy(A).to_dense(),
    "entries": lambda A: (A[0], A[:, 1], A[1, 2], A[[0, 1], [1, 2]], A[::-1].to_dense()),
    "frobenius": sl.frobenius_norm, "spectral": sl.spectral_norm, "work": sl.work_of,
}
square = {
    "power": lambda A: (A**2).to_dense(), "trace": cola.linalg.trace, "diag": cola.linalg.diag,
    "solve": lambda A: sl.solve(A, np.ones(A.shape[0])), "inv": lambda A: cola.linalg.inv(A) @ np.ones(A.shape[0]),
    "logdet": cola.linalg.logdet, "exp": lambda A: cola.linalg.exp(0.01 * A) @ np.ones(A.shape[0]),
}
singular = {("low rank", name) for name in ("solve", "inv", "logdet")}
for what, function in {**functions, **square}.items():
    for name, A in operators.items():
        if what in square and A.shape[0] != A.shape[1]:
            continue
        try:
            function(A)
        except (np.linalg.LinAlgError, ValueError) as error:
            if (name, what) not in singular:
                raise RuntimeError(f"{what} of {name}") from error
        except Exception as error:
            raise RuntimeError(f"{what} of {name}") from error
found = sl.project(rng.standard_normal((12, 12)), "low_rank", rank=2)
assert found.optimal
if sys.argv[1] == "with":
    assert all(hasattr(sl, name) for name in sl.__all__)
if sys.argv[1] == "without":
    assert not {"torch", "jax"} & set(sys.modules)
"""


@pytest.mark.parametrize("installed", ["with", "without"])
def test_operators_of_numpy_need_no_other_library_and_do_not_warn(installed):
    output("-c", SCRIPT, installed)
