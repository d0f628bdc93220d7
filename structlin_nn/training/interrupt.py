"""SIGINT and SIGTERM as requests that a loop answers when it is ready to."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

__all__ = ["Interruption"]

SAME_SECONDS = 5.0
"""Signals that come sooner after the first are the same request: Ctrl-C reaches a process, and torchrun sends it on."""


class Interruption:
    """While the block lasts, the first SIGINT or SIGTERM is noted in `signal`; one `SAME_SECONDS` later acts as usual.

    Outside the main thread, where Python cannot handle signals, nothing is changed.

    Example:
        >>> import os
        >>> with Interruption() as interruption:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        >>> interruption.signal.name
        'SIGTERM'
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._first = 0.0

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._first = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._first > SAME_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
