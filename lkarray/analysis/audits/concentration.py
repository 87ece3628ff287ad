"""How much of all influence the most influential training examples hold."""

from __future__ import annotations

import numpy as np
import xarray as xr

from lkarray.analysis.audits.influence import (
    as_influence,
    require_finite,
    small_computed,
    whole_influence,
)
from lkarray.arguments import checked
from lkarray.kernels.coords import sample_coords
from lkarray.results import Result
from lkarray.schema import AUDIT, OUTPUT

_POINTS = 200  # of a curve
_SORTED = 1 << 21  # influences that are sorted at once


@checked(audit=None)
def concentration(audit: Result) -> xr.DataArray:
    r"""Return the share of all influence that the most influential training examples hold.

    .. math:: \mathrm{share}(c, n) = \sum_{m \in top_c(n)} |P_{mn}| \Big/ \sum_m |P_{mn}|

    Parameters
    ----------
    audit
        What `lkarray.audit` returned, its node in a store, or its ``influence``; summed over layers
        and epochs.

    Returns
    -------
    xarray.DataArray
        ``share(examples, audit[, output])``, float64, rising to 1, at no more than 200 numbers of
        examples, evenly spaced on a logarithmic scale from 1 to all. NaN where no example has
        influence. Computed up to a million shares, beyond as lazy as the audit.

    Raises
    ------
    SchemaError, TypeError
        There is no influence.
    NonFiniteError
        Influence is NaN or infinite.

    Notes
    -----
    Each audited example's influences are sorted. Memory: all training examples times the audited
    ones of a chunk, a chunk after another; where that is too much, select audited examples first.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> influence = xr.DataArray([[-3.0, 1.0], [1.0, 0.5], [0.0, -0.5]], dims=("example", "audit"))
    >>> lk.concentration(influence).values.round(4).tolist()
    [[0.75, 0.5], [1.0, 0.75], [1.0, 1.0]]
    """
    x, source = as_influence(audit)
    n = x.sizes[source]
    counts = np.unique(np.geomspace(1, n, _POINTS).round().astype(np.int64))
    whole = whole_influence(x, source)
    # No wider than it is: a column is then made of one panel's chunks.
    narrow = {
        dim: min(width, max(whole.chunksizes[dim]))
        for dim, width in ((AUDIT, max(_SORTED // n, 1)), (OUTPUT, 1))
        if dim in whole.dims
    }
    column = whole.chunk({source: -1} | narrow)
    chunks = (*column.data.chunks[:-1], (len(counts),))
    data = column.data.map_blocks(_shares, counts, dtype=np.float64, chunks=chunks)
    dims = [str(dim) for dim in column.dims if dim != source]
    out = xr.DataArray(data, dims=(*dims, "examples"), name="share").transpose("examples", ...)
    attrs = {"units": "1", "long_name": f"share of all influence, by number of {source}s"}
    out = out.assign_coords(sample_coords(x, *dims) | {"examples": counts}).assign_attrs(attrs)
    return small_computed(x, out)


def _shares(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    require_finite(values)
    size = np.abs(values.astype(np.float64))
    size.sort(axis=-1)
    held = np.cumsum(size[..., ::-1], axis=-1)
    chosen, total = held[..., counts - 1], held[..., -1:]
    shares = np.full_like(chosen, np.nan)
    np.divide(chosen, total, out=shares, where=total > 0)
    return shares
