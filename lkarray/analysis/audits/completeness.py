"""How complete an audit is: what it adds up to beside the true change."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import xarray as xr

from lkarray.analysis.audits.influence import audit_opened, audit_variable
from lkarray.arguments import checked
from lkarray.errors import SchemaError
from lkarray.kernels.coords import sample_coords
from lkarray.results import Result
from lkarray.schema import EPOCH
from lkarray.values import require_real


@checked(audit=None)
def completeness(audit: Result) -> xr.Dataset:
    r"""Return how well the audit explains the true change, by the end of each epoch.

    .. math::

        MRE = \mathrm{mean}_n |\hat\Delta_n - \Delta_n|, \quad
        LC = \mathrm{corr}_n(\hat\Delta_n, \Delta_n)

    (Anonymous 2026, definitions 12 and 13, figure 1), of what the audit adds up to and the true
    change.

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

    References
    ----------
    - Anonymous 2026, defs. 12 and 13, eqs. 22 and 23; figure 1: "Path-Integrated Loss-Gradient
      Kernels".
    """
    audit = audit_opened(audit)
    rebuilt, true = (audit_variable(audit, name) for name in ("reconstruction", "epoch_change"))
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


def _correlation(a: xr.DataArray, b: xr.DataArray, dims: list[Hashable]) -> xr.DataArray:
    # A mean may miss a constant by rounding: the values themselves say whether they vary.
    varies = (a.max(dims) > a.min(dims)) & (b.max(dims) > b.min(dims))
    a, b = a - a.mean(dims, skipna=False), b - b.mean(dims, skipna=False)
    scale = ((a**2).sum(dims, skipna=False) * (b**2).sum(dims, skipna=False)) ** 0.5
    product = (a * b).sum(dims, skipna=False)
    return (product / scale.where(scale > 0)).clip(-1, 1).where(varies)
