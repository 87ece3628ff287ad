"""What an audit says: how complete it is, and what influences add up to.

These read what `lkarray.audit` returned and need no torch. Influences may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from lkarray.arguments import checked, require_real
from lkarray.errors import SchemaError
from lkarray.kernels.coords import sample_coords
from lkarray.results import Result, as_array, opened
from lkarray.schema import AUDIT, EPOCH, EXAMPLE, GROUP, LAYER, OUTPUT, WINDOW
from lkarray.waiting import computed

INFLUENCE = "influence"
Computed = TypeVar("Computed", xr.DataArray, xr.Dataset)
_SMALL = 1 << 20  # numbers of a table that is computed, of an audit on Dask too

#: What influence is of: training examples, or groups of them.
SOURCES = (EXAMPLE, GROUP)
#: What it may be split by besides; sums over these are the whole influence.
TIMES = (EPOCH, WINDOW)
SPLITS = (LAYER, *TIMES)


@checked(audit=None)
def completeness(audit: Result) -> xr.Dataset:
    r"""Return how well the audit explains the true change, by the end of each epoch.

    .. math::

        MRE = \mathrm{mean}_n |\hat\Delta_n - \Delta_n|, \quad
        LC = \mathrm{corr}_n(\hat\Delta_n, \Delta_n)

    (PLGK definitions 12 and 13, figure 1), of what the audit adds up to and the true change.

    Parameters
    ----------
    audit
        What `lkarray.audit` returned, with ``reconstruction(epoch, audit[, output])`` and
        ``epoch_change(epoch, audit[, output])``.

    Returns
    -------
    xarray.Dataset
        ``mre(epoch)``, in the units of what is audited, and ``lc(epoch)``, float64; the outputs of
        an example count as so many numbers. ``lc`` is NaN where there are fewer than two numbers
        or one side is constant. Computed. The attributes ``complete`` and
        ``incomplete`` are the audit's: one of some parameters only does not explain the whole
        change.

    Raises
    ------
    SchemaError, TypeError
        ``audit`` does not hold the two, or they lack ``epoch``.
    """
    audit = _opened(audit)
    rebuilt, true = (_variable(audit, name) for name in ("reconstruction", "epoch_change"))
    for x in (rebuilt, true):
        require_real(f"audit: {x.name}", x)
        if not x.size:
            raise SchemaError(f"audit: {x.name!r} is empty, of {dict(x.sizes)}")
        if EPOCH not in x.dims or set(x.dims) != set(rebuilt.dims):
            raise SchemaError(
                f"{x.name!r} has dims {x.dims}; expected ('epoch', 'audit'), with 'output' or "
                "without, of both 'reconstruction' and 'epoch_change'"
            )
    a, b = (x.drop_vars(list(x.coords)).astype(np.float64) for x in (rebuilt, true))
    dims = [dim for dim in a.dims if dim != EPOCH]
    mre = abs(a - b).mean(dims, skipna=False)
    units = true.attrs.get("units", "1")
    out = xr.Dataset({"mre": mre, "lc": _correlation(a, b, dims)}).drop_attrs()
    out["mre"].attrs = {"units": units, "long_name": "mean reconstruction error"}
    out["lc"].attrs = {"units": "1", "long_name": "correlation of reconstruction and change"}
    kept = {name: audit.attrs[name] for name in ("complete", "incomplete") if name in audit.attrs}
    return out.assign_coords(sample_coords(rebuilt, EPOCH)).assign_attrs(kept).compute()


@checked(audit=None)
def net_influence(audit: Result, *, cumulative: bool = False) -> xr.DataArray:
    r"""Return what all training examples together did: :math:`S_n = \sum_m P_{mn}` (PLGK 6.3).

    Parameters
    ----------
    audit
        What `lkarray.audit` returned, its node in a store, or its ``influence``.
    cumulative
        Give influence by the end of each epoch (or window, in their order), not within it.

    Returns
    -------
    xarray.DataArray
        ``net_influence(audit[, output][, layer][, epoch])``, float64, in the audit's units. Sum it
        over layers or epochs as you like: it adds up. One pass. Computed up to a million numbers,
        beyond as lazy as the audit.

    Raises
    ------
    SchemaError, TypeError
        There is no influence, or ``cumulative`` without a dim of time.

    See Also
    --------
    gross_influence : how much of it cancelled.
    lkarray.influence_over_time : both from gradients, of full-batch gradient descent.
    """
    x, source = as_influence(audit)
    out = _float64(x).sum(source, skipna=False)
    if cumulative:
        out = out.cumsum(_time_of(x), skipna=False)
    return _sum_of("net_influence", x, source, out)


@checked(audit=None)
def gross_influence(audit: Result, *, cumulative: bool = False) -> xr.DataArray:
    r"""Return how much training examples did, of either sign: :math:`G_n = \sum_m |P_{mn}|`.

    Where influences cancel, it grows while `net_influence` levels off (PLGK section 6.3).

    Parameters
    ----------
    audit
        What `lkarray.audit` returned, its node in a store, or its ``influence``.
    cumulative
        ``True``: magnitudes of what each example did by the end of each epoch, as PLGK figure 13
        has it. ``False``: of what it did within the epoch, as in figure 10.

    Returns
    -------
    xarray.DataArray
        ``gross_influence(audit[, output][, layer][, epoch])``, float64, in the audit's units,
        computed as `net_influence` is. Magnitudes do not add up: for that of all layers together,
        sum the influence first, ``gross_influence(audit["influence"].sum("layer"))``.

    Raises
    ------
    SchemaError, TypeError
        As for `net_influence`.
    """
    x, source = as_influence(audit)
    wide = _float64(x)
    if cumulative:
        wide = wide.cumsum(_time_of(x), skipna=False)
    return _sum_of("gross_influence", x, source, abs(wide).sum(source, skipna=False))


# --- what they take ---------------------------------------------------------------------------


def _opened(audit: Any) -> Any:
    """Return the Dataset of an audit's node, or of a tree with one audit; else what was given."""
    if isinstance(audit, xr.DataTree) and not audit.data_vars and AUDIT in audit.children:
        audit = audit.children[AUDIT]
    return opened(audit, AUDIT)


