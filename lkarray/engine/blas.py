"""How many products run at once in a process, and with how many BLAS threads each.

There are two ways, and nothing between. *Side by side*: as many products as there are cores, of
one BLAS thread each; they overlap with the reading and writing of other tasks and finish soonest,
where there are tiles enough. *Alone*: one product at a time, with all threads.

Several products of several threads are never asked for. OpenBLAS built with pthreads has one pool
of threads and one caller in it at a time: on 16 cores, 8 products of 2 threads reached 0.17
TFLOP/s, 16 of 1 thread 1.05, 1 of 16 threads 0.98. Builds on OpenMP, and MKL, would run several
teams, which gains nothing over one thread each and oversubscribes the cores where their numbers are
set by the environment. ``benchmarks/products.py`` prints all ways on the machine at hand.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
from dask.system import CPU_COUNT

_FULL = 0.85  # share of the cores' time that rounds of products must use


def cores() -> int:
    """Return the cores that this process may use, as Dask counts them (affinity and quota)."""
    return CPU_COUNT


def products_at_once() -> int:
    """Return how many products run side by side in a process that runs tasks on its threads.

    One where no BLAS is known whose threads can be set (threadpoolctl lists it): products of all
    threads side by side would be slower than one after another.
    """
    return cores() if _libraries() else 1


def side_by_side(tiles: int) -> bool:
    """Say whether products of one BLAS thread each, one a core, finish ``tiles`` tiles soonest.

    Tiles are taken in rounds of one a core, and a last round that leaves cores idle costs as much
    as a full one; twice as many tiles as cores are needed to overlap with reading at all.
    """
    at_once = products_at_once()
    rounds = ceil(tiles / at_once)
    return rounds >= 2 and tiles >= _FULL * rounds * at_once


class _Threads:
    """The number of BLAS threads, lowered to one while any task of the engine runs many tiles.

    There is one owner, which counts its users: the number is lowered by the first and
    restored by the last, whichever threads these are. (Limits that overlap, each restoring the
    number before it, were seen to leave a process at one thread for good.) A BLAS on OpenMP has
    a number for each calling thread instead, which that thread lowers and restores.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[tuple[Any, int]] = []

    @contextmanager
    def lowered(self) -> Iterator[None]:
        own = [lib for lib in _libraries() if _is_per_thread(lib)]
        shared = [lib for lib in _libraries() if not _is_per_thread(lib)]
        with self._lock:
            if self._users == 0:
                self._before = _set_to_one(shared)
            self._users += 1
        before = _set_to_one(own)
        try:
            yield
        finally:
            _restore(before)
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    _restore(self._before)


def _is_per_thread(library: Any) -> bool:
    return getattr(library, "threading_layer", None) == "openmp"


def _set_to_one(libraries: list[Any]) -> list[tuple[Any, int]]:
    before = [(library, library.get_num_threads()) for library in libraries]
    _restore([(library, 1) for library, number in before if number > 1])
    return before


def _restore(numbers: list[tuple[Any, int]]) -> None:
    for library, number in numbers:
        _release(library)
        library.set_num_threads(number)
        _release(library)


def _release(library: Any) -> None:
    """Let any thread set the library's number of threads.

    From 3.8 on, threadpoolctl lets only the first thread that set a number set it again, as long as
    it lives, and ignores all others. Here any thread of a pool may be the first or the last, and
    neither may keep the user's own ``threadpool_limits`` from working afterwards.
    """
    if hasattr(library, "clear_controlling_thread"):
        library.clear_controlling_thread(force=True)


THREADS = _Threads()


@lru_cache(maxsize=1)
def _libraries() -> list[Any]:
    from threadpoolctl import ThreadpoolController

    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


@lru_cache(maxsize=1)
def _slots() -> threading.BoundedSemaphore:
    return threading.BoundedSemaphore(products_at_once())


@lru_cache(maxsize=1)
def _alone() -> threading.Lock:
    return threading.Lock()


@contextmanager
def product_slot(*, many: bool) -> Iterator[None]:
    """Hold the right to multiply: as one of ``many`` side by side, or alone with all threads."""
    if many:
        with _slots(), THREADS.lowered():
            yield
    else:
        with _alone():
            yield


def multiply(a: np.ndarray, b: np.ndarray, *, many: bool = False) -> np.ndarray:
    """Return ``a.T @ b``, by the symmetric product where ``a is b``."""
    with product_slot(many=many):
        return a.T @ b


def multiply_signed(a: np.ndarray, b: np.ndarray, minus: int, *, many: bool = False) -> np.ndarray:
    """Return the same, with the products from element ``minus`` on subtracted."""
    product = multiply(a[:minus], b[:minus], many=many)
    if minus < len(a):
        product -= multiply(a[minus:], b[minus:], many=many)
    return product
