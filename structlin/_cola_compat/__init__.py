"""Repairs of CoLA 0.0.7, so that operators compose and their numbers are right on a fresh install.

CoLA dispatches on types through cola-plum-dispatch 0.1.4, which orders types by beartype. `install` is called when
structlin is imported. It checks first whether each defect exists, by a test or, if a test would import an array
library, by comparison with CoLA's own code. So it may be called again. If possible, a repair is a dispatch rule of
higher precedence. Other repairs replace a method or a function of CoLA. They apply to all operators of CoLA.

Each repair is listed with the versions that need it (by default CoLA 0.0.7). The names in brackets are the cases of
``tests/structlin/test_cola_compat.py`` that fail with all other repairs and pass with this one too.

Composing (`structlin._cola_compat._composing`, ``_slicing``, ``_pickling``): errors, or results of another library
    any        beartype >= 0.23: ``Any`` compares below every type, so ``add(Any, Any)`` ties with every other rule,
               and ``A + B``, ``A - B``, ``kron``, ``kronsum`` raise AmbiguousLookupError.
               [plus, difference, kron, kronsum]
    overlap    any beartype: two rules for ``A @ I``, ``I @ A``, ``I @ I``, ``kron(K, K)``, ``kronsum(S, S)``.
               [identity, kron_of_krons, kronsum_of_kronsums]
    library    the array library is guessed from the dtype, jax first, so NumPy operators come back as jax arrays.
               Whether an attribute is a leaf is recorded at the first assignment in a class; NumPy arrays are recorded
               as static, after which torch and jax operators of that class lose gradients.
               [numpy_stays, leaves_after_numpy]
    scaling    ``c * A`` with complex c and real A raises on torch and drops the imaginary part on jax; an array c of
               several elements scales each row by another number; the inverse of a scaled operator fails on NumPy.
               [complex_scalar, array_scalar, scalar_inverse]
    subtract   ``dense - A`` raises an error, because there is no ``__rsub__``. [dense_minus]
    slicing    ``A[i]`` of a matrix that is not square, index arrays on NumPy and jax, two lists of indices; repeated
               columns overwrite one another; a complex operand of a real operator fails; negative steps fail on torch;
               two index arrays give a submatrix where two lists give entries (now entries, as in NumPy; ``np.ix_``
               gives a submatrix); a slice without rows and columns is an operator that no function takes.
               [row, index_array, index_pairs, reversed_rows, repeated_columns, complex_slice, empty_slice]
    concat     ``Concatenated`` asks for equal sizes along the wrong axis, and along axis 1 it multiplies as along
               axis 0. [concatenated]
    rows       ``X @ A`` differentiates ``A @ x`` for Kronecker, KronSum, BlockDiag, Identity, ScalarMul,
               Permutation, Tridiagonal and Householder, which is slow, not available on NumPy, and fails on torch for
               a complex operator and a real X. [rows]
    clip       jax 0.10: ``jnp.clip`` no longer has ``a_min``, which Arnoldi uses. [arnoldi]
    pickling   operators hold a module, and classes such as ``Sum[Dense, Dense]`` cannot be found by name, so that
               pickle, copy.deepcopy and torch.save raise. [pickle_and_copy]
    devices    with more than one jax device, operators that hold no array, or traced ones, raise. [several_devices]
    moveaxis   ``torch.vmap`` of Kronecker products and sums raises, because it has no rule for ``torch.moveaxis``.
               [vmapped_kron]
    in_place   ``KronSum`` adds to an array of the dtype of x: a complex one times a real x raises, and so does
               ``torch.vmap`` over the members alone. [complex_kronsum]
    stacks     ``A @ X`` takes the first axis of X, not the last but one, and raises AssertionError for a wrong size.
               [stacks]
    views      ``kron`` of a torch tensor that is not contiguous raises. [transposed_kron]
    like       ``I_like`` of a NumPy operator belongs to jax. [numpy_identity]

Speed (`structlin._cola_compat._dispatch`): correct but slow
    lookup     one rule with a condition prevents plum from caching the resolved method of that function.
               [lookup_is_remembered]
    binding    ``inspect`` binds the arguments of every dispatched call. [binding_is_quick]
    annotating annotating an operator flattens it and its members. [annotating_keeps_members]
    sums       a sum begins with the number 0, and copies its first term. [sums_do_not_copy]

Numbers (`structlin._cola_compat._values`): wrong results without an error
    logdet_scalar       ``logdet(c * A)`` counts log|c| once instead of n times, and the sign likewise. [logdet_scalar]
    logdet_permutation  ``slogdet`` ignores the parity of a permutation, so LU gives wrong signs. [logdet_parity]
    logdet_iterative    with Lanczos or Arnoldi ``logdet`` returns its absolute value. [logdet_iterative]
    annotations         ``-PSD`` and ``PSD - PSD`` stay PSD, ``2 * Unitary`` stays Unitary, a complex ``A @ A.T`` is
                        taken for PSD, ``Stiefel.T`` stays Stiefel. [annotations]
    transpose           ``SelfAdjoint(A).T`` is ``A`` also where A is complex. [complex_transpose]
    gradient            on torch, the gradient through a tensor c in ``c * A`` is lost. [scalar_gradient]
    triangular          on torch, the inverse by LU or Cholesky casts what it multiplies to its own dtype, and drops
                        imaginary parts. [triangular_inverse]
    reciprocal          ``c / A`` returns ``A / c``. [reciprocal]
    sum_dtype           a sum has the dtype of its first term. [sum_dtype]
"""

from __future__ import annotations

import inspect

import plum


def _require_colas_plum() -> None:
    """Raise ImportError if plum has replaced CoLA's fork of it, which installs into the same folder."""
    if "cond" not in inspect.signature(plum.Dispatcher.__call__).parameters:
        raise ImportError(
            "plum-dispatch has replaced cola-plum-dispatch, which CoLA needs (both install the package 'plum'); "
            "remedy: pip uninstall -y plum-dispatch && "
            "pip install --force-reinstall --no-deps cola-plum-dispatch"
        )


_require_colas_plum()

from structlin._cola_compat._composing import COMPOSING, as_scalar, scalar_mul  # noqa: E402
from structlin._cola_compat._dispatch import SPEED, use_for_solve  # noqa: E402
from structlin._cola_compat._repair import (  # noqa: E402
    Repair,
    device_of,
    functions_of,
    implementation,
    is_array,
    library_of,
    rule,
)
from structlin._cola_compat._slicing import entries_of_diagonal  # noqa: E402
from structlin._cola_compat._values import VALUES, known_scalar, parity, scaled_annotations  # noqa: E402

__all__ = [
    "REPAIRS",
    "as_scalar",
    "device_of",
    "entries_of_diagonal",
    "functions_of",
    "implementation",
    "install",
    "is_array",
    "known_scalar",
    "library_of",
    "parity",
    "rule",
    "scalar_mul",
    "scaled_annotations",
    "use_for_solve",
]

REPAIRS: tuple[Repair, ...] = (*COMPOSING, *VALUES, *SPEED)


def install() -> tuple[str, ...]:
    """Repair the defects of CoLA that exist.

    Returns
    -------
    tuple[str, ...]
        Names of the repairs that were made; empty at the second call.
    """
    made = []
    for repair in REPAIRS:
        if repair.broken():
            repair.apply()
            made.append(repair.name)
    return tuple(made)
