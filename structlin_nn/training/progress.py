"""Where a training run reports how far it is."""

from __future__ import annotations

import sys
from typing import Protocol

from tqdm import tqdm  # type: ignore[import-untyped]

__all__ = ["Bar", "Progress", "Silent"]


class Progress(Protocol):
    """What a training run calls while it goes on."""

    def start(self, total: int, done: int, label: str) -> None:
        """The run begins: `total` images are to be trained on, `done` of them were before an interruption."""

    def update(self, images: int, loss: float | None) -> None:
        """Trained on so many more images; `loss` of the last batch, None where it was not fetched."""

    def say(self, text: str) -> None:
        """A line for the reader."""

    def close(self) -> None:
        """The run is over, finished or not."""


class Silent:
    """Reports nothing."""

    def start(self, total: int, done: int, label: str) -> None: ...

    def update(self, images: int, loss: float | None) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class Bar:
    """A bar on stderr with loss, images per second and the time that is left."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def start(self, total: int, done: int, label: str) -> None:
        # Where stderr is a file, each refresh is a line: a few will do.
        interval = 0.2 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=total, initial=done, desc=label, unit="img", unit_scale=True, dynamic_ncols=True, mininterval=interval
        )

    def update(self, images: int, loss: float | None) -> None:
        assert self._bar is not None
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update(images)

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
