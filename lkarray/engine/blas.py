"""How many products run at once in a process, and with how many BLAS threads each.

Products of one thread each, as many as there are cores, overlap with the reading and writing
of other tasks and finish soonest, where there are tiles enough; a lone product uses all
threads. Either way BLAS threads x products stay within the cores: oversubscription is what
makes naive blocked products slow.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from dask.system import CPU_COUNT

_MOST = 8  # products at once, on machines with more cores than that


def products_at_once() -> int:
    """Return how many products run at once in a process that runs tasks on its threads."""
    return min(CPU_COUNT, _MOST)


class _Threads:
    """The number of BLAS threads, lowered while any task of the engine runs many tiles.

    There is one owner, which counts its users: the number is lowered by the first and
    restored by the last. (Limits that overlap, each restoring the number before it, were seen to
    leave a process at one thread for good.)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[tuple[Any, int]] = []

    @contextmanager
    def lowered(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._before = [(lib, lib.get_num_threads()) for lib in _libraries()]
                most = max(1, CPU_COUNT // products_at_once())
                for lib, number in self._before:
                    if number > most:
                        lib.set_num_threads(most)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    for lib, number in self._before:
                        lib.set_num_threads(number)


THREADS = _Threads()


@lru_cache(maxsize=1)
def _libraries() -> list[Any]:
    from threadpoolctl import ThreadpoolController

    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


@lru_cache(maxsize=1)
def _slots() -> tuple[threading.BoundedSemaphore, int]:
    number = products_at_once()
    return threading.BoundedSemaphore(number), number


@lru_cache(maxsize=1)
def _alone() -> threading.Lock:
    return threading.Lock()


@contextmanager
def product_slot(*, many: bool) -> Iterator[None]:
    """Hold the right to multiply: one of ``many`` products, or alone with all BLAS threads."""
    if many:
        with _slots()[0], THREADS.lowered():
            yield
    else:
        with _alone():
            yield


def multiply(a: np.ndarray, b: np.ndarray, *, many: bool = False) -> np.ndarray:
    """Return ``a.T @ b``, by the symmetric product where ``a is b``."""
    with product_slot(many=many):
        product: np.ndarray = a.T @ b
        return product
