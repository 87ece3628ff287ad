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

Losses = xr.DataTree | xr.Dataset | xr.DataArray


def contracted(x: xr.DataArray) -> tuple[str, ...]:
    """Return the dims that a kernel contracts: ``(chain, draw)``, or ``(mode,)`` of features.

    Features (`FEATURE`) stand for losses wherever only a kernel is asked for. Their kernel is the
    plain product: they are not centred, and nothing is divided by their number.
    """
    draws = any(dim in x.dims for dim in POSTERIOR)
    return (MODE,) if MODE in x.dims and not draws else POSTERIOR


def as_losses(
    obj: Losses, *, name: str = "losses", extra: tuple[str, ...] = (), features: bool = False
) -> xr.DataArray:
    """Return the loss tensor inside ``obj``, checked: ``(chain, draw)`` and one more dim.

    Parameters
    ----------
    obj
        A tree that has ``losses``, that node, a Dataset with ``loss`` (or with a single
        variable that has the dims), or the DataArray itself.
    name
        What to call ``obj`` in an error.
    extra
        Dims that it may have besides, of `STACKED` and `TOKEN`.
    features
        Whether features will do as well: dims ``mode`` and one more (see `contracted`).

    Raises
    ------
    TypeError
        ``obj`` is none of these.
    SchemaError
        No variable has the dims; the message lists what there is.
    """
    losses = _variable(obj, name)
    over = contracted(losses)
    if over != POSTERIOR:
        return _as_features(losses, name, over, features)
    free = [str(dim) for dim in losses.dims if dim not in (*POSTERIOR, *extra)]
    for dim, remedy in _REMEDIES.items():
        if dim in free and len(free) > 1:
            raise SchemaError(
                f"{name}: variable {losses.name!r} has dims {losses.dims}, and this takes one "
                f"{dim} at a time: {remedy}"
            )
    if any(dim not in losses.dims for dim in POSTERIOR) or len(free) != 1:
        raise SchemaError(
            f"{name}: variable {losses.name!r} has dims {losses.dims}, expected ('chain', 'draw') "
            f"and one more; rename or select, for example x.rename({{...}}) or x.isel(...)"
        )
    _refuse_empty(losses, name)
    return losses


def _as_features(x: xr.DataArray, name: str, over: tuple[str, ...], taken: bool) -> xr.DataArray:
    """Return features with the rows first, as they are stored; raise where they will not do."""
    free = [str(dim) for dim in x.dims if dim not in over]
    if not taken:
        raise SchemaError(
            f"{name}: variable {x.name!r} has dims {x.dims}: these are features, which have a "
            "kernel but no draws, and this is about draws; pass losses (chain, draw, sample)"
        )
    if len(free) != 1:
        raise SchemaError(
            f"{name}: features must have the dims {over} and one more, not {x.dims}; select, for "
            "example x.isel(half=0)"
        )
    _refuse_empty(x, name)
    return x.transpose(free[0], *over)


def _refuse_empty(x: xr.DataArray, name: str) -> None:
    empty = [dim for dim in x.dims if x.sizes[dim] == 0]
    if empty:
        raise SchemaError(
            f"{name}: variable {x.name!r} is empty along {empty}; there is nothing to compute from"
        )


#: What to do about a dim that a function does not take.
_REMEDIES = {
    CHECKPOINT: "select with .sel(checkpoint=...)",
    COMPONENT: "select with .sel(component=...)",
    TOKEN: "take .mean('token') for one loss a sequence, or .stack(position=('sample', 'token'))"
    ".reset_index('position').dropna('position') for one a token, without padding (NaN)",
}


def as_observable(obj: Losses, *, name: str) -> xr.DataArray:
    """Return a variable of dims ``(chain, draw)``, or these and one more; see `as_losses`."""
    variable = _variable(obj, name)
    return (
        variable
        if set(variable.dims) == set(POSTERIOR)
        else as_losses(obj, name=name, extra=STACKED, features=True)
    )


