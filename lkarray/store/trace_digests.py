"""Checksums of a trace's chunks, kept apart from them: what tells that they are those committed.

Each commit of a block leaves one row: the steps stored, and of each array the checksum of what the
block has of it. It is written to the slot of the state that the commit leaves, before the record
names that slot, so a kill never leaves a record without its row: of the two rows of a block, the
one that counts has the number of steps that the record has (or, of a block that is full, its end).

Rows of steps that a killed commit wrote beyond the record are no fault. So what is compared is not
what the chunk ends in but the committed rows as they are read, which also holds shapes and fill
values to what they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import zarr

from lkarray.errors import DamagedError
from lkarray.schema import TRAJECTORY, VariableSpec
from lkarray.store.arrays import create_array
from lkarray.store.checksums import crc
from lkarray.store.chunks import chunk_keys, damaged, digests, missing, read, stored_digests
from lkarray.store.nodes import stored_at
from lkarray.store.problems import Problem
from lkarray.store.typed import attributes_of, dims_of
from lkarray.store.verifying_pieces import chunk_problems

# Dims of its own, since plain readers open the group as one Dataset.
DIGEST = VariableSpec(
    "digest", ("block", "block_slot", "block_field"), "uint32", "", "checksums, by commit"
)
STEPS, PIECES = "steps", "pieces"
_LAST, _TEXT, _KEPT = "last/", "last/extra", "kept"
_BATCH = "batch"
_OTHERS = "is not what was committed: chunks stand in each other's places, or were replaced"

Row = Mapping[str, int]


def create_digests(group: zarr.Group, paths: Sequence[str]) -> None:
    """Create the array of checksums, of the arrays at some paths below the trace's group."""
    fields = [STEPS, PIECES, *paths]
    shape = (1, 2, len(fields))
    create_array(group, DIGEST, shape, (1, 1, len(fields)), attrs={"fields": fields})


def digests_of(root: zarr.Group) -> zarr.Array | None:
    """Return the array of checksums; lkarray 0.1.0 stored none."""
    path = f"{TRAJECTORY}/{DIGEST.name}"
    return stored_at(root, path) if path in root else None


def fields_of(array: zarr.Array) -> list[str]:
    """Return what the columns of a row of checksums are of."""
    return list(attributes_of(array)["fields"])


def chain(checksums: Sequence[int] | np.ndarray) -> int:
    """Return one checksum of several, in order; never 0, which stands for nothing stored."""
    return crc(np.asarray(checksums, "<u4").tobytes()) or 1


def rows_digest(array: zarr.Array, number: int, rows: np.ndarray, pieces: int) -> int:
    """Return the checksum of what a block has of an array of one row for each step."""
    return chain(digests(array, (number,), rows)[: pieces if _is_batch(array) else None])


def state_digests(array: zarr.Array, values: np.ndarray) -> np.ndarray:
    """Return the checksums of one row of an array whose chunks are one row long."""
    return digests(array, (0,), values)


def text_digest(array: zarr.Array, slot: int) -> int:
    """Return the checksum of a slot's text, as it is stored."""
    tails = stored_digests(array, chunk_keys(array, (slot,)))
    return chain([0 if tail is None else int.from_bytes(tail, "little") for tail in tails])


