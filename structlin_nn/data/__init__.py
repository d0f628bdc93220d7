"""Image data for training: loading (`load_images`), batches (`Batches`) and augmentation.

`structlin_nn.data.augment` works on torch tensors and is imported by its own name, so that loading data
does not import torch.
"""

from structlin_nn.data.batches import Batches, epoch_order
from structlin_nn.data.images import ImageDataset, channel_statistics
from structlin_nn.data.load import DATASETS, load_images

__all__ = ["DATASETS", "Batches", "ImageDataset", "channel_statistics", "epoch_order", "load_images"]
