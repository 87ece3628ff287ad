"""The influence that an audit holds, checked: which variable it is, of what, and split by what.

It may be larger than memory, so that what is returned of it is as lazy as the audit.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import xarray as xr

from lkarray.errors import NonFiniteError, SchemaError
from lkarray.results import Result, as_array, opened
from lkarray.schema import AUDIT, EPOCH, EXAMPLE, GROUP, LAYER, OUTPUT, WINDOW
from lkarray.values import require_real
from lkarray.waiting import computed

Computed = TypeVar("Computed", xr.DataArray, xr.Dataset)
_SMALL = 1 << 20  # numbers of a table that is computed, of an audit on Dask too

#: What influence is of: training examples, or groups of them.
SOURCES = (EXAMPLE, GROUP)
#: What it may be split by besides; sums over these are the whole influence.
TIMES = (EPOCH, WINDOW)
SPLITS = (LAYER, *TIMES)


def audit_opened(audit: Any) -> Any:
    """Return the Dataset of an audit's node, or of a tree with one audit; else what was given."""
    if isinstance(audit, xr.DataTree) and not audit.data_vars and AUDIT in audit.children:
        audit = audit.children[AUDIT]
    return opened(audit, AUDIT)


def audit_variable(audit: Any, name: str) -> xr.DataArray:
    """Return a variable of an audit, or raise and say what there is."""
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
    audit = audit_opened(audit)
    if isinstance(audit, xr.Dataset) and len(audit.data_vars) == 1 and "influence" not in audit:
        audit = as_array(audit, AUDIT)  # of a baseline, such as tracin
    x = audit if isinstance(audit, xr.DataArray) else audit_variable(audit, "influence")
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


def _bare(x: xr.DataArray) -> xr.DataArray:
    """Return it on Dask and without coordinates, so that work goes block by block."""
    bare = x.drop_vars(list(x.coords))
    return bare if bare.chunks is not None else bare.chunk("auto")


def float64(x: xr.DataArray) -> xr.DataArray:
    """Return it in float64, on Dask and without coordinates."""
    return _bare(x).astype(np.float64)


def whole_influence(x: xr.DataArray, source: str) -> xr.DataArray:
    """Return influence summed over all that it is split by, training examples last."""
    split = [dim for dim in SPLITS if dim in x.dims]
    whole = float64(x).sum(split, skipna=False) if split else _bare(x)
    return whole.transpose(..., source)


def require_finite(values: np.ndarray) -> None:
    """Raise ``NonFiniteError`` unless influences are all there."""
    if not np.isfinite(values).all():
        raise NonFiniteError(
            "the influence holds NaN or infinity: the run diverged, or pieces of the audit are "
            "missing; look at audit.influence.isnull(), and run lk.verify on its store"
        )


def small_computed(x: xr.DataArray, out: Computed) -> Computed:
    """Return a table of an audit computed; as it is where it is large and the audit on Dask."""
    variables = out.data_vars.values() if isinstance(out, xr.Dataset) else [out]
    large = sum(variable.size for variable in variables) > _SMALL
    return out if large and x.chunks is not None else computed(out)
