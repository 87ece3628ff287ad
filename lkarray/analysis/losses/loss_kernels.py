"""Kernels and summaries of loss tensors ``loss(chain, draw, sample)``."""

from __future__ import annotations

from typing import Any, cast

import xarray as xr

from lkarray import schema
from lkarray.analysis.losses.summaries import attributes, loss_variance
from lkarray.arguments import checked
from lkarray.engine import WRITTEN_BYTES, Contraction, make_plan, table_bytes
from lkarray.kernels.control import as_control, controlled_operand
from lkarray.kernels.estimators import estimated, find_outcome, refuse_by_draw
from lkarray.kernels.gram import contract, labelled
from lkarray.kernels.kinds import verdict_of
from lkarray.kernels.operands import CENTERS, centring, free_dim
from lkarray.kernels.shrinkage import ledoit_wolf, shrunk
from lkarray.links import Link, as_link, identity
from lkarray.schema import POSTERIOR, STACKED
from lkarray.tensors import Losses, as_losses, as_observable, contracted
from lkarray.values import one_of


@checked()
def covariance(
    losses: Losses,
    y: Losses | None = None,
    *,
    center: str = "pooled",
    estimator: str = "sample",
    shrinkage: str | float | None = None,
    control: xr.Dataset | None = None,
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
    estimator
        ``"sample"``, the covariance of the losses over the draws, as in the papers. Or
        ``"gaussian"``: that of losses whose *outcomes* (log-odds, residuals) are jointly Gaussian
        with the means and covariances that they have over the draws, exactly, by Mehler's
        expansion. Where outcomes are near to Gaussian (`diagnostics` says how near), it has the
        error of their covariance, which losses that jump rarely exceed by far: often as much as
        ten times the draws. It needs a Dataset or node with an outcome beside ``loss``, or a
        DataArray with the attribute ``link`` (``"softplus"``, ``"square"``, or a function of an
        array).
    shrinkage
        ``"ledoit-wolf"`` (see `ledoit_wolf`) or a share d in [0, 1] returns
        ``(1 - d) K + d mean(diag K) I``, whose error is smaller when draws are few.
    control
        Features of the law that ``lk.sample(..., control=...)`` ran its linear chains in:
        ``lk.laplace(posterior, observed, rank=..., step_size=..., sketch=None)``. What these chains
        predict of each draw is regressed out of it, and its covariance, which features give
        exactly, put in its place: the kernel has the same expectation and less noise, as far as
        predictions are right. ``losses`` is then the node or Dataset with the predictions beside
        losses or an outcome, and without ``y`` and ``device``. They serve log-odds (``tree["losses"
        ].to_dataset()[["log_odds", "log_odds_prediction"]]``) and ``estimator="gaussian"`` better
        than losses, which bend. Attributes: ``control_removed``, the share of the variance over
        draws that was regressed out (median of samples), and ``control_fallback``, for how many
        samples the corrected variance was not above 0, so that it is that of the draws.
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

    Notes
    -----
    ``estimator="gaussian"`` makes correlations of outcomes, and of each entry a series of at most
    40 terms, as many as leave less than 1e-6 of ``sqrt(K_ii K_jj)``. Entries err by a few
    roundings of float32 of that root. Of log-odds whose standard deviation is above 5 or so, 40
    terms may leave more where correlations are near 1 (1e-4 at 8 and 0.95).

    References
    ----------
    - Adam et al. 2025a, eq. 2 and appendix B: "The Loss Kernel", arXiv:2509.26537.
    - Mehler 1866: "Ueber die Entwicklung einer Function von beliebig vielen Variablen nach
      Laplaceschen Functionen höherer Ordnung", doi:10.1515/crll.1866.66.161.
    - docs/methods/kernels.md.

    Examples
    --------
    >>> import xarray as xr, lkarray as lk
    >>> values = [[[0.0, 1.0, 4.0], [1.0, 3.0, 3.0], [2.0, 5.0, 2.0]]]
    >>> losses = xr.DataArray(values, dims=("chain", "draw", "sample"))
    >>> lk.covariance(losses).values.tolist()
    [[1.0, 2.0, -1.0], [2.0, 4.0, -2.0], [-1.0, -2.0, 1.0]]

    Squares of Gaussian residuals of covariance c and means m have the covariance
    ``2 c**2 + 4 m_i m_j c``:

    >>> residuals = losses.assign_attrs(link="square")
    >>> lk.covariance(residuals, estimator="gaussian").values.round(3).tolist()
    [[6.0, 32.0, -10.0], [32.0, 176.0, -64.0], [-10.0, -64.0, 38.0]]
    """
    if control is not None:
        if shrinkage is not None:
            raise ValueError("shrinkage is of the plain sample covariance: leave control= out")
        options: dict[str, Any] = {"center": center, "estimator": estimator}
        options |= {"memory": memory, "device": device}
        return _controlled("covariance", losses, y, control, **options)
    if shrinkage is not None and estimator != "sample":
        raise ValueError(
            'shrinkage is of the sample covariance: leave estimator="gaussian" out, or shrinkage='
        )
    out = _kernel(
        "covariance",
        losses,
        y,
        estimator=estimator,
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
    estimator: str = "sample",
    control: xr.Dataset | None = None,
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
    losses, y, center, estimator, control, precision, memory, device, device_memory
        As for `covariance`. With a control, variances are the corrected ones too.

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
    if control is not None:
        options: dict[str, Any] = {"center": center, "estimator": estimator}
        options |= {"memory": memory, "device": device}
        return _controlled("correlation", losses, y, control, **options)
    return _kernel(
        "correlation",
        losses,
        y,
        estimator=estimator,
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
    estimator: str = "sample",
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
    estimator
        ``"sample"`` or ``"gaussian"``, as for `covariance`: of the outcomes of ``losses``, and of
        those of ``query`` where it has them; any other observable is taken as Gaussian itself.
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
    asked, link = _asked(query, estimator)
    scalar = set(asked.dims) == set(POSTERIOR)
    if scalar:
        asked = asked.expand_dims(schema.QUERY, axis=-1)
    each = tuple(dim for dim in STACKED if dim in asked.dims)
    dim = free_dim(asked, "query", contracted(asked), each)
    names = {
        name: f"{schema.QUERY}_{name}" for name, coord in asked.coords.items() if dim in coord.dims
    }
    query = asked.rename(names | {dim: schema.QUERY})
    out = _kernel(
        "influence",
        losses,
        query,
        link=link,
        estimator=estimator,
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


def _controlled(
    name: str,
    losses: Losses,
    y: Losses | None,
    control: xr.Dataset,
    *,
    center: str,
    estimator: str,
    memory: Any,
    device: str | None,
) -> xr.DataArray:
    """Return a kernel with a control."""
    if y is not None or device is not None:
        raise ValueError(
            "control= is for the kernel of one tensor with itself, on the cores: leave "
            "y= and device= out"
        )
    made = as_control(losses, control, center=center, estimator=estimator)
    operand, series, attrs = controlled_operand(made, name, memory)
    held = 0 if series is None else table_bytes(operand)
    plan = make_plan(operand, memory=memory, sink=WRITTEN_BYTES, held=held)
    contraction = Contraction(operand, None, plan, series=series)
    known: dict[str, Any] = {
        "over": [*POSTERIOR],
        "center": center,
        "normalize": "count" if name == "covariance" else "cosine",
        "contracted": made.x.sizes["chain"] * made.x.sizes["draw"],
        "estimator": estimator,
    }
    sides: dict[str, Any] = {"each": (), "rows": made.rows, "columns": made.rows}
    out = labelled(contraction, made.x, None, **sides, attrs=known | attrs | verdict_of(made.x))
    units = "nat^2" if estimator == "gaussian" else schema.product_units(made.x)
    out.attrs["units"] = units if name == "covariance" else "1"
    return out.rename(name)


def _kernel(
    name: str,
    losses: Losses,
    y: Losses | None,
    *,
    estimator: str,
    link: Link | None = None,
    center: str,
    normalize: str,
    **options: Any,
) -> xr.DataArray:
    """Return a kernel; ``link`` is that of ``y``, where it is no tensor of losses."""
    one_of("center", center, CENTERS)
    x, own = estimated(losses, estimator, extra=STACKED)
    refuse_by_draw(own, center)
    other, theirs = None, own
    if link is not None:
        other, theirs = as_losses(cast(Losses, y), name="y", extra=STACKED), link
    elif y is not None:
        other, theirs = estimated(y, estimator, name="y", extra=STACKED)
    over = contracted(x)
    out = contract(
        x,
        other,
        over=over,
        each=tuple(dim for dim in STACKED if dim in x.dims),
        center=centring(x, center),
        normalize=normalize if over == POSTERIOR or normalize == "cosine" else None,
        links=(own, theirs),
        **options,
    )
    out.attrs |= verdict_of(x)
    out.attrs.setdefault("estimator", estimator)
    units = "nat^2" if estimator == "gaussian" else schema.product_units(x, other)
    out.attrs["units"] = units if normalize == "count" else "1"
    return out.rename(name)


def _asked(query: Losses, estimator: str) -> tuple[xr.DataArray, Link | None]:
    """Return the observable that influence is of, and with ``"gaussian"`` its link."""
    outcome = find_outcome(query) if estimator == "gaussian" else None
    if outcome is not None:
        return outcome, as_link(outcome.attrs["link"], what=f"query: variable {outcome.name!r}")
    asked = as_observable(query, name="query")
    if estimator != "gaussian":
        return asked, None
    if asked.name == schema.LOSS.name:  # a loss is what is not Gaussian
        estimated(query, estimator, name="query")
    return asked, Link("identity", identity)
