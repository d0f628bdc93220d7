"""Exact conversions between structures, and the ranks at which a structure represents every matrix.

A conversion rearranges factors: it never approximates (:func:`structlin.project` does), it branches on shapes alone,
and it is differentiable on every array library. What it costs shows in the shapes of the result: a structure that
shares weights (Kronecker, Tensor-Train) becomes one that does not, with the weights repeated.

Order of axes. Tensor-Train and Kronecker read input and output alike, ``(m_1, m_2) -> (n_1, n_2)``. Block Tensor-Train
reads its input from the other end, ``(m_1, m_0) -> (n_0, n_1)``. A butterfly keeps outputs in the places of the
inputs, ``(m_1, m_0) -> (n_1, n_0)``. So a Tensor-Train is a Block Tensor-Train of the input with its axes reversed,
and a butterfly is one whose output axes are reversed. Both are returned as the chain of a Block Tensor-Train with that
order changed (the same factors, parameters and MACs, a :class:`StructuredOperator`) or, with ``permutation=True``, as
the product of a :class:`BlockTensorTrain` and a :class:`Permutation`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from cola.ops import LinearOperator

from structlin._arrays import Array, backend_of, ops, to_backend
from structlin.operators import StructuredOperator
from structlin.registry import NamedOperator, design, structure_class, structure_names
from structlin.structure import Step, Structure
from structlin.structures import (
    BlockDiagonal,
    BlockTensorTrain,
    Butterfly,
    Circulant,
    Dense,
    Diagonal,
    EinsumSpace,
    Kronecker,
    LowRank,
    Monarch,
    Permutation,
    TensorTrain,
    Toeplitz,
)
from structlin.structures.block_tensor_train import block_tensor_train_chain

__all__ = ["conversions", "convert", "exact_rank"]


def exact_rank(name: str, shape: tuple[int, int], **options: Any) -> int | tuple[int, ...]:
    """Return the smallest ``rank`` option at which a structure represents every (d_out, d_in) matrix.

    ``options`` are those of the structure but the rank (cores, factorization). Low rank: ``min(d_out, d_in)``, an
    integer. Tensor-Train and Block Tensor-Train: one number for each bond, ``min(left, right)`` with the entries that
    the cores on its two sides index apart from each other: ``prod_(j<=k) n_j m_j`` and ``prod_(j>k) n_j m_j`` in a
    Tensor-Train, ``prod_(j<=k) m_j`` and ``prod_(j>k) n_j`` in a Block Tensor-Train, whose cores share all other axes.

    Raises ValueError for any other structure: no size of a Kronecker product represents every matrix, a Monarch matrix
    does with one block, and for BLAST the smallest rank is not known (``min(d_out, d_in)`` suffices).

    Examples
    --------
    >>> exact_rank("low_rank", (6, 35))
    6
    >>> exact_rank("block_tensor_train", (35, 6)), exact_rank("tensor_train", (35, 6))
    ((2,), (10,))
    """
    cls = structure_class(name)
    if given := {"rank", "rank_fraction"} & set(options):
        raise ValueError(f"{', '.join(sorted(given))} cannot be given: exact_rank computes the rank")
    design(cls, shape, **options)  # checks them
    found = cls.exact_rank(shape, **options)
    if found is None:
        known = [repr(n) for n in structure_names() if "exact_rank" in vars(structure_class(n))]
        raise ValueError(f"no rank is known at which {name!r} represents every matrix; known for {', '.join(known)}")
    return found


def _core_sizes(name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """Sizes n_k and m_k, core 0 first."""
    if name == TensorTrain.name:
        return [s[1] for s in shapes], [s[2] for s in shapes]
    return [s[len(shapes) - 1] for s in shapes], [s[-1] for s in shapes]


def conversions() -> tuple[tuple[str, str], ...]:
    """All pairs (from, to) that :func:`convert` knows; besides these, everything converts to dense.

    Examples
    --------
    >>> ("kronecker", "block_tensor_train") in conversions()
    True
    """
    return tuple(_RULES)


def convert(A: LinearOperator, name: str, *, permutation: bool = False) -> LinearOperator:
    """Return the same matrix as an operator of the structure ``name``, exactly.

    ``A`` is a named operator (or a transpose of one); to ``"dense"``, any operator. The factors of the result are
    rearranged from those of A: same library, dtype and device, differentiable, no value is looked at.

    ========================  =====================================================================================
    from                      to
    ========================  =====================================================================================
    monarch                   block_tensor_train (padding kept; where the blocks do not divide the inner size, the
                              rank is the largest number of paths between two blocks, and some factor entries are 0)
    block_tensor_train        monarch (two cores with m_1 = n_0), einsum (two cores)
    kronecker                 tensor_train (rank 1), block_tensor_train (rank 1), einsum (two factors)
    tensor_train              block_tensor_train (same ranks), einsum (two cores)
    butterfly                 block_tensor_train (rank 1)
    low_rank                  einsum, tensor_train, block_tensor_train (one slice)
    block_diagonal            block_tensor_train (b times the parameters, and an identity in the other core)
    diagonal, dense           block_diagonal
    circulant                 toeplitz
    anything                  dense
    ========================  =====================================================================================

    ``permutation``: for a Tensor-Train, Kronecker product or butterfly as Block Tensor-Train, return the product of a
    :class:`BlockTensorTrain` and a :class:`Permutation` in place of a chain with another order of axes.

    Raises TypeError for what is no operator, ValueError where no exact conversion exists for these sizes or at all.

    Examples
    --------
    >>> from structlin import Kronecker
    >>> A = Kronecker(np.arange(6.0).reshape(2, 3), np.arange(8.0).reshape(4, 2))
    >>> B = convert(A, "block_tensor_train")
    >>> B.structure
    Structure.parse('ab,bcea->ceb; ceb,cdeb->cd', a=3, b=2, c=2, e=1, d=4)
    >>> np.array_equal(A.to_dense(), B.to_dense())
    True
    """
    if not isinstance(A, LinearOperator):
        raise TypeError(f"convert takes an operator, got {type(A).__qualname__}")
    structure_class(name)
    if permutation and name != BlockTensorTrain.name:
        raise ValueError(f"permutation=True is for conversions to {BlockTensorTrain.name!r}, not to {name!r}")
    if name == Dense.name:
        return A if type(A) is Dense else Dense(A.to_dense())
    if not isinstance(A, NamedOperator):
        raise ValueError(f"{type(A).__qualname__} is no named structure, so it converts to {Dense.name!r} only")
    if A.name == name:
        return A
    rule = _RULES.get((A.name, name))
    if rule is None:
        known = [target for source, target in _RULES if source == A.name]
        raise ValueError(
            f"no exact conversion from {A.name!r} to {name!r}; there is one to {', '.join([*known, Dense.name])}"
        )
    if not _is_standard(A):
        if not _is_standard(A.T):
            raise ValueError(f"{A!r} is not written as {type(A).__name__} writes its chain")
        return convert(A.T, name, permutation=permutation).T
    converted = rule(A)
    if not isinstance(converted, _Reordered):
        if permutation:
            raise ValueError(f"{A.name!r} becomes {name!r} without a permutation")
        return converted
    return converted.product() if permutation else converted.chain()


def _is_standard(A: NamedOperator) -> bool:
    """Whether the chain is the one that the class states, not its transpose; some rules know padding too."""
    if not isinstance(A.structure, Structure):
        return True
    if isinstance(A, Butterfly):
        return A.structure == Butterfly.design(A.shape)
    try:
        standard = type(A)._infer(*(f.shape for f in A.structure.factors))
    except ValueError:
        return False
    if isinstance(A, Monarch | BlockTensorTrain) and isinstance(standard, Structure):
        return standard.steps == A.structure.steps
    return standard == A.structure


def _named(cls: type[NamedOperator], factors: Sequence[Array], shape: tuple[int, int]) -> NamedOperator:
    """Return an operator of ``cls``, padded and cut to ``shape``."""
    structure = cls._infer(*(tuple(f.shape) for f in factors))
    if structure.shape != shape:
        structure = replace(structure, d_out=shape[0], d_in=shape[1])  # type: ignore[type-var]
    return cls._build(structure, tuple(factors))


class _Reordered:
    """A Block Tensor-Train whose input or output axes are reversed."""

    def __init__(self, factors: Sequence[Array], *, of_input: bool) -> None:
        self.inner = BlockTensorTrain(*factors)
        self.of_input = of_input

    def chain(self) -> StructuredOperator:
        structure = self.inner.structure
        assert isinstance(structure, Structure)
        steps = list(structure.steps)
        if self.of_input:
            steps[0] = Step(steps[0].input[::-1], steps[0].factor, steps[0].output)
        else:
            steps[-1] = Step(steps[-1].input, steps[-1].factor, steps[-1].output[::-1])
        return StructuredOperator(replace(structure, steps=tuple(steps)), self.inner.factors)

    def product(self) -> LinearOperator:
        """``B @ P`` or ``P @ B``, where P puts the axes of its input into reversed order."""
        outs, ins = _core_sizes(BlockTensorTrain.name, [f.shape for f in self.inner.structure.factors])
        sizes = ins if self.of_input else outs
        order = np.arange(np.prod(sizes), dtype=np.int32).reshape(sizes).T.reshape(-1)
        index = to_backend(order, self.inner.backend, None, self.inner.device)
        P = Permutation(index, dtype=self.inner.dtype)
        return self.inner @ P if self.of_input else P @ self.inner


def _broadcast(x: Array, shape: tuple[int, ...]) -> Array:
    """Return a copy of ``x``, repeated along new leading axes."""
    backend = backend_of(x)
    if backend == "torch":
        return x.expand(shape).contiguous()
    if backend == "numpy":
        return np.broadcast_to(x, shape).copy()
    return sys.modules["jax"].numpy.broadcast_to(x, shape)


def _permute(x: Array, order: Sequence[int]) -> Array:
    return ops(backend_of(x)).permute(x, tuple(order))


def _identity(A: StructuredOperator, n: int) -> Array:
    return A.xnp.eye(n, n, dtype=A.dtype, device=A.device)


def _train_from_kronecker(A: NamedOperator) -> NamedOperator:
    return TensorTrain(*(f[None, :, :, None] for f in A.factors))


def _block_train_from_train(A: NamedOperator) -> _Reordered:
    shapes = [f.shape for f in A.structure.factors]
    outs, ins = _core_sizes(TensorTrain.name, shapes)
    target = block_tensor_train_chain(outs, ins, [s[3] for s in shapes[:-1]])
    cores = []
    for k, (core, spec) in enumerate(zip(A.factors, target.factors, strict=True)):
        r, n, m, after = core.shape
        bonds = ([after] if k < len(shapes) - 1 else []) + ([r] if k else [])
        cores.append(_broadcast(_permute(core, (1, 3, 0, 2)).reshape((n, *bonds, m)), spec.shape))
    return _Reordered(cores, of_input=True)


def _block_train_from_kronecker(A: NamedOperator) -> _Reordered:
    return _block_train_from_train(_train_from_kronecker(A))


def _block_train_from_butterfly(A: NamedOperator) -> _Reordered:
    """Stage k is indexed (m_(c-1)..m_(k+1)), (n_(k-1)..n_0), n_k, m_k by bits; a core has n_0 first."""
    count = len(A.factors)
    target = block_tensor_train_chain([2] * count, [2] * count, [1] * (count - 1))
    ins, outs = target.steps[0].input, target.steps[-1].output[::-1]  # the bits, highest first
    cores = []
    for k, (factor, spec, step) in enumerate(zip(A.factors, target.factors, target.steps, strict=True)):
        bits = ins[: count - 1 - k] + outs[count - k :] + outs[count - 1 - k] + ins[count - 1 - k]
        wanted = step.batch + bits[-2:]
        core = _permute(factor.reshape((2,) * (count + 1)), [bits.index(a) for a in wanted])
        cores.append(core.reshape(spec.shape))
    return _Reordered(cores, of_input=False)


def _block_train_from_monarch(A: NamedOperator) -> NamedOperator:
    first, second = A.factors
    if first.ndim == 4:
        return _named(BlockTensorTrain, A.factors, A.shape)
    blocks, q, _ = first.shape
    # Element u of the inner vector lies in block u // q of the first factor and block u % b of the second.
    paths: dict[tuple[int, int], list[int]] = {(p, o): [] for p in range(blocks) for o in range(blocks)}
    for u in range(blocks * q):
        paths[u // q, u % blocks].append(u)
    rank = max(map(len, paths.values()))
    rows = np.full((blocks, blocks, rank), q)  # [block of the first, block of the second, path], q: none
    columns = np.full((blocks, blocks, rank), q)
    for (p, o), found in paths.items():
        rows[p, o, : len(found)] = [u - p * q for u in found]
        columns[p, o, : len(found)] = [u // blocks for u in found]
    w0 = _taken(_permute(first, (0, 2, 1)), rows, 0)  # (p, o, path, a)
    w1 = _taken(second, columns, 1)  # (p, o, path, e)
    return _named(BlockTensorTrain, (w0, _permute(w1, (1, 3, 2, 0))), A.shape)


def _taken(x: Array, index: np.ndarray, axis: int) -> Array:
    """``x[block, :, index]`` with a zero at index q; the block stands at ``axis`` of the index: (p, o, path, rest)."""
    name = backend_of(x)
    device = x.device if name == "torch" else None
    padded = ops(name).pad_last(x, 1)
    blocks = np.indices(index.shape)[axis]
    where, which = (to_backend(i.astype(np.int32), name, None, device) for i in (blocks, index))
    return padded[where, :, which]


def _block_train_from_block_diagonal(A: NamedOperator) -> NamedOperator:
    """Slice (n_0, m_1) is block p on the diagonal, else 0; the smaller side of the blocks becomes the rank."""
    (blocks,) = A.factors
    count, rows, columns = blocks.shape
    diagonal = _identity(A, count)[:, :, None, None]
    on_diagonal, small = blocks[None] * diagonal, min(rows, columns)
    every = _broadcast(_identity(A, small), (count, count, small, small))
    w0, w1 = (every, on_diagonal) if columns <= rows else (on_diagonal, every)
    return BlockTensorTrain(w0, _permute(w1, (0, 2, 3, 1)))


def _monarch_from_block_train(A: NamedOperator) -> NamedOperator:
    if len(A.factors) != 2 or A.factors[0].shape[0] != A.factors[0].shape[1]:
        sizes = _core_sizes(BlockTensorTrain.name, [f.shape for f in A.structure.factors])
        raise ValueError(
            f"a Block Tensor-Train is a Monarch matrix where it has two cores and m_1 = n_0; got n = {sizes[0]}, "
            f"m = {sizes[1]}"
        )
    return _named(Monarch, A.factors, A.shape)


def _two(A: NamedOperator) -> tuple[Array, Array]:
    if len(A.factors) != 2:
        raise ValueError(f"the einsum space holds chains of two factors, got {len(A.factors)} factors of {A.name!r}")
    return A.factors


def _einsum_from_block_train(A: NamedOperator) -> NamedOperator:
    first, second = _two(A)
    return _named(EinsumSpace, (first[:, :, None], second[..., None]), A.shape)


def _einsum_from_train(A: NamedOperator) -> NamedOperator:
    """Return the space contracts the fast input axis first, so the cores change places."""
    slow, fast = _two(A)
    w0 = _permute(fast[..., 0], (1, 0, 2))[None, None]  # (1, 1, n_2, r, m_2)
    w1 = _permute(slow[0], (0, 2, 1))[None, :, :, None]  # (1, n_1, r, 1, m_1)
    return EinsumSpace(w0, w1)


def _einsum_from_kronecker(A: NamedOperator) -> NamedOperator:
    _two(A)
    return _einsum_from_train(_train_from_kronecker(A))


def _einsum_from_low_rank(A: NamedOperator) -> NamedOperator:
    V, U = A.factors
    return EinsumSpace(V[None, None, None], U[None, :, :, None, None])


def _train_from_low_rank(A: NamedOperator) -> NamedOperator:
    V, U = A.factors
    return TensorTrain(V.swapaxes(0, 1)[None, None], U.swapaxes(0, 1)[:, :, None, None])


def _block_train_from_low_rank(A: NamedOperator) -> NamedOperator:
    V, U = A.factors
    return BlockTensorTrain(V[None, None], U[None, :, :, None])


def _toeplitz_from_circulant(A: NamedOperator) -> NamedOperator:
    (column,) = A.factors
    return Toeplitz.from_kernel(ops(backend_of(column)).concat([column[1:], column]), A.shape[0])


_RULES: dict[tuple[str, str], Callable[[NamedOperator], NamedOperator | _Reordered]] = {
    (Monarch.name, BlockTensorTrain.name): _block_train_from_monarch,
    (BlockTensorTrain.name, Monarch.name): _monarch_from_block_train,
    (BlockTensorTrain.name, EinsumSpace.name): _einsum_from_block_train,
    (Kronecker.name, TensorTrain.name): _train_from_kronecker,
    (Kronecker.name, BlockTensorTrain.name): _block_train_from_kronecker,
    (Kronecker.name, EinsumSpace.name): _einsum_from_kronecker,
    (TensorTrain.name, BlockTensorTrain.name): _block_train_from_train,
    (TensorTrain.name, EinsumSpace.name): _einsum_from_train,
    (Butterfly.name, BlockTensorTrain.name): _block_train_from_butterfly,
    (LowRank.name, EinsumSpace.name): _einsum_from_low_rank,
    (LowRank.name, TensorTrain.name): _train_from_low_rank,
    (LowRank.name, BlockTensorTrain.name): _block_train_from_low_rank,
    (BlockDiagonal.name, BlockTensorTrain.name): _block_train_from_block_diagonal,
    (Diagonal.name, BlockDiagonal.name): lambda A: BlockDiagonal(A.factors[0][:, None, None]),
    (Dense.name, BlockDiagonal.name): lambda A: BlockDiagonal(A.factors[0][None]),
    (Circulant.name, Toeplitz.name): _toeplitz_from_circulant,
}
