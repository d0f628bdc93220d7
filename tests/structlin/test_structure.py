"""The structure itself: parsing, axis roles, what is derived from them, and every error with its facts."""

import copy
import itertools
import math
import pickle
import re
import string
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import structlin as sl
from structlin import Factor, Step, Structure, design, random_factors
from structlin.structure import axis_letter
from structlin.testing import dense_matrix, random_chain

BTT = "pa,pfra->frp; frp,ferp->fe"
SIZES = {"p": 3, "a": 2, "f": 5, "r": 4, "e": 7}


def chains(count=200):
    return [random_chain(np.random.default_rng(seed)) for seed in range(count)]


# -- steps and roles -----------------------------------------------------------------------------------------------


def test_roles_of_one_step():
    step = Step.parse(" xba , bcya -> cxyb ")
    assert str(step) == "xba,bcya->cxyb"
    assert (step.contracted, step.free, step.batch, step.carried) == ("a", "cy", "b", "x")
    back = step.transpose()
    assert str(back) == "cxyb,bcya->xba"
    assert (back.contracted, back.free, back.batch, back.carried) == ("cy", "a", "b", "x")


@given(st.lists(st.sampled_from(["contracted", "free", "batch", "carried"]), min_size=1, max_size=8), st.randoms())
def test_every_axis_has_the_role_of_the_places_where_it_stands(roles, random):
    places = {"contracted": (0, 1), "free": (1, 2), "batch": (0, 1, 2), "carried": (0, 2)}
    terms = [[], [], []]
    for axis, role in zip(string.ascii_letters, roles, strict=False):
        for place in places[role]:
            terms[place].insert(random.randint(0, len(terms[place])), axis)
    if not all(terms):
        return
    step = Step.parse("{},{}->{}".format(*map("".join, terms)))
    for role in places:
        assert set(getattr(step, role)) == {a for a, r in zip(string.ascii_letters, roles, strict=False) if r == role}
    for role in ("contracted", "free", "batch"):
        assert [a for a in terms[1] if a in getattr(step, role)] == list(getattr(step, role))


# -- what is derived -----------------------------------------------------------------------------------------------


def test_block_tensor_train_against_formulas():
    s = Structure.parse(BTT, **SIZES)
    assert s.shape == (35, 6)
    assert (s.d_out, s.d_in) == (35, 6)
    assert s.factors == (
        Factor("W0", (3, 5, 4, 2), fan_in=2, fan_out=20, blocks=3, carried=1),
        Factor("W1", (5, 7, 4, 3), fan_in=12, fan_out=7, blocks=5, carried=1),
    )
    assert s.num_params == s.macs == 4 * 3 * 5 * (2 + 7)
    assert s.flops == 2 * s.macs
    assert s.rank_bound == 6
    assert s.padding == (0, 0)
    assert (s.other_flops, s.setup_flops) == ({}, {})


def test_carried_axes_share_weights():
    s = Structure.parse("ij,ai->aj; aj,bj->ab", i=3, j=5, a=2, b=7)
    assert [(f.carried, f.blocks, f.numel) for f in s.factors] == [(5, 1, 6), (2, 1, 35)]
    assert (s.num_params, s.macs) == (41, 100)
    assert s.shape == (14, 15)


def test_numbers_follow_from_the_sizes_of_the_roles():
    for s in chains():
        sizes = dict(s.sizes)
        for step, f in zip(s.steps, s.factors, strict=True):
            size = {
                r: math.prod(sizes[a] for a in getattr(step, r)) for r in ("contracted", "free", "batch", "carried")
            }
            assert (f.fan_in, f.fan_out, f.blocks, f.carried) == tuple(size.values())
            assert f.shape == tuple(sizes[a] for a in step.factor)
            assert f.numel == size["contracted"] * size["free"] * size["batch"] == math.prod(f.shape)
        assert s.num_params == sum(f.numel for f in s.factors)
        assert s.macs == sum(f.numel * f.carried for f in s.factors)
        inner_in = math.prod(sizes[a] for a in s.steps[0].input)
        inner_out = math.prod(sizes[a] for a in s.steps[-1].output)
        assert s.padding == (inner_in - s.d_in, inner_out - s.d_out)


