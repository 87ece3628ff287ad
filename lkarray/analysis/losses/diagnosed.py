"""What there is to diagnose in a tree or losses: tensors, statistics and settings, checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr

from lkarray import schema
from lkarray.analysis.losses import convergence
from lkarray.analysis.losses.verdicts import Run
from lkarray.errors import DivergedError, SchemaError
from lkarray.kernels.estimators import find_outcome
from lkarray.kernels.operands import free_dim
from lkarray.schema import CHAIN, DRAW, POSTERIOR
from lkarray.tensors import Losses, as_losses, losses_node

#: Dims along which there are several runs.
LEADING = (schema.CHECKPOINT, schema.COMPONENT)


@dataclass(frozen=True)
class Given:
    """What there is to diagnose."""

    losses: xr.DataArray
    outcomes: xr.DataArray | None
    center: xr.DataArray | None
    stats: xr.Dataset
    run: Run


def given_by(tree: Losses) -> Given:
    """Return losses, statistics and settings of whatever was given, checked."""
    stats, attrs, hidden = xr.Dataset(), getattr(tree, "attrs", {}), []
    center = None
    if isinstance(tree, xr.DataTree):
        node = losses_node(tree).to_dataset()
        losses, attrs = node[schema.LOSS.name], node.attrs
        center = node.get(schema.CENTER_LOSS.name)
        hidden = list(tree.attrs.get("hidden", []))
        if schema.SAMPLE_STATS in tree.children:
            whole = tree[schema.SAMPLE_STATS].to_dataset()
            used = (schema.DISTANCE, schema.ACCEPTANCE, schema.STEP_SIZE, schema.DIVERGED)
            stats = whole[[spec.name for spec in used if spec.name in whole]].compute()
    elif isinstance(tree, xr.Dataset) and schema.LOSS.name in tree:
        losses, center = tree[schema.LOSS.name], tree.get(schema.CENTER_LOSS.name)
    else:
        losses = tree if isinstance(tree, xr.DataArray) else as_losses(tree)
    first = losses.isel({dim: 0 for dim in LEADING if dim in losses.dims})
    free_dim(as_losses(_flat(first)), "losses", POSTERIOR, ())
    for dim in POSTERIOR:
        if stats.sizes.get(dim, losses.sizes[dim]) != losses.sizes[dim]:
            raise SchemaError(
                f"sample_stats has {stats.sizes[dim]} entries along {dim!r}, the losses have "
                f"{losses.sizes[dim]}; select from the whole tree, as tree.isel({dim}=...)"
            )
    if losses.sizes[DRAW] < convergence.LEAST_DRAWS:
        raise ValueError(
            f"diagnostics need at least {convergence.LEAST_DRAWS} draws of each chain, the losses "
            f"have {losses.sizes[DRAW]}; take more, for example lk.sample(..., draws=100)"
        )
    outcomes = None if isinstance(tree, xr.DataArray) else find_outcome(tree)
    if outcomes is not None:
        same = outcomes.name == losses.name or set(outcomes.dims) != set(losses.dims)
        # Where the outcome alone is given, it is what is diagnosed.
        outcomes = None if same else outcomes.transpose(*losses.dims)
    return Given(losses, outcomes, center, stats, Run.of(losses, attrs, hidden))


def turned_at(stats: xr.Dataset, x: xr.DataArray, leading: list[str]) -> xr.DataArray:
    """Return the position of the draw at which each chain turned non-finite, or -1.

    Of dims ``(*leading, chain)``.
    """
    dims = [*leading, CHAIN]
    out = xr.DataArray(np.full([x.sizes[dim] for dim in dims], -1), dims=dims)
    if schema.DIVERGED.name in stats:
        flags = xr.DataArray(stats[schema.DIVERGED.name].variable.astype(bool))
        out = xr.where(flags.any(DRAW), flags.argmax(DRAW), out).transpose(*dims)
    for place in places(x, leading):
        if bool((out.isel(place) >= 0).all()):
            raise DivergedError(
                f"every chain{f' of {place}' if place else ''} turned non-finite; sample into a "
                "new store with a smaller step size, or a larger gamma"
            )
    return out


def places(x: xr.DataArray, dims: list[str]) -> Iterator[dict[str, int]]:
    """Yield every place along some dims; one empty place along none."""
    for position in np.ndindex(*(x.sizes[dim] for dim in dims)):
        yield dict(zip(dims, position, strict=True))


def counted(x: xr.DataArray, padding: np.ndarray | None) -> xr.DataArray:
    """Return what counts of losses or outcomes, of one dim beside chains and draws."""
    flat = _flat(x)
    return flat if padding is None else flat[..., ~padding]


def _flat(x: xr.DataArray) -> xr.DataArray:
    """Return losses of tokens as losses of one dim, sample by sample; others as they are."""
    rows = [str(dim) for dim in x.dims if dim not in POSTERIOR]
    if len(rows) != 2 or schema.TOKEN not in rows or x.ndim != 4:
        return x
    # Of the variable: an index of all tokens would cost more than the report.
    flat = x.variable.transpose(*POSTERIOR, *rows).stack(entry=rows)
    return xr.DataArray(flat, name=x.name)


def padding_of(
    center: xr.DataArray | None, x: xr.DataArray, place: dict[str, int]
) -> np.ndarray | None:
    """Return which entries of `_flat` are padding: NaN at w*, or at every draw; ``None`` if none.

    The draws are read only where the losses at w* are not known.
    """
    rows = [str(dim) for dim in x.dims if dim not in POSTERIOR]
    if schema.TOKEN not in rows:
        return None
    if center is not None and schema.TOKEN in center.dims:
        missing = center.isel({dim: i for dim, i in place.items() if dim in center.dims}).isnull()
    else:
        missing = x.isnull().all(POSTERIOR)
    out: np.ndarray = missing.transpose(*rows).values.reshape(-1)
    if out.all():
        raise SchemaError("every loss is NaN, as padding is; there is nothing to diagnose")
    return out if out.any() else None


def spread(values: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """Return the figures of what counts at their places among all, NaN where there is padding."""
    out = np.full(len(padding), np.nan)
    out[~padding] = values
    return out
