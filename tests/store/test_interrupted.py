"""What was interrupted is unfinished and says so, and goes on where it stopped."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from zarr.storage import LocalStore, MemoryStore

import lkarray as lk
from lkarray import errors
from lkarray import store as stores
from lkarray.store import derived, names, results
from lkarray.store.seals import SEAL
from tests.helpers.losses import LABELS, VALUES, kernel


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def killed_at(monkeypatch, number):
    """Let the n-th write to a local store, and all after it, never happen.

    A killed process has no threads left: whatever Dask's still do has ended when the block has.
    """
    count = [0]
    real = LocalStore.set

    async def write(self, key, value, *args, **options):
        count[0] += 1
        if count[0] >= number:
            raise Killed
        await real(self, key, value, *args, **options)

    with monkeypatch.context() as killing, ThreadPoolExecutor(2) as pool:
        killing.setattr(LocalStore, "set", write)
        with dask.config.set(pool=pool):
            yield


def test_save__killed_at_any_write_is_unfinished_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("lkarray.store.files.fsync", lambda path: None)
    undisturbed = lk.save(kernel(), tmp_path / "whole.zarr").values
    number, ended = 0, False
    while not ended:
        number += 1
        path = tmp_path / f"{number}.zarr"
        with killed_at(monkeypatch, number):
            try:
                lk.save(kernel(), path)
                ended = True
            except Killed:
                pass
        if ended:
            break
        stored = {tuple(map(int, p.parts[-2:])) for p in path.glob("derived/k/k/c/*/*")}
        if (path / "derived/k/zarr.json").exists():
            assert [p.kind for p in lk.verify(path)] == ["unfinished"]
            (said,) = lk.open(path).attrs["hidden"]
            assert "derived/k is left out" in said
        computed: list = []
        np.testing.assert_array_equal(lk.save(kernel(computed=computed), path), undisturbed)
        # Of what was stored, only the first and the last are computed, to be compared.
        again = {min(stored), max(stored)} if stored else set()
        everything = {(i, j) for i in range(2) for j in range(2)}
        assert set(computed) == (everything - stored) | again
        assert lk.verify(path) == []
        assert "hidden" not in lk.open(path).attrs
    assert number > 10


def test_open__hides_an_unfinished_kernel_beside_what_is_finished(full, monkeypatch, caplog):
    with killed_at(monkeypatch, 8), pytest.raises(Killed):
        lk.save(kernel(), full, "derived/other")
    (problem,) = lk.verify(full)
    assert (problem.kind, problem.path) == ("unfinished", "derived/other")
    root = stores.open_root(full, mode="r+")
    record = stores.stored(root, "commit", lk.schema.RECORD)
    assert record.shape == (1, 3)
    assert [p for p, problem in results.results(root) if problem is None] == [
        "derived/k",
        "derived/means",
    ]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
@pytest.mark.parametrize("finished", [True, False])
def test_save__computes_a_damaged_tile_again_and_nothing_else(tmp_path, damage, finished):
    path, values = tmp_path / "k.zarr", np.random.default_rng(0).normal(size=(24, 24))
    lk.save(kernel(values), path)
    if not finished:
        unfinish(path / "derived/k/zarr.json")
    tile = path / "derived/k/k/c/1/1"
    raw = bytearray(tile.read_bytes())
    raw[9] ^= 4
    tile.unlink()
    if damage != "gone":
        tile.write_bytes({"cut": raw[:40], "flipped": raw, "empty": b""}[damage])
    kinds = {"cut": "truncated", "flipped": "corrupt", "empty": "truncated", "gone": "missing"}
    problems = [p.kind for p in lk.verify(path)]
    assert problems == ([kinds[damage]] if finished else ["unfinished"])
    computed: list = []
    np.testing.assert_array_equal(lk.save(kernel(values, computed=computed), path), values)
    assert sorted(computed) == [(0, 0), (1, 1), (2, 2)]  # the first and last are compared
    assert lk.verify(path) == []


def unfinish(file, *, old=False):
    """Take the marks from a saved kernel: as a kill leaves it, or as lkarray 0.1.0 wrote it."""
    metadata = json.loads(file.read_text())
    del metadata["attributes"][SEAL]
    metadata["attributes"][names.SAVED][results.COMPLETE] = False
    if old:
        del metadata["attributes"][names.SAVED][results.COMPLETE]
    file.write_text(json.dumps(metadata))


def test_open__judges_a_kernel_of_0_1_0_by_its_chunks(tmp_path):
    path = tmp_path / "k.zarr"
    lk.save(kernel(), path)
    unfinish(path / "derived/k/zarr.json", old=True)
    np.testing.assert_array_equal(lk.open(path)["derived/k/k"], VALUES)
    assert lk.verify(path) == []
    (path / "derived/k/k/c/1/0").unlink()
    assert [p.kind for p in lk.verify(path)] == ["unfinished"]
    (said,) = lk.open(path).attrs["hidden"]
    assert "chunks are not stored" in said
    computed: list = []
    np.testing.assert_array_equal(lk.save(kernel(computed=computed), path), VALUES)
    assert sorted(computed) == [(0, 0), (1, 0), (1, 1)]
    assert lk.verify(path) == []


def test_open__never_reads_a_lost_tile_as_nothing(full):
    (full / "derived/k/k/c/1/0").unlink()
    shown = {path for path, problem in results.results(stores.open_root(full)) if problem is None}
    assert shown == {"derived/means"}
    assert [(p.kind, p.path) for p in lk.verify(full)] == [("missing", "derived/k/k/c/1/0")]


def test_save__tells_when_tiles_are_not_where_workers_wrote_them(tmp_path, monkeypatch):
    monkeypatch.setattr("lkarray.saving._save_block", lambda *_: 1)
    with pytest.raises(errors.StoreError, match="all workers share"):
        lk.save(kernel(), tmp_path / "k.zarr")
    assert [p.kind for p in lk.verify(tmp_path / "k.zarr")] == ["unfinished"]


def test_put__killed_at_any_write_keeps_the_old_result(tmp_path, monkeypatch):
    monkeypatch.setattr("lkarray.store.files.fsync", lambda path: None)
    path = tmp_path / "s.zarr"
    lk.save(kernel(), path)
    old, new = (xr.DataArray(LABELS, dims="x", name="v") + word for word in (" old", " new"))
    stores.put(path, "v", old)
    seen = set()
    for number in range(1, 30):
        with killed_at(monkeypatch, number):
            try:
                stores.put(path, "v", new)
                break
            except Killed:
                pass
        opened = lk.open(path)["derived/v/v"]
        assert opened.equals(old) or opened.equals(new)
        seen.add(bool(opened.equals(new)))
        assert lk.verify(path) == []
        stores.put(path, "v", old)
    assert lk.open(path)["derived/v/v"].equals(new)
    assert seen == {False, True}  # killed before the move, and after it


@pytest.mark.parametrize("exchanging", [True, False])
def test_put__moves_a_whole_group(tmp_path, monkeypatch, exchanging):
    path = tmp_path / "s.zarr"
    lk.save(kernel(), path)
    if not exchanging:
        monkeypatch.setattr(derived, "_exchange", lambda a, b: False)
    for value in (1.0, 2.0):
        stores.put(path, "v", xr.DataArray([value], dims="x", name="v"))
        assert float(lk.open(path)["derived/v/v"][0]) == value
    assert sorted(p.name for p in (path / "derived").iterdir()) == ["k", "v", "zarr.json"]


def test_put__into_memory_keeps_the_old_result_when_it_fails():
    store = MemoryStore()
    lk.save(kernel(), store)
    stores.put(store, "v", xr.DataArray([1.0], dims="x", name="v"))
    ones = da.ones(1, chunks=1)
    data = ones.map_blocks(lambda x: 1 // 0, dtype="f8", meta=np.ones(0))
    failing = xr.DataArray(data, dims="x", name="v")
    with pytest.raises(ZeroDivisionError):
        stores.put(store, "v", failing)
    stores.put(store, "v", lk.open(store)["derived/v/v"] + 1)
    np.testing.assert_array_equal(lk.open(store)["derived/v/v"], [2.0])
