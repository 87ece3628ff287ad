"""What the engine does with damaged input and full disks."""

import numpy as np
import pytest
import xarray as xr

import lkarray as lk
from lkarray import errors
from tests.helpers.disks import own_disk, run_on
from tests.helpers.losses import numpy_correlation, random_losses


def damage(store, how):
    """Damage one chunk of the losses: chain 1, all draws, the first samples."""
    chunk = store / "losses/loss/c/1/0/0"
    if how == "corrupt":
        raw = bytearray(chunk.read_bytes())
        raw[7] ^= 1
        chunk.write_bytes(raw)
    elif how == "truncated":
        chunk.write_bytes(chunk.read_bytes()[:100])
    elif how == "empty":
        chunk.write_bytes(b"")
    else:
        chunk.unlink()


@pytest.mark.parametrize("how", ["corrupt", "truncated", "empty"])
@pytest.mark.parametrize("work", ["kernel", "neighbors", "svd", "cka"])
def test_damaged_chunk__is_named(store, how, work):
    damage(store, how)
    losses = lk.open(store)["losses"]["loss"]
    lazy = {
        "kernel": lambda: lk.correlation(losses),
        "neighbors": lambda: lk.neighbors(losses, 3),
        "svd": lambda: lk.svd(losses, 2, over=("chain", "draw")),
        "cka": lambda: lk.cka(losses, losses),
    }[work]()
    with pytest.raises(errors.DamagedError, match=r"'loss'.*chain=1:2, draw=0:.*lk.verify"):
        lazy.compute()


def test_missing_chunk__is_never_taken_for_losses(store):
    damage(store, "missing")
    losses = lk.open(store)["losses"]["loss"]
    with pytest.raises(errors.NonFiniteError, match=r"'chain': \[1\].*lk.verify"):
        lk.correlation(losses).compute()
    # the caller may drop that chain
    whole = losses.isel(chain=[0])
    np.testing.assert_allclose(lk.correlation(whole), numpy_correlation(whole), atol=1e-5)


def test_not_finite_draws__are_refused_until_they_are_dropped(rng):
    losses = random_losses(rng, chains=4)
    losses[2, 5:] = np.inf
    for function in (lk.correlation, lk.ledoit_wolf, lambda x: lk.group_mean(x, "label")):
        with pytest.raises(
            errors.NonFiniteError, match=r"'chain': \[2\], 'draw': \[5, 6, 7, 8, 9\]"
        ):
            function(losses).compute()
        function(losses.isel(chain=[0, 1, 3])).compute()


def test_other_draws__are_refused_with_the_first_difference(rng):
    losses = random_losses(rng).assign_coords(draw=np.arange(20))
    moved = losses.assign_coords(draw=np.arange(20) + 3)
    with pytest.raises(errors.SchemaError, match="'draw', first at position 0: 0 and 3"):
        lk.covariance(losses, moved)
    with pytest.raises(errors.SchemaError, match="20 and 19 entries along 'draw'"):
        lk.mcse(losses, losses.isel(draw=slice(19)))


CODE = """
import os, sys, zarr
import numpy as np, xarray as xr
import lkarray as lk
rng = np.random.default_rng(0)
x = xr.DataArray(rng.normal(size=(2, 30, 1500)).astype("f4"), dims=("chain", "draw", "sample"),
                 name="loss")
path = sys.argv[1] + "/k.zarr"
with open(sys.argv[1] + "/other", "wb") as file:
    file.write(bytes(5 << 20))
def kernel():
    return lk.correlation(x, memory="600 KiB")
try:
    lk.save(kernel(), path)
except lk.errors.StoreError as error:
    print("StoreError:", error)
before = sum(len(names) for _, _, names in os.walk(path))
os.remove(sys.argv[1] + "/other")
out = lk.save(kernel(), path)
print("resumed:", 3 < before, bool(np.allclose(out, kernel(), atol=1e-6)))
"""


@own_disk
def test_disk_full__is_said_and_the_save_goes_on_after_space_is_made(tmp_path):
    said = run_on(tmp_path, CODE, "-t tmpfs -o size=13m tmpfs").replace(chr(39), "")
    assert "StoreError: cannot write to" in said
    assert "the disk is full; free some space. Tiles that were written are kept" in said
    assert "resumed: True True" in said


def test_split__shares_few_tiles_among_many_workers(rng, tmp_path, local_cluster):
    """A PLGK of few examples is one tile: the workers share its contraction."""
    from distributed import Client

    values = rng.normal(size=(6, 40, 30_000)).astype("f4")
    stored = xr.DataArray(values, dims=("time", "example", "param"), name="g")
    stored.chunk(time=1, param=10_000).to_zarr(tmp_path / "g.zarr", consolidated=False)
    lazy = xr.open_dataarray(tmp_path / "g.zarr", engine="zarr", consolidated=False, chunks={})
    expected = np.einsum("tip,tjp->ij", values.astype("f8"), values)
    with Client(local_cluster) as client:
        client.wait_for_workers(2)
        kernel = lk.gram(lazy, over=("time", "param"))
        shares = [key for key in kernel.data.dask if isinstance(key, tuple) and "share" in key[0]]
        assert kernel.data.npartitions == 1
        assert len(shares) == 2
        np.testing.assert_allclose(kernel, expected, rtol=1e-3, atol=1e-2)
