"""Ten rounds of workers killed at random moments: nothing changes, is lost, or is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors
from tests.helpers.losses import numpy_correlation, random_losses
from tests.helpers.workers import identical, sample

pytestmark = pytest.mark.services

ROUNDS = 10
MOST = 3  # kills in a round: a worker takes a second to come back

#: Tiles of a worker take their time, so that kills fall within them.
SLOW_TILES = """
import time
from lkarray.engine import contraction
if not hasattr(contraction, "_quick"):
    contraction._quick = contraction.sum_pieces
    def slow(*args):
        time.sleep(0.01)
        return contraction._quick(*args)
    contraction.sum_pieces = slow
"""


def workers_of(client) -> list[int]:
    """Processes of the workers that run now."""
    return [
        nanny.pid
        for nanny in (w.process for w in list(client.cluster.workers.values()))
        if nanny is not None and nanny.pid is not None
    ]


@contextmanager
def killing(client, rng, within: float):
    """Kill one worker after another, at random moments, until the block is left."""
    done, kills = threading.Event(), []

    def kill() -> None:
        while len(kills) < MOST and not done.wait(rng.uniform(0.1, within)):
            if pids := workers_of(client):
                pid = int(rng.choice(pids))
                os.kill(pid, signal.SIGKILL)
                kills.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield kills
    finally:
        done.set()
        killer.join()


def until_done(work):
    """Call again whenever workers died too often, as the message says."""
    for _ in range(20):
        try:
            return work()
        except (errors.StoreError, errors.ClusterError) as error:
            assert "run again to continue" in str(error)  # noqa: PT017
    raise AssertionError("twenty calls did not finish it")


@pytest.fixture
def no_orphans():
    """Every process that a test starts is gone soon after its cluster is closed."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    deadline = time.monotonic() + 10
    while True:
        left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        left = [p for p in left if not any("resource_tracker" in word for word in p.cmdline())]
        left = [p for p in left if not any("forkserver" in word for word in p.cmdline())]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert left == []


@pytest.mark.timeout(3600)  # up to thirty workers are started, each in 2 s to a minute
def test_dense_correlation__ten_rounds_of_killed_workers(tmp_path, rng, no_orphans):
    losses = random_losses(rng, chains=4, draws=60, samples=1200)
    source = tmp_path / "losses.zarr"
    losses.to_dataset().chunk(sample=200).to_zarr(source, consolidated=False)
    lazy = lk.correlation(
        xr.open_zarr(source, consolidated=False, chunks={})["loss"], memory="1500 KiB"
    )
    assert lk.plan(lazy).tiles > 30
    kills = 0
    with lk.cluster.connect("local", workers=2, threads=1, memory="1 GiB") as client:
        # Undisturbed on the same workers: as many BLAS threads give the same last bits.
        whole = lk.save(lazy, tmp_path / "whole.zarr").values
        np.testing.assert_allclose(whole, numpy_correlation(losses), atol=1e-5)
        client.register_worker_callbacks(lambda: exec(SLOW_TILES, {}))
        for number in range(ROUNDS):
            store = tmp_path / f"{number}.zarr"
            with killing(client, rng, 0.6) as killed:
                kernel = until_done(lambda store=store: lk.save(lazy, store))
            np.testing.assert_array_equal(kernel.values, whole)
            assert lk.verify(store) == []
            kills += len(killed)
    assert kills >= ROUNDS // 2


@pytest.mark.timeout(3600)  # up to thirty workers are started, each in 2 s to a minute
def test_sampling__ten_rounds_of_killed_workers(tmp_path, rng, no_orphans):
    options = {"draws": 40, "chains": 3}
    whole = sample(tmp_path / "whole", None, **options)
    kills = 0
    with lk.cluster.connect(
        "local", workers=2, threads=1, memory="1 GiB", env={"LKARRAY_TEST_PAUSE": "0.01"}
    ) as client:
        for number in range(ROUNDS):
            store = tmp_path / str(number)
            with killing(client, rng, 1.0) as killed:
                tree = until_done(lambda store=store: sample(store, client, **options))
            assert identical(tree, whole)
            assert lk.verify(store) == []
            kills += len(killed)
    assert kills >= ROUNDS // 2


@pytest.mark.timeout(300)
def test_ssh__a_host_whose_processes_are_killed_gets_new_ones(ssh_options):
    with lk.cluster.connect("ssh://127.0.0.1", threads=1, dashboard=None, **ssh_options) as client:
        (pid,) = client.run(os.getpid).values()
        for process in (psutil.Process(pid).parent(), psutil.Process(pid)):  # its nanny first
            process.kill()
        assert client.submit(sum, [1, 2]).result() == 3
        assert list(client.run(os.getpid).values()) != [pid]


@pytest.mark.timeout(300)
def test_ssh__a_scheduler_that_is_killed_is_said(ssh_options, tmp_path, rng):
    lazy = lk.correlation(random_losses(rng).chunk(sample=5), memory="1 MiB")
    with lk.cluster.connect(
        "ssh://127.0.0.1", threads=1, dashboard=None, timeout=20, **ssh_options
    ) as client:
        scheduler = psutil.Process(client.run_on_scheduler(os.getpid))
        client.register_worker_callbacks(lambda: exec(SLOW_TILES.replace("0.01", "2"), {}))
        threading.Timer(1.0, scheduler.kill).start()
        with pytest.raises(errors.ClusterError, match="scheduler was lost while .* run again to"):
            lk.save(lazy, tmp_path / "k.zarr")
