"""Ways to run a chain of einsums."""

from structlin.execution._run import EXECUTOR
from structlin.structure import _executors

_executors[:] = [EXECUTOR]