def test_fans_multiply_to_the_shape_where_nothing_is_carried_or_padded():
    seen = 0
    for s in chains(600):
        if s.padding == (0, 0) and all(f.carried == 1 for f in s.factors):
            assert math.prod(f.fan_out for f in s.factors) * s.d_in == math.prod(f.fan_in for f in s.factors) * s.d_out
            seen += 1
    assert seen > 30


def test_transpose():
    for s in chains():
        t = s.transpose()
        assert t.shape == s.shape[::-1]
        assert t.transpose() == s
        assert (t.num_params, t.macs, t.padding) == (s.num_params, s.macs, s.padding[::-1])
        assert [(f.fan_in, f.fan_out, f.blocks, f.carried) for f in t.factors] == [
            (f.fan_out, f.fan_in, f.blocks, f.carried) for f in reversed(s.factors)
        ]
        assert [f.shape for f in t.factors] == [f.shape for f in reversed(s.factors)]


def test_padding_and_cut():
    s = Structure.parse("pa,pfra->frp; frp,ferp->fe", **SIZES, d_in=5, d_out=33)
    assert s.shape == (33, 5)
    assert s.padding == (1, 2)
    full = Structure.parse(BTT, **SIZES)
    assert (s.num_params, s.macs) == (full.num_params, full.macs)
    factors = random_factors(s, seed=0)
    np.testing.assert_allclose(dense_matrix(s, factors), dense_matrix(full, factors)[:33, :5])


def test_regrouping_reads_the_vector_in_row_major_order():
    s = Structure.parse("pa,pqa->pq; gl,log->lo", p=2, a=3, q=3, g=3, l=2, o=4)
    w0, w1 = random_factors(s, seed=0)
    x = np.random.default_rng(0).standard_normal(6)
    middle = np.stack([w0[p] @ x.reshape(2, 3)[p] for p in range(2)]).reshape(-1)
    wanted = np.concatenate([w1[block] @ middle[block::2] for block in range(2)])
    np.testing.assert_allclose(s.apply((w0, w1), x), wanted)


# -- bound of the rank ---------------------------------------------------------------------------------------------


def bound_by_search(s):
    """The narrowest of all cuts, each factor on one side, where nothing is regrouped."""
    sizes = dict(s.sizes)
    ends = [("in", s.steps[0].input), ("out", s.steps[-1].output)]
    costs = []
    for sides in itertools.product(("in", "out"), repeat=len(s.steps)):
        placed = [*ends, *((side, step.factor) for side, step in zip(sides, s.steps, strict=True))]
        crossing = {a for _, term in placed for a in term if len({side for side, t in placed if a in t}) == 2}
        costs.append(math.prod(sizes[a] for a in crossing))
    return min(*costs, *s.shape)


def test_the_rank_bound_is_the_narrowest_cut():
    seen = tight = 0
    for s in chains(400):
        rank = np.linalg.matrix_rank(dense_matrix(s, random_factors(s, seed=0)))
        assert rank <= s.rank_bound <= min(s.shape)
        if all(b.output == a.input for b, a in itertools.pairwise(s.steps)):
            assert s.rank_bound == bound_by_search(s)
            seen += 1
            tight += rank == s.rank_bound
    assert seen > 150
    assert tight > 0.9 * seen


def test_the_rank_bound_of_long_chains_is_the_narrowest_cut_too():
    """Of 40 steps, where a search over all cuts would take 2^40 of them."""
    sizes = {axis_letter(k): 3 if k == 23 else 8 for k in range(41)}
    letters = list(sizes)
    steps = "; ".join(f"{letters[k]},{letters[k + 1]}{letters[k]}->{letters[k + 1]}" for k in range(40))
    assert Structure.parse(steps, sizes).rank_bound == 3
    # The cheapest cut is not one in the order of the steps: the first core alone meets the output's side.
    apart = Structure.parse("ab,ca->cb; cb,db->cd", a=7, c=2, b=5, d=11)
    assert apart.rank_bound == bound_by_search(apart) == 2 * 5
    # Tensor-Train of 16 cores: a cut separates core k for the price min(n_k, m_k), or keeps it with its neighbours.
    train = design("tensor_train", (6**8, 6**8), cores=16, rank=1, factorization=((2, 3) * 8, (3, 2) * 8))
    assert train.rank_bound == 2**16


