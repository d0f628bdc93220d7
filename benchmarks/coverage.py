"""Coverage of intervals: the share of intervals that contain the true value, for runs of known laws with noise.

    python benchmarks/coverage.py --out benchmarks/results/coverage.json

Each row has 200 experiments with 200 draws of the bootstrap each. A share of 200 has a standard error of 1.5 percentage
points near 95 %. ``--only`` computes some of the rows and keeps the others of the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from structlin.scaling_laws import (
    METHODS,
    TERMS,
    Estimate,
    LossLaw,
    PowerLaw,
    compare_exponents,
    compute_multiplier,
    fit_envelope,
    fit_isoflop,
    fit_loss_law,
    fit_power_law,
)
from structlin_nn._files import atomic_write

EXPERIMENTS, DRAWS, CONFIDENCE = 200, 200, 0.95
LINE, WITH_FLOOR, OTHER = PowerLaw(1.0, 0.12), PowerLaw(1.0, 0.2, 0.05), PowerLaw(1.1, 0.14)
LAW = LossLaw(E=1.8172, A=482.0, alpha=0.3478, B=2085.4, beta=0.3659)
BETTER = LossLaw(LAW.E, LAW.A / 3**LAW.alpha, LAW.alpha, LAW.B, LAW.beta)
Found = dict[str, tuple[Estimate, float]]


def noise(generator: np.random.Generator, kind: str, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """Return factors exp(e), with e normal or from Student's t with 3 degrees of freedom."""
    if kind == "normal":
        return np.exp(deviation * generator.standard_normal(shape))
    return np.exp(deviation / 3**0.5 * generator.standard_t(3, shape))


def one_size(seed: int, method: str, n: int, floor: bool, kind: str) -> Found:
    generator, compute = np.random.default_rng(seed), np.logspace(6, 9, n)
    law = WITH_FLOOR if floor else LINE
    # Least squares for normal errors; the default loss limits the influence of outliers.
    loss = "linear" if kind == "normal" and not floor else "soft_l1"
    fit = fit_power_law(compute, law(compute) * noise(generator, kind, (n,), 0.02), floor=floor, loss=loss)
    drawn = fit.bootstrap(DRAWS, seed=seed, method=method)
    found = {
        "exponent": (drawn.exponent(CONFIDENCE), law.exponent),
        "error at 1e8": (drawn.error(1e8, CONFIDENCE), law(1e8)),
    }
    return found | ({"floor": (drawn.floor(CONFIDENCE), law.floor)} if floor else {})


def compared(seed: int, n: int) -> Found:
    generator, compute = np.random.default_rng(seed), np.logspace(6, 9, n)
    a, b = (
        fit_power_law(compute, law(compute) * noise(generator, "normal", (n,), 0.01)).bootstrap(DRAWS, seed=seed)
        for law in (OTHER, LINE)
    )
    truth = LINE.compute(0.3) / OTHER.compute(0.3)
    return {
        "difference of exponents": (compare_exponents(a, b, CONFIDENCE), OTHER.exponent - LINE.exponent),
        "less compute": (compute_multiplier(a, b, 0.3, CONFIDENCE), truth),
    }


def sizes(models: int, data: int) -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(np.logspace(7.5, 9.5, models), np.logspace(9, 11, data))
    return n.ravel(), d.ravel()


def two_sizes(seed: int, method: str, models: int, data: int, kind: str) -> Found:
    n, d = sizes(models, data)
    generator = np.random.default_rng(seed)
    drawn = fit_loss_law(n, d, LAW(n, d) * noise(generator, kind, n.shape, 0.005)).bootstrap(
        DRAWS, seed=seed, method=method
    )
    found: Found = {term: (drawn.term(term, confidence=CONFIDENCE), getattr(LAW, term)) for term in TERMS}
    best, truth = drawn.optimum(1e21, confidence=CONFIDENCE), LAW.optimum(1e21)
    found["a of N ~ C^a"] = drawn.allocation(confidence=CONFIDENCE), LAW.allocation
    return found | {f"best {name} at 1e21": (best[name], getattr(truth, name)) for name in best}


