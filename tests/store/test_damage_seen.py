"""Damage of any file of a store is seen, and `lk.verify` names it."""

import os

import numpy as np
import pytest
import zarr

import lkarray as lk
from lkarray import errors
from lkarray.store import commit
from tests.helpers import attacks
from tests.helpers.attacks import ATTACKS, copied, edit, files, sampled, swap


@pytest.fixture
def store(whole, tmp_path, monkeypatch):
    """A copy to be damaged."""
    attacks.small_blocks(monkeypatch)
    return copied(whole[0], tmp_path / "s.zarr")


def attack(path, before, name, how, seed):
    """Damage one file, see what becomes of it, and put it back."""
    raw = (path / name).read_bytes()
    ATTACKS[how](path / name, np.random.default_rng(seed))
    noticed = attacks.outcome(path, before)
    (path / name).write_bytes(raw)
    assert noticed is not None, f"{how} of {name} went unseen, or ended in another's error"


@pytest.mark.parametrize("how", ATTACKS)
def test_attack__is_caught_or_changes_nothing__some(store, whole, how, caplog):
    """Four files of each kind of damage; the slow test takes all."""
    rng = np.random.default_rng(sorted(ATTACKS).index(how))
    for seed, name in enumerate(rng.choice(files(store), 4, replace=False)):
        attack(store, whole[1], str(name), how, seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ATTACKS)
def test_attack__is_caught_or_changes_nothing__all(store, whole, how):
    for number, name in enumerate(files(store)):
        for seed in range(4 if how == "flip" else 1):
            attack(store, whole[1], name, how, 100 * number + seed)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("losses/loss/c/0/0/0", "losses/loss/c/0/1/0"),  # blocks
        ("losses/loss/c/0/2/0", "losses/loss/c/1/2/0"),  # chains, of the open block
        ("losses/loss/c/1/0/1", "losses_other/loss/c/1/0/1"),  # observed sets
        ("sample_stats/minibatch_loss/c/0/1", "sample_stats/gradient_norm/c/0/1"),
        ("losses/name/c/0", "losses/turned/c/0"),
        ("losses/label/c/0", "losses/sample/c/0"),
        ("state/parameters/c/0/0/0", "state/parameters/c/0/1/0"),
        ("commit/latest/c/0/0/0", "commit/latest/c/0/1/0"),
        ("commit/blocks/c/0/0/0", "commit/blocks/c/0/1/0"),
        ("derived/kernel/covariance/c/0/0", "derived/kernel/covariance/c/1/1"),
        ("losses/loss/zarr.json", "losses_other/loss/zarr.json"),
    ],
)
def test_swap__of_two_sound_files_is_named(store, a, b):
    swap(store, a, b)
    # The file itself, or its array; which of two slots is in use differs from store to store.
    places = {a, b, a.rpartition("/c/")[0], b.rpartition("/c/")[0]}
    assert places & {p.path for p in lk.verify(store)}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_swap__all_pairs(store, whole):
    for a, b in attacks.pairs(store):
        swap(store, a, b)
        assert attacks.outcome(store, whole[1]) is not None, f"{a} and {b}"
        swap(store, a, b)


def test_swap__of_the_records_of_two_chains_is_seen(tmp_path, monkeypatch):
    attacks.small_blocks(monkeypatch)
    path = tmp_path / "s.zarr"
    sampled(path, draws=6)
    sampled(path, draws=8, chains=1)  # chain 1 stays behind
    swap(path, "commit/record/c/0/0", "commit/record/c/1/0")
    assert lk.verify(path) != []
    with pytest.raises(errors.DamagedError, match="record of chain 0"):
        sampled(path, draws=9)


