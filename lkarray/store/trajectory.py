"""Where a training run is stored, and when a step counts.

A step leaves one row in each array of ``/trajectory``; rows are buffered and written by blocks
of steps, as whole chunks (`writing_trace`). The state after the last step (parameters, and what
the optimizer carries) goes to the slot of ``/trajectory/last`` that the record does not name, and
checksums of all of it to the same slot of the block (`trace_digests`); all of it is flushed, and
only then the record ``[steps, slot]`` is replaced, which alone makes steps count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr
import zarr

from lkarray.arguments import checked
from lkarray.schema import STEP
from lkarray.store.chunks import chunk_keys, damaged, missing, read, read_whole, require_chunks
from lkarray.store.committed import array_names, read_rows, reading
from lkarray.store.discarding import discard
from lkarray.store.location import StoreLike, entries_of
from lkarray.store.nodes import group_at, stored_at
from lkarray.store.trace_digests import DIGEST, block_pieces, committed_row, digests_of
from lkarray.store.trace_layout import (
    BATCH,
    COEFFICIENTS,
    DENOMINATOR,
    DESCRIBED,
    DIAGONAL,
    FIELDS,
    LAST,
    OPTIMIZER,
    PARAMETERS,
    PER_STEP,
    ROOT,
)
from lkarray.store.typed import attributes_of
from lkarray.store.variables import variables


def trace_fingerprint(root: zarr.Group) -> dict[str, Any] | None:
    """Return what the trace in a store was made with, ``None`` if there is no trace."""
    return entries_of(root).get(ROOT)


@checked()
def discard_trace(path: StoreLike) -> None:
    """Delete the recorded states of a training run; gradients and audits of it stay.

    A recorded run is as large as its model times its steps; what was computed from it, and stored
    beside it, opens without it. Killed halfway, the same call deletes the rest.

    Parameters
    ----------
    path
        A folder, a URL or a Zarr store.

    Raises
    ------
    StoreError
        There is no store of lkarray's.
    LockedError
        It is being written to.
    """
    discard(path, lambda name: name == ROOT, **{ROOT: None})


def read_steps(root: zarr.Group) -> tuple[int, int]:
    """Return the committed steps of a trace, and the slot of the state after them.

    Raises
    ------
    DamagedError
        The record is missing, or cannot be one.
    """
    array = stored_at(root, f"{ROOT}/record")
    if missing(root.store, chunk_keys(array)):
        # lkarray 0.1.0 wrote the first record after the first state, which went to slot 1.
        states = stored_at(root, f"{LAST}/{PARAMETERS.name}")
        if digests_of(root) is None and missing(root.store, chunk_keys(states, (0,))):
            return 0, 0
        raise damaged(root.store, f"{chunk_keys(array)[0]} was committed, but is missing or empty")
    steps, slot = read(array, ...).tolist()
    length = stored_at(root, f"{ROOT}/{COEFFICIENTS.name}").shape[0]
    if not 0 <= steps <= length or slot not in (0, 1):
        raise damaged(root.store, f"{array.path} says {steps} steps and slot {slot}")
    return int(steps), int(slot)


def every_and_block(root: zarr.Group) -> tuple[int, int]:
    """Return the steps from one stored state to the next, and those of a block."""
    array = stored_at(root, f"{ROOT}/{PARAMETERS.name}")
    with reading(root.store, f"{array.path}/zarr.json"):
        every, block = (int(attributes_of(array)[key]) for key in ("every", "block"))
        assert min(every, block) > 0
    return every, block


def kept_states(every: int, start: int, stop: int) -> range:
    """Return which kept states are of the steps from ``start`` to ``stop``."""
    if every == 1:  # the optimizer's, before the first step
        return range(0 if start else min(stop, 1))
    return range(-(-start // every), -(-stop // every))


def read_state(root: zarr.Group, path: str, place: int) -> dict[str, np.ndarray]:
    """Return the vectors and scalars of one state; what the optimizer lacked is NaN."""
    state = {}
    for array in _arrays(root, path):
        require_chunks(array, (place,))
        state[array.basename] = read(array, place)
    return state


def last_state(root: zarr.Group) -> dict[str, np.ndarray]:
    """Return the parameters after the last committed step, and the optimizer's state there."""
    return read_state(root, LAST, read_steps(root)[1])


def kept_state(root: zarr.Group, kept: int) -> dict[str, np.ndarray]:
    """Return the optimizer's state of the ``kept``-th kept step."""
    return read_state(root, OPTIMIZER, kept)


def kept_parameters(root: zarr.Group, kept: int) -> np.ndarray:
    """Return the parameters of the ``kept``-th kept step."""
    return np.asarray(read_rows(stored_at(root, f"{ROOT}/{PARAMETERS.name}"), kept, kept + 1)[0])


