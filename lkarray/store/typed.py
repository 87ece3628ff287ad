"""What Zarr gives without a type: attributes and names of dims."""

from __future__ import annotations

from typing import Any

import zarr


def attributes_of(node: zarr.Array | zarr.Group) -> dict[str, Any]:
    """Return the attributes of an array or group."""
    return dict(node.attrs)


def dims_of(array: zarr.Array) -> tuple[str, ...]:
    """Return the names of an array's dims; none where it has none."""
    names: Any = getattr(array.metadata, "dimension_names", None)
    return tuple(names or ())
