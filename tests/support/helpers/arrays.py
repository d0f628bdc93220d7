"""Arrays of every library, drawn at random, and their comparison. This imports nothing of structlin."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

BACKENDS = ("numpy", "torch", "jax")
MAKE = {"numpy": np.array, "torch": torch.tensor, "jax": jnp.array}
TYPES = {"numpy": np.ndarray, "torch": torch.Tensor, "jax": jax.Array}


def draw(*shape, seed=0, dtype="float64"):
    """Gaussian numbers, of which complex ones have an imaginary part."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape)
    if dtype.startswith("complex"):
        x = x + 1j * rng.standard_normal(shape)
    return x.astype(dtype)


def gaussian(shape, seed=0, complex_=False):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if complex_ else 0)


def positive(n, seed=0, dtype="float64"):
    x = draw(n, n, seed=seed, dtype=dtype)
    return x @ x.conj().T + np.eye(n)


def spd(n, seed=0, shift=0.5):
    """A positive definite matrix of entries that do not grow with its size."""
    x = np.random.default_rng(seed).standard_normal((n, n)) / np.sqrt(n)
    return x @ x.T + shift * np.eye(n)


def on_host(x):
    return x.detach().resolve_conj().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def same(x, want, tolerance=1e-10):
    """Compare an array of any library with one of NumPy, relative to the largest number."""
    got = on_host(x)
    assert got.shape == np.shape(want), f"{got.shape} != {np.shape(want)}"
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, float(np.abs(want).max(initial=0))))
