"""Figures about hierarchies: lift, matrices by label, attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import color_sequences, colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from lkarray.arguments import checked
from lkarray.labels import items
from lkarray.results import as_dataset

_LEAST = 30  # pairs behind a point that is drawn


@checked()
def lift_by_depth(lift: xr.DataTree | xr.Dataset, *, least: int = _LEAST) -> Figure:
    """Draw one curve of lift for each query depth (Adam et al. 2025a, figure 5).

    Parameters
    ----------
    lift
        What `lkarray.taxonomic_lift` returns.
    least
        Points with fewer pairs of the table behind them, or expected by chance to share fewer
        than one, are left out.
    """
    lift = as_dataset(lift, "lift").compute()
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    expected = lift["pairs"] * lift["base_rate"]
    shown = (lift["pairs"] >= least) & (expected >= 1) & np.isfinite(lift["lift"])
    groups = [d for d in lift["query_depth"].values if bool(shown.sel(query_depth=d).any())]
    colours = colormaps["viridis"](np.linspace(0, 0.92, len(groups)))
    for group, colour in zip(groups, colours, strict=True):
        part = lift.sel(query_depth=group).where(shown.sel(query_depth=group), drop=True)
        axes.plot(part["depth"], part["lift"], "o-", ms=3.5, color=colour, label=str(group))
        axes.fill_between(part["depth"], part["low"], part["high"], color=colour, alpha=0.12, lw=0)
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _limit(axes, lift["lift"].where(shown).values)
    axes.set(
        xlabel="depth of the shared ancestor (edges from the root)",
        ylabel=f"lift ({lift.attrs.get('base', '')} base rate)",
        title="Taxonomic lift by query depth",
    )
    figure.legend(title="query depth", frameon=False, loc="outside right center")
    return figure


@checked()
def lift_curves(
    lifts: Mapping[str, xr.DataTree | xr.Dataset],
    *,
    title: str = "Taxonomic lift",
    least: int = _LEAST,
) -> Figure:
    """Draw the pooled lift of several kernels with their intervals, side by side.

    Parameters
    ----------
    lifts
        What `lkarray.taxonomic_lift` returned for each, by name.
    title
        Of the figure.
    least
        Depths at which chance has fewer pairs of the table share an ancestor are left out.
    """
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    colours = color_sequences["petroff10"]
    for at, (name, given) in enumerate(lifts.items()):
        lift = as_dataset(given, name).compute()
        expected = (lift["pairs"] * lift["base_rate"].fillna(0)).sum("query_depth")
        part = lift.where((expected >= least) & (lift["pooled_lift"] > 0), drop=True)
        colour = colours[at % 10]
        x = part["depth"] + 0.06 * (at - (len(lifts) - 1) / 2)
        half = np.stack(
            [part["pooled_lift"] - part["pooled_low"], part["pooled_high"] - part["pooled_lift"]]
        )
        axes.errorbar(
            x,
            part["pooled_lift"],
            half,
            fmt="o-",
            ms=3.5,
            lw=1.4,
            elinewidth=1,
            capsize=2,
            color=colour,
            label=name,
        )
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yscale("log")
    bottom, top = max(axes.get_ylim()[0], 0.25), axes.get_ylim()[1]
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(
        xlabel="depth of the shared ancestor (edges from the root)",
        ylabel="pooled lift and its interval",
        title=title,
    )
    axes.set_yticks(
        [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if max(bottom, 0.25) <= t <= top]
    )
    axes.legend(frameon=False)
    return figure


@checked()
def hierarchy_matrices(by_distance: xr.DataTree | xr.Dataset) -> Figure:
    """Draw the mean kernel between labels beside their distances (Adam et al. 2025a, figure 1B).

    Parameters
    ----------
    by_distance
        What `lkarray.correlation_by_distance` returns.
    """
    by_distance = as_dataset(by_distance, "by_distance").compute()
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    mean = by_distance["label_mean"].values.astype(float)
    kernel = by_distance.attrs.get("kernel", "correlation")
    other = mean[~np.eye(len(mean), dtype=bool)]
    limit = float(np.nanpercentile(np.abs(other), 99))
    pictures: Sequence[tuple[str, np.ndarray, dict[str, Any], str]] = (
        (f"mean {kernel} of losses", mean, {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}, ""),
        (
            "distance in the hierarchy",
            by_distance["label_distance"].values,
            {"cmap": "viridis_r"},
            "edges",
        ),
    )
    titles = [str(title) for title in by_distance["title"].values]
    for at, (name, values, options, unit) in enumerate(pictures):
        axes = figure.add_subplot(1, 2, at + 1)
        image = axes.imshow(values, interpolation="nearest", **options)
        figure.colorbar(image, ax=axes, shrink=0.8, label=unit, extend="neither" if at else "both")
        axes.set_title(name)
        if len(titles) <= 40:
            axes.set_xticks(range(len(titles)), titles, rotation=60, ha="right")
            axes.set_yticks(range(len(titles)), titles)
        else:
            axes.set(xlabel="labels, in the hierarchy's order", ylabel="")
    return figure


@checked()
def correlation_against_distance(curves: Mapping[str, xr.DataTree | xr.Dataset]) -> Figure:
    """Draw the mean kernel against distance in the hierarchy (Adam et al. 2025a, figure 6C).

    Parameters
    ----------
    curves
        What `lkarray.correlation_by_distance` returned for each kernel, by name.
    """
    figure = Figure(figsize=(6.5, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for name, given in curves.items():
        curve = as_dataset(given, name).compute()
        kernel = curve.attrs.get("kernel", "correlation")
        (line,) = axes.plot(curve["distance"], curve[kernel], "o-", ms=4, label=name)
        axes.fill_between(
            curve["distance"], curve["low"], curve["high"], alpha=0.15, lw=0, color=line.get_color()
        )
        axes.set_ylabel(f"mean {kernel} of losses")
    axes.axhline(0, color="black", lw=0.8, ls=":")
    axes.set(xlabel="distance of the labels (edges; 0: one label)")
    if len(curves) > 1:
        axes.legend(frameon=False)
    return figure


@checked()
def transitions(
    lifts: Mapping[str, xr.DataTree | xr.Dataset], colours: Sequence[Any] | None = None
) -> Figure:
    """Draw which attributes the neighbours have, as stacked bars (Adam et al. 2025a, figure 9).

    Parameters
    ----------
    lifts
        What `lkarray.attribute_lift` returned for each table, by name: the most and the least
        correlated, say.
    colours
        One for each value of the attribute, such as the centres of colour groups (0 to 1).
    """
    figure = Figure(figsize=(4.2 * max(1, len(lifts)), 4), layout="constrained")
    for at, (name, given) in enumerate(lifts.items()):
        lift = as_dataset(given, name).compute()
        share, dim = lift["transition"].values, lift["transition"].dims[0]
        values = [str(value) for value in lift[dim].values]
        palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
        if colours is not None:
            palette = items(colours, lift.indexes[dim], len(values), dim=dim, what="colours")
        axes = figure.add_subplot(1, len(lifts), at + 1)
        bottom = np.zeros(len(values))
        for column, value in enumerate(values):
            axes.bar(
                values,
                share[:, column],
                bottom=bottom,
                label=value,
                width=0.92,
                color=palette[column % len(palette)],
            )
            bottom = bottom + np.nan_to_num(share[:, column])
        pooled = float(lift["pooled_lift"])
        axes.set(title=f"{name} (lift {pooled:.2f})", xlabel="input", ylim=(0, 1))
        axes.set_ylabel("share of its neighbours" if at == 0 else "")
    return figure


def _limit(axes: Any, values: np.ndarray) -> None:
    known = values[np.isfinite(values)]
    if len(known):
        axes.set_ylim(0, 1.15 * float(known.max()))
