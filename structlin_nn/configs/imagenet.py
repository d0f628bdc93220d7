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

from structlin_nn.sweeps import Sweep, grid, merge


def _btt(rank: int) -> list[dict[str, object]]:
    return [{"structure": "block_tensor_train", "options": {"rank": rank, "factorization": "greedy"}}]


def _monarch(blocks: int) -> list[dict[str, object]]:
    return [{"structure": "monarch", "options": {"blocks": blocks}}]


SWEEP = Sweep(
    name="imagenet",
    about="figure 6: validation error of ViT/32 on ImageNet against compute",
    model="imagenet-vit",
    data="ImageNet",
    base={"base_expansion": 1},  # as the paper's code
    overlays=[
        *merge([{"structure": "dense"}], grid(width=(80, 192, 384))),
        *merge(_btt(1), grid(width=(256, 784, 1936))),
        *merge(_btt(2), grid(width=(144, 484, 1296))),
        *merge(_monarch(4), grid(width=(140, 316, 632))),
        *merge(_monarch(16), grid(width=(632, 1264))),
    ],
)
