"""Kernels and summaries of loss tensors ``loss(chain, draw, sample)``."""

from __future__ import annotations

from typing import Any

import xarray as xr

from lkarray import schema
from lkarray.analysis.losses.summaries import attributes, loss_variance
from lkarray.arguments import checked
from lkarray.kernels.gram import gram
from lkarray.kernels.kinds import verdict_of
from lkarray.kernels.operands import CENTERS, free_dim
from lkarray.kernels.shrinkage import ledoit_wolf, shrunk
from lkarray.schema import POSTERIOR, STACKED, Losses, as_losses
from lkarray.values import one_of


@checked()
def covariance(
    losses: Losses,
    y: Losses | None = None,
    *,
    center: str = "pooled",
    shrinkage: str | float | None = None,
    precision: str = "float32",
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    """Return the loss kernel K, the covariance of per-sample losses.

    Parameters
    ----------
    losses, y
        Loss tensors ``(chain, draw, sample)``, or what holds one; ``y=None`` means ``losses``.
    center
        ``"pooled"`` subtracts one mean over all chains and divides by CT - 1, as the papers
        do; ``"chain"`` subtracts each chain's mean and divides by C(T - 1); ``"draw"`` subtracts
        the chains' mean at the same draw and divides by T(C - 1). A transient that all chains
        share, as after too short a burn-in, is gone from it, for 1/C of the draws' worth;
        `diagnostics` says when to use it.
    shrinkage
        ``"ledoit-wolf"`` (see `ledoit_wolf`) or a share d in [0, 1] returns
        ``(1 - d) K + d mean(diag K) I``, whose error is smaller when draws are few.
    precision
        ``"float32"`` or ``"auto"``; see `gram`.
    memory
        Byte budget of a process.
    device, device_memory
        Where products are made, and the bytes to use there; see `gram`.

    Returns
    -------
    xarray.DataArray
        ``covariance(sample, sample_2)`` in nats squared, lazy; see `gram` for cost, memory
        and errors.

    References
    ----------
    - Adam et al. 2025a, eq. 2 and appendix B: "The Loss Kernel", arXiv:2509.26537.
    - docs/methods/kernels.md.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> lk.covariance(losses).values.tolist()
    [[1.0, 2.0, -1.0], [2.0, 4.0, -2.0], [-1.0, -2.0, 1.0]]
    """
    out = _kernel(
        "covariance",
        losses,
        y,
        center=center,
        normalize="count",
        precision=precision,
        memory=memory,
        device=device,
        device_memory=device_memory,
    )
    if shrinkage is None:
        return out
    if y is not None:
        raise ValueError("shrinkage is for the covariance of one tensor with itself, without y")
    if shrinkage == "ledoit-wolf":
        share: xr.DataArray | float = ledoit_wolf(losses, center=center, memory=memory)
    elif isinstance(shrinkage, str) or not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must be 'ledoit-wolf' or in [0, 1], not {shrinkage!r}")
    else:
        share = float(shrinkage)
    if center != "pooled":
        raise ValueError("shrinkage is for pooled covariances")
    level = loss_variance(losses).mean(skipna=False)
    return shrunk(out, share, level).assign_attrs(shrinkage=shrinkage)


@checked()
def correlation(
    losses: Losses,
    y: Losses | None = None,
    *,
    center: str = "pooled",
    precision: str = "float32",
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    """Return the loss correlation kernel R.

    ``R = K(x, x') / sqrt(K(x, x) K(x', x'))``, and 0 where a sample's loss does not vary.
    Its Monte-Carlo error is about one over the root of the *effective* number of draws.

    Parameters
    ----------
    losses, y, center, precision, memory, device, device_memory
        As for `covariance`.

    Returns
    -------
    xarray.DataArray
        ``correlation(sample, sample_2)`` between -1 and 1, lazy; see `gram`.

    References
    ----------
    - Adam et al. 2025a, section 2.3 and appendix B: "The Loss Kernel", arXiv:2509.26537.
    - docs/methods/kernels.md.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> lk.correlation(losses).values.round(6).tolist()
    [[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]
    """
    return _kernel(
        "correlation",
        losses,
        y,
        center=center,
        normalize="cosine",
        precision=precision,
        memory=memory,
        device=device,
        device_memory=device_memory,
    )


@checked()
def influence(
    losses: Losses,
    query: Losses,
    *,
    precision: str = "float32",
    memory: int | str | None = None,
    device: str | None = None,
    device_memory: int | str | None = None,
) -> xr.DataArray:
    """Return the Bayesian influence of training samples on queries.

    ``-Cov(train loss, query loss)``, pooled. The derivative of a query's posterior mean loss
    with respect to a training sample's weight in the mean loss's sum is this times the
    attribute ``derivative_scale = nbeta / n`` (docs/methods/laplace.md), where nbeta is known.

    Parameters
    ----------
    losses
        Losses of training samples, ``(chain, draw, sample)``.
    query
        Losses of other inputs at the same draws; or any observable ``(chain, draw)``, or with
        one more dim: ``tree["observables"]["name"]`` gives its susceptibilities to the weights of
        the samples (Baker et al. 2025), up to scale.
    precision
        ``"float32"`` or ``"auto"``; see `gram`.
    memory
        Byte budget of a process.
    device, device_memory
        Where products are made, and the bytes to use there; see `gram`.

    Returns
    -------
    xarray.DataArray
        ``influence(sample, query)`` in nats squared (or nats times the observable's unit), lazy;
        ``influence(sample)`` for an observable of dims (chain, draw). See `gram`.

    References
    ----------
    - Adam et al. 2025a, eq. 6: "The Loss Kernel", arXiv:2509.26537.
    - Kreer et al. 2025: "Bayesian influence functions for Hessian-free data attribution",
      arXiv:2509.26544.
    - Baker et al. 2025: "Structural Inference: Studying Small Language Models with
      Susceptibilities", arXiv:2504.18274.
    - docs/methods/laplace.md, "Scales".

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> lk.influence(losses, losses.isel(sample=[0])).values.tolist()
    [[-1.0], [-2.0], [1.0]]
    """
    asked = schema.as_observable(query, name="query")
    scalar = set(asked.dims) == set(POSTERIOR)
    if scalar:
        asked = asked.expand_dims(schema.QUERY, axis=-1)
    each = tuple(dim for dim in STACKED if dim in asked.dims)
    dim = free_dim(asked, "query", POSTERIOR, each)
    names = {
        name: f"{schema.QUERY}_{name}" for name, coord in asked.coords.items() if dim in coord.dims
    }
    query = asked.rename(names | {dim: schema.QUERY})
    out = _kernel(
        "influence",
        losses,
        query,
        center="pooled",
        normalize="count",
        precision=precision,
        scale=-1.0,
        memory=memory,
        device=device,
        device_memory=device_memory,
    )
    attrs = attributes(losses)
    if "nbeta" in attrs and "n_train" in attrs:
        out.attrs["derivative_scale"] = attrs["nbeta"] / attrs["n_train"]
    return out.isel({schema.QUERY: 0}, drop=True) if scalar else out


def _kernel(
    name: str,
    losses: Losses,
    y: Losses | None,
    *,
    center: str,
    normalize: str,
    **options: Any,
) -> xr.DataArray:
    one_of("center", center, CENTERS)
    x = as_losses(losses, extra=STACKED)
    out = gram(
        x,
        None if y is None else as_losses(y, name="y", extra=STACKED),
        over=POSTERIOR,
        each=[dim for dim in STACKED if dim in x.dims],
        center=center,
        normalize=normalize,
        **options,
    )
    out.attrs |= verdict_of(x)
    out.attrs["units"] = "nat^2" if normalize == "count" else "1"
    return out.rename(name)
