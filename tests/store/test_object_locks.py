"""Locks of an object store: one writer at a time, whatever it suffers."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time

import pytest
import zarr

import lkarray as lk
from lkarray import errors
from lkarray import store as stores
from lkarray.store import leases, objects
from lkarray.store.location import exists
from tests.helpers.object_store import bare, begin

pytest.importorskip("moto.server")
obstore = pytest.importorskip("obstore")

pytestmark = pytest.mark.services


def hold(environment, url, held):
    begin(environment)
    with stores.writer_lock(stores.as_store(url)):
        held.set()
        time.sleep(60)


def holding(start, server, url):
    held = multiprocessing.get_context("forkserver").Event()
    process = start(hold, server.environment, url, held)
    assert held.wait(60)
    return process


def test_lock__a_second_writer_is_refused_and_a_killed_one_replaced(
    server, bucket, start, quick, sample, caplog
):
    url = f"{bucket}/run"
    process = holding(start, server, url)
    told = rf"in use by process {process.pid} on \S+ since .* UTC"
    with pytest.raises(errors.LockedError, match=told):
        sample(url)
    assert not exists(stores.as_store(url))
    process.kill()
    process.join()
    began = time.monotonic()
    sample(url)
    assert time.monotonic() - began < 30
    assert f"took over the lock of process {process.pid}" in caplog.text
    assert lk.verify(url) == []


def test_lock__a_holder_that_was_stopped_too_long_writes_nothing_more(
    server, bucket, quick, monkeypatch
):
    store = stores.as_store(f"{bucket}/run")
    with stores.writer_lock(store):
        root = zarr.create_group(store, zarr_format=3)
        (lease,) = objects.guards[store.url]
        lease._over.set()  # as a stopped process: it renews no more
        lease._thread.join()
        other = stores.as_store(f"{bucket}/run")
        monkeypatch.setattr(objects, "guards", {})  # as another process
        taken = leases._acquire(other, ".lkarray.writer.lock")
        monkeypatch.undo()
        time.sleep(0.5)
        with pytest.raises(errors.LockedError, match=f"taken over by process {os.getpid()}"):
            root.attrs["late"] = True
    assert "late" not in zarr.open_group(other, mode="r").attrs
    # What the first one left did not free the lock of the second.
    body = json.loads(bytes(obstore.get(bare(other.url), ".lkarray.writer.lock").bytes()))
    assert body["id"] == taken.body["id"]
    assert "free" not in body


def test_lock__of_many_that_take_a_stale_lock_over_one_succeeds(bucket, quick):
    url = f"{bucket}/run"
    leases._acquire(stores.as_store(url), ".lkarray.writer.lock")  # and never renewed
    time.sleep(3.1)
    won, refused = [], []

    def take():
        try:
            lease = leases._acquire(stores.as_store(url), ".lkarray.writer.lock")
            lease.start()
            won.append(lease)
        except errors.LockedError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 5)
    won[0].stop()
    with stores.writer_lock(stores.as_store(url)):  # free again at once
        pass


def test_lock__an_answer_that_was_lost_is_not_taken_for_another_writer(bucket, quick):
    store = stores.as_store(f"{bucket}/run")
    with stores.writer_lock(store):
        (lease,) = objects.guards[store.url]
        with lease._turn:
            before = lease._version
            assert lease.put(before)
            lease._version, lease._until = before, 0.0  # as if it had not been heard of
        zarr.create_group(store, zarr_format=3)


def test_lock__a_server_that_ignores_conditions_is_refused(bucket, monkeypatch):
    real = obstore.put

    def put(store, path, file, *, mode=None, **options):
        return real(store, path, file, **options)

    monkeypatch.setattr(obstore, "put", put)
    with (
        pytest.raises(errors.StoreError, match="no conditional put"),
        stores.writer_lock(stores.as_store(f"{bucket}/run")),
    ):
        pass


def test_write__outlives_an_outage_in_which_its_lock_grew_old(bucket, quick, monkeypatch):
    store, real = stores.as_store(f"{bucket}/run"), obstore.put
    failures = [obstore.exceptions.GenericError("HTTP error: error sending request")] * 2

    def put(*args, **options):
        if failures:
            raise failures.pop()
        return real(*args, **options)

    with stores.writer_lock(store):
        (lease,) = objects.guards[store.url]
        lease._over.set()
        lease._thread.join()
        lease._until = 0.0
        monkeypatch.setattr(obstore, "put", put)
        zarr.create_group(store, zarr_format=3)
    assert failures == []


def test_lock__a_slow_taker_does_not_take_it_early(bucket, quick, monkeypatch):
    url, real = f"{bucket}/run", leases._server_time
    leases._acquire(stores.as_store(url), ".lkarray.writer.lock")  # and never renewed
    began = time.monotonic()

    def slow(store):
        time.sleep(1.5)
        return real(store)

    monkeypatch.setattr(leases, "_server_time", slow)
    leases._acquire(stores.as_store(url), ".lkarray.writer.lock")
    assert time.monotonic() - began > leases.EXPIRY


def test_write__under_a_lock_is_repeated_when_nothing_answered(bucket, quick, monkeypatch):
    store, real = stores.as_store(f"{bucket}/run"), obstore.put_async
    failures = [obstore.exceptions.GenericError("HTTP error: error sending request")]

    async def put(*args, **options):
        if failures:
            raise failures.pop()
        return await real(*args, **options)

    monkeypatch.setattr(obstore, "put_async", put)
    with stores.writer_lock(store):
        zarr.create_group(store, zarr_format=3)
    failures.append(obstore.exceptions.GenericError("HTTP error: error sending request"))
    with pytest.raises(errors.StoreError, match="cannot be reached"):
        zarr.create_group(store, zarr_format=3, overwrite=True)
