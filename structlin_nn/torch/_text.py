"""Chains as strings, for the nodes of exported and compiled graphs.

A graph that is saved, or compiled in one process and run in another, cannot contain Python objects. So an operator of
torch takes the structure as JSON text and parses it.
"""

from __future__ import annotations

import json
from functools import lru_cache

from structlin.structure import Structure


@lru_cache(maxsize=4096)
def to_text(structure: Structure) -> str:
    """Return a chain as JSON text, which :func:`from_text` parses."""
    return json.dumps(
        {
            "chain": "; ".join(map(str, structure.steps)),
            "sizes": dict(structure.sizes),
            "d_in": structure.d_in,
            "d_out": structure.d_out,
        }
    )


@lru_cache(maxsize=4096)
def from_text(text: str) -> Structure:
    """Return the chain of a text of :func:`to_text`; ValueError for any other text."""
    try:
        content = json.loads(text)
        chain, sizes, d_in, d_out = (content[key] for key in ("chain", "sizes", "d_in", "d_out"))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{text!r} does not describe a chain of einsums: {error!r}") from error
    return Structure.parse(chain, sizes, d_in=d_in, d_out=d_out)
