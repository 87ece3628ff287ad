"""Kernels of gradient tensors ``gradient(time, example, param)``."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from lkarray.analysis.gradients.factor_kernels import factor_kernel, holds_factors
from lkarray.analysis.gradients.path_sums import named, path_dims, root_weight, weighted
from lkarray.arguments import checked
from lkarray.kernels.gram import gram
from lkarray.kernels.kinds import require_kernel
from lkarray.kernels.operands import check_shared, free_dim
from lkarray.results import as_array
from lkarray.schema import EXAMPLE, FACTOR, GRADIENTS, PARAM, TIME
from lkarray.tensors import Losses, as_gradients
from lkarray.values import require_real


@checked()
def lgk(
    G: Losses,
    y: Losses | None = None,
    *,
    precision: str = "float32",
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    r"""Return the loss-gradient kernel at each time, lazily.

    .. math:: LGK_{mn}(t) = \sum_p g_m(t, p) g_n(t, p)

    Parameters
    ----------
    G
        Gradients ``(time, example, param)`` of examples' losses, or what holds them; or their
        factors (`lkarray.gradient_factors`), which are cheaper and give the same numbers. One
        time may have been selected: ``G.isel(time=-1)``.
    y
        Gradients of other examples at the same times; ``None`` means ``G``.
    precision, memory, device, device_memory
        As for `lkarray.gram`.

    Returns
    -------
    xarray.DataArray
        ``lgk(time, example, example_2)``, or without ``time`` where one was selected; nats
        squared per squared unit of the parameters. See `lkarray.gram` for cost and errors.

    References
    ----------
    - Anonymous 2026, def. 6, eq. 10: "Path-Integrated Loss-Gradient Kernels".
    - docs/methods/kernels.md.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> lk.lgk(G).values.tolist()
    [[[25.0, 3.0], [3.0, 1.0]], [[4.0, 0.0], [0.0, 1.0]]]
    """
    options: dict[str, Any] = {"device": device, "device_memory": device_memory}
    return _kernel("lgk", G, y, each=(TIME,), precision=precision, memory=memory, **options)


@checked()
def plgk(
    G: Losses,
    y: Losses | None = None,
    *,
    weight: str | None = None,
    precision: str = "float32",
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    r"""Return the path-integrated loss-gradient kernel P', lazily.

    .. math:: P'_{mn} = \sum_t w(t) \sum_p g_m(t, p) g_n(t, p)

    For an adaptive optimizer's inner product (eq. 29) pass ``G * A**0.5``, with its diagonal
    preconditioner ``A(time, param)``.

    Parameters
    ----------
    G, y, precision, memory, device, device_memory
        As for `lgk`.
    weight
        ``None``: w = 1, as defined. ``"lr"``: the learning rate of each time, with which eq. 12
        holds under a schedule. ``"lr2"``: its square, the Gram of the tensor of eq. 38. The
        rates are those of ``G``, and are read at once: one number a time.

    Returns
    -------
    xarray.DataArray
        ``plgk(example, example_2)``, symmetric and positive semi-definite without ``y``. Where
        one time was selected, its term of the sum. See `lkarray.gram` for cost and errors.

    Raises
    ------
    SchemaError
        A weight is asked for, and ``G`` has no ``learning_rate(time)``, or it is missing (NaN)
        or negative at some time.

    References
    ----------
    - Anonymous 2026, def. 7, eqs. 11, 12, 29 and 38: "Path-Integrated Loss-Gradient Kernels".
    - docs/methods/kernels.md.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> G = G.assign_coords(learning_rate=("time", [1.0, 0.5]))
    >>> lk.plgk(G).values.tolist()
    [[29.0, 3.0], [3.0, 2.0]]
    >>> lk.plgk(G, weight="lr").values.tolist()
    [[27.0, 3.0], [3.0, 1.5]]
    """
    options: dict[str, Any] = {"device": device, "device_memory": device_memory}
    return _kernel("plgk", G, y, weight=weight, precision=precision, memory=memory, **options)


@checked()
def ips(
    G: Losses,
    y: Losses | None = None,
    *,
    weight: str | None = None,
    precision: str = "float32",
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    """Return the intrinsic perceptual similarity, lazily.

    The cosine of two examples' path features: the `plgk`, normalised.

    Parameters
    ----------
    G, y, weight, precision, memory, device, device_memory
        As for `plgk`.

    Returns
    -------
    xarray.DataArray
        ``ips(example, example_2)`` between -1 and 1, with a diagonal of exactly 1 without ``y``.
        An example whose gradient is zero at all times has 0 with all, itself included. Labels
        enter through the loss: it is a supervised diagnostic (remark 4.3).

    References
    ----------
    - Anonymous 2026, def. 8, eq. 15; remark 4.3: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> lk.ips(G).values.round(4).tolist()
    [[1.0, 0.3939], [0.3939, 1.0]]
    """
    options: dict[str, Any] = {"device": device, "device_memory": device_memory}
    options |= {"precision": precision, "memory": memory}
    return _kernel("ips", G, y, weight=weight, normalize="cosine", **options)


@checked()
def chord_distance(k: Losses) -> xr.DataArray:
    r"""Return :math:`\sqrt{2 - 2 k}`, the chord between path features, lazily.

    Parameters
    ----------
    k
        What `ips` (or another cosine kernel, such as `lkarray.correlation`) returned; or
        gradients, whose `ips` is then taken.

    Returns
    -------
    xarray.DataArray
        Of the kernel's dims, between 0 and 2. In float32, distances below 5e-4 are rounding. An
        example without gradient is at the root of 2 from all, itself included.

    Raises
    ------
    ValueError
        ``k`` is no cosine kernel, or an influence operator.

    References
    ----------
    - Anonymous 2026, corollary 4.1.1, eq. 16: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> lk.chord_distance(lk.ips(G)).values.round(4).tolist()
    [[0.0, 1.101], [1.101, 0.0]]
    """
    cosine = _cosine(k, "chord_distance")
    return _distance((2 - 2 * cosine) ** 0.5, "chord_distance", cosine, units="1")


@checked()
def angle_distance(k: Losses) -> xr.DataArray:
    r"""Return :math:`\arccos k`, the angle between path features, lazily.

    Parameters
    ----------
    k
        As for `chord_distance`.

    Returns
    -------
    xarray.DataArray
        Of the kernel's dims, in radians, between 0 and pi. In float32, angles below 5e-4 are
        rounding. An example without gradient is at pi/2 from all, itself included.

    Raises
    ------
    ValueError
        ``k`` is no cosine kernel, or an influence operator.

    References
    ----------
    - Anonymous 2026, corollary 4.1.1, eq. 16: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> lk.angle_distance(lk.ips(G)).values.round(4).tolist()
    [[0.0, 1.1659], [1.1659, 0.0]]
    """
    cosine = _cosine(k, "angle_distance")
    angle = xr.apply_ufunc(np.arccos, cosine, dask="allowed")
    return _distance(angle, "angle_distance", cosine, units="rad")


@checked()
def temporal_kernel(
    G: Losses,
    *,
    weight: str | None = "lr2",
    precision: str = "float32",
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    r"""Return the temporal kernel, lazily.

    .. math:: K[t, t'] = w(t) w(t') \sum_{m, p} g_m(t, p) g_m(t', p)

    Parameters
    ----------
    G, precision, memory, device, device_memory
        As for `lgk`.
    weight
        ``"lr2"``: w is the learning rate, as printed. ``"lr"``: its root. ``None``: 1.

    Returns
    -------
    xarray.DataArray
        ``temporal_kernel(time, time_2)``, whose trace is the sum of the squared (weighted)
        gradients. Rates scale the result, not the tensor.

    Raises
    ------
    SchemaError
        As for `plgk`.

    References
    ----------
    - Anonymous 2026, eq. 40: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> G = G.assign_coords(learning_rate=("time", [1.0, 0.5]))
    >>> lk.temporal_kernel(G).values.tolist()
    [[26.0, 4.5], [4.5, 1.25]]
    """
    x = as_gradients(G, need=(TIME, EXAMPLE, PARAM))
    root = root_weight(x, weight)
    over = tuple(str(dim) for dim in x.dims if dim != TIME)
    options: dict[str, Any] = {"device": device, "device_memory": device_memory}
    out = gram(x, over=over, precision=precision, memory=memory, **options)
    if root is not None:
        rate = np.broadcast_to(root.values, (x.sizes[TIME],))
        both = np.multiply.outer(rate, rate).astype(out.dtype)
        out = out.copy(data=out.data * both)
    return named(out, "temporal_kernel", weight, units="nat^2")


def _kernel(
    name: str,
    G: Losses,
    y: Losses | None,
    *,
    each: tuple[str, ...] = (),
    weight: str | None = None,
    normalize: str | None = None,
    **options: Any,
) -> xr.DataArray:
    units = "1" if normalize == "cosine" else "nat^2"
    if holds_factors(G):
        cosine = normalize == "cosine"
        root = root_weight(_coordinates(G), weight)
        out = factor_kernel(G, y, root=root, path=not each, cosine=cosine, **options)
        return named(out.assign_attrs(normalize=normalize or "none"), name, weight, units=units)
    x = as_gradients(G, need=(EXAMPLE, PARAM))
    other = None if y is None else as_gradients(y, name="y", need=(EXAMPLE, PARAM))
    path = path_dims(x, each)
    if other is not None:
        kept = (*path["over"], *path["each"])
        free_dim(other, "y", tuple(path["over"]), tuple(path["each"]))
        check_shared(x, other, kept)
    root = root_weight(x, weight)
    out = gram(
        weighted(x, root),
        None if other is None else weighted(other, root),
        normalize=normalize,
        **options,
        **path,
    )
    return named(out, name, weight, units=units)


def _coordinates(G: Losses) -> xr.DataArray:
    """Return the factors with their coordinates."""
    return G if isinstance(G, xr.DataArray) else xr.DataArray(G[FACTOR.name])


def kernel_or_gradients(k: Any, what: str) -> Any:
    """Return the kernel that a node or a Dataset holds; what holds gradients as it is."""
    if isinstance(k, xr.DataTree | xr.Dataset):
        wide = any(PARAM in v.dims for v in k.data_vars.values()) or FACTOR.name in k.data_vars
        if not wide and not (isinstance(k, xr.DataTree) and GRADIENTS in k.children):
            return as_array(k, what)
    return k


def _cosine(k: Losses, what: str) -> xr.DataArray:
    """Return a cosine kernel without rounding beyond [-1, 1], from itself or from gradients."""
    k = kernel_or_gradients(k, "k")
    if isinstance(k, xr.DataArray | xr.Dataset):
        require_kernel(k, what)
    if not isinstance(k, xr.DataArray) or PARAM in k.dims:
        as_gradients(k, name="k", need=(EXAMPLE, PARAM))
        k = ips(k)
    require_real("k", k)
    if k.attrs.get("normalize") != "cosine":
        raise ValueError(
            f"{what} needs a cosine kernel, as lk.ips returns it, and {k.name!r} is not known to "
            "be one: its attribute 'normalize' is "
            f"{k.attrs.get('normalize')!r}. In other kernels examples have norms, which no "
            "distance on the sphere is about"
        )
    return k.clip(-1, 1)


def _distance(x: xr.DataArray, name: str, k: xr.DataArray, *, units: str) -> xr.DataArray:
    kept = {key: value for key, value in k.attrs.items() if key not in ("normalize", "kernel")}
    return x.rename(name).drop_attrs(deep=False).assign_attrs(kept | {"units": units})
