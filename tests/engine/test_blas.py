"""Products x BLAS threads stay within the cores, on machines of any size."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

from lkarray.engine import blas, plan
from tests.helpers.losses import random_losses
from tests.helpers.operands import operand


@pytest.fixture(params=[1, 2, 8, 16, 64])
def cores(request, monkeypatch):
    """A machine of so many cores, as the engine sees it."""
    for module in (blas, plan):
        monkeypatch.setattr(module, "CPU_COUNT", request.param)
    blas._slots.cache_clear()
    yield request.param
    blas._slots.cache_clear()


def blas_threads() -> int:
    """Return the threads of numpy's own BLAS: the one that multiplies."""
    libraries = ThreadpoolController().select(user_api="blas").info()
    return next(lib["num_threads"] for lib in libraries if "numpy" in lib["filepath"])


def most_at_once(products, *, many):
    """Run so many products that wait for each other; return how many ran at once, and threads."""
    running, most, threads, lock = 0, 0, set(), threading.Lock()
    full = threading.Barrier(products + 1)

    def work(_):
        nonlocal running, most
        with blas.product_slot(many=many):
            with lock:
                running += 1
                most = max(most, running)
                threads.add(blas_threads())
            if many:
                full.wait(timeout=60)
            with lock:
                running -= 1

    with ThreadPoolExecutor(products + 1) as pool:
        futures = [pool.submit(work, k) for k in range(products)]
        if many:
            full.wait(timeout=60)
        for future in futures:
            future.result()
    return most, threads


def test_products__side_by_side_are_one_a_core_of_one_thread(cores):
    with threadpool_limits(2, user_api="blas"):
        assert most_at_once(cores, many=True) == (cores, {1})
        assert blas_threads() == 2


def test_threads__are_restored_by_another_thread_than_lowered_them():
    """The first thread of a pool ends after the last: neither is the owner of the number."""
    entered, leave = threading.Event(), threading.Event()

    def first():
        with blas.product_slot(many=True):
            entered.set()
            leave.wait(60)

    with threadpool_limits(2, user_api="blas"):
        for _ in range(2):  # the second time, the threads of the first are gone
            thread = threading.Thread(target=first)
            thread.start()
            entered.wait(60)
            last = threading.Thread(target=lambda: most_at_once(1, many=True))
            last.start()
            assert blas_threads() == 1
            leave.set()
            thread.join()
            last.join()
            assert blas_threads() == 2
            entered.clear()
            leave.clear()


def test_a_threads_use_of_products__leaves_the_number_to_everybody():
    """A pool's thread that lives on does not own the number: other threads may still set it."""

    def multiply():
        with blas.product_slot(many=True):
            pass

    with ThreadPoolExecutor(1) as pool, threadpool_limits(1, user_api="blas"):
        pool.submit(multiply).result()
        with threadpool_limits(2, user_api="blas"):
            assert blas_threads() == 2
        assert blas_threads() == 1


class OpenMP:
    """A BLAS that has a number of threads for each thread that calls it."""

    threading_layer = "openmp"

    def __init__(self):
        self.numbers = threading.local()

    def get_num_threads(self):
        return getattr(self.numbers, "value", 4)

    def set_num_threads(self, number):
        self.numbers.value = number


def test_threads__of_a_blas_on_openmp_are_lowered_in_each_thread(monkeypatch):
    library, inside = OpenMP(), []
    monkeypatch.setattr(blas, "_libraries", lambda: [library])

    def work(_):
        with blas.product_slot(many=True):
            inside.append(library.get_num_threads())
            full.wait(60)
        return library.get_num_threads()

    full = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [4, 4]
    assert inside == [1, 1]


def test_products__alone_are_one_at_a_time_with_all_threads(cores):
    with threadpool_limits(2, user_api="blas"):
        assert most_at_once(min(cores, 4), many=False) == (1, {2})


def test_products__of_a_blas_whose_threads_cannot_be_set_are_alone(cores, monkeypatch):
    monkeypatch.setattr(blas, "_libraries", list)
    assert blas.products_at_once() == 1


@pytest.mark.parametrize(("tiles", "many"), [(1, False), (10, False), (55, True), (300, True)])
def test_plan__is_side_by_side_where_rounds_are_full(tiles, many, monkeypatch):
    monkeypatch.setattr(blas, "CPU_COUNT", 8)
    assert blas.side_by_side(tiles) is many


def test_plan__counts_what_all_tasks_hold_on_any_number_of_cores(cores, rng):
    """The projected peak covers a panel pair and a tile of each task, and stays in the budget."""
    losses = random_losses(rng, chains=4, draws=250, samples=3000)
    made = plan.make_plan(operand(losses), memory="2 GiB", sink=8)
    side = made.rows[0].stop - made.rows[0].start
    held = 2 * 1000 * side * 4 + side * side * (4 + 8)
    assert cores * held <= made.peak <= 2 << 30
    tiles = len(made.rows) * (len(made.rows) + 1) // 2
    assert made.many == blas.side_by_side(tiles)
    np.testing.assert_array_equal(np.diff([s.start for s in made.rows]) > 0, True)
