"""Figure 4, ViT: error against compute on CIFAR-100 for six structures.

Command:   structlin sweep cifar-vit --data path/to/cifar-100-binary
Time:      33 runs of 200 epochs, 4.3e16 training MACs: about ten hours on one A100, the widest runs most.
Paper:     training error ~ compute^-alpha with alpha: dense 0.107, Block Tensor-Train 0.145, Monarch (4 blocks) 0.108,
           low rank 0.099, Kronecker 0.053, Tensor-Train 0.062.
Result:    ``batch_error`` of the last evaluation against ``forward_macs`` of the header.

The widths are chosen here, so that the structures overlap in compute; the paper's are not stated.
"""

from structlin_nn.sweeps import Sweep, grid, merge

WIDTHS = {
    "dense": (32, 64, 128, 256, 512),
    "kronecker": (64, 128, 256, 512, 1024, 2048),
    "low_rank": (64, 128, 256, 512, 1024),
    "block_tensor_train": (64, 128, 256, 512, 1024, 2048),
    "monarch": (64, 128, 256, 512, 1024),
    "tensor_train": (32, 64, 128, 256, 512, 1024),
}

SWEEP = Sweep(
    name="cifar-vit",
    about="figure 4: error against compute for ViTs on CIFAR-100, six structures",
    model="cifar-vit",
    base={"data_set": "cifar100"},
    data="CIFAR-100",
    overlays=[run for name, widths in WIDTHS.items() for run in merge([{"structure": name}], grid(width=widths))],
)
