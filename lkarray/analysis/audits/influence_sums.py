"""What the influences on an audited example add up to, net and gross."""

from __future__ import annotations

import xarray as xr

from lkarray.analysis.audits.influence import TIMES, as_influence, float64, small_computed
from lkarray.arguments import checked
from lkarray.errors import SchemaError
from lkarray.kernels.coords import sample_coords
from lkarray.results import Result


@checked(audit=None)
def net_influence(audit: Result, *, cumulative: bool = False) -> xr.DataArray:
    r"""Return what all training examples together did: :math:`S_n = \sum_m P_{mn}`.

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

    References
    ----------
    - Anonymous 2026, section 6.3: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> influence = xr.DataArray([[-3.0, 1.0], [1.0, 0.5], [0.0, -0.5]], dims=("example", "audit"))
    >>> lk.net_influence(influence).values.tolist()
    [-2.0, 1.0]
    """
    x, source = as_influence(audit)
    out = float64(x).sum(source, skipna=False)
    if cumulative:
        out = out.cumsum(_time_of(x), skipna=False)
    return _sum_of("net_influence", x, source, out)


@checked(audit=None)
def gross_influence(audit: Result, *, cumulative: bool = False) -> xr.DataArray:
    r"""Return how much training examples did, of either sign: :math:`G_n = \sum_m |P_{mn}|`.

    Where influences cancel, it grows while `net_influence` levels off (Anonymous 2026, section
    6.3).

    Parameters
    ----------
    audit
        What `lkarray.audit` returned, its node in a store, or its ``influence``.
    cumulative
        ``True``: magnitudes of what each example did by the end of each epoch, as Anonymous 2026,
        figure 13 has it. ``False``: of what it did within the epoch, as in figure 10.

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

    References
    ----------
    - Anonymous 2026, section 6.3, figures 10 and 13: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> influence = xr.DataArray([[-3.0, 1.0], [1.0, 0.5], [0.0, -0.5]], dims=("example", "audit"))
    >>> lk.gross_influence(influence).values.tolist()
    [4.0, 2.0]
    """
    x, source = as_influence(audit)
    wide = float64(x)
    if cumulative:
        wide = wide.cumsum(_time_of(x), skipna=False)
    return _sum_of("gross_influence", x, source, abs(wide).sum(source, skipna=False))


def _time_of(x: xr.DataArray) -> str:
    for dim in TIMES:
        if dim in x.dims:
            return dim
    raise SchemaError(
        f"cumulative=True needs influence by epochs, and it has dims {x.dims}; audit with "
        "groups={'time': 'epoch'}"
    )


def _sum_of(name: str, x: xr.DataArray, source: str, out: xr.DataArray) -> xr.DataArray:
    kept = [str(dim) for dim in x.dims if dim != source]
    out = out.rename(name).drop_attrs().assign_coords(sample_coords(x, *kept))
    return small_computed(x, out.assign_attrs(units=x.attrs.get("units", "nat")))
