"""Overlaps with a reference time, which tell whether training is in the kernel regime yet.

See Anonymous 2026, section 6.3.
"""

from __future__ import annotations

import operator

import numpy as np
import xarray as xr

from lkarray.arguments import checked
from lkarray.errors import SchemaError
from lkarray.kernels.coords import sample_coords
from lkarray.kernels.operands import free_dim, nan_for_infinite
from lkarray.kernels.spectra import svd
from lkarray.results import Result, as_array
from lkarray.schema import EXAMPLE, MODE, PARAM, TIME, second
from lkarray.tensors import Losses, as_gradients


@checked()
def feature_overlap(G: Losses, *, reference: int = -1) -> xr.DataArray:
    r"""Return the mean cosine of examples' gradients with those at a reference time, lazily.

    Metric (i) of Anonymous 2026, section 6.3, 1 once the directions of the loss gradients are those
    of the reference:

    .. math:: \rho(t) = \mathrm{mean}_n\, \cos(g_n(t), g_n(t_{ref}))

    Parameters
    ----------
    G
        Gradients ``(time, example, param)``.
    reference
        Position of the reference time; the last by default.

    Returns
    -------
    xarray.DataArray
        ``feature_overlap(time)``, float64. An example without gradient at either time counts as
        0, as in `ips`. One pass over the data, chunk by chunk.

    References
    ----------
    - Anonymous 2026, section 6.3, metric (i): "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> lk.feature_overlap(G).values.round(4).tolist()
    [0.9, 1.0]
    """
    x = as_gradients(G, need=(TIME, EXAMPLE, PARAM))
    return _overlap(x, reference, "G").rename("feature_overlap")


@checked()
def activation_overlap(activations: Result, *, reference: int = -1) -> xr.DataArray:
    """Return the mean cosine of examples' activations with those at a reference time, lazily.

    Metric (iii) of Anonymous 2026, section 6.3: `feature_overlap` of hidden-layer activations.

    Parameters
    ----------
    activations
        ``(time, example, unit)``, whatever the third dim is called.
    reference
        Position of the reference time; the last by default.

    Returns
    -------
    xarray.DataArray
        ``activation_overlap(time)``, float64.

    References
    ----------
    - Anonymous 2026, section 6.3, metric (iii): "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> lk.activation_overlap(G.rename(param="unit")).values.round(4).tolist()
    [0.9, 1.0]
    """
    activations = as_array(activations, "activations")
    return _overlap(activations, reference, "activations").rename("activation_overlap")


def _overlap(x: xr.DataArray, reference: int, name: str) -> xr.DataArray:
    dim = free_dim(x, name, (TIME, EXAMPLE), ())
    wide = nan_for_infinite(x.drop_vars(list(x.coords)).astype(np.float64))
    last = wide.isel({TIME: _position(x, reference)})
    inner = (wide * last).sum(dim, skipna=False)
    norm = (wide**2).sum(dim, skipna=False) ** 0.5
    both = norm * norm.isel({TIME: _position(x, reference)})
    cosine = (inner / both.where(both != 0, 1)).clip(-1, 1)
    out = cosine.mean(EXAMPLE, skipna=False).drop_attrs(deep=False)
    return out.assign_coords(sample_coords(x, TIME)).assign_attrs(reference=reference, units="1")


@checked()
def subspace_overlap(
    G: Losses, k: int = 10, *, reference: int = -1, memory: int | str | None = None
) -> xr.DataArray:
    """Return how far the leading directions span those of a reference time, lazily.

    Metric (ii) of Anonymous 2026, section 6.3: the mean cosine of the principal angles between the
    spaces of the ``k`` leading right singular vectors of the gradients at each time and the
    reference.

    Parameters
    ----------
    G
        Gradients ``(time, example, param)`` of training examples.
    k
        Dimensions of the spaces.
    reference
        Position of the reference time; the last by default.
    memory
        Byte budget of a process.

    Returns
    -------
    xarray.DataArray
        ``subspace_overlap(time)``, float64, between 0 and 1. Dimensions beyond the rank of a
        time's gradients count as 0. Cost: a `lkarray.svd` of each time, and ``2 P k`` numbers.

    Raises
    ------
    ValueError
        ``k`` exceeds the smaller of examples and parameters.

    References
    ----------
    - Anonymous 2026, section 6.3, metric (ii): "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> lk.subspace_overlap(G, k=1).values.round(4).tolist()
    [0.7882, 1.0]
    """
    x = as_gradients(G, need=(TIME, EXAMPLE, PARAM))
    position = _position(x, reference)
    bare = x.drop_vars([name for name in x.coords if name != x.name])
    spaces = [
        svd(bare.isel({TIME: t}), operator.index(k), over=PARAM, memory=memory)["v"]
        for t in range(x.sizes[TIME])
    ]
    overlaps = [
        xr.apply_ufunc(
            _principal,
            space,
            spaces[position].rename({MODE: second(MODE)}),
            input_core_dims=[[PARAM, MODE], [PARAM, second(MODE)]],
            dask="parallelized",
            output_dtypes=[np.float64],
            dask_gufunc_kwargs={"allow_rechunk": True},
        )
        for space in spaces
    ]
    out: xr.DataArray = xr.concat(overlaps, TIME).rename("subspace_overlap")
    out = out.drop_attrs(deep=False).assign_coords(sample_coords(x, TIME))
    return out.assign_attrs(k=k, reference=reference, units="1")


def _principal(a: np.ndarray, b: np.ndarray) -> float:
    cosines = np.linalg.svd((a.T @ b).astype(np.float64), compute_uv=False)
    return float(np.minimum(cosines, 1).mean())


def _position(x: xr.DataArray, reference: int) -> int:
    reference, times = operator.index(reference), x.sizes[TIME]
    if not -times <= reference < times:
        raise SchemaError(
            f"reference={reference} is the position of a time, and there are {times} of them"
        )
    return reference % times
