"""The spectral-scale rule: its formulas, and what they do to norms, gains and updates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from helpers.refusals import refused

from structlin import (
    Structure,
    design,
    init_std,
    lr_multipliers,
    random_factors,
    rank_corrections,
    rms_cap,
    structure_names,
)
from structlin.scale import OPTIMIZERS, RULES
from structlin.testing import random_chain, to_numpy

BTT = Structure.parse("pa,pfra->frp; frp,ferp->fe", p=3, a=4, f=5, r=2, e=7)


def spectral_ratio(structure, rule="paper", draws=2):
    """Spectral norm over sqrt(d_out / d_in), averaged over draws."""
    norms = []
    for seed in range(draws):
        factors = random_factors(structure, seed=seed, rule=rule)
        matrix = structure.apply_columns(factors, np.eye(structure.d_in))
        norms.append(scipy.sparse.linalg.svds(matrix, 1, return_singular_vectors=False)[0])
    return np.mean(norms) / math.sqrt(structure.d_out / structure.d_in)


# -- formulas ------------------------------------------------------------------------------------------------------


def test_initial_deviation():
    assert init_std(BTT) == pytest.approx((math.sqrt(4) / 4, math.sqrt(6) / 6))
    assert init_std(design("dense", (5, 20))) == pytest.approx((math.sqrt(5) / 20,))
    assert init_std(design("diagonal", (9, 9))) == (1.0,)
    assert init_std(design("circulant", (9, 9))) == pytest.approx((1 / 3,))
    assert init_std(design("permutation", (9, 9))) == (0.0,)


def test_multipliers_of_adam_and_sign():
    for optimizer in ("adam", "adamw", "sign"):
        assert lr_multipliers(BTT, optimizer=optimizer) == pytest.approx((12 / (4 * 2), 12 / (6 * 2)))
        assert lr_multipliers(BTT, optimizer=optimizer, base_d_in=3) == pytest.approx((3 / 8, 3 / 12))
    assert lr_multipliers(BTT) == lr_multipliers(BTT, optimizer="adam")
    dense = design("dense", (5, 20))
    assert lr_multipliers(dense) == (1.0,)
    assert lr_multipliers(dense, base_d_in=10, base_d_out=77) == (0.5,)


def test_multipliers_of_sgd():
    """blocks * (fan_out / fan_in) / (base_d_out / base_d_in)."""
    wanted = (3 * (10 / 4) / (35 / 12), 5 * (7 / 6) / (35 / 12))
    assert lr_multipliers(BTT, optimizer="sgd") == pytest.approx(wanted)
    wanted = (3 * (10 / 4) / (8 / 6), 5 * (7 / 6) / (8 / 6))
    assert lr_multipliers(BTT, optimizer="sgd", base_d_in=6, base_d_out=8) == pytest.approx(wanted)
    assert lr_multipliers(design("dense", (5, 20)), optimizer="sgd") == (1.0,)


def test_index_arrays_learn_nothing_and_do_not_count_as_factors():
    for optimizer in OPTIMIZERS:
        assert lr_multipliers(design("permutation", (9, 9)), optimizer=optimizer) == (0.0,)


@pytest.mark.parametrize("name", structure_names())
def test_rules_of_every_structure_follow_from_its_fans(name):
    from structlin import structure_class

    for shape, options in structure_class(name).examples:
        s = design(name, shape, **options)
        count = sum(f.trainable for f in s.factors)
        for f, std, adam, sgd in zip(
            s.factors, init_std(s), lr_multipliers(s), lr_multipliers(s, optimizer="sgd"), strict=True
        ):
            if f.trainable:
                assert std == pytest.approx(math.sqrt(min(f.fan_in, f.fan_out)) / f.fan_in)
                assert adam == pytest.approx(s.d_in / (f.fan_in * count))
                assert sgd == pytest.approx(f.blocks * f.carried * f.fan_out / f.fan_in * s.d_in / s.d_out)


def test_zero_initialisation():
    low_rank = design("low_rank", (64, 64), rank=4)
    assert init_std(low_rank) == pytest.approx((math.sqrt(4) / 64, math.sqrt(4) / 4))
    assert init_std(low_rank, zero_last=True) == pytest.approx((math.sqrt(4) / 64, 0))
    # Past a bottleneck the output of the other factors would vanish with width, and with it the gradient.
    assert init_std(low_rank, rule="rank_corrected", zero_last=True) == pytest.approx((math.sqrt(1 / 64), 0))
    assert init_std(BTT, zero_last=True) == (init_std(BTT)[0], 0)
    assert init_std(BTT, rule="rank_corrected", zero_last=True) == (init_std(BTT)[0], 0)
    three = design("block_tensor_train", (64, 64), cores=3, rank=2)
    assert init_std(three, zero_last=True)[:2] == init_std(three)[:2]
    assert init_std(design("dense", (8, 8)), zero_last=True) == (0.0,)


def test_what_is_refused():
    with pytest.raises(ValueError, match="unknown rule 'mup'; one of paper, rank_corrected"):
        init_std(BTT, rule="mup")
    with pytest.raises(ValueError, match="unknown optimizer 'lamb'; one of adam, adamw, sign, sgd"):
        lr_multipliers(BTT, optimizer="lamb")
    for base in ({"base_d_in": 0}, {"base_d_out": -1, "optimizer": "sgd"}):
        with pytest.raises(ValueError, match="base sizes must be at least 1, got base_d_in="):
            lr_multipliers(BTT, **base)
    for sigma in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"sigma must be positive, got {sigma}"):
            rms_cap(np.ones(3), sigma)
    refused(ValueError, "unknown rule 'mup'", random_factors, BTT, rule="mup", seed=0)
    refused(ValueError, "unknown backend 'mxnet'", random_factors, BTT, backend="mxnet", seed=0)
    with pytest.raises(ValueError, match="unknown backend 'mxnet'; one of numpy, torch, jax"):
        random_factors(design("permutation", (3, 3)), backend="mxnet", seed=0)
    refused(ValueError, "NumPy arrays live on the CPU, got device 'cuda'", random_factors, BTT, device="cuda", seed=0)
    with jax.enable_x64(False):
        words = "jax would return float32 instead of float64; enable 64 bits"
        refused(ValueError, words, random_factors, BTT, backend="jax", dtype="float64", seed=0)


# -- norms ---------------------------------------------------------------------------------------------------------


def test_the_spectral_norm_of_the_papers_rule_does_not_depend_on_width():
    """Within 15 %, and between 1.5 and 3.6 times sqrt(d_out / d_in); all of rank 1."""
    monarchs = [("monarch", {"blocks": blocks}) for blocks in (4, 16)]
    for name, options in (("dense", {}), ("block_tensor_train", {}), *monarchs, ("block_diagonal", {"blocks": 4})):
        ratios = [spectral_ratio(design(name, (d, d), **options)) for d in (64, 256, 1024)]
        assert 1.5 < min(ratios) <= max(ratios) < 3.6
        assert max(ratios) / min(ratios) < 1.15, (name, ratios)
    for shape in ((256, 64), (64, 256), (1024, 256), (256, 1024)):
        assert 1.4 < spectral_ratio(design("dense", shape)) < 1.6
        assert 1.7 < spectral_ratio(design("block_tensor_train", shape)) < 2.2


@pytest.mark.parametrize(
    ("name", "d", "options", "ranks", "flat"),
    [
        ("block_tensor_train", 256, {}, (1, 4, 16), 1.5),
        ("block_tensor_train", 512, {"cores": 3}, (1, 2, 4, 8), 1.6),
        ("tensor_train", 256, {}, (1, 4, 16), 1.8),
        ("tensor_train", 512, {"cores": 3}, (1, 4, 16), 2.5),
    ],
)
def test_the_gain_falls_with_the_rank_and_the_correction_gives_it_back(name, d, options, ranks, flat):
    """The RMS gain of a generic vector falls as rank^(-1/2) by the paper's rule, and is exactly flat when corrected;
    the spectral norm is flat within the stated factor, by which products of several random matrices of rank 1 are
    larger than one."""
    structures = [design(name, (d, d), rank=r, **options) for r in ranks]

    def gains(rule):
        """E |A x|^2 / |x|^2 = prod fan_in * std^2, for independent entries."""
        return [
            math.prod(f.fan_in * s**2 for f, s in zip(x.factors, init_std(x, rule=rule), strict=True)) ** 0.5
            for x in structures
        ]

    assert gains("paper") == pytest.approx([gains("paper")[0] * r**-0.5 for r in ranks])
    assert gains("rank_corrected") == pytest.approx([1.0] * len(ranks))
    measured = [spectral_ratio(s, "paper") for s in structures]
    assert measured[0] / measured[-1] > 0.8 * math.sqrt(ranks[-1] / ranks[0])
    corrected = [spectral_ratio(s, "rank_corrected") for s in structures]
    assert max(corrected) / min(corrected) < flat, corrected
    assert min(corrected) > 1.9


def test_the_correction_of_rectangular_block_tensor_trains():
    for shape in ((1024, 256), (256, 1024)):
        ratios = [spectral_ratio(design("block_tensor_train", shape, rank=r), "rank_corrected") for r in (1, 4, 16)]
        assert max(ratios) / min(ratios) < 1.4, ratios
        paper = [spectral_ratio(design("block_tensor_train", shape, rank=r)) for r in (1, 4, 16)]
        assert paper[0] / paper[-1] > 3


def test_the_correction_in_the_einsum_space():
    for theta in ((0.5, 0, 0.5, 0, 0.5, 0.5), (0.5, 0.5, 0, 0.5, 0.5, 0), (0.4, 0.2, 0.4, 0.2, 0.4, 0.4)):
        structures = [design("einsum", (256, 256), theta=(*theta, rho)) for rho in (0, 0.25, 0.5)]
        ratios = [spectral_ratio(s, "rank_corrected") for s in structures]
        assert max(ratios) / min(ratios) < 1.8, (theta, ratios)
        paper = [spectral_ratio(s, "paper") for s in structures]
        assert paper[0] / paper[-1] > 3


def test_what_needs_no_correction_gets_none():
    plain = [(name, {}) for name in ("dense", "kronecker", "butterfly", "block_diagonal", "circulant")]
    ranks, blocks = [("low_rank", {"rank": r}) for r in (1, 16, 64)], [("monarch", {"blocks": b}) for b in (4, 8)]
    for name, options in (*plain, *ranks, *blocks):
        s = design(name, (64, 64), **options)
        assert rank_corrections(s) == pytest.approx((1.0,) * len(s.factors)), name
    ratios = [spectral_ratio(design("low_rank", (512, 512), rank=r)) for r in (1, 4, 16, 64)]
    assert max(ratios) / min(ratios) < 1.7


def test_corrections_of_random_chains_only_raise():
    for seed in range(200):
        s = random_chain(np.random.default_rng(seed))
        corrections = rank_corrections(s)
        assert len(corrections) == len(s.factors)
        assert all(math.isfinite(c) and c > 0 for c in corrections)
        assert init_std(s, rule="rank_corrected") == pytest.approx(
            [c * std for c, std in zip(corrections, init_std(s), strict=True)]
        )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dense", {}),
        ("block_tensor_train", {}),
        ("monarch", {"blocks": 4}),
        ("kronecker", {}),
        ("low_rank", {"rank": 8}),
    ],
)
def test_one_step_of_sgd_changes_features_alike_at_every_width(name, options):
    """One sample, a gradient of order 1 / d on each of d outputs. Without the number of blocks and of carried
    positions in the multiplier the update would be smaller by it: sqrt(d) for Block Tensor-Train and Kronecker."""
    changes, blind = [], []
    for d in (64, 256, 1024):
        s = design(name, (d, d), **options)
        rng = np.random.default_rng(0)
        x, v = rng.standard_normal((2, 1, d))
        factors = [torch.tensor(f, requires_grad=True) for f in random_factors(s, seed=0)]
        loss = (s.apply(factors, torch.tensor(x)) * torch.tensor(v / d)).sum()
        gradients = torch.autograd.grad(loss, factors)

        def change(multipliers, s=s, factors=factors, gradients=gradients, x=x):
            moved = [f - 0.1 * m * g for f, m, g in zip(factors, multipliers, gradients, strict=True)]
            with torch.no_grad():
                return rms(s.apply(moved, torch.tensor(x)) - s.apply(factors, torch.tensor(x)))

        multipliers = lr_multipliers(s, optimizer="sgd")
        changes.append(change(multipliers))
        blind.append(change([m / (f.blocks * f.carried) for m, f in zip(multipliers, s.factors, strict=True)]))
    assert max(changes) / min(changes) < 2, changes
    first = design(name, (1024, 1024), **options).factors[0]
    assert changes[-1] / blind[-1] > 0.9 * first.blocks * first.carried


# -- RMS cap -------------------------------------------------------------------------------------------------------


def rms(x):
    return np.sqrt(np.mean(np.abs(to_numpy(x)) ** 2))


MAKE = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("backend", MAKE)
def test_rms_cap(backend, dtype):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((5, 7)) + (1j * rng.standard_normal((5, 7)) if "complex" in dtype else 0)
    x = MAKE[backend](values.astype(dtype))
    size = rms(x)
    gain = MAKE[backend](np.asarray([1.5], dtype.replace("complex64", "float32").replace("complex128", "float64")))
    tolerance = 1e-6 if dtype in ("float32", "complex64") else 1e-14
    for sigma in (0.3, 0.9 * size, 1.1 * size, 5.0):
        capped = rms_cap(x, float(sigma))
        assert capped.dtype == x.dtype
        np.testing.assert_allclose(to_numpy(capped), to_numpy(x) * min(1, sigma / size), rtol=tolerance)
        assert rms(capped) == pytest.approx(min(size, sigma), rel=tolerance)
        for g in (1.5, gain):
            scaled = rms_cap(x, float(sigma), g)
            assert scaled.dtype == x.dtype
            np.testing.assert_allclose(to_numpy(scaled), 1.5 * to_numpy(capped), rtol=tolerance)
    np.testing.assert_array_equal(to_numpy(rms_cap(x, 2 * float(size))), to_numpy(x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rms_cap_in_half_precision(dtype):
    x = torch.linspace(-900, 1000, 35, dtype=torch.float64).reshape(5, 7).to(getattr(torch, dtype))
    arrays = [x, jnp.asarray(x.double().numpy(), dtype)] + ([x.numpy()] if dtype == "float16" else [])
    for a in arrays:  # the squares overflow float16
        capped = rms_cap(a, 0.02)
        assert str(capped.dtype).endswith(dtype)
        assert rms(capped) == pytest.approx(0.02, rel=2**-8)


def test_the_gradient_of_the_cap():
    """d/dx sum(w * x * g * s / RMS(x)) = g s / RMS (w - x <w, x> / |x|^2) above the cap, g w below it."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 4, 3))
    size = rms(x)
    for sigma in (0.5 * size, 2 * size):
        shrink = min(1, sigma / size)
        wanted = 1.5 * shrink * (w - x * np.sum(w * x) / np.sum(x**2) * (sigma < size))
        leaf, gain = torch.tensor(x, requires_grad=True), torch.tensor([1.5], requires_grad=True, dtype=torch.float64)
        (rms_cap(leaf, float(sigma), gain) * torch.tensor(w)).sum().backward()
        np.testing.assert_allclose(leaf.grad.numpy(), wanted, rtol=1e-12)
        assert gain.grad.item() == pytest.approx(shrink * np.sum(w * x))
        grad = jax.grad(lambda x, w=w, sigma=sigma: jnp.sum(rms_cap(x, float(sigma), 1.5) * w))(jnp.asarray(x))
        np.testing.assert_allclose(np.asarray(grad), wanted, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64])
