"""The register of named structures.

A named structure is one class in one file. The class derives from :class:`NamedOperator`, has a ``design`` function
from sizes to a structure, and is registered under a name. Layers, counts, scale rules, the command line and the
conformance tests (:mod:`structlin.testing`) use the register. Other packages register structures in the same way:

>>> from structlin import NamedOperator, Structure, register, unregister
>>> @register("sandwich")
... class Sandwich(NamedOperator):
...     formula = "i,ri->r; r,sr->s; s,os->o"
...     parameters = "r (d_in + s) + s d_out"
...     examples = (((5, 7), {"r": 2, "s": 3}),)
...
...     @staticmethod
...     def design(shape, *, r=1, s=1):
...         return Structure.parse(Sandwich.formula, i=shape[1], r=r, s=s, o=shape[0])
>>> Sandwich.random((5, 7), r=2, s=3).shape
(5, 7)
>>> unregister("sandwich")
"""

from __future__ import annotations

import inspect
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from structlin._arrays import Array
from structlin.operators import StructuredOperator
from structlin.scale import random_factors
from structlin.structure import AbstractStructure, Structure

Example = tuple[tuple[int, int], Mapping[str, Any]]


class NamedOperator(StructuredOperator):
    """Base of the named structures, with constructors from arrays, from sizes alone and at random.

    A subclass implements ``design`` and sets these attributes:

    - ``formula``: the chain, or the definition of the entries if the structure is not a chain;
    - ``parameters``: a formula of the number of parameters;
    - ``source``: a reference, or ``-``;
    - ``examples``: pairs of shape and options on which the conformance tests run.

    By default the constructor reads the sizes of the axes in ``formula`` off the shapes of the factors. A subclass for
    which this does not work overrides ``_infer``.

    Parameters
    ----------
    *factors
        The arrays of the structure, in the order in which they are applied.
    """

    name: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    parameters: ClassVar[str] = ""
    source: ClassVar[str] = ""
    examples: ClassVar[tuple[Example, ...]] = ()

    def __init__(self, *factors: Array) -> None:
        shapes = tuple([tuple(f.shape if hasattr(f, "shape") else np.shape(f)) for f in factors])
        super().__init__(inferred(type(self), shapes), factors)  # type: ignore[arg-type]

    @staticmethod
    @abstractmethod
    def design(shape: tuple[int, int], /) -> AbstractStructure:
        """Return the structure of a matrix.

        Parameters
        ----------
        shape
            Shape ``(d_out, d_in)`` of the matrix. The options of a subclass are keyword-only parameters.

        Returns
        -------
        AbstractStructure
            The structure, without arrays.
        """

    @classmethod
    def exact_rank(cls, shape: tuple[int, int], **options: Any) -> int | tuple[int, ...] | None:
        """Return the smallest ``rank`` at which every (d_out, d_in) matrix is represented.

        Parameters
        ----------
        shape
            Shape ``(d_out, d_in)`` of the matrix.
        **options
            Options of ``design`` other than the rank.

        Returns
        -------
        int or tuple of int or None
            The rank, or one rank for each pair of neighbouring cores; None if not known.
        """
        return None

    @classmethod
    def _infer(cls, *shapes: tuple[int, ...]) -> AbstractStructure:
        return infer_from_chain(cls.__name__, cls.formula, shapes)

    @classmethod
    def random(
        cls, shape: tuple[int, int], *, seed: int | np.random.Generator | None = None, backend: str = "numpy",
        dtype: Any = None, device: Any = None, rule: str = "paper", zero_last: bool = False, **options: Any,
    ) -> Self:  # fmt: skip
        """Return a random matrix with the spectral scale.

        Parameters
        ----------
        shape
            Shape ``(d_out, d_in)`` of the matrix.
        seed, backend, dtype, device, rule, zero_last
            As for :func:`structlin.random_factors`.
        **options
            Options of ``design``.

        Returns
        -------
        NamedOperator
            An operator of this class.

        Raises
        ------
        ValueError
            If ``design`` does not accept the sizes or options.

        Examples
        --------
        >>> from structlin import Monarch
        >>> Monarch.random((12, 8), blocks=2, seed=0).shape
        (12, 8)
        """
        structure = design(cls, shape, **options)
        factors = random_factors(
            structure, seed=seed, backend=backend, dtype=dtype, device=device, rule=rule, zero_last=zero_last
        )
        return cls._build(structure, factors, _declared(structure, dtype))


def _declared(structure: AbstractStructure, dtype: Any) -> Any:
    return None if any(f.trainable for f in structure.factors) else dtype


@lru_cache(maxsize=4096)
def inferred(cls: type[NamedOperator], shapes: tuple[tuple[int, ...], ...]) -> AbstractStructure:
    """Return the structure that ``cls`` reads off the shapes of its factors, from a cache."""
    return cls._infer(*shapes)


