"""How a training run is laid out in a store: its arrays, and the making of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from lkarray import schema
from lkarray.schema import PARAM, STEP, TENSOR, VariableSpec
from lkarray.store.arrays import CODECS, create_array, create_coord, require_space
from lkarray.store.chunks import flush_tree
from lkarray.store.location import StoreLike, as_store, create_root, enter, writing
from lkarray.store.names import make_group
from lkarray.store.nodes import group_at
from lkarray.store.seals import seal
from lkarray.store.trace_digests import DIGEST, create_digests

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

PER_STEP = (COEFFICIENTS, CLIP, BATCH, CLIP_VALUE, LOSS, NORM)
#: What is stored of the parameter tensors.
DESCRIBED = (schema.MODULE.name, schema.START.name, schema.STOP.name)

_OURS = {
    OPTIMIZER.split("/")[1],
    LAST.split("/")[1],
    TENSOR,
    "record",
    DIGEST.name,
    *DESCRIBED,
    *(
        spec.name
        for spec in (
            PARAMETERS,
            DENOMINATOR,
            DIAGONAL,
            COEFFICIENTS,
            CLIP,
            CLIP_VALUE,
            BATCH,
            LOSS,
            NORM,
        )
    ),
}


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
        group = make_group(root, ROOT, ours=_OURS)
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
        last.create_array("extra", shape=(2, 1), chunks=(1, 1), dtype=str, compressors=CODECS)
        names, modules, starts, stops = zip(*layout.tensors, strict=True)
        text = np.dtypes.StringDType()
        create_coord(group, TENSOR, np.asarray(names).astype(text), TENSOR)
        create_coord(group, schema.MODULE.name, np.asarray(modules).astype(text), TENSOR)
        create_coord(group, schema.START.name, np.asarray(starts, np.int64), TENSOR)
        create_coord(group, schema.STOP.name, np.asarray(stops, np.int64), TENSOR)
        spec = VariableSpec("record", ("count",), "int64", "", "committed steps, slot of the state")
        create_array(group, spec, (2,), (2,))[:] = 0  # so that a missing one is a fault
        _create_seals(root, layout)
        flush_tree(root.store, ROOT)
        enter(root, **{ROOT: dict(fingerprint)})
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


def _create_seals(root: zarr.Group, layout: TraceLayout) -> None:
    """Make what tells of damage: room for checksums of commits, and seals of the rest."""
    group, states, last = (group_at(root, path) for path in (ROOT, OPTIMIZER, LAST))
    growing = [spec.name for spec in (PARAMETERS, DENOMINATOR, *PER_STEP) if spec.name in group]
    paths = [*growing, DIAGONAL.name]
    paths += [f"{of.basename}/{name}" for of in (states, last) for name in sorted(of.array_keys())]
    create_digests(group, paths)
    seal(last, filling=list(last.array_keys()))
    seal(states, growing=list(states.array_keys()))
    seal(group, growing=[*growing, DIGEST.name], filling=["record"])