# -- many axes -----------------------------------------------------------------------------------------------------


def test_letters_of_axes_are_distinct_identifiers_that_survive_normalization():
    letters = [axis_letter(k) for k in range(5000)]
    assert "".join(letters[:52]) == string.ascii_letters
    assert len(set(letters)) == 5000
    assert all(a.isalpha() and a.isidentifier() and unicodedata.normalize("NFKC", a) == a for a in letters)


def test_chains_of_more_axes_than_latin_letters():
    """Tensor-Train and Kronecker of 25 cores, and a butterfly of 2^19: 75 axes and more, where × was a letter."""
    split = (2, 3, *[1] * 23)
    for name in ("tensor_train", "kronecker"):
        s = design(name, (6, 6), cores=25, factorization=(split, split))
        assert len(s.sizes) >= 50
        assert eval(repr(s), {"Structure": Structure}) == s
        assert Structure.parse("; ".join(map(str, s.steps)), dict(s.sizes)) == s
        factors, x = random_factors(s, seed=0), np.random.default_rng(1).standard_normal(6)
        wanted = np.ones((1, 1, 1))  # (rows, columns, bond)
        for core in factors if name == "tensor_train" else [f[None, :, :, None] for f in factors]:
            wanted = np.einsum("xyr,rabs->xaybs", wanted, core)
            wanted = wanted.reshape(wanted.shape[0] * wanted.shape[1], -1, wanted.shape[-1])
        wanted = wanted[..., 0]
        np.testing.assert_allclose(s.apply(factors, x), wanted @ x, rtol=1e-12, atol=1e-12)
    butterfly = design("butterfly", (2**19, 2**19))
    assert (butterfly.num_params, butterfly.rank_bound) == (19 * 2**20, 2**19)
    ones = [np.ones(f.shape) for f in butterfly.factors]
    np.testing.assert_array_equal(butterfly.apply(ones, np.ones(2**19)), 2.0**19)


@pytest.mark.parametrize("name", ["tensor_train", "block_tensor_train", "kronecker"])
def test_more_cores_than_prime_factors_are_refused_at_once(name):
    with pytest.raises(ValueError, match=r"768 cannot be split into 1000000000 factors above 1; .* 9 prime factors"):
        design(name, (768, 768), cores=10**9)


def test_the_einsum_space_of_large_sizes_is_designed_from_prime_factors():
    s = design("einsum", (10**9, 10**9), theta=(0.5, 0.0, 0.5, 0.0, 0.5, 0.5, 0.0))
    sizes = dict(s.sizes)
    assert sizes["a"] * sizes["g"] == sizes["e"] * sizes["f"] == 10**9
    assert max(sizes.values()) / min(n for n in sizes.values() if n > 1) < 2


# -- a value -------------------------------------------------------------------------------------------------------


def test_structures_are_frozen_hashable_values():
    a, b = Structure.parse(BTT, **SIZES), Structure.parse(BTT.replace(" ", ""), dict(reversed(SIZES.items())))
    assert a == b
    assert len({a, b, Structure.parse(BTT, **{**SIZES, "r": 3}), Structure.parse(BTT, **SIZES, d_in=5)}) == 3
    with pytest.raises(AttributeError):
        a.d_in = 7
    with pytest.raises(AttributeError):
        a.factors[0].fan_in = 7
    for s in chains(50):
        for twin in (pickle.loads(pickle.dumps(s)), copy.deepcopy(s), copy.copy(s)):
            assert twin == s
            assert hash(twin) == hash(s)
            assert twin.factors == s.factors


def test_a_transpose_equals_the_same_chain_parsed():
    for s in chains(50):
        t = s.transpose()
        parsed = Structure.parse("; ".join(map(str, t.steps)), dict(t.sizes), d_in=t.d_in, d_out=t.d_out)
        assert t == parsed
        assert hash(t) == hash(parsed)


