"""Sweeps: many training runs from one description, on this machine or a cluster.

`Sweep` describes the runs. `structlin_nn.sweeps.local` trains them on this machine, `structlin_nn.sweeps.submit` on a
cluster. The sweeps of the paper are in `structlin_nn.configs`.
"""

from structlin_nn.sweeps.sweep import Sweep, find, grid, merge, names, zipped

__all__ = ["Sweep", "find", "grid", "merge", "names", "zipped"]
