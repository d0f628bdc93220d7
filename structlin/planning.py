"""Options of a structure (rank, blocks, cores) for which one matrix uses as much of a budget as possible.

Costs are counted on the designed structures, so they are exact. ``structlin_nn.planning`` plans whole models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from structlin.counting import num_bytes, work_of
from structlin.registry import design, structure_names, structure_options
from structlin.structure import AbstractStructure

__all__ = ["RESOURCES", "BudgetError", "LayerPlan", "check_budget", "largest_within", "plan_layer", "plan_layers"]

RESOURCES = ("macs", "params", "bytes")
_NO_CHOICE = ("permutation", "diagonal")  # they have no options and cannot replace a dense matrix
_LIMIT = 2**40


class BudgetError(ValueError):
    """Every choice needs more than the budget.

    Parameters
    ----------
    what
        What was planned, in words.
    least
        Least cost of a choice.
    unit
        Unit of the cost, in words.
    budget
        The budget.

    Examples
    --------
    >>> print(BudgetError("a dense layer", 4096, "MACs", 300))
    a dense layer needs at least 4,096 MACs, the budget is 300
    """

    def __init__(self, what: str, least: float, unit: str, budget: float) -> None:
        super().__init__(what, least, unit, budget)
        self.what, self.least, self.unit, self.budget = what, least, unit, budget

    def __str__(self) -> str:
        least, budget = (_number(value, ".4g") for value in (self.least, self.budget))
        return f"{self.what} needs at least {least} {self.unit}, the budget is {budget}"


@dataclass(frozen=True)
class LayerPlan:
    """A structure that fits into a budget.

    Attributes
    ----------
    structure
        Name of the structure.
    shape
        Shape (d_out, d_in) of the matrix.
    options
        All options of the design, fixed and planned.
    planned
        Names of the options that were chosen to use the budget.
    macs
        MACs for one vector. Work other than products (FFTs) counts with half its FLOPs, rounded up.
    params
        Number of parameters.
    bytes
        Bytes of all factors.
    share
        Part of the budget that is used, from 0 to 1.
    """

    structure: str
    shape: tuple[int, int]
    options: dict[str, Any]
    planned: tuple[str, ...]
    macs: int
    params: int
    bytes: int
    share: float

    @property
    def design(self) -> AbstractStructure:
        """The structure with these options."""
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
    """Return the design of a structure that uses as much of a budget as possible without exceeding it.

    The search covers those of the options ``rank``, ``blocks`` and ``cores`` that the structure has and that are not
    given: every number of cores into which the sizes can be split, every number of blocks up to the smaller size, and
    for each of them the largest rank within the budget. The rank is not increased further once the matrix can have full
    rank and has at least the MACs and parameters of a dense matrix. Of designs of equal cost, the one with the higher
    rank bound is returned, then the one with fewer cores or blocks.

    Parameters
    ----------
    structure
        Name of a registered structure.
    shape
        Shape (d_out, d_in) of the matrix.
    budget
        MACs for one vector, number of parameters, or bytes of the factors.
    resource
        Unit of the budget: ``macs``, ``params`` or ``bytes``. Work other than products (FFTs) counts as MACs with half
        its FLOPs.
    dtype
        Dtype of the factors, which determines their bytes.
    given
        Fixed options. A list (not a tuple) contains values to choose from.

    Returns
    -------
    LayerPlan
        The design and its costs.

    Raises
    ------
    BudgetError
        If the budget is too small for every design.
    ValueError
        If the structure, an option or the resource is unknown, the budget is not positive and finite, or the structure
        cannot have these sizes.
    TypeError
        If the budget is not a number.

    Examples
    --------
    >>> plan = plan_layer("low_rank", (1024, 1024), budget=1e5)
    >>> plan.options, plan.macs, round(plan.share, 3)
    ({'rank': 48}, 98304, 0.983)
    >>> plan_layer("monarch", (1024, 1024), budget=1e5).options
    {'blocks': 22}
    >>> plan_layer("kronecker", (1024, 1024), budget=30_000).options
    {'cores': 4}
    """
    if resource not in RESOURCES:
        raise ValueError(f"unknown resource {resource!r}; one of {', '.join(RESOURCES)}")
    check_budget(budget)
    known, given = structure_options(structure), dict(given or {})
    fixed = {key: value for key, value in given.items() if not isinstance(value, list)}
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"structure {structure!r} has no option {', '.join(map(repr, unknown))}")
    lists = {key: value for key, value in given.items() if isinstance(value, list)}
    if empty := [key for key, values in lists.items() if not values]:
        raise ValueError(f"the list of values of {empty[0]} is empty; give one value or more")
    by_rank = "rank" in known and not {"rank", "rank_fraction"} & given.keys()
    spaces: dict[str, Iterable[Any]] = dict(lists)
    if isinstance(fixed.get("factorization", ""), str):  # otherwise the sizes of the factors determine their number
        # Cores: the numbers of factors above 1 into which the smaller size may be split.
        every = {"cores": range(2, max(min(shape).bit_length(), 3)), "blocks": range(1, min(shape) + 1)}
        spaces |= {name: values for name, values in every.items() if name in known and name not in given}
    planned = tuple(name for name in known if name in spaces or (by_rank and name == "rank"))

    def cost(chosen: Mapping[str, Any]) -> int:
        return _cost(design(structure, shape, **fixed, **chosen), resource, dtype)

    def cost_of_rank(chosen: Mapping[str, Any], rank: int) -> int | None:
        try:
            if rank > 1 and _is_full(design(structure, shape, **fixed, **chosen, rank=rank - 1)):
                return None
            return cost({**chosen, "rank": rank})
        except ValueError:
            return None

    first_error: ValueError | None = None
    least, best = math.inf, None
    for values in itertools.product(*spaces.values()):
        chosen = dict(zip(spaces, values, strict=True))
        try:
            start = cost({**chosen, "rank": 1} if by_rank else chosen)
        except ValueError as error:
            first_error = first_error or error
            continue
        least = min(least, start)
        if start > budget:
            continue
        if by_rank:
            chosen["rank"] = largest_within(partial(cost_of_rank, dict(chosen)), budget)
        found = design(structure, shape, **fixed, **chosen)
        key = (_cost(found, resource, dtype), found.rank_bound)
        if best is None or key > best[0]:
            best = key, chosen, found
    if math.isinf(least):
        raise first_error or ValueError(f"{structure} of shape {shape} has no design")
    if best is None:
        raise BudgetError(f"{structure} of shape {shape}", least, resource, budget)
    (spent, _), chosen, found = best
    final = {name: {**fixed, **chosen}[name] for name in known if name in fixed or name in chosen}
    return LayerPlan(
        structure, shape, final, planned, _cost(found, "macs", dtype), found.num_params, num_bytes(found, dtype),
        spent / budget,
    )  # fmt: skip


def check_budget(budget: float, name: str = "the budget") -> None:
    """Check that a budget is a positive, finite number.

    Parameters
    ----------
    budget
        The value to check.
    name
        Its name in the message.

    Raises
    ------
    ValueError
        If it is not positive and finite.
    TypeError
        If it is not a number.

    Examples
    --------
    >>> check_budget(float("inf"))
    Traceback (most recent call last):
    ...
    ValueError: the budget must be positive and finite, got inf
    """
    if isinstance(budget, bool) or not hasattr(budget, "__float__"):
        raise TypeError(f"{name} must be a number, got {budget!r}")
    if not (budget > 0 and math.isfinite(budget)):
        raise ValueError(f"{name} must be positive and finite, got {_number(budget)}")


def _number(value: float, form: str = "g") -> str:
    return f"{value:,.0f}" if 1 <= abs(value) < 1e15 else f"{value:{form}}"


def plan_layers(
    shape: tuple[int, int],
    budget: float,
    *,
    resource: str = "macs",
    dtype: Any = "float32",
    structures: Sequence[str] | None = None,
) -> tuple[list[LayerPlan], dict[str, ValueError]]:
    """Plan several structures for one budget.

    Parameters
    ----------
    shape, budget, resource, dtype
        As for :func:`plan_layer`.
    structures
        Names of structures. Default: all registered ones except permutation and diagonal.

    Returns
    -------
    plans : list of LayerPlan
        One plan for each structure that fits into the budget.
    left_out : dict of str to ValueError
        For each of the other structures, the error that says why it has no plan.

    Raises
    ------
    ValueError
        If a structure or the resource is unknown, or the budget is not positive and finite.
    TypeError
        If the budget is not a number.

    Examples
    --------
    >>> plans, left_out = plan_layers((768, 768), budget=50_000, structures=["dense", "low_rank", "kronecker"])
    >>> [(p.structure, p.options, p.macs) for p in plans]
    [('low_rank', {'rank': 32}, 49152), ('kronecker', {'cores': 2}, 43008)]
    >>> print(left_out["dense"])
    dense of shape (768, 768) needs at least 589,824 macs, the budget is 50,000
    """
    check_budget(budget)
    plans: list[LayerPlan] = []
    left_out: dict[str, ValueError] = {}
    for name in [n for n in structure_names() if n not in _NO_CHOICE] if structures is None else structures:
        structure_options(name)
        try:
            plans.append(plan_layer(name, shape, budget, resource=resource, dtype=dtype))
        except ValueError as error:
            left_out[name] = error.with_traceback(None)  # the frames would be kept too
    return plans, left_out


def _is_full(structure: AbstractStructure) -> bool:
    """Return whether the matrix can have full rank and costs at least as much as a dense matrix."""
    dense = structure.shape[0] * structure.shape[1]
    return structure.rank_bound >= min(structure.shape) and min(structure.macs, structure.num_params) >= dense


def _cost(structure: AbstractStructure, resource: str, dtype: Any) -> int:
    if resource == "macs":
        return -(-work_of(structure).total_flops() // 2)
    return structure.num_params if resource == "params" else num_bytes(structure, dtype)


def largest_within(cost: Callable[[int], float | None], budget: float) -> int | None:
    """Return the largest integer whose cost is within a budget, by doubling and bisection.

    Parameters
    ----------
    cost
        Function that increases with n. It returns None if n and all larger integers are out of range.
    budget
        Upper bound of the cost.

    Returns
    -------
    int or None
        The largest n >= 1 with ``cost(n) <= budget``; None if there is none.

    Raises
    ------
    ValueError
        If the cost stays within the budget for every n up to 2^40.

    Examples
    --------
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
            raise ValueError(
                f"the cost at n = {low} is still within the budget of {budget:g}; the cost must increase with n"
            )
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
