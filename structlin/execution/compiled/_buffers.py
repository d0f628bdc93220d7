"""Buffers of the compiled passes in torch, slice by slice: copies of factors, sums of gradients, kept activations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from structlin.execution._memory import advised
from structlin.execution.compiled._program import Packing, Program
from structlin.execution.compiled._rules import copy_shares
from structlin.execution.compiled._slices import Slices
from structlin.execution.compiled._team import run_shares


class Packed:
    """Factors in the orders in which the products ``kind`` of slices read them."""

    def __init__(self, slices: Slices, kind: str, numbers: Sequence[int], factors: Sequence[Tensor]) -> None:
        self._slices, self._packing, self._numbers = slices, slices.program.packing(kind, tuple(numbers)), numbers
        self._factors, self._made = factors, -1
        size = self._packing.total
        self._copies = advised(torch.empty(size, dtype=torch.uint8, device="cpu")) if size else None
        self._places: list[int] = []

    def slice(self, number: int) -> list[int]:
        """Return the addresses of the factors of a slice; they are valid until the next call."""
        if self._made == number:
            return self._places
        first, places, moved = 0 if self._copies is None else self._copies.data_ptr(), [], []
        for k, size, start in zip(self._numbers, self._packing.sizes, self._packing.starts, strict=True):
            place = self._factors[k].data_ptr()
            if number:
                place += number * self._slices.factors[k] * self._factors[k].itemsize
            if size:
                moved += [place, first + start]
                place = first + start
            places.append(place)
        _copy(self._slices.program, self._packing, moved)
        self._made, self._places = number, places
        return places


class Sums:
    """The gradients ``found`` of the factors ``wanted``, of which each slice has its part, and ``more`` sums.

    Each thread has its own sums. Those of the first thread are the gradients themselves if order and type agree.
    """

    def __init__(
        self, slices: Slices, wanted: list[int], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, more: list[int],
        threads: int,
    ) -> None:  # fmt: skip
        program = slices.program
        self._slices, self._wanted, self._shapes, self._dtype = slices, wanted, shapes, dtype
        self._packing = program.packing("gradients", tuple(wanted))
        self.found: list[Tensor | None] = []
        self._sums: list[list[Tensor]] = [[]]
        for k, copied in zip(wanted, self._packing.sizes, strict=True):
            direct = None if copied else _zeros(shapes[k], dtype).view(shapes[k])
            self.found.append(direct)
            self._sums[0].append(_zeros(program.shapes[k], program.dtype) if direct is None else direct)
        self._sums += [[_zeros(program.shapes[k], program.dtype) for k in wanted] for _ in range(1, threads)]
        self._more = [[_zeros((n,), program.dtype) for n in more] for _ in self._sums]

    def slice(self, number: int) -> list[list[int]]:
        """Return, for each thread, the addresses of the sums of a slice, which start at zero."""
        if not number:
            return [_places(sums) + _places(more) for sums, more in zip(self._sums, self._more, strict=True)]
        places = []
        for thread, sums in enumerate(self._sums):
            here = []
            for k, copied, total in zip(self._wanted, self._packing.sizes, sums, strict=True):
                if copied or thread:
                    total.zero_()
                    here.append(total.data_ptr())
                else:
                    here.append(total.data_ptr() + number * self._slices.factors[k] * total.itemsize)
            places.append(here + _places(self._more[thread]))
        return places

    def finish(self, number: int) -> None:
        """Complete the sums of this slice."""
        if len(self._sums) > 1:
            self._add(number)
        moved = []
        for place, (k, copied, total) in enumerate(zip(self._wanted, self._packing.sizes, self._sums[0], strict=True)):
            if copied:
                found = self.found[place]
                if found is None:
                    found = self.found[place] = advised(torch.empty(self._shapes[k], dtype=self._dtype, device="cpu"))
                moved += [total.data_ptr(), found.data_ptr() + number * self._slices.factors[k] * found.itemsize]
        _copy(self._slices.program, self._packing, moved)

    def _add(self, number: int) -> None:
        """Add the sums of the other threads to those of the first one."""
        totals = []
        for k, copied, total in zip(self._wanted, self._packing.sizes, self._sums[0], strict=True):
            size = math.prod(self._slices.program.shapes[k])
            totals.append(total if copied else total.view(-1).narrow(0, number * self._slices.factors[k], size))
        for sums in self._sums[1:]:
            for total, part in zip(totals, sums, strict=True):
                total += part
        if number + 1 == self._slices.count:
            for mores in self._more[1:]:
                for total, part in zip(self._more[0], mores, strict=True):
                    total += part
            del self._sums[1:]

    @property
    def more(self) -> list[Tensor]:
        return self._more[0]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return advised(torch.empty(math.prod(shape), dtype=dtype, device="cpu")).zero_()


def _copy(program: Program, packing: Packing, table: Sequence[int]) -> None:
    """Make the copies of a table of addresses."""
    if table:
        count = copy_shares(packing.numbers, torch.get_num_threads())
        run_shares(packing.run, [table] * count, range(count + 1), count, program.target)


def kept_places(kept: Sequence[Tensor], slices: Slices, number: int) -> list[int]:
    """Return the addresses of a slice of kept activations."""
    assert slices.states is not None
    return [a.data_ptr() + number * n * a.itemsize for a, n in zip(kept, slices.states, strict=True)]


def _places(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
