"""Making arrays in a store, with the room for them and the metadata that readers find."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.core.sync import sync
from zarr.errors import ZarrUserWarning

from lkarray.errors import StoreError
from lkarray.schema import VariableSpec
from lkarray.store.chunks import flush
from lkarray.store.location import describe, local_path, writing
from lkarray.store.nodes import WRITE_ALL, stored_at
from lkarray.store.objects import UrlStore

#: Bit flips pass raw and zstd chunks unseen, and zstd halves the speed of reading.
CODECS = (Crc32cCodec(),)


def create_array(
    group: zarr.Group,
    spec: VariableSpec,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    *,
    dtype: Any = None,
    fill: Any = None,
    attrs: Mapping[str, Any] | None = None,
) -> zarr.Array:
    """Create the array of ``spec``: NaN, zero or ``fill`` where nothing was written."""
    dtype = np.dtype(dtype or spec.dtype)
    if fill is None:
        fill = np.nan if dtype.kind == "f" else 0
    return group.create_array(
        spec.name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=dtype.type(fill),
        compressors=CODECS,
        dimension_names=spec.dims,
        attributes=spec.attrs() | dict(attrs or {}),
        config=WRITE_ALL,
    )


def create_coord(group: zarr.Group, name: str, values: np.ndarray, dim: str) -> None:
    """Write a coordinate of one dim, whole."""
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=values.shape,
        dtype=str if values.dtype.kind == "T" else values.dtype,
        compressors=CODECS,
        dimension_names=(dim,),
        config=WRITE_ALL,
    )
    array[:] = values


def listed(store: Store) -> list[str]:
    """Return the names at a store's top, of groups without metadata too."""

    async def names() -> list[str]:
        return [name async for name in store.list_dir("")]

    return sync(names())


def finish(root: zarr.Group) -> None:
    """Consolidate the metadata, so that plain readers open the store in one read."""
    if root.store.supports_consolidated_metadata:
        with writing(root.store, safe="Every draw is stored"), warnings.catch_warnings():
            # Zarr warns that version 3 leaves it unspecified; readers without it just ignore it.
            warnings.simplefilter("ignore", ZarrUserWarning)
            zarr.consolidate_metadata(root.store, zarr_format=3)
            flush(root.store, ["zarr.json"])


def stored(root: zarr.Group, group: str, spec: VariableSpec) -> zarr.Array:
    """Return the stored array of ``spec``, which writes chunks of nothing but zeros too."""
    return stored_at(root, f"{group}/{spec.name}")


def require_space(store: Store, needed: int) -> None:
    """Raise `StoreError` unless the disk of a local store has ``needed`` bytes free.

    Object storage has space, and is asked for the right to write.
    """
    folder = local_path(store)
    if folder is None:
        if isinstance(store, UrlStore):
            with writing(store, safe="Nothing was computed"):
                store.probe()
        return
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(
            f"{describe(store)} would grow by {needed / 1e9:.2f} GB, but the disk has "
            f"{free / 1e9:.2f} GB free; observe fewer samples, take fewer draws, or choose "
            "another disk"
        )
