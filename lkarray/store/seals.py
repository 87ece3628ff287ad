"""Seals: what a group must be like, kept beside it, so that any change of it is noticed.

Metadata is JSON without a checksum: one flipped bit in a fill value, a unit or ``nbeta`` is read
without a word. So the attributes of each group hold, under `SEAL`, a checksum of each other
attribute, and of each array in it the checksums of its metadata and, where it was written once
and for all, of its content (of the checksums that its chunks end in, in order). What the root
says of lkarray's own is sealed by itself (`location.enter`).

A seal is made anew whenever lkarray changes the group: when it is made, grows, or is finished.
Attributes that a user adds later are not sealed, and no fault.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from lkarray.errors import DamagedError
from lkarray.store.checksums import crc, json_digest
from lkarray.store.chunks import chunk_key, chunk_keys, stored_digests
from lkarray.store.location import describe
from lkarray.store.problems import Problem

SEAL = "lkarray_seal"
GROWS = ("shape",)  # of an array that grows; its length is held against the others'


def seal(
    group: zarr.Group, *, growing: Collection[str] = (), filling: Collection[str] = ()
) -> None:
    """Seal a group as it is.

    Parameters
    ----------
    group
        Of lkarray's, with its arrays directly below it.
    growing
        Names of arrays whose length and content go on changing: commits have digests of these.
    filling
        Names of arrays of which only the content does.
    """
    arrays = {
        name: _entry(array, grows=name in growing, fills=name in filling)
        for name, array in sorted(group.arrays())
    }
    attributes = {key: json_digest(value) for key, value in group.attrs.items() if key != SEAL}
    group.update_attributes({SEAL: {"arrays": arrays, "attributes": attributes}})


def add_to_seal(
    group: zarr.Group, attributes: Mapping[str, Any], *, growing: Collection[str] = ()
) -> None:
    """Set attributes of a group and seal them, and arrays that grow; the rest stays as sealed.

    A group without a seal, of lkarray 0.1.0, gets none.
    """
    added = dict(attributes)
    known = seal_of(group)
    if known is not None:
        arrays = {name: _entry(_array(group, name), grows=True) for name in growing}
        digests = {key: json_digest(value) for key, value in attributes.items()}
        added[SEAL] = {
            "arrays": known["arrays"] | arrays,
            "attributes": known["attributes"] | digests,
        }
    group.update_attributes(added)


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def _entry(array: zarr.Array, *, grows: bool = False, fills: bool = False) -> dict[str, Any]:
    if grows:
        return {"metadata": metadata_digest(array, without=GROWS), "grows": True}
    if fills:
        return {"metadata": metadata_digest(array)}
    return {"metadata": metadata_digest(array), "content": content_digest(array)}


def metadata_digest(array: zarr.Array, *, without: Collection[str] = ()) -> int:
    """Return a checksum of an array's stored metadata."""
    return digest_of(stored_metadata(array), without=without)


def digest_of(metadata: Mapping[str, Any], *, without: Collection[str] = ()) -> int:
    """Return a checksum of metadata as they were read."""
    kept = {key: value for key, value in metadata.items() if key not in without}
    if "shape" in without:  # what grows are chains, draws and steps, which come first
        kept["tail"] = metadata.get("shape", [])[2:]
    return json_digest(kept)


def stored_metadata(node: zarr.Array | zarr.Group) -> dict[str, Any]:
    """Return the metadata of a node as they are stored.

    Raises
    ------
    DamagedError
        They are missing or no JSON.
    """
    key = f"{node.path}/zarr.json".lstrip("/")
    buffer = sync(node.store.get(key, default_buffer_prototype()))
    try:
        metadata: dict[str, Any] = json.loads(buffer.to_bytes() if buffer is not None else b"")
    except ValueError as error:
        raise DamagedError(
            f"{describe(node.store)} is damaged: {key} cannot be read ({error}); restore it from a "
            "copy"
        ) from None
    return metadata


def content_digest(array: zarr.Array) -> int:
    """Return a checksum of what is stored of an array: of the checksums of its chunks, in order."""
    tails = stored_digests(array, chunk_keys(array))
    return crc(b"".join(tail if tail is not None else b"none" for tail in tails))


def seal_of(group: zarr.Group) -> dict[str, Any] | None:
    """Return a group's seal; ``None`` where it has none, as of lkarray 0.1.0."""
    seal = group.attrs.get(SEAL)
    return seal if isinstance(seal, dict) and {"arrays", "attributes"} <= set(seal) else None


def described(group: zarr.Group) -> dict[str, Any]:
    """Return the attributes of a group without its seal."""
    return {key: value for key, value in group.attrs.items() if key != SEAL}


def broken_seals(group: zarr.Group, *, contents: bool = True) -> Iterator[Problem]:
    """Yield what of a group differs from its seal; nothing where it has none.

    Without ``contents``, only attributes and metadata are compared, and no chunk is looked at.
    """
    known = seal_of(group)
    if known is None:
        return
    for key, digest in known["attributes"].items():
        if key not in group.attrs:
            yield Problem("missing", f"{group.path}/zarr.json", f"attribute {key!r} is gone")
        elif json_digest(group.attrs[key]) != digest:
            detail = f"attribute {key!r} was changed: it is {group.attrs[key]!r:.80}"
            yield Problem("mismatch", f"{group.path}/zarr.json", detail)
    for name, entry in known["arrays"].items():
        yield from _broken(group, name, entry, contents)


def _broken(
    group: zarr.Group, name: str, entry: dict[str, Any], contents: bool
) -> Iterator[Problem]:
    path = f"{group.path}/{name}"
    try:
        array = group[name]
        assert isinstance(array, zarr.Array)
        without = GROWS if entry.get("grows") else ()
        same = metadata_digest(array, without=without) == entry["metadata"]
    except KeyError:
        yield Problem("missing", f"{path}/zarr.json", "no such array")
        return
    except Exception as error:  # zarr names no common base for broken metadata
        yield Problem("corrupt", f"{path}/zarr.json", f"metadata cannot be read ({error})")
        return
    if not same:
        yield Problem("mismatch", f"{path}/zarr.json", "metadata were changed since it was sealed")
    elif contents and "content" in entry and content_digest(array) != entry["content"]:
        detail = "its chunks are not those that were written, or stand in each other's places"
        single = array.nchunks == 1
        at = chunk_key(array, (0,) * array.ndim) if single else path
        yield Problem("mismatch", at, detail)
