"""Repairs without which operators do not compose; none changes a number that CoLA got right."""

from __future__ import annotations

import inspect
import sys
from functools import reduce
from numbers import Number
from typing import Any

import numpy as np
from beartype.door import TypeHint
from cola.annotations import get_annotations
from cola.backends import np_fns
from cola.fns import lazify
from cola.linalg.algorithm_base import Algorithm
from cola.ops import (
    BlockDiag,
    Concatenated,
    Householder,
    Identity,
    Kronecker,
    KronSum,
    LinearOperator,
    Permutation,
    Product,
    ScalarMul,
    Tridiagonal,
    operator_base,
    operators,
)
from plum import dispatch

from structlin._arrays import Array, backend_of, library_of_array
from structlin._cola_compat._pickling import PICKLING
from structlin._cola_compat._repair import (
    Repair,
    device_of,
    functions_of,
    implementation,
    in_library,
    is_ambiguous,
    is_array,
    is_original,
    library_of,
    replacing,
    rule,
)
from structlin._cola_compat._slicing import SLICING
from structlin._cola_compat._stacks import STACKS

# -- any: write ``object`` for ``Any`` -----------------------------------------------------------------------------


def _methods_of_any() -> list[tuple[Any, Any]]:
    found = []
    for function in dispatch.functions.values():
        for signature in function.methods:
            if Any in signature.types and is_original(signature.implementation):
                found.append((function, signature))
    return found


def _any_is_broken() -> bool:
    return bool(TypeHint(Any) <= TypeHint(int)) and bool(_methods_of_any())


def _repair_any() -> None:
    # ``object`` takes the same arguments as ``Any``, and compares above every type and below none. The annotation is
    # the source from which plum reads the signature again, so the repair outlives a clearing of plum's caches.
    touched = []
    for function, signature in _methods_of_any():
        method = signature.implementation
        for name, parameter in inspect.signature(method).parameters.items():
            if parameter.annotation in (Any, inspect.Parameter.empty):
                method.__annotations__[name] = object
        touched.append(function)
    for function in touched:
        function.clear_cache(reregister=True)


# -- overlap -------------------------------------------------------------------------------------------------------


def _repair_overlap() -> None:
    rule("dot", types=(LinearOperator, Identity))(lambda A, B: A)
    rule("dot", types=(Identity, LinearOperator))(lambda A, B: B)
    rule("dot", types=(Identity, Identity))(lambda A, B: A)
    rule("kron", types=(Kronecker, Kronecker))(lambda A, B: Kronecker(*A.Ms, *B.Ms))
    rule("kronsum", types=(KronSum, KronSum))(lambda A, B: KronSum(*A.Ms, *B.Ms))


# -- library: by the arrays' type ----------------------------------------------------------------------------------


def _libraries(value: Any) -> set[str]:
    """Return the names of the libraries whose arrays ``value`` holds."""
    if isinstance(value, LinearOperator):
        if hasattr(type(value), "backend"):  # one of ours
            return {value.backend}
        held = [v for k, v in vars(value).items() if value._dynamic.get(k)]
        return set().union(*map(_libraries, held)) or _library_of_owner(vars(value).get("_matmat"))
    if isinstance(value, tuple | list):
        return set().union(*map(_libraries, value))
    if isinstance(value, dict):
        return _libraries(list(value.values()))
    library = library_of_array(value)
    return set() if library is None else {library}


def _library_of_owner(matmat: Any) -> set[str]:
    """Return the library of the operator whose product ``matmat`` is, for an operator made of that alone."""
    owner = getattr(matmat, "__self__", None)
    return {library_of(owner.xnp)} if isinstance(owner, LinearOperator) else set()


def _libraries_of_members(value: LinearOperator) -> set[str]:
    """Return the libraries of the operators of which ``value``, which holds no array, is made."""
    held = [v if isinstance(v, tuple | list) else (v,) for v in vars(value).values()]
    members = [M for ops in held for M in ops if isinstance(M, LinearOperator)]
    return {library_of(M.xnp) for M in members}


def _find_device(value: Any) -> Any:
    if isinstance(value, LinearOperator):
        return value.device
    if not isinstance(value, (tuple, list, set, dict)):
        return device_of(value)
    for item in value.values() if isinstance(value, dict) else value:
        if type(item) is not int and (found := _find_device(item)) is not None:
            return found
    return None


