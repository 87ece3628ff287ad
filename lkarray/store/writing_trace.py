"""Committing the steps of a training run; see `trajectory` for what is where."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr

from lkarray.schema import VariableSpec
from lkarray.store.arrays import create_array
from lkarray.store.chunks import chunk_keys, damaged, flush, missing, read
from lkarray.store.committed import require_seals
from lkarray.store.location import writing
from lkarray.store.nodes import group_at, stored_at
from lkarray.store.seals import add_to_seal, seal_of
from lkarray.store.trace_digests import (
    PIECES,
    STEPS,
    block_problems,
    chain,
    digests_of,
    fields_of,
    pieces_of,
    rows_digest,
    state_digests,
    state_problems,
    text_digest,
)
from lkarray.store.trace_layout import (
    BATCH,
    CLIP,
    CLIP_VALUE,
    COEFFICIENTS,
    DENOMINATOR,
    DIAGONAL,
    LAST,
    LOSS,
    NORM,
    OPTIMIZER,
    PARAM_CHUNK,
    PARAMETERS,
    ROOT,
    TraceLayout,
)
from lkarray.store.trajectory import committed_chunks, kept_states, read_steps, step_rows

#: Seconds between commits of an open block, and how much longer than a commit that must be.
_COMMIT_SECONDS, _COMMIT_SHARE = 30.0, 50.0


@dataclass
class StepValues:
    """What one step leaves.

    ``state`` (vectors and scalars of the optimizer before the step, by name) only where it is kept.
    """

    values: Mapping[str, Any]
    state: Mapping[str, np.ndarray] | None = None
    diagonal: np.ndarray | None = None


@dataclass
class _Block:
    start: int
    rows: dict[str, np.ndarray]
    states: dict[int, StepValues] = field(default_factory=dict)
    diagonal: np.ndarray | None = None
    #: Checksums of the block's kept states so far, by array.
    kept: dict[str, list[int]] = field(default_factory=dict)


class TraceWriter:
    """Buffers the steps of a run and commits them, beside the training.

    Parameters
    ----------
    root
        The store, open for writing.
    layout
        What a step leaves.
    executor
        Runs the writing. At most one commit is under way: memory is bounded by two blocks.

    Attributes
    ----------
    steps
        Steps held, committed or buffered.
    committed
        Steps committed, as of the opening.

    Raises
    ------
    DamagedError
        Something that was committed is missing, or not what was committed. Nothing is written.
    """

    def __init__(self, root: zarr.Group, layout: TraceLayout, executor: Executor) -> None:
        self._root, self._layout, self._executor = root, layout, executor
        require_seals(root, ROOT, OPTIMIZER, LAST)
        self.steps, self._slot = read_steps(root)
        _require_committed(root, layout, self.steps, self._slot)
        specs = [COEFFICIENTS, CLIP, BATCH, CLIP_VALUE, LOSS, NORM]
        if layout.every == 1:
            specs += [PARAMETERS] + [DENOMINATOR] * layout.denominators
        self._arrays = {s.name: stored_at(root, f"{ROOT}/{s.name}") for s in specs}
        self._digests = digests_of(root)
        self._pending: Future[float] | None = None
        self._last_commit, self._cost = time.monotonic(), 0.0
        self.committed = self._handed = self.steps
        self._open(self.steps // layout.block * layout.block)
        if self.steps > self._block.start:
            self._read_block()

    def _read_block(self) -> None:
        """Take what is committed of the open block to memory, since it is written as a whole."""
        root, start, kept = self._root, self._block.start, self.steps - self._block.start
        for name in self._arrays:
            values = step_rows(root, name, start, self.steps)
            self._fit(name, values.shape)
            self._block.rows[name][(slice(kept), *map(slice, values.shape[1:]))] = values
        if DIAGONAL.name in group_at(root, ROOT):
            self._diagonal()[:kept] = step_rows(root, DIAGONAL.name, start, self.steps)
        if self._digests is not None:
            for path in self._kept_paths:
                array = stored_at(root, f"{ROOT}/{path}")
                for row in kept_states(self._layout.every, start, self.steps):
                    checksums = state_digests(array, read(array, row))
                    self._block.kept.setdefault(path, []).extend(checksums)

    @property
    def _kept_paths(self) -> list[str]:
        if self._digests is None:
            return []
        kept = PARAMETERS.name if self._layout.every > 1 else ""
        return [p for p in fields_of(self._digests) if p == kept or p.startswith("optimizer/")]

    def _open(self, start: int) -> None:
        block = self._layout.block
        rows = {
            n: np.full((block, *a.shape[1:]), a.fill_value, a.dtype)
            for n, a in self._arrays.items()
        }
        self._block = _Block(start, rows)

    def _fit(self, name: str, shape: tuple[int, ...]) -> None:
        """Widen the buffer of batches to a larger batch."""
        before = self._block.rows[name]
        if name == BATCH.name and shape[-1] > before.shape[1]:
            wide = np.full((len(before), shape[-1]), -1, before.dtype)
            wide[:, : before.shape[1]] = before
            self._block.rows[name] = wide

    def _diagonal(self) -> np.ndarray:
        if self._block.diagonal is None:
            self._block.diagonal = np.ones((self._layout.block, self._layout.size))
        return self._block.diagonal

    def append(self, step: StepValues) -> None:
        """Add a step; a full block must be committed first."""
        place = self.steps - self._block.start
        for name, value in step.values.items():
            if name == BATCH.name:
                self._fit(name, value.shape)
                self._block.rows[name][place, : len(value)] = value
            elif name in self._block.rows:
                self._block.rows[name][place] = value
        if step.state is not None:
            self._block.states[self.steps // self._layout.every] = step
        if step.diagonal is not None:
            self._diagonal()[place] = step.diagonal
        self.steps += 1

    def due(self) -> bool:
        """Say whether it is time to commit."""
        if self.steps == self._block.start + self._layout.block:
            return True
        pause = max(_COMMIT_SECONDS, _COMMIT_SHARE * self._cost)
        return time.monotonic() - self._last_commit >= pause

    def commit(self, state: Mapping[str, np.ndarray]) -> None:
        """Hand everything so far to the writer, with the state after the last step.

        Raises
        ------
        StoreError
            This or an earlier commit could not be written.
        """
        self.wait()
        if self.steps == self._handed:
            return
        full = self.steps == self._block.start + self._layout.block
        block = self._block
        if not full:  # the loop goes on filling these buffers while the copies are written
            rows = {name: values.copy() for name, values in block.rows.items()}
            diagonal = None if block.diagonal is None else block.diagonal.copy()
            block = _Block(block.start, rows, block.states, diagonal, block.kept)
            self._block.states = {}
        self._slot = 1 - self._slot
        self._pending = self._executor.submit(self._write, block, self.steps, self._slot, state)
        self._handed, self._last_commit = self.steps, time.monotonic()
        if full:
            self._open(block.start + self._layout.block)

    def wait(self) -> None:
        """Wait until the commit under way is on disk."""
        if self._pending is not None:
            self._cost = self._pending.result()
            self._pending = None

    def _write(
        self, block: _Block, steps: int, slot: int, state: Mapping[str, np.ndarray]
    ) -> float:
        began = time.monotonic()
        root = self._root
        safe = "The steps committed before are safe"
        with writing(root.store, safe=safe):
            # The slot and the row of checksums written here are those that the record does not
            # name: until it is replaced, what counts is untouched.
            keys = self._write_block(block)
            for name, values in state.items():
                array = stored_at(root, f"{LAST}/{name}")
                array[slot] = values
                keys += chunk_keys(array, (slot,))
            keys += self._write_digests(block, steps, slot, state)
            flush(root.store, keys)  # before the record, which says that all of it is there
            record = stored_at(root, f"{ROOT}/record")
            record[:] = [steps, slot]
            flush(root.store, chunk_keys(record, ()))
        return time.monotonic() - began

    def _write_block(self, block: _Block) -> list[str]:
        """Write what the steps of a block left; return its keys."""
        root, layout = self._root, self._layout
        keys: list[str] = []
        number = block.start // layout.block
        for name, values in block.rows.items():
            keys += _put(self._arrays[name], block.start, values, number)
        if block.diagonal is not None:
            keys += _put(self._made(DIAGONAL), block.start, block.diagonal, number)
            keys += [f"{ROOT}/zarr.json", f"{ROOT}/{DIAGONAL.name}/zarr.json"]
        for kept, step in block.states.items():
            states = dict(step.state or {})
            if layout.every > 1:
                states[PARAMETERS.name] = step.values[PARAMETERS.name]
            for name, values in states.items():
                path = ROOT if name == PARAMETERS.name else OPTIMIZER
                array = stored_at(root, f"{path}/{name}")
                keys += _put(array, kept, values[None], kept)
                below = array.path.removeprefix(f"{ROOT}/")
                block.kept.setdefault(below, []).extend(state_digests(array, values))
        return keys

    def _write_digests(
        self, block: _Block, steps: int, slot: int, state: Mapping[str, np.ndarray]
    ) -> list[str]:
        """Write the checksums of a commit; return their key."""
        if self._digests is None:  # a store of lkarray 0.1.0
            return []
        root, number = self._root, block.start // self._layout.block
        pieces = pieces_of(self._arrays[BATCH.name], block.rows[BATCH.name].shape[1])
        row: dict[str, int] = {STEPS: steps, PIECES: pieces}
        for name, values in block.rows.items():
            row[name] = rows_digest(self._arrays[name], number, values, pieces)
        if block.diagonal is not None:
            array = stored_at(root, f"{ROOT}/{DIAGONAL.name}")
            row[DIAGONAL.name] = rows_digest(array, number, block.diagonal, pieces)
        row |= {path: chain(checksums) for path, checksums in block.kept.items()}
        for name, values in state.items():
            array = stored_at(root, f"{LAST}/{name}")
            text = values.dtype.kind == "T"
            checksum = text_digest(array, slot) if text else chain(state_digests(array, values))
            row[f"last/{name}"] = checksum
        length = self._digests.shape[0]
        metadata = []
        if number >= length:
            self._digests.resize((max(number + 1, length * 3 // 2), *self._digests.shape[1:]))
            metadata = [f"{self._digests.path}/zarr.json"]
        self._digests[number, slot] = [row.get(name, 0) for name in fields_of(self._digests)]
        return [*chunk_keys(self._digests, (number, slot)), *metadata]

    def _made(self, spec: VariableSpec) -> zarr.Array:
        group = group_at(self._root, ROOT)
        if spec.name not in group:
            block, size = self._layout.block, self._layout.size
            chunks = (block, min(size, PARAM_CHUNK))
            create_array(group, spec, (block, size), chunks, fill=1)
        if spec.name not in (seal_of(group) or {"arrays": [spec.name]})["arrays"]:
            add_to_seal(group, {}, growing=[spec.name])
        return stored_at(self._root, f"{ROOT}/{spec.name}")


def _put(array: zarr.Array, start: int, values: np.ndarray, block: int) -> list[str]:
    """Write rows, enlarging the array as needed (by half again, as whole blocks).

    Return the keys that were written.
    """
    rows = array.chunks[0]
    need = start + len(values)
    length = array.shape[0] if need <= array.shape[0] else max(need, array.shape[0] * 3 // 2)
    length = -(-length // rows) * rows
    tail = tuple(max(n, v) for n, v in zip(array.shape[1:], values.shape[1:], strict=True))
    metadata = []
    if (length, *tail) != array.shape:
        array.resize((length, *tail))
        metadata = [f"{array.path}/zarr.json"]
    array[(slice(start, need), *map(slice, values.shape[1:]))] = values
    return [*chunk_keys(array, (block,)), *metadata]


def _require_committed(root: zarr.Group, layout: TraceLayout, steps: int, slot: int) -> None:
    """Raise `DamagedError` unless all that is committed is there, and what goes on is sound."""
    for array, leading, pieces in committed_chunks(root) if steps else ():
        lost = missing(root.store, chunk_keys(array, leading)[:pieces])
        if lost:
            raise damaged(root.store, f"{lost[0]} was committed, but is missing or empty")
    start = steps // layout.block * layout.block
    kept = kept_states(layout.every, start, steps)
    faults = list(state_problems(root, steps, layout.block, slot))
    if steps > start:
        number = start // layout.block
        faults += block_problems(root, number, slice(start, steps), kept)
    if faults:
        raise damaged(root.store, f"{faults[0].path}: {faults[0].detail}")
