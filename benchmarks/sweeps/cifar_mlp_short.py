"""Figure 4, MLP, at small scale: six structures on CIFAR-10, four epochs on one CPU core.

Command:   structlin sweep benchmarks/sweeps/cifar_mlp_short.py --data path/to/cifar-10-batches-bin --workers 1
Differs from the paper's recipe (`structlin_nn.configs.cifar_mlp`) in 4 epochs for 500, batches of 256 for 1024 (so
that there are 780 steps, not 192), and no augmentation, mixup or label smoothing, which few epochs do not need.
Result:    ``train_error`` of the last evaluation (the first 10,000 training images, without augmentation).
"""

from structlin_nn.sweeps import Sweep, grid, merge

WIDTHS = {
    "dense": (32, 64, 128, 256, 512),
    "low_rank": (128, 256, 512, 1024, 2048),
    "kronecker": (128, 256, 512, 1024, 2048),
    "monarch": (44, 89, 179, 358, 704),
    "tensor_train": (16, 32, 64, 128, 256),
    "block_tensor_train": (128, 256, 512, 1024, 2048),
}
TWICE = 2
"""Number of the narrowest widths of each structure that are trained with a second seed."""

SWEEP = Sweep(
    name="cifar-mlp-short",
    about="figure 4 at small scale: MLPs on CIFAR-10 for 4 epochs, six structures",
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
    overlays=[
        run
        for name, widths in WIDTHS.items()
        for run in merge(
            [{"structure": name}],
            [*grid(width=widths, seed=(0,)), *grid(width=widths[:TWICE], seed=(1,))],
        )
    ],
)