def _guessed_library(dtype: Any) -> str:
    """Return CoLA's guess without starting jax, for a class that sets its arrays later."""
    if str(dtype).startswith("torch."):
        return "torch"
    return "jax" if "jax" in sys.modules else "numpy"  # importing CoLA has imported it where it is installed


def _operator_init(
    self: Any, dtype: Any, shape: tuple[int, int], matmat: Any = None, annotations: Any = frozenset()
) -> None:
    fields = vars(self)  # CoLA declares that these are no leaves, so that nothing is to be recorded
    fields.update(dtype=dtype, shape=shape)
    names = _libraries(self) or _library_of_owner(matmat) or _libraries_of_members(self)
    library = next((n for n in ("torch", "jax", "numpy") if n in names), None)
    fields["xnp"] = functions_of(library or _guessed_library(dtype))
    if matmat is not None:
        self._matmat = matmat
    fields["annotations"] = set(get_annotations(self)) | set(annotations)
    if self.device is None:
        fields["device"] = self.xnp.get_default_device()


_setattr = LinearOperator.__setattr__


def _operator_setattr(self: Any, name: str, value: Any) -> None:
    dynamic = type(self)._dynamic
    if name in dynamic:
        object.__setattr__(self, name, value)
    else:
        _setattr(self, name, value)  # which records whether it is a leaf
    # Some classes of CoLA set their arrays after LinearOperator.__init__, which then had only the dtype to guess from.
    if dynamic[name] and "xnp" in vars(self) and self.xnp is not np_fns and _libraries(self) == {"numpy"}:
        vars(self).update(xnp=np_fns, device=None)


def _permutation_init(self: Any, perm: Any, dtype: Any = None) -> None:
    self.perm = perm
    dtype = functions_of(backend_of(perm)).float32 if dtype is None else dtype
    LinearOperator.__init__(self, dtype=dtype, shape=(len(perm), len(perm)))


def _kron_sum(A: Array, B: Array) -> Array:
    xnp = functions_of(backend_of(A))
    eyes = [xnp.eye(M.shape[0], M.shape[0], dtype=M.dtype, device=device_of(M)) for M in (A, B)]
    return xnp.kron(A, eyes[1]) + xnp.kron(eyes[0], B)


# -- scaling -------------------------------------------------------------------------------------------------------


def as_scalar(A: LinearOperator, c: Any) -> tuple[Any, Any]:
    """Check ``c``, and return it with the dtype of c * A."""
    if isinstance(c, LinearOperator):
        raise TypeError("operators are multiplied with @, not *")
    if is_array(c):
        if int(np.prod(tuple(c.shape))) != 1:
            raise ValueError(f"an operator is scaled by one number, got an array of shape {tuple(c.shape)}")
        library = library_of(A.xnp)
        if backend_of(c) not in (library, "numpy") and (backend_of(c), library) != ("jax", "numpy"):
            raise TypeError(f"cannot scale a {library} operator by a {backend_of(c)} array")
        c = c.reshape(())
        is_complex = "complex" in str(c.dtype)
    elif isinstance(c, Number):
        is_complex = isinstance(c, complex | np.complexfloating)
    else:
        raise TypeError(f"an operator is scaled by a number, got {type(c).__qualname__}")
    if is_complex and "complex" not in str(A.dtype):
        return c, A.xnp.promote_types(A.dtype, A.xnp.complex64)
    return c, A.dtype


def scalar_mul(A: LinearOperator, c: Any, dtype: Any, n: int) -> ScalarMul:
    S = object.__new__(ScalarMul)  # its constructor would guess the library, and warn where jax has no float64
    xnp, device = functions_of("jax") if is_array(c) and backend_of(c) == "jax" else A.xnp, A.device
    S.c = xnp.array(c, dtype=dtype, device=device)
    vars(S).update(xnp=xnp, dtype=dtype, shape=(n, n), device=device, annotations=set())
    return S


def _scaling_is_broken() -> bool:
    return implementation("mul", LinearOperator, object).__module__ == "cola.fns"


