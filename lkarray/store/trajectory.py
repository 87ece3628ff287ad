"""Where a training run is stored, and when a step counts.

A step leaves one row in each array of ``/trajectory``; rows are buffered and written by blocks
of steps, as whole chunks. The state after the last step (parameters, and what the optimizer
carries) goes to the slot of ``/trajectory/last`` that the record does not name; all of it is
flushed, and only then the record ``[steps, slot]`` is replaced, which alone makes steps count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr

from lkarray import schema
from lkarray.schema import PARAM, STEP, TENSOR, VariableSpec
from lkarray.store.commit import chunk_keys, flush
from lkarray.store.layout import create_array, create_coord, require_space, stored_at
from lkarray.store.location import MARK, StoreLike, as_store, create_root, update_mark, writing

_ROOT = schema.TRAJECTORY
_OPTIMIZER, _LAST = f"{_ROOT}/optimizer", f"{_ROOT}/last"
SCALARS = "scalars"
#: Of a step and group of parameters: what the optimizer did, in the terms of `training.optimizers`.
UPDATE = ("learning_rate", "mu", "s", "q", "n", "coupled", "decoupled")
FIELDS = (*UPDATE, "weight_decay", "beta2")
_BLOCK_BYTES, _BLOCK_STEPS = 16 << 20, 256
_COMMIT_SECONDS, _COMMIT_SHARE = 30.0, 50.0
_PARAM_CHUNK = 1 << 22

PARAMETERS = VariableSpec("parameters", (STEP, PARAM), "float32", "", "parameters before the step")
DENOMINATOR = VariableSpec(
    "denominator", (STEP, PARAM), "float32", "", "what the step divides by: of Adam sqrt(v) + eps"
)
DIAGONAL = VariableSpec(
    "clip_diagonal", (STEP, PARAM), "float64", "", "factor of clipping by value, element by element"
)
COEFFICIENTS = VariableSpec(
    "coefficients", (STEP, "group", "field"), "float64", "", "scalars of the update, by group"
)
CLIP = VariableSpec("clip", (STEP, TENSOR), "float64", "", "factor that clipping gave the gradient")
CLIP_VALUE = VariableSpec(
    "clip_value", (STEP,), "float64", "", "bound of clipping by value, or inf"
)
BATCH = VariableSpec("batch", (STEP, "position"), "int64", "", "examples of the batch, -1 for none")
LOSS = VariableSpec(
    "loss", (STEP,), "float64", "nat", "mean loss of the batch, where it was checked"
)
NORM = VariableSpec(
    "gradient_norm", (STEP,), "float64", "", "norm of the batch gradient, unclipped"
)


@dataclass(frozen=True)
class TraceLayout:
    """What a trace has of each step.

    Attributes
    ----------
    tensors
        Name, module, first element and one beyond the last, of each parameter tensor.
    dtype
        Of the parameters.
    groups
        Number of the optimizer's parameter groups.
    every
        Steps from one stored state to the next.
    denominators
        Whether the optimizer divides by something that is stored.
    vectors, scalars
        What the optimizer carries for each element, and for each tensor.
    """

    tensors: Sequence[tuple[str, str, int, int]]
    dtype: str
    groups: int
    every: int
    denominators: bool
    vectors: Sequence[str]
    scalars: Sequence[str]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.tensors[-1][3]

    @property
    def block(self) -> int:
        """Steps of a block."""
        if self.every > 1:
            return _BLOCK_STEPS
        wide = self.size * np.dtype(self.dtype).itemsize
        return int(min(max(_BLOCK_BYTES // wide, 1), _BLOCK_STEPS))


@dataclass
class Row:
    """What one step leaves.

    ``state`` (vectors and scalars of the optimizer before the step, by name) only where it is kept.
    """

    values: Mapping[str, Any]
    state: Mapping[str, np.ndarray] | None = None
    diagonal: np.ndarray | None = None


def create_trace(
    path: StoreLike, layout: TraceLayout, fingerprint: Mapping[str, Any]
) -> zarr.Group:
    """Create ``/trajectory``, replacing one that was never finished being made; return the root."""
    root = create_root(as_store(path))
    block, size, tensors = layout.block, layout.size, len(layout.tensors)
    width = min(size, _PARAM_CHUNK)
    item = np.dtype(layout.dtype).itemsize
    require_space(root.store, item * size * (block + 3 * (1 + len(layout.vectors))))
    with writing(root.store):
        group = root.create_group(_ROOT, overwrite=True)
        kept = STEP if layout.every == 1 else "kept"
        rows = block if layout.every == 1 else 1
        spec = VariableSpec(PARAMETERS.name, (kept, PARAM), layout.dtype, "", PARAMETERS.doc)
        attrs = {"every": layout.every, "block": block}
        create_array(group, spec, (rows, size), (rows, width), attrs=attrs)
        if layout.denominators and layout.every == 1:
            create_array(group, DENOMINATOR, (block, size), (block, width), dtype=layout.dtype)
        shape = (block, layout.groups, len(FIELDS))
        create_array(group, COEFFICIENTS, shape, shape, attrs={"fields": list(FIELDS)})
        create_array(group, CLIP, (block, tensors), (block, tensors))
        create_array(group, BATCH, (block, 1), (block, 1024), fill=-1)
        for single in (CLIP_VALUE, LOSS, NORM):
            create_array(group, single, (block,), (block,))
        _create_states(root, layout, _OPTIMIZER, "kept", width)
        _create_states(root, layout, _LAST, "slot", width)
        spec = VariableSpec(
            PARAMETERS.name, ("slot", PARAM), layout.dtype, "", "after the last step"
        )
        last = root[_LAST]
        assert isinstance(last, zarr.Group)
        create_array(last, spec, (2, size), (1, width))
        # Learning rates and the scheduler's state, as JSON.
        last.create_array("extra", shape=(2, 1), chunks=(1, 1), dtype=str, compressors=None)
        names, modules, starts, stops = zip(*layout.tensors, strict=True)
        text = np.dtypes.StringDType()
        create_coord(group, TENSOR, np.asarray(names).astype(text), TENSOR)
        create_coord(group, schema.MODULE.name, np.asarray(modules).astype(text), TENSOR)
        create_coord(group, schema.START.name, np.asarray(starts, np.int64), TENSOR)
        create_coord(group, schema.STOP.name, np.asarray(stops, np.int64), TENSOR)
        spec = VariableSpec("record", ("field",), "int64", "", "committed steps, slot of the state")
        create_array(group, spec, (2,), (2,))
        update_mark(root, **{_ROOT: dict(fingerprint)})
    return root


def _create_states(root: zarr.Group, layout: TraceLayout, path: str, dim: str, width: int) -> None:
    group = root.create_group(path)
    count = 2 if dim == "slot" else 1
    for name in layout.vectors:
        spec = VariableSpec(name, (dim, PARAM), layout.dtype, "", f"{name} of the optimizer")
        create_array(group, spec, (count, layout.size), (1, width))
    if layout.scalars:
        shape = (len(layout.tensors), len(layout.scalars))
        spec = VariableSpec(SCALARS, (dim, TENSOR, "name"), "float64", "", "of each tensor")
        names = {"names": list(layout.scalars)}
        create_array(group, spec, (count, *shape), (1, *shape), attrs=names)


def trace_fingerprint(root: zarr.Group) -> dict[str, Any] | None:
    """Return what the trace in a store was made with, ``None`` if there is no trace."""
    return dict(root.attrs[MARK]).get(_ROOT)  # type: ignore[arg-type, return-value]


def read_steps(root: zarr.Group) -> tuple[int, int]:
    """Return the committed steps of a trace, and the slot of the state after them."""
    steps, slot = np.asarray(stored_at(root, f"{_ROOT}/record")[:]).tolist()
    return int(steps), int(slot)


def read_state(root: zarr.Group, path: str, row: int) -> dict[str, np.ndarray]:
    """Return the vectors and scalars of one state; missing ones are NaN."""
    group = root[path]
    assert isinstance(group, zarr.Group)
    return {name: np.asarray(array[row]) for name, array in group.arrays()}


def last_state(root: zarr.Group) -> dict[str, np.ndarray]:
    """Return the parameters after the last committed step, and the optimizer's state there."""
    return read_state(root, _LAST, read_steps(root)[1])


