"""Where a training run reports how far it is."""

from __future__ import annotations

import sys
from typing import Protocol

from tqdm import tqdm  # type: ignore[import-untyped]

__all__ = ["Bar", "Progress", "Silent"]


class Progress(Protocol):
    """What a training run calls while it goes on."""

    def start(self, total: int, done: int, label: str) -> None:
        """The run begins: `total` samples are to be trained on, `done` of them were before an interruption."""

    def update(self, images: int, loss: float | None) -> None:
        """Trained on so many more samples; `loss` of the last batch, None where it was not fetched."""

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
    """A bar on stderr with loss, samples per second, the time that is left, and model FLOP/s.

    Args:
        unit: what a sample is called.
        flops: of the forward and backward pass of one sample, 0 where they are not to be shown.
        peak: the most FLOP/s that the devices can do together; the share of it that is reached (model-FLOP
            utilisation, MFU) is shown where it is known.
    """

    def __init__(self, unit: str = "img", flops: int = 0, peak: float | None = None) -> None:
        self.unit, self.flops, self.peak = unit, flops, peak
        self._bar: tqdm | None = None

    def start(self, total: int, done: int, label: str) -> None:
        # Where stderr is a file, each refresh is a line: a few will do.
        interval = 0.2 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=total, initial=done, desc=label, unit=self.unit, unit_scale=True, dynamic_ncols=True,
            mininterval=interval,
        )  # fmt: skip

    def update(self, images: int, loss: float | None) -> None:
        assert self._bar is not None
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}{self._speed()}", refresh=False)
        self._bar.update(images)

    def _speed(self) -> str:
        assert self._bar is not None
        done, seconds = self._bar.n - self._bar.initial, self._bar.format_dict["elapsed"]
        if not self.flops or not done or not seconds:
            return ""
        rate = self.flops * done / seconds
        unit, scale = ("TFLOP/s", 1e12) if rate >= 1e11 else ("GFLOP/s", 1e9)
        share = "" if self.peak is None else f", MFU {100 * rate / self.peak:.1f} %"
        return f", {rate / scale:.3g} {unit}{share}"

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
