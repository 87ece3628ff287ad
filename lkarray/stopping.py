"""Signals to stop, held back until what was done can be kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class _Terminated(BaseException):
    """SIGTERM arrived, which nothing else handles: the process ends by it once work is kept."""


class Signals:
    """Whether a signal to stop has arrived; see `held`.

    Attributes
    ----------
    open
        Whether a signal is passed on as it arrives. Otherwise it waits for `deliver`.
    """

    def __init__(self) -> None:
        self.open = False
        self._handlers: dict[int, Any] = {}
        self._arrived: int | None = None

    @property
    def arrived(self) -> bool:
        """Whether a signal waits."""
        return self._arrived is not None

    def deliver(self) -> None:
        """Raise what a signal that waits stands for."""
        if self._arrived is not None:
            number, self._arrived = self._arrived, None
            self._pass_on(number, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.open or self._arrived is not None:  # asked again: at once
            self._arrived = None
            self._pass_on(number, frame)
        else:
            self._arrived = number

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        handler = self._handlers[number]
        if callable(handler):
            handler(number, frame)
        else:
            raise _Terminated


@contextmanager
def held() -> Iterator[Signals]:
    """Hold Ctrl-C and SIGTERM back inside, where this is the main thread.

    A signal is passed on, to the handler that it had, where the work says so (`Signals.deliver`,
    `Signals.open`), at once when it arrives a second time, and at the end.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals  # only the main thread may handle signals, and gets them
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler) or (handler == signal.SIG_DFL and number == signal.SIGTERM):
            signals._handlers[number] = handler
            signal.signal(number, signals._handle)
    try:
        try:
            yield signals
        finally:
            for which, handler in signals._handlers.items():
                if signal.getsignal(which) == signals._handle:  # a handler may set others
                    signal.signal(which, handler)
        signals.deliver()
    except _Terminated:
        signal.raise_signal(signal.SIGTERM)
        raise  # where the process ignores it by now


def kept(keep: Callable[[], object], error: BaseException) -> None:
    """Keep what was done before an error, and let the error pass whatever becomes of that."""
    try:
        keep()
    except Exception as other:
        error.add_note(f"what was done since the last commit could not be kept: {other}")
