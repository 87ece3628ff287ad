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
from lkarray.store.chunks import chunk_keys, flush
from lkarray.store.layout import create_array, stored_at
from lkarray.store.location import writing
from lkarray.store.trajectory import (
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
    read_steps,
)

_COMMIT_SECONDS, _COMMIT_SHARE = 30.0, 50.0


@dataclass
class Row:
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
    states: dict[int, Row] = field(default_factory=dict)
    diagonal: np.ndarray | None = None


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
    """

    def __init__(self, root: zarr.Group, layout: TraceLayout, executor: Executor) -> None:
        self._root, self._layout, self._executor = root, layout, executor
        group = root[ROOT]
        assert isinstance(group, zarr.Group)
        specs = [COEFFICIENTS, CLIP, BATCH, CLIP_VALUE, LOSS, NORM]
        if layout.every == 1:
            specs += [PARAMETERS] + [DENOMINATOR] * layout.denominators
        self._arrays = {s.name: stored_at(root, f"{ROOT}/{s.name}") for s in specs}
        self._pending: Future[float] | None = None
        self._last_commit, self._cost = time.monotonic(), 0.0
        self.steps, self._slot = read_steps(root)
        self.committed = self._handed = self.steps
        self._open(self.steps // layout.block * layout.block)
        kept = self.steps - self._block.start
        for name, array in self._arrays.items():
            if kept:
                part = np.asarray(array[self._block.start : self.steps])
                self._fit(name, part.shape)
                self._block.rows[name][(slice(kept), *map(slice, part.shape[1:]))] = part
        if kept and DIAGONAL.name in group:
            found = stored_at(root, f"{ROOT}/{DIAGONAL.name}")[self._block.start : self.steps]
            self._diagonal()[:kept] = found

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

    def append(self, row: Row) -> None:
        """Add a step; a full block must be committed first."""
        at = self.steps - self._block.start
        for name, value in row.values.items():
            if name == BATCH.name:
                self._fit(name, value.shape)
                self._block.rows[name][at, : len(value)] = value
            elif name in self._block.rows:
                self._block.rows[name][at] = value
        if row.state is not None:
            self._block.states[self.steps // self._layout.every] = row
        if row.diagonal is not None:
            self._diagonal()[at] = row.diagonal
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
        if not full:
            rows = {name: values.copy() for name, values in block.rows.items()}
            diagonal = None if block.diagonal is None else block.diagonal.copy()
            block = _Block(block.start, rows, block.states, diagonal)
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
        root, layout = self._root, self._layout
        safe = "The steps committed before are safe"
        with writing(root.store, safe=safe):
            keys: list[str] = []
            number = block.start // layout.block
            for name, values in block.rows.items():
                keys += _put(self._arrays[name], block.start, values, number)
            if block.diagonal is not None:
                keys += _put(self._made(DIAGONAL), block.start, block.diagonal, number)
            for kept, row in block.states.items():
                found = dict(row.state or {})
                if layout.every > 1:
                    found[PARAMETERS.name] = row.values[PARAMETERS.name]
                for name, values in found.items():
                    path = ROOT if name == PARAMETERS.name else OPTIMIZER
                    keys += _put(stored_at(root, f"{path}/{name}"), kept, values[None], kept)
            for name, values in state.items():
                array = stored_at(root, f"{LAST}/{name}")
                array[slot] = values
                keys += chunk_keys(array, (slot,))
            flush(root.store, keys)
            record = stored_at(root, f"{ROOT}/record")
            record[:] = [steps, slot]
            flush(root.store, chunk_keys(record, ()))
        return time.monotonic() - began

    def _made(self, spec: VariableSpec) -> zarr.Array:
        group = self._root[ROOT]
        assert isinstance(group, zarr.Group)
        if spec.name not in group:
            block, size = self._layout.block, self._layout.size
            chunks = (block, min(size, PARAM_CHUNK))
            create_array(group, spec, (block, size), chunks, fill=1)
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
    if (length, *tail) != array.shape:
        array.resize((length, *tail))
    array[(slice(start, need), *map(slice, values.shape[1:]))] = values
    return [*chunk_keys(array, (block,)), f"{array.path}/zarr.json"]
