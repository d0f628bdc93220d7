"""Intervals: they hold as often as they say, and comparisons of laws are those of the draws."""

import math

import numpy as np
import pytest
from helpers.refusals import refused
from scipy import stats

from structlin.scaling_laws import (
    METHODS,
    Estimate,
    PowerLaw,
    compare_exponents,
    compute_multiplier,
    fit_power_law,
    interpolated_multiplier,
)

COMPUTE = np.logspace(6, 9, 8)


def noisy(law: PowerLaw, seed: int, deviation: float = 0.02, compute: np.ndarray = COMPUTE) -> np.ndarray:
    return law(compute) * np.exp(deviation * np.random.default_rng(seed).standard_normal(len(compute)))


def test_parametric_interval_is_that_of_student() -> None:
    """Of a line fitted by least squares the exact interval is known."""
    compute = COMPUTE[::2]
    fit = fit_power_law(compute, noisy(PowerLaw(1.0, 0.1), 5, compute=compute), loss="linear")
    found = fit.bootstrap(4000).exponent(0.9)
    line = stats.linregress(np.log(compute), np.log(fit.error))
    half = stats.t.ppf(0.95, len(compute) - 2) * line.stderr
    assert (found.low, found.high) == pytest.approx((-line.slope - half, -line.slope + half), abs=0.12 * half)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "n", "least"), [("parametric", 4, 0.85), ("residuals", 12, 0.84), ("cases", 12, 0.86)]
)
def test_coverage(method: str, n: int, least: float) -> None:
    """Nominally 0.9, in 200 experiments: two standard errors of a share are 0.04."""
    compute, law = np.logspace(6, 9, n), PowerLaw(1.0, 0.12)
    inside = []
    for seed in range(200):
        fit = fit_power_law(compute, noisy(law, seed, compute=compute), loss="linear")
        inside.append(not fit.bootstrap(200, seed=seed, method=method).exponent(0.9).excludes(law.exponent))
    assert least <= np.mean(inside) <= 0.98


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("floor", [False, True, 0.05])
def test_methods_agree_about_the_spread(method: str, floor: bool | float) -> None:
    fit = fit_power_law(COMPUTE, noisy(PowerLaw(2.0, 0.3, 0.05), 1), floor=floor)
    drawn = fit.bootstrap(40, method=method, seed=2)
    few, again, other = (fit.bootstrap(4, method=method, seed=seed).draws for seed in (2, 2, 3))
    assert np.array_equal(few, again)
    assert not np.array_equal(few, other)
    for value in (drawn.exponent(0.8), drawn.coefficient(0.8), drawn.error(1e7, 0.8)):
        assert value.low < value.value < value.high
    assert drawn.error(1e7).value == pytest.approx(fit.law(1e7))
    floors = drawn.floor()
    assert floors.low <= fit.law.floor <= floors.high
    assert (floors.low == floors.high) == (floor is not True)


def test_exact_points_have_no_spread() -> None:
    drawn = fit_power_law(COMPUTE, PowerLaw(1.0, 0.2)(COMPUTE)).bootstrap(20)
    found = drawn.exponent()
    assert (found.low, found.high) == pytest.approx((0.2, 0.2))


def test_comparisons() -> None:
    dense = fit_power_law(COMPUTE, noisy(PowerLaw(0.0, 0.10), 1, 0.005)).bootstrap(120)
    better = fit_power_law(COMPUTE, noisy(PowerLaw(0.0, 0.13), 2, 0.005)).bootstrap(120)
    difference = compare_exponents(better, dense)
    assert difference.value == pytest.approx(0.03, abs=0.003)
    assert difference.excludes(0)
    back = compare_exponents(dense, better)
    assert back.value == -difference.value
    # exp(0) * C**-0.1 = 0.15 at C = 0.15**-10, and with 0.13 at 0.15**(-1 / 0.13).
    found = compute_multiplier(better, dense, error=0.15)
    assert found.value == pytest.approx(0.15**-10 / 0.15 ** (-1 / 0.13), rel=0.2)
    assert found.low < found.value < found.high
    assert found.excludes(1)
    assert not found.extrapolated
    assert compute_multiplier(dense, better, error=0.15).value == pytest.approx(1 / found.value)
    usual = compute_multiplier(better, dense)
    assert usual.error == max(better.fit.error.min(), dense.fit.error.min())
    assert compute_multiplier(better, dense, error=usual.error / 2).extrapolated
    assert dense.compute(0.15).value / better.compute(0.15).value == pytest.approx(found.value)


def test_the_same_law_does_not_differ_from_itself() -> None:
    """Two bootstraps of one seed are independent all the same: their difference has a width."""
    fit = fit_power_law(COMPUTE, noisy(PowerLaw(0.0, 0.1), 1)).bootstrap(400)
    difference = compare_exponents(fit, fit)
    own = fit.exponent()
    assert difference.value == 0
    assert not difference.excludes(0)
    assert difference.high - difference.low == pytest.approx(math.sqrt(2) * (own.high - own.low), rel=0.3)


