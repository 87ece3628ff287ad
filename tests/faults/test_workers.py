"""Chains on the workers of a real Dask cluster, which are killed at random moments."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors
from tests.helpers.losses import CLUSTER
from tests.helpers.networks import classification, small_network
from tests.helpers.workers import CHAINS, identical, sample


@pytest.fixture(scope="module")
def cluster():
    from distributed import LocalCluster

    if CLUSTER is not None:
        yield CLUSTER
        return
    pause = {"LKARRAY_TEST_PAUSE": "0.012"}
    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", env=pause
    ) as started:
        yield started


@pytest.fixture
def client(cluster):
    from distributed import Client

    with Client(cluster) as connected:
        connected.wait_for_workers(2)
        yield connected


@pytest.mark.parametrize("width", [1, 2])
def test_workers__give_the_numbers_of_one_process(tmp_path, client, width):
    import torch

    few = {"draws": 20, "chains": 3, "chains_per_device": width, "outcomes": ("loss", "log_odds")}
    there = sample(tmp_path / "there", client, **few)
    threads = torch.get_num_threads()
    torch.set_num_threads(there.attrs["lkarray"]["losses"]["threads"])
    try:
        here = sample(tmp_path / "here", None, **few)
    finally:
        torch.set_num_threads(threads)
    assert identical(there, here)
    # A resume in another place keeps to the stored layout.
    grown = sample(tmp_path / "there", None, **few | {"draws": 25})
    assert grown["losses"].sizes["draw"] == 25


def killed(path, cluster, client, kills, seed):
    """Sample while workers are killed; call again whenever that gives up, as a user would."""
    rng, done, count = np.random.default_rng(seed), threading.Event(), 0

    def kill():
        nonlocal count
        while count < kills and not done.wait(rng.uniform(0.3, 1.2)):
            nannies = list(cluster.workers.values())
            processes = [n.process.pid for n in nannies if n.process is not None]
            processes = [pid for pid in processes if pid is not None]
            if processes:
                os.kill(int(rng.choice(processes)), signal.SIGKILL)
                count += 1

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for _ in range(kills):
            try:
                return sample(path, client), count
            except (errors.StoreError, errors.ClusterError) as error:
                assert "run again to continue" in str(error)  # noqa: PT017
        return sample(path, client), count
    finally:
        done.set()
        killer.join()


@pytest.mark.minutes
@pytest.mark.parametrize(
    "kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_workers__killed_at_random_moments_give_the_same_numbers(tmp_path, cluster, client, kills):
    whole = sample(tmp_path / "whole", client)
    survived, count = killed(tmp_path / "killed", cluster, client, kills, seed=kills)
    assert count >= min(kills, 4)
    assert identical(survived, whole)
    assert lk.verify(tmp_path / "killed") == []


def test_workers__one_gpu_a_task_where_workers_have_them(tmp_path, monkeypatch):
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=1, threads_per_worker=4, resources={"GPU": 1}, dashboard_address=":0"
        ) as started,
        Client(started) as connected,
    ):
        asked, submit = [], connected.submit

        def recording(function, *args, **options):
            asked.append((function.__name__, options.get("resources")))
            return submit(function, *args, **options)

        monkeypatch.setattr(connected, "submit", recording)
        tree = sample(
            tmp_path / "s",
            connected,
            draws=10,
            device="cpu",
            sampler=lk.SGLD(1e-3),
            chains_per_device=1,
        )
    assert tree["losses"].sizes["chain"] == CHAINS
    assert asked.count(("_run", {"GPU": 1})) == CHAINS
    assert ("_prepare", {"GPU": 1}) in asked


def test_workers__refuse_what_they_cannot_reach(tmp_path, client):
    with pytest.raises(errors.StoreError, match="cannot be reached by Dask workers"):
        sample(MemoryStore(), client)


def test_workers__errors_come_back_in_plain_words(tmp_path, client):
    sample(tmp_path / "s", client, draws=5)
    with pytest.raises(errors.FingerprintError, match="seed: stored 0, now 3"):
        sample(tmp_path / "s", client, draws=5, seed=3)
    with pytest.raises(ValueError, match="'hinge' is not one of"):
        lk.LocalPosterior(small_network(), classification(), "hinge")
