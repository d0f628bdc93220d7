"""Figure 2a: how much a step changes the last hidden features, by width, structure-aware and naive.

Command:   structlin sweep delta-h --data path/to/cifar-10-batches-bin
           structlin sweep delta-h --data path/to/cifar-10-batches-bin --only '*-w16*' --only '*-w64*' --only '*-w256*'
Time:      45 runs, 6.0e14 training MACs, half as much again for the measurements. Widths 16 to 256 (5e12 MACs): less
           than an hour on two CPU cores; the structured networks of width 1024 (1.3e13): 15 minutes on one core, the
           dense one (2.9e13): 18; all: about half an hour on one A100, where the small runs wait for launches.
Paper:     mean RMS change of the last hidden features per step over 500 steps, read off by eye at widths 16 and 4096:
           dense 0.093 and 0.10; Block Tensor-Train aware 0.105 and 0.13, naive 0.026 and 0.004; Kronecker aware 0.052
           and 0.073, naive 0.017 and 0.003; Monarch (16 blocks) aware 0.105 and 0.135, naive 0.010 and 0.010; low rank
           aware 0.067 and 0.078, naive 0.05 and 0.05. Aware stays flat, as dense does; naive does not.
Result:    ``statistics.feature_change`` of the last evaluation in each record.

The paper states a bias-free MLP with two blocks, Adam at 3e-3 and batches of 1024. What it leaves open is chosen
here: the cosine to 0 of its recipe (a constant rate doubles the mean change), and no augmentation, mixup or label
smoothing.
"""

from structlin_nn.sweeps import Sweep, grid, merge

WIDTHS = (16, 64, 256, 1024, 4096)
STRUCTURES = (
    {"structure": "block_tensor_train", "options": {"rank": 1, "factorization": "greedy"}},
    {"structure": "kronecker", "options": {"factorization": "greedy"}},
    {"structure": "monarch", "options": {"blocks": 16}},
    {"structure": "low_rank"},
)

SWEEP = Sweep(
    name="delta-h",
    about="figure 2a: change of the last hidden features per step, by width and learning-rate rule",
    model="cifar-mlp",
    base={
        "data_set": "cifar10",
        "depth": 2,
        "bias": False,
        "batch_size": 1024,
        "epochs": 11,
        "steps": 500,
        "lr": 3e-3,
        "augment": False,
        "mixup": 0.0,
        "label_smoothing": 0.0,
        "measure_every": 1,
        "eval_every": 11,
    },
    overlays=[
        *merge([{"structure": "dense"}], grid(width=WIDTHS)),
        *merge(STRUCTURES, grid(width=WIDTHS, structure_aware=(True, False))),
    ],
)
