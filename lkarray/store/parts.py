"""Parts of a store of several runs: each has a store of its own in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import zarr
from zarr.abc.store import Store

from lkarray.errors import StoreError
from lkarray.store.chunks import flush
from lkarray.store.layout import stored_fingerprint
from lkarray.store.location import (
    StoreLike,
    as_store,
    create_root,
    describe,
    enter,
    entries_of,
    inner_store,
    writing,
)


def parts_of(root: zarr.Group) -> dict[str, Any] | None:
    """Return what a store of several runs is made of: ``dim`` and ``labels``; or ``None``."""
    return entries_of(root).get("parts")


def create_parts(path: StoreLike, dim: str, labels: Sequence[Any]) -> zarr.Group:
    """Create a store of several runs, or add labels to one; each run has a store in it."""
    store = as_store(path)
    root = create_root(store)
    before = parts_of(root)
    if stored_fingerprint(root) is not None or (before and before["dim"] != dim):
        raise StoreError(
            f"{describe(store)} holds another kind of run; nothing was touched. Choose another path"
        )
    known = before["labels"] if before else []
    with writing(store):
        root.require_group(dim)
        flush(store, [f"{dim}/zarr.json"])
        enter(root, parts={"dim": dim, "labels": list(dict.fromkeys([*known, *labels]))})
    return root


def part_store(store: Store, dim: str, label: Any) -> Store:
    """Return the store of one run among several."""
    return inner_store(store, f"{dim}/{label}")
