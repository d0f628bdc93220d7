"""Figure 6: ViT/32 on ImageNet, dense against Block Tensor-Train and Monarch.

Command:   structlin sweep imagenet --data path/to/imagenet --set device=cuda --set precision=bfloat16 --workers 1
           on a cluster: --submit slurm --launcher 'torchrun --nproc-per-node 8 --no-python'
Time:      14 runs of 300 epochs, 8.8e18 training MACs: about two days of one A100, if the images are decoded as fast.
Paper:     top-1 validation error: dense 80: 50.9, 192: 32.6, 384: 28.6; Block Tensor-Train rank 1, 256: 43.1,
           784: 28.9, 1936: 25.6; rank 2, 144: 47.7, 484: 28.9, 1296: 24.8; Monarch 4 blocks, 140: 47.2, 316: 31.6,
           632: 27.8; 16 blocks, 632: 30.4, 1264: 26.9. Dense 384 at 1.15 GMACs equals rank 2 at 484 and 0.303 GMACs:
           3.8 times less compute at equal error.
Result:    ``val_error`` of the last evaluation.
"""

from structlin_nn.sweeps import Sweep

RUNS: tuple[tuple[str, dict[str, object], tuple[int, ...]], ...] = (
    ("dense", {}, (80, 192, 384)),
    ("block_tensor_train", {"rank": 1, "factorization": "greedy"}, (256, 784, 1936)),
    ("block_tensor_train", {"rank": 2, "factorization": "greedy"}, (144, 484, 1296)),
    ("monarch", {"blocks": 4}, (140, 316, 632)),
    ("monarch", {"blocks": 16}, (632, 1264)),
)

SWEEP = Sweep(
    name="imagenet",
    about="figure 6: validation error of ViT/32 on ImageNet against compute",
    model="imagenet-vit",
    data="ImageNet",
    base={"base_expansion": 1},  # as the paper's code
    overlays=[{"structure": name, "options": own, "width": w} for name, own, widths in RUNS for w in widths],
)
