"""Figure 2b: the learning rate that is best, by width, structure-aware and naive.

Command:   structlin sweep lr-landscape --data path/to/cifar-10-batches-bin
Small:     benchmarks/sweeps/lr_landscape_short.py: 89 runs of 2 epochs, 20 minutes on one CPU core.
Time:      84 runs of 20 epochs, 9.6e15 training MACs: about an hour on one A100.
Paper:     with the structure-aware rule the best learning rate at base width stays the best at every width; with the
           naive rule it moves up with the width, and the loss at a given rate is worse the wider the network.
Result:    ``train_loss`` of the last evaluation in each record; runs whose loss is no longer finite are failed.
"""

from structlin_nn.sweeps import Sweep, grid, merge

WIDTHS = (64, 256, 1024, 4096)
RATES = tuple(3e-3 * 2.0**power for power in range(-3, 4))
BTT = {"structure": "block_tensor_train", "options": {"rank": 1, "factorization": "greedy"}}

SWEEP = Sweep(
    name="lr-landscape",
    about="figure 2b: training loss by learning rate and width, structure-aware and naive",
    model="cifar-mlp",
    base={"data_set": "cifar10", "epochs": 20, "eval_every": 20, "mixup": 0.0, "label_smoothing": 0.0},
    overlays=[
        *merge([{"structure": "dense"}], grid(width=WIDTHS, lr=RATES)),
        *merge([BTT], grid(width=WIDTHS, structure_aware=(True, False), lr=RATES)),
    ],
)
