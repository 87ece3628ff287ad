"""Modes of gradient tensors: at one time, of the parameters over a run, and of time itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from lkarray.analysis.gradients.gradient_kernels import kernel_or_gradients, temporal_kernel
from lkarray.analysis.gradients.path_sums import root_weight, weighted
from lkarray.arguments import checked
from lkarray.errors import NonFiniteError, SchemaError
from lkarray.kernels.coords import sample_coords
from lkarray.kernels.gram import gram
from lkarray.kernels.kinds import require_kernel
from lkarray.kernels.operands import check_shared, nan_for_infinite
from lkarray.kernels.spectra import svd
from lkarray.kernels.unfolding import merge
from lkarray.labels import in_order, squared
from lkarray.results import Result, as_array, opened
from lkarray.schema import EXAMPLE, MODE, PARAM, TIME, second
from lkarray.tensors import Losses, as_gradients
from lkarray.values import require_real

_ROWS = "lkarray_rows"  # times and examples, merged


@checked()
def modes(G: Losses, k: int, *, memory: int | str | None = None) -> xr.Dataset:
    r"""Return the top modes of the gradients at one time, and their drives, lazily.

    Anonymous 2026, algorithm 1: with :math:`\Phi = U S V'` of the M x P gradients, the loss of an
    example n changes in a step of full-batch gradient descent by :math:`-(\eta/M) \sum_k a_k s_k\,
    v_k \cdot g_n`.

    Parameters
    ----------
    G
        Gradients ``(example, param)`` of training examples at one time: ``G.isel(time=-1)``.
    k
        Modes.
    memory
        Byte budget of a process.

    Returns
    -------
    xarray.Dataset
        ``singular_value(mode)``, descending; ``direction(mode, param)``, v, and ``left(example,
        mode)``, u, orthonormal; ``alignment(mode)``, the sum a of u over examples; ``drive(mode)``,
        a times s. The entry of each u of largest magnitude is positive. Compute it at once:
        ``modes(...).compute()``; it is read again and again by what takes it.

    Raises
    ------
    SchemaError
        There are several times, or no ``example`` or ``param``.
    ValueError
        ``k`` exceeds the smaller of examples and parameters.

    Notes
    -----
    Cost and memory are those of `lkarray.svd`.

    References
    ----------
    - Anonymous 2026, algorithm 1: "Path-Integrated Loss-Gradient Kernels".
    - docs/methods/kernels.md.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> top = lk.modes(G.isel(time=0), 2).compute()
    >>> top["singular_value"].values.round(4).tolist()
    [5.0368, 0.7942]
    >>> top["drive"].values.round(4).tolist()
    [5.6145, 0.6912]
    """
    x = as_gradients(G, need=(EXAMPLE, PARAM))
    if x.sizes.get(TIME, 1) > 1:
        raise SchemaError(
            f"modes takes one time, and G has {x.sizes[TIME]}: select it with G.isel(time=-1), or "
            "see lk.parameter_modes for those of all times together"
        )
    if TIME in x.dims:
        x = x.isel({TIME: 0})
    decomposition = svd(x, k, over=PARAM, memory=memory)
    alignment = decomposition["u"].astype(np.float64).sum(EXAMPLE, skipna=False)
    return xr.Dataset(
        {
            "singular_value": decomposition["singular_value"],
            "direction": decomposition["v"].transpose(MODE, PARAM),
            "left": decomposition["u"],
            "alignment": alignment,
            "drive": alignment * decomposition["singular_value"],
        },
        attrs={"over": [PARAM]},
    )


@checked(modes=None)
def mode_coefficients(
    modes: Result, gradients: Losses, *, memory: int | str | None = None
) -> xr.DataArray:
    r"""Return the projections :math:`c_{kn} = v_k \cdot g_n` on modes, lazily.

    Parameters
    ----------
    modes
        What `modes`, `parameter_modes` or `online_modes` returned, computed: while it is lazy, it
        is decomposed again by each task. Directions ``(time, mode, param)`` are kept in step
        with the gradients; to project on what was frozen a time before:
        ``mode_coefficients(online.shift(time=1).isel(time=later), G.isel(time=later))``, with
        ``later = slice(1, None)``.
    gradients
        ``(example, param)`` or ``(time, example, param)``, of any examples.
    memory
        Byte budget of a process.

    Returns
    -------
    xarray.DataArray
        ``mode_coefficient(example, mode)``, or with ``time``. Summed over the training examples,
        it is the drive of each mode at that time.

    References
    ----------
    - Anonymous 2026, section 6.3: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> now = G.isel(time=0)
    >>> top = lk.modes(now, 2).compute()
    >>> summed = lk.mode_coefficients(top, now).sum("example")
    >>> bool(abs(summed - top["drive"]).max() < 1e-6)
    True
    """
    v = of_modes(modes, "direction")
    x = as_gradients(gradients, name="gradients", need=(EXAMPLE, PARAM))
    if TIME in v.dims or TIME not in x.dims:
        each = [TIME] if TIME in v.dims else []
        out = gram(x, v, over=PARAM, each=each, memory=memory)
        return _projected(out)
    rows = xr.DataArray(merge(x.variable, (TIME, EXAMPLE), _ROWS), name=x.name)
    out = gram(rows, v, over=PARAM, memory=memory)
    split = xr.DataArray(
        out.data.reshape((x.sizes[TIME], x.sizes[EXAMPLE], v.sizes[MODE])),
        dims=(TIME, EXAMPLE, MODE),
        coords=sample_coords(x, TIME, EXAMPLE) | {MODE: v[MODE]},
        attrs=out.attrs,
    )
    return _projected(split)


@checked(modes=None)
def cancellation_ratio(modes: Result, coefficients: Result) -> xr.DataArray:
    r"""Return how far the pushes of the leading modes add up, lazily.

    .. math:: CR(K, n) = |\sum_{k \le K} \Lambda_k c_{kn}| / \sum_{k \le K} |\Lambda_k c_{kn}|

    Parameters
    ----------
    modes
        With ``drive(mode)``, as `modes` returns it, or ``drive(time, mode)``: for directions that
        move, ``modes.assign(drive=mode_coefficients(modes, training).sum("example"))``.
    coefficients
        `mode_coefficients` of the examples asked about, for the same modes.

    Returns
    -------
    xarray.DataArray
        ``cancellation_ratio(..., example, mode)``: entry k is of the k + 1 leading modes. 1 where
        all push the same way, near 0 where they cancel, NaN where none pushes. The mean over a
        group of examples: ``ratio.groupby("group").mean()``.

    Raises
    ------
    SchemaError
        ``modes`` has no drive, or not for the modes of the coefficients.

    References
    ----------
    - Anonymous 2026, section 6.3: "Path-Integrated Loss-Gradient Kernels".
    - docs/methods/kernels.md.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> now = G.isel(time=0)
    >>> top = lk.modes(now, 2).compute()
    >>> lk.cancellation_ratio(top, lk.mode_coefficients(top, now)).values.round(3).tolist()
    [[1.0, 0.995], [1.0, 1.0]]
    """
    drive = of_modes(modes, "drive")
    coefficients = as_array(coefficients, "coefficients", prefer=("mode_coefficient",))
    if MODE not in coefficients.dims or coefficients.sizes[MODE] != drive.sizes[MODE]:
        raise SchemaError(
            f"coefficients have dims {dict(coefficients.sizes)}, and there are "
            f"{drive.sizes[MODE]} drives; pass mode_coefficients of the same modes, or select "
            "both: modes.isel(mode=slice(K))"
        )
    for dim in drive.dims:  # else xarray would keep those that both have, and say nothing
        if dim in coefficients.dims:
            index, n = coefficients.indexes.get(dim), coefficients.sizes[dim]
            drive = in_order(drive, dim, index, n, what="drive")
    bare = drive.drop_vars([name for name in drive.coords if name not in drive.dims])
    shared = tuple(str(dim) for dim in bare.dims if dim in coefficients.dims)
    check_shared(drive, coefficients, shared, names=("modes", "coefficients"))
    bare, own = (
        nan_for_infinite(x.drop_vars(shared, errors="ignore")) for x in (bare, coefficients)
    )
    push = (own * bare).astype(np.float64)
    net = abs(push.cumsum(MODE, skipna=False))
    gross = abs(push).cumsum(MODE, skipna=False)
    ratio = (net / gross.where(gross > 0)).clip(max=1).transpose(..., MODE)
    out: xr.DataArray = ratio.drop_attrs(deep=False).rename("cancellation_ratio")
    kept = sample_coords(coefficients, *map(str, coefficients.dims))
    return out.assign_attrs(units="1").assign_coords(kept | {MODE: coefficients[MODE]})


@checked()
def parameter_modes(
    G: Losses, k: int, *, weight: str | None = None, memory: int | str | None = None
) -> xr.Dataset:
    r"""Return the leading eigenvectors of the parameter covariance, lazily.

    .. math:: K_{param} = \sum_t w(t) \sum_m g_m(t) g_m(t)'

    by the singular vectors of the joint unfolding, without a P x P matrix.

    Parameters
    ----------
    G
        Gradients ``(time, example, param)``, or at one time.
    k
        Modes.
    weight
        As for `plgk`; ``"lr2"`` is the tensor of eq. 38.
    memory
        Byte budget of a process.

    Returns
    -------
    xarray.Dataset
        ``eigenvalue(mode)``, descending; ``direction(mode, param)``, orthonormal, its entry of
        largest magnitude positive; ``share(mode)`` of the trace. At one time, directions are those
        of `modes` up to sign.

    Raises
    ------
    SchemaError, ValueError
        As for `plgk` and `lkarray.svd`.

    Notes
    -----
    Cost and memory of `lkarray.svd`, and one more pass for the trace.

    References
    ----------
    - Anonymous 2026, A.6.3 and eq. 38: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> lk.parameter_modes(G, 2)["share"].values.round(4).tolist()
    [0.9134, 0.0866]
    """
    x = as_gradients(G, need=(EXAMPLE, PARAM))
    x = weighted(x, root_weight(x, weight))
    over = [str(dim) for dim in x.dims if dim != PARAM]
    decomposition = svd(x, k, over=over, memory=memory)
    value = decomposition["singular_value"] ** 2
    trace = (x.astype(np.float64) ** 2).sum(skipna=False).variable
    return xr.Dataset(
        {
            "eigenvalue": value,
            "direction": decomposition["u"].transpose(MODE, PARAM),
            "share": value / trace.where(trace > 0),
        },
        attrs={"over": over, "weight": weight or "none"},
    )


@checked()
def temporal_modes(
    K_or_G: Losses,
    k: int | None = None,
    *,
    weight: str | None = "lr2",
    memory: int | str | None = None,
) -> xr.Dataset:
    """Return the eigenvalues and vectors of the temporal kernel, lazily.

    Parameters
    ----------
    K_or_G
        What `temporal_kernel` returned, or gradients, whose kernel is then taken.
    k
        Modes; all by default.
    weight, memory
        As for `temporal_kernel`, where gradients are given.

    Returns
    -------
    xarray.Dataset
        ``eigenvalue(mode)``, descending, at least 0; ``loading(time, mode)``, orthonormal, its
        entry of largest magnitude positive; ``share(mode)`` of the trace, which is the energy of
        the gradients. float64.

    Raises
    ------
    ValueError
        It is an influence operator, or ``k`` is not between 1 and the number of times.
    SchemaError
        It is neither gradients nor ``(time, time_2)``.

    Notes
    -----
    A dense decomposition of the T x T kernel, in one task.

    References
    ----------
    - Anonymous 2026, eq. 40 and A.7: "Path-Integrated Loss-Gradient Kernels".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]
    >>> G = xr.DataArray(values, dims=("time", "example", "param"))
    >>> G = G.assign_coords(learning_rate=("time", [1.0, 0.5]))
    >>> lk.temporal_modes(G)["share"].values.round(4).tolist()
    [0.9832, 0.0168]
    """
    kernel = kernel_or_gradients(K_or_G, "K_or_G")
    if not isinstance(kernel, xr.DataArray) or PARAM in kernel.dims:
        as_gradients(kernel, name="K_or_G")
        kernel = temporal_kernel(kernel, weight=weight, memory=memory)
    require_kernel(kernel, "temporal_modes")
    if set(kernel.dims) != {TIME, second(TIME)} or len(set(kernel.shape)) != 1:
        raise SchemaError(
            f"temporal_modes takes a kernel (time, time_2), not {dict(kernel.sizes)}; pass "
            "lk.temporal_kernel(G), or gradients"
        )
    kernel = squared(kernel.transpose(TIME, second(TIME)), "kernel")
    require_real("K_or_G", kernel)
    times = kernel.sizes[TIME]
    k = times if k is None else k
    if not 1 <= k <= times:
        raise ValueError(f"k must be between 1 and {times}, the number of times, not {k}")
    value, loading, share = xr.apply_ufunc(
        _eigh,
        kernel.drop_vars([name for name, c in kernel.coords.items() if second(TIME) in c.dims]),
        input_core_dims=[[TIME, second(TIME)]],
        output_core_dims=[[MODE], [TIME, MODE], [MODE]],
        kwargs={"k": k},
        dask="parallelized",
        output_dtypes=[np.float64] * 3,
        dask_gufunc_kwargs={"output_sizes": {MODE: k}, "allow_rechunk": True},
    )
    return xr.Dataset(
        {"eigenvalue": value, "loading": loading, "share": share},
        coords={MODE: np.arange(k)},
        attrs={"weight": kernel.attrs.get("weight", "none")},
    )


def _eigh(kernel: np.ndarray, *, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not np.isfinite(kernel).all():
        raise NonFiniteError("temporal_modes: K_or_G holds NaN or infinity; compute it without")
    value, vector = np.linalg.eigh(kernel.astype(np.float64))
    value, vector = np.maximum(value[::-1], 0), vector[:, ::-1]
    top = np.take_along_axis(vector, np.abs(vector).argmax(0)[None], 0)
    whole = value.sum()
    share = value / whole if whole > 0 else np.full_like(value, np.nan)
    return value[:k], (vector * np.where(top < 0, -1, 1))[:, :k], share[:k]


def of_modes(modes: Any, name: str) -> xr.DataArray:
    """Return a variable of modes, or say that they lack it."""
    modes = opened(modes, "modes")
    if not isinstance(modes, xr.Dataset) or name not in modes or MODE not in modes[name].dims:
        raise SchemaError(
            f"modes must be a Dataset with {name!r} along 'mode', as lk.modes returns it; for "
            "directions without drives, modes.assign(drive=...) adds them"
        )
    require_real(f"modes: {name}", modes[name])
    return modes[name]


def _projected(x: xr.DataArray) -> xr.DataArray:
    return x.rename("mode_coefficient").assign_attrs(units="nat")
