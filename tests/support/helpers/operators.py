"""Operators of structlin at random."""

import structlin


def random(name, shape, seed=0, backend="numpy", dtype="float64", **options):
    return structlin.structure_class(name).random(shape, seed=seed, backend=backend, dtype=dtype, **options)