def step_rows(root: zarr.Group, name: str, start: int, stop: int) -> np.ndarray:
    """Return what is stored of each of some committed steps.

    Raises
    ------
    DamagedError
        A chunk of it is missing or cannot be read.
    """
    array = stored_at(root, f"{ROOT}/{name}")
    steps, _ = read_steps(root)
    for number in range(start // array.chunks[0], -(-stop // array.chunks[0])):
        _require(root, array, number, steps)
    values = read(array, slice(start, stop))
    if name == DIAGONAL.name and len(values) < stop - start:  # it ends where clipping did
        ones = np.ones((stop - start - len(values), array.shape[1]), array.dtype)
        values = np.concatenate([values, ones])
    return values


def _require(root: zarr.Group, array: zarr.Array, number: int, steps: int) -> None:
    """Raise `DamagedError` unless the chunks that a block has of an array of steps are there."""
    pieces = None
    stop = min((number + 1) * array.chunks[0], steps)
    if array.basename == BATCH.name:
        pieces = block_pieces(root, number, stop)
    if array.basename == DIAGONAL.name:
        rows = digests_of(root)
        if rows is None or not committed_row(root, rows, number, stop)[DIAGONAL.name]:
            return  # no gradient of this block was clipped so
    lost = missing(root.store, chunk_keys(array, (number,))[:pieces])
    if lost:
        raise damaged(root.store, f"{lost[0]} was committed, but is missing or empty")


def read_step(root: zarr.Group, step: int, every: int) -> dict[str, np.ndarray]:
    """Return the batch of one step, and the parameters before it where they are kept."""
    stored = {BATCH.name: step_rows(root, BATCH.name, step, step + 1)[0]}
    if step % every == 0:
        stored[PARAMETERS.name] = kept_parameters(root, step // every)
    return stored


def open_trajectory(root: zarr.Group) -> xr.Dataset:
    """Open the committed steps of a trace, lazily.

    Raises
    ------
    DamagedError
        Something of it is missing or cannot be read.
    """
    steps, _ = read_steps(root)
    every, _ = every_and_block(root)
    lengths = {STEP: slice(steps), "kept": slice(-(-steps // every))}

    def read_committed(array: zarr.Array) -> np.ndarray:
        if array.basename in {spec.name for spec in PER_STEP}:
            return step_rows(root, array.basename, 0, steps)
        return read_whole(array)

    arrays = variables(
        root,
        ROOT,
        lazy={PARAMETERS.name, DENOMINATOR.name},
        sparse={DIAGONAL.name},
        skip={"record", DIGEST.name},
        read=read_committed,
    )
    with reading(root.store, ROOT):
        for name, variable in arrays.items():
            arrays[name] = variable.isel(lengths, missing_dims="ignore")
        if DIAGONAL.name in arrays:  # it ends where clipping did
            short = max(steps - arrays[DIAGONAL.name].sizes[STEP], 0)
            arrays[DIAGONAL.name] = arrays[DIAGONAL.name].pad({STEP: (0, short)}, constant_values=1)
        coords: dict[str, Any] = {STEP: np.arange(steps), "field": list(FIELDS)}
        if every > 1:
            coords["kept"] = np.arange(0, steps, every)
        return xr.Dataset(arrays).set_coords([*DESCRIBED]).assign_coords(coords)


def committed_chunks(
    root: zarr.Group,
) -> Iterator[tuple[zarr.Array, tuple[int, ...], int | None]]:
    """Yield the arrays of a trace, with the first indices of the chunks that must be there.

    And how many chunks there are of these, where it is not all that the shape has room for.
    """
    steps, slot = read_steps(root)
    every, block = every_and_block(root)
    group = group_at(root, ROOT)
    names = {spec.name for spec in PER_STEP}
    names |= {PARAMETERS.name, DENOMINATOR.name} if every == 1 else set()
    for name in sorted(names):
        if name in group:
            array = stored_at(root, f"{ROOT}/{name}")
            for number in range(-(-steps // block)):
                batch = name == BATCH.name
                stop = min((number + 1) * block, steps)
                yield array, (number,), block_pieces(root, number, stop) if batch else None
    parameters = stored_at(root, f"{ROOT}/{PARAMETERS.name}")
    for kept in range(-(-steps // every) if every > 1 else 1):
        if every > 1:
            yield parameters, (kept,), None
        yield from ((array, (kept,), None) for array in _arrays(root, OPTIMIZER) if steps)
    yield from ((array, (slot,), None) for array in _arrays(root, LAST) if steps)


def _arrays(root: zarr.Group, path: str) -> list[zarr.Array]:
    return [stored_at(root, f"{path}/{name}") for name in array_names(group_at(root, path))]
