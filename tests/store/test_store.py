import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

import lkarray as lk
from lkarray import errors
from lkarray import store as stores
from lkarray.labels import given_coords
from lkarray.store import commit as commit_module
from lkarray.store.layout import block_draws, loss_chunks
from lkarray.store.location import enter

STATS = {"minibatch_loss": 1.0, "gradient_norm": 2.0, "distance": 3.0, "step_size": 0.1}


def make(path, *, chains=2, draws=10, samples=5, coords=None):
    labels = given_coords(coords, samples)
    center = np.zeros(samples, np.float32)
    return stores.create_run(
        path,
        chains=chains,
        draws=draws,
        sets=[stores.LossSet("losses", labels, center, attrs={"nbeta": 2.0})],
        observables={},
        state={"parameters": 3},
        state_dtype="float32",
        fingerprint={"lkarray": "test"},
    )


def row(losses, *, diverged=False):
    stats = STATS | {"diverged": diverged}
    return {"losses/loss": losses} | {f"sample_stats/{k}": v for k, v in stats.items()}


def fill(root, chain, draws, *, diverged_at=None, offset=0.0):
    samples = root["losses/loss"].shape[2]
    with ThreadPoolExecutor(1) as pool:
        region = stores.ChainRegion(root, chain, pool)
        for draw in range(region.draws, draws):
            losses = np.full(samples, draw + offset, np.float32)
            region.append(row(losses, diverged=draw == diverged_at))
            if region.due():
                region.commit(draw + 1, {"parameters": np.full(3, draw, np.float32)})
        region.commit(draws, {"parameters": np.full(3, draws, np.float32)})
        region.wait()


@pytest.mark.parametrize(
    ("samples", "draws", "chunks"),
    [
        (10_000, 500, (1, 500, 2048)),
        (60_000, 500, (1, 279, 2048)),
        (1_280_000, 500, (1, 100, 8192)),
        (5, 3, (1, 32, 5)),
    ],
)
def test_loss_chunks__match_the_layout_of_the_design(samples, draws, chunks):
    assert loss_chunks(block_draws(draws, samples), samples) == chunks


def test_open__gives_what_was_committed_lazily_with_labels(tmp_path):
    root = make(tmp_path / "s", coords={"label": [3, 1, 2, 1, 3], "path": list("abcde")})
    fill(root, 0, 10)
    fill(root, 1, 10, offset=0.5)
    tree = lk.open(tmp_path / "s")
    losses = tree["losses"]
    assert losses["loss"].dims == ("chain", "draw", "sample")
    assert losses["loss"].chunks is not None
    np.testing.assert_array_equal(
        losses["loss"].isel(sample=0), np.arange(10) + np.array([[0], [0.5]])
    )
    assert losses["label"].values.tolist() == [3, 1, 2, 1, 3]
    assert losses["path"].values.tolist() == list("abcde")
    assert losses["loss"].attrs["units"] == "nat"
    assert "hidden" not in tree.attrs


def test_open__shows_the_rectangle_every_started_chain_has_and_says_what_it_hid(tmp_path, caplog):
    root = make(tmp_path / "s", chains=4)
    fill(root, 0, 10)
    fill(root, 1, 6)
    fill(root, 2, 4, diverged_at=3)
    tree = lk.open(tmp_path / "s")
    assert tree["losses"].sizes == {"chain": 2, "draw": 6, "sample": 5}
    assert tree["losses"]["chain"].values.tolist() == [0, 1]
    hidden = " ".join(tree.attrs["hidden"])
    assert "chains [2] diverged" in hidden
    assert "chains [3] have no draws" in hidden
    assert "first 6 draws" in hidden
    assert "chains [2] diverged" in caplog.text


def test_open__reads_with_plain_xarray_and_leaves_uncommitted_draws_nan(tmp_path):
    root = make(tmp_path / "s")
    fill(root, 0, 10)
    stores.finish(root)
    tree = xr.open_datatree(tmp_path / "s", engine="zarr")
    assert np.isfinite(tree["losses/loss"][0]).all()
    assert np.isnan(tree["losses/loss"][1]).all()


def test_region__resumes_an_open_block_and_keeps_what_is_committed(tmp_path):
    root = make(tmp_path / "s", draws=70)
    fill(root, 0, 20)
    fill(root, 0, 70)
    np.testing.assert_array_equal(root["losses/loss"][0, :, 0], np.arange(70))
    record = stores.read_record(root, 0)
    assert (record.draws, record.step) == (70, 70)


def test_region__state_alternates_between_slots(tmp_path):
    root = make(tmp_path / "s")
    slots = []
    for draws in (2, 4, 6):
        fill(root, 0, draws)
        slots.append(stores.read_record(root, 0).slot)
    assert slots == [1, 0, 1]
    with ThreadPoolExecutor(1) as pool:
        np.testing.assert_array_equal(
            stores.ChainRegion(root, 0, pool).state()["parameters"], [6, 6, 6]
        )