def _variable(obj: Losses, name: str) -> xr.DataArray:
    if isinstance(obj, xr.DataTree):
        try:
            obj = losses_node(obj, name=name).to_dataset()
        except SchemaError:
            if not obj.data_vars:
                raise
            obj = obj.to_dataset()
    if isinstance(obj, xr.Dataset):
        obj = _only_candidate(obj, name)
    if not isinstance(obj, xr.DataArray):
        raise TypeError(
            f"{name} must be a DataTree, Dataset or DataArray, not {type(obj).__name__}; "
            "pass tree['losses'], or wrap an array as "
            "xr.DataArray(values, dims=('chain', 'draw', 'sample'))"
        )
    if obj.dtype.kind not in "fiub":
        raise SchemaError(f"{name}: variable {obj.name!r} is {obj.dtype}, expected real numbers")
    return obj


def losses_node(tree: xr.DataTree, *, name: str = "tree") -> xr.DataTree:
    """Return the node that holds ``loss``: ``tree`` itself, or its child ``losses``."""
    if LOSS.name in tree.data_vars:
        return tree
    if LOSSES in tree.children:
        return tree.children[LOSSES]
    raise SchemaError(
        f"{name} has neither a variable 'loss' nor a group 'losses' "
        f"(groups: {sorted(tree.children)}, variables: {sorted(map(str, tree.data_vars))}); "
        "open a store with lk.open(path)"
    )


def _only_candidate(ds: xr.Dataset, name: str) -> xr.DataArray:
    for spec in (LOSS, FEATURE):
        if spec.name in ds.data_vars:
            return ds[spec.name]
    fits = [v for v in ds.data_vars if set(POSTERIOR) <= set(ds[v].dims)]
    if len(fits) != 1:
        variables = {str(v): ds[v].dims for v in ds.data_vars}
        raise SchemaError(
            f"{name}: expected a variable 'loss', or exactly one with dims 'chain' and 'draw'; "
            f"there are {variables}. Pass the DataArray you mean, for example ds['loss']"
        )
    return ds[fits[0]]


def as_gradients(obj: Losses, *, name: str = "G", need: tuple[str, ...] = (PARAM,)) -> xr.DataArray:
    """Return the gradient tensor inside ``obj``, checked: ``param``, and what else it needs.

    Parameters
    ----------
    obj
        A tree that has ``gradients``, that node, a Dataset with ``gradient`` (or with a single
        variable that has the dims), or the DataArray itself. ``learning_rate(time)`` stays
        beside it as a coordinate.
    name
        What to call ``obj`` in an error.
    need
        Dims that it must have.

    Raises
    ------
    TypeError
        ``obj`` is none of these, or not of real numbers.
    SchemaError
        No variable has the dims; the message lists what there is.
    """
    if isinstance(obj, xr.DataTree):
        node = obj if GRADIENT.name in obj.data_vars else obj.children.get(GRADIENTS)
        if node is None:
            raise SchemaError(
                f"{name} has neither a variable 'gradient' nor a group 'gradients' (groups: "
                f"{sorted(obj.children)}); write one with lk.gradient_features"
            )
        obj = node.to_dataset()
    if isinstance(obj, xr.Dataset):
        fits = [v for v in obj.data_vars if {PARAM, *need} <= set(obj[v].dims)]
        chosen = [GRADIENT.name] if GRADIENT.name in fits else fits
        if len(chosen) != 1:
            variables = {str(v): obj[v].dims for v in obj.data_vars}
            raise SchemaError(
                f"{name}: expected a variable 'gradient' with dims {need}; there are {variables}. "
                "Pass the DataArray you mean"
            )
        rate = obj.get(LEARNING_RATE.name)
        obj = obj[chosen[0]]
        if rate is not None and set(rate.dims) <= set(obj.dims):
            obj = obj.assign_coords({LEARNING_RATE.name: rate})
    if not isinstance(obj, xr.DataArray):
        raise TypeError(
            f"{name} must be a DataTree, Dataset or DataArray, not {type(obj).__name__}; pass what "
            "lk.gradient_features returned"
        )
    if obj.dtype.kind not in "fiub":
        raise SchemaError(f"{name}: variable {obj.name!r} is {obj.dtype}, expected real numbers")
    missing = [dim for dim in need if dim not in obj.dims]
    if missing:
        raise SchemaError(
            f"{name}: variable {obj.name!r} has dims {obj.dims}, which lack {missing}; rename, or "
            "do not select a single one"
        )
    _refuse_empty(obj, name)
    return obj


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
