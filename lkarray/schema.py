"""Dims, variables and their specifications: the one place that names them.

Everything that reads or writes a store, a kernel or a neighbour table takes its dim
names, dtypes, units and documentation from here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
import xarray as xr

from lkarray.errors import SchemaError

CHAIN = "chain"
DRAW = "draw"
SAMPLE = "sample"
RANK = "rank"
COMPONENT = "component"
CHECKPOINT = "checkpoint"
TOKEN = "token"
QUERY = "query"
MODE = "mode"
TIME = "time"
EXAMPLE = "example"
PARAM = "param"
OUTPUT = "output"
TENSOR = "tensor"
PART = "part"
STEP = "step"
AUDIT = "audit"
GROUP = "group"
LAYER = "layer"
EPOCH = "epoch"
WINDOW = "window"

#: Of a neighbour table: which samples' losses do not vary, so that they have no neighbours.
CONSTANT = "constant"

LOSSES = "losses"
GRADIENTS = "gradients"
TRAJECTORY = "trajectory"
SAMPLE_STATS = "sample_stats"
OBSERVABLES = "observables"
FEATURES = "features"
STATE = "state"
COMMIT = "commit"

#: Dims over which every loss kernel is contracted.
POSTERIOR = (CHAIN, DRAW)
#: Dims of several runs in one tree; kernels keep them in step.
STACKED = (CHECKPOINT, COMPONENT)


def second(dim: Hashable) -> str:
    """Return the name of the second axis of a square kernel: ``sample`` -> ``sample_2``."""
    return f"{dim}_2"


@dataclass(frozen=True)
class VariableSpec:
    """What one variable must look like, and what it means."""

    name: str
    dims: tuple[str, ...]
    dtype: str
    units: str
    doc: str

    def attrs(self) -> dict[str, str]:
        """Return the attributes that the variable carries in a store."""
        return {"long_name": self.doc} | ({"units": self.units} if self.units else {})


LOSS = VariableSpec("loss", (CHAIN, DRAW, SAMPLE), "float32", "nat", "per-sample loss at a draw")
#: Outcomes: what a loss is a smooth function (the link) of, and which is nearer to Gaussian.
LOG_ODDS = VariableSpec(
    "log_odds", (CHAIN, DRAW, SAMPLE), "float32", "", "log-odds against the target at a draw"
)
RESIDUAL = VariableSpec(
    "residual", (CHAIN, DRAW, SAMPLE), "float32", "", "output minus target at a draw"
)
CENTER_LOSS = VariableSpec("center_loss", (SAMPLE,), "float32", "nat", "per-sample loss at w*")

#: Attribute of an outcome: the name of the function that makes the loss of it.
LINK = "link"

MINIBATCH_LOSS = VariableSpec(
    "minibatch_loss", POSTERIOR, "float32", "nat", "mean loss of the draw's minibatch"
)
GRADIENT_NORM = VariableSpec(
    "gradient_norm", POSTERIOR, "float32", "", "norm of the minibatch gradient of the mean loss"
)
DISTANCE = VariableSpec("distance", POSTERIOR, "float32", "", "Euclidean distance from w*")
STEP_SIZE = VariableSpec("step_size", POSTERIOR, "float32", "", "step size of the draw's step")
ACCEPTANCE = VariableSpec(
    "acceptance",
    POSTERIOR,
    "float32",
    "",
    "probability that a Metropolis test accepts the draw's step; NaN where it was not measured",
)
DIVERGED = VariableSpec("diverged", POSTERIOR, "bool", "", "the chain turned non-finite here")

PARAMETERS = VariableSpec(
    "parameters", (CHAIN, "slot", "param"), "float32", "", "sampler state, in two slots"
)
RECORD = VariableSpec(
    "record", (CHAIN, "field"), "int64", "", "committed draws, steps taken, slot of the state"
)
#: Of each chunk of a chain's state and open block, after the numbers of chain, draws and steps.
LATEST = VariableSpec(
    "latest", (CHAIN, "slot", "entry"), "uint32", "", "what a record counts, and its checksums"
)
BLOCKS = VariableSpec(
    "blocks", (CHAIN, "block", "piece"), "uint32", "", "checksums of the chunks of each full block"
)

GRADIENT = VariableSpec(
    "gradient", (TIME, EXAMPLE, PARAM), "float32", "nat", "gradient of an example's loss"
)
#: Of `lkarray.laplace`: inner products of features are the loss kernel of a Gaussian posterior.
FEATURE = VariableSpec(
    "feature", (MODE, SAMPLE), "float32", "", "whitened gradient of a sample's outcome"
)
LEARNING_RATE = VariableSpec(
    "learning_rate", (TIME,), "float64", "", "learning rate of the step taken at this time"
)
FACTOR = VariableSpec(
    "factor", (TIME, EXAMPLE, "element"), "float32", "", "factors of a loss gradient, side by side"
)
#: Where each named tensor lies along ``param``: its first element, and the one after its last.
START = VariableSpec("start", (TENSOR,), "int64", "", "first parameter of the tensor")
STOP = VariableSpec("stop", (TENSOR,), "int64", "", "one beyond the tensor's last parameter")
MODULE = VariableSpec("module", (TENSOR,), "T", "", "module that the tensor belongs to")

STATS = (MINIBATCH_LOSS, GRADIENT_NORM, DISTANCE, STEP_SIZE, ACCEPTANCE, DIVERGED)

#: Variables of each group of a sampled store.
GROUPS: dict[str, tuple[VariableSpec, ...]] = {
    LOSSES: (LOSS, CENTER_LOSS),
    SAMPLE_STATS: STATS,
    STATE: (PARAMETERS,),
    COMMIT: (RECORD, LATEST, BLOCKS),
}


def outcome(name: str, units: str = "") -> VariableSpec:
    """Return the spec of an outcome, of which a store may have others than the built-in ones."""
    for spec in (LOSS, LOG_ODDS, RESIDUAL):
        if spec.name == name:
            return spec
    return VariableSpec(name, LOSS.dims, "float32", units, f"outcome {name} at a draw")


def prediction(outcome: str) -> VariableSpec:
    """Return the spec of what the linear chain beside a chain predicts of an outcome."""
    units = LOSS.units if outcome == LOSS.name else ""
    doc = f"linear prediction of {outcome} minus its value at w*, from the control"
    return VariableSpec(f"{outcome}_prediction", LOSS.dims, "float32", units, doc)


def at_center(name: str) -> str:
    """Return the name of what has the values at w* of a loss or outcome."""
    return f"center_{name}"


def units_of(x: xr.DataArray) -> str:
    """Return the units of losses, or of an outcome; nothing for a pure number."""
    outcome = LINK in x.attrs or x.name in (LOG_ODDS.name, RESIDUAL.name)
    return str(x.attrs.get("units", "")) if outcome else LOSS.units


def product_units(x: xr.DataArray, y: xr.DataArray | None = None) -> str:
    """Return the units of products of losses or outcomes: ``"1"`` of pure numbers."""
    one, other = units_of(x), units_of(x if y is None else y)
    if one == other:
        return f"{one}^2" if one else "1"
    return f"{one} {other}".strip()


def center(spec: VariableSpec) -> VariableSpec:
    """Return the spec of the values at w* of a loss or an outcome."""
    if spec == LOSS:
        return CENTER_LOSS
    doc = f"{spec.doc.removesuffix(' at a draw')} at w*"
    return VariableSpec(at_center(spec.name), (SAMPLE,), spec.dtype, spec.units, doc)


def observable(name: str, shape: tuple[int, ...], samples: int) -> VariableSpec:
    """Return the spec of an observable with ``shape`` at one draw.

    One with as many entries as there are observed samples is about these.
    """
    dims = tuple(f"{name}_dim{axis or ''}" for axis in range(len(shape)))
    if shape == (samples,):
        dims = (SAMPLE,)
    return VariableSpec(name, (*POSTERIOR, *dims), "float32", "", f"observable {name}")


#: Names that no label and no observable may take.
RESERVED = {
    CHAIN,
    DRAW,
    second(SAMPLE),
    RANK,
    COMPONENT,
    CHECKPOINT,
    TOKEN,
    QUERY,
    second(EXAMPLE),
    TIME,
    PARAM,
    TENSOR,
    "neighbor",
    "similarity",
} | {spec.name for spec in GROUPS[LOSSES]}


def validate(ds: xr.Dataset, specs: Iterable[VariableSpec], *, where: str) -> None:
    """Check that ``ds`` has each variable with its dims and kind of dtype."""
    for spec in specs:
        if spec.name not in ds:
            raise SchemaError(
                f"{where}: variable {spec.name!r} ({spec.doc}) is missing; "
                f"there are {sorted(map(str, ds.data_vars))}"
            )
        var = ds[spec.name]
        if var.dims[: len(spec.dims)] != spec.dims:
            raise SchemaError(
                f"{where}: variable {spec.name!r} has dims {var.dims}, expected {spec.dims}"
            )
        if var.dtype.kind != np.dtype(spec.dtype).kind:
            raise SchemaError(
                f"{where}: variable {spec.name!r} is {var.dtype}, expected {spec.dtype}"
            )
