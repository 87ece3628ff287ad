"""Is a training run all there, and what was computed from it? Faults, never an error of damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import zarr

from lkarray.errors import DamagedError
from lkarray.store import (
    audit_layout,
    audit_panels,
    features,
    gradients,
    trace_layout,
    trajectory,
)
from lkarray.store.chunks import chunk_key, chunk_keys, read, stored_digests, stored_numbers
from lkarray.store.committed import array_names
from lkarray.store.location import is_sealed
from lkarray.store.nodes import group_at, stored_at
from lkarray.store.problems import Problem
from lkarray.store.seals import broken_seals, seal_of
from lkarray.store.trace_digests import block_problems, chain, digests_of, state_problems
from lkarray.store.verifying_pieces import chunk_problems

_TRIES = 3  # of looking at what a writer goes on replacing


def trace_problems(root: zarr.Group) -> Iterator[Problem]:
    """Yield the faults of a store's training run."""
    yield from _steady(trace_layout.ROOT, lambda: _trace(root), lambda: trajectory.read_steps(root))


def gradient_problems(root: zarr.Group, group: str) -> Iterator[Problem]:
    """Yield the faults of a gradient tensor."""
    yield from _steady(
        group, lambda: _tensor(root, group), lambda: gradients.read_done(root, group).tolist()
    )


def feature_problems(root: zarr.Group) -> Iterator[Problem]:
    """Yield the faults of features."""
    yield from _steady(
        features.GROUP, lambda: _features(root), lambda: features.taken(root).tolist()
    )


def audit_problems(root: zarr.Group, group: str) -> Iterator[Problem]:
    """Yield the faults of an audit."""
    yield from _steady(
        group, lambda: _audit(root, group), lambda: audit_panels.read_records(root, group).tolist()
    )


def _steady(
    path: str, look: Callable[[], Iterator[Problem]], record: Callable[[], object]
) -> list[Problem]:
    """Return what a look finds; one during which a writer committed is taken again."""
    problems: list[Problem] = []
    for _ in range(_TRIES):
        unread: list[Problem] = []
        before = _told(path, record, unread)
        problems = []
        _told(path, partial(_gather, look, problems), problems)
        if not problems or unread:  # what is wrong with the record is told by the look, if it can
            return problems or unread
        if _told(path, record, unread) == before:
            break
    return problems


def _told(path: str, what: Callable[[], object], problems: list[Problem]) -> object:
    """Return what a call gives; what damage makes it raise is told as a problem."""
    try:
        return what()
    except DamagedError as error:
        problems.append(Problem("corrupt", path, str(error)))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zarr names no common base
        problems.append(Problem("corrupt", path, f"cannot be read ({error or repr(error)})"))
    return None


def _gather(look: Callable[[], Iterator[Problem]], into: list[Problem]) -> None:
    for problem in look():  # one by one, so that those before an error stay
        into.append(problem)


def _sealed(root: zarr.Group, path: str) -> list[Problem]:
    """Return what of a group differs from its seal, and the faults of arrays written whole."""
    group = group_at(root, path)
    known = seal_of(group)
    if known is None:
        gone = Problem("missing", f"{path}/zarr.json", "the seal is gone")
        return [gone] if is_sealed(root) else []
    problems = list(broken_seals(group))
    broken = {problem.path for problem in problems}
    for name, entry in known["arrays"].items():
        if "content" in entry and f"{path}/{name}/zarr.json" not in broken:
            problems += chunk_problems(stored_at(root, f"{path}/{name}"), ())
    return problems


def _unreadable(problems: list[Problem]) -> bool:
    """Say whether metadata are among the faults, so that there is no looking further."""
    return any(problem.path.endswith("zarr.json") for problem in problems)