@lru_cache(maxsize=4096)
def infer_from_chain(name: str, chain: str, shapes: tuple[tuple[int, ...], ...]) -> Structure:
    """Return the chain with sizes read off the shapes of factors; ValueError if the shapes contradict it."""
    terms = [step.split("->")[0].split(",")[1].strip() for step in chain.split(";")]
    if len(terms) != len(shapes):
        raise ValueError(f"{name} takes {len(terms)} factors, one for each step of {chain!r}, got {len(shapes)}")
    sizes: dict[str, int] = {}
    for number, (term, shape) in enumerate(zip(terms, shapes, strict=True)):
        if len(term) != len(shape):
            raise ValueError(
                f"{name}: factor {number} must have {len(term)} axes {term!r} ({chain!r}), got shape {shape}"
            )
        for axis, size in zip(term, shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(
                    f"{name}: axis {axis!r} of {chain!r} has size {sizes[axis]} in an earlier factor "
                    f"and {size} in factor {number} of shape {shape}"
                )
    return Structure.parse(chain, sizes)


GROUP = "structlin.structures"
"""Group of entry points with which installed packages provide structures."""
_REGISTRY: dict[str, type[NamedOperator]] = {}
_installed_loaded = False
_T = TypeVar("_T", bound=type[NamedOperator])


def register(name: str) -> Callable[[_T], _T]:
    """Return a class decorator that registers a named structure.

    Parameters
    ----------
    name
        Name of the structure, an identifier.

    Returns
    -------
    Callable
        A decorator, which sets the attribute ``name`` and returns the class.

    Raises
    ------
    ValueError
        If the name is not an identifier, or another class has this name.
    TypeError
        If the class is not a subclass of :class:`NamedOperator`.

    Examples
    --------
    The documentation of this module registers a structure.
    """
    if not name.isidentifier():
        raise ValueError(f"the name of a structure must be an identifier, got {name!r}")

    def add(cls: _T) -> _T:
        if not (isinstance(cls, type) and issubclass(cls, NamedOperator)):
            raise TypeError(f"only subclasses of NamedOperator can be registered, got {cls!r}")
        before = _REGISTRY.get(name, cls)  # the same class is registered again if its module is run again
        if (before.__module__, before.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"a structure named {name!r} is already registered: {before.__module__}.{before.__qualname__}; "
                f"choose another name, or call unregister({name!r}) first"
            )
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def unregister(name: str) -> None:
    """Remove a named structure from the register.

    Parameters
    ----------
    name
        Name of the structure.

    Raises
    ------
    ValueError
        If there is no structure of this name.
    """
    structure_class(name)
    del _REGISTRY[name]


def _load_installed() -> None:
    """Import the entry points of installed packages, once; an import that fails gives a warning."""
    global _installed_loaded
    if _installed_loaded:
        return
    _installed_loaded = True
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # one broken package must not prevent the use of the others
            told = f"the structures of the entry point {point.value!r} cannot be loaded: {error!r}"
            warnings.warn(told, stacklevel=3)


def structure_names() -> tuple[str, ...]:
    """Return the names of all structures, including those of installed packages, in the order of registration.

    Returns
    -------
    tuple of str
        The names.

    Examples
    --------
    >>> structure_names()[:3]
    ('dense', 'low_rank', 'block_diagonal')
    """
    _load_installed()
    return tuple(_REGISTRY)


def structure_class(name: str) -> type[NamedOperator]:
    """Return the class of a structure from its name.

    Packages provide structures through the group of entry points ``structlin.structures``. Their modules are imported
    at the first unknown name or the first call of :func:`structure_names`.

    Parameters
    ----------
    name
        Name of the structure.

    Returns
    -------
    type
        A subclass of :class:`NamedOperator`.

    Raises
    ------
    ValueError
        If no structure has this name. The message lists the known names.

    Examples
    --------
    >>> structure_class("low_rank").__name__
    'LowRank'
    """
    if name not in _REGISTRY:
        _load_installed()
    if name not in _REGISTRY:
        raise ValueError(f"unknown structure {name!r}{_meant(name)}; one of {', '.join(_REGISTRY)}")
    return _REGISTRY[name]


def _meant(name: str) -> str:
    """Return a hint for a message if exactly one structure has these initials, as for ``btt``."""
    short = str(name).lower()
    found = [known for known in _REGISTRY if "".join(word[0] for word in known.split("_")) == short]
    return f" ({found[0]!r} has these initials)" if len(short) > 1 and len(found) == 1 else ""


def structure_options(structure: str | type[NamedOperator]) -> dict[str, Any]:
    """Return the options of a structure with their defaults.

    Parameters
    ----------
    structure
        Name of a registered structure, or a subclass of :class:`NamedOperator`.

    Returns
    -------
    dict
        Default of each option, by name.

    Raises
    ------
    ValueError
        If no structure has this name.

    Examples
    --------
    >>> structure_options("low_rank")
    {'rank': None, 'rank_fraction': None}
    """
    return _defaults(structure_class(structure) if isinstance(structure, str) else structure)


def _defaults(cls: type[NamedOperator]) -> dict[str, Any]:
    parameters = inspect.signature(cls.design).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def design(structure: str | type[NamedOperator], shape: tuple[int, int], **options: Any) -> AbstractStructure:
    """Return the structure of a matrix from its name, its sizes and its options.

    Parameters
    ----------
    structure
        Name of a registered structure, or a subclass of :class:`NamedOperator`.
    shape
        Shape ``(d_out, d_in)`` of the matrix.
    **options
        Options of the structure (:func:`structure_options`).

    Returns
    -------
    AbstractStructure
        The structure, without arrays.

    Raises
    ------
    ValueError
        If the name or an option is unknown, or the structure does not accept the sizes or options.

    Examples
    --------
    >>> design("block_tensor_train", (35, 6), factorization=((5, 7), (2, 3)), rank=2).macs
    270
    """
    cls = structure_class(structure) if isinstance(structure, str) else structure
    if len(shape) != 2 or any(isinstance(n, bool) or not hasattr(n, "__index__") or n < 1 for n in shape):
        raise ValueError(f"a shape is (d_out, d_in) with two positive integers, got {shape!r}")
    known = _defaults(cls)
    if unknown := [k for k in options if k not in known]:
        allowed = f"its options are {', '.join(known)}" if known else "it has none"
        raise ValueError(f"structure {cls.name!r} has no option {', '.join(map(repr, unknown))}; {allowed}")
    return cls.design((int(shape[0]), int(shape[1])), **options)
