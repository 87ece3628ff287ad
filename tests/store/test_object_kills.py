"""Writers of an object store that are killed, and several at once."""

from __future__ import annotations

import contextlib
import signal
import time

import numpy as np
import pytest
import torch
from torch import optim

import lkarray as lk
from lkarray import errors
from lkarray import store as stores
from lkarray.store.location import exists
from tests.helpers.networks import classification, small_network
from tests.helpers.object_store import begin, keys
from tests.helpers.workers import identical

pytest.importorskip("moto.server")
pytest.importorskip("obstore")

pytestmark = pytest.mark.services


CHAINS, DRAWS = 2, 50


def sample_slowly(environment, url, pause):
    """Sample with a commit at every draw, so that kills fall inside commits."""
    from lkarray.store import commit, layout

    begin(environment)
    commit.COMMIT_SECONDS = commit._COMMIT_SHARE = 0.0
    layout.block_draws = lambda draws, values: 32

    class Slow(lk.SGLD):
        def step(self, given):
            super().step(given)
            time.sleep(pause)

    Slow.__name__ = "SGLD"
    sample_here(url, sampler=Slow, draws=DRAWS)


def save_slowly(environment, source, url, pause):
    from lkarray import saving

    begin(environment)
    compute = saving.compute_tile

    def slow(contraction, tile):
        time.sleep(pause)
        return compute(contraction, tile)

    saving.compute_tile = slow
    lk.save(kernel_of(source), url, group="derived/k")


def kernel_of(source):
    losses = lk.open(source)["losses"]["loss"]
    return lk.correlation(losses, memory="40 KiB")


def wait_until(true, process, seconds=60.0):
    limit = time.monotonic() + seconds
    while not true():
        assert process.is_alive()
        assert time.monotonic() < limit
        time.sleep(0.02)


def draws_of(url):
    with contextlib.suppress(errors.StoreError, KeyError):
        if exists(stores.as_store(url)):
            root = stores.open_root(url)
            return [stores.read_record(root, chain).draws for chain in range(CHAINS)]
    return [0] * CHAINS


def test_sample__killed_while_it_commits_resumes_bit_for_bit(server, bucket, tmp_path, start):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sample_here(tmp_path / "whole", draws=DRAWS)
    torch.set_num_threads(threads)
    url, committed = f"{bucket}/killed", [0]
    for more in (3, DRAWS + 5):
        process = start(sample_slowly, server.environment, url, 0.003)
        wait_until(lambda least=more: sum(draws_of(url)) >= least, process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        committed.append(sum(draws_of(url)))
        assert lk.verify(url) == []
    assert committed == sorted(set(committed))
    assert committed[-1] < CHAINS * DRAWS
    last = start(sample_slowly, server.environment, url, 0.0)
    last.join()
    assert last.exitcode == 0
    assert identical(lk.open(tmp_path / "whole"), lk.open(url))
    assert lk.verify(url) == []


def test_save__killed_half_way_writes_only_what_is_missing(server, bucket, tmp_path, start):
    source, url = tmp_path / "run", f"{bucket}/kernel"
    sample_here(source)
    whole = lk.save(kernel_of(source), tmp_path / "whole", group="derived/k").values
    tiles = len(list((tmp_path / "whole/derived/k/correlation/c").glob("*/*")))

    def written():
        return [k for k in keys(url) if k.startswith("derived/k/correlation/c/")]

    process = start(save_slowly, server.environment, str(source), url, 0.2)
    wait_until(lambda: len(written()) >= 3, process)
    process.kill()
    process.join()
    before = set(written())
    assert 3 <= len(before) < tiles
    seen = len(server.requests())
    np.testing.assert_array_equal(lk.save(kernel_of(source), url, group="derived/k"), whole)
    puts = [
        line.rpartition("/c/")[2]
        for line in server.requests()[seen:]
        if line.startswith("PUT") and "/c/" in line and "correlation" in line
    ]
    assert sorted(puts) == sorted(k.rpartition("/c/")[2] for k in set(written()) - before)
    assert len(written()) == tiles


def sample_here(path, *, sampler=lk.SGLD, draws=20):
    data = classification(n=60)
    lk.sample(
        lk.LocalPosterior(small_network(), data, nbeta=10.0, gamma=50.0),
        data,
        sampler=sampler(step_size=1e-3),
        chains=CHAINS,
        draws=draws,
        burn_in=2,
        batch_size=16,
        store=path,
        chains_per_device=1,
        progress=False,
    )


def test_workers__two_processes_write_disjoint_chains_and_panels_as_one_does(
    server, bucket, sample, monkeypatch
):
    from distributed import Client, LocalCluster

    from tests.helpers.audited_runs import audited, recorded

    monkeypatch.setattr("lkarray.auditing.describing.panel_size", lambda problem, budget: 3)
    trace = recorded(lambda p: optim.Adam(p, 1e-2), store=f"{bucket}/trace")
    alone = lk.audit(trace, audited(), store=f"{bucket}/alone")
    options = {"chains": 4, "draws": 12, "chains_per_device": 1}
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            env=server.environment,
        ) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        there = sample(f"{bucket}/there", client=client, **options)
        kernel = lk.correlation(there["losses"]["loss"])
        saved = lk.save(kernel, f"{bucket}/there").values
        panels = lk.audit(trace, audited(), store=f"{bucket}/trace", client=client)
        np.testing.assert_array_equal(panels["influence"], alone["influence"])
        assert lk.verify(f"{bucket}/trace") == []
    threads = torch.get_num_threads()
    torch.set_num_threads(there.attrs["lkarray"]["losses"]["threads"])
    try:
        here = sample(f"{bucket}/here", **options)
    finally:
        torch.set_num_threads(threads)
    assert identical(there, here)
    np.testing.assert_array_equal(saved, lk.correlation(here["losses"]["loss"]).values)
