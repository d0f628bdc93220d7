"""What fits into a budget: for one matrix, the rank or the number of blocks that spends it, structure by structure.

Costs are those of the designed structures, so a plan holds exactly; models are planned by ``structlin_nn.planning``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from structlin.counting import num_bytes
from structlin.registry import design, names, options
from structlin.structure import AbstractStructure

__all__ = ["RESOURCES", "LayerPlan", "largest_within", "plan_layer", "plan_layers"]

RESOURCES = ("macs", "params", "bytes")
_NO_CHOICE = ("permutation", "diagonal")  # of one size, and no stand-in for a dense matrix
_LIMIT = 2**40


@dataclass(frozen=True)
class LayerPlan:
    """A structure that fits into a budget.

    Attributes:
        structure: its name.
        shape: (d_out, d_in).
        options: that it is designed with, the planned one among them.
        planned: name of the option that was chosen to spend the budget; None where there is none.
        macs: for one vector.
        params: of all factors.
        bytes: of all factors.
        share: of the budget, from 0 to 1.
    """

    structure: str
    shape: tuple[int, int]
    options: dict[str, Any]
    planned: str | None
    macs: int
    params: int
    bytes: int
    share: float

    @property
    def design(self) -> AbstractStructure:
        """The structure itself."""
        return design(self.structure, self.shape, **self.options)


def plan_layer(
    structure: str,
    shape: tuple[int, int],
    budget: float,
    *,
    resource: str = "macs",
    dtype: Any = "float32",
    given: Mapping[str, Any] | None = None,
) -> LayerPlan:
    """The design of a structure that spends a budget best without going over it.

    Planned is the rank where the structure has one and it is not given, else the number of blocks; a structure with
    neither fits or does not. A rank ends where the matrix can have full rank and has the cost and the
    parameters of a dense one.

    Args:
        structure: a registered name.
        shape: (d_out, d_in).
        budget: MACs for one vector, parameters, or bytes of the factors.
        resource: ``macs``, ``params`` or ``bytes``.
        dtype: of the factors, for their bytes.
        given: options that are fixed.

    Raises:
        ValueError: an unknown structure, option or resource; a budget that not even the smallest design fits into;
            sizes that the structure cannot have.

    >>> plan = plan_layer("low_rank", (1024, 1024), budget=1e5)
    >>> plan.options, plan.macs, round(plan.share, 3)
    ({'rank': 48}, 98304, 0.983)
    >>> plan_layer("monarch", (1024, 1024), budget=1e5).options
    {'blocks': 22}
    """
    if resource not in RESOURCES:
        raise ValueError(f"unknown resource {resource!r}; one of {', '.join(RESOURCES)}")
    if not budget > 0:
        raise ValueError(f"the budget must be positive, got {budget}")
    known, fixed = options(structure), dict(given or {})
    if unknown := [key for key in fixed if key not in known]:
        raise ValueError(f"structure {structure!r} has no option {', '.join(map(repr, unknown))}")
    exclusive = {"rank", "rank_fraction"} & fixed.keys()
    planned = "rank" if "rank" in known and not exclusive else "blocks" if "blocks" in known else None
    if planned in fixed:
        planned = None

    def designed(value: int | None) -> AbstractStructure:
        return design(structure, shape, **fixed, **({} if planned is None or value is None else {planned: value}))

    def cost(value: int) -> int | None:
        try:
            if planned == "rank" and value > 1 and _is_full(designed(value - 1)):
                return None
            return _cost(designed(value), resource, dtype)
        except ValueError:
            return None

    if resource == "macs" and designed(None).macs == 0:
        raise ValueError(f"{structure} has no products to count as macs; plan it by params or bytes")
    if planned is None:
        chosen, least = (None, _cost(designed(None), resource, dtype))
        fits = least <= budget
    elif planned == "rank":
        least = _cost(designed(1), resource, dtype)
        fits = least <= budget
        chosen = largest_within(cost, budget) if fits else None
    else:
        costs = {value: c for value in range(1, min(shape) + 1) if (c := cost(value)) is not None}
        if not costs:
            designed(1)
        least = min(costs.values())
        inside = {value: c for value, c in costs.items() if c <= budget}
        fits = bool(inside)
        chosen = min(inside, key=lambda value: (-inside[value], value)) if fits else None
    if not fits:
        raise ValueError(
            f"{structure} of shape {shape} needs at least {least:,} {resource}, the budget is {budget:,.0f}"
        )
    found = designed(chosen)
    final = fixed if planned is None or chosen is None else {**fixed, planned: chosen}
    spent = _cost(found, resource, dtype)
    return LayerPlan(
        structure, shape, final, planned, found.macs, found.num_params, num_bytes(found, dtype), spent / budget
    )


def plan_layers(
    shape: tuple[int, int],
    budget: float,
    *,
    resource: str = "macs",
    dtype: Any = "float32",
    structures: Sequence[str] | None = None,
) -> tuple[list[LayerPlan], dict[str, str]]:
    """Plans of several structures for one budget, and why the others have none.

    ``structures``: names; None: all that are registered, without permutations and diagonals.

    >>> plans, left_out = plan_layers((768, 768), budget=50_000, structures=["dense", "low_rank", "kronecker"])
    >>> [(p.structure, p.options, p.macs) for p in plans]
    [('low_rank', {'rank': 32}, 49152), ('kronecker', {}, 43008)]
    >>> left_out
    {'dense': 'dense of shape (768, 768) needs at least 589,824 macs, the budget is 50,000'}
    """
    plans, left_out = [], {}
    for name in [n for n in names() if n not in _NO_CHOICE] if structures is None else structures:
        options(name)
        try:
            plans.append(plan_layer(name, shape, budget, resource=resource, dtype=dtype))
        except ValueError as error:
            left_out[name] = str(error)
    return plans, left_out


def _is_full(structure: AbstractStructure) -> bool:
    """Whether more rank gains nothing over a dense matrix."""
    dense = structure.shape[0] * structure.shape[1]
    return structure.rank_bound >= min(structure.shape) and min(structure.macs, structure.num_params) >= dense


def _cost(structure: AbstractStructure, resource: str, dtype: Any) -> int:
    if resource == "macs":
        return structure.macs
    return structure.num_params if resource == "params" else num_bytes(structure, dtype)


def largest_within(cost: Callable[[int], int | None], budget: float) -> int | None:
    """The largest n from 1 on whose cost is within a budget, by doubling and bisection; None where 1 has none.

    ``cost`` rises with n; None says that n is out of range, and then every larger one is.

    >>> largest_within(lambda n: n * n, 50)
    7
    """

    def fits(n: int) -> bool:
        found = cost(n)
        return found is not None and found <= budget

    if not fits(1):
        return None
    low = 1
    while fits(2 * low):
        low *= 2
        if low > _LIMIT:
            raise ValueError(f"the cost does not reach the budget of {budget:g}")
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
