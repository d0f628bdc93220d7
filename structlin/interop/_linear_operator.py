"""Conversion to linear_operator, for structured kernel matrices in Gaussian processes of GPyTorch."""

from __future__ import annotations

from functools import cache
from typing import Any

import cola
from cola.ops import LinearOperator

from structlin._cola_compat import functions_of, library_of
from structlin.interop._arrays import require_operator
from structlin.linalg import solve


def to_linear_operator(A: LinearOperator) -> Any:
    """Return an operator of torch tensors as an operator of ``linear_operator``, for GPyTorch.

    structlin computes products, diagonal, solutions and log-determinant. So a kernel matrix that is a Kronecker product
    is never formed as a dense matrix, and neither is its sum with a noise term. Gradients reach the factors of A.

    Parameters
    ----------
    A
        Operator of shape (n, m) of structlin or CoLA, over torch tensors, without batch axes.

    Returns
    -------
    Any
        A ``linear_operator.LinearOperator`` of that shape. Its sum with a diagonal of linear_operator (the noise of a
        likelihood) is again such an operator. If ``A`` is annotated as ``cola.PSD``, the sum is too.

    Raises
    ------
    TypeError
        If A is not an operator, or not one of torch tensors.
    ValueError
        From methods of the result that add batch axes: ``unsqueeze``, ``repeat`` and ``expand``.
    ImportError
        If linear_operator is not installed (``pip install "structlin[peers]"``).

    Examples
    --------
    >>> import torch, structlin
    >>> K = to_linear_operator(cola.PSD(structlin.Kronecker(2 * torch.eye(2), 3 * torch.eye(3))))
    >>> K.add_jitter(1.0).solve(torch.ones(6, 1))[0, 0].item()
    0.1428571492433548
    """
    require_operator(A)
    if A.xnp is not functions_of("torch"):
        raise TypeError(
            f"linear_operator works on torch tensors, got an operator of {library_of(A.xnp)} arrays; "
            "build it from torch tensors"
        )
    leaves, unflatten = A.flatten()
    return _adapter()(*leaves, unflatten=unflatten)


@cache
def _adapter() -> Any:
    """Return the class, which is defined at the first use because it needs linear_operator."""
    import torch
    from linear_operator.operators import DiagLinearOperator
    from linear_operator.operators import LinearOperator as Peer

    class StructlinLinearOperator(Peer):
        """An operator of structlin or CoLA, which ``unflatten`` builds from its arrays."""

        def __init__(self, *leaves: Any, unflatten: Any) -> None:
            super().__init__(*leaves, unflatten=unflatten)
            self.operator: LinearOperator = unflatten(leaves)

        def _size(self) -> torch.Size:
            return torch.Size(self.operator.shape)

        @property
        def dtype(self) -> torch.dtype:
            return self.operator.dtype

        @property
        def device(self) -> torch.device:
            return self.operator.device

        def _matmul(self, rhs: torch.Tensor) -> torch.Tensor:
            if rhs.ndim <= 2:
                return self.operator @ rhs
            columns = rhs.movedim(-2, 0)
            return (self.operator @ columns.flatten(1)).reshape(-1, *columns.shape[1:]).movedim(0, -2)

        def _transpose_nonbatch(self) -> Peer:
            return to_linear_operator(self.operator.T)

        def _diagonal(self) -> torch.Tensor:
            return cola.linalg.diag(self.operator)

        def _get_indices(
            self, row_index: torch.Tensor, col_index: torch.Tensor, *batch_indices: torch.Tensor
        ) -> torch.Tensor:
            """Return entries; the pivoted Cholesky decomposition asks for those of one row at a time."""
            i, j = torch.broadcast_tensors(row_index, col_index)
            rows, columns = row_index.unique().numel(), col_index.unique().numel()
            A, first, last = (self.operator.T, j, i) if rows < columns else (self.operator, i, j)
            return A[first.flatten(), last.flatten()].reshape(i.shape)

        def _unsqueeze_batch(self, dim: int) -> Peer:
            raise ValueError(
                f"an operator of structlin, here {tuple(self.shape)}, has no batch axes; unsqueeze, repeat and expand "
                "cannot add one: for a batch, write linear_operator.operators.DenseLinearOperator(L.to_dense())"
            )

        def to_dense(self) -> torch.Tensor:
            return self.operator.to_dense()

        def _plus_diagonal(self, diagonal: torch.Tensor) -> Peer:
            """Return ``A + diag(diagonal)``; ``diagonal`` is one number or (n,)."""
            n = self.operator.shape[0]
            if diagonal.numel() == 1:
                identity = cola.ops.Identity((n, n), self.dtype)
                identity.xnp, identity.device = self.operator.xnp, self.device
                more = diagonal.reshape(()) * identity
            else:
                more = cola.ops.Diagonal(diagonal.expand(n))
            total = self.operator + more
            # Noise is positive, or GPyTorch would not add it to a covariance.
            return to_linear_operator(cola.PSD(total) if self.operator.isa(cola.PSD) else total)

        def add_diagonal(self, diag: torch.Tensor) -> Peer:
            return self._plus_diagonal(diag)

        def add_jitter(self, jitter_val: float = 1e-3) -> Peer:
            return self._plus_diagonal(torch.tensor(jitter_val, dtype=self.dtype, device=self.device))

        def __add__(self, other: Any) -> Any:
            if isinstance(other, DiagLinearOperator) and other.shape == self.shape:
                diagonal = getattr(other, "diag_values", other._diag)
                return self._plus_diagonal(diagonal)
            if isinstance(other, StructlinLinearOperator):
                return to_linear_operator(self.operator + other.operator)
            return super().__add__(other)

        def solve(self, right_tensor: torch.Tensor, left_tensor: torch.Tensor | None = None) -> torch.Tensor:
            found = self._solved(right_tensor)
            return found if left_tensor is None else left_tensor @ found

        def _solved(self, rhs: torch.Tensor) -> torch.Tensor:
            if rhs.ndim <= 2:
                return solve(self.operator, rhs)
            columns = rhs.movedim(-2, 0)
            return solve(self.operator, columns.flatten(1)).reshape(-1, *columns.shape[1:]).movedim(0, -2)

        def _solve(self, rhs: torch.Tensor, preconditioner: Any = None, num_tridiag: int | None = 0) -> torch.Tensor:
            return self._solved(rhs)

        def inv_quad_logdet(
            self, inv_quad_rhs: torch.Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool = True
        ) -> tuple[torch.Tensor, torch.Tensor]:
            zero = torch.zeros((), dtype=self.dtype, device=self.device)
            quad = zero
            if inv_quad_rhs is not None:
                columns = inv_quad_rhs if inv_quad_rhs.ndim > 1 else inv_quad_rhs[:, None]
                quad = (columns * self._solved(columns)).sum(-2)
                quad = quad.sum(-1) if reduce_inv_quad else quad
            return quad, cola.linalg.logdet(self.operator) if logdet else zero

    return StructlinLinearOperator
