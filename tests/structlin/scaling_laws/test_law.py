"""Fits: known laws come back, outliers and starts do not matter, and bad points are refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from structlin.scaling_laws import LOSSES, PowerLaw, fit_power_law, pareto_frontier

COMPUTE = np.logspace(5.0, 9.5, 12)
EXPONENTS = st.floats(0.02, 0.9)


@settings(max_examples=40, deadline=None)
@given(
    alpha=EXPONENTS,
    log_a=st.floats(-5, 20),
    start=st.floats(1e-3, 1e12),
    decades=st.floats(0.5, 9),
    loss=st.sampled_from(LOSSES),
)
def test_exact_law(alpha: float, log_a: float, start: float, decades: float, loss: str) -> None:
    compute = start * np.logspace(0, decades, 7)
    law = PowerLaw(log_a, alpha)
    fit = fit_power_law(compute, law(compute), loss=loss)
    assert fit.law.exponent == pytest.approx(alpha, rel=1e-6, abs=1e-9)
    assert fit.law(compute) == pytest.approx(law(compute), rel=1e-7)
    assert fit.law.floor == 0
    assert fit.free_parameters == 2


@settings(max_examples=40, deadline=None)
@given(alpha=st.floats(0.15, 0.9), share=st.floats(0.05, 0.9), scale=st.floats(1e-3, 1e3), loss=st.sampled_from(LOSSES))
def test_exact_law_with_a_floor(alpha: float, share: float, scale: float, loss: str) -> None:
    """The floor is a share of the last error, so that it shows to any degree."""
    bare = PowerLaw(math.log(scale), alpha)
    floor = share / (1 - share) * bare(COMPUTE[-1])
    error = bare(COMPUTE) + floor
    fit = fit_power_law(COMPUTE, error, floor=True, loss=loss)
    assert fit.law(COMPUTE) == pytest.approx(error, rel=1e-5)
    assert fit.law.floor == pytest.approx(floor, rel=1e-2)
    assert fit.law.exponent == pytest.approx(alpha, rel=1e-2)
    known = fit_power_law(COMPUTE, error, floor=floor, loss=loss)
    assert known.law.floor == floor
    assert known.law.exponent == pytest.approx(alpha, rel=1e-5)
    assert (fit.free_parameters, known.free_parameters) == (3, 2)


@settings(max_examples=30, deadline=None)
@given(alpha=EXPONENTS, seed=st.integers(0, 2**32 - 1), loss=st.sampled_from(LOSSES))
def test_noisy_law(alpha: float, seed: int, loss: str) -> None:
    """The exponent comes back within six standard errors of the least-squares slope."""
    noise = 0.03 * np.random.default_rng(seed).standard_normal(len(COMPUTE))
    fit = fit_power_law(COMPUTE, 2 * COMPUTE**-alpha * np.exp(noise), loss=loss)
    standard_error = 0.03 / math.sqrt(np.square(np.log(COMPUTE) - np.log(COMPUTE).mean()).sum())
    assert abs(fit.law.exponent - alpha) < 6 * standard_error


@pytest.mark.parametrize("floor", [False, True, 0.01])
def test_least_squares_against_another_minimiser(floor: bool | float) -> None:
    """Nelder-Mead on the sum of squares, from the true law, finds nothing lower."""
    noise = 0.05 * np.random.default_rng(3).standard_normal(len(COMPUTE))
    error = (0.02 + 4 * COMPUTE**-0.4) * np.exp(noise)
    fit = fit_power_law(COMPUTE, error, floor=floor, loss="linear")

    def squares(p: np.ndarray) -> float:
        f = p[2] if floor is True else float(floor)
        return math.inf if f < 0 else np.square(np.log(error) - np.log(f + np.exp(p[0] - p[1] * np.log(COMPUTE)))).sum()

    start = [math.log(4), 0.4, 0.02][: 3 if floor is True else 2]
    best = minimize(squares, start, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14, "maxiter": 9999})
    assert np.square(fit.residuals).sum() <= best.fun * (1 + 1e-6)
    assert fit.law.exponent == pytest.approx(best.x[1], rel=1e-3)


@pytest.mark.parametrize("floor", [False, True])
def test_outlier(floor: bool) -> None:
    noise = 0.01 * np.random.default_rng(0).standard_normal(len(COMPUTE))
    error = (0.05 * floor + 3 * COMPUTE**-0.3) * np.exp(noise)
    error[-3] *= 1.5  # a run that failed
    robust, plain = (abs(fit_power_law(COMPUTE, error, floor=floor, loss=loss).law.exponent - 0.3) for loss in LOSSES)
    assert robust < (0.05 if floor else 0.003)
    assert robust < 0.7 * plain


def test_law() -> None:
    law = PowerLaw(math.log(3.0), 0.5, 0.1)
    assert law.compute(law(1e6)) == pytest.approx(1e6)
    assert law(np.array([4.0, 9.0])) == pytest.approx([1.6, 1.1])
    assert law.coefficient == pytest.approx(3)
    assert law.compute(0.1) == law.compute(0.05) == math.inf
    assert PowerLaw(1e6, 1.0).coefficient == math.inf
    with pytest.raises(ValueError, match=r"does not fall with compute: the exponent must be positive, got -0\.1"):
        PowerLaw(0.0, -0.1).compute(0.5)


def test_booleans_of_numpy_fit_or_omit_the_floor() -> None:
    error = 2 + 3 * COMPUTE**-0.4
    for floor in (True, False):
        plain, given = (fit_power_law(COMPUTE, error, floor=kind(floor)) for kind in (bool, np.bool_))
        assert given.law == plain.law
        assert given.floor is plain.floor


def test_rising_errors_have_a_negative_exponent() -> None:
    assert fit_power_law(COMPUTE, COMPUTE**0.2).law.exponent == pytest.approx(-0.2)


def test_quality_of_the_fit() -> None:
    fit = fit_power_law([1, 10, 100], [1.0, 0.5, 0.5], loss="linear")
    logs, t = np.log([1, 0.5, 0.5]), np.array([-1.0, 0, 1])
    expected = logs - logs.mean() - t * (t @ logs) / 2
    assert fit.residuals == pytest.approx(expected)
    assert fit.deviation == pytest.approx(math.sqrt(expected @ expected))
    assert fit.r_squared == pytest.approx(1 - expected @ expected / np.square(logs - logs.mean()).sum())
    assert math.isnan(fit_power_law([1, 10], [1, 0.5]).deviation)
    assert math.isnan(fit_power_law([1, 10], [1, 1]).r_squared)


@pytest.mark.parametrize(
    ("compute", "error", "options", "message"),
    [
        ([1, 2], [1.0], {}, r"same shape \(n,\), got \(2,\) and \(1,\)"),
        ([[1, 2]], [[1, 2]], {}, r"same shape \(n,\), got \(1, 2\)"),
        ([1, float("nan")], [1, 2], {}, "compute must not contain NaN, got one at index 1"),
        ([1, 0], [1, 2], {}, "compute must be positive and finite to have a logarithm, got 0"),
        ([1, 2], [1, float("inf")], {}, "error must be positive and finite to have a logarithm, got inf"),
        ([3, 3, 3], [1, 2, 3], {}, "a law of 2 parameters needs at least 2 different values of compute, got 1"),
        ([1, 2, 2], [1, 2, 3], {"floor": True}, "a law of 3 parameters needs at least 3 different values of compute"),
        ([1, 2], [0.5, 0.4], {"floor": 0.4}, r"below every error, got 0\.4 and a smallest error of 0\.4"),
        ([1, 2], [0.5, 0.4], {"floor": -0.1}, r"must be at least 0 and below every error, got -0\.1"),
        ([1, 2], [0.5, 0.4], {"loss": "huber"}, "unknown loss 'huber'; one of soft_l1, linear"),
    ],
)
def test_refused(compute: list, error: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_power_law(compute, error, **options)


@settings(max_examples=100, deadline=None)
@given(points=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_frontier_against_the_definition(points: list[tuple[int, int]]) -> None:
    compute, error = [p[0] for p in points], [p[1] for p in points]
    found = pareto_frontier(compute, error).tolist()
    beaten = [
        any(
            (x <= compute[i] and y <= error[i] and (x < compute[i] or y < error[i])) or ((x, y) == points[i] and j < i)
            for j, (x, y) in enumerate(points)
        )
        for i in range(len(points))
    ]
    assert sorted(found) == [i for i, worse in enumerate(beaten) if not worse]
    assert [compute[i] for i in found] == sorted(compute[i] for i in found)
