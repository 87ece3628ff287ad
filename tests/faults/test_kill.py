"""`kill -9` at random moments of sampling: the resumed run equals an undisturbed one."""

from __future__ import annotations

import multiprocessing
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import lkarray as lk
from tests.helpers.networks import classification, small_network

KILLS = 10
CHAINS, DRAWS = 3, 150


def sample_slowly(path: Path, pause: float, width: int = 1) -> None:
    """Sample with a commit at every draw and blocks of 32, so that kills fall inside commits."""
    import torch

    from lkarray.sampling import StepInput
    from lkarray.store import commit, layout

    torch.set_num_threads(1)
    commit.COMMIT_SECONDS = commit._COMMIT_SHARE = 0.0
    layout.block_draws = lambda draws, values: 32
    layout.loss_chunks = lambda depth, samples, tail: (1, depth, 64)
    data = classification(n=200)
    posterior = lk.LocalPosterior(small_network(), data, nbeta=10.0, gamma=50.0)

    class Slow(lk.SGLD):
        def step(self, given: StepInput) -> None:
            super().step(given)
            time.sleep(pause)

    Slow.__name__ = "SGLD"
    lk.sample(
        posterior,
        data,
        sampler=Slow(step_size=1e-3),
        chains=CHAINS,
        draws=DRAWS,
        burn_in=5,
        batch_size=16,
        coords={"label": data.tensors[1]},
        store=path,
        chains_per_device=width,
        progress=False,
    )


@pytest.mark.minutes
@pytest.mark.parametrize(("seed", "width"), [pytest.param(0, 1, marks=pytest.mark.slow), (1, 2)])
def test_sample__killed_ten_times_resumes_bit_for_bit(tmp_path, seed, width):
    """One chain at a time, and in stacks of two of which the last has an empty seat."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lkarray.sampling", "tests.helpers.networks"])

    def start(path: Path, pause: float) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=sample_slowly, args=(path, pause, width))
        process.start()
        return process

    whole = start(tmp_path / "whole.zarr", 0.0)
    whole.join()
    assert whole.exitcode == 0
    rng = np.random.default_rng(seed)
    path = tmp_path / "killed.zarr"
    committed = []
    for kill in range(KILLS):
        process = start(path, 0.004)
        if kill % 4:  # else at any moment, starting included
            wait_for_draws(path, process)
        time.sleep(rng.uniform(0.0, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        committed.append(draws_of(path))
        assert_sound(path)
    assert committed == sorted(committed)
    assert len(set(committed)) > KILLS // 2, "the kills did not fall into sampling"
    assert sum(committed[-1]) < CHAINS * DRAWS, "sampling was finished before the last kill"
    last = start(path, 0.0)
    last.join()
    assert last.exitcode == 0
    expected, resumed = lk.open(tmp_path / "whole.zarr"), lk.open(path)
    for group in ("losses", "sample_stats"):
        same = resumed[group].to_dataset().compute()
        assert same.identical(expected[group].to_dataset().compute())
    assert lk.verify(path) == []


def wait_for_draws(path: Path, process: multiprocessing.process.BaseProcess) -> None:
    """Wait until the process has committed something, however slow this machine is."""
    before, limit = draws_of(path), time.monotonic() + 60
    while draws_of(path) == before and process.is_alive() and time.monotonic() < limit:
        time.sleep(0.02)


def draws_of(path: Path) -> tuple[int, ...]:
    from lkarray.store import open_root, read_record
    from lkarray.store.location import as_store, exists

    if not exists(as_store(path)):
        return (0,) * CHAINS
    root = open_root(path)
    if "commit/record" not in root:
        return (0,) * CHAINS
    return tuple(read_record(root, chain).draws for chain in range(CHAINS))


def assert_sound(path: Path) -> None:
    """What is committed is whole after every kill; a store killed while made says so."""
    from lkarray.store.location import as_store, exists

    if exists(as_store(path)):
        problems = lk.verify(path)
        assert [p for p in problems if p.path != "losses"] == []
