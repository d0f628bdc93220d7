"""The law in two sizes: known laws come back, against SciPy's own optimiser, and against the published constants."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from structlin.scaling_laws import METHODS, TERMS, LossLaw, fit_envelope, fit_isoflop, fit_loss_law, lacks_sizes

LAW = LossLaw(E=1.8172, A=482.0, alpha=0.3478, B=2085.4, beta=0.3659)
# Runs read off figure 4 of Hoffmann et al. (Besiroglu et al. 2024): columns parameters, training_flops, loss. The file
# has no licence that would let it be shipped.
RUNS = Path(os.environ.get("STRUCTLIN_CHINCHILLA", "chinchilla_figure4.csv"))


def grid(models: int = 5, data: int = 4) -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(np.logspace(7.5, 9.5, models), np.logspace(9, 11, data))
    return n.ravel(), d.ravel()


def noisy(law: LossLaw, n: np.ndarray, d: np.ndarray, seed: int, deviation: float = 0.005) -> np.ndarray:
    return law(n, d) * np.exp(deviation * np.random.default_rng(seed).standard_normal(len(n)))


def objective(p: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray, delta: float) -> float:
    """Equation of section D.2, written out."""
    e, a, alpha, b, beta = p
    r = np.abs(np.log(y) - np.log(np.exp(e) + np.exp(a - alpha * np.log(n)) + np.exp(b - beta * np.log(d))))
    return float(np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)).sum())


@settings(max_examples=15, deadline=None)
@given(
    e=st.floats(0.5, 3), alpha=st.floats(0.15, 0.8), beta=st.floats(0.15, 0.8), a=st.floats(0.05, 2),
    b=st.floats(0.05, 2),
)  # fmt: skip
def test_a_law_without_noise_comes_back(e: float, alpha: float, beta: float, a: float, b: float) -> None:
    law = LossLaw(e, a * 1e8**alpha, alpha, b * 1e10**beta, beta)
    n, d = grid()
    found = fit_loss_law(n, d, law(n, d)).law
    assert (found.E, found.alpha, found.beta) == pytest.approx((e, alpha, beta), rel=1e-3)
    assert np.allclose([found.A, found.B], [law.A, law.B], rtol=2e-2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("delta", [1e-3, 1e-2, 1.0])
def test_no_other_optimiser_finds_less(seed: int, delta: float) -> None:
    n, d = grid()
    y = noisy(LAW, n, d, seed)
    fit = fit_loss_law(n, d, y, delta=delta)
    assert fit.objective == pytest.approx(objective(np.array(fit.law.parameters), n, d, y, delta), rel=1e-6)
    for start in ((0.3, 5, 0.3, 7, 0.3), (0.6, 6.2, 0.35, 7.6, 0.37), fit.law.parameters):
        for method in ("BFGS", "Nelder-Mead"):
            other = minimize(objective, start, (n, d, y, delta), method=method, options={"maxiter": 4000})
            assert fit.objective <= other.fun * (1 + 1e-6)


def test_gradient() -> None:
    n, d = grid(3, 5)
    y = np.concatenate([noisy(LAW, n, d, 1), noisy(LAW, n, d, 2) * 0.97])
    fit = fit_loss_law(np.tile(n, 2), np.tile(d, 2), y, groups=["a"] * 15 + ["b"] * 15)
    p = fit.point + 0.05 * np.random.default_rng(0).standard_normal(len(fit.point))
    data, ones = fit.problem.y[None], np.ones((1, 30))
    steps = 1e-6 * np.eye(len(p))
    numeric = [
        float((fit.problem.value((p + h)[None], data, ones) - fit.problem.value((p - h)[None], data, ones))[0] / 2e-6)
        for h in steps
    ]
    assert fit.problem.gradient(p[None], data, ones)[0] == pytest.approx(numeric, rel=1e-4, abs=1e-9)


def test_a_law_of_integers() -> None:
    law = LossLaw(2, 400, 1, 410, 1)
    assert law(10, 20) == 2 + 40 + 20.5
    np.testing.assert_allclose(law(np.array([10, 20]), [20, 41]), [62.5, 32])
    best = law.optimum(6 * 400 * 410)
    assert (best.params, best.tokens) == pytest.approx((400, 410))


def test_outliers_are_held_down() -> None:
    n, d = grid(6, 6)
    y = noisy(LAW, n, d, 0)
    y[[3, 17]] *= 1.5
    assert fit_loss_law(n, d, y).law.alpha == pytest.approx(LAW.alpha, abs=0.03)
    assert abs(fit_loss_law(n, d, y, delta=10.0).law.alpha - LAW.alpha) > 0.05


def test_optimum_is_the_lowest_of_all_splits() -> None:
    for budget, flops in ((1e21, 6.0), (3e18, 2.5)):
        best = LAW.optimum(budget, flops=flops)
        assert flops * best.params * best.tokens == pytest.approx(budget)
        n = best.params * np.logspace(-1, 1, 2001)
        losses = LAW(n, budget / (flops * n))
        assert best.loss == pytest.approx(losses.min())
        assert n[losses.argmin()] == pytest.approx(best.params, rel=2e-3)
        assert LAW.frontier(flops=flops)(budget) == pytest.approx(best.loss)
    growth = math.log(LAW.optimum(1e22).params / LAW.optimum(1e20).params) / math.log(100)
    assert growth == pytest.approx(LAW.allocation)


def two_structures(seed: int | None = None) -> tuple[Any, ...]:
    """The second structure has the error of 3 times as many parameters: A is 3**alpha times smaller."""
    n, d = grid()
    better = LossLaw(LAW.E, LAW.A / 3**LAW.alpha, LAW.alpha, LAW.B, LAW.beta)
    y = [law(n, d) if seed is None else noisy(law, n, d, seed + k, 0.002) for k, law in enumerate((LAW, better))]
    return np.tile(n, 2), np.tile(d, 2), np.concatenate(y), ["dense"] * 20 + ["btt"] * 20, better


def test_one_law_for_several_structures() -> None:
    n, d, y, groups, better = two_structures()
    fit = fit_loss_law(n, d, y, groups=groups)
    dense, btt = fit.laws["dense"], fit.laws["btt"]
    assert fit.free_parameters == 7
    assert (dense.E, dense.B, dense.beta) == (btt.E, btt.B, btt.beta)
    assert np.isclose(btt.A, better.A, rtol=1e-2)
    separate = fit_loss_law(n, d, y, groups=groups, shared=())
    assert separate.free_parameters == 10
    all_but_a = fit_loss_law(n, d, y, groups=groups, shared=("E", "alpha", "B", "beta"))
    assert all_but_a.laws["btt"].alpha == all_but_a.laws["dense"].alpha
    with pytest.raises(ValueError, match="laws of 2 groups, dense, btt; use laws"):
        _ = fit.law


def test_multiplier_between_structures() -> None:
    n, d, y, groups, better = two_structures(5)
    drawn = fit_loss_law(n, d, y, groups=groups).bootstrap(200)
    loss = 2.3
    exact = LAW.frontier().compute(loss) / better.frontier().compute(loss)
    found = drawn.multiplier("btt", "dense", loss=loss)
    assert found.low < exact < found.high
    assert found.value == pytest.approx(exact, rel=0.1)
    assert exact == pytest.approx(3, rel=1e-6), "compute is N D: a third of N at equal D"
    assert drawn.multiplier("dense", "btt", loss=loss).value == pytest.approx(1 / found.value)
    # Terms that are shared move together, so that the interval is narrower than of two fits apart.
    apart = fit_loss_law(n, d, y, groups=groups, shared=()).bootstrap(200).multiplier("btt", "dense", loss=loss)
    assert found.high / found.low < apart.high / apart.low
    with pytest.raises(ValueError, match=r"neither law reaches a loss of 1\.5"):
        drawn.multiplier("btt", "dense", loss=1.5)
    with pytest.raises(ValueError, match="there is no group 'monarch'; one of dense, btt"):
        drawn.multiplier("monarch", "dense", loss=loss)


@pytest.mark.parametrize("method", METHODS)
def test_bootstrap(method: str) -> None:
    n, d = grid()
    fit = fit_loss_law(n, d, noisy(LAW, n, d, 3))
    drawn, again = (fit.bootstrap(100, seed=2, method=method) for _ in range(2))
    assert np.array_equal(drawn.draws["all"], again.draws["all"])
    for term in TERMS:
        value = drawn.term(term, confidence=0.8)
        assert value.low < value.value < value.high
        assert value.value == getattr(fit.law, term)
    best = drawn.optimum(1e21)
    assert best["params"].value == fit.law.optimum(1e21).params
    assert best["loss"].low < best["loss"].value < best["loss"].high
    assert drawn.allocation().low < fit.law.allocation < drawn.allocation().high


@pytest.mark.slow
@pytest.mark.parametrize("models", [4, 5])
def test_coverage(models: int) -> None:
    """Nominally 0.9, in 200 experiments: two standard errors of a share are 0.04, and wide is allowed."""
    n, d = grid(models, 3)
    inside: dict[str, list[bool]] = {}
    for seed in range(200):
        drawn = fit_loss_law(n, d, noisy(LAW, n, d, seed)).bootstrap(100, seed=seed)
        for term in TERMS:
            value = drawn.term(term, confidence=0.9)
            inside.setdefault(term, []).append(not value.excludes(getattr(LAW, term)))
    assert all(np.mean(each) >= 0.86 for each in inside.values()), {k: np.mean(v) for k, v in inside.items()}


def test_notes_name_what_the_points_do_not_determine() -> None:
    n, d = grid()
    assert fit_loss_law(n, d, noisy(LAW, n, d, 0)).notes == ()
    rising = fit_loss_law(n, d, 2 * (n / 1e8) ** 0.1)
    assert any("the loss does not fall with its size" in note or "at its bound" in note for note in rising.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": [1e6, -1e6] * 10}, "params must be positive and finite to have a logarithm, got -1e"),
        ({"loss": np.full(19, 2.0)}, "must have equal lengths, got 20, 20 and 19"),
        ({"delta": 0}, "delta must be positive and finite, got 0"),
        ({"shared": ("E", "gamma")}, "unknown term 'gamma' in shared; one of E, A, alpha, B, beta"),
        ({"groups": ["a"] * 3}, "groups must have one name for each point, got 3 names for 20 points"),
        ({"params": np.full(20, 1e6)}, "a law needs 3 different sizes of the model, got 1"),
        ({"tokens": np.tile([1e6, 1e7], 10)}, "a law needs 3 different sizes of the data, got 2"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    n, d = grid()
    arguments = {"params": n, "tokens": d, "loss": LAW(n, d)} | change
    with pytest.raises(ValueError, match=message):
        fit_loss_law(**arguments)


def test_what_has_no_optimum_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive for an optimum"):
        LossLaw(1.0, 2.0, 0.0, 3.0, 0.3).optimum(1e20)
    with pytest.raises(ValueError, match="compute and flops must be positive and finite, got inf"):
        LAW.optimum(math.inf)
    n, d = grid(2, 3)
    with pytest.raises(ValueError, match="5 parameters needs more than 5 points, got 4"):
        fit_loss_law(n[:4], d[:4], LAW(n, d)[:4])
    n, d, y, groups, _ = two_structures()
    with pytest.raises(ValueError, match="a law needs 3 different sizes of the data, got 2"):
        fit_loss_law(n, np.where(d < 1e10, 1e9, 1e10), y, groups=groups)
    assert lacks_sizes([1, 2, 3], [1, 1, 1], ["A", "alpha"]) is None


def test_parabolas() -> None:
    budgets = (1e19, 1e20, 1e21)
    n = np.concatenate([LAW.optimum(b).params * np.logspace(-0.6, 0.6, 7) for b in budgets])
    c = np.repeat(budgets, 7) * np.tile([1, 1.02, 0.98, 1, 1, 1.01, 1], 3)
    y = LAW(n, c / (6 * n))
    found = fit_isoflop(n, c, y)
    assert len(found.parabolas) == 3
    assert found.allocation.exponent == pytest.approx(LAW.allocation, abs=0.01)
    for each, budget in zip(found.parabolas, budgets, strict=True):
        assert each.compute == pytest.approx(budget, rel=0.02)
        assert each.best[0] == pytest.approx(LAW.optimum(budget).params, rel=0.05)
        assert each(each.best[0]) == pytest.approx(each.best[1])
    params, tokens = found.allocation.optimum(1e20)
    assert 6 * params * tokens == pytest.approx(1e20)
    # A budget whose sizes are all too small has its minimum outside of them; one of two sizes has no parabola.
    more_n = np.concatenate([n, LAW.optimum(1e22).params * np.array([0.1, 0.2, 0.3]), [1e8, 2e8]])
    more_c = np.concatenate([c, [1e22] * 3, [1e17] * 2])
    found = fit_isoflop(more_n, more_c, LAW(more_n, more_c / (6 * more_n)))
    reasons = list(found.left_out.values())
    assert len(found.parabolas) == 3
    assert any("outside the sizes" in reason for reason in reasons)
    assert any("a parabola needs 3 different sizes, got 2" in reason for reason in reasons)
    chosen = fit_isoflop(more_n, more_c, LAW(more_n, more_c / (6 * more_n)), budgets=[1e19, 1e21])
    assert [round(math.log10(p.compute)) for p in chosen.parabolas] == [19, 21]
    with pytest.raises(ValueError, match="at least 2 budgets with a minimum, got 1"):
        fit_isoflop(n[:7], c[:7], y[:7])


def test_envelope() -> None:
    tokens = np.logspace(8, 12, 60)
    curves = [(n, tokens, LAW(n, tokens)) for n in np.logspace(7, 10, 13)]
    found = fit_envelope(curves)
    assert found.allocation.exponent == pytest.approx(LAW.allocation, abs=0.02)
    assert found.run.tolist() == sorted(found.run.tolist()), "larger budgets want larger models"
    for compute, params in zip(found.compute[1:-1], found.params[1:-1], strict=True):
        assert params == pytest.approx(LAW.optimum(compute).params, rel=0.3)
    with pytest.raises(ValueError, match="best runs of at least 2 sizes"):
        fit_envelope(curves[:1])
    with pytest.raises(ValueError, match="run 0: tokens must ascend"):
        fit_envelope([(1e7, [1e9, 1e8], [2.0, 1.0])])


def test_the_design_of_chinchilla_gives_its_law_back() -> None:
    """Noise as that of the published fit, at sizes like those of its 245 runs."""
    generator = np.random.default_rng(4)
    c = np.exp(generator.uniform(np.log(5e18), np.log(3e21), 240))
    n = np.array([LAW.optimum(b).params for b in c]) * np.exp(generator.uniform(-1.5, 1.5, 240))
    y = LAW(n, c / (6 * n)) * np.exp(0.01 * generator.standard_t(3, 240))
    drawn = fit_loss_law(n, c / (6 * n), y).bootstrap(200)
    for term in TERMS:
        assert drawn.term(term, confidence=0.99).low < getattr(LAW, term) < drawn.term(term, confidence=0.99).high


@pytest.mark.skipif(not RUNS.exists(), reason="STRUCTLIN_CHINCHILLA names no file with the runs")
@pytest.mark.parametrize(
    ("outliers", "published"),
    [(5, (1.8172, 477.8, 0.3473, 2141.9, 0.3671)), (0, (1.891, 495.6, 0.349, 12847.0, 0.453))],
)
def test_the_published_fit_of_the_chinchilla_runs(outliers: int, published: tuple[float, ...]) -> None:
    """Besiroglu et al. 2024; without the five largest losses, and with all."""
    table = np.genfromtxt(RUNS, delimiter=",", names=True)
    order = np.argsort(-table["loss"], kind="stable")[outliers:]
    n, c, y = (table[name][order] for name in ("parameters", "training_flops", "loss"))
    law = fit_loss_law(n, c / (6 * n), y).law
    assert (law.E, law.alpha, law.beta) == pytest.approx((published[0], published[2], published[4]), abs=1e-3)
    assert np.allclose([law.A, law.B], [published[1], published[3]], rtol=2e-3)
    best = fit_isoflop(n, c, y, budgets=[6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21], tolerance=0.2)
    assert 0.44 < best.allocation.exponent < 0.56, "0.49 in the paper"