def _repair_scaling() -> None:
    @rule("mul")
    def scaled_operator(A: LinearOperator, c: object):
        c, dtype = as_scalar(A, c)
        return Product(scalar_mul(A, c, dtype, A.shape[-2]), A)

    @rule("mul")
    def scaled_identity(A: Identity, c: object):
        c, dtype = as_scalar(A, c)
        return scalar_mul(A, c, dtype, A.shape[-2])

    @rule("mul")
    def scaled_scalar(A: ScalarMul, c: object):
        c, dtype = as_scalar(A, c)
        return scalar_mul(A, A.c * c, dtype, A.shape[-2])

    for name in ("inv", "pinv"):
        rule(name, types=(ScalarMul, Algorithm))(lambda A, alg: scalar_mul(A, 1 / A.c, A.dtype, A.shape[-2]))


# -- subtract ------------------------------------------------------------------------------------------------------


def _rsub(self: LinearOperator, other: Any) -> Any:
    """Return ``other - self``."""
    return (-self).__add__(other)


# -- concat --------------------------------------------------------------------------------------------------------


def _concat_init(self: Any, *Ms: Any, axis: int = 0) -> None:
    if axis not in (0, 1):
        raise ValueError(f"operators are concatenated along axis 0 or 1, got {axis}")
    self.Ms = tuple(lazify(M) for M in Ms)
    self.axis = axis
    if len({M.shape[1 - axis] for M in self.Ms}) != 1:
        shapes = ", ".join(str(tuple(M.shape)) for M in self.Ms)
        raise ValueError(f"operators concatenated along axis {axis} must agree in axis {1 - axis}, got {shapes}")
    shape = list(self.Ms[0].shape)
    shape[axis] = sum(M.shape[axis] for M in self.Ms)
    dtype = reduce(self.Ms[0].xnp.promote_types, (M.dtype for M in self.Ms))
    LinearOperator.__init__(self, dtype, tuple(shape))
    self.device = self.Ms[0].device


def _parts(Ms: Any, axis: int) -> list[slice]:
    ends = np.cumsum([M.shape[axis] for M in Ms]).tolist()
    return [slice(end - M.shape[axis], end) for M, end in zip(Ms, ends, strict=True)]


def _concat_columns(self: Any, X: Array) -> Array:
    if self.axis == 0:
        return self.xnp.concat([M @ X for M in self.Ms], axis=0)
    return sum(M @ X[part] for M, part in zip(self.Ms, _parts(self.Ms, 1), strict=True))


def _concat_rows(self: Any, X: Array) -> Array:
    if self.axis == 1:
        return self.xnp.concat([X @ M for M in self.Ms], axis=1)
    return sum(X[:, part] @ M for M, part in zip(self.Ms, _parts(self.Ms, 0), strict=True))


# -- rows: X @ A for X of shape (k, d_out) -------------------------------------------------------------------------


def _on_axis(xnp: Any, X: Array, axis: int, M: LinearOperator) -> Array:
    """Multiply axis ``axis`` of X by M from the right."""
    X = xnp.moveaxis(X, axis, -1)
    lead = tuple(X.shape[:-1])
    X = (X.reshape(int(np.prod(lead)), M.shape[0]) @ M).reshape(*lead, M.shape[1])
    return xnp.moveaxis(X, -1, axis)


def _kronecker_rows(self: Any, X: Array) -> Array:
    Y = X.reshape(X.shape[0], *(M.shape[0] for M in self.Ms))
    for axis, M in enumerate(self.Ms, start=1):
        Y = _on_axis(self.xnp, Y, axis, M)
    return Y.reshape(X.shape[0], self.shape[1])


def _kron_sum_rows(self: Any, X: Array) -> Array:
    Y = X.reshape(X.shape[0], *(M.shape[0] for M in self.Ms))
    terms = [_on_axis(self.xnp, Y, axis, M) for axis, M in enumerate(self.Ms, start=1)]
    return sum(terms[1:], start=terms[0]).reshape(X.shape[0], self.shape[1])


def _block_diagonal_rows(self: Any, X: Array) -> Array:
    blocks = [M for M, count in zip(self.Ms, self.multiplicities, strict=True) for _ in range(count)]
    parts = zip(blocks, _parts(blocks, 0), strict=True)
    return self.xnp.concat([X[:, part] @ M for M, part in parts], axis=1)


def _permutation_rows(self: Any, X: Array) -> Array:
    return X[:, self.xnp.argsort(self.perm)]


def _tridiagonal_rows(self: Any, X: Array) -> Array:
    return Tridiagonal(self.gamma, self.beta, self.alpha)._matmat(X.T).T


def _householder_rows(self: Any, X: Array) -> Array:
    v = self.vec[:, 0]  # A = I - beta v v^H
    return X - self.beta * self.xnp.sum(X * v, axis=-1, keepdims=True) * self.xnp.conj(v)


