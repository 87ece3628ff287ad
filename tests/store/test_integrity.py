"""Damage of any file of a store: seen, refused before a run goes on, and mended where it can be."""

import json
import logging
import os
import tarfile
import warnings
from pathlib import Path

import dask
import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from click.testing import CliRunner
from torch.utils.data import DataLoader

import lkarray as lk
from lkarray import errors
from lkarray import store as stores
from lkarray.cli import main
from lkarray.store import commit
from tests.helpers import attacks
from tests.helpers.attacks import ATTACKS, copied, files, sampled, swap

OLD = Path(__file__).parent / "data" / "store_0_1_0.tar.gz"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sound store, and what users read of it."""
    path = tmp_path_factory.mktemp("whole") / "s.zarr"
    with pytest.MonkeyPatch.context() as patch:
        attacks.small_blocks(patch)
        sampled(path)
    attacks.with_result(path)
    assert lk.verify(path) == []
    return path, attacks.seen(path)


@pytest.fixture
def store(whole, tmp_path, monkeypatch):
    """A copy to be damaged."""
    attacks.small_blocks(monkeypatch)
    return copied(whole[0], tmp_path / "s.zarr")


def contents(path):
    return {name: (path / name).read_bytes() for name in files(path)}


def latest_state(path, chain=0):
    slot = stores.read_record(stores.open_root(path), chain).slot
    return f"state/parameters/c/{chain}/{slot}/0"


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


def edit(path, change):
    """Change some metadata."""
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


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


@pytest.mark.parametrize("what", [what for what in DAMAGE if "labels" not in what])
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


# --- opening -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("derived/near/zarr.json", "cut"),
        ("derived/near/zarr.json", "delete"),
        ("derived/near/name/zarr.json", "empty"),
        ("derived/near/name/c/0", "delete"),
    ],
)
def test_open__leaves_out_a_broken_result_and_says_so(store, whole, name, how, caplog):
    ATTACKS[how](store / name, np.random.default_rng(0))
    tree = lk.open(store)
    assert set(tree["derived"].children) == {"kernel"}
    assert any("derived/near is damaged" in line for line in tree.attrs["hidden"])
    assert "derived/near" in caplog.text
    assert tree["losses/loss"].shape == (2, 10, 24)


@pytest.mark.parametrize("dim", ["components", "checkpoints"])
def test_parts__name_the_inner_file(tmp_path, sample, model, dim):
    parts = {"components": {"first": "0.*"}, "checkpoints": {"first": model}}[dim]
    path = tmp_path / "s.zarr"
    sample(path, **{dim: parts})
    inner = f"{dim.removesuffix('s')}/first"
    (path / inner / "losses/label/c/0").unlink()
    assert [p.path for p in lk.verify(path)] == [f"{inner}/losses/label/c/0"]
    with pytest.raises(errors.DamagedError, match=f"{inner} is damaged: losses/label/c/0"):
        lk.open(path)
    with pytest.raises(errors.DamagedError, match=f"{inner} is damaged"):
        sample(path, **{dim: parts, "draws": 12})


class Reads(torch.utils.data.Dataset):
    """Items read from a store in each worker."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 2

    def __getitem__(self, index):
        losses = lk.open(self.path)["losses"]
        return torch.tensor([index, len(losses["label"]), len(losses["name"])])


def test_open__in_a_forked_process(store):
    """Dask's threads were used before, and do not live on in the child."""
    with dask.config.set(scheduler="threads"):
        lk.open(store)["losses/loss"].mean().compute()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        loader = DataLoader(
            Reads(store), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
        )
        batches = [item.tolist() for item in loader]
    assert batches == [[0, 24, 24], [1, 24, 24]]


# --- stores of lkarray 0.1.0 ---------------------------------------------------------------------


@pytest.fixture
def old(tmp_path):
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "store.zarr"


def test_old_store__opens_and_verifies_and_says_what_is_not_checked(old, caplog):
    losses = lk.open(old)["losses"]
    assert losses["loss"].shape == (2, 9, 8)
    assert losses["name"].values.tolist() == list("abcdefgh")
    with caplog.at_level(logging.WARNING, "lkarray"):
        assert lk.verify(old) == []
    assert "written by lkarray 0.1.0" in caplog.text
    done = CliRunner().invoke(main, ["verify", str(old)])
    assert done.exit_code == 0
    assert "written by lkarray 0.1.0" in done.output
    assert "is sound" in done.output


def test_old_store__damage_of_what_has_checksums_is_named(old):
    attacks.flip(old / "losses/loss/c/1/0/0", np.random.default_rng(0))
    raw = (old / "losses/name/c/0").read_bytes()
    (old / "losses/name/c/0").write_bytes(raw.replace(b"a", b"z"))  # seen by the hash of labels
    edit(old / "losses/zarr.json", lambda m: m["attributes"].update(gamma=1.0))
    named = {p.path for p in lk.verify(old)}
    assert {"losses/loss/c/1/0/0", "losses", "losses/zarr.json"} == named or named >= {
        "losses/loss/c/1/0/0",
        "losses/zarr.json",
    }


def test_old_store__goes_on_without_checksums(old):
    from concurrent.futures import ThreadPoolExecutor

    root = stores.open_root(old, mode="r+")
    stores.require_sound(root)
    with ThreadPoolExecutor(1) as pool:
        region = stores.ChainRegion(root, 0, pool)
        assert region.draws == 9
        assert region.state() is not None
    (old / "sample_stats/distance/c/0/0").unlink()
    with pytest.raises(errors.DamagedError, match="sample_stats/distance/c/0/0"):
        stores.require_sound(root)


def test_labels__as_text_have_checksums(store):
    for name in ("losses/name", "losses_other/turned"):
        array = zarr.open_group(store)[name]
        assert [type(codec).__name__ for codec in array.compressors] == ["Crc32cCodec"]
    assert isinstance(lk.open(store)["losses"].to_dataset(), xr.Dataset)