def test_repr_is_an_expression_of_the_structure():
    for s in chains():
        if all(a.isidentifier() for a, _ in s.sizes):
            assert eval(repr(s)) == s
    assert "d_in=5, d_out=33" in repr(Structure.parse(BTT, **SIZES, d_in=5, d_out=33))


def test_the_table():
    lines = str(Structure.parse(BTT, **SIZES)).splitlines()
    assert [line.split() for line in lines] == [
        ["step", "factor", "shape", "fan_in", "fan_out", "blocks", "carried", "params", "MACs"],
        ["pa,pfra->frp", "3x5x4x2", "2", "20", "3", "1", "120", "120"],
        ["frp,ferp->fe", "5x7x4x3", "12", "7", "5", "1", "420", "420"],
        ["35", "x", "6", "540", "540"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_axes_may_be_any_letters_and_sizes_any_integers():
    s = Structure.parse("äβ,γβ->äγ", {"ä": np.int64(2), "β": 3, "γ": np.int32(4)})
    assert s.shape == (8, 6)
    assert all(type(n) is int for _, n in s.sizes)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "step 0: step '': expected the form 'input,factor->output', as in"),
        ("i,oi", "step 'i,oi': expected the form"),
        ("i->o", "step 'i->o': expected the form"),
        ("i,oi,o->o", "step 'i,oi,o->o': expected the form"),
        ("i,oi->o->o", "step 'i,oi->o->o': expected the form"),
        ("i,oi->o,o", "step 'i,oi->o,o': expected the form"),
        ("i,oi->o;", "'i,oi->o;', step 1: step '': expected the form"),
        (",o->o", "step ',o->o': the input has no axis"),
        ("i,->i", "step 'i,->i': the factor has no axis"),
        ("i,i->", "step 'i,i->': the output has no axis"),
        ("i1,oi->o", "step 'i1,oi->o': '1' is not a letter"),
        ("i,o.i->o", "step 'i,o.i->o': '.' is not a letter"),
        ("ii,oi->o", "step 'ii,oi->o': axis 'i' occurs twice in the input"),
        ("i,oio->o", "step 'i,oio->o': axis 'o' occurs twice in the factor"),
        ("i,oi->oo", "step 'i,oi->oo': axis 'o' occurs twice in the output"),
        ("ix,oi->o", "axis 'x' occurs only in the input; each axis must occur in two or three of"),
        ("i,oxi->o", "axis 'x' occurs only in the factor"),
        ("i,oi->ox", "axis 'x' occurs only in the output"),
        ("i,ri->r; r,orx->o", "'i,ri->r; r,orx->o', step 1: step 'r,orx->o': axis 'x' occurs only in the factor"),
    ],
)
def test_strings_that_are_no_chain(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as info:
        Structure.parse(text, dict.fromkeys("iorx", 2))
    assert repr(text) in str(info.value)


def test_chains_are_strings():
    with pytest.raises(TypeError, match="an einsum chain is a string, got list"):
        Structure.parse(["i,oi->o"], i=2, o=3)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"i": 2}, ValueError, "'i,oi->o', step 0 'i,oi->o': no size given for axis 'o'"),
        ({"i": 2, "o": 3, "q": 4}, ValueError, "size given for axis 'q', which occurs in no step; axes are i, o"),
        ({"i": 0, "o": 3}, ValueError, "the size of axis 'i' must be at least 1, got 0"),
        ({"i": 2, "o": -3}, ValueError, "the size of axis 'o' must be at least 1, got -3"),
        ({"i": 2.0, "o": 3}, TypeError, "the size of axis 'i' must be an integer, got 2.0"),
        ({"i": True, "o": 3}, TypeError, "the size of axis 'i' must be an integer, got True"),
        ({"i": "2", "o": 3}, TypeError, "the size of axis 'i' must be an integer, got '2'"),
        ({"i": None, "o": 3}, TypeError, "the size of axis 'i' must be an integer, got None"),
    ],
)
def test_sizes_that_do_not_fit(sizes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Structure.parse("i,oi->o", sizes)
    with pytest.raises(error, match=re.escape(message)):
        Structure.parse("i,oi->o", **sizes)


def test_sizes_given_twice():
    with pytest.raises(ValueError, match="sizes of i are given both in the mapping and by keyword"):
        Structure.parse("i,oi->o", {"i": 2, "o": 3}, i=2)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"d_in": 7}, ValueError, "1 and the 6 elements of its axes (if smaller, the vector is padded"),
        ({"d_in": 0}, ValueError, "d_in must lie between 1 and the 6 elements"),
        ({"d_out": 36}, ValueError, "d_out must lie between 1 and the 35 elements of its axes"),
        ({"d_out": -1}, ValueError, "d_out must lie between 1 and the 35 elements"),
        ({"d_in": 5.0}, TypeError, "d_in must be an integer, got 5.0"),
        ({"d_out": True}, TypeError, "d_out must be an integer, got True"),
    ],
)
def test_padded_sizes_that_do_not_fit(given, error, message):
    with pytest.raises(error, match=re.escape(message)) as info:
        Structure.parse(BTT, **SIZES, **given)
    assert "pa,pfra->frp; frp,ferp->fe" in str(info.value)


