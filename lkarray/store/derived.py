"""Results kept beside the losses they came from, under ``/derived``."""

from __future__ import annotations

import xarray as xr

from lkarray.store.layout import CODECS, finish
from lkarray.store.location import StoreLike, open_root, writing
from lkarray.store.reading import DERIVED


def put(path: StoreLike, name: str, result: xr.Dataset | xr.DataArray) -> None:
    """Write a result to ``/derived/NAME``, replacing what was there; lazy ones are computed.

    Raises
    ------
    StoreError
        There is no store, or it cannot be written; the losses are not touched.
    """
    root = open_root(path, mode="r+")
    ds = result.to_dataset() if isinstance(result, xr.DataArray) else result
    encoding = {
        v: {**ds[v].encoding, "compressors": CODECS}
        for v in ds.variables
        if ds[v].dtype.kind in "fiub"
    }
    with writing(root.store, safe="The losses are not touched"):
        ds.to_zarr(
            root.store,
            group=f"{DERIVED}/{name}",
            mode="w",
            consolidated=False,
            zarr_format=3,
            encoding=encoding,
            write_empty_chunks=True,
        )
    finish(root)
