"""The experiments of *Compute Better Spent* (Qiu et al., ICML 2024), one file each.

Every file says by which command its runs are made, how long they take, and what the paper found; ``SWEEP`` is the
description (`structlin_nn.sweeps.Sweep`), and ``structlin sweep --list`` names them all. Times are estimates, not
measurements: the counted training MACs at 30 % of an A100's peak (float32 for CIFAR, bfloat16 for the others), and a
few milliseconds for each step of a small model. Nothing in these files is a result of ours.
"""
