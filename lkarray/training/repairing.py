"""`repair_trace`: states of a recorded run that were lost, taken again from those that are left."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import zarr
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync

from lkarray import store as stores
from lkarray.store import trace_layout, trajectory
from lkarray.store.chunks import chunk_keys, flush
from lkarray.store.location import address, create_root, writing
from lkarray.store.nodes import stored_at
from lkarray.store.trace_digests import block_problems, digests_of
from lkarray.training.replay import Replay
from lkarray.training.trace import Trace

#: A row of an array, by the array's path below the trajectory's group.
_Rows = dict[str, dict[int, np.ndarray]]


def repair_trace(trace: Trace) -> list[str]:
    """Take lost states of a recorded run again, and store those that are what was committed.

    Parameters and denominators of steps, and states of the optimizer that ``record(every=k)``
    kept, follow from a state before them and the recorded batches. What the steps arrive at is
    stored only if it has the checksum of what was committed, to the last bit; so this wants the
    device, threads and torch version of the recording.

    Parameters
    ----------
    trace
        What `open_trace` returned; batches, rates and the first state must be whole for that.

    Returns
    -------
    list of str
        Arrays and steps that were stored again. `lkarray.verify` tells what is still amiss.

    Raises
    ------
    ValueError
        The trace has no checksums, as those of lkarray 0.1.0.
    LockedError
        It is being written to.

    Notes
    -----
    Costs the steps from the last whole state to the lost one: with ``every=1``, where the
    optimizer's state is kept before the first step only, all steps before it.
    """
    target = stores.as_store(address(trace.root.store))
    with stores.writer_lock(target):
        root = create_root(target)
        if digests_of(root) is None:
            raise ValueError(f"{trace.where} has no checksums to compare with; record it again")
        _, block = trajectory.every_and_block(root)
        repaired = []
        for number in range(-(-trace.steps // block)):
            rows = slice(number * block, min((number + 1) * block, trace.steps))
            if any(True for _ in _faults(root, trace, number, rows)):
                repaired += _repair(root, trace, number, rows)
        stores.finish(root)
    return repaired


def _faults(root: zarr.Group, trace: Trace, number: int, rows: slice) -> Iterator[str]:
    kept = trajectory.kept_states(trace.every, rows.start, rows.stop)
    for problem in block_problems(root, number, rows, kept):
        yield problem.path


def _repair(root: zarr.Group, trace: Trace, number: int, rows: slice) -> list[str]:
    """Take a block's states again; those that do not come out as committed are put back."""
    lost = {_array_of(path) for path in _faults(root, trace, number, rows)}
    taken = _per_step(trace, rows) if trace.every == 1 else _kept(trace, rows)
    before: dict[str, Buffer | None] = {}
    with writing(root.store, safe="What was whole is untouched"):
        for path in sorted(lost & set(taken)):
            array = stored_at(root, f"{trace_layout.ROOT}/{path}")
            for start, values in taken[path].items():
                keys = chunk_keys(array, (start // array.chunks[0],))
                before |= {key: _content(root, key) for key in keys}
                whole = _filled(array, values)
                array[start : start + len(whole)] = whole
                flush(root.store, keys)
        still = {_array_of(path) for path in _faults(root, trace, number, rows)}
        for key, content in before.items():
            if _array_of(key) in still:
                _put_back(root, key, content)
    done = sorted((lost & set(taken)) - still)
    return [f"{trace_layout.ROOT}/{p} of steps {rows.start} to {rows.stop - 1}" for p in done]


def _per_step(trace: Trace, rows: slice) -> _Rows:
    """Take all steps up to a block's last again; return its parameters and denominators."""
    replay = Replay(trace, 0, compare=False)
    theta, denominators = [], []
    for step in range(rows.start, rows.stop):
        theta.append(replay.until(step))
        replay.until(step + 1)
        denominators.append(replay.denominator())
    taken: _Rows = {trace_layout.PARAMETERS.name: {rows.start: np.stack(theta)}}
    known = [values for values in denominators if values is not None]
    if known:
        taken[trace_layout.DENOMINATOR.name] = {rows.start: np.stack(known)}
    return taken


def _kept(trace: Trace, rows: slice) -> _Rows:
    """Take the steps to a block's kept states again, from the last one of the block before."""
    taken: _Rows = {}
    kept = trajectory.kept_states(trace.every, rows.start, rows.stop)
    first = max(kept.start - 1, 0)
    replay = Replay(trace, first, compare=False)
    for number in kept:
        if number == first:  # the run's first state, from which all others follow
            continue
        replay.until(number * trace.every)
        for name, values in replay.state().items():
            inside = "" if name == trace_layout.PARAMETERS.name else "optimizer/"
            taken.setdefault(f"{inside}{name}", {})[number] = values[None]
    return taken


def _array_of(path: str) -> str:
    """Return the path below the trajectory's group of the array that a problem is of."""
    return path.removeprefix(f"{trace_layout.ROOT}/").partition("/c/")[0].partition(" of ")[0]


def _filled(array: zarr.Array, values: np.ndarray) -> np.ndarray:
    """Return rows as whole chunks, so that what is damaged need not be read to be replaced."""
    short = -len(values) % array.chunks[0]
    rest = np.full((short, *array.shape[1:]), array.fill_value, array.dtype)
    return np.concatenate([values, rest])


def _content(root: zarr.Group, key: str) -> Buffer | None:
    return sync(root.store.get(key, default_buffer_prototype()))


def _put_back(root: zarr.Group, key: str, content: Buffer | None) -> None:
    sync(root.store.delete(key) if content is None else root.store.set(key, content))
