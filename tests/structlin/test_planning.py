"""Plans of layers against a search through all designs."""

import itertools
import random
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import structlin
from structlin.planning import RESOURCES, BudgetError, largest_within, plan_layer, plan_layers

SHAPE = (48, 36)


STRUCTURES = (
    "low_rank", "tensor_train", "block_tensor_train", "monarch", "block_diagonal", "blast", "kronecker", "toeplitz",
    "einsum", "dense",
)  # fmt: skip


def cost(structure: str, options: dict[str, Any], resource: str, dtype: str = "float32") -> int:
    found = structlin.design(structure, SHAPE, **options)
    if resource == "macs":
        done = structlin.work_of(found)
        return -(-(2 * done.macs + sum(done.other_flops.values()) + sum(done.setup_flops.values())) // 2)
    return {"params": found.num_params, "bytes": structlin.num_bytes(found, dtype)}[resource]


@cache
def all_costs(structure: str, resource: str) -> dict[tuple[tuple[str, int], ...], int]:
    """Every design there is: all cores, blocks and ranks, a rank being full once the cost is that of a dense matrix."""
    known = structlin.structure_options(structure)
    spaces = {"cores": range(2, 7), "blocks": range(1, min(SHAPE) + 1), "rank": range(1, 60)}
    own = {name: values for name, values in spaces.items() if name in known}
    found = {}
    for values in itertools.product(*own.values()):
        options = dict(zip(own, values, strict=True))
        try:
            if options.get("rank", 1) > 1:
                less = structlin.design(structure, SHAPE, **{**options, "rank": options["rank"] - 1})
                if less.rank_bound >= min(SHAPE) and min(less.macs, less.num_params) >= SHAPE[0] * SHAPE[1]:
                    continue
            found[tuple(options.items())] = cost(structure, options, resource)
        except ValueError:
            continue
    return found


def check_against_all(structure: str, resource: str, budget: float) -> None:
    costs = all_costs(structure, resource)
    inside = [c for c in costs.values() if c <= budget]
    if not inside:
        least = f"{structure} of shape .* needs at least {min(costs.values()):,} {resource}"
        with pytest.raises(ValueError, match=least):
            plan_layer(structure, SHAPE, budget, resource=resource)
        return
    plan = plan_layer(structure, SHAPE, budget, resource=resource)
    assert cost(structure, plan.options, resource) == max(inside)
    assert plan.share == pytest.approx(max(inside) / budget)
    assert plan.design.macs <= plan.macs
    assert (plan.params, plan.bytes) == (plan.design.num_params, 4 * plan.design.num_params)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("resource", RESOURCES)
def test_no_design_spends_more(structure: str, resource: str) -> None:
    generator = random.Random(f"{structure} {resource}")
    for _ in range(6):
        check_against_all(structure, resource, generator.uniform(0.02, 1.2) * 48 * 36 * (1 + 3 * (resource == "bytes")))


@pytest.mark.slow
def test_no_design_spends_more_at_500_budgets() -> None:
    generator = random.Random(0)
    for _ in range(500):
        structure, resource = generator.choice(STRUCTURES), generator.choice(RESOURCES)
        check_against_all(structure, resource, generator.uniform(0.02, 1.2) * 48 * 36 * (1 + 3 * (resource == "bytes")))


def test_cores_are_searched() -> None:
    """With two cores a Kronecker product of 1024 needs 65,536 MACs; with five 20,480, and with ten as many."""
    with pytest.raises(BudgetError, match="needs at least 65,536 macs"):
        plan_layer("kronecker", (1024, 1024), 30_000, given={"cores": 2})
    plan = plan_layer("kronecker", (1024, 1024), 22_000)
    assert (plan.options["cores"], plan.macs, plan.planned) == (5, 20_480, ("cores",))
    assert plan_layer("kronecker", (1024, 1024), 22_000, given={"cores": [2, 10]}).options == {"cores": 10}


def test_transforms_count() -> None:
    """An FFT costs no MACs, and is not free."""
    with pytest.raises(ValueError, match=r"toeplitz of shape .48, 36. needs at least 2,144 macs"):
        plan_layer("toeplitz", SHAPE, 2000)
    assert plan_layer("toeplitz", SHAPE, 2200).macs == 2144
    assert plan_layer("toeplitz", SHAPE, 100, resource="params").params == 83


def test_fixed_options() -> None:
    plan = plan_layer("blast", SHAPE, 900, given={"rank": 5})
    assert plan.planned == ("blocks",)
    assert plan.options["rank"] == 5
    plan = plan_layer("low_rank", SHAPE, 1700, given={"rank_fraction": 0.5})
    assert (plan.planned, plan.options, plan.macs) == ((), {"rank_fraction": 0.5}, 18 * 84)
    assert plan_layer("kronecker", SHAPE, 1e4, given={"cores": 2}).planned == ()
    assert plan_layer("low_rank", SHAPE, 800, resource="bytes", dtype="bfloat16").options == {"rank": 4}


def test_rank_ends_where_a_dense_matrix_is_better() -> None:
    assert plan_layer("low_rank", SHAPE, 1e9).options == {"rank": 36}
    btt = plan_layer("block_tensor_train", SHAPE, 1e9)
    assert btt.macs >= 48 * 36 > cost("block_tensor_train", {"rank": btt.options["rank"] - 1}, "macs")


def test_table() -> None:
    plans, left_out = plan_layers(SHAPE, 900)
    assert {p.structure for p in plans} | set(left_out) == set(structlin.structure_names()) - {
        "permutation",
        "diagonal",
    }
    assert all(0 < p.share <= 1 for p in plans)
    assert "needs at least 1,728 macs, the budget is 900" in str(left_out["dense"])
    assert "toeplitz of shape (48, 36) needs at least 2,144 macs" in str(left_out["toeplitz"])
    assert "square" in str(left_out["butterfly"])


@pytest.mark.parametrize(
    ("structure", "keywords", "message"),
    [
        ("low_rnak", {}, "unknown structure 'low_rnak'"),
        ("low_rank", {"resource": "flops"}, "unknown resource 'flops'; one of macs, params, bytes"),
        ("low_rank", {"given": {"blocks": 2}}, "structure 'low_rank' has no option 'blocks'"),
        ("low_rank", {"budget": 0}, "the budget must be positive and finite, got 0"),
        ("low_rank", {"budget": float("inf")}, "the budget must be positive and finite, got inf"),
        ("low_rank", {"budget": float("nan")}, "the budget must be positive and finite, got nan"),
        ("low_rank", {"given": {"rank": []}}, "the list of values of rank is empty; give one value or more"),
        ("low_rank", {"budget": 83}, "low_rank of shape .48, 36. needs at least 84 macs, the budget is 83"),
    ],
)
def test_refused(structure: str, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_layer(structure, SHAPE, **{"budget": 1000, **keywords})


@given(budget=st.integers(1, 10**9), power=st.integers(1, 3), end=st.integers(1, 50))
def test_search(budget: int, power: int, end: int) -> None:
    found = largest_within(lambda n: n**power if n <= end else None, budget)
    assert found == max(n for n in range(1, end + 1) if n**power <= budget)


def test_search_without_an_end() -> None:
    assert largest_within(lambda n: 5, 4) is None
    with pytest.raises(ValueError, match="is still within the budget of 6"):
        largest_within(lambda n: 5, 6)
