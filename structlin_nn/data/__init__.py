"""Data for training: images in memory, tokens of a text, ImageNet. Importing this loads NumPy alone.

`structlin_nn.data.augment` and `structlin_nn.data.imagenet` work on torch tensors and are imported by their own names.
"""

from structlin_nn.data.images import DATASETS, ImageDataset, batch_rows, channel_statistics, epoch_order, load_images
from structlin_nn.data.tokens import TokenData, evaluation_batches, open_tokens, token_batch

__all__ = [
    "DATASETS", "ImageDataset", "TokenData", "batch_rows", "channel_statistics", "epoch_order", "evaluation_batches",
    "load_images", "open_tokens", "token_batch",
]  # fmt: skip