def test_the_gradient_of_the_cap_at_zero(dtype):
    """A zero-initialised factor must be able to leave zero."""
    leaf = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
    rms_cap(leaf, 0.5, 2.0).sum().abs().backward() if dtype.is_complex else rms_cap(leaf, 0.5, 2.0).sum().backward()
    assert torch.isfinite(torch.view_as_real(leaf.grad) if dtype.is_complex else leaf.grad).all()
    if not dtype.is_complex:
        assert (leaf.grad == 2).all()
        grad = jax.grad(lambda x: rms_cap(x, 0.5, 2.0).sum())(jnp.zeros((4, 3)))
        assert (grad == 2).all()


def test_the_gradient_of_the_cap_by_finite_differences():
    for dtype in (torch.float64, torch.complex128):
        x = torch.randn(4, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
        gain = torch.ones((), dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, g: rms_cap(x, 0.4, g), (x, gain))


def test_the_cap_inside_transformations():
    x = np.random.default_rng(0).standard_normal((2, 4, 3))
    wanted = np.stack([rms_cap(x[0], 0.4), rms_cap(x[1], 0.4)])
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda x: rms_cap(x, 0.4)))(x), wanted, rtol=1e-12)
    np.testing.assert_allclose(torch.func.vmap(lambda x: rms_cap(x, 0.4))(torch.tensor(x)), wanted, rtol=1e-12)


