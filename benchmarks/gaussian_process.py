"""Likelihood of a Gaussian process on a square grid, with its gradient, by this library and by linear_operator.

    python benchmarks/gaussian_process.py --sides 60 300 1000 --out gaussian_process

The covariance is ``s (K (x) K) + c I`` with ``K[i, j] = exp(-|x_i - x_j| / l)`` on a grid of side x side points, in
float64 on torch. The script measures the negative log-likelihood ``(y^T A^-1 y + log det A) / 2`` with its gradient
with respect to l, s and c, from the arrays to the gradient. Runs are interleaved, and the table shows medians. With one
thread, the default, times are CPU times. ``error`` has the relative error of the value and the largest relative error
of the gradient. The reference is the formula by eigenvalues of K in NumPy, and its central differences.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import cola
import numpy as np
import torch
from _measure import aligned, machine, result_path, write_result

import structlin as sl

PARAMETERS = (0.2, 1.0, 0.1)  # length, scale, noise
STEP = 1e-4  # of the central differences, relative to each parameter
Likelihood = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def kernel(x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    return torch.exp(-(x[:, None] - x).abs() / length)


def ours(x: torch.Tensor, y: torch.Tensor) -> Likelihood:
    def likelihood(length: torch.Tensor, scale: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        k = kernel(x, length)
        K = cola.PSD(sl.Kronecker(scale * k, k))
        A = cola.PSD(K + noise * cola.ops.I_like(K))
        answer = sl.linalg.inv_quad_logdet(A, y, full_output=True)
        if answer.verdict is not sl.linalg.Verdict.VERIFIED:
            raise ArithmeticError(f"the solution is {answer.verdict.value}, with an error of {answer.error}")
        quadratic, log = answer.value
        return (quadratic + log) / 2

    return likelihood


def with_linear_operator(x: torch.Tensor, y: torch.Tensor) -> Likelihood:
    from linear_operator import operators as lo

    def likelihood(length: torch.Tensor, scale: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        k = kernel(x, length)
        K = lo.KroneckerProductLinearOperator(lo.DenseLinearOperator(scale * k), lo.DenseLinearOperator(k))
        shift = lo.ConstantDiagLinearOperator(noise.reshape(1), diag_shape=len(y))
        quadratic, log = lo.KroneckerProductAddedDiagLinearOperator(K, shift).inv_quad_logdet(y[:, None], logdet=True)
        return (quadratic + log) / 2

    return likelihood


def formula(x: np.ndarray, y: np.ndarray, length: float, scale: float, noise: float) -> float:
    """Return the negative log-likelihood by the eigenvalues and eigenvectors of K."""
    values, vectors = np.linalg.eigh(np.exp(-np.abs(x[:, None] - x) / length))
    spectrum = scale * np.multiply.outer(values, values) + noise
    rotated = vectors.T @ y.reshape(len(x), len(x)) @ vectors
    return float((rotated**2 / spectrum).sum() + np.log(spectrum).sum()) / 2


def truth(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Return value and gradient by the formula."""
    slopes = []
    for k, parameter in enumerate(PARAMETERS):
        ends = [[p + (sign * STEP * parameter if i == k else 0) for i, p in enumerate(PARAMETERS)] for sign in (1, -1)]
        slopes.append((formula(x, y, *ends[0]) - formula(x, y, *ends[1])) / (2 * STEP * parameter))
    return formula(x, y, *PARAMETERS), np.array(slopes)


def measure(side: int, arguments: argparse.Namespace) -> dict[str, Any]:
    x = torch.linspace(0, 1, side, dtype=torch.float64)
    y = torch.tensor(np.random.default_rng(side).standard_normal(side * side))
    contestants = {"ours": ours(x, y)}
    if importlib.util.find_spec("linear_operator") is not None:
        contestants["linear_operator"] = with_linear_operator(x, y)
    value, slopes = truth(x.numpy(), y.numpy())
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contestants}
    errors = {}
    for _ in range(arguments.repeats + 1):  # the first one does not count
        for name, likelihood in contestants.items():
            leaves = [torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in PARAMETERS]
            start = clock()
            found = likelihood(*leaves)
            gradient = torch.autograd.grad(found, leaves)
            times[name].append(clock() - start)
            apart = np.abs(np.array([float(g) for g in gradient]) / slopes - 1).max()
            errors[name] = [abs(float(found.detach()) / value - 1), float(apart)]
    seconds = {name: statistics.median(found[1:]) for name, found in times.items()}
    return {"side": side, "points": side * side, "seconds": seconds, "error": errors}


def table(rows: list[dict[str, Any]]) -> str:
    names = [n for n in ("ours", "linear_operator") if n in rows[0]["seconds"]]
    cells = [("grid", "points", *(f"{n}, s" for n in names), "error of value", "of gradient")]
    for row in rows:
        seconds = [f"{row['seconds'][n]:.3g}" for n in names]
        errors = [f"{e:.0e}" for e in row["error"]["ours"]]
        cells.append((f"{row['side']} x {row['side']}", str(row["points"]), *seconds, *errors))
    return aligned(cells)


def report(result: dict) -> str:
    """Format a result as the table of the documentation."""
    return table(result["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[60, 300, 1000], help="points along each axis")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", metavar="NAME", help="the JSON file to write, or its name in results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(side, arguments) for side in arguments.sides]
    print(table(rows))
    if arguments.out:
        setting = {k: v for k, v in vars(arguments).items() if k != "out"}
        write_result(result_path(arguments.out), {"setting": setting, "machine": machine("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
