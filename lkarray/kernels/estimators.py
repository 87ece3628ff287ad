"""How a kernel of losses is estimated: from draws as they are, or from outcomes as Gaussian."""

from __future__ import annotations

from contextlib import suppress

import xarray as xr

from lkarray.engine import Series
from lkarray.errors import SchemaError
from lkarray.links import LINKS, Link, as_link
from lkarray.schema import LOG_ODDS, LOSS, POSTERIOR, RESIDUAL
from lkarray.tensors import Losses, as_losses, losses_node
from lkarray.values import one_of

ESTIMATORS = ("sample", "gaussian")
_REMEDY = (
    'record outcomes by lk.sample(..., outcomes=("loss", "log_odds")), or make them of '
    "cross-entropies by lk.log_odds(losses); of other losses give the outcome itself with its "
    'link: x.assign_attrs(link="square")'
)


def estimated(
    losses: Losses, estimator: str, *, name: str = "losses", extra: tuple[str, ...] = ()
) -> tuple[xr.DataArray, Link | None]:
    """Return the tensor that a kernel of losses is made from, and the link that makes losses of it.

    Parameters
    ----------
    losses
        As for `lkarray.tensors.as_losses`.
    estimator
        ``"sample"`` takes losses themselves (no link). ``"gaussian"`` takes their outcome: beside
        ``loss`` in a Dataset or node, or a DataArray with the attribute ``link``.
    name, extra
        As for `lkarray.tensors.as_losses`.

    Raises
    ------
    ValueError
        The estimator is unknown.
    SchemaError
        There is no outcome, or its link is unknown; or as `lkarray.tensors.as_losses` says.
    """
    one_of("estimator", estimator, ESTIMATORS)
    if estimator == "sample":
        return as_losses(losses, name=name, extra=extra, features=True), None
    x = as_losses(_outcome(losses, name), name=name, extra=extra)
    return x, as_link(x.attrs["link"], what=f"{name}: variable {x.name!r}")


def refuse_by_draw(link: Link | None, center: str | None) -> None:
    """Raise where outcomes are to be taken as Gaussian about means of a draw: it has no link."""
    if link is not None and center == "draw":
        raise ValueError(
            'estimator="gaussian" needs the mean of each outcome, which center="draw" leaves out: '
            'pass center="pooled" or "chain"'
        )


def find_outcome(losses: Losses) -> xr.DataArray | None:
    """Return the outcome in a tree, node or Dataset of losses, or such a DataArray; None if none.

    Log-odds come before residuals, and these before other variables.
    """
    if isinstance(losses, xr.DataTree):
        with suppress(SchemaError):
            losses = losses_node(losses)
        losses = losses.to_dataset()
    if isinstance(losses, xr.DataArray):
        return losses if "link" in losses.attrs else None
    if not isinstance(losses, xr.Dataset):
        return None
    named = (LOG_ODDS.name, RESIDUAL.name)
    for name in (*named, *(v for v in losses.data_vars if v not in (*named, LOSS.name))):
        x = losses.get(name)
        if x is not None and "link" in x.attrs and set(POSTERIOR) <= set(x.dims):
            return x
    return None


def _outcome(losses: Losses, name: str) -> xr.DataArray:
    """Return the outcome, or raise the error that says how to have one."""
    x = find_outcome(losses)
    if x is not None:
        return x
    if isinstance(losses, xr.DataArray):
        there = f"{losses.name!r} is no outcome (it has no attribute 'link')"
    elif isinstance(losses, xr.Dataset | xr.DataTree):
        there = f"there is none among {sorted(map(str, losses.data_vars))}"
        if isinstance(losses, xr.DataTree) and not losses.data_vars:
            there = "there is none in this tree"
    else:
        as_losses(losses, name=name)  # raises: it is nothing labelled
        there = "there is none"
    raise SchemaError(
        f'{name}: estimator="gaussian" needs the outcomes that losses are a function of (links: '
        f"{sorted(LINKS)}), and {there}; {_REMEDY}"
    )


def series_of(
    left: Link | None, right: Link | None, degrees: int, *, cosine: bool
) -> Series | None:
    """Return what makes the kernel of losses of the correlations of outcomes; None of losses."""
    if left is None:
        return None
    return Series(left, left if right is None else right, degrees, cosine)


def described(series: Series | None) -> dict[str, str]:
    """Return the attributes of a result that say how it was estimated."""
    if series is None:
        return {"estimator": "sample"}
    links = dict.fromkeys(getattr(link, "name", "") for link in (series.rows, series.cols))
    return {"estimator": "gaussian", "link": ", ".join(links)}
