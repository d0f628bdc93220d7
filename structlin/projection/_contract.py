"""Einsums over numbered axes, as batched matrix products in an order that is computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from opt_einsum import contract_path, get_symbol

from structlin.algebra.numbered import Axes

SMALL = 256  # multiplications of one batch entry, below which NumPy's einsum is faster than a matrix product


def gather(array: np.ndarray, axes: Axes, output: Axes) -> np.ndarray:
    """Return ``array`` with the axes ``output``: diagonals of repeated axes, sums over axes not in ``output``."""
    if len(axes) == len(output):
        return array.transpose([axes.index(a) for a in output])
    symbols = {a: get_symbol(i) for i, a in enumerate(dict.fromkeys(axes))}
    return np.einsum(f"{''.join(symbols[a] for a in axes)}->{''.join(symbols[a] for a in output)}", array)


def expression(operands: Sequence[Axes], output: Axes, sizes: Mapping[int, int]) -> Callable[..., np.ndarray]:
    """Return a function of arrays with these axes that multiplies them and sums over the axes not in ``output``.

    An axis may occur in any number of operands, and twice in one (its diagonal).
    """
    if not operands:
        return lambda: np.ones(())
    terms = ",".join("".join(map(get_symbol, axes)) for axes in operands)
    shapes = [tuple(sizes[a] for a in axes) for axes in operands]
    path = contract_path(f"{terms}->{''.join(map(get_symbol, output))}", *shapes, shapes=True)[0]
    live = list(operands)
    plan: list[tuple[int, int, _Product]] = []
    for chosen in path:
        if len(chosen) == 1:
            continue
        first, second = sorted(chosen)
        right, left = live.pop(second), live.pop(first)
        needed = set(output).union(*live)
        product = _Product(left, right, needed, sizes)
        plan.append((first, second, product))
        live.append(product.output)
    last = live[0]

    def evaluate(*arrays: np.ndarray) -> np.ndarray:
        stack = list(arrays)
        for first, second, product in plan:
            right, left = stack.pop(second), stack.pop(first)
            stack.append(product(left, right))
        return gather(stack[0], last, output)

    return evaluate


class _Product:
    """The product of two arrays, summed over the axes that are not needed later."""

    def __init__(self, left: Axes, right: Axes, needed: set[int], sizes: Mapping[int, int]) -> None:
        self.left, self.right = left, right
        batch = tuple(a for a in dict.fromkeys(left) if a in right and a in needed)
        summed = tuple(a for a in dict.fromkeys(left) if a in right and a not in needed)
        rows = tuple(a for a in dict.fromkeys(left) if a not in right and a in needed)
        columns = tuple(a for a in dict.fromkeys(right) if a not in left and a in needed)
        self.orders = (batch + rows + summed, batch + summed + columns)
        self.output = batch + rows + columns

        def size(axes: Axes) -> int:
            return math.prod(sizes[a] for a in axes)

        b, m, k, n = map(size, (batch, rows, summed, columns))
        self.shapes = ((b, m, k), (b, k, n))
        self.shape = tuple(sizes[a] for a in self.output)
        self.matrices = m * k * n >= SMALL or b == 1

    def __call__(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        x = gather(left, self.left, self.orders[0]).reshape(self.shapes[0])
        y = gather(right, self.right, self.orders[1]).reshape(self.shapes[1])
        product = x @ y if self.matrices else np.einsum("bmk,bkn->bmn", x, y)
        return product.reshape(self.shape)