def pieces_of(array: zarr.Array, width: int) -> int:
    """Return the chunks next to each other that batches of some width take."""
    return max(-(-width // array.chunks[1]), 1)


def _is_batch(array: zarr.Array) -> bool:
    return array.name.endswith(f"/{_BATCH}")


def committed_row(root: zarr.Group, array: zarr.Array, number: int, steps: int) -> Row:
    """Return the checksums of a block of which ``steps`` (of the run) are committed.

    Raises
    ------
    DamagedError
        There is none of that many steps.
    """
    broken: DamagedError | None = None
    for slot in (0, 1) if number < array.shape[0] else ():
        try:
            row = read(array, (number, slot))
        except DamagedError as error:
            broken = error
            continue
        if int(row[0]) == steps:
            return dict(zip(fields_of(array), row.tolist(), strict=True))
    raise broken or damaged(
        root.store, f"{array.path} has no checksums of block {number} at {steps} steps"
    )


def block_pieces(root: zarr.Group, number: int, steps: int) -> int:
    """Return how many chunks next to each other the batches of a block take."""
    array = digests_of(root)
    batches = stored_at(root, f"{TRAJECTORY}/{_BATCH}")
    if array is None or batches.cdata_shape[1] == 1:
        return 1
    return int(committed_row(root, array, number, steps)[PIECES])


def block_problems(root: zarr.Group, number: int, rows: slice, kept: range) -> Iterator[Problem]:
    """Compare the committed steps of a block with their checksums.

    Parameters
    ----------
    root
        The store.
    number
        Of the block.
    rows
        Its committed steps.
    kept
        The kept states among them.
    """
    array = digests_of(root)
    if array is None:
        return
    row = committed_row(root, array, number, rows.stop)
    for path in fields_of(array)[2:]:
        if path.startswith(_LAST) or not row[path]:
            continue
        of = stored_at(root, f"{TRAJECTORY}/{path}")
        if dims_of(of)[:1] == (_KEPT,):
            yield from _kept(of, kept, row[path])
        else:
            yield from _steps(of, number, rows, row, row[path])


def _steps(
    array: zarr.Array, number: int, rows: slice, row: Row, expected: int
) -> Iterator[Problem]:
    pieces = row[PIECES] if _is_batch(array) else None
    place = (rows, slice(pieces * array.chunks[1])) if pieces else rows
    where = f"{array.path} of steps {rows.start} to {rows.stop - 1}"
    faults, values = _read(array, (number,), place, pieces)
    yield from faults
    if values is not None and rows_digest(array, number, values, row[PIECES]) != expected:
        yield Problem("mismatch", where, _OTHERS)


def _kept(array: zarr.Array, kept: range, expected: int) -> Iterator[Problem]:
    where = f"{array.path} of kept states {kept.start} to {kept.stop - 1}"
    checksums: list[int] = []
    whole = True
    for at in kept:
        faults, values = _read(array, (at,), at)
        yield from faults
        if values is None:
            whole = False
        else:
            checksums += state_digests(array, values).tolist()
    if whole and chain(checksums) != expected:
        yield Problem("mismatch", where, _OTHERS)


def _read(
    array: zarr.Array, leading: tuple[int], place: object, pieces: int | None = None
) -> tuple[list[Problem], np.ndarray | None]:
    """Return what the chunks below ``leading`` hold, or what is wrong with them."""
    if leading[0] >= array.cdata_shape[0]:
        return [Problem("mismatch", f"{array.path}/zarr.json", f"no chunk {leading[0]}")], None
    if missing(array.store, chunk_keys(array, leading)[:pieces]):
        return list(chunk_problems(array, leading, pieces=pieces)), None
    try:
        return [], read(array, place)
    except DamagedError as error:
        named = list(chunk_problems(array, leading, pieces=pieces))
        return named or [Problem("corrupt", array.path, str(error))], None


def state_problems(root: zarr.Group, steps: int, block: int, slot: int) -> Iterator[Problem]:
    """Compare the state after the last committed step with its checksums."""
    array = digests_of(root)
    if array is None or not steps:
        return
    row = committed_row(root, array, (steps - 1) // block, steps)
    for path in fields_of(array)[2:]:
        if not path.startswith(_LAST):
            continue
        of = stored_at(root, f"{TRAJECTORY}/{path}")
        faults, values = _read(of, (slot,), slot)
        yield from faults
        if values is None:
            continue
        checksum = text_digest(of, slot) if path == _TEXT else chain(state_digests(of, values))
        if checksum != row[path]:
            yield Problem(
                "mismatch", f"{of.path} of slot {slot}", "is not the state that was committed"
            )
