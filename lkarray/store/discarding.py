"""Deleting what is large of a store, so that what was computed from it still opens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zarr.core.sync import sync

from lkarray.store.arrays import finish, listed
from lkarray.store.location import StoreLike, as_store, enter, open_root, writing
from lkarray.store.locking import writer_lock


def discard(path: StoreLike, goes: Callable[[str], bool], **entries: Any) -> None:
    """Delete the groups at a store's top that ``goes`` names; their entries are set first.

    So a kill halfway leaves groups that nothing takes for whole, and the same call deletes them.
    """
    with writer_lock(as_store(path)):
        root = open_root(path, mode="r+")
        enter(root, **entries)
        with writing(root.store):
            for name in filter(goes, listed(root.store)):
                sync(root.store.delete_dir(name))
        finish(root)
