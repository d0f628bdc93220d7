"""The experiments of *Compute Better Spent* (Qiu et al., ICML 2024), one file each.

Each file states the command of its runs, their time, and the result of the paper; ``SWEEP`` is the description
(`structlin_nn.sweeps.Sweep`), and ``structlin sweep --list`` lists them all. Times are estimates, not
measurements: the counted training MACs at 30 % of an A100's peak (float32 for CIFAR, bfloat16 for the others), and a
few milliseconds for each step of a small model. These files hold no result of this package.
"""
