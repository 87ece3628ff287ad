"""How many modes a spectrum has, effectively."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from lkarray.arguments import checked
from lkarray.errors import SchemaError
from lkarray.results import as_array
from lkarray.schema import MODE
from lkarray.values import real_array, require_real


@checked()
def participation_ratio(s: Any) -> Any:
    """Return the effective number of modes, ``(sum w)^2 / sum w^2`` with ``w = s^2``.

    1 if one mode holds all the energy, K if K modes share it equally (Anonymous 2026, section 6.3).

    Parameters
    ----------
    s
        Singular values: a DataArray with the dim ``mode``, or an array with modes last; or modes.

    Returns
    -------
    DataArray or array
        Without the modes; lazy if ``s`` is. NaN where all are zero.

    References
    ----------
    - Anonymous 2026, section 6.3 and A.7: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import numpy as np, lkarray as lk
    >>> float(lk.participation_ratio(np.array([2.0, 2.0, 0.0])))
    2.0
    """
    s = _values(s)
    if isinstance(s, xr.DataArray):
        weight = s.astype(np.float64) ** 2
        square = (weight**2).sum(MODE)
        return (weight.sum(MODE) ** 2 / square.where(square > 0)).rename("participation_ratio")
    weights = s.astype(np.float64) ** 2
    square = (weights**2).sum(-1)
    return weights.sum(-1) ** 2 / np.where(square > 0, square, np.nan)


@checked()
def energy_rank(s: Any, share: float = 0.9) -> Any:
    """Return how many leading modes hold at least ``share`` of the energy, the sum of ``s^2``.

    Parameters
    ----------
    s
        Singular values in descending order: a DataArray with the dim ``mode``, or an array with
        modes last; or modes. The energy is that of the modes given.
    share
        Between 0 and 1.

    Returns
    -------
    DataArray or array
        int64, without the modes; lazy if ``s`` is.

    Examples
    --------
    >>> import numpy as np, lkarray as lk
    >>> int(lk.energy_rank(np.array([3.0, 1.0, 0.1]), share=0.9))
    2
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, not {share}")
    s = _values(s)
    if isinstance(s, xr.DataArray):
        return xr.apply_ufunc(
            _energy_rank,
            s,
            input_core_dims=[[MODE]],
            kwargs={"share": share},
            dask="parallelized",
            dask_gufunc_kwargs={"allow_rechunk": True},
            output_dtypes=[np.int64],
        ).rename("energy_rank")
    return _energy_rank(s, share)


def _values(s: Any) -> xr.DataArray | np.ndarray:
    """Return singular values along modes, checked."""
    if isinstance(s, xr.Dataset | xr.DataTree):
        s = as_array(s, "s", prefer=("singular_value",))
    values: xr.DataArray | np.ndarray = s if isinstance(s, xr.DataArray) else real_array("s", s)
    if isinstance(values, xr.DataArray):
        require_real("s", values)
        if MODE not in values.dims:
            raise SchemaError(f"s has dims {values.dims}; expected 'mode' among them")
    elif values.ndim == 0:
        raise TypeError(f"s must be an array of singular values, not the number {values}")
    if not values.size:
        raise SchemaError("s is empty; there are no singular values to count")
    return values


def _energy_rank(s: np.ndarray, share: float) -> np.ndarray:
    energy = np.cumsum(s.astype(np.float64) ** 2, axis=-1)
    needed = share * energy[..., -1:] * (1 - 1e-12)
    return (energy < needed).sum(-1) + 1
