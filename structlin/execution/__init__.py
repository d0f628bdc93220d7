"""Execution of chains of einsums, and the choice between ways to run them.

A :class:`structlin.Structure` is data, and this package runs it. A way is a module that runs chains for some libraries,
devices and dtypes. One way is chosen for each chain, dtype, number of tokens and number of threads.

- :mod:`.products`: one batched product for each step, on any library and device;
- :mod:`.token_major`, :mod:`.chunked`: batched products in other orders of axes, in torch;
- :mod:`.compiled`: a whole pass as machine code, on x86-64, in torch and jax;
- :mod:`.choice`: the interface of ways, and the choice;
- :mod:`.rates`, :mod:`.machine`: measured rates and properties of the machine, for estimates;
- :mod:`.tuning`, :mod:`.race`, :mod:`.wisdom`: timings, and their records on disk.
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
