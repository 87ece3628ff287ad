"""Arrays and groups of a store by their paths; what is missing or unreadable is named."""

from __future__ import annotations

import zarr
from zarr.core.array_spec import ArrayConfigParams

from lkarray.store.chunks import damaged

#: A chunk of nothing but zeros is written too, so that a missing one is always a fault.
WRITE_ALL: ArrayConfigParams = {"write_empty_chunks": True}


def stored_at(root: zarr.Group, path: str) -> zarr.Array:
    """Return the array at a path, likewise.

    Raises
    ------
    DamagedError
        Its metadata are missing, or cannot be read.
    """
    array = node_at(root, path)
    if not isinstance(array, zarr.Array):
        raise damaged(root.store, f"{path}/zarr.json is that of a group, not of an array")
    return array.with_config(WRITE_ALL)


def node_at(root: zarr.Group, path: str) -> zarr.Array | zarr.Group:
    """Return what is stored at a path.

    Raises
    ------
    DamagedError
        Its metadata are missing, or cannot be read.
    """
    try:
        return root[path]
    except (KeyError, FileNotFoundError):
        raise damaged(root.store, f"{path}/zarr.json is missing") from None
    except OSError:
        raise
    except Exception as error:  # zarr names no common base for broken metadata
        raise damaged(root.store, f"{path}/zarr.json cannot be read ({error})") from None


def group_at(root: zarr.Group, path: str) -> zarr.Group:
    """Return the group at a path; raises as `node_at`."""
    group = node_at(root, path)
    if not isinstance(group, zarr.Group):
        raise damaged(root.store, f"{path}/zarr.json is that of an array, not of a group")
    return group
