"""What fits into a budget: for one matrix, the rank, blocks and cores that spend it best, structure by structure.

Costs are those of the designed structures, so a plan holds exactly; models are planned by ``structlin_nn.planning``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from structlin.counting import num_bytes, work_of
from structlin.registry import design, structure_names, structure_options
from structlin.structure import AbstractStructure

__all__ = ["RESOURCES", "LayerPlan", "check_budget", "largest_within", "plan_layer", "plan_layers"]

RESOURCES = ("macs", "params", "bytes")
_NO_CHOICE = ("permutation", "diagonal")  # of one size, and no stand-in for a dense matrix
_LIMIT = 2**40


@dataclass(frozen=True)
class LayerPlan:
    """A structure that fits into a budget.

    Attributes
    ----------
    structure
        Its name.
    shape
        (d_out, d_in).
    options
        That it is designed with, the planned ones among them.
    planned
        Names of the options that were chosen to spend the budget.
    macs
        For one vector; work that is no product (FFTs) counts with half its FLOPs, rounded up.
    params
        Of all factors.
    bytes
        Of all factors.
    share
        Of the budget, from 0 to 1.
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
    """Return the design of a structure that spends a budget best without going over it.

    Planned are those of rank, blocks and cores that the structure has and that are not given: every number of cores
    that the sizes can be split into, every number of blocks up to the smaller size, and for each of both the largest
    rank that fits. A rank ends where the matrix can have full rank and has the cost and the parameters of a
    dense one. Of designs of equal cost the one of the higher rank bound is taken, then that of fewer cores and blocks.

    Parameters
    ----------
    structure
        A registered name.
    shape
        (d_out, d_in).
    budget
        MACs for one vector, parameters, or bytes of the factors.
    resource
        ``macs``, ``params`` or ``bytes``. Work that is no product (FFTs) counts as MACs with half its FLOPs.
    dtype
        Of the factors, for their bytes.
    given
        Options that are fixed; a list (not a tuple) holds the values to choose from.

    Raises
    ------
    ValueError
        An unknown structure, option or resource; a budget that is not positive and finite, or that not even the
        smallest design fits into; sizes that the structure cannot have.

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
    known, fixed = structure_options(structure), dict(given or {})
    if unknown := [key for key in fixed if key not in known]:
        raise ValueError(f"structure {structure!r} has no option {', '.join(map(repr, unknown))}")
    lists = {key: value for key, value in fixed.items() if isinstance(value, list)}
    if empty := [key for key, values in lists.items() if not values]:
        raise ValueError(f"there is no value of {empty[0]} to choose from")
    fixed = {key: value for key, value in fixed.items() if key not in lists}
    by_rank = "rank" in known and not {"rank", "rank_fraction"} & {*fixed, *lists}
    spaces: dict[str, Iterable[Any]] = dict(lists)
    for name, values in (("cores", _cores), ("blocks", lambda sizes: range(1, min(sizes) + 1))):
        if name in known and name not in fixed and name not in lists and not _explicit(fixed):
            spaces[name] = values(shape)
    planned = tuple(name for name in known if name in spaces or (by_rank and name == "rank"))

    def designed(chosen: Mapping[str, Any]) -> AbstractStructure:
        return design(structure, shape, **fixed, **chosen)

    first_error: ValueError | None = None
    least, best = math.inf, None
    for chosen in _combinations(spaces):
        try:
            start = _cost(designed({**chosen, "rank": 1} if by_rank else chosen), resource, dtype)
        except ValueError as error:
            first_error = first_error or error
            continue
        least = min(least, start)
        if start > budget:
            continue
        if by_rank:
            rank = largest_within(partial(_rank_cost, designed, chosen, resource, dtype), budget)
            chosen = {**chosen, "rank": rank}
        found = designed(chosen)
        key = (_cost(found, resource, dtype), found.rank_bound)
        if best is None or key > best[0]:
            best = key, chosen, found
    if math.isinf(least):
        raise first_error or ValueError(f"{structure} of shape {shape} has no design")
    if best is None:
        raise ValueError(
            f"{structure} of shape {shape} needs at least {least:,} {resource}, the budget is {_number(budget)}"
        )
    (spent, _), chosen, found = best
    final = {name: {**fixed, **chosen}[name] for name in known if name in fixed or name in chosen}
    return LayerPlan(
        structure, shape, final, planned, _cost(found, "macs", dtype), found.num_params, num_bytes(found, dtype),
        spent / budget,
    )  # fmt: skip


def check_budget(budget: float, name: str = "the budget") -> None:
    """Raise ValueError for a budget that is not positive and finite, TypeError for what is no number.

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


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1 <= abs(value) < 1e15 else f"{value:g}"


def _explicit(fixed: Mapping[str, Any]) -> bool:
    """Whether the factors are given themselves, and with them their number."""
    return not isinstance(fixed.get("factorization", ""), str)


def _cores(shape: tuple[int, int]) -> Iterator[int]:
    """Numbers of factors above 1 that the smaller size might be split into."""
    return iter(range(2, max(min(shape).bit_length(), 3)))


def _combinations(spaces: Mapping[str, Iterable[Any]]) -> Iterator[dict[str, Any]]:
    values = [list(space) for space in spaces.values()]
    return (dict(zip(spaces, chosen, strict=True)) for chosen in itertools.product(*values))


def _rank_cost(
    designed: Callable[[Mapping[str, Any]], AbstractStructure], chosen: Mapping[str, Any], resource: str, dtype: Any,
    rank: int,
) -> int | None:  # fmt: skip
    try:
        if rank > 1 and _is_full(designed({**chosen, "rank": rank - 1})):
            return None
        return _cost(designed({**chosen, "rank": rank}), resource, dtype)
    except ValueError:
        return None


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

    Examples
    --------
    >>> plans, left_out = plan_layers((768, 768), budget=50_000, structures=["dense", "low_rank", "kronecker"])
    >>> [(p.structure, p.options, p.macs) for p in plans]
    [('low_rank', {'rank': 32}, 49152), ('kronecker', {'cores': 2}, 43008)]
    >>> left_out
    {'dense': 'dense of shape (768, 768) needs at least 589,824 macs, the budget is 50,000'}
    """
    check_budget(budget)
    plans, left_out = [], {}
    for name in [n for n in structure_names() if n not in _NO_CHOICE] if structures is None else structures:
        structure_options(name)
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
        return -(-work_of(structure).total_flops() // 2)
    return structure.num_params if resource == "params" else num_bytes(structure, dtype)


def largest_within(cost: Callable[[int], float | None], budget: float) -> int | None:
    """Return the largest n from 1 on whose cost is within a budget, by doubling and bisection; None where 1 has none.

    ``cost`` rises with n; None says that n is out of range, and then every larger one is.

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
            raise ValueError(f"the cost does not reach the budget of {budget:g}")
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
