"""A damaged run is refused before it goes on, and mended where it can be."""

import os

import numpy as np
import pytest

import lkarray as lk
from lkarray import errors
from tests.helpers import attacks
from tests.helpers.attacks import ATTACKS, contents, copied, edit, latest_state, sampled, swap
from tests.helpers.grids import first


@pytest.fixture
def store(whole, tmp_path, monkeypatch):
    """A copy to be damaged."""
    attacks.small_blocks(monkeypatch)
    return copied(whole[0], tmp_path / "s.zarr")


DAMAGE = {
    "state lost": lambda s: (s / latest_state(s)).unlink(),
    "state flipped": lambda s: ATTACKS["flip"](s / latest_state(s), np.random.default_rng(1)),
    "state swapped": lambda s: swap(s, "state/parameters/c/0/0/0", "state/parameters/c/0/1/0"),
    "statistics lost": lambda s: (s / "sample_stats/distance/c/1/2").unlink(),
    "statistics lost before": lambda s: (s / "sample_stats/distance/c/1/0").unlink(),
    "losses lost": lambda s: (s / "losses/loss/c/0/2/1").unlink(),
    "losses lost before": lambda s: (s / "losses_other/loss/c/0/0/1").unlink(),
    "losses cut off": lambda s: os.truncate(s / "losses/loss/c/1/1/0", 50),
    "losses swapped": lambda s: swap(s, "losses/loss/c/0/2/0", "losses/loss/c/1/2/0"),
    "observables emptied": lambda s: os.truncate(s / "observables/bias/c/1/2/0", 0),
    "a record lost": lambda s: (s / "commit/record/c/0/0").unlink(),
    "a record flipped": lambda s: attacks.flip(s / "commit/record/c/0/0", np.random.default_rng(2)),
    "checksums lost": lambda s: (s / f"commit/latest/c/0/{latest_state(s)[-3]}/0").unlink(),
    "labels flipped": lambda s: attacks.flip(s / "losses/name/c/0", np.random.default_rng(3)),
    "labels swapped": lambda s: swap(s, "losses/name/c/0", "losses/turned/c/0"),
    "losses at w* lost": lambda s: (s / "losses_other/center_loss/c/0").unlink(),
    "settings edited": lambda s: edit(
        s / "losses/zarr.json", lambda m: m["attributes"].update(nbeta=11.0)
    ),
    "metadata emptied": lambda s: os.truncate(s / "state/parameters/zarr.json", 0),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_resume__of_a_damaged_run_is_refused_and_touches_nothing(store, what):
    DAMAGE[what](store)
    before = contents(store)
    with pytest.raises(errors.DamagedError, match=r"lk\.(repair|verify)"):
        sampled(store, draws=14)
    assert contents(store) == before


@pytest.mark.parametrize("what", ["state lost", "losses lost before", "settings edited"])
def test_resume__with_more_chains_is_refused_too(store, what):
    DAMAGE[what](store)
    if what == "state lost":  # not needed: the chains that are there stay as they are
        sampled(store, chains=3)
        assert [p[:2] for p in lk.verify(store)] == [("missing", latest_state(store))]
        return
    with pytest.raises(errors.DamagedError):
        sampled(store, chains=3)


def test_observe__notices_statistics_that_are_lost(store):
    (store / "sample_stats/distance/c/1/0").unlink()
    with pytest.raises(errors.FingerprintError, match="inf of their size"):
        lk.observe(lk.open(store), attacks.classification(n=5), progress=False)


# --- repair --------------------------------------------------------------------------------------


#: One of each kind; `minutes` has all.
MENDED = (
    *("state lost", "statistics lost", "losses lost before", "losses swapped"),
    *("a record flipped", "checksums lost", "settings edited", "metadata emptied"),
)


@pytest.mark.parametrize("what", first((w for w in DAMAGE if "labels" not in w), fast=MENDED))
def test_repair__gives_back_what_was_stored(store, whole, what):
    before = contents(store)
    DAMAGE[what](store)
    repairs = lk.repair(store, progress=False)
    assert repairs
    assert all(repair.mended for repair in repairs), repairs
    assert lk.verify(store) == []
    after = contents(store)
    spare = {f"state/parameters/c/0/{slot}/0" for slot in (0, 1)} - {latest_state(store)}
    differ = {n for n in before if after[n] != before[n] and not n.endswith("zarr.json")}
    assert differ <= spare  # the slot that no record names
    assert attacks.seen(store) == whole[1]


def test_repair__says_what_it_could_not(store):
    DAMAGE["labels flipped"](store)
    (store / "derived/kernel/covariance/c/0/0").unlink()
    told = {one.path: one for one in lk.repair(store, progress=False)}
    assert not any(one.mended for one in told.values())
    assert "restore" in told["losses/name/c/0"].detail
    assert "compute it again" in told["derived/kernel/covariance/c/0/0"].detail


def test_repair__of_a_sound_store_does_nothing(store):
    before = contents(store)
    assert lk.repair(store, progress=False) == []
    assert contents(store) == before


def test_repair__with_another_posterior_overwrites_nothing(store, posterior):
    DAMAGE["losses lost before"](store)
    before = contents(store)
    (told,) = lk.repair(store, posterior, progress=False)
    assert not told.mended
    assert "weights" in told.detail or "train_data" in told.detail
    assert {n: c for n, c in contents(store).items() if n in before} == before


def test_repair__refuses_a_replay_that_differs_from_what_is_sound(store, monkeypatch):
    """On other hardware last bits differ: then nothing may be written."""
    from lkarray.sampling.target import Target

    DAMAGE["losses lost before"](store)
    before = contents(store)
    real = Target.distance
    monkeypatch.setattr(Target, "distance", lambda self: real(self) * (1 + 1e-6))
    (told,) = lk.repair(store, progress=False)
    assert not told.mended
    assert "sample_stats/distance" in told.detail
    assert contents(store) == before


def test_repair__needs_the_observed_sets_in_another_process(store, monkeypatch):
    from lkarray.sampling import remembering

    DAMAGE["losses lost before"](store)
    monkeypatch.setattr(remembering, "_remembered", {})
    (told,) = lk.repair(store, progress=False)
    assert "pass posterior=" in told.detail
    data = attacks.classification(n=24)
    posterior = lk.LocalPosterior(attacks.small_network(), data, nbeta=10.0, gamma=50.0)
    (told,) = lk.repair(store, posterior, progress=False)
    assert "pass observed=" in told.detail
    (told,) = lk.repair(
        store,
        posterior,
        observed={"train": data, "other": attacks.classification(n=20)},
        observables={"bias": attacks.first_bias},
        progress=False,
    )
    assert told.mended
    assert lk.verify(store) == []
