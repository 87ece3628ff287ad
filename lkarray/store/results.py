"""Results under ``/derived`` and saved kernels elsewhere: which are finished, and their seals.

A kernel's group says from the start that it is not complete; that it is, and its seal, are
written last, when all that they imply is on the disk. What `put` writes is complete when it is in
its place. Kernels of lkarray 0.1.0 have no such mark: there, all chunks must be there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import zarr
from zarr.core.sync import sync

from lkarray.store.chunks import chunk_keys, flush, flush_tree, missing
from lkarray.store.location import local_path, sizes
from lkarray.store.names import DERIVED, SAVED, folders, names_in, own_group
from lkarray.store.problems import Problem
from lkarray.store.seals import SEAL, broken_seals, seal, seal_of
from lkarray.store.typed import attributes_of

COMPLETE = "complete"  # in what `SAVED` says


class Result(NamedTuple):
    """A stored result: its path, and what is wrong with it as a whole (``None``: nothing)."""

    path: str
    problem: Problem | None


def results(root: zarr.Group) -> list[Result]:
    """Return the results directly under ``/derived``, finished or not."""
    finished: list[Result] = []
    for name in folders(root.store, DERIVED):
        finished += _result(root, f"{DERIVED}/{name}")
    return finished


def derived_groups(root: zarr.Group) -> list[str]:
    """Return the paths of the finished results in the store."""
    return [path for path, problem in results(root) if problem is None]


def saved_elsewhere(root: zarr.Group) -> list[Result]:
    """Return the kernels that were saved in other groups, which `lkarray.open` does not show."""
    kernels: list[Result] = []

    def look(path: str) -> None:
        for name in folders(root.store, path):
            at = f"{path}/{name}".lstrip("/")
            if own_group(at):
                continue
            node = _node(root, at)
            if isinstance(node, zarr.Group):
                if SAVED in node.attrs:
                    kernels.extend(_result(root, at))
                else:
                    look(at)

    look("")
    return kernels


def _node(root: zarr.Group, path: str) -> zarr.Group | zarr.Array | Exception | None:
    try:
        return root[path]
    except KeyError:
        return None
    except Exception as error:  # zarr names no common base for broken metadata
        return error


def _result(root: zarr.Group, path: str) -> Iterator[Result]:
    node = _node(root, path)
    if isinstance(node, zarr.Group):
        yield Result(path, _whole(node))
    elif isinstance(node, Exception):
        detail = f"metadata cannot be read ({node})"
        yield Result(path, Problem("corrupt", f"{path}/zarr.json", detail))
    elif node is None and names_in(root.store, path):
        detail = "it holds something, but has no metadata"
        yield Result(path, Problem("missing", f"{path}/zarr.json", detail))


def _whole(group: zarr.Group) -> Problem | None:
    """Return what says that a group is not finished, or lost chunks since it was."""
    if is_unfinished(group):
        detail = "writing it was interrupted; the same lk.save goes on"
        return Problem("unfinished", group.path, detail)
    saved, old = SAVED in group.attrs, seal_of(group) is None
    if not saved and old:
        return None  # of another writer, or of lkarray 0.1.0's `put`, which moved it when whole
    try:
        lost = lost_chunks(group)
    except Exception as error:  # zarr names no common base for broken metadata
        return Problem("corrupt", group.path, f"metadata in it cannot be read ({error})")
    if lost and old:
        detail = f"{len(lost)} of its chunks are not stored, {lost[0]} first; lk.save goes on"
        return Problem("unfinished", group.path, detail)
    if lost:
        return Problem("missing", lost[0], f"{len(lost)} chunks of {group.path} are gone")
    return None


def is_unfinished(group: zarr.Group) -> bool:
    """Say whether a group is a kernel whose saving did not come to its end."""
    saved = attributes_of(group).get(SAVED)
    if not isinstance(saved, dict) or COMPLETE not in saved:
        return False
    return saved[COMPLETE] is not True or SEAL not in group.attrs


def wanted_chunks(array: zarr.Array) -> list[str]:
    """Return the keys of the chunks that an array has when it is whole."""
    keys = chunk_keys(array)
    if array.attrs.get("triangle") != "upper":
        return keys
    return [key for key in keys if not below_diagonal(key)]


def below_diagonal(key: str) -> bool:
    """Say whether a chunk lies below the diagonal of its last two dims."""
    i, j = map(int, key.split("/")[-2:])
    return i > j


def lost_chunks(group: zarr.Group) -> list[str]:
    """Return the keys of a group's chunks that are not stored."""
    keys = [key for _, array in sorted(group.arrays()) for key in wanted_chunks(array)]
    if local_path(group.store) is not None:
        return missing(group.store, keys)
    there = {key for key, size in sizes(group.store, f"{group.path}/") if size}
    return [key for key in keys if key not in there]


def complete(group: zarr.Group) -> None:
    """Mark a kernel as complete and seal it, when all of it is on the disk.

    The seal reads the last four bytes of each chunk: 10,000 chunks take some seconds.
    """
    flush_tree(group.store, group.path)
    saved = attributes_of(group)[SAVED]
    group.update_attributes({SAVED: saved | {COMPLETE: True}})
    seal(group)
    flush(group.store, [f"{group.path}/zarr.json"])


def broken(root: zarr.Group, path: str, faults: list[Problem]) -> Iterator[Problem]:
    """Yield what of a finished result differs from its seal, beyond the faults of its chunks."""
    group = root[path]
    assert isinstance(group, zarr.Group)
    for problem in broken_seals(group):
        if not any(fault.path.startswith(f"{problem.path}/c") for fault in faults):
            yield problem


def move(store: Any, old: str, new: str) -> None:
    """Put a finished group in the place of another, in a store that knows no renaming.

    The metadata go first and come last, so that a kill in between leaves nothing half done.
    """
    from zarr.core.buffer import default_buffer_prototype

    async def run() -> None:
        await store.delete(f"{new}/zarr.json")
        await store.delete_dir(new)
        keys = [key async for key in store.list_prefix(f"{old}/")]
        for key in sorted(keys, key=lambda key: key == f"{old}/zarr.json"):
            content = await store.get(key, default_buffer_prototype())
            await store.set(f"{new}/{key.removeprefix(f'{old}/')}", content)
        await store.delete_dir(old)

    sync(run())
