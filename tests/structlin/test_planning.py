"""Plans of layers against a search through all designs."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import structlin
from structlin.planning import RESOURCES, largest_within, plan_layer, plan_layers

SHAPE = (48, 36)


def cost(structure: str, options: dict[str, Any], resource: str, dtype: str = "float32") -> int:
    found = structlin.design(structure, SHAPE, **options)
    return {"macs": found.macs, "params": found.num_params, "bytes": structlin.num_bytes(found, dtype)}[resource]


def all_costs(structure: str, option: str, resource: str) -> dict[int, int]:
    found = {}
    for value in range(1, min(SHAPE) + 1 if option == "blocks" else 60):  # more blocks than that leave some empty
        try:
            found[value] = cost(structure, {option: value}, resource)
        except ValueError:
            continue
    return found


@settings(max_examples=60, deadline=None)
@given(
    structure=st.sampled_from(
        [("low_rank", "rank"), ("tensor_train", "rank"), ("block_tensor_train", "rank"), ("monarch", "blocks"),
         ("block_diagonal", "blocks"), ("blast", "rank")]
    ),
    resource=st.sampled_from(RESOURCES),
    share=st.floats(0.02, 0.95),
)  # fmt: skip
def test_nothing_larger_fits(structure: tuple[str, str], resource: str, share: float) -> None:
    name, option = structure
    budget = share * 48 * 36 * (4 if resource == "bytes" else 1)
    costs = all_costs(name, option, resource)
    inside = [c for c in costs.values() if c <= budget]
    if not inside:
        with pytest.raises(ValueError, match=f"{name} of shape .* needs at least {min(costs.values()):,} {resource}"):
            plan_layer(name, SHAPE, budget, resource=resource)
        return
    plan = plan_layer(name, SHAPE, budget, resource=resource)
    assert cost(name, plan.options, resource) == max(inside)
    assert plan.share == pytest.approx(max(inside) / budget)
    assert plan.planned == option
    assert plan.design.macs == plan.macs
    assert (plan.params, plan.bytes) == (plan.design.num_params, 4 * plan.design.num_params)


def test_fixed_options() -> None:
    plan = plan_layer("blast", SHAPE, 900, given={"rank": 5})
    assert plan.planned == "blocks"
    assert plan.options["rank"] == 5
    plan = plan_layer("low_rank", SHAPE, 1700, given={"rank_fraction": 0.5})
    assert (plan.planned, plan.options, plan.macs) == (None, {"rank_fraction": 0.5}, 18 * 84)
    assert plan_layer("kronecker", SHAPE, 1e4).planned is None
    assert plan_layer("low_rank", SHAPE, 800, resource="bytes", dtype="bfloat16").options == {"rank": 4}


def test_rank_ends_where_a_dense_matrix_is_better() -> None:
    assert plan_layer("low_rank", SHAPE, 1e9).options == {"rank": 36}
    btt = plan_layer("block_tensor_train", SHAPE, 1e9)
    assert btt.macs >= 48 * 36 > cost("block_tensor_train", {"rank": btt.options["rank"] - 1}, "macs")


def test_table() -> None:
    plans, left_out = plan_layers(SHAPE, 900)
    assert {p.structure for p in plans} | set(left_out) == set(structlin.names()) - {"permutation", "diagonal"}
    assert all(0 < p.share <= 1 for p in plans)
    assert "needs at least 1,728 macs, the budget is 900" in left_out["dense"]
    assert left_out["toeplitz"] == "toeplitz has no products to count as macs; plan it by params or bytes"
    assert "square" in left_out["butterfly"]


@pytest.mark.parametrize(
    ("structure", "keywords", "message"),
    [
        ("low_rnak", {}, "unknown structure 'low_rnak'"),
        ("low_rank", {"resource": "flops"}, "unknown resource 'flops'; one of macs, params, bytes"),
        ("low_rank", {"given": {"blocks": 2}}, "structure 'low_rank' has no option 'blocks'"),
        ("low_rank", {"budget": 0}, "the budget must be positive, got 0"),
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
    with pytest.raises(ValueError, match="the cost does not reach the budget of 6"):
        largest_within(lambda n: 5, 6)
