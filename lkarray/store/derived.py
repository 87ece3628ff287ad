"""Results kept beside the losses they came from, under ``/derived``."""

from __future__ import annotations

import shutil
from pathlib import Path

import xarray as xr

from lkarray.labels import require_storable
from lkarray.store.layout import CODECS, finish
from lkarray.store.location import StoreLike, local_path, open_root, writing
from lkarray.store.locking import writer_lock
from lkarray.store.objects import UrlStore
from lkarray.store.reading import DERIVED, HIDDEN


def put(path: StoreLike, name: str, result: xr.Dataset | xr.DataArray) -> None:
    """Write a result to ``/derived/NAME``, replacing what was there; lazy ones are computed.

    On a local disk and on object storage the new result is written beside the old one and moved
    to its place once it is whole: it may be computed from the old one, and a failure or kill
    while it is written leaves the old one (a kill during the move leaves neither in sight, and
    the result to be written again). Elsewhere it is written in place.

    Raises
    ------
    StoreError
        There is no store, or it cannot be written; the losses are not touched.
    LockedError
        Another process is writing to the store.
    SchemaError
        Text is missing in it (None, NaN): a store knows only empty text.
    """
    root = open_root(path, mode="r+")
    ds = result.to_dataset() if isinstance(result, xr.DataArray) else result
    ds = ds.drop_encoding()
    require_storable(ds)
    # Text of any length, as labels are stored: Zarr specifies no text of a fixed one.
    ds = ds.assign({name: ds[name].astype(object) for name in ds.variables
                    if ds[name].dtype.kind == "U"})  # fmt: skip
    encoding = {v: {"compressors": CODECS} for v in ds.variables if ds[v].dtype.kind in "fiub"}
    folder, store = local_path(root.store), root.store
    moves = folder is not None or isinstance(store, UrlStore)
    group = f"{DERIVED}/{HIDDEN}{name}" if moves else f"{DERIVED}/{name}"
    with writer_lock(store), writing(store, safe="The losses are not touched"):
        ds.to_zarr(
            store,
            group=group,
            mode="w",
            consolidated=False,
            zarr_format=3,
            encoding=encoding,
            write_empty_chunks=True,
        )
        if folder is not None:
            _replace(folder / group, folder / DERIVED / name)
        elif isinstance(store, UrlStore):
            store.move(group, f"{DERIVED}/{name}")
        finish(root)


def _replace(new: Path, old: Path) -> None:
    """Put a finished folder in the place of another."""
    spent = old.with_name(f"{HIDDEN}old-{old.name}")
    shutil.rmtree(spent, ignore_errors=True)
    if old.exists():
        old.replace(spent)
    new.replace(old)
    shutil.rmtree(spent, ignore_errors=True)
