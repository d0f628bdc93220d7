"""Pickling and copying of CoLA's operators, which hold a module and whose classes are made on demand."""

from __future__ import annotations

from typing import Any

from cola.ops import LinearOperator

from structlin._cola_compat._repair import functions_of, library_of, replacing


def _encoded(kind: type) -> Any:
    """Return a class as one that can be looked up by name, and its type parameters, encoded likewise."""
    parameters = vars(kind).get("_type_parameter")
    if parameters is None:
        return kind
    several = isinstance(parameters, tuple)
    # The class that the parameters were given to is the next one in the order of resolution.
    return kind.__mro__[1], several, tuple(map(_encoded, parameters if several else (parameters,)))


def _decoded(code: Any) -> Any:
    if not isinstance(code, tuple):
        return code
    root, several, parameters = code
    found = tuple(map(_decoded, parameters))
    return root[found if several else found[0]]


def _reduce(self: Any) -> tuple[Any, ...]:
    state = dict(vars(self))
    library = library_of(state.pop("xnp")) if "xnp" in state else None
    if library == "jax":  # its devices cannot be pickled; arrays come back on the default one
        del state["device"]
    return _restored, (_encoded(type(self)), library), state


def _restored(code: Any, library: str | None) -> Any:
    made = object.__new__(_decoded(code))
    if library is not None:
        made.xnp = functions_of(library)
        if library == "jax":
            made.device = made.xnp.get_default_device()
    return made


def _set_state(self: Any, state: dict[str, Any]) -> None:
    for name, value in state.items():
        setattr(self, name, value)  # CoLA's own setter records which attributes are leaves


PICKLING = replacing(
    "pickling",
    (LinearOperator, "__reduce__", _reduce),
    (LinearOperator, "__setstate__", _set_state),
    broken=lambda: LinearOperator.__reduce__ is object.__reduce__,
)
