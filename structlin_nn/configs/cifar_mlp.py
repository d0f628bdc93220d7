"""Figure 4, MLP: error against compute on CIFAR-10 for six structures.

Command:   structlin sweep cifar-mlp --data path/to/cifar-10-batches-bin
           CIFAR-100: --data path/to/cifar-100-binary --set data_set=cifar100
Small:     benchmarks/sweeps/cifar_mlp_short.py: 42 runs of 4 epochs, half an hour on one CPU core.
Time:      42 runs of 500 epochs, 3.6e16 training MACs: about five hours on one A100, the widest Tensor-Trains most.
Paper:     training error ~ compute^-alpha with alpha on CIFAR-10 / CIFAR-100: dense 0.104 / 0.126, Block Tensor-Train
           0.119 / 0.157, Monarch (4 blocks) 0.095 / 0.128, low rank 0.095 / 0.134, Kronecker 0.037 / 0.039,
           Tensor-Train 0.050 / 0.057.
Result:    ``batch_error`` of the last evaluation against ``forward_macs`` of the header.
"""

from structlin_nn.sweeps import Sweep, grid, merge

WIDTHS = {
    "dense": (32, 64, 128, 256, 512, 1024),
    "kronecker": (128, 256, 512, 1024, 2048, 4096, 8192),
    "low_rank": (128, 256, 512, 1024, 2048, 4096),
    "block_tensor_train": (128, 256, 512, 1024, 2048, 4096, 8192),
    "monarch": (44, 89, 179, 358, 704, 1408, 2880),
    "tensor_train": (16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
}

SWEEP = Sweep(
    name="cifar-mlp",
    about="figure 4: error against compute for MLPs on CIFAR-10 (or CIFAR-100), six structures",
    model="cifar-mlp",
    base={"data_set": "cifar10"},
    overlays=[run for name, widths in WIDTHS.items() for run in merge([{"structure": name}], grid(width=widths))],
)
