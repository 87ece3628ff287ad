"""Comparing what something was made with to what is asked for now."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import zarr

from lkarray.errors import FingerprintError
from lkarray.store.location import StoreLike, as_store, describe, exists, open_root


def group_made_with(
    path: StoreLike,
    group: str,
    fingerprint: Mapping[str, Any],
    made: Callable[[zarr.Group], Mapping[str, Any]],
) -> zarr.Group | None:
    """Return the root of a store in which a group was begun; ``None`` if none was. Writes nothing.

    ``made`` gives the groups of a store, and what each was made with.

    Raises
    ------
    FingerprintError
        The group was made with something else.
    """
    store = as_store(path)
    root = open_root(store) if exists(store) else None
    before = None if root is None else made(root).get(group)
    if root is None or before is None:
        return None
    refuse_other_group(root, group, before, fingerprint)
    return root


def refuse_other_group(
    root: zarr.Group, group: str, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raise `FingerprintError` unless a group is to hold what it was made with."""
    where = f"{describe(root.store)}, group {group!r},"
    refuse_changes(before, now, where, remedy="give it a name= of its own")


def refuse_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], where: str, *, remedy: str
) -> None:
    """Raise `FingerprintError`, naming each field that differs, unless both are equal."""
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        lines = "; ".join(f"{k}: stored {before.get(k)!r}, now {now.get(k)!r}" for k in changed)
        raise FingerprintError(
            f"{where} holds a run made with other settings ({lines}). Nothing was touched: {remedy}"
        )


def hash_labels(labels: Mapping[str, np.ndarray]) -> str:
    """Return a hash of the labels of an observed set, by their names."""
    digest = hashlib.sha256()
    for name, values in sorted(labels.items()):
        digest.update(repr((name, values.tolist())).encode())
    return digest.hexdigest()[:16]
