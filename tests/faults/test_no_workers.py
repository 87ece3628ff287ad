"""No worker is left: nothing waits without a word, or without an end."""

from __future__ import annotations

import logging
import threading
import time

import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr
from distributed import Client, LocalCluster, Nanny, SpecCluster
from distributed.core import Status

import lkarray as lk
from lkarray import errors
from lkarray.cluster import replacing, watching
from tests.helpers.audited_runs import audited, recorded
from tests.helpers.losses import numpy_correlation, random_losses
from tests.helpers.workers import sample

pytestmark = pytest.mark.timeout(240)  # a busy machine takes 20 s to start a worker


@pytest.fixture
def losses(rng):
    return random_losses(rng, samples=40)


@pytest.fixture
def said(caplog):
    """What was said so far."""
    caplog.set_level(logging.WARNING, "lkarray")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "lkarray"]


@pytest.fixture(scope="module")
def owned():
    """A client whose cluster `connect` opened."""
    with lk.cluster.connect(
        "local", workers=2, threads=1, memory="1 GiB", dashboard=None
    ) as client:
        yield client


def bereave(client: Client, count: int = 2) -> None:
    """Let nannies give up for good, as they do when a worker is killed while it starts."""
    nannies = list(client.cluster.workers.values())[:count]
    for nanny in nannies:  # on the loop of the cluster, side by side
        client.cluster.loop.add_callback(nanny.close)
    while any(nanny.status is not Status.closed for nanny in nannies):
        time.sleep(0.05)


def test_save__new_workers_come_where_all_are_gone_for_good(owned, losses, tmp_path, said):
    bereave(owned)
    kernel = lk.correlation(losses.chunk(sample=10), memory="1 MiB")
    saved = lk.save(kernel, tmp_path / "k.zarr")
    np.testing.assert_allclose(saved.values, numpy_correlation(losses), atol=1e-5)
    (told,) = (line for line in said() if "gone for good; starting new ones" in line)
    assert "of 2 workers of local are" in told


@pytest.mark.minutes
def test_compute__new_workers_come_where_all_are_gone_for_good(owned, losses):
    kernel = lk.correlation(losses.chunk(sample=10), memory="1 MiB")
    bereave(owned)
    np.testing.assert_allclose(kernel.compute(), numpy_correlation(losses), atol=1e-5)


@pytest.mark.minutes
def test_sample__new_workers_come_where_all_are_gone_for_good(owned, tmp_path):
    bereave(owned)
    tree = sample(tmp_path / "s", owned, draws=4, chains=2, sampler=lk.SGLD(1e-3))
    assert tree["losses"].sizes["draw"] == 4


def test_one_of_two__is_replaced_and_said_once(owned, said):
    owned.wait_for_workers(2, timeout=120)
    bereave(owned, 1)
    owned.wait_for_workers(2, timeout=120)
    told = "1 of 2 workers of local are gone for good; starting new ones"
    assert said() == [told]


def test_killed__workers_that_distributed_gives_up_too_soon_come_back():
    """Its patience of 15 s, at which all waited for ever, is over before any is back."""
    import dask

    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "100 ms"}),
        lk.cluster.connect("local", workers=1, dashboard=None) as client,
    ):
        (nanny,) = client.cluster.workers.values()
        client.cluster.sync(nanny.process.process.kill)
        with pytest.raises(TimeoutError):
            client.submit(time.sleep, 0).result(timeout=0.5)
        assert client.submit(sum, [1, 2]).result() == 3


def test_connect__a_worker_that_dies_while_it_starts_is_started_again(monkeypatch, said):
    start, dead = Nanny.instantiate, []

    async def instantiate(self):
        if not dead:
            dead.append(self)
            return Status.failed  # as where its process was killed
        return await start(self)

    monkeypatch.setattr(Nanny, "instantiate", instantiate)
    with lk.cluster.connect("local", workers=1, dashboard=None) as client:
        assert client.submit(sum, [1, 2]).result() == 3
    assert "a worker of local died while it started; starting again" in said()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(watching, "PERIOD", 0.1)
    monkeypatch.setattr(watching, "WORD", 0.3)
    monkeypatch.setattr(watching, "PATIENCE", 1.0)


