import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lkarray.engine.cache import PanelCache


def test_cache__keeps_the_latest_within_its_limit():
    cache, loads = PanelCache(), []

    def get(name):
        return cache.get(("a", name), lambda: loads.append(name) or name, size=10, limit=25)

    assert [get(n) for n in "xyxzx"] == list("xyxzx")
    assert loads == list("xyz")
    assert cache.nbytes == 20
    get("y")
    assert loads == list("xyzy")
    cache.drop("a")
    assert cache.nbytes == 0


def test_cache__loads_each_panel_in_one_thread_only():
    cache, loads = PanelCache(), []

    def load():
        time.sleep(0.05)
        loads.append(threading.get_ident())
        return "panel"

    with ThreadPoolExecutor(8) as pool:
        got = list(
            pool.map(lambda _: cache.get(("a",), load, size=1, limit=10), range(8), timeout=10)
        )
    assert got == ["panel"] * 8
    assert len(loads) == 1


def test_cache__a_failed_load_is_told_to_all_and_not_kept():
    cache = PanelCache()

    def fail():
        raise OSError("truncated")

    for _ in range(2):
        with pytest.raises(OSError, match="truncated"):
            cache.get(("a",), fail, size=1, limit=10)
    assert cache.get(("a",), lambda: 7, size=1, limit=10) == 7


def test_cache__may_be_dropped_from_by_the_garbage_collector_at_any_allocation():
    """A finalizer that runs inside `get` must not wait for the lock that `get` holds."""
    cache = PanelCache()

    class Owner:
        pass

    def churn():
        import weakref

        for i in range(3000):
            owner = Owner()
            owner.self = owner  # only the collector can free it
            weakref.finalize(owner, cache.drop, i % 7)
            cache.get((i % 7, i), lambda i=i: i, size=1, limit=50)

    before = gc.get_threshold()
    gc.set_threshold(5)
    try:
        thread = threading.Thread(target=churn, daemon=True)
        thread.start()
        thread.join(60)
    finally:
        gc.set_threshold(*before)
    assert not thread.is_alive()