def test_region__a_commit_cut_off_before_its_record_does_not_count(tmp_path, monkeypatch):
    root = make(tmp_path / "s")
    fill(root, 0, 4)

    def stop(store, keys):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(commit_module, "flush", stop)
    with pytest.raises(errors.StoreError, match="disk is full.*committed before are safe"):
        fill(root, 0, 9, offset=100)
    monkeypatch.undo()
    assert stores.read_record(root, 0).draws == 4
    tree = lk.open(tmp_path / "s")
    np.testing.assert_array_equal(tree["losses/loss"][0, :, 0], np.arange(4))
    fill(root, 0, 9)
    np.testing.assert_array_equal(lk.open(tmp_path / "s")["losses/loss"][0, :, 0], np.arange(9))


def test_region__commits_when_time_has_passed(tmp_path, monkeypatch):
    root = make(tmp_path / "s")
    with ThreadPoolExecutor(1) as pool:
        region = stores.ChainRegion(root, 0, pool)
        region.append(row(np.zeros(5)))
        assert not region.due()
        monkeypatch.setattr(commit_module, "COMMIT_SECONDS", 0.0)
        assert region.due()


def test_grow__keeps_what_is_stored(tmp_path):
    root = make(tmp_path / "s")
    fill(root, 0, 10)
    stores.finish(root)
    stores.grow(stores.open_root(tmp_path / "s", mode="r+"), chains=3, draws=90)
    root = stores.open_root(tmp_path / "s", mode="r+")
    fill(root, 0, 90)
    fill(root, 2, 90)
    assert xr.open_datatree(tmp_path / "s", engine="zarr", consolidated=False).sizes == {}
    tree = lk.open(tmp_path / "s")
    assert tree["losses"].sizes == {"chain": 2, "draw": 90, "sample": 5}
    np.testing.assert_array_equal(tree["losses/loss"][0, :, 0], np.arange(90))
    assert lk.verify(tmp_path / "s") == []


def test_put__adds_a_result_beside_the_losses(tmp_path):
    root = make(tmp_path / "s", coords={"path": list("abcde")})
    fill(root, 0, 10)
    fill(root, 1, 10)
    kernel = lk.covariance(lk.open(tmp_path / "s"))
    stores.put(tmp_path / "s", "covariance", kernel)
    stores.put(tmp_path / "s", "covariance", kernel)  # again: replaced
    tree = lk.open(tmp_path / "s")
    xr.testing.assert_allclose(tree["derived/covariance"]["covariance"].compute(), kernel.compute())
    assert tree["derived/covariance"]["path_2"].values.tolist() == list("abcde")
    assert lk.verify(tmp_path / "s") == []


def test_open__refuses_a_newer_store(store):
    root = zarr.open_group(store)
    root.update_attributes({"lkarray": {**root.attrs["lkarray"], "schema": 99}})
    with pytest.raises(errors.StoreVersionError, match="layout 99.*Upgrade lkarray"):
        lk.open(store)


def test_open__says_that_nothing_is_there(tmp_path):
    with pytest.raises(errors.StoreError, match="there is no store at .*nothing.zarr"):
        lk.open(tmp_path / "nothing.zarr")
    assert not (tmp_path / "nothing.zarr").exists()


def test_open__refuses_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(errors.StoreError, match="is a file"):
        lk.open(path)


def test_open__refuses_another_folder_and_another_zarr(tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(errors.StoreError, match="not a Zarr v3 store"):
        lk.open(tmp_path)
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(errors.StoreError, match="not one of lkarray's"):
        lk.open(tmp_path / "other.zarr")


def test_open__says_that_a_store_is_empty(tmp_path):
    make(tmp_path / "s")
    with pytest.raises(errors.StoreError, match="no committed draw"):
        lk.open(tmp_path / "s")


def test_open__names_a_missing_variable_and_wrong_dims(store):
    root = zarr.open_group(store)
    del root["losses/center_loss"]
    with pytest.raises(errors.SchemaError, match="'center_loss'.*is missing"):
        lk.open(store)
    array = root["losses"].create_array(
        "center_loss", shape=(4,), dtype="f4", dimension_names=["other"]
    )
    array[:] = 1
    with pytest.raises(errors.SchemaError, match=r"dims \('other',\), expected \('sample',\)"):
        lk.open(store)


def test_verify__is_empty_for_a_sound_store(store):
    assert lk.verify(store) == []


@pytest.mark.parametrize(
    ("piece", "damage", "kind"),
    [
        ("losses/loss/c/1/0/0", os.remove, "missing"),
        ("losses/loss/c/1/0/0", lambda p: os.truncate(p, 0), "truncated"),
        ("losses/loss/c/1/0/0", lambda p: os.truncate(p, 10), "truncated"),
        ("losses/loss/c/1/0/0", lambda p: flip_bit(p), "corrupt"),
        ("losses/label/c/0", os.remove, "missing"),
        ("losses/center_loss/c/0", lambda p: flip_bit(p), "corrupt"),
        ("sample_stats/distance/c/0/0", os.remove, "missing"),
        ("state/parameters/c/0/1/0", os.remove, "missing"),
        ("commit/record/c/0/0", lambda p: flip_bit(p), "corrupt"),
        ("losses/loss/zarr.json", os.remove, "missing"),
        ("losses/loss/zarr.json", lambda p: os.truncate(p, 20), "corrupt"),
    ],
)
def test_verify__names_the_damaged_piece(store, piece, damage, kind):
    damage(store / piece)
    problems = lk.verify(store)
    assert [(p.kind, p.path) for p in problems] == [(kind, piece)]


def test_verify__names_a_record_that_counts_too_many_draws(store):
    root = zarr.open_group(store)
    root["commit/record"][0] = [99, 99, 1]
    (problem,) = lk.verify(store)
    assert problem.kind == "mismatch"
    assert "99 draws" in problem.detail


def test_verify__finds_unflagged_non_finite_losses(store):
    root = zarr.open_group(store)
    root["losses/loss"][1, 4, 7] = np.nan
    (problem,) = lk.verify(store)
    assert (problem.kind, "chain 1, draw 4" in problem.detail) == ("mismatch", True)


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)