def structures(seed: int) -> Found:
    n, d = sizes(4, 3)
    generator = np.random.default_rng(seed)
    y = np.concatenate([law(n, d) * noise(generator, "normal", n.shape, 0.005) for law in (LAW, BETTER)])
    fit = fit_loss_law(np.tile(n, 2), np.tile(d, 2), y, groups=["dense"] * 12 + ["other"] * 12)
    drawn = fit.bootstrap(DRAWS, seed=seed)
    found = {"less compute": (drawn.multiplier("other", "dense", loss=2.3, confidence=CONFIDENCE), 3.0)}
    for group, law in (("dense", LAW), ("other", BETTER)):
        for term in ("A", "alpha"):
            found[f"{term} of {group}"] = drawn.term(term, group, CONFIDENCE), getattr(law, term)
    return found | {term: (drawn.term(term, "dense", CONFIDENCE), getattr(LAW, term)) for term in fit.shared}


def parabolas(seed: int) -> Found:
    generator = np.random.default_rng(seed)
    budgets = np.logspace(18.5, 21, 6)
    n = np.concatenate([LAW.optimum(c).params * np.logspace(-0.4, 0.4, 7) for c in budgets])
    c = np.repeat(budgets, 7)
    y = LAW(n, c / (6 * n)) * noise(generator, "normal", n.shape, 0.003)
    return {"a of N ~ C^a": (fit_isoflop(n, c, y).allocation.interval(CONFIDENCE), LAW.allocation)}


def envelope(seed: int) -> Found:
    generator, tokens = np.random.default_rng(seed), np.logspace(8.5, 12, 40)
    curves = [(n, tokens, LAW(n, tokens) * noise(generator, "normal", (1,), 0.003)) for n in np.logspace(7, 10.5, 15)]
    return {"a of N ~ C^a": (fit_envelope(curves).allocation.interval(CONFIDENCE), LAW.allocation)}


ROWS: dict[str, Callable[[int], Found]] = {
    **{
        f"one size, {method}, {n} points": lambda seed, m=method, n=n: one_size(seed, m, n, False, "normal")
        for method in METHODS
        for n in (6, 12)
    },
    "one size, parametric, 12 points, heavy tails": lambda seed: one_size(seed, "parametric", 12, False, "t"),
    "one size with floor, parametric, 10 points": lambda seed: one_size(seed, "parametric", 10, True, "normal"),
    "two laws in one size, 8 points each": lambda seed: compared(seed, 8),
    "two sizes, residuals, 12 points": lambda seed: two_sizes(seed, "residuals", 4, 3, "normal"),
    "two sizes, residuals, 20 points": lambda seed: two_sizes(seed, "residuals", 5, 4, "normal"),
    "two sizes, residuals, 20 points, heavy tails": lambda seed: two_sizes(seed, "residuals", 5, 4, "t"),
    "two sizes, cases, 20 points": lambda seed: two_sizes(seed, "cases", 5, 4, "normal"),
    "two structures in two sizes, 12 points each": structures,
    "iso-FLOP parabolas, 6 budgets of 7 sizes": parabolas,
    "envelope of 15 curves": envelope,
}


def coverage(row: Callable[[int], Found]) -> dict[str, float]:
    """Return the share of the experiments whose interval contains the true value, by quantity."""
    inside: dict[str, list[bool]] = {}
    for seed in range(EXPERIMENTS):
        for name, (value, truth) in row(seed).items():
            inside.setdefault(name, []).append(not value.excludes(truth))
    return {name: float(np.mean(each)) for name, each in inside.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--only", action="append", metavar="TEXT", help="rows whose names contain it; repeatable")
    arguments = parser.parse_args(argv)
    known: dict[str, Any] = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else {}
    for name, row in ROWS.items():
        if arguments.only is None or any(text in name for text in arguments.only):
            known[name] = coverage(row)
            print(name, known[name], flush=True)
            record = {
                "experiments": EXPERIMENTS, "draws": DRAWS, "confidence": CONFIDENCE,
                "rows": {name: known[name] for name in ROWS if name in known},
            }  # fmt: skip
            with atomic_write(arguments.out) as file:
                file.write((json.dumps(record, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
