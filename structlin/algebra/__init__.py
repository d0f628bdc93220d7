"""The algebra of chains: their one numbered form, what the roles of the axes say, and what follows from both.

Importing it makes the optional methods of :class:`structlin.structure.Structure` answer.
"""

from structlin import structure as _structure
from structlin.algebra import chains as _chains
from structlin.algebra import combinations as _combinations
from structlin.algebra.numbered import Network, build, network

_structure._algebras[:] = [_chains, _combinations]

__all__ = ["Network", "build", "network"]
