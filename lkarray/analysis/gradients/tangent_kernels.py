"""Tangent kernels: influence operators of loss gradients on gradients of outputs."""

from __future__ import annotations

from typing import Any

import xarray as xr

from lkarray.analysis.gradients.path_sums import named, path_dims, root_weight, weighted
from lkarray.arguments import checked
from lkarray.kernels.coords import kernel_coords, sample_coords
from lkarray.kernels.gram import gram
from lkarray.kernels.kinds import INFLUENCE_OPERATOR
from lkarray.kernels.operands import check_shared
from lkarray.kernels.unfolding import merge
from lkarray.schema import EXAMPLE, OUTPUT, PARAM, TIME, second
from lkarray.tensors import Losses, as_gradients

_COLUMNS = "lkarray_columns"  # examples and outputs, merged


@checked()
def lntk(
    loss_G: Losses,
    output_G: Losses,
    *,
    precision: str = "float32",
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    r"""Return the loss-weighted NTK at each time, lazily.

    .. math:: LNTK_{mnd}(t) = \epsilon_m(t) \phi_m(t) \cdot \phi_{nd}(t)

    An influence operator of examples on outputs, not a kernel: neither symmetric nor positive.

    Parameters
    ----------
    loss_G
        Gradients ``(time, example, param)`` of examples' losses.
    output_G
        Gradients ``(time, example, output, param)`` of outputs, at the same times.
    precision, memory, device, device_memory
        As for `lkarray.gram`.

    Returns
    -------
    xarray.DataArray
        ``lntk(time, example, example_2, output)``, or without ``time`` where one was selected:
        rows are the examples of ``loss_G``, columns those of ``output_G`` and their outputs.

    References
    ----------
    - Anonymous 2026, def. 4, eq. 5: "Path-Integrated Loss-Gradient Kernels".
    - Jacot et al. 2018: "Neural tangent kernel: convergence and generalization in neural networks",
      arXiv:1806.07572.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> outputs = G.expand_dims("output", axis=2)
    >>> lk.lntk(G, outputs).dims
    ('time', 'example', 'example_2', 'output')
    """
    options: dict[str, Any] = {"precision": precision, "memory": memory}
    options |= {"device": device, "device_memory": device_memory}
    return _operator("lntk", loss_G, output_G, each=(TIME,), **options)


@checked()
def pntk(
    loss_G: Losses,
    output_G: Losses,
    *,
    weight: str | None = None,
    precision: str = "float32",
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    """Return the path-integrated NTK P, the sum of the `lntk`, lazily.

    Parameters
    ----------
    loss_G, output_G, precision, memory, device, device_memory
        As for `lntk`.
    weight
        As for `plgk`; the rates are those of ``loss_G``.

    Returns
    -------
    xarray.DataArray
        ``pntk(example, example_2, output)``, an influence operator. With the weight ``"lr"``, the
        change of an output over training is about ``-1/M`` times its sum over the M training
        examples (eq. 8), for full-batch gradient descent recorded at every step.

    References
    ----------
    - Anonymous 2026, def. 5, eqs. 7 and 8: "Path-Integrated Loss-Gradient Kernels".
    - Jacot et al. 2018: "Neural tangent kernel: convergence and generalization in neural networks",
      arXiv:1806.07572.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> outputs = G.expand_dims("output", axis=2)
    >>> lk.pntk(G, outputs).isel(output=0).values.tolist()
    [[29.0, 3.0], [3.0, 2.0]]
    """
    options: dict[str, Any] = {"precision": precision, "memory": memory}
    options |= {"device": device, "device_memory": device_memory}
    return _operator("pntk", loss_G, output_G, weight=weight, **options)


def _operator(
    name: str,
    loss_G: Losses,
    output_G: Losses,
    *,
    each: tuple[str, ...] = (),
    weight: str | None = None,
    **options: Any,
) -> xr.DataArray:
    x = as_gradients(loss_G, name="loss_G", need=(EXAMPLE, PARAM))
    y = as_gradients(output_G, name="output_G", need=(EXAMPLE, OUTPUT, PARAM))
    path = path_dims(x, each)
    check_shared(x, y, (*path["over"], *path["each"]), names=("loss_G", "output_G"))
    root = root_weight(x, weight)
    times = {TIME: y.coords[TIME]} if TIME in y.indexes else {}
    columns = merge(weighted(y, root).variable, (EXAMPLE, OUTPUT), _COLUMNS)
    flat = xr.DataArray(columns, coords=times, name=y.name)
    out = gram(weighted(x, root), flat, **options, **path)
    kept = (*path["each"], EXAMPLE)
    sizes = [x.sizes[dim] for dim in kept] + [y.sizes[dim] for dim in (EXAMPLE, OUTPUT)]
    of_outputs = {k: v for k, v in sample_coords(y, OUTPUT).items() if v.dims}
    split = xr.DataArray(
        out.data.reshape(sizes),
        dims=(*kept, second(EXAMPLE), OUTPUT),
        coords=kernel_coords(x, y, kept[:-1], EXAMPLE, EXAMPLE) | of_outputs,
        attrs=out.attrs | {"kernel": INFLUENCE_OPERATOR},
    )
    return named(split, name, weight, units="nat")
