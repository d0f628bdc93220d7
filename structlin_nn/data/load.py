"""One entry to the image data: `load_images`."""

import os
from pathlib import Path

from structlin_nn.data.cifar import load_cifar10, load_cifar100
from structlin_nn.data.embedded import load_fashion
from structlin_nn.data.hub import is_saved
from structlin_nn.data.images import ImageDataset

__all__ = ["DATASETS", "load_images"]

# Name -> environment variable that gives the place of the files where no root is passed.
_ROOTS = {"cifar10": "STRUCTLIN_CIFAR10", "cifar100": "STRUCTLIN_CIFAR100", "fashion": None}

DATASETS = tuple(_ROOTS)
"""The names that `load_images` knows."""


def load_images(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    labels: str | None = None,
    verify: bool = True,
) -> ImageDataset:
    """Load an image data set into memory.

    Args:
        name: ``"cifar10"`` or ``"cifar100"`` from their standard files, or ``"fashion"``, the class-balanced
            subset of Fashion-MNIST that is part of this package.
        root: where the CIFAR files are: the folder or archive itself or the folder that holds it (see
            `structlin_nn.data.cifar`); or, from Hugging Face `datasets`, a folder that it saved, or ``hf:`` and a
            name on the hub, such as ``hf:uoft-cs/cifar10`` (see `structlin_nn.data.cifar_hub`). Without it, the
            environment variable ``STRUCTLIN_CIFAR10`` or ``STRUCTLIN_CIFAR100`` is read. Embedded data take none.
        labels: ``"fine"`` (100 classes, the default) or ``"coarse"`` (20 classes) of CIFAR-100. Other data
            sets have one kind of label and take none.
        verify: compare the md5 sums of CIFAR files with those of the official ones. Embedded data are
            always verified.

    Returns:
        The data set, images as uint8 (N, C, H, W).

    Raises:
        FileNotFoundError: no files at ``root``, or no root at all.
        ImportError: Hugging Face data without `datasets` installed.
        ValueError: an unknown name, an option that the data set does not have, damaged or different files.

    Example:
        >>> data = load_images("fashion")
        >>> data.train_images.shape, data.train_labels.shape, data.num_classes
        ((10000, 1, 28, 28), (10000,), 10)
    """
    if name not in _ROOTS:
        raise ValueError(f"unknown image data {name!r}; known: {', '.join(DATASETS)}")
    if labels is not None and name != "cifar100":
        raise ValueError(f"labels={labels!r} is an option of cifar100; {name} has one kind of label")
    variable = _ROOTS[name]
    if variable is None:
        if root is not None:
            raise ValueError(f"{name} is embedded in the package and takes no root, got {os.fspath(root)!r}")
        if not verify:
            raise ValueError(f"{name} is embedded in the package and always verified; leave out verify=False")
        return load_fashion()
    if root is None:
        root = os.environ.get(variable)
        if not root:
            raise FileNotFoundError(
                f"no place given for {name}: pass root= or set the environment variable {variable} to the "
                "folder that holds the files from https://www.cs.toronto.edu/~kriz/cifar.html; "
                f"`structlin prepare {name} --out DIR` downloads them "
                '(the embedded data "fashion" need no files)'
            )
    hub = os.fspath(root).removeprefix("hf:")
    if hub != os.fspath(root) or is_saved(hub):
        from structlin_nn.data.cifar_hub import load_cifar_hub

        return load_cifar_hub(name, hub, labels="fine" if labels is None else labels, verify=verify)
    if name == "cifar10":
        return load_cifar10(Path(root), verify=verify)
    return load_cifar100(Path(root), labels="fine" if labels is None else labels, verify=verify)