def _trace(root: zarr.Group) -> Iterator[Problem]:
    groups = (trace_layout.ROOT, trace_layout.OPTIMIZER, trace_layout.LAST)
    faults = [problem for path in groups for problem in _sealed(root, path)]
    yield from faults
    if _unreadable(faults):
        return
    record = stored_at(root, f"{trace_layout.ROOT}/record")
    if digests_of(root) is None:
        for name in (*trace_layout.DESCRIBED, trace_layout.TENSOR):
            yield from chunk_problems(stored_at(root, f"{trace_layout.ROOT}/{name}"), ())
        for array, at, pieces in trajectory.committed_chunks(root):
            yield from chunk_problems(array, at, pieces=pieces)
        return
    faults = list(chunk_problems(record, ()))
    yield from faults
    if faults:
        return
    steps, slot = trajectory.read_steps(root)
    every, block = trajectory.every_and_block(root)
    for number in range(-(-steps // block)):
        start, stop = number * block, min((number + 1) * block, steps)
        try:
            kept = trajectory.kept_states(every, start, stop)
            yield from block_problems(root, number, slice(start, stop), kept)
        except DamagedError as error:
            yield Problem("mismatch", f"{trace_layout.ROOT}/digest", str(error))
    yield from state_problems(root, steps, block, slot)


def _tensor(root: zarr.Group, group: str) -> Iterator[Problem]:
    faults = _sealed(root, group)
    yield from faults
    if _unreadable(faults):
        return
    sums = gradients.digests_of(root, group)
    name = gradients.tensor_name(root, group)
    if sums is None:
        for label in array_names(group_at(root, group)):
            if label not in (name, gradients.DONE.name):
                yield from chunk_problems(stored_at(root, f"{group}/{label}"), ())
    else:
        faults = list(chunk_problems(stored_at(root, f"{group}/{gradients.DONE.name}"), ()))
        yield from faults
        if faults:
            return
    known: dict[int, np.ndarray | None] = {}
    for array, at in gradients.committed_shards(root, group):
        faults = list(chunk_problems(array, at))
        yield from faults
        if sums is None:
            continue
        if at[0] not in known:
            broken = list(chunk_problems(sums, at[:1]))
            yield from broken
            known[at[0]] = None if broken else read(sums, at[0])
        row = known[at[0]]
        if not faults and row is not None:
            yield from _differing(array, at, row[at[1]])


def _differing(array: zarr.Array, at: tuple[int, ...], row: np.ndarray) -> Iterator[Problem]:
    keys = chunk_keys(array, at)
    tails = stored_digests(array, keys)
    for key, tail, expected in zip(keys, tails, row.reshape(-1).tolist(), strict=True):
        if tail is None or int.from_bytes(tail, "little") != expected:
            yield Problem("mismatch", key, "is not the chunk that was committed")


def _features(root: zarr.Group) -> Iterator[Problem]:
    faults = _sealed(root, features.GROUP)
    yield from faults
    if _unreadable(faults):
        return
    record = stored_at(root, f"{features.GROUP}/{features.TAKEN.name}")
    faults = list(chunk_problems(record, ()))
    yield from faults
    if faults:
        return
    for block in features.committed_blocks(root):
        faults = [f for at in block.leading for f in chunk_problems(block.array, at)]
        yield from faults
        if not faults and not block.is_sound():
            detail = f"chunks of block {block.number} are not those that were committed"
            yield Problem("mismatch", block.array.path, detail)


def _audit(root: zarr.Group, group: str) -> Iterator[Problem]:
    faults = _sealed(root, group)
    yield from faults
    if _unreadable(faults):
        return
    record = stored_at(root, f"{group}/{audit_layout.RECORD.name}")
    if audit_panels.has_checksums(record):
        faults = list(chunk_problems(record, ())) or _of_others(record)
        yield from faults
        if faults:
            return
    else:
        for label in array_names(group_at(root, group)):
            if label not in (*audit_layout.RESULTS, audit_layout.RECORD.name):
                yield from chunk_problems(stored_at(root, f"{group}/{label}"), ())
    for array, panel, checksum in audit_panels.committed_panels(root, group):
        faults = [
            f for at in audit_panels.panel_leading(array, panel) for f in chunk_problems(array, at)
        ]
        yield from faults
        if checksum is None or faults:
            continue
        if chain(stored_numbers(array, audit_panels.panel_keys(array, panel))) != checksum:
            detail = f"chunks of panel {panel} are not those that were committed"
            yield Problem("mismatch", array.path, detail)
    yield from _passes(root, group)


def _of_others(record: zarr.Array) -> list[Problem]:
    """Return the records of an audit that are of other panels than they should be."""
    panels = read(record, (slice(None), audit_layout.FIELDS.index("panel"))).tolist()
    return [
        Problem("mismatch", chunk_key(record, (at, 0)), f"is the record of panel {panel}")
        for at, panel in enumerate(panels)
        if panel != at
    ]


def _passes(root: zarr.Group, group: str) -> Iterator[Problem]:
    """Check the states that panels which were cut off go on from."""
    for panel, row in enumerate(audit_panels.read_records(root, group).tolist()):
        if row[0] <= 0:
            continue
        path = f"{group}/{audit_layout.STATE}/{panel}/{row[1]}"
        try:
            state = audit_panels.read_pass(root, path)
            if len(row) > 2 and audit_panels.pass_digest(row[0], panel, state) != row[3]:
                yield Problem("mismatch", path, "is not the state that was left")
        except DamagedError as error:
            yield Problem("corrupt", path, str(error))
