"""Figures that compare groups of inputs: clean, perturbed, cured (Anonymous 2026, section 6.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from lkarray.arguments import checked
from lkarray.errors import SchemaError
from lkarray.labels import as_columns, in_order, one_each
from lkarray.results import Result, as_array, as_dataset
from lkarray.schema import MODE, TIME

#: Colours that differ for colour-blind readers too (Okabe and Ito), and styles of lines.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#111111")
_STYLES = ("-", "--", "-.", (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (6, 2)), ":")
_DRAWN = 20_000  # points of a scatter


@checked()
def groups_along(
    panels: Mapping[str, Result],
    *,
    by: str,
    along: str | Sequence[str],
    ylabel: str,
    xlabel: str | Sequence[str | None] | None = None,
    logy: bool = False,
    logx: bool = False,
    rows: int = 1,
    spread: bool = True,
) -> Figure:
    """Draw each group's mean along a dim, and one standard deviation.

    See Anonymous 2026, figures 10, 12 to 19.

    Parameters
    ----------
    panels
        By title, ``(along, example)`` with whatever the second dim is called; or the nodes that
        hold them.
    by
        Coordinate of the examples that names their group; groups are drawn in the order in which
        they come.
    along
        Dim of the horizontal axis, of each panel or of all; its coordinate gives the places.
    xlabel, ylabel
        Of each panel or of all, by default its dim; and of those at the left.
    logy, logx
        Scale axes logarithmically.
    rows
        Of panels.
    spread
        Shade one standard deviation to either side.
    """
    arrays = {title: as_array(x, title) for title, x in panels.items()}
    columns = -(-len(panels) // rows)
    figure = Figure(
        figsize=(max(4.0, 12 / columns) * columns, 3.7 * rows + 0.6), layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    names: list[str] = []
    dims = [along] * len(panels) if isinstance(along, str) else along
    labels = [xlabel] * len(panels) if xlabel is None or isinstance(xlabel, str) else xlabel
    for axes, (title, x), dim, label in zip(grid, arrays.items(), dims, labels, strict=False):
        groups = _groups(x, by, dim)
        names += [name for name in groups if name not in names]
        at = x[dim].values if dim in x.coords else np.arange(x.sizes[dim])
        at = at + 1 if dim == MODE else at
        for name, values in groups.items():
            i = names.index(name) % len(_COLORS)
            _band(axes, at, values, {"color": _COLORS[i], "ls": _STYLES[i]}, spread=spread)
        axes.set(title=title, xlabel=label or ("leading modes" if dim == MODE else dim))
        if logy:
            axes.set_yscale("log")
        if logx:
            axes.set_xscale("log")
        axes.grid(alpha=0.25)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[::columns]:
        axes.set_ylabel(ylabel)
    _legend(figure, names)
    return figure


@checked()
def regime(
    metrics: Mapping[str, Result],
    panels: Mapping[str, Result],
    *,
    by: str,
    labels: np.ndarray,
    ylabels: Sequence[str],
) -> Figure:
    """Draw kernel-regime metrics against what groups do, on one time axis.

    See Anonymous 2026, figure 14.

    Parameters
    ----------
    metrics
        By name, ``(time)``, each between 0 and 1: drawn in grey to black, left axis.
    panels
        By title, ``(time, example)``, at the same times: means of groups, right axis. Where times
        are labelled, in any order.
    by
        Coordinate of the examples that names their group.
    labels
        What to call the times of the panels: epochs.
    ylabels
        Of the right axis of each panel.
    """
    figure = Figure(figsize=(6.6 * len(panels), 4.6), layout="constrained")
    names: list[str] = []
    greys = ("#111111", "#777777", "#AAAAAA")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, panel), ylabel in zip(grid, panels.items(), ylabels, strict=True):
        x = as_array(panel, title)
        at, index = one_each(labels, x, TIME, what="labels"), x.indexes.get(TIME)
        for (name, metric), grey in zip(metrics.items(), greys, strict=False):
            curve = in_order(as_array(metric, name), TIME, index, len(at), what=name)
            axes.plot(at, curve, color=grey, lw=1.8, label=name)
        axes.set(title=title, xlabel="epoch", ylabel="overlap with the end", ylim=(0, 1.03))
        right = axes.twinx()
        for name, values in _groups(x, by, TIME).items():
            names += [name] if name not in names else []
            i = names.index(name) % len(_COLORS)
            right.plot(at, values.mean(1), color=_COLORS[i], ls=_STYLES[i])
        right.set(ylabel=ylabel)
        right.set_ylim(bottom=0)
    lines = [
        Line2D([], [], color=g, lw=1.8, label=name) for name, g in zip(metrics, greys, strict=False)
    ]
    _legend(figure, names, lines)
    return figure


@checked()
def mode_scatter(
    shifts: xr.DataTree | xr.Dataset,
    *,
    other: xr.DataTree | xr.Dataset | None = None,
    names: Sequence[str] = ("adversarial", "random"),
) -> Figure:
    """Draw how far each mode's coefficients changed, by strength and alignment (figures 15, 27).

    Parameters
    ----------
    shifts, other
        As from `lkarray.mode_shifts`: of one kind of perturbation, and of another.
    names
        Of the two.
    """
    parts = [as_dataset(x, "shifts").compute() for x in (shifts, other) if x is not None]
    figure = Figure(figsize=(6.4 * len(parts), 4.8), layout="constrained")
    grid = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, part, name in zip(grid, parts, names, strict=False):
        change = part["change"].values
        limit = float(np.abs(change).max()) or 1.0
        dots = axes.scatter(
            part["singular_value"],
            part["alignment"],
            s=12 + 300 * np.abs(change) / limit,
            c=change,
            cmap="PuOr",
            vmin=-limit,
            vmax=limit,
            edgecolors="0.3",
            linewidths=0.5,
        )
        axes.axhline(0, color="0.7", lw=0.8, zorder=0)
        axes.set(
            xscale="log",
            xlabel="singular value s",
            ylabel="alignment a of training examples",
            title=f"{name.capitalize()} minus clean",
        )
        axes.xaxis.set_minor_formatter(NullFormatter())  # they would overlap
        figure.colorbar(dots, ax=axes, label="mean change of the coefficient")
    return figure


@checked()
def influence_against(
    first: np.ndarray, others: Mapping[str, np.ndarray], correlations: Mapping[str, np.ndarray]
) -> Figure:
    """Draw influences on perturbed inputs against those on the clean one.

    See Anonymous 2026, figure 9.

    Parameters
    ----------
    first
        Influence of each training example on one clean input.
    others
        By kind of perturbation, on the same input perturbed: in the same order, or, where both
        have labels of the training examples, in any.
    correlations
        By kind, over training examples, of each pair of inputs.
    """
    columns = as_columns({"first": first, **others}, dim="training example")
    first, others = columns.pop("first"), columns
    figure = Figure(figsize=(4.4 * (len(others) + 1), 4.4), layout="constrained")
    grid = figure.subplots(1, len(others) + 1, squeeze=False)[0]
    step = -(-len(first) // _DRAWN)
    for axes, (name, values) in zip(grid, others.items(), strict=False):
        axes.plot(first[::step], values[::step], ".", ms=2, alpha=0.4, color=_COLORS[0])
        slope = float(first @ values / (first @ first))
        ends = np.array([first.min(), first.max()])
        axes.plot(ends, slope * ends, color=_COLORS[1], lw=1.2)
        correlation = float(np.corrcoef(first, values)[0, 1])
        axes.set(
            xlabel="influence on the clean image (nats)",
            ylabel=f"on the {name} one (nats)",
            title=f"One {name} image: slope {slope:.2f},\ncorrelation {correlation:.2f}",
        )
        axes.grid(alpha=0.25)
    last = grid[-1]
    for y, entries in enumerate(correlations.values()):
        jitter = np.linspace(-0.15, 0.15, len(entries))
        last.plot(entries, y + jitter, ".", color=_COLORS[(y + 1) % len(_COLORS)], alpha=0.7)
        last.plot([np.median(entries)] * 2, [y - 0.3, y + 0.3], color="black", lw=1.5)
    last.set_yticks(range(len(correlations)), list(correlations))
    last.set(xlabel="correlation with the clean image's influences", title="All pairs, medians")
    last.grid(axis="x", alpha=0.25)
    return figure


@checked()
def influence_along_path(gross: Result, totals: Mapping[str, Result]) -> Figure:
    """Draw when influence came, and how much, from an input to its perturbed form (figure 11).

    Parameters
    ----------
    gross
        ``(position, epoch)``: gross influence within each epoch, of points on the way, positions
        from 0 to 1.
    totals
        By kind of perturbation, ``(position)``: gross influence of the whole training.
    """
    gross = as_array(gross, "gross")
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    share = (gross / gross.sum("epoch")).cumsum("epoch") * 100
    positions = gross["position"].values
    from matplotlib import colormaps

    for position, curve in zip(positions, share.transpose("position", "epoch"), strict=True):
        left.plot(gross["epoch"] + 1, curve, color=colormaps["cividis"](float(position) * 0.95))
    scale: Any = left.scatter([], [], c=[], cmap="cividis", vmin=0, vmax=1)
    figure.colorbar(scale, ax=left, label="position (0 clean, 1 perturbed)")
    left.set(xlabel="epoch", ylabel="% of gross influence so far", title="When influence came")
    for i, (name, given) in enumerate(totals.items()):
        total = as_array(given, name)
        style: dict[str, Any] = {"color": _COLORS[i + 1], "ls": _STYLES[i + 1]}
        right.plot(total["position"], total, label=name, **style)
    right.set(
        xlabel="position (0 clean, 1 perturbed)",
        ylabel="gross influence (nats)",
        title="How much there was",
        yscale="log",
    )
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    return figure


@checked()
def image_rows(rows: Sequence[Sequence[np.ndarray]], columns: Sequence[str]) -> Figure:
    """Show images in rows: an input, and what became of it (Anonymous 2026, figures 8 and 20).

    Parameters
    ----------
    rows
        Images ``(height, width)`` or with three colours; ``NaN``-free, or signed differences,
        which are drawn about 0.
    columns
        Their titles.
    """
    figure = Figure(figsize=(1.7 * len(columns), 1.75 * len(rows) + 0.3), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        for axes, image in zip(line, row, strict=True):
            signed = float(np.min(image)) < 0
            limit = float(np.abs(image).max()) or 1.0
            style: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}
            if signed:
                image = image.mean(-1) if image.ndim == 3 else image
                style = {"cmap": "PuOr", "vmin": -limit, "vmax": limit}
            axes.imshow(image, interpolation="nearest", **style)
            axes.set_axis_off()
    for axes, title in zip(grid[0], columns, strict=True):
        axes.set_title(title, fontsize=9)
    return figure


# --- what they share --------------------------------------------------------------------------


def _groups(x: xr.DataArray, by: str, along: str) -> dict[str, np.ndarray]:
    """Return what is of each group, ``(along, example)``, groups as they come."""
    if along not in x.dims or x.ndim != 2 or by not in x.coords:
        raise SchemaError(
            f"a panel has dims {x.dims} and coordinates {sorted(map(str, x.coords))}; expected "
            f"{along!r} and one more dim, with the coordinate {by!r}"
        )
    values = np.asarray(x.transpose(along, ...).values, np.float64)
    kinds = x[by].values.astype(object)
    return {str(kind): values[:, kinds == kind] for kind in dict.fromkeys(kinds)}


def _band(
    axes: Axes, at: np.ndarray, values: np.ndarray, style: dict[str, Any], *, spread: bool
) -> None:
    mean = np.nanmean(values, 1)
    axes.plot(at, mean, lw=1.6, **style)
    if spread and values.shape[1] > 1:
        deviation = np.nanstd(values, 1)
        low = mean - deviation
        axes.fill_between(at, low, mean + deviation, color=style["color"], alpha=0.13, lw=0)


def _legend(figure: Figure, names: Sequence[str], first: Sequence[Line2D] = ()) -> None:
    handles = [
        Line2D([], [], color=_COLORS[i % len(_COLORS)], ls=_STYLES[i % len(_COLORS)], label=name)
        for i, name in enumerate(names)
    ]
    figure.legend(
        handles=[*first, *handles],
        frameon=False,
        loc="outside lower center",
        ncols=min(len(handles) + len(first), 6),
    )