@pytest.mark.slow
def test_the_cap_compiles_as_one_graph():
    torch._dynamo.reset()
    x = torch.randn(4, 3)
    compiled = torch.compile(lambda x, g: rms_cap(x, 0.4, g), fullgraph=True)
    torch.testing.assert_close(compiled(x, torch.ones(1)), rms_cap(x, 0.4))


# -- random factors ------------------------------------------------------------------------------------------------


def test_random_factors_have_the_stated_deviation():
    s = design("block_tensor_train", (1024, 1024), rank=2)
    for rule in RULES:
        for f, std in zip(random_factors(s, rule=rule, seed=0), init_std(s, rule=rule), strict=True):
            assert rms(f) == pytest.approx(std, rel=0.02)
        for f, std in zip(
            random_factors(s, rule=rule, dtype="complex128", seed=0), init_std(s, rule=rule), strict=True
        ):
            assert rms(f) == pytest.approx(std, rel=0.02)
            assert rms(f.real) == pytest.approx(std / math.sqrt(2), rel=0.02)
    assert not random_factors(s, zero_last=True, seed=0)[-1].any()
    assert random_factors(s, zero_last=True, seed=0)[0].any()


def test_random_factors_are_the_same_in_every_library():
    for name in ("block_tensor_train", "permutation"):
        s = design(name, (36, 36))
        reference = random_factors(s, seed=7)
        for backend in ("torch", "jax"):
            for a, b in zip(reference, random_factors(s, seed=7, backend=backend, dtype="float64"), strict=True):
                np.testing.assert_array_equal(a, to_numpy(b))
        again = random_factors(s, seed=np.random.default_rng(7))
        assert all(np.array_equal(a, b) for a, b in zip(reference, again, strict=True))
        assert not np.array_equal(reference[0], random_factors(s, seed=8)[0])
    (index,) = random_factors(design("permutation", (36, 36)), seed=0)
    assert sorted(index.tolist()) == list(range(36))


def test_default_dtypes():
    assert random_factors(BTT, seed=0)[0].dtype == np.float64
    assert random_factors(BTT, backend="torch", seed=0)[0].dtype == torch.float32
    assert random_factors(BTT, backend="jax", seed=0)[0].dtype == jnp.float32
    assert random_factors(BTT, backend="torch", dtype=torch.bfloat16, seed=0)[0].dtype == torch.bfloat16
    assert random_factors(BTT, dtype=np.float32, seed=0)[0].dtype == np.float32
