"""Log-odds of stores that kept losses alone."""

from __future__ import annotations

import numpy as np
import xarray as xr

from lkarray import schema
from lkarray.analysis.losses.summaries import attributes
from lkarray.arguments import checked
from lkarray.errors import SchemaError
from lkarray.schema import CHECKPOINT, COMPONENT, POSTERIOR, TOKEN
from lkarray.tensors import Losses, as_losses, losses_node

#: Losses that are the softplus of log-odds; of these, the ones that resolve less than `_SMALL`.
_KINDS = ("cross_entropy", "next_token", "binary_cross_entropy")
_FINE = "binary_cross_entropy"


@checked()
def log_odds(losses: Losses) -> xr.Dataset:
    """Return the log-odds that cross-entropies are the softplus of.

    Those stored, where `sample` was asked for ``outcomes=("loss", "log_odds")``; else
    ``log(expm1(loss))``, in float64. What a float32 cross-entropy does not resolve, how sure a
    network is that is right, is lost there: losses below half the rounding of 1 (6.0e-8) are taken
    for it, log-odds of -16.6, and ``floored`` says how many. `observe` gets them exactly.

    Parameters
    ----------
    losses
        Cross-entropies ``(chain, draw, sample)``, or what holds them; ``checkpoint``,
        ``component`` and ``token`` may be there besides.

    Returns
    -------
    xarray.Dataset
        Lazy where the losses are, and taken wherever losses are:
        ``log_odds(chain, draw, sample)``, a pure number, float64 (stored ones are float32), with
        attribute ``link``; ``floored(sample)``, the share of draws at the floor. NaN of padding.

    Raises
    ------
    SchemaError
        The losses are known to be others than cross-entropies, or are an outcome already.

    Notes
    -----
    One pass over the losses, elementwise.

    References
    ----------
    - docs/methods/outcomes.md.

    Examples
    --------
    >>> import numpy as np, xarray as xr, lkarray as lk
    >>> values = np.array([[[np.log(2), 0.0], [3.0, 0.0]]], "float32")
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> both = lk.log_odds(losses)
    >>> both["log_odds"].values.round(4).tolist()
    [[[0.0, -16.6355], [2.9489, -16.6355]]]
    >>> both["floored"].values.tolist()
    [0.0, 1.0]
    """
    stored = _stored(losses)
    if stored is not None:
        return _both(stored, xr.zeros_like(stored, dtype=bool))
    kind = attributes(losses).get("loss")
    x = as_losses(losses, extra=(CHECKPOINT, COMPONENT, TOKEN))
    if schema.LINK in x.attrs:
        raise SchemaError(
            f"log_odds: variable {x.name!r} is an outcome itself, of link "
            f"{x.attrs[schema.LINK]!r}; pass losses"
        )
    if kind is not None and kind not in _KINDS:
        raise SchemaError(
            f"log_odds: the losses are {kind!r}, and only cross-entropies are the softplus of "
            f"log-odds: {', '.join(_KINDS)}"
        )
    limits = np.finfo(x.dtype if x.dtype.kind == "f" else np.float64)
    least = float(limits.tiny if kind == _FINE else limits.eps / 2)
    wide = x.astype(np.float64).clip(min=least)
    odds: xr.DataArray = wide + np.log(-np.expm1(-wide))  # log(expm1), which does not overflow
    return _both(odds, x < least).assign_attrs(least_loss=least)


def _stored(losses: Losses) -> xr.DataArray | None:
    """Return the log-odds that lie beside losses, if they do."""
    if isinstance(losses, xr.DataArray):
        return None
    node = losses_node(losses) if isinstance(losses, xr.DataTree) else losses
    return node.data_vars.get(schema.LOG_ODDS.name)


def _both(odds: xr.DataArray, floored: xr.DataArray) -> xr.Dataset:
    share = floored.where(odds.notnull()).mean(POSTERIOR)
    attrs = schema.LOG_ODDS.attrs() | {schema.LINK: "softplus"}
    about = {"long_name": "share of draws whose log-odds are at the floor", "units": "1"}
    return xr.Dataset(
        {
            schema.LOG_ODDS.name: odds.drop_attrs().assign_attrs(attrs),
            "floored": share.drop_attrs().assign_attrs(about),
        }
    )
