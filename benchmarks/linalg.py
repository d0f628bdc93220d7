"""Products, solutions and determinants of structured matrices, compared with dense LAPACK and other libraries on a CPU.

    python benchmarks/linalg.py --out linalg

All calls run in one process by interleaved repeats in random order. Calls below 50 ms are timed after one untimed call.
The result has medians and ratios of medians (above 1: this library is faster). With one thread, the default, times are
CPU times, which other programs do not affect. ``matmat`` is A X for several columns and an existing operator. ``solve``
is A^-1 X, and ``logdet`` the logarithm of |det A|, from the arrays to the result, so caches of an operator have no
effect.

``likelihood`` is ``x^T A^-1 x + log det A`` for one x, with its gradient with respect to all arrays, on torch, for
positive matrices. It is the loss of a Gaussian process (GPyTorch computes it by linear_operator).

- dense: torch's LAPACK in the same dtype, by Cholesky if the matrix is symmetric and positive (all but Monarch and
  Block Tensor-Train), otherwise by LU. Left out above ``--dense-limit`` rows: at 16384 rows one LU takes minutes.
- linear_operator: the same matrix from its own classes. It has no class that solves with a product of block-diagonal
  matrices. Above 800 rows it uses conjugate gradients if there is no closed form, and estimates determinants.
- lineax: it has none of these structures, so it uses a function and conjugate gradients to a residual of 1e-8 (1e-5 in
  float32), under jit. It is compared with this library under jit on jax. It has no determinants.
- scipy: ``solve_circulant`` and ``solve_toeplitz``. They are compared with this library on NumPy arrays.

A peer that is not installed is reported as absent. ``error`` is the relative error against the formula in NumPy.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import cola
import numpy as np
import torch
from _measure import aligned, keep_memory, machine, peak_rate, result_path, write_result
from threadpoolctl import threadpool_limits

import structlin as sl

PEERS = ("linear_operator", "lineax", "scipy")
LABELS = {
    "matmat": "product",
    "solve": "solution",
    "logdet": "log-determinant",
    "likelihood": "likelihood and gradient",
}
OPERATIONS = tuple(LABELS)
NOISE = 0.1
TOEPLITZ_RATIO = 0.6
INNER = 8  # repeats of structured functions for each repeat of a dense one
SECONDS = 5.0  # a comparison that takes longer is repeated at most three times


@dataclass(frozen=True)
class Case:
    """One matrix: ``arrays`` in NumPy, the operator of this library, and those of others (None: not supported).

    ``linear_operator`` takes the module and torch tensors; ``function``, for lineax, the jax arrays and a vector.
    ``product``: linear_operator represents the matrix as a product, and supports only multiplication with it.
    """

    name: str
    arrays: tuple[np.ndarray, ...]
    make: Callable[..., Any]
    positive: bool
    linear_operator: Callable[..., Any] | None
    function: Callable[..., Any] | None
    product: bool = False


def positive(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return symmetric positive definite matrices of condition number about 10, with determinants near 1."""
    x = rng.standard_normal((*shape, shape[-1])) / math.sqrt(shape[-1])
    return x @ x.swapaxes(-1, -2) + 0.5 * np.eye(shape[-1])


