"""Batches in an order that depends on the seed and the epoch alone, and that can be resumed."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from structlin_nn.data._checks import natural

__all__ = ["Batches", "epoch_order"]


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation of ``range(size)`` that belongs to a seed and an epoch.

    It is the order of `size` random 64-bit integers from the counter-based generator Philox. NumPy keeps
    the raw stream of a bit generator fixed for ever (its distributions may change between releases), so
    the order is the same on every machine and with every release.

    Args:
        seed: non-negative integer.
        epoch: non-negative integer; any two epochs have independent orders.
        size: number of samples, non-negative.

    Returns:
        int64 array of shape (size,), a permutation.

    Raises:
        TypeError: an argument that is not an integer.
        ValueError: a negative argument.

    Example:
        >>> epoch_order(seed=0, epoch=0, size=5).tolist()
        [0, 3, 1, 2, 4]
        >>> epoch_order(seed=0, epoch=1, size=5).tolist()
        [3, 4, 2, 1, 0]
    """
    seed, epoch, size = natural("seed", seed), natural("epoch", epoch), natural("size", size)
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(size)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


class Batches:
    """Iterate over the batches of one epoch after the other, from a position that can be saved.

    ``for images, labels in batches`` gives the batches that are left of the current epoch and ends with it;
    the next such loop gives the next epoch. The position is that of the first batch not yet given out, so
    a state taken inside the loop body counts the batch at hand as done; with the last batch of an epoch it
    is the start of the next epoch. A loop that is left early is taken up again at its next batch.

    Args:
        images: anything with a length that can be indexed by an integer array: NumPy or torch (on any
            device; the batches are made there).
        labels: the same, with as many entries.
        batch_size: samples in a batch.
        seed: seed of the order, see `epoch_order`.
        drop_last: whether the incomplete batch at the end of an epoch is left out (True) or given (False).
            There is no default, because both choices change the result.
        shuffle: a new order in every epoch (True), or the order of the data (False), for evaluation.

    Attributes:
        epoch: the current epoch, from 0.
        position: the batches already given out in the current epoch.

    Raises:
        TypeError: a size or seed that is not an integer, a flag that is not a bool.
        ValueError: lengths that differ, no data, a batch size below 1, a negative seed, or ``drop_last`` with
            fewer samples than one batch.

    Example:
        >>> import numpy as np
        >>> batches = Batches(np.arange(5) * 10, np.arange(5), 2, seed=0, drop_last=False)
        >>> len(batches)
        3
        >>> [labels.tolist() for images, labels in batches]
        [[0, 3], [1, 2], [4]]
        >>> batches.epoch, batches.position
        (1, 0)
    """

    def __init__(
        self, images: Any, labels: Any, batch_size: int, *, seed: int, drop_last: bool, shuffle: bool = True
    ) -> None:
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images and {len(labels)} labels; their numbers must be equal")
        for name, flag in (("drop_last", drop_last), ("shuffle", shuffle)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r}")
        self.images = images
        self.labels = labels
        self.size = len(labels)
        self.batch_size = natural("batch_size", batch_size)
        self.seed = natural("seed", seed)
        self.drop_last = drop_last
        self.shuffle = shuffle
        self.epoch = 0
        self.position = 0
        self._order: tuple[int, np.ndarray] | None = None
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if self.size == 0:
            raise ValueError("there are no samples to make batches of")
        if len(self) == 0:
            raise ValueError(
                f"{self.size} samples are less than one batch of {self.batch_size}, and drop_last=True leaves none"
            )

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        whole, rest = divmod(self.size, self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def indices(self, epoch: int, position: int) -> np.ndarray:
        """The samples of one batch, whatever the current position: an int64 array, most often (batch_size,).

        Raises:
            TypeError: an argument that is not an integer.
            ValueError: a negative epoch, or a position outside ``range(len(self))``.
        """
        epoch, position = natural("epoch", epoch), natural("position", position)
        if position >= len(self):
            raise ValueError(f"position {position} is outside an epoch of {len(self)} batches")
        start = position * self.batch_size
        stop = min(start + self.batch_size, self.size)
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, self.size))
        return self._order[1][start:stop].copy()

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        epoch = self.epoch
        while self.epoch == epoch:
            chosen = self.indices(self.epoch, self.position)
            batch = _take(self.images, chosen), _take(self.labels, chosen)
            # Moved on before the batch is given out: a state saved in the loop body must not repeat it.
            self.position += 1
            if self.position == len(self):
                self.epoch, self.position = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, int | bool]:
        """Epoch, position and everything that decides the order; plain values, fit for JSON."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "size": self.size,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Continue from a state of `state_dict`; the batches that follow are the same, sample by sample.

        A loop that is running goes on from the new position, and ends if the epoch is another.

        Raises:
            TypeError: an epoch or position that is not an integer.
            ValueError: keys missing or unknown, another seed, size, batch size or flag than this object has
                (the order would silently be another), or a position outside the epoch.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(f"a state has the keys {sorted(own)}, got {sorted(state)}")
        differing = [k for k in own if k not in ("epoch", "position") and state[k] != own[k]]
        if differing:
            raise ValueError(
                "the state is of other batches: "
                + ", ".join(f"{k} is {own[k]} here and {state[k]} in the state" for k in differing)
            )
        epoch, position = natural("epoch", state["epoch"]), natural("position", state["position"])
        if position >= len(self):
            raise ValueError(f"position {position} is outside an epoch of {len(self)} batches")
        self.epoch, self.position = epoch, position


def _take(array: Any, chosen: np.ndarray) -> Any:
    if type(array).__module__.partition(".")[0] == "torch":
        import torch

        return array.index_select(0, torch.from_numpy(chosen).to(array.device))  # copies rows, faster than array[..]
    return array[chosen]