_ROWS = {
    Kronecker: _kronecker_rows,
    KronSum: _kron_sum_rows,
    BlockDiag: _block_diagonal_rows,
    Identity: lambda self, X: X,
    ScalarMul: lambda self, X: self.c * X,
    Permutation: _permutation_rows,
    Tridiagonal: _tridiagonal_rows,
    Householder: _householder_rows,
}


def _rows_are_broken() -> bool:
    return any(cls._rmatmat is LinearOperator._rmatmat for cls in _ROWS)


def _repair_rows() -> None:
    for cls, rows in _ROWS.items():
        if cls._rmatmat is LinearOperator._rmatmat:
            cls._rmatmat = rows


# -- clip ----------------------------------------------------------------------------------------------------------


def _clip(array: Array, a_min: Any = None, a_max: Any = None) -> Array:
    return sys.modules["jax"].numpy.clip(array, a_min, a_max)


def _clip_is_broken() -> bool:
    return "a_min" not in inspect.signature(functions_of("jax").clip).parameters


# -- devices -----------------------------------------------------------------------------------------------------------


def _default_device() -> Any:
    jax = sys.modules["jax"]
    chosen = jax.config.jax_default_device  # a device, the name of a platform, or None
    return jax.devices(chosen)[0] if chosen is None or isinstance(chosen, str) else chosen


# -- views: ``torch.kron`` raises where its second argument is no contiguous array -----------------------------------


def _kron(a: Array, b: Array) -> Array:
    return sys.modules["torch"].kron(a.contiguous(), b.contiguous())


# -- moveaxis: ``torch.vmap`` has a rule for ``movedim`` and none for ``moveaxis`` -------------------------------------


def _moveaxis(a: Array, source: Any, destination: Any) -> Array:
    return a.movedim(source, destination)


# -- in_place: a Kronecker sum adds its terms to ``0 * x``, which may lack their dtype and the axes of ``torch.vmap`` --


def _kron_sum_columns(self: Any, X: Array) -> Array:
    Y = X.reshape(*(M.shape[1] for M in self.Ms), X.shape[1])
    terms = []
    for axis, M in enumerate(self.Ms):
        front = self.xnp.moveaxis(Y, axis, 0)
        term = (M @ front.reshape(M.shape[1], -1)).reshape(M.shape[0], *front.shape[1:])
        terms.append(self.xnp.moveaxis(term, 0, axis))
    return sum(terms[1:], start=terms[0]).reshape(self.shape[0], X.shape[1])


# -- like: ``I_like(A)`` ends with ``to``, and has another library than a NumPy operator then -------------------------


def _identity_to(self: Identity, device: Any) -> Identity:
    self.device = device
    if device is None:
        self.xnp = np_fns
    return self


COMPOSING = (
    Repair("any", _any_is_broken, _repair_any),
    Repair("overlap", lambda: is_ambiguous("dot", LinearOperator, Identity), _repair_overlap),
    replacing(
        "library",
        (operator_base, "is_array", is_array),
        (operator_base, "find_device", _find_device),
        (LinearOperator, "__init__", _operator_init),
        (LinearOperator, "__setattr__", _operator_setattr),
        (operators, "kronsum", _kron_sum),
        (Permutation, "__init__", _permutation_init),  # asked jax about the dtype of the index, which warned
    ),
    Repair("scaling", lambda: is_original(implementation("mul", LinearOperator, object)), _repair_scaling),
    replacing("subtract", (LinearOperator, "__rsub__", _rsub), broken=lambda: not hasattr(LinearOperator, "__rsub__")),
    SLICING,
    replacing(
        "concat",
        (Concatenated, "__init__", _concat_init),
        (Concatenated, "_matmat", _concat_columns),
        (Concatenated, "_rmatmat", _concat_rows),
    ),
    Repair("rows", _rows_are_broken, _repair_rows),
    in_library("clip", "jax", "clip", _clip, _clip_is_broken),
    PICKLING,
    in_library("devices", "jax", "get_default_device", _default_device),
    in_library("views", "torch", "kron", _kron),
    in_library("moveaxis", "torch", "moveaxis", _moveaxis),
    replacing("in_place", (KronSum, "_matmat", _kron_sum_columns)),
    STACKS,
    replacing("like", (Identity, "to", _identity_to)),
)