@pytest.fixture
def foreign(impatient):
    """A cluster of the user's own, with one worker in this process, that is taken away."""
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


def leave_alone(cluster: LocalCluster) -> None:
    """Take its workers away."""
    cluster.scale(0)
    cluster.sync(cluster._correct_state)
    while cluster.scheduler_info["workers"]:
        time.sleep(0.01)


def group_mean_of(losses: xr.DataArray):
    operator = lk.linear_operator(losses.chunk(sample=10), memory="1 MiB")
    return operator @ np.ones(losses.sizes["sample"])


WAITS = {
    "save": lambda losses, path, client: lk.save(
        lk.correlation(losses.chunk(sample=10), memory="1 MiB"), path
    ),
    "save of blocks": lambda losses, path, client: lk.save(
        lk.correlation(losses.chunk(sample=10), memory="1 MiB") * 2, path
    ),
    "sample": lambda losses, path, client: sample(path, client, draws=2, chains=1),
    "operator": lambda losses, path, client: group_mean_of(losses),
    "diagnostics": lambda losses, path, client: lk.diagnostics(losses.chunk(sample=10)),
}


@pytest.mark.parametrize("wait", WAITS)
def test_own_client__a_wait_without_workers_ends_in_words(wait, foreign, losses, tmp_path, said):
    before = {t for t in threading.enumerate() if t.name == "lkarray-watch"}  # of other tests
    with Client(foreign) as client:
        leave_alone(foreign)
        with pytest.raises(errors.ClusterError, match="none came within .*run again to"):
            WAITS[wait](losses, tmp_path / "k.zarr", client)
        assert any("this ends in an error unless that changes within 1 s" in s for s in said())
        # The same call goes on once there are workers.
        foreign.scale(1)
        client.wait_for_workers(1, timeout=60)
        WAITS[wait](losses, tmp_path / "k.zarr", client)
    after = {t for t in threading.enumerate() if t.name == "lkarray-watch"}
    assert not after - before


def test_audit__without_workers_ends_in_words(foreign, tmp_path):
    trace = recorded(lambda p: torch.optim.SGD(p, 1e-2), store=tmp_path / "t")
    with Client(foreign) as client:
        leave_alone(foreign)
        with pytest.raises(errors.ClusterError, match="run again to continue"):
            lk.audit(trace, audited(), store=tmp_path / "t", client=client)
        foreign.scale(1)
        client.wait_for_workers(1, timeout=60)
        audit = lk.audit(trace, audited(), store=tmp_path / "t", client=client)
    np.testing.assert_allclose(audit["influence"], lk.audit(trace, audited())["influence"])


def test_address__a_plain_compute_ends_in_words(foreign):
    with lk.cluster.connect(foreign.scheduler_address) as client:
        leave_alone(foreign)
        with pytest.raises(errors.ClusterError, match="no worker of inproc.*run again to continue"):
            xr.DataArray(da.ones(4, chunks=2)).sum().compute()
        with pytest.raises(errors.ClusterError, match="run again to continue"):
            client.submit(sum, [1]).result()
        foreign.scale(1)
        assert float(xr.DataArray(da.ones(4, chunks=2)).sum().compute()) == 4


def test_workers__that_come_in_time_are_waited_for(foreign, losses, tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "PATIENCE", 60.0)
    with Client(foreign) as client:
        leave_alone(foreign)
        later = threading.Timer(1.0, foreign.scale, [1])
        later.start()
        sample(tmp_path / "s", client, draws=2, chains=1)
        later.join()


def test_scheduler__that_is_gone_is_said(foreign, losses, tmp_path, monkeypatch):
    kernel = lk.correlation(losses.chunk(sample=10), memory="1 MiB")
    with Client(foreign.scheduler_address, timeout=5):
        leave_alone(foreign)
        monkeypatch.setattr(watching, "PATIENCE", 60.0)
        threading.Timer(0.5, foreign.close).start()
        with pytest.raises(errors.ClusterError, match="connection to the scheduler was lost while"):
            lk.save(kernel, tmp_path / "k.zarr")


