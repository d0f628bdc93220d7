"""Sweeps: many training runs from one description, on this machine or a cluster.

`Sweep` says what to run, `structlin_nn.sweeps.local` runs it here, `structlin_nn.sweeps.commands` prints it for a
scheduler. The sweeps of the paper are in `structlin_nn.configs`.
"""

from structlin_nn.sweeps.sweep import Sweep, find, grid, merge, names, zipped

__all__ = ["Sweep", "find", "grid", "merge", "names", "zipped"]
