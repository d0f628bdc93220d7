"""How chains of einsums are run, and how the way is chosen.

A :class:`structlin.Structure` is data. This package runs it: a way is a module that can run chains for some library,
device and dtypes, and one of the ways is chosen for each chain, dtype, number of tokens and threads.

- :mod:`.products`: one batched product for each step; any library and device,
- :mod:`.token_major`, :mod:`.chunked`: the same in other orders of axes, in torch,
- :mod:`.compiled`: a whole pass as machine code, on x86-64, in torch and jax,
- :mod:`.choice`: the interface of ways, and the choice; :mod:`.rates`, :mod:`.machine`: what estimates are made from;
  :mod:`.tuning`, :mod:`.wisdom`: timings, and where they are kept.
"""

from structlin.execution._run import EXECUTOR
from structlin.execution.choice import Problem, Way, decisions, pin, recording, register, using
from structlin.execution.tuning import clear_wisdom, explain, import_wisdom, measure, problem_of, tune
from structlin.execution.wisdom import export_wisdom
from structlin.execution.wisdom import folder as wisdom_folder
from structlin.structure import _executors

__all__ = [
    "Problem",
    "Way",
    "clear_wisdom",
    "decisions",
    "explain",
    "export_wisdom",
    "import_wisdom",
    "measure",
    "pin",
    "problem_of",
    "recording",
    "register",
    "tune",
    "using",
    "wisdom_folder",
]

_executors[:] = [EXECUTOR]