def _variable(audit: Any, name: str) -> xr.DataArray:
    if not isinstance(audit, xr.Dataset):
        raise TypeError(
            f"audit must be the Dataset that lk.audit returned, not {type(audit).__name__}"
        )
    if name not in audit.data_vars:
        raise SchemaError(
            f"audit has no variable {name!r}, only {sorted(map(str, audit.data_vars))}; pass what "
            "lk.audit returned"
        )
    return audit[name]


def as_influence(audit: Result) -> tuple[xr.DataArray, str]:
    """Return the influence, and the dim of the training examples or their groups."""
    audit = _opened(audit)
    if isinstance(audit, xr.Dataset) and len(audit.data_vars) == 1 and INFLUENCE not in audit:
        audit = as_array(audit, AUDIT)  # of a baseline, such as tracin
    x = audit if isinstance(audit, xr.DataArray) else _variable(audit, INFLUENCE)
    source = next((dim for dim in SOURCES if dim in x.dims), None)
    unknown = [dim for dim in x.dims if dim not in (source, AUDIT, OUTPUT, *SPLITS)]
    if source is None or unknown:
        raise SchemaError(
            f"{x.name!r} has dims {x.dims}; an influence has 'example' or 'group', 'audit', and at "
            f"most 'output', {', '.join(map(repr, SPLITS))} besides: rename, or pass the Dataset "
            "that lk.audit returned"
        )
    empty = [dim for dim in x.dims if not x.sizes[dim]]
    if empty:
        raise SchemaError(f"audit: influence is empty along {empty}; there is nothing to add up")
    require_real("audit: influence", x)
    return x, source


def _time_of(x: xr.DataArray) -> str:
    for dim in TIMES:
        if dim in x.dims:
            return dim
    raise SchemaError(
        f"cumulative=True needs influence by epochs, and it has dims {x.dims}; audit with "
        "groups={'time': 'epoch'}"
    )


def _bare(x: xr.DataArray) -> xr.DataArray:
    """Return it on Dask and without coordinates, so that work goes block by block."""
    bare = x.drop_vars(list(x.coords))
    return bare if bare.chunks is not None else bare.chunk("auto")


def _float64(x: xr.DataArray) -> xr.DataArray:
    return _bare(x).astype(np.float64)


def whole_influence(x: xr.DataArray, source: str) -> xr.DataArray:
    """Return influence summed over all that it is split by, training examples last."""
    split = [dim for dim in SPLITS if dim in x.dims]
    whole = _float64(x).sum(split, skipna=False) if split else _bare(x)
    return whole.transpose(..., source)


def small_computed(x: xr.DataArray, out: Computed) -> Computed:
    """Return a table of an audit computed; as it is where it is large and the audit on Dask."""
    variables = out.data_vars.values() if isinstance(out, xr.Dataset) else [out]
    large = sum(variable.size for variable in variables) > _SMALL
    return out if large and x.chunks is not None else computed(out)


def _sum_of(name: str, x: xr.DataArray, source: str, out: xr.DataArray) -> xr.DataArray:
    kept = [str(dim) for dim in x.dims if dim != source]
    out = out.rename(name).drop_attrs().assign_coords(sample_coords(x, *kept))
    return small_computed(x, out.assign_attrs(units=x.attrs.get("units", "nat")))


# --- numbers ----------------------------------------------------------------------------------


def _correlation(a: xr.DataArray, b: xr.DataArray, dims: list[Hashable]) -> xr.DataArray:
    # A mean may miss a constant by rounding: the values themselves say whether they vary.
    varies = (a.max(dims) > a.min(dims)) & (b.max(dims) > b.min(dims))
    a, b = a - a.mean(dims, skipna=False), b - b.mean(dims, skipna=False)
    scale = ((a**2).sum(dims, skipna=False) * (b**2).sum(dims, skipna=False)) ** 0.5
    product = (a * b).sum(dims, skipna=False)
    return (product / scale.where(scale > 0)).clip(-1, 1).where(varies)
