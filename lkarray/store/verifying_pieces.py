"""The checks of single pieces: chunks, and groups with what their seals say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from lkarray.errors import DamagedError
from lkarray.store.checksums import crc
from lkarray.store.chunks import chunk_keys, chunk_size
from lkarray.store.nodes import node_at
from lkarray.store.problems import Problem
from lkarray.store.seals import broken_seals, seal_of, stored_metadata

_CRC_BYTES = 4

#: Keys of the metadata of a group.
METADATA = {"zarr_format", "node_type", "attributes", "consolidated_metadata"}


def chunk_problems(
    array: zarr.Array,
    leading: tuple[int, ...],
    *,
    optional: bool = False,
    pieces: int | None = None,
) -> Iterator[Problem]:
    """Check the chunks whose first indices are ``leading``: there, of full length, sound.

    ``pieces`` is how many of them there are, where not all that the shape has room for.
    """
    places = zip(chunk_keys(array, leading), _indices(array, leading), strict=True)
    for key, at in islice(places, pieces):
        outcome = check_chunk(array, key, at)
        if isinstance(outcome, Problem) and not (optional and outcome.kind == "missing"):
            yield outcome


def check_chunk(array: zarr.Array, key: str, at: tuple[int, ...]) -> Problem | int:
    """Return what is wrong with a chunk, or the checksum that it ends in."""
    size = chunk_size(array)
    buffer = sync(array.store.get(key, default_buffer_prototype()))
    if buffer is None:
        return Problem("missing", key, "the chunk was committed, but is not there")
    if len(buffer) == 0 or (size is not None and len(buffer) != size):
        of = "?" if size is None else size
        return Problem("truncated", key, f"{len(buffer)} of {of} bytes")
    content = buffer.to_bytes()
    ends = int.from_bytes(content[-_CRC_BYTES:], "little")
    if size is None or not array.compressors:
        try:
            array.blocks[at]
        except Exception as error:  # every codec raises its own
            return Problem("corrupt", key, (str(error) or repr(error)).splitlines()[0])
    elif crc(content[:-_CRC_BYTES]) != ends:
        return Problem("corrupt", key, "the chunk fails its checksum")
    return ends


def _indices(array: zarr.Array, leading: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for rest in np.ndindex(array.cdata_shape[len(leading) :]):
        yield (*leading, *rest)


def without_metadata(store: Store, path: str) -> bool:
    """Say whether a folder has content, but is no group and no array."""

    async def look() -> bool:
        if await store.exists(f"{path}/zarr.json"):
            return False
        return not await store.is_empty(path)

    return sync(look())


def guarded(path: str, find: Callable[[], Iterable[Problem]]) -> Iterator[Problem]:
    """Yield the problems that a search gives; what ends it is a problem too."""
    try:
        yield from find()
    except Exception as error:  # zarr names no common base for what is broken
        yield Problem("corrupt", path, (str(error) or repr(error)).splitlines()[0])


def group_problems(root: zarr.Group, path: str, *, sealed: bool) -> Iterator[Problem]:
    """Check a group's own metadata, and what its seal says, where it has one or must."""
    key = f"{path}/zarr.json"
    try:
        node = node_at(root, path)
        unknown = sorted(set(stored_metadata(node)) - METADATA)
    except DamagedError as error:
        yield unreadable(path, error)
        return
    if not isinstance(node, zarr.Group):
        yield Problem("mismatch", key, "expected a group, but it is an array")
        return
    if unknown:
        yield Problem("mismatch", key, f"unknown keys {unknown}")
    if sealed and seal_of(node) is None:
        yield Problem("missing", key, "its seal is gone")
    yield from broken_seals(node)


def unreadable(path: str, error: DamagedError) -> Problem:
    """Return what is wrong with metadata that cannot be read."""
    key, what = f"{path}/zarr.json", error.what or str(error)
    return Problem("missing" if what == f"{key} is missing" else "corrupt", key, what)


def misplaced(sealed: Iterable[Problem], faults: Iterable[Problem]) -> Iterator[Problem]:
    """Yield what a seal says of contents, but for arrays with faults of single chunks."""
    broken = [problem.path for problem in faults]
    for problem in sealed:
        if not problem.path.endswith("zarr.json"):
            of = problem.path.partition("/c/")[0]
            if not any(path.startswith(f"{of}/") for path in broken):
                yield problem