def test_an_error_that_is_never_reached() -> None:
    low = fit_power_law(COMPUTE, noisy(PowerLaw(0.0, 0.3), 1, 0.01)).bootstrap(50)
    high = fit_power_law(COMPUTE, noisy(PowerLaw(2.0, 0.4, 0.05), 2, 0.01), floor=True).bootstrap(50)
    found = compute_multiplier(low, high, error=0.02)
    assert found.value == found.high == math.inf
    assert compute_multiplier(high, low, error=0.02).value == 0
    assert high.compute(0.02).value == math.inf
    with pytest.raises(ValueError, match=r"neither law reaches an error of 0\.01"):
        compute_multiplier(high, high, error=0.01)
    apart = fit_power_law(COMPUTE, noisy(PowerLaw(5.0, 0.1), 1)).bootstrap(50)
    with pytest.raises(ValueError, match="do not overlap; give the error"):
        compute_multiplier(low, apart)


def test_refused() -> None:
    fit = fit_power_law([1, 10], [1, 0.5])
    with pytest.raises(ValueError, match="2 parameters needs more points than that, got 2; add points"):
        fit.bootstrap()
    fit = fit_power_law([1, 10, 100], [1, 0.5, 0.3])
    refused(ValueError, "unknown method 'wild'; one of parametric, residuals, cases", fit.bootstrap, method="wild")
    refused(ValueError, "samples must be an integer of at least 2, got 1", fit.bootstrap, 1)
    refused(ValueError, r"confidence must be between 0 and 1, got 95", fit.bootstrap(5).exponent, 95)
    refused(ValueError, "same number of draws, got 5 and 6", compare_exponents, fit.bootstrap(5), fit.bootstrap(6))


def test_estimate() -> None:
    assert str(Estimate(3.8, 2.0, 7.123456, 0.95)) == "3.8 [2, 7.123]"


def test_known_noise() -> None:
    """The spread of an exponent is then that of the noise through the least-squares slope; two points will do."""
    compute = np.array([1e6, 1e8])
    fit = fit_power_law(compute, [0.5, 0.3], loss="linear")
    found = fit.bootstrap(2000, noise=0.005).exponent(0.9)
    deviation = math.hypot(0.005 / 0.5, 0.005 / 0.3) / math.log(100)
    half = 1.645 * deviation
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.1 * half)
    with pytest.raises(ValueError, match=r"noise must be at least 0 and needs method=.parametric., got -1"):
        fit.bootstrap(noise=-1)
    with pytest.raises(ValueError, match=r"got 0\.1 and 'cases'"):
        fit.bootstrap(noise=0.1, method="cases")


def test_interpolation() -> None:
    a = [1e6, 1e7, 1e8], [0.4, 0.2, 0.1]
    b = [1e6, 2e7, 3e7, 2e8], [0.4, 0.2, 0.3, 0.1]  # one point is beaten
    assert interpolated_multiplier(a, b, 0.2).value == pytest.approx(2)
    between = interpolated_multiplier(a, b, 0.2 * math.sqrt(2))
    assert between.value == pytest.approx(math.sqrt(2)), "halfway in the logarithms of both"
    lowest = interpolated_multiplier(a, b)
    assert (lowest.value, lowest.error) == pytest.approx((2, 0.1))
    assert math.isnan(lowest.low)
    assert not lowest.extrapolated
    drawn = interpolated_multiplier(a, b, noise=0.002, samples=300, seed=1)
    assert drawn.low < 2 < drawn.high
    assert drawn == interpolated_multiplier(a, b, noise=0.002, samples=300, seed=1)
    exact = interpolated_multiplier(a, b, noise=0.0, samples=5)
    assert (exact.low, exact.high) == (exact.value, exact.value)
    assert interpolated_multiplier(a, (b[0][:2], b[1][:2]), 0.1).value == math.inf
    seeds = [1e6, 1e6, 1e8], [0.2, 0.8, 0.1]  # geometric mean 0.4
    assert interpolated_multiplier(a, seeds, 0.2).value == pytest.approx(1)
    with pytest.raises(ValueError, match=r"the points span errors of 0\.1 to 0\.4 and 0\.1 to 0\.4 and not 0\.5"):
        interpolated_multiplier(a, b, 0.5)
    with pytest.raises(ValueError, match=r"the points span errors of 0\.1 to 0\.4 and 2 to 3"):
        interpolated_multiplier(a, ([1, 2], [3, 2]))
    with pytest.raises(ValueError, match="compute and error must be positive"):
        interpolated_multiplier(a, ([0, 2], [3, 2]))
    with pytest.raises(ValueError, match="noise must be at least 0, got -1"):
        interpolated_multiplier(a, b, noise=-1)
