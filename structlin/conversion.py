r"""Exact conversions between structures, and the ranks at which a structure represents every matrix.

A conversion rearranges factors. It does not approximate; :func:`structlin.project` does. It depends on shapes alone and
is differentiable in every array library. A structure that shares weights (Kronecker, Tensor-Train) becomes one that
does not, with repeated weights, so the result can have more parameters.

The structures order their axes differently. A Tensor-Train or Kronecker product maps axes of sizes
:math:`(m_0, m_1)` to :math:`(n_0, n_1)`. A Block Tensor-Train maps :math:`(m_1, m_0)` to :math:`(n_0, n_1)`. A
butterfly maps :math:`(m_1, m_0)` to :math:`(n_1, n_0)`. So a Tensor-Train is a Block Tensor-Train with the axes of its
input reversed, and a butterfly is one with the axes of its output reversed. By default the result is a
:class:`StructuredOperator` whose chain has the reversed axes, with the factors, parameters and MACs of the Block
Tensor-Train. With ``permutation=True`` it is the product of a :class:`BlockTensorTrain` and a :class:`Permutation`.
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
    r"""Return the smallest ``rank`` option at which a structure represents every (d_out, d_in) matrix.

    Parameters
    ----------
    name
        ``low_rank``, ``tensor_train`` or ``block_tensor_train``.
    shape
        Shape ``(d_out, d_in)`` of the matrix.
    **options
        Options of the structure other than the rank: ``cores``, ``factorization``.

    Returns
    -------
    int or tuple of int
        :math:`\min(d_\text{out}, d_\text{in})` for low rank. For the others, one rank between each pair of cores k - 1
        and k: :math:`\min(\prod_{j<k} n_j m_j, \prod_{j \ge k} n_j m_j)` for Tensor-Train, and
        :math:`\min(\prod_{j<k} m_j, \prod_{j \ge k} n_j)` for Block Tensor-Train.

    Raises
    ------
    ValueError
        For any other structure. A Kronecker product of fixed sizes represents every matrix at no size, and a Monarch
        matrix does so with one block. For BLAST the smallest rank is not known; ``min(d_out, d_in)`` suffices.

    Examples
    --------
    >>> exact_rank("low_rank", (6, 35))
    6
    >>> exact_rank("block_tensor_train", (35, 6)), exact_rank("tensor_train", (35, 6))
    ((2,), (10,))
    """
    cls = structure_class(name)
    if given := {"rank", "rank_fraction"} & set(options):
        raise ValueError(f"exact_rank computes the rank; leave out {', '.join(sorted(given))}")
    design(cls, shape, **options)  # checks the options
    found = cls.exact_rank(shape, **options)
    if found is None:
        known = [repr(n) for n in structure_names() if "exact_rank" in vars(structure_class(n))]
        raise ValueError(
            f"no rank is known at which {name!r} represents every matrix; it is known for {', '.join(known)}"
        )
    return found


def _core_sizes(name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """Return the sizes n_k and m_k, core 0 first."""
    if name == TensorTrain.name:
        return [s[1] for s in shapes], [s[2] for s in shapes]
    return [s[len(shapes) - 1] for s in shapes], [s[-1] for s in shapes]


def conversions() -> tuple[tuple[str, str], ...]:
    """Return all pairs (from, to) that :func:`convert` supports. In addition, every operator converts to dense.

    Returns
    -------
    tuple of tuple of str
        Pairs of names of structures.

    Examples
    --------
    >>> ("kronecker", "block_tensor_train") in conversions()
    True
    """
    return tuple(_RULES)


def convert(A: LinearOperator, name: str, *, permutation: bool = False) -> LinearOperator:
    """Return the same matrix as an operator of another structure, without approximation.

    The factors of the result are rearranged from those of A. They have the same library, dtype and device, and are
    differentiable functions of the factors of A. The conversion does not depend on their values.

    ========================  =====================================================================================
    from                      to
    ========================  =====================================================================================
    monarch                   block_tensor_train (padding is kept; if the blocks do not divide the inner size, the
                              rank is the largest number of paths between two blocks, and some entries are 0)
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

    Parameters
    ----------
    A
        A named operator, or the transpose of one. For ``name="dense"``, any operator.
    name
        Name of the structure of the result.
    permutation
        If a Tensor-Train, Kronecker product or butterfly becomes a Block Tensor-Train, return the product of a
        :class:`BlockTensorTrain` and a :class:`Permutation` instead of a chain with reversed axes.

    Returns
    -------
    LinearOperator
        An operator that represents the same matrix.

    Raises
    ------
    TypeError
        If A is not an operator.
    ValueError
        If there is no exact conversion, for the two structures or for these sizes.

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
        raise TypeError(f"A must be an operator of structlin or CoLA, got {type(A).__qualname__}")
    structure_class(name)
    if permutation and name != BlockTensorTrain.name:
        raise ValueError(f"permutation=True is only valid for conversions to {BlockTensorTrain.name!r}, got {name!r}")
    if name == Dense.name:
        return A if type(A) is Dense else Dense(A.to_dense())
    if not isinstance(A, NamedOperator):
        raise ValueError(
            f"{type(A).__qualname__} is not an operator of a named structure, so it can be converted to {Dense.name!r} "
            f"only, not to {name!r}"
        )
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
            raise ValueError(
                f"the chain of {A!r} is not the one that {type(A).__name__} has for factors of these shapes, so it can "
                f"be converted to {Dense.name!r} only, not to {name!r}"
            )
        return convert(A.T, name, permutation=permutation).T
    converted = rule(A)
    if not isinstance(converted, _Reordered):
        if permutation:
            raise ValueError(f"{A.name!r} becomes {name!r} without a permutation; leave out permutation=True")
        return converted
    return converted.product() if permutation else converted.chain()


def _is_standard(A: NamedOperator) -> bool:
    """Return whether the chain is that of the class, not its transpose; Monarch and BTT may also be padded."""
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
        """Return ``B @ P`` or ``P @ B``, where P reverses the order of axes."""
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
    """Return one core for each stage.

    In terms of bits, stage k has axes (m_{c-1}, ..., m_{k+1}, n_{k-1}, ..., n_0, n_k, m_k); a core has n_0 first.
    """
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
    """Return ``x[block, :, index]``, where block is the index along ``axis`` of ``index`` and index q gives zero.

    The axes of the result are (p, o, path, rest).
    """
    name = backend_of(x)
    device = x.device if name == "torch" else None
    padded = ops(name).pad_last(x, 1)
    blocks = np.indices(index.shape)[axis]
    where, which = (to_backend(i.astype(np.int32), name, None, device) for i in (blocks, index))
    return padded[where, :, which]


def _block_train_from_block_diagonal(A: NamedOperator) -> NamedOperator:
    """Return a train whose slice (n_0, m_1) is a block if n_0 = m_1 and 0 otherwise.

    The rank is the smaller side of the blocks.
    """
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
            f"a Block Tensor-Train is a Monarch matrix if it has two cores and m_1 = n_0; got n = {sizes[0]}, "
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
    """Return the einsum with the cores exchanged: it contracts the last axis of the input first."""
    slow, fast = _two(A)
    w0 = _permute(fast[..., 0], (1, 0, 2))[None, None]  # (1, 1, n_1, r, m_1)
    w1 = _permute(slow[0], (0, 2, 1))[None, :, :, None]  # (1, n_0, r, 1, m_0)
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