EDITS = {
    "nbeta": ("losses/zarr.json", lambda m: m["attributes"].update(nbeta=11.0)),
    "n_train": ("losses_other/zarr.json", lambda m: m["attributes"].update(n_train=5)),
    "a scale": ("losses/loss/zarr.json", lambda m: m["attributes"].update(scale_factor=2.0)),
    "a fill value": ("sample_stats/distance/zarr.json", lambda m: m.update(fill_value=0.0)),
    "dims": (
        "losses/loss/zarr.json",
        lambda m: m.update(dimension_names=["draw", "chain", "sample"]),
    ),
    "chunks": (
        "losses_other/loss/zarr.json",
        lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[1, 2, 16]),
    ),
    "codecs": ("losses/center_loss/zarr.json", lambda m: m["codecs"].pop()),
    "fewer chains": ("losses/loss/zarr.json", lambda m: m.update(shape=[1, 10, 24])),
    "fewer samples": ("losses/loss/zarr.json", lambda m: m.update(shape=[2, 10, 16])),
    "an unknown key": ("losses/zarr.json", lambda m: m.update(other=1)),
    "an unknown key of the root": ("zarr.json", lambda m: m.update(other=1)),
    "the seal's key": (
        "losses/zarr.json",
        lambda m: m["attributes"].update(x=m["attributes"].pop("lkarray_seal")),
    ),
    "the root's seal": ("zarr.json", lambda m: m["attributes"]["lkarray"].pop("seal")),
    "the fingerprint": (
        "zarr.json",
        lambda m: m["attributes"]["lkarray"]["losses"].update(nbeta=11.0),
    ),
    "the root's copy": (
        "zarr.json",
        lambda m: m["consolidated_metadata"]["metadata"]["losses/loss"].update(fill_value=0.0),
    ),
    "an unknown codec": (
        "losses/label/zarr.json",
        lambda m: m["codecs"].append({"name": "nothing", "configuration": {}}),
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_verify__names_edited_metadata(store, what):
    name, change = EDITS[what]
    edit(store / name, change)
    named = {problem.path for problem in lk.verify(store)}
    assert (name if what != "fewer chains" else "commit/record/c/1/0") in named


@pytest.mark.parametrize(("stored", "right"), [(11.0, 10.0)])
def test_open__names_a_setting_that_differs_from_the_fingerprint(store, stored, right):
    edit(store / "losses/zarr.json", lambda m: m["attributes"].update(nbeta=stored))
    with pytest.raises(
        errors.DamagedError, match=f"'nbeta' of losses/zarr.json is {stored}.*{right}"
    ):
        lk.open(store)


@pytest.mark.parametrize("name", ["losses", "sample_stats", "state", "derived", "derived/near"])
def test_verify__names_a_group_that_lost_its_metadata(store, name):
    (store / name / "zarr.json").unlink()
    assert ("missing", f"{name}/zarr.json") in {p[:2] for p in lk.verify(store)}


def test_verify__goes_on_after_a_broken_array(store):
    os.truncate(store / "losses/loss/zarr.json", 0)
    attacks.flip(store / "losses_other/loss/c/1/0/1", np.random.default_rng(0))
    os.truncate(store / "derived/near/zarr.json", 30)
    attacks.delete(store / "observables/bias/c/0/0/0", np.random.default_rng(0))
    named = {p.path for p in lk.verify(store)}
    assert named == {
        "losses/loss/zarr.json",
        "losses_other/loss/c/1/0/1",
        "derived/near/zarr.json",
        "observables/bias/c/0/0/0",
    }


def test_verify__knows_a_deleted_record_from_a_chain_that_never_began(store, tmp_path):
    (store / "commit/record/c/1/0").unlink()
    assert [p[:2] for p in lk.verify(store)] == [("missing", "commit/record/c/1/0")]
    with pytest.raises(errors.DamagedError, match="commit/record/c/1/0"):
        lk.open(store)


def test_verify__takes_a_commit_that_was_cut_off_for_sound(store, monkeypatch):
    """Newer draws in the open block, in some arrays only, are no fault: they do not count."""
    before = attacks.seen(store)
    real, done = zarr.Array.__setitem__, []

    def stop(self, place, values):
        if self.path.startswith(("losses", "sample_stats")) and len(done) == 3:
            raise KeyboardInterrupt
        done.append(self.path)
        real(self, place, values)

    monkeypatch.setattr(zarr.Array, "__setitem__", stop)
    monkeypatch.setattr(commit, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(commit, "_COMMIT_SHARE", 0.0)
    with pytest.raises(KeyboardInterrupt):
        sampled(store, draws=12)
    monkeypatch.undo()
    assert done
    assert [p for p in lk.verify(store) if not p.path.startswith("derived")] == []
    assert attacks.seen(store)["/losses/loss"] == before["/losses/loss"]
    attacks.small_blocks(monkeypatch)
    sampled(store, draws=12)
    assert lk.verify(store) == []