def kept_state(root: zarr.Group, row: int) -> dict[str, np.ndarray]:
    """Return the optimizer's state of the ``row``-th kept step."""
    return read_state(root, _OPTIMIZER, row)


def read_row(root: zarr.Group, step: int, every: int) -> dict[str, np.ndarray]:
    """Return the batch of one step, and the parameters before it where they are kept."""
    found = {BATCH.name: np.asarray(stored_at(root, f"{_ROOT}/{BATCH.name}")[step])}
    if step % every == 0:
        array = stored_at(root, f"{_ROOT}/{PARAMETERS.name}")
        found[PARAMETERS.name] = np.asarray(array[step // every])
    return found


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
        group = root[_ROOT]
        assert isinstance(group, zarr.Group)
        specs = [COEFFICIENTS, CLIP, BATCH, CLIP_VALUE, LOSS, NORM]
        if layout.every == 1:
            specs += [PARAMETERS] + [DENOMINATOR] * layout.denominators
        self._arrays = {s.name: stored_at(root, f"{_ROOT}/{s.name}") for s in specs}
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
            found = stored_at(root, f"{_ROOT}/{DIAGONAL.name}")[self._block.start : self.steps]
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
                    path = _ROOT if name == PARAMETERS.name else _OPTIMIZER
                    keys += _put(stored_at(root, f"{path}/{name}"), kept, values[None], kept)
            for name, values in state.items():
                array = stored_at(root, f"{_LAST}/{name}")
                array[slot] = values
                keys += chunk_keys(array, (slot,))
            flush(root.store, keys)
            record = stored_at(root, f"{_ROOT}/record")
            record[:] = [steps, slot]
            flush(root.store, chunk_keys(record, ()))
        return time.monotonic() - began

    def _made(self, spec: VariableSpec) -> zarr.Array:
        group = self._root[_ROOT]
        assert isinstance(group, zarr.Group)
        if spec.name not in group:
            block, size = self._layout.block, self._layout.size
            chunks = (block, min(size, _PARAM_CHUNK))
            create_array(group, spec, (block, size), chunks, fill=1)
        return stored_at(self._root, f"{_ROOT}/{spec.name}")


def _put(array: zarr.Array, start: int, values: np.ndarray, block: int) -> list[str]:
    """Write rows, enlarging the array as needed (by half again, as whole blocks)."""
    rows = array.chunks[0]
    need = start + len(values)
    length = array.shape[0] if need <= array.shape[0] else max(need, array.shape[0] * 3 // 2)
    length = -(-length // rows) * rows
    tail = tuple(max(n, v) for n, v in zip(array.shape[1:], values.shape[1:], strict=True))
    if (length, *tail) != array.shape:
        array.resize((length, *tail))
    array[(slice(start, need), *map(slice, values.shape[1:]))] = values
    return chunk_keys(array, (block,))
