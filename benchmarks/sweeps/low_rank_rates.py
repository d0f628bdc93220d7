"""Whether low rank would gain from the width at other rates: a check of `cifar_mlp_short.py`, with its recipe.

Command:   structlin sweep benchmarks/sweeps/low_rank_rates.py --data path/to/cifar-10-batches-bin --workers 1
Result:    ``train_error`` of the last evaluation.
"""

from structlin_nn.sweeps import Sweep, grid, merge

SWEEP = Sweep(
    name="low-rank-rates",
    about="low rank on CIFAR-10 for 4 epochs at three learning rates",
    model="cifar-mlp",
    base={
        "data_set": "cifar10",
        "epochs": 4,
        "eval_every": 4,
        "batch_size": 256,
        "augment": False,
        "mixup": 0.0,
        "label_smoothing": 0.0,
        "threads": 1,
    },
    overlays=merge([{"structure": "low_rank"}], grid(width=(128, 512, 1024), lr=(3e-3, 1.2e-2, 4.8e-2))),
)