class Hopeless:
    """A keeper that started workers again and again, in vain."""

    patience, hopeless = None, True

    def why(self):
        return ", though new ones were started 6 times; look into their logs"

    def look(self):
        pass

    stop = begin_again = look


def test_owned__attempts_in_vain_end_in_words(foreign):
    with Client(foreign) as client:
        leave_alone(foreign)
        watching.watch_for_good(client, "it", Hopeless())
        told = "no worker of it is left, and none came .* new ones were started 6 times.*run again"
        with pytest.raises(errors.ClusterError, match=told):
            client.submit(sum, [1]).result()
        watching.end_watch(client)


class Bar:
    shown = ()

    def set_postfix_str(self, text):
        self.shown = (*self.shown, text)


def test_bar__shows_what_is_said(foreign):
    from lkarray.waiting import workers_awaited

    bar = Bar()
    with Client(foreign) as client:
        leave_alone(foreign)
        with (
            pytest.raises(errors.ClusterError, match="The draws are safe: run again to continue"),
            workers_awaited("sampled", "The draws are safe", client=client, bar=bar),
        ):
            client.submit(sum, [1]).result()
    assert any("is left" in text or "is there" in text for text in bar.shown)


@pytest.mark.parametrize(
    ("workers", "resource", "what"),
    [
        ([], None, "no worker of it is left"),
        ([{"status": "running"}], None, ""),
        ([{"status": "running"}], "GPU", "no worker with a GPU of it is left"),
        ([{"status": "running", "resources": {"GPU": 1}}], "GPU", ""),
        ([{"status": "paused"}], None, "all workers of it are paused for want of memory"),
        ([{"status": "paused"}, {"status": "running"}], None, ""),
        ([{"status": "paused", "metrics": {"task_counts": {"executing": 1}}}], None, ""),
    ],
)
def test_trouble__is_what_no_task_gets_past(workers, resource, what):
    watch = watching.Watch(SimpleClient(), "it", seen=True)
    watch._waits.append(watching._Wait(resource=resource))
    info = {"workers": dict(enumerate(workers)), "n_workers": len(workers)}
    trouble = watch._trouble_of(SimpleClient(), info)
    assert (trouble.what if trouble else "") == what


class SimpleClient:
    cluster = None


class Job:
    """A job of a queue, or what is left of it."""

    submit_command, status = "sbatch", Status.running

    def __init__(self, number):
        self.job_id = str(number)


def keeper_of(workers, here=(), **spec):
    cluster = SpecCluster.__new__(SpecCluster)
    cluster.workers = workers
    cluster.worker_spec = dict.fromkeys(workers, spec)
    cluster.scheduler_info = {"workers": {n: {"name": name} for n, name in enumerate(here)}}
    cluster._adaptive, cluster.status = None, Status.closed
    return replacing.Keeper(cluster, "slurm", {})


def test_queue__jobs_that_wait_are_left_alone_and_waited_for():
    keeper = keeper_of({"a": Job(1)})
    assert not keeper._gone("a")
    assert keeper._lacks(keeper._cluster.workers["a"]) is None
    assert keeper.patience == float("inf")
    assert replacing.expects_more(keeper._cluster)


def test_queue__jobs_that_ended_are_gone(monkeypatch):
    monkeypatch.setattr(replacing, "SETTLE", -1.0)
    monkeypatch.setattr(replacing, "AWAY", -1.0)
    keeper = keeper_of({"a": Job(1), "b": Job(2)}, here=["b-1"], group=["-0", "-1"])
    assert [keeper._gone(name) for name in "ab"] == [False, False]
    keeper._ended_jobs = {"1"}
    assert [keeper._gone(name) for name in "ab"] == [True, False]
    keeper._cluster.scheduler_info = {"workers": {}}  # the workers of the second are gone, too
    assert [keeper._gone(name) for name in "ab"] == [True, True]
