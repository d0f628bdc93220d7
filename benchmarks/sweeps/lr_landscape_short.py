"""Figure 2b at small scale: the best learning rate by width, on one CPU core.

Command:   structlin sweep benchmarks/sweeps/lr_landscape_short.py --data path/to/cifar-10-batches-bin --workers 1
Differs from `structlin_nn.configs.lr_landscape` in widths of at most 1024 (dense: 256), 2 epochs for 20, batches of
256 for 1024, and no augmentation. Naive rates reach further up, since that is where their optimum is.
Result:    ``train_loss`` of the last evaluation.
"""

from structlin_nn.sweeps import Sweep, grid, merge


def _rates(lowest: int, highest: int) -> list[float]:
    """Return the rate of the recipe times powers of 2."""
    return [3e-3 * 2.0**power for power in range(lowest, highest + 1)]


BTT = {"structure": "block_tensor_train", "options": {"rank": 1, "factorization": "greedy"}}
WIDTHS = (16, 64, 128, 256, 1024)

SWEEP = Sweep(
    name="lr-landscape-short",
    about="figure 2b at small scale: training loss by learning rate and width, 2 epochs",
    model="cifar-mlp",
    base={
        "data_set": "cifar10",
        "epochs": 2,
        "eval_every": 2,
        "batch_size": 256,
        "augment": False,
        "mixup": 0.0,
        "label_smoothing": 0.0,
        "threads": 1,
    },
    overlays=[
        *merge([BTT], grid(width=WIDTHS, structure_aware=(True,), lr=_rates(0, 5))),
        *merge([BTT], grid(width=WIDTHS, structure_aware=(False,), lr=_rates(1, 7))),
        *merge([{"structure": "dense"}], grid(width=(32, 64, 128, 256), lr=_rates(0, 5))),
    ],
)
