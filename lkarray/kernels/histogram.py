"""Histograms of kernel entries by pairs of groups, without n x n."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import xarray as xr

from lkarray import engine
from lkarray.arguments import REPEATS, checked
from lkarray.engine.histograms import HISTOGRAM_BYTES, Bins, histogram_array
from lkarray.kernels.estimators import described
from lkarray.kernels.groups import group_codes
from lkarray.kernels.operands import estimated_operand
from lkarray.schema import second
from lkarray.tensors import Losses, contracted


@checked(bins=REPEATS)
def histogram(
    losses: Losses,
    groups: Hashable | Any | None = None,
    *,
    bins: int = 100,
    bounds: tuple[float, float] | None = None,
    kernel: str = "correlation",
    center: str = "pooled",
    estimator: str = "sample",
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.Dataset:
    """Count kernel entries in bins, by pairs of groups, lazily.

    Parameters
    ----------
    losses
        Loss tensor ``(chain, draw, sample)``.
    groups
        A coordinate of the samples, one label for each sample (as for `lkarray.group_mean`), or
        ``None`` for one group.
    bins
        Even bins between the bounds.
    bounds
        ``(-1, 1)`` by default for correlations; required for covariances: twice the largest
        `lkarray.loss_variance` either way holds every entry.
    kernel
        ``"correlation"`` or ``"covariance"``.
    center
        ``"pooled"``, ``"chain"`` or ``"draw"``.
    estimator
        ``"sample"`` or ``"gaussian"``, as for `lkarray.covariance`.
    memory
        Byte budget of a process.
    device, device_memory
        Where products are made, and the bytes to use there; see `lkarray.gram`.

    Returns
    -------
    xarray.Dataset
        ``count(label, label_2, bin)`` (named after the grouping), int64, over ordered pairs of
        different samples; ``below`` and ``above (label, label_2)``, the entries outside the
        bounds; coordinates ``bin`` (the middle), ``bin_left`` and ``bin_right``.

    Raises
    ------
    ValueError
        Bounds are missing for a covariance, or are not ascending.
    SchemaError
        There is no such coordinate, or not one label for each sample.

    Notes
    -----
    ``n**2 S`` operations, and counts instead of the kernel.

    References
    ----------
    - Adam et al. 2025a, figure 3D: "The Loss Kernel", arXiv:2509.26537.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> counts = lk.histogram(losses, bins=2, kernel="covariance", bounds=(-5.0, 5.0))
    >>> counts["count"].values.ravel().tolist()
    [4, 2]
    """
    if bounds is None:
        if kernel == "covariance":
            raise ValueError(
                "histograms of covariances need bounds; lk.loss_variance(losses).max() bounds "
                "every entry's magnitude"
            )
        bounds = (-1.0, 1.0)
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must ascend, and are {bounds}")
    x, operand, scale, series = estimated_operand(losses, kernel, center, estimator)
    labels = np.zeros(operand.n, int) if groups is None else groups
    name, values, codes = group_codes(x, operand.rows, labels)
    # Sixteen counts, which are added at once; two bins beyond the bounds.
    held = 16 * 8 * len(values) ** 2 * (bins + 2)
    held += engine.table_bytes(operand) if series else 0
    place = engine.as_device(device, device_memory)
    options: dict[str, Any] = {"held": held, "device": place, "device_sink": engine.BEST_BYTES}
    plan = engine.make_plan(operand, memory=memory, sink=HISTOGRAM_BYTES, **options)
    contraction = engine.Contraction(operand, None, plan, scale, series=series)
    asked = Bins(float(bounds[0]), float(bounds[1]), bins, codes, len(values))
    data = histogram_array(contraction, asked)
    edges = np.linspace(*bounds, bins + 1)
    pair = (name, second(name))
    return xr.Dataset(
        {
            "count": ((*pair, "bin"), data[..., 1:-1]),
            "below": (pair, data[..., 0]),
            "above": (pair, data[..., -1]),
        },
        coords={
            name: values,
            second(name): values,
            "bin": (edges[:-1] + edges[1:]) / 2,
            "bin_left": ("bin", edges[:-1]),
            "bin_right": ("bin", edges[1:]),
        },
        attrs={
            "kernel": kernel,
            "center": operand.center or "none",
            "over": list(contracted(x)),
        }
        | described(series)
        | contraction.made_on,
    )
