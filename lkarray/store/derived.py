"""Results kept beside the losses they came from, under ``/derived``."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import xarray as xr
import zarr
from zarr.abc.store import Store

from lkarray.errors import GroupError
from lkarray.store.arrays import finish
from lkarray.store.chunks import flush_tree
from lkarray.store.exact import require_exact, restored, storable
from lkarray.store.files import fsync
from lkarray.store.location import StoreLike, describe, is_sealed, local_path, open_root, writing
from lkarray.store.locking import writer_lock
from lkarray.store.names import DERIVED, HIDDEN, SAVED, check_name, names_in
from lkarray.store.objects import UrlStore
from lkarray.store.results import move
from lkarray.store.seals import seal, seal_of

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


def put(path: StoreLike, name: str, result: xr.Dataset | xr.DataArray) -> None:
    """Write a result to ``/derived/NAME``, replacing what it wrote there before.

    Lazy results are computed. The new result is written beside the old one, with a checksum of
    every chunk and a seal of the whole, and moved to its place once it is on the disk: it may be
    computed from the old one, and a failure or kill while it is written leaves the old one. On a
    local disk of Linux the two are exchanged in one move; elsewhere a kill during the move leaves
    neither in sight, and the result to be written again.

    Parameters
    ----------
    path
        A folder, a URL or a Zarr store, of lkarray's.
    name
        Of the result, without slashes.
    result
        A Dataset, or a DataArray with a name.

    Raises
    ------
    GroupError
        The name is none, or something that this did not write is there; nothing was touched.
    SchemaError
        A label or attribute cannot be stored as it is.
    StoreError
        There is no store, or it cannot be written; the losses are not touched.
    LockedError
        Another process is writing to the store.
    """
    check_name(name, "the name of a result,")
    root = open_root(path, mode="r+")
    given = result.to_dataset() if isinstance(result, xr.DataArray) else result
    ds, encoding = storable(given)
    store, group, hidden = root.store, f"{DERIVED}/{name}", f"{DERIVED}/{HIDDEN}{name}"
    with writer_lock(store), writing(store, safe="The losses are not touched"):
        _refuse_others(root, group, hidden)
        root.require_group(DERIVED)
        ds.to_zarr(
            store,
            group=hidden,
            mode="w",  # only ever of what an interrupted call left
            consolidated=False,
            zarr_format=3,
            encoding=encoding,
            write_empty_chunks=True,
        )
        stored = xr.open_zarr(store, group=hidden, chunks={}, consolidated=False)
        require_exact(restored(stored), given)
        node = root[hidden]
        assert isinstance(node, zarr.Group)
        seal(node)
        flush_tree(store, hidden)
        _move(store, hidden, group)
        finish(root)


def _refuse_others(root: zarr.Group, group: str, hidden: str) -> None:
    """Raise unless nothing is at a group, or what `put` wrote."""
    held, refused = names_in(root.store, group), ""
    node = root.get(group)
    if node is None:
        if held and root.get(hidden) is None:  # else a move that was interrupted
            refused = "files without metadata"
    elif not isinstance(node, zarr.Group):
        refused = "an array"
    elif SAVED in node.attrs:
        refused = "a kernel that lk.save wrote"
    elif any(True for _ in node.group_keys()):
        refused = "groups of its own"
    elif is_sealed(root) and seal_of(node) is None:
        refused = "something that another writer made"
    if refused:
        raise GroupError(
            f"{group} of {describe(root.store)} holds {refused}; nothing was touched. Choose "
            "another name for the result"
        )


def _move(store: Store, hidden: str, group: str) -> None:
    """Put a finished group in the place of another."""
    folder = local_path(store)
    if folder is not None:
        _replace(folder / hidden, folder / group)
    elif isinstance(store, UrlStore):
        store.move(hidden, group)
    else:
        move(store, hidden, group)


def _replace(new: Path, old: Path) -> None:
    """Put a finished folder in the place of another, and flush that it is there."""
    spent = old.with_name(f"{HIDDEN}{HIDDEN}{old.name}")  # no result's name begins so
    if not old.exists():
        new.replace(old)
    elif _exchange(new, old):
        spent = new
    else:
        shutil.rmtree(spent, ignore_errors=True)
        old.replace(spent)
        new.replace(old)
    fsync(old.parent)
    shutil.rmtree(spent, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one move; say whether the system can."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    return call is not None and not call(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE)
