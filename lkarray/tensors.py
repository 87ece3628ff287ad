"""Tensors of losses, gradients and features in what users give: found there, and checked."""

from __future__ import annotations

import xarray as xr

from lkarray.errors import SchemaError
from lkarray.schema import (
    CHECKPOINT,
    COMPONENT,
    FEATURE,
    GRADIENT,
    GRADIENTS,
    LEARNING_RATE,
    LOSS,
    LOSSES,
    MODE,
    PARAM,
    POSTERIOR,
    STACKED,
    TOKEN,
)

Losses = xr.DataTree | xr.Dataset | xr.DataArray


def contracted(x: xr.DataArray) -> tuple[str, ...]:
    """Return the dims that a kernel contracts: ``(chain, draw)``, or ``(mode,)`` of features.

    Features (`FEATURE`) stand for losses wherever only a kernel is asked for. Their kernel is the
    plain product: they are not centred, and nothing is divided by their number.
    """
    draws = any(dim in x.dims for dim in POSTERIOR)
    return (MODE,) if MODE in x.dims and not draws else POSTERIOR


def is_prediction(x: xr.DataArray) -> bool:
    """Say whether a variable is what a control predicts of an outcome, rather than one."""
    return {"outcome", "law"} <= set(x.attrs) and set(POSTERIOR) <= set(x.dims)


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
    fits = [
        v for v in ds.data_vars if set(POSTERIOR) <= set(ds[v].dims) and not is_prediction(ds[v])
    ]
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