def regular(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return matrices near the identity that are not symmetric."""
    return rng.standard_normal((*shape, shape[-1])) / (2 * math.sqrt(shape[-1])) + np.eye(shape[-1])


def even(n: int, number: int) -> tuple[int, ...]:
    """Return factors of n, a power of 2, that are nearly equal powers of 2."""
    exponent = n.bit_length() - 1
    if 1 << exponent != n or exponent < number:
        raise ValueError(f"sizes are powers of 2, at least {1 << number}, got {n}")
    return tuple(1 << (exponent + k) // number for k in range(number))


def kronecker(n: int, rng: np.random.Generator) -> Case:
    def function(A: Any, B: Any, x: Any) -> Any:
        return (A @ x.reshape(A.shape[0], B.shape[0]) @ B.T).reshape(-1)

    return Case(
        "kronecker",
        tuple(positive(rng, k) for k in even(n, 2)),
        lambda *f: cola.PSD(sl.Kronecker(*f)),
        True,
        lambda lo, *f: lo.KroneckerProductLinearOperator(*map(lo.DenseLinearOperator, f)),
        function,
    )


def block_diagonal(n: int, rng: np.random.Generator) -> Case:
    blocks, _ = even(n, 2)
    return Case(
        "block_diagonal",
        (positive(rng, blocks, n // blocks),),
        lambda B: cola.PSD(sl.BlockDiagonal(B)),
        True,
        lambda lo, B: lo.BlockDiagLinearOperator(lo.DenseLinearOperator(B)),
        lambda B, x: (B @ x.reshape(B.shape[0], -1, 1)).reshape(-1),
    )


def kronecker_plus_identity(n: int, rng: np.random.Generator) -> Case:
    """Build the covariance of a Gaussian process on a grid, with noise."""

    def make(A: Any, B: Any) -> Any:
        K = cola.PSD(sl.Kronecker(A, B))
        return cola.PSD(K + NOISE * cola.ops.I_like(K))

    def linear_operator(lo: Any, A: torch.Tensor, B: torch.Tensor) -> Any:
        K = lo.KroneckerProductLinearOperator(lo.DenseLinearOperator(A), lo.DenseLinearOperator(B))
        n = A.shape[0] * B.shape[0]
        return lo.KroneckerProductAddedDiagLinearOperator(
            K, lo.ConstantDiagLinearOperator(torch.full((1,), NOISE, dtype=A.dtype), diag_shape=n)
        )

    def function(A: Any, B: Any, x: Any) -> Any:
        return (A @ x.reshape(A.shape[0], B.shape[0]) @ B.T).reshape(-1) + NOISE * x

    return Case(
        "kronecker_plus_identity", tuple(positive(rng, k) for k in even(n, 2)), make, True, linear_operator, function
    )


def low_rank_plus_diagonal(n: int, rng: np.random.Generator) -> Case:
    U = rng.standard_normal((n, 32)) / math.sqrt(n)

    def linear_operator(lo: Any, U: torch.Tensor, d: torch.Tensor) -> Any:
        return lo.LowRankRootLinearOperator(U).add_diagonal(d)

    return Case(
        "low_rank_plus_diagonal",
        (U, 0.5 + rng.random(n)),
        lambda U, d: cola.PSD(sl.LowRank(U.T, U) + sl.Diagonal(d)),
        True,
        linear_operator,
        lambda U, d, x: U @ (U.T @ x) + d * x,
    )


def circulant(n: int, rng: np.random.Generator) -> Case:
    spectrum = 0.5 + rng.random(n // 2 + 1)

    def function(c: Any, x: Any) -> Any:
        import jax.numpy as jnp

        return jnp.fft.irfft(jnp.fft.rfft(c) * jnp.fft.rfft(x), x.shape[0])

    return Case(
        "circulant",
        (np.fft.irfft(spectrum, n),),
        lambda c: cola.PSD(sl.Circulant(c)),
        True,
        lambda lo, c: lo.ToeplitzLinearOperator(c),
        function,
    )


def toeplitz(n: int, rng: np.random.Generator) -> Case:
    """Build the matrix of Kac, Murdock and Szego, ``0.6^|i - j|``, whose inverse is tridiagonal."""
    column = TOEPLITZ_RATIO ** np.arange(n)

    def function(c: Any, x: Any) -> Any:
        import jax.numpy as jnp

        around = jnp.concatenate([c, c[:1] * 0, c[:0:-1]])
        return jnp.fft.irfft(jnp.fft.rfft(around) * jnp.fft.rfft(x, 2 * n), 2 * n)[:n]

    return Case(
        "toeplitz",
        (column,),
        lambda c: cola.PSD(sl.Toeplitz(c)),
        True,
        lambda lo, c: lo.ToeplitzLinearOperator(c),
        function,
    )


def monarch(n: int, rng: np.random.Generator) -> Case:
    b, _ = even(n, 2)
    structure = sl.design("monarch", (n, n), blocks=b)
    arrays = (regular(rng, b, n // b), regular(rng, b, n // b))
    shapes = [f.shape for f in structure.factors]

    def make(*blocks: Any) -> Any:
        return sl.StructuredOperator(structure, [x.reshape(s) for x, s in zip(blocks, shapes, strict=True)])

    def linear_operator(lo: Any, first: torch.Tensor, second: torch.Tensor) -> Any:
        return lo.MatmulLinearOperator(
            lo.BlockDiagLinearOperator(lo.DenseLinearOperator(second)),
            lo.MatmulLinearOperator(
                lo.PermutationLinearOperator(torch.arange(n).reshape(b, n // b).T.reshape(-1)),
                lo.BlockDiagLinearOperator(lo.DenseLinearOperator(first)),
            ),
        )

    return Case("monarch", arrays, make, False, linear_operator, None, product=True)


def block_tensor_train(n: int, rng: np.random.Generator) -> Case:
    sizes = even(n, 3)
    structure = sl.design("block_tensor_train", (n, n), cores=3, rank=1, factorization=(sizes, sizes))
    arrays = tuple(regular(rng, f.blocks, f.fan_in) for f in structure.factors)
    shapes = [f.shape for f in structure.factors]

    def make(*blocks: Any) -> Any:
        return sl.StructuredOperator(structure, [x.reshape(s) for x, s in zip(blocks, shapes, strict=True)])

    return Case("block_tensor_train", arrays, make, False, None, None)


CASES = (
    kronecker,
    kronecker_plus_identity,
    monarch,
    block_tensor_train,
    low_rank_plus_diagonal,
    block_diagonal,
    circulant,
    toeplitz,
)


# -- contestants -----------------------------------------------------------------------------------------------------


def as_torch(case: Case, X: np.ndarray, dtype: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    kind = getattr(torch, dtype)
    return [torch.tensor(a, dtype=kind) for a in case.arrays], torch.tensor(X, dtype=kind)


def gradient(arrays: Sequence[torch.Tensor], value: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return a function that computes a value of copies of the arrays and its gradients."""

    def run() -> torch.Tensor:
        leaves = [a.detach().requires_grad_() for a in arrays]
        found = value(*leaves)
        torch.autograd.grad(found, leaves)
        return found.detach()

    return run


def ours(case: Case, X: np.ndarray, dtype: str) -> dict[str, Callable[[], Any]]:
    arrays, columns = as_torch(case, X, dtype)
    A = case.make(*arrays)
    x = columns[:, 0].clone()

    def likelihood(*leaves: torch.Tensor) -> torch.Tensor:
        quadratic, log = sl.linalg.inv_quad_logdet(case.make(*leaves), x)
        return quadratic + log

    more = {"likelihood": gradient(arrays, likelihood)} if case.positive else {}
    return more | {
        "matmat": lambda: A @ columns,
        "solve": lambda: sl.solve(case.make(*arrays), columns),
        "logdet": lambda: cola.linalg.logdet(case.make(*arrays)),
    }


def dense(case: Case, X: np.ndarray, dtype: str) -> dict[str, Callable[[], Any]]:
    arrays, columns = as_torch(case, X, dtype)
    A = case.make(*arrays).to_dense()
    x = columns[:, :1].clone()

    def likelihood(*leaves: torch.Tensor) -> torch.Tensor:
        factor = torch.linalg.cholesky(case.make(*leaves).to_dense())
        return (x * torch.cholesky_solve(x, factor)).sum() + 2 * factor.diagonal().log().sum()

    if case.positive:
        return {
            "likelihood": gradient(arrays, likelihood),
            "matmat": lambda: A @ columns,
            "solve": lambda: torch.cholesky_solve(columns, torch.linalg.cholesky(A)),
            "logdet": lambda: 2 * torch.linalg.cholesky(A).diagonal().log().sum(),
        }
    return {
        "matmat": lambda: A @ columns,
        "solve": lambda: torch.linalg.solve(A, columns),
        "logdet": lambda: torch.linalg.slogdet(A)[1],
    }


def with_linear_operator(case: Case, X: np.ndarray, dtype: str) -> dict[str, Callable[[], Any]]:
    from linear_operator import operators

    if case.linear_operator is None:
        return {}
    arrays, columns = as_torch(case, X, dtype)
    make = case.linear_operator
    A = make(operators, *arrays)
    found = {"matmat": lambda: A @ columns}
    x = columns[:, 0].clone()

    def likelihood(*leaves: torch.Tensor) -> torch.Tensor:
        quadratic, log = make(operators, *leaves).inv_quad_logdet(x[:, None], logdet=True)
        return quadratic + log

    if not case.product:
        found["likelihood"] = gradient(arrays, likelihood)
        found["solve"] = lambda: make(operators, *arrays).solve(columns)
        found["logdet"] = lambda: make(operators, *arrays).logdet()
    return found


def on_numpy(case: Case, X: np.ndarray, dtype: str) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Return the functions of SciPy and of this library, both on NumPy arrays."""
    import scipy.linalg

    solvers = {"circulant": scipy.linalg.solve_circulant, "toeplitz": scipy.linalg.solve_toeplitz}
    if case.name not in solvers:
        return {}, {}
    column, columns, solve = case.arrays[0].astype(dtype), X.astype(dtype), solvers[case.name]
    return {"solve": lambda: solve(column, columns)}, {"solve": lambda: sl.solve(case.make(column), columns)}


def under_jit(case: Case, X: np.ndarray, dtype: str) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Return the functions of lineax and of this library, both on jax."""
    import jax
    import lineax

    if case.function is None:
        return {}, {}
    apply = case.function
    arrays = [jax.numpy.asarray(a.astype(dtype)) for a in case.arrays]
    columns = jax.numpy.asarray(X.astype(dtype))
    tolerance = 1e-8 if dtype == "float64" else 1e-5
    solver = lineax.CG(rtol=tolerance, atol=0.0, max_steps=1000)

    def operator(arrays: Any) -> Any:
        shape = jax.ShapeDtypeStruct((X.shape[0],), dtype)
        return lineax.FunctionLinearOperator(lambda x: apply(*arrays, x), shape, lineax.positive_semidefinite_tag)

    def solve(arrays: Any, columns: Any) -> Any:
        one = lambda b: lineax.linear_solve(operator(arrays), b, solver).value  # noqa: E731
        return jax.vmap(one, 1, 1)(columns)

    peer = {"matmat": lambda arrays, X: jax.vmap(operator(arrays).mv, 1, 1)(X), "solve": solve}
    own = {
        "matmat": lambda arrays, X: case.make(*arrays) @ X,
        "solve": lambda arrays, X: sl.solve(case.make(*arrays), X),
    }

    def ready(f: Callable) -> Callable[[], Any]:
        compiled = jax.jit(f)
        return lambda: compiled(arrays, columns).block_until_ready()

    return {k: ready(f) for k, f in peer.items()}, {k: ready(f) for k, f in own.items()}


# -- measuring -------------------------------------------------------------------------------------------------------


def truths(case: Case, X: np.ndarray) -> dict[str, Any]:
    """Return reference results by formulas in float64; log-determinants only if they are cheap."""
    A = case.make(*case.arrays)
    found = {"matmat": A @ X}
    if case.name == "toeplitz":
        r = TOEPLITZ_RATIO
        X0, X2 = np.pad(X, ((1, 0), (0, 0)))[:-1], np.pad(X, ((0, 1), (0, 0)))[1:]
        ends = np.where(np.isin(np.arange(len(X)), (0, len(X) - 1)), 1, 1 + r * r)[:, None]
        found |= {"solve": (ends * X - r * (X0 + X2)) / (1 - r * r), "logdet": (len(X) - 1) * np.log(1 - r * r)}
        return found | {"likelihood": X[:, 0] @ found["solve"][:, 0] + found["logdet"]}
    found["solve"] = np.asarray(cola.inv(A) @ X)
    arrays = case.arrays
    if case.name == "kronecker":
        n = X.shape[0]
        found["logdet"] = sum(n // len(a) * np.linalg.slogdet(a)[1] for a in arrays)
    elif case.name == "kronecker_plus_identity":
        values = np.multiply.outer(*map(np.linalg.eigvalsh, arrays))
        found["logdet"] = np.log(values + NOISE).sum()
    elif case.name == "circulant":
        found["logdet"] = np.log(np.abs(np.fft.fft(arrays[0]))).sum()
    elif case.name == "low_rank_plus_diagonal":
        U, d = arrays
        found["logdet"] = np.log(d).sum() + np.linalg.slogdet(np.eye(U.shape[1]) + (U.T / d) @ U)[1]
    elif case.name == "block_tensor_train":
        parts = case.make(*arrays).structure.factors
        found["logdet"] = sum(f.carried * np.linalg.slogdet(a)[1].sum() for f, a in zip(parts, arrays, strict=True))
    else:
        found["logdet"] = sum(np.linalg.slogdet(a)[1].sum() for a in arrays)
    return found | {"likelihood": X[:, 0] @ found["solve"][:, 0] + found["logdet"]}


def steady(functions: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median seconds of each function, called in turn in a random order; slow functions run less often."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, begin = np.random.default_rng(0), time.perf_counter()
    for repeat in range(repeats):
        for name in order.permutation(list(functions)):
            if not repeat or min(times[name]) < 0.05:  # an untimed call before a fast one
                functions[name]()
            start = clock()
            functions[name]()
            times[name].append(clock() - start)
        if repeat >= 2 and time.perf_counter() - begin > SECONDS:
            break
    return {name: statistics.median(found) for name, found in times.items()}


def error_of(found: Any, wanted: np.ndarray) -> float:
    found = np.asarray(found.detach() if hasattr(found, "detach") else found, dtype=np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def measure(
    case: Case, n: int, columns: int, arguments: argparse.Namespace, absent: Sequence[str]
) -> list[dict[str, Any]]:  # fmt: skip
    """Return a row for each operation."""
    X = np.random.default_rng(n).standard_normal((n, columns))
    wanted = truths(case, X)
    contestants = {"ours": ours(case, X, arguments.dtype)}
    if "linear_operator" not in absent:
        contestants["linear_operator"] = with_linear_operator(case, X, arguments.dtype)
    if "scipy" not in absent:
        contestants["scipy"], contestants["ours_numpy"] = on_numpy(case, X, arguments.dtype)
    if "lineax" not in absent:
        contestants["lineax"], contestants["ours_jit"] = under_jit(case, X, arguments.dtype)
    whole = dense(case, X, arguments.dtype) if n <= arguments.dense_limit else {}
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    rows = []
    for operation in arguments.operations:
        row: dict[str, Any] = {"structure": case.name, "n": n, "columns": columns, "operation": operation}
        fast = {k: f[operation] for k, f in contestants.items() if operation in f}
        if "ours" not in fast:
            continue
        row["error"] = {k: error_of(f(), wanted[operation]) for k, f in fast.items()}
        seconds = {}
        pairs = {"linear_operator": "ours", "scipy": "ours_numpy", "lineax": "ours_jit"}
        for peer, own in pairs.items():
            both = {k: fast[k] for k in (peer, own) if k in fast}
            seconds |= steady(both, arguments.repeats * INNER, clock)
        row["microseconds"] = {k: round(s * 1e6, 1) for k, s in seconds.items()}
        ratios = {peer: seconds[peer] / seconds[own] for peer, own in pairs.items() if peer in seconds}
        if operation in whole:
            row["error"]["dense"] = error_of(whole[operation](), wanted[operation])
            both = steady({"dense": whole[operation], "ours": fast["ours"]}, arguments.repeats, clock)
            row["microseconds"]["dense"] = round(both["dense"] * 1e6, 1)
            ratios["dense"] = both["dense"] / both["ours"]
        row["ratio"] = ratios
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format our microseconds and the relative times of the others, with errors above 1e-3 in brackets."""
    head = ("structure", "n", "columns", "operation", "µs", "dense LAPACK", *(peer.replace("_", " ") for peer in PEERS))
    cells = [head]
    for row in rows:
        shown = []
        for name in ("dense", *PEERS):
            ratio, wrong = row["ratio"].get(name), row["error"].get(name, 0.0)
            text = "-" if ratio is None else f"x{ratio:.3g}"
            shown.append(text if wrong < 1e-3 else f"{text} (error {wrong:.0e})")
        cells.append(
            (
                row["structure"].replace("_plus_", " + ").replace("_", " "),
                str(row["n"]),
                str(row.get("columns", 16)),
                LABELS[row["operation"]],
                f"{row['microseconds']['ours']:.0f}",
                *shown,
            )
        )
    return aligned(cells)


def report(result: dict) -> str:
    """Format a result as the table of the documentation."""
    return table(result["rows"])


def main() -> None:
    names = [case.__name__ for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 16384], help="powers of 2")
    parser.add_argument("--structures", nargs="+", default=names, choices=names)
    parser.add_argument("--operations", nargs="+", default=list(OPERATIONS), choices=OPERATIONS)
    parser.add_argument("--columns", type=int, nargs="+", default=[16], help="right-hand sides")
    parser.add_argument("--repeats", type=int, default=5, help=f"of dense; {INNER} times as many of the others")
    parser.add_argument("--dtype", default="float64", choices=["float32", "float64"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dense-limit", type=int, default=4096, help="rows of the largest dense matrix")
    parser.add_argument("--keep-memory", action="store_true", help="make the process keep the memory that it frees")
    parser.add_argument("--out", metavar="NAME", help="the JSON file to write, or its name in results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    threadpool_limits(arguments.threads)  # also NumPy's and SciPy's
    allocator = "keeps freed memory" if arguments.keep_memory and keep_memory() else "default"
    absent = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if "lineax" not in absent:
        import jax

        jax.config.update("jax_enable_x64", True)
    rows: list[dict[str, Any]] = []
    for n, columns in itertools.product(arguments.sizes, arguments.columns):
        for make in CASES:
            if make.__name__ in arguments.structures:
                rows += measure(make(n, np.random.default_rng(n)), n, columns, arguments, absent)
    clock = "cpu" if arguments.threads == 1 else "wall"
    rate = peak_rate(getattr(torch, arguments.dtype), clock)
    print(f"{table(rows)}\none dense product of 2048 x 2048: {rate:.3g} GFLOP/s")
    for name in absent:
        print(f"{name}: absent")
    left = [n for n in arguments.sizes if n > arguments.dense_limit]
    if left:
        print(f"dense: left out at n = {', '.join(map(str, left))}")
    if arguments.out:
        setting = {k: v for k, v in vars(arguments).items() if k not in ("out", "keep_memory")}
        setting |= {"absent": absent, "clock": clock, "allocator": allocator}
        versions = {name: version(name.replace("_", "-")) for name in PEERS if name not in absent}
        found = {"setting": setting, "machine": machine("cpu"), "versions": versions, "peak_gflops": rate, "rows": rows}
        write_result(result_path(arguments.out), found)


if __name__ == "__main__":
    # Set before jax starts: one thread for all libraries.
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.setdefault("XLA_FLAGS", flags)
    main()
