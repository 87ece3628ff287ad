"""Figures of training runs: time, regimes, and what the axes of a map show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import color_sequences
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lkarray.arguments import checked
from lkarray.labels import in_order, items, one_each, squared
from lkarray.results import Result, alone, as_array, as_dataset
from lkarray.schema import COMPONENT, MODE, TIME

_LEAST = 30  # pairs behind a point that is drawn
#: Kinds of pairs, and the colour of each.
_PAIRS = {"within": "#3f90da", "between": "#bd1f01"}
_COLOURS = color_sequences["petroff10"]
_LINES = ("-", "--", ":", "-.")


@checked()
def temporal_structure(
    kernel: Result,
    modes: xr.DataTree | xr.Dataset,
    *,
    labels: np.ndarray | None = None,
    k: int = 5,
) -> Figure:
    """Draw the temporal kernel as cosines, and its leading modes over time.

    See Anonymous 2026, figure 23.

    Parameters
    ----------
    kernel
        ``(time, time_2)``, as from `lkarray.temporal_kernel`.
    modes
        As from `lkarray.temporal_modes`.
    labels
        What to call the times, epochs say; the step numbers by default.
    k
        Modes drawn.
    """
    kernel, modes = (
        squared(as_array(kernel, "kernel"), "kernel"),
        as_dataset(modes, "modes").compute(),
    )
    values = kernel.values.astype(np.float64)
    norm = np.sqrt(np.diag(values))
    at = _times(kernel, labels)
    loading = modes["loading"]
    loading = in_order(loading, TIME, kernel.indexes.get(TIME), len(at), what="loading")
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    half = (at[-1] - at[0]) / max(len(at) - 1, 1) / 2
    edges = (at[0] - half, at[-1] + half)
    image = left.imshow(
        values / np.outer(norm, norm),
        vmin=0,
        vmax=1,
        cmap="viridis",
        origin="lower",
        extent=(*edges, *edges),
    )
    figure.colorbar(image, ax=left, label="cosine of all gradients")
    name = "epoch" if labels is not None else "step"
    left.set(xlabel=name, ylabel=name, title="Temporal kernel, normalised")
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for mode in range(min(k, modes.sizes[MODE])):
        share = float(modes["share"][mode])
        right.plot(
            at,
            loading.isel(mode=mode),
            _LINES[mode % 4],
            color=_COLOURS[mode % 10],
            label=f"mode {mode + 1} ({share:.1%})",
        )
    right.axhline(0, color="0.7", lw=0.8, zorder=0)
    right.set(xlabel=name, ylabel="loading", title="Temporal modes, and their share of energy")
    right.legend(frameon=False)
    return figure


@checked()
def over_training(
    curves: Mapping[str, Result], *, ylabel: str, title: str, labels: np.ndarray | None = None
) -> Figure:
    """Draw quantities of each time against time (Anonymous 2026, figures 14 and 24)."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, given) in enumerate(curves.items()):
        curve = as_array(given, name)
        axes.plot(_times(curve, labels), curve, _LINES[i % 4], color=_COLOURS[i % 10], label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="step" if labels is None else "epoch", ylabel=ylabel, title=title)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return figure


def _times(x: xr.DataArray, labels: Any) -> np.ndarray:
    """Return the times of ``x``, or what each is called."""
    if labels is not None:
        return one_each(labels, x, TIME, what="labels")
    return np.asarray(x[TIME])


@checked()
def similarity_to_target(
    points: Result, similarity: Result, target: int, *, by: str = "label"
) -> Figure:
    """Draw a map coloured by similarity to one sample: whole, and its own class.

    See Anonymous 2026, figure 6.

    Parameters
    ----------
    points
        ``(example, component)`` of two components, as from `lkarray.embed`.
    similarity
        Of each to the target, such as ``lk.ips(G)[target]``; between -1 and 1. Where it and the
        points have labels, in any order.
    target
        Position of the sample, which is starred.
    by
        Coordinate of ``points`` with the classes.
    """
    xy, values, own = _about(points, similarity, target, by)
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    everything, mates = np.ones_like(own), own & (np.arange(len(own)) != target)
    panels: tuple[tuple[np.ndarray, str, dict[str, Any]], ...] = (
        (everything, f"All {len(xy):,} inputs", {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}),
        (mates, f"The {int(mates.sum()):,} others of the target's class", {"cmap": "viridis"}),
    )
    for axes, (at, title, colours) in zip(figure.subplots(1, 2), panels, strict=True):
        # The most extreme last: where points overlap, they are what there is to see.
        order = np.flatnonzero(at)[np.argsort(np.abs(values[at]), kind="stable")]
        size = float(np.clip(24000 / max(len(order), 1), 4, 40))
        dots = axes.scatter(
            *xy[order].T, s=size, c=values[order], edgecolors="0.6", lw=0.2, **colours
        )
        axes.scatter(*xy[target], s=220, marker="*", color="#ffdd33", edgecolors="black")
        axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2", title=title)
        figure.colorbar(dots, ax=axes, label="similarity to the target (star)", shrink=0.9)
    return figure


