"""One bounded cache of panels for each process."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any


class PanelCache:
    """Panels by key, least recently used out first, each loaded by one thread only.

    A panel that is being loaded is waited for, never loaded twice. The bound holds for what
    the cache keeps; a task that uses a panel keeps it alive for as long as it needs it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._panels: OrderedDict[tuple[Hashable, ...], Any] = OrderedDict()
        self._loading: dict[tuple[Hashable, ...], Future[Any]] = {}
        self._gone: deque[Hashable] = deque()
        self._bytes = 0

    def get(
        self, key: tuple[Hashable, ...], load: Callable[[], Any], *, size: int, limit: int
    ) -> Any:
        """Return the panel of ``key``, loading it if need be; then keep at most ``limit`` bytes."""
        mine: Future[Any] = Future()
        with self._lock:
            self._forget()
            if key in self._panels:
                self._panels.move_to_end(key)
                return self._panels[key][0]
            waiting = self._loading.get(key)
            if waiting is None:
                self._loading[key] = mine
        if waiting is not None:  # another thread loads it: outside the lock, which it needs
            return waiting.result()
        try:
            panel = load()
        except BaseException as error:
            with self._lock:
                del self._loading[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._loading[key]
            self._panels[key] = (panel, size)
            self._bytes += size
            evicted = self._evict(limit)
        mine.set_result(panel)
        if evicted:  # freed here, without the lock, so that nobody waits for it
            del evicted[:]
            _trim()
        return panel

    def _evict(self, limit: int) -> list[Any]:
        """Take out the least recently used panels; return them, to be freed without the lock."""
        evicted = []
        while self._bytes > limit and self._panels:
            _, (panel, size) = self._panels.popitem(last=False)
            self._bytes -= size
            evicted.append(panel)
        return evicted

    def drop(self, owner: Hashable) -> None:
        """Have the panels whose key starts with ``owner`` forgotten before the next use.

        Called by finalizers, which the garbage collector may run in any thread at any
        allocation, even inside `get`: so it takes no lock.
        """
        self._gone.append(owner)

    def _forget(self) -> None:
        while self._gone:
            owner = self._gone.popleft()
            for key in [key for key in self._panels if key[0] == owner]:
                self._bytes -= self._panels.pop(key)[1]

    def forget(self, *start: Hashable) -> None:
        """Forget now the panels whose keys start so, and give their memory back."""
        with self._lock:
            keys = [key for key in self._panels if key[: len(start)] == start]
            for key in keys:
                self._bytes -= self._panels.pop(key)[1]
        if keys:
            _trim()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        with self._lock:
            self._forget()
            return self._bytes


def _trim() -> None:
    """Have the allocator return what was freed: glibc keeps blocks of up to 32 MiB otherwise."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


#: Panels, bounded by the plan.
CACHE = PanelCache()
#: Panels on a device, bounded by its own budget.
DEVICE_PANELS = PanelCache()
#: The moments of panels that are read in pieces, which are small (16 bytes a row and centring
#: group) and must outlive the pieces they standardise.
MOMENTS = PanelCache()
