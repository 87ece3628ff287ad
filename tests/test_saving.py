"""`lk.save`: resumable, idempotent, and honest about what is missing."""

import os
import signal
import subprocess
import sys
import time

import dask
import numpy as np
import pytest
import xarray as xr
from distributed import Client, LocalCluster
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import errors, saving
from tests.helpers.losses import numpy_correlation, random_losses


@pytest.fixture
def losses(rng):
    return random_losses(rng, chains=2, draws=8, samples=256)


def kernel_of(losses, **options):
    return lk.correlation(losses, memory="40 KiB", **options)


def counted(monkeypatch):
    """Count the tiles that saving computes."""
    tiles = []

    def compute(c, tile):
        tiles.append((tile.i, tile.j))
        return compute_tile(c, tile)

    compute_tile = saving.compute_tile
    monkeypatch.setattr(saving, "compute_tile", compute)
    return tiles


def chunk_files(path, group="derived/correlation"):
    return sorted((path / group / "correlation" / "c").glob("*/*"))


def test_save__stores_the_kernel_with_its_labels(tmp_path, losses):
    out = lk.save(kernel_of(losses), tmp_path / "k.zarr")
    np.testing.assert_allclose(out, numpy_correlation(losses), atol=1e-5)
    assert out.dims == ("sample", "sample_2")
    np.testing.assert_array_equal(out["label_2"], losses["label"])
    assert out.attrs["center"] == "pooled"
    blocks = kernel_of(losses).data.numblocks[0]
    assert len(chunk_files(tmp_path / "k.zarr")) == blocks**2 > 9


def test_save__goes_beside_the_losses_and_is_opened_with_them(store):
    tree = lk.open(store)
    lk.save(lk.covariance(tree["losses"]), store)
    again = lk.open(store)
    np.testing.assert_allclose(
        again["derived/covariance/covariance"], lk.covariance(tree["losses"]), rtol=1e-6
    )
    assert lk.verify(store) == []


def test_save__of_rectangular_kernels_and_of_arithmetic_on_them(tmp_path, losses):
    few = losses.isel(sample=slice(0, 40))
    out = lk.save(lk.influence(losses, few, memory="40 KiB"), tmp_path / "k.zarr", "bif")
    np.testing.assert_allclose(out, lk.influence(losses, few), rtol=1e-4, atol=1e-6)
    distance = (1 - kernel_of(losses)).rename("distance")
    out = lk.save(distance, tmp_path / "k.zarr")
    np.testing.assert_allclose(out, 1 - numpy_correlation(losses), atol=1e-5)


def test_save__one_kernel_for_each_entry_of_a_dim(rng):
    x = xr.DataArray(rng.normal(size=(3, 30, 50)), dims=("time", "example", "param"), name="g")
    out = lk.save(lk.gram(x, over="param", each="time"), MemoryStore(), "lgk")
    np.testing.assert_allclose(out, np.einsum("tip,tjp->tij", x, x))


def test_save__a_rerun_computes_only_what_is_missing(tmp_path, losses, monkeypatch):
    path = tmp_path / "k.zarr"
    first = lk.save(kernel_of(losses), path).values
    blocks = kernel_of(losses).data.numblocks[0]
    tiles = counted(monkeypatch)
    lk.save(kernel_of(losses), path)
    assert tiles == []
    lost = path / "derived/correlation/correlation/c/1/2"
    lost.unlink()
    holey = xr.open_zarr(path, group="derived/correlation", consolidated=False)["correlation"]
    assert np.isnan(holey).any()
    assert not (np.isnan(holey) & (first == 0)).all()
    short = lost.parents[1] / f"{blocks - 2}/{blocks - 1}"
    short.write_bytes(short.read_bytes()[:100])  # counts as missing
    np.testing.assert_array_equal(lk.save(kernel_of(losses), path), first)
    assert sorted(tiles) == [(1, 2), (blocks - 2, blocks - 1)]


def test_save__upper_leaves_the_lower_triangle_missing(tmp_path, losses):
    path = tmp_path / "k.zarr"
    out = lk.save(kernel_of(losses), path, upper=True).values
    expected = numpy_correlation(losses)
    seen = ~np.isnan(out)
    np.testing.assert_allclose(out[seen], expected[seen], atol=1e-5)
    assert seen[np.triu_indices(len(out))].all()
    assert not seen.all()
    assert lk.save(kernel_of(losses), path, upper=True) is not None
    with pytest.raises(errors.StoreError, match="upper"):
        lk.save(kernel_of(losses), path)
    with pytest.raises(errors.SchemaError, match="symmetric"):
        lk.save(1 - kernel_of(losses), tmp_path / "x.zarr", upper=True)


def test_verify__reads_a_kernel_that_stands_alone(tmp_path, losses):
    lk.save(kernel_of(losses), tmp_path / "k.zarr")
    lk.save(lk.covariance(losses), tmp_path / "k.zarr", "derived/half", upper=True)
    assert lk.verify(tmp_path / "k.zarr") == []
    first, second, *_ = chunk_files(tmp_path / "k.zarr")
    raw = bytearray(first.read_bytes())
    raw[7] ^= 1
    first.write_bytes(raw)
    second.unlink()
    assert [p.kind for p in lk.verify(tmp_path / "k.zarr")] == ["corrupt", "missing"]