@checked()
def similarity_against_distance(
    points: Result,
    similarity: Result,
    target: int,
    by_distance: xr.DataTree | xr.Dataset,
    *,
    by: str = "label",
) -> Figure:
    """Draw similarity against distance on the map: to one sample, and of all pairs.

    See Anonymous 2026, 6.2.

    Parameters
    ----------
    points, similarity, target, by
        As for `similarity_to_target`.
    by_distance
        What `lkarray.similarity_by_distance` returns; bins of fewer than thirty pairs are left
        out.
    """
    by_distance = as_dataset(by_distance, "by_distance").compute()
    xy, values, own = _about(points, similarity, target, by)
    distance = np.linalg.norm(xy - xy[target], axis=1)
    other = np.arange(len(xy)) != target
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    for axes, at, (pairs, colour) in zip(
        figure.subplots(1, 2), (own, ~own), _PAIRS.items(), strict=True
    ):
        chosen = at & other
        size = float(np.clip(12000 / max(int(chosen.sum()), 1), 4, 24))
        axes.scatter(
            distance[chosen],
            values[chosen],
            s=size,
            color="0.35",
            lw=0,
            alpha=0.6,
            label=f"to one input ({int(chosen.sum()):,} pairs)",
        )
        curve = by_distance.sel(pairs=pairs)
        drawn = curve.isel(bin=curve["count"].values >= _LEAST)
        x, mean, sd = (drawn[part].values for part in ("distance", "mean", "sd"))
        count = int(curve["count"].sum())
        axes.plot(x, mean, "o-", color=colour, label=f"all {count:,} pairs: mean and sd")
        axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.25, lw=0)
        axes.axhline(0, color="0.6", lw=0.8, zorder=0)
        rank = float(curve["rank_correlation"])
        axes.set(
            xlabel="distance on the map",
            ylabel="similarity",
            xlim=(0, None),
            title=f"{pairs.capitalize()} classes: rank correlation {rank:.2f}",
        )
        axes.legend(frameon=False)
    return figure


def _about(
    points: Result, similarity: Result, target: int, by: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where samples are, how similar to the target, and whether of its class."""
    points, similarity = as_array(points, "points"), alone(similarity, "similarity")
    points = points.transpose(..., COMPONENT)
    values = one_each(similarity, points, points.dims[0], what="similarity")
    classes = np.asarray(points[by])
    return points.values, values, classes == classes[target]


@checked()
def axis_extremes(points: Result, images: np.ndarray, *, rows: int = 5) -> Figure:
    """Show the images at both ends of each axis of a map (Anonymous 2026, figure 7).

    Parameters
    ----------
    points
        ``(example, component)``, of one class to see what the axes say within it.
    images
        ``(example, height, width)``, in the same order; or a DataArray with the points' labels.
    rows
        Of the square of images at each end.
    """
    points = as_array(points, "points").transpose(..., COMPONENT)
    xy, dim = points.values, points.dims[0]
    images = items(images, points.indexes.get(dim), len(xy), dim=dim, what="images")
    figure = Figure(figsize=(2.6 * xy.shape[1], 5.6), layout="constrained")
    grid = figure.subplots(2, xy.shape[1], squeeze=False)
    count = min(rows * rows, len(xy) // 2)
    for axis in range(xy.shape[1]):
        order = np.argsort(xy[:, axis], kind="stable")
        for end, chosen in enumerate((order[:count], order[::-1][:count])):
            axes = grid[end, axis]
            axes.imshow(mosaic(images[chosen], rows), cmap="gray")
            axes.set_axis_off()
            axes.set_title(f"{('lowest', 'highest')[end]} on axis {axis + 1}", fontsize=10)
    return figure


def mosaic(images: np.ndarray, rows: int) -> np.ndarray:
    """Return images, grey or of three colours, as one, ``rows`` by ``rows``, with a thin gap."""
    height, width, *colours = images.shape[1:]
    if colours and images.dtype == np.uint8:
        images = images / 255  # as bytes they would be taken for what is beyond white
    blank = 1.0 if colours else np.nan
    out = np.full((rows * (height + 1), rows * (width + 1), *colours), blank)
    for i, image in enumerate(images[: rows * rows]):
        y, x = divmod(i, rows)
        y, x = y * (height + 1), x * (width + 1)
        out[y : y + height, x : x + width] = image
    return out