def test_lock__a_second_writer_is_told_who_holds_it(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from lkarray.store import file_lock\n"
        "with file_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(errors.LockedError, match=f"process {other.pid} on .* since"),
            stores.file_lock(tmp_path),
        ):
            pass
        other.kill()
        other.wait()
        with stores.file_lock(tmp_path):  # the lock died with its process
            pass


@pytest.mark.parametrize("resizes", range(8))
def test_grow__killed_half_way_leaves_everything_readable(tmp_path, monkeypatch, resizes):
    root = make(tmp_path / "s")
    fill(root, 0, 10)
    fill(root, 1, 10)
    before = lk.open(tmp_path / "s").compute()
    real, done = zarr.Array.resize, []

    def stop(self, shape):
        if len(done) == resizes:
            raise KeyboardInterrupt
        done.append(1)
        return real(self, shape)

    monkeypatch.setattr(zarr.Array, "resize", stop)
    with pytest.raises(KeyboardInterrupt):
        stores.grow(stores.open_root(tmp_path / "s", mode="r+"), chains=4, draws=40)
    monkeypatch.undo()
    assert lk.verify(tmp_path / "s") == []
    assert lk.open(tmp_path / "s").compute().identical(before)
    root = stores.open_root(tmp_path / "s", mode="r+")
    # Fewer chains than the killed growth, more draws: every array must reach both.
    stores.grow(root, chains=3, draws=60)
    for chain in range(3):
        fill(root, chain, 60)
    assert lk.verify(tmp_path / "s") == []
    assert lk.open(tmp_path / "s")["losses"].sizes == {"chain": 3, "draw": 60, "sample": 5}


def test_put__a_failure_leaves_the_old_result(store):
    kernel = lk.covariance(lk.open(store))
    stores.put(store, "k", kernel)
    old = lk.open(store)["derived/k"]["covariance"].compute()

    def fail(block):
        raise RuntimeError("stopped")

    broken = old.chunk().copy(
        data=old.chunk().data.map_blocks(fail, dtype="f4", meta=np.empty((0, 0)))
    )
    with pytest.raises(RuntimeError, match="stopped"):
        stores.put(store, "k", broken)
    assert lk.open(store)["derived/k"]["covariance"].identical(old)
    assert lk.verify(store) == []
    stores.put(store, "k", lk.open(store)["derived/k"]["covariance"] ** 2)  # from itself
    np.testing.assert_allclose(lk.open(store)["derived/k"]["covariance"], old**2, rtol=1e-6)


def test_store__killed_while_it_was_made_is_made_again(tmp_path, sample):
    """Whatever was written before the fingerprint, the next run starts over and succeeds."""
    root = make(tmp_path / "a")
    enter(root, losses=None)
    (tmp_path / "a" / "losses" / "zarr.json").unlink()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "zarr.0123.partial").write_text("{")
    for name in ("a", "b"):
        assert sample(tmp_path / name)["losses"].sizes["draw"] == 9
        assert lk.verify(tmp_path / name) == []


def test_store__with_broken_root_metadata_is_named(store):
    os.truncate(store / "zarr.json", 0)
    (problem,) = lk.verify(store)
    assert (problem.kind, problem.path) == ("corrupt", "zarr.json")
    with pytest.raises(errors.DamagedError, match="Restore zarr.json"):
        lk.open(store)


def test_store__paths_may_be_written_as_users_do(tmp_path, monkeypatch, sample):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sample("~/home.zarr")
    sample(f"file://{tmp_path}/url.zarr")
    sample("relative.zarr")
    assert {p.name for p in tmp_path.glob("*")} == {"home.zarr", "url.zarr", "relative.zarr"}
    sample("memory://somewhere")
    assert lk.open("memory://somewhere")["losses"].sizes["draw"] == 9