def test_save__refuses_another_kernel_in_the_same_group(tmp_path, losses):
    path = tmp_path / "k.zarr"
    lk.save(kernel_of(losses), path)
    before = chunk_files(path)[0].read_bytes()
    with pytest.raises(errors.StoreError, match="holds another kernel.*attributes"):
        lk.save(kernel_of(losses, center="chain"), path)
    with pytest.raises(errors.StoreError, match="tiles of other data"):
        lk.save(kernel_of(losses**2), path)
    lk.save(lk.covariance(losses), path, "derived/other")
    with pytest.raises(errors.StoreError, match="another kernel"):
        lk.save(lk.covariance(losses), path, "derived/correlation")
    assert chunk_files(path)[0].read_bytes() == before


def test_save__goes_on_under_another_budget(tmp_path, losses, monkeypatch):
    path = tmp_path / "k.zarr"
    first = lk.save(kernel_of(losses), path).values
    (path / "derived/correlation/correlation/c/0/1").unlink()
    tiles = counted(monkeypatch)
    np.testing.assert_array_equal(lk.save(lk.correlation(losses, memory="1 MiB"), path), first)
    assert tiles == [(0, 1)]


def test_save__refuses_what_it_cannot_resume(tmp_path, losses):
    with pytest.raises(errors.SchemaError, match="in memory already"):
        lk.save(kernel_of(losses).compute(), tmp_path / "k.zarr")
    with pytest.raises(errors.SchemaError, match="no name"):
        lk.save(kernel_of(losses).rename(None), tmp_path / "k.zarr")
    with pytest.raises(errors.SchemaError, match="uneven"):
        lk.save(kernel_of(losses).isel(sample=slice(5, None)), tmp_path / "k.zarr")
    with pytest.raises(TypeError, match="neighbours"):
        lk.save(lk.neighbors(losses, 3), tmp_path / "k.zarr")
    assert not (tmp_path / "k.zarr").exists()


SLOW = """
import sys, time
import xarray as xr
import lkarray as lk
from lkarray import saving

compute = saving.compute_tile
def slow(c, tile):
    time.sleep(0.05)
    return compute(c, tile)
saving.compute_tile = slow
losses = xr.open_zarr(sys.argv[1], consolidated=False, chunks={})["loss"]
lk.save(lk.correlation(losses, memory="40 KiB"), sys.argv[2])
"""


@pytest.mark.minutes
def test_save__after_the_client_was_killed_equals_the_undisturbed(tmp_path, losses, monkeypatch):
    source, path = tmp_path / "l.zarr", tmp_path / "k.zarr"
    losses.chunk(sample=32).to_dataset().to_zarr(source, consolidated=False)
    lazy = xr.open_zarr(source, consolidated=False, chunks={})["loss"]
    whole = lk.save(kernel_of(lazy), tmp_path / "whole.zarr").values
    running = subprocess.Popen([sys.executable, "-c", SLOW, str(source), str(path)])
    while len(chunk_files(path)) < 5 and running.poll() is None:
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    done = len(chunk_files(path))
    blocks = kernel_of(lazy).data.numblocks[0]
    assert 5 <= done < blocks**2
    assert [p.kind for p in lk.verify(path)] == ["unfinished"]
    (said,) = lk.open(path).attrs["hidden"]
    assert "derived/correlation is left out" in said
    tiles = counted(monkeypatch)
    np.testing.assert_array_equal(lk.save(kernel_of(lazy), path), whole)
    assert len(tiles) < blocks * (blocks + 1) // 2


@pytest.mark.minutes
def test_save__survives_a_worker_that_is_killed(tmp_path, losses):
    source = tmp_path / "l.zarr"
    losses.chunk(sample=32).to_dataset().to_zarr(source, consolidated=False)
    lazy = xr.open_zarr(source, consolidated=False, chunks={})["loss"]
    with dask.config.set(scheduler="synchronous"):
        whole = lk.save(kernel_of(lazy), tmp_path / "whole.zarr").values
        near = lk.neighbors(lazy, 5, memory="60 KiB").compute()

    killer = f"""
import os, time
from lkarray.engine import contraction
compute = contraction.sum_pieces
def slow(*args):
    time.sleep(0.05)
    flag = {str(tmp_path / "killed")!r}
    if not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), 9)
    return compute(*args)
contraction.sum_pieces = slow
"""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        client.run(exec, killer, {})
        out = lk.save(kernel_of(lazy), tmp_path / "k.zarr").values
        assert (tmp_path / "killed").exists()
        np.testing.assert_allclose(out, whole, atol=1e-6)
        (tmp_path / "killed").unlink()
        client.run(exec, killer, {})
        again = lk.neighbors(lazy, 5, memory="60 KiB").compute()
        assert (tmp_path / "killed").exists()
        np.testing.assert_array_equal(again["neighbor"], near["neighbor"])


def test_plan__says_what_will_happen(losses):
    kernel = kernel_of(losses)
    plan = lk.plan(kernel)
    blocks = kernel.data.numblocks[0]
    assert plan.tiles == blocks * (blocks + 1) // 2
    assert plan.operations == 256**2 * 16
    assert plan.bytes_written == 256**2 * 4
    assert plan.side == kernel.chunks[0][0]
    assert plan.budget == 40 << 10
    for word in ("tiles", "operations in float32", "peak", "read at most"):
        assert word in str(plan)
    assert lk.plan(lk.neighbors(losses, 3)).bytes_written == 256 * (3 * 12 + 1)
    assert lk.plan(kernel.isel(sample=3)).tiles == plan.tiles
    with pytest.raises(ValueError, match="lazy kernel"):
        lk.plan(kernel.compute())


def test_save__into_memory_is_refused_on_a_cluster(losses):
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster),
        pytest.raises(errors.StoreError, match="cannot be written by Dask workers"),
    ):
        lk.save(kernel_of(losses), MemoryStore())
