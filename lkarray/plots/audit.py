"""Figures of audits: is one complete, who decided, and where influence cancels.

See Anonymous 2026, 6.1, 6.3.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lkarray.analysis import audits
from lkarray.analysis.audits.influence import as_influence, whole_influence
from lkarray.arguments import checked
from lkarray.errors import SchemaError
from lkarray.plots.training import mosaic
from lkarray.results import Result, as_array, as_dataset, opened
from lkarray.schema import AUDIT, EPOCH, LAYER, OUTPUT, RANK
from lkarray.waiting import computed

_HELPFUL, _HARMFUL = "#3f90da", "#bd1f01"
_DRAWN = 2000  # points of a curve
_CURVES = 100  # curves drawn one by one
_NEAREST = 1e-16  # to a correlation of 1, in float64


@checked(audit=None)
def completeness(audit: xr.DataTree | xr.Dataset) -> Figure:
    """Draw MRE and LC by the end of each epoch (Anonymous 2026, figure 1).

    LC is drawn on a scale that is logarithmic towards 1: 0.9, 0.99, 0.999 are evenly spaced.

    Parameters
    ----------
    audit
        What `lkarray.audit` or `lkarray.completeness` returned.
    """
    given = "mre" in getattr(audit, "data_vars", ())
    table = computed(as_dataset(audit, "audit") if given else audits.completeness(audit))
    epochs = table[EPOCH].values if EPOCH in table.coords else np.arange(table.sizes[EPOCH])
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    style: dict[str, Any] = {"marker": "o", "ms": 3, "color": _HELPFUL}
    left.plot(epochs, table["mre"], **style)
    units = table["mre"].attrs.get("units", "1")
    left.set(xlabel="epoch", ylabel=f"MRE ({units})", title="Mean reconstruction error")
    left.set_ylim(0, 1.08 * float(table["mre"].max()) or 1)
    gap = np.clip(1 - table["lc"].values, _NEAREST, None)
    right.plot(epochs, gap, **style)
    right.set(xlabel="epoch", ylabel="LC", title="Correlation with the true change")
    if np.isfinite(gap).any():
        _towards_one(right, gap[np.isfinite(gap)])
    for axes in (left, right):
        axes.grid(alpha=0.25)
    if not table.attrs.get("complete", True):
        figure.suptitle(f"partial audit: {table.attrs.get('incomplete', '')}", fontsize=10)
    return figure


def _towards_one(axes: Axes, gap: np.ndarray) -> None:
    """Scale an axis by how far what it shows is below 1, whole decades of it."""
    low, high = np.floor(np.log10(gap.min())), np.ceil(np.log10(gap.max()))
    axes.set_yscale("log")
    axes.set_ylim(10 ** max(high, low + 1), 10**low)
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())

    def name(value: float, _: int) -> str:
        digits = max(round(-np.log10(value)), 0)
        return f"{1 - value:.{digits}f}" if digits < 8 else f"1 - 1e-{digits}"

    axes.yaxis.set_major_formatter(FuncFormatter(name))


@checked(audit=None)
def decision(audit: Result, at: Hashable, image: np.ndarray | None = None) -> Figure:
    """Draw one audited example's input and the influences on it, sorted (Anonymous 2026, figure 2).

    Parameters
    ----------
    audit
        What `lkarray.audit` returned, or its influence; one ``output`` selected, if it has them.
    at
        Label of the audited example (its position, without labels).
    image
        Its input, ``(height, width)`` or with three colours.
    """
    x, source = as_influence(audit)
    one = _column(x, at)
    values = np.sort(whole_influence(one, source).values.astype(np.float64))
    helped, harmed = values[values < 0].sum(), values[values > 0].sum()
    shown = _ends(len(values))
    figure = Figure(figsize=(11 if image is not None else 7, 4.4), layout="constrained")
    grid = figure.subplots(1, 2 if image is not None else 1, squeeze=False)[0]
    if image is not None:
        grid[0].imshow(image, cmap="gray", interpolation="nearest")
        grid[0].set_axis_off()
        labels = [
            f"{name} {c.item()}"
            for name, c in one.coords.items()
            if not c.ndim and name not in (AUDIT, OUTPUT)
        ]
        grid[0].set_title(f"audited example {at}" + "".join(f", {text}" for text in labels))
    axes, units = grid[-1], x.attrs.get("units", "nat")
    for sign, color, total, name in (
        (-1, _HELPFUL, helped, "helpful"),
        (1, _HARMFUL, harmed, "harmful"),
    ):
        part = shown[sign * values[shown] >= 0]
        count = int((sign * values > 0).sum())
        text = f"{count:,} {name}: {total:+.3g} {units}"
        axes.fill_between(part, values[part], color=color, alpha=0.35, lw=0)
        axes.plot(part, values[part], color=color, label=text)
    axes.axhline(0, color="0.7", lw=0.8, zorder=0)
    axes.set(
        xlabel=f"training {source}s, sorted by influence",
        ylabel=f"influence ({units})",
        title=f"Influences add up to {helped + harmed:+.3g} {units}",
    )
    axes.legend(frameon=False, loc="upper left")
    return figure


@checked()
def influential_images(
    audit_or_table: Result,
    images: Any,
    at: Hashable,
    k: int = 25,
    *,
    by: str | None = None,
) -> Figure:
    """Show the most helpful and the most harmful training images (Anonymous 2026, figures 3 and 4).

    Parameters
    ----------
    audit_or_table
        What `lkarray.audit` or `lkarray.most_influential` returned; one ``output`` selected, if
        it has them.
    images
        Of the training set, ``(n, height, width)`` or with three colours: what ``images[label]``
        gives for the label of a training example is shown; of a DataArray with an index, what is
        labelled so.
    at
        Label of the audited example (its position, without labels).
    k
        Images at each end. Those of the other sign are left out.
    by
        Coordinate of the training examples: a row for each class. For one class, select it in the
        table: ``table.sel(train_label=6)``.
    """
    x = opened(audit_or_table, "audit_or_table")
    if isinstance(x, xr.Dataset) and "helpful" in x.data_vars:
        table = xr.Dataset({name: _column(x[name], at) for name in x.data_vars}, attrs=x.attrs)
        split = [str(dim) for dim in table["helpful"].dims if dim != RANK]
    else:
        influence = _column(as_influence(x)[0], at)
        table = audits.most_influential(influence, k, by=by)
        split = [] if by is None else [by]
    table = computed(table.isel({RANK: slice(k)}).transpose(*split, RANK))
    rows = [table.isel({split[0]: i}) for i in range(table.sizes[split[0]])] if split else [table]
    side = int(np.ceil(np.sqrt(min(k, table.sizes[RANK]))))
    size = 3.6 if len(rows) == 1 else 2.4
    figure = Figure(figsize=(2 * size + 0.4, (size + 0.35) * len(rows) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False, gridspec_kw={"wspace": 0.1})
    by = table.attrs.get("by")
    for line, row in zip(grid, rows, strict=True):
        text = f"{by} {row[by].item()}: " if by in row.coords else ""
        for axes, name, sign in zip(line, ("helpful", "harmful"), (-1, 1), strict=True):
            _grid_of(axes, row, images, (name, sign), side, text)
    figure.suptitle(f"Training images that moved audited example {at}", fontsize=12)
    return figure


def _grid_of(
    axes: Axes, row: xr.Dataset, images: Any, end: tuple[str, int], side: int, text: str
) -> None:
    name, sign = end
    values = row[f"{name}_influence"].values
    kept = sign * values > 0  # NaN is not
    axes.set_axis_off()
    if not kept.any():
        axes.set_title(f"{text}none {name}", fontsize=9)
        return
    shown = np.stack([_image(images, label) for label in row[name].values[kept].tolist()])
    axes.imshow(mosaic(shown, side), cmap="gray", interpolation="nearest")
    units = row[f"{name}_influence"].attrs.get("units", "nat")
    span = f"{values[kept][0]:+.2g} to {values[kept][-1]:+.2g} {units}"
    axes.set_title(f"{text}most {name}\n{span}", fontsize=9)


def _image(images: Any, label: Any) -> np.ndarray:
    """Return the image of a training example."""
    if isinstance(images, xr.DataArray) and images.dims[0] in images.indexes:
        try:
            return np.asarray(images.sel({images.dims[0]: label}))
        except KeyError:
            raise SchemaError(f"images has none that is labelled {label!r}") from None
    return np.asarray(images[label])


@checked(audit=None)
def concentration(audit: Result) -> Figure:
    """Draw which share of all influence the most influential training examples hold.

    Parameters
    ----------
    audit
        What `lkarray.audit` or `lkarray.concentration` returned. A curve for each audited example;
        of more than 100, their median and the range that holds 80% of them.
    """
    given = "examples" in getattr(audit, "dims", ())
    share = as_array(audit, "audit") if given else audits.concentration(audit)
    counts = share["examples"].values
    curves = share.transpose("examples", ...).values.reshape(len(counts), -1)
    curves = curves[:, ~np.isnan(curves).any(0)]
    if not curves.size:
        raise SchemaError("no training example has influence on any audited example")
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    if curves.shape[1] <= _CURVES:
        axes.plot(counts, curves, color=_HELPFUL, alpha=0.3, lw=0.8)
    else:
        low, high = np.quantile(curves, (0.1, 0.9), axis=1)
        axes.fill_between(counts, low, high, color=_HELPFUL, alpha=0.25, lw=0, label="80% of them")
    middle = np.median(curves, axis=1)
    axes.plot(counts, middle, color="#111111", label="median audited example")
    half = counts[np.argmax(middle >= 0.5)]
    axes.plot([half, half], [0, 0.5], color="0.5", lw=0.8, ls="--")
    axes.annotate(
        f" {half:,} of {counts[-1]:,} hold half",
        (half, 0.04),
        fontsize=9,
        color="0.3",
        ha="left" if half < counts[-1] ** 0.6 else "right",
    )
    axes.set(
        xscale="log",
        ylim=(0, 1.02),
        xlim=(1, counts[-1]),
        xlabel="most influential training examples",
        ylabel="share of all influence",
        title="Concentration of influence",
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left")
    return figure


@checked(audit=None)
def layer_epoch(audit: Result) -> Figure:
    """Draw net and gross influence of each layer and epoch.

    See Anonymous 2026, section 6.3, figure 10.

    Parameters
    ----------
    audit
        What `lkarray.audit` returned with ``groups={"param": "module", "time": "epoch"}``. Means
        over the audited examples: select those of one kind to compare it with another.
    """
    x, _ = as_influence(audit)
    missing = [dim for dim in (LAYER, EPOCH) if dim not in x.dims]
    if missing:
        raise SchemaError(
            f"the influence has dims {x.dims}, which lack {missing}; audit with groups={{'param': "
            "'module', 'time': 'epoch'}"
        )
    figure = Figure(figsize=(13, 0.45 * x.sizes[LAYER] + 2.4), layout="constrained")
    units = x.attrs.get("units", "nat")
    for axes, make, sign in zip(
        figure.subplots(1, 2, sharey=True),
        (audits.net_influence, audits.gross_influence),
        ("", "|"),
        strict=True,
    ):
        means = make(x)
        table = means.mean([dim for dim in means.dims if dim not in (LAYER, EPOCH)])
        table = computed(table.transpose(LAYER, EPOCH))
        _heatmap(axes, table, f"{sign}influence{sign} ({units})", diverging=not sign)
    figure.axes[0].set_title("Net influence: signed sum")
    figure.axes[1].set_title("Gross influence: sum of magnitudes")
    return figure


def _heatmap(axes: Axes, table: xr.DataArray, label: str, *, diverging: bool) -> None:
    values = table.values
    scale: dict[str, Any] = {"cmap": "viridis"}
    positive = values[values > 0]
    if diverging:
        limit = float(np.abs(values).max()) or 1.0
        scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    elif positive.size and positive.min() < positive.max():  # layers differ by decades
        scale["norm"] = LogNorm(max(positive.min(), positive.max() * 1e-4), positive.max())
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **scale)
    figure: Any = axes.figure
    figure.colorbar(image, ax=axes, label=label, extend="neither" if diverging else "min")
    layers = table[LAYER].values if LAYER in table.coords else np.arange(len(values))
    epochs = table[EPOCH].values if EPOCH in table.coords else np.arange(values.shape[1])
    chosen = np.arange(0, len(epochs), -(-len(epochs) // 11))
    axes.set_yticks(range(len(layers)), [str(name) for name in layers])
    axes.set_xticks(chosen, [str(epoch) for epoch in epochs[chosen]])
    axes.set(xlabel="epoch")


def _column(x: xr.DataArray, at: Hashable) -> xr.DataArray:
    """Return what is of one audited example."""
    if OUTPUT in x.dims:
        raise SchemaError(
            f"{x.name!r} has {x.sizes[OUTPUT]} outputs, and a figure shows one: select it with "
            "audit.isel(output=...)"
        )
    if AUDIT not in x.dims:
        raise SchemaError(f"{x.name!r} has dims {x.dims}, and no 'audit' to find {at!r} along")
    try:
        return x.sel({AUDIT: at}) if AUDIT in x.indexes else x.isel({AUDIT: at})
    except (KeyError, IndexError) as error:
        raise SchemaError(f"there is no audited example {at!r} among {x.sizes[AUDIT]}") from error


def _ends(n: int) -> np.ndarray:
    """Return positions to draw of a sorted curve: all, or those that are dense at both ends."""
    if n <= _DRAWN:
        return np.arange(n)
    dense = np.geomspace(1, n / 2, _DRAWN // 4).astype(int) - 1
    even = np.linspace(0, n - 1, _DRAWN // 2).astype(int)
    return np.unique(np.concatenate((dense, even, n - 1 - dense)))