NEW_LETTERS = "occurs on both sides; the axes of a regrouped vector must have new letters"


@pytest.mark.parametrize(("text", "sizes", "message"), [
    ("pa,pqa->pq; qp,opq->op", {"p": 2, "a": 3, "q": 4, "o": 5},
     "step 1: input 'qp' permutes the output 'pq' of the step before; write the axes in the same order"),
    ("pa,pqa->pq; gp,ogp->op", {"p": 2, "a": 3, "q": 4, "g": 4, "o": 5},
     f"step 1: input 'gp' is not the output 'pq' of the step before, and axis 'p' {NEW_LETTERS}"),
    ("pa,pqa->pq; gl,lag->la", {"p": 2, "a": 3, "q": 4, "g": 4, "l": 2}, f"and axis 'a' {NEW_LETTERS}"),
    ("a,ba->b; c,dc->d; e,ae->a", {"a": 2, "b": 3, "c": 3, "d": 4, "e": 4}, f"axis 'a' {NEW_LETTERS}"),
    ("pa,pqa->pq; gl,log->lo", {"p": 2, "a": 3, "q": 4, "g": 4, "l": 3, "o": 5},
     "step 1: input 'gl' has 12 elements, the output 'pq' before it has 8"),
    ("pa,pqa->pq; gl,log->lo; xy,zxy->zp", {"p": 2, "a": 3, "q": 4, "g": 4, "l": 2, "o": 5, "x": 5, "y": 2, "z": 3},
     "axis 'p' occurs only in the output"),
    # Read all at once, as one einsum, the chain would be another matrix.
    ("i,ri->r; r,ir->i", {"i": 5, "r": 2},
     "'i,ri->r; r,ir->i', step 1: axis 'i' is contracted in an earlier step; a new axis must have a new"),
    ("a,ba->b; b,cb->c; c,ac->a", {"a": 5, "b": 2, "c": 3}, "step 2: axis 'a' is contracted in an earlier step"),
])  # fmt: skip
def test_steps_that_do_not_join(text, sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as info:
        Structure.parse(text, sizes)
    assert repr(text) in str(info.value)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abc,->; .1", max_size=24))
def test_any_text_gives_a_structure_or_an_error_that_quotes_it(text):
    sizes = {a: 2 for a in "abc" if a in text}
    try:
        message, made = "", Structure.parse(text, sizes)
    except ValueError as error:
        message, made = str(error), None
    if made is None:
        assert text.replace(" ", "") in message.replace(" ", "")
    else:
        assert made.num_params >= 2


def test_structures_of_size_0_are_refused():
    for make in (
        lambda: sl.Diagonal(np.zeros(0)),
        lambda: sl.Circulant(np.zeros(0)),
        lambda: sl.Permutation(np.zeros(0, int)),
        lambda: sl.Fourier(0),
    ):
        with pytest.raises(ValueError, match="the size must be at least 1, got 0"):
            make()
