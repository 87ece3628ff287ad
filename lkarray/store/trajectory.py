"""Where a training run is stored, and when a step counts.

A step leaves one row in each array of ``/trajectory``; rows are buffered and written by blocks
of steps, as whole chunks (`writing_trace`). The state after the last step (parameters, and what
the optimizer carries) goes to the slot of ``/trajectory/last`` that the record does not name; all
of it is flushed, and only then the record ``[steps, slot]`` is replaced, which alone makes steps
count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
import zarr

from lkarray import schema
from lkarray.checking import checked
from lkarray.schema import PARAM, STEP, TENSOR, VariableSpec
from lkarray.store.discarding import discard
from lkarray.store.layout import create_array, create_coord, require_space, stored_at
from lkarray.store.location import (
    MARK,
    StoreLike,
    as_store,
    create_root,
    update_mark,
    writing,
)
from lkarray.store.variables import variables

ROOT = schema.TRAJECTORY
OPTIMIZER, LAST = f"{ROOT}/optimizer", f"{ROOT}/last"
SCALARS = "scalars"
#: Of a step and group of parameters: what the optimizer did, in the terms of `training.optimizers`.
UPDATE = ("learning_rate", "mu", "s", "q", "n", "coupled", "decoupled")
FIELDS = (*UPDATE, "weight_decay", "beta2")
_BLOCK_BYTES, _BLOCK_STEPS = 16 << 20, 256
PARAM_CHUNK = 1 << 22

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


#: What is stored of the parameter tensors.
_DESCRIBED = (schema.MODULE.name, schema.START.name, schema.STOP.name)


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


def create_trace(
    path: StoreLike, layout: TraceLayout, fingerprint: Mapping[str, Any]
) -> zarr.Group:
    """Create ``/trajectory``, replacing one that was never finished being made; return the root."""
    root = create_root(as_store(path))
    block, size, tensors = layout.block, layout.size, len(layout.tensors)
    width = min(size, PARAM_CHUNK)
    item = np.dtype(layout.dtype).itemsize
    require_space(root.store, item * size * (block + 3 * (1 + len(layout.vectors))))
    with writing(root.store):
        group = root.create_group(ROOT, overwrite=True)
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
        _create_states(root, layout, OPTIMIZER, "kept", width)
        _create_states(root, layout, LAST, "slot", width)
        spec = VariableSpec(
            PARAMETERS.name, ("slot", PARAM), layout.dtype, "", "after the last step"
        )
        last = root[LAST]
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
        spec = VariableSpec("record", ("count",), "int64", "", "committed steps, slot of the state")
        create_array(group, spec, (2,), (2,))
        update_mark(root, **{ROOT: dict(fingerprint)})
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
    return dict(root.attrs[MARK]).get(ROOT)  # type: ignore[arg-type, return-value]


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
    """Return the committed steps of a trace, and the slot of the state after them."""
    steps, slot = np.asarray(stored_at(root, f"{ROOT}/record")[:]).tolist()
    return int(steps), int(slot)


def read_state(root: zarr.Group, path: str, row: int) -> dict[str, np.ndarray]:
    """Return the vectors and scalars of one state; missing ones are NaN."""
    group = root[path]
    assert isinstance(group, zarr.Group)
    return {name: np.asarray(array[row]) for name, array in group.arrays()}


def last_state(root: zarr.Group) -> dict[str, np.ndarray]:
    """Return the parameters after the last committed step, and the optimizer's state there."""
    return read_state(root, LAST, read_steps(root)[1])


def kept_state(root: zarr.Group, row: int) -> dict[str, np.ndarray]:
    """Return the optimizer's state of the ``row``-th kept step."""
    return read_state(root, OPTIMIZER, row)


def read_row(root: zarr.Group, step: int, every: int) -> dict[str, np.ndarray]:
    """Return the batch of one step, and the parameters before it where they are kept."""
    found = {BATCH.name: np.asarray(stored_at(root, f"{ROOT}/{BATCH.name}")[step])}
    if step % every == 0:
        array = stored_at(root, f"{ROOT}/{PARAMETERS.name}")
        found[PARAMETERS.name] = np.asarray(array[step // every])
    return found


def open_trajectory(root: zarr.Group) -> xr.Dataset:
    """Open the committed steps of a trace, lazily."""
    steps, _ = read_steps(root)
    every = int(stored_at(root, f"{ROOT}/{PARAMETERS.name}").attrs["every"])  # type: ignore[arg-type]
    lengths = {STEP: slice(steps), "kept": slice(-(-steps // every))}
    lazy = {PARAMETERS.name, DENOMINATOR.name, DIAGONAL.name}
    found = variables(root, ROOT, lazy=lazy, skip={"record"})
    for name, variable in found.items():
        found[name] = variable.isel(lengths, missing_dims="ignore")
    coords: dict[str, Any] = {STEP: np.arange(steps), "field": list(FIELDS)}
    if every > 1:
        coords["kept"] = np.arange(0, steps, every)
    return xr.Dataset(found).set_coords([*_DESCRIBED]).assign_coords(coords)


def committed_chunks(root: zarr.Group) -> Iterator[tuple[zarr.Array, tuple[int, ...]]]:
    """Yield the arrays of a trace, with the first indices of the chunks that must be there."""
    steps, slot = read_steps(root)
    group = root[ROOT]
    assert isinstance(group, zarr.Group)
    parameters = stored_at(root, f"{ROOT}/{PARAMETERS.name}")
    every, block = int(parameters.attrs["every"]), int(parameters.attrs["block"])  # type: ignore[arg-type]
    per_step = {COEFFICIENTS, CLIP, BATCH, CLIP_VALUE, LOSS, NORM} | (
        {PARAMETERS, DENOMINATOR} if every == 1 else set()
    )
    for spec in sorted(per_step, key=lambda spec: spec.name):
        if spec.name in group:
            array = stored_at(root, f"{ROOT}/{spec.name}")
            yield from ((array, (number,)) for number in range(-(-steps // block)))
    for kept in range(-(-steps // every) if every > 1 else 1):
        if every > 1:
            yield parameters, (kept,)
        yield from ((array, (kept,)) for array in _arrays(root, OPTIMIZER) if steps)
    yield from ((array, (slot,)) for array in _arrays(root, LAST) if steps)


def _arrays(root: zarr.Group, path: str) -> list[zarr.Array]:
    group = root[path]
    assert isinstance(group, zarr.Group)
    return [stored_at(root, f"{path}/{name}") for name in sorted(group.array_keys())]
