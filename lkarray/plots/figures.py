"""The figures of Adam et al. 2025a and 2025b, from labelled arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib import color_sequences, colormaps
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lkarray.analysis.losses import loss_gain
from lkarray.arguments import checked
from lkarray.errors import SchemaError
from lkarray.kernels.kinds import verdict_text
from lkarray.labels import items, require_unique, squared
from lkarray.results import Result, as_array, as_dataset
from lkarray.schema import CENTER_LOSS, COMPONENT, RANK
from lkarray.tensors import Losses, losses_node
from lkarray.waiting import computed

_MARK = "#111111"
_MOST = 2000  # samples of a kernel that a figure can show


@checked()
def neighbor_map(
    points: Result,
    *,
    by: str,
    mark: str | None = None,
    hues: Mapping[Any, float] | None = None,
) -> Figure:
    """Draw a map of samples, coloured by a label (Adam et al. 2025a, figure 1; figure 7A).

    Parameters
    ----------
    points
        ``(sample, component)`` of two components, or of three, which are drawn in space, as from
        `lkarray.embed`. Samples without a place (NaN) are left out, and counted in the title.
    by
        Coordinate that gives the colour; up to twenty classes are named in a legend, and more
        numbers than that are a scale.
    mark
        Boolean coordinate of points to ring in black.
    hues
        Hue of each class, 0 to 1, such as ``taxonomy.hues()``, so that related ones look alike.

    Raises
    ------
    SchemaError
        There is no such coordinate, or there are other than two or three components.
    """
    points, left_out = _placed(as_array(points, "points"))
    values = _coordinate(points, by)
    classes, codes = np.unique(values, return_inverse=True)
    colours = _palette(len(classes))
    if hues is not None:
        colours = [hsv_to_rgb((hues[name], 0.85, 0.85)) for name in classes.tolist()]
    figure = Figure(figsize=(8, 7), layout="constrained")
    xy = points.transpose(..., COMPONENT).values  # (sample, 2 or 3)
    axes: Any = figure.add_subplot(projection="3d" if xy.shape[1] == 3 else None)
    marked = _coordinate(points, mark).astype(bool) if mark else np.zeros(len(xy), bool)
    size = float(np.clip(24000 / len(xy), 2, 30))
    if hues is None and len(classes) > 20 and np.issubdtype(values.dtype, np.number):
        dots = axes.scatter(*xy.T, s=size, c=values, cmap="viridis", linewidths=0)
        figure.colorbar(dots, ax=axes, label=by, shrink=0.8)
        colours = []
    for code, colour in enumerate(colours):
        at = codes == code
        axes.scatter(*xy[at].T, s=size, color=colour, linewidths=0, alpha=0.9)
    if mark:
        axes.scatter(
            *xy[marked].T,
            s=2.2 * size,
            facecolors="none",
            edgecolors=_MARK,
            linewidths=0.8,
        )
    if len(classes) <= 20:
        handles = [
            Line2D([], [], ls="", marker="o", ms=7, color=colour, label=str(name))
            for name, colour in zip(classes, colours, strict=True)
        ]
        if mark:
            handles.append(
                Line2D([], [], ls="", marker="o", ms=7, mfc="none", mec=_MARK, label=mark)
            )
        figure.legend(handles=handles, title=by, frameon=False, loc="outside right center")
    for number, name in enumerate("xyz"[: xy.shape[1]], 1):
        axes.set(**{f"{name}ticks": [], f"{name}label": f"UMAP {number}"})
    without = f" ({left_out} without neighbours)" if left_out else ""
    axes.set_title(f"Loss-kernel map of {len(xy)} inputs{without}, coloured by {by}", fontsize=12)
    _believe(figure, points)
    return figure


def _placed(points: xr.DataArray) -> tuple[xr.DataArray, int]:
    """Return the points that have a place, and how many have none."""
    if points.ndim != 2 or points.sizes.get(COMPONENT) not in (2, 3):
        raise SchemaError(
            f"points have {dict(points.sizes)}; a map has 2 or 3 along {COMPONENT!r}: take "
            f"lk.embed(..., n_components=3), or select with points.isel({COMPONENT}=[0, 1])"
        )
    there = np.isfinite(points.transpose(..., COMPONENT).values).all(axis=1)
    rows = next(dim for dim in points.dims if dim != COMPONENT)
    return points.isel({rows: there}), int((~there).sum())


@checked()
def kernel_matrix(kernel: Result, *, by: str) -> Figure:
    """Draw a square kernel with its samples sorted by a label (Adam et al. 2025a, figure 1B).

    At most 2,000 samples are shown, evenly taken from the sorted order; only the tiles that
    hold them are computed. The diagonal is left blank, since it would set the scale.

    Parameters
    ----------
    kernel
        ``(sample, sample_2)``, for example `lkarray.correlation`; or the node that holds one.
    by
        Coordinate of ``sample`` to sort by.
    """
    kernel = as_array(kernel, "kernel")
    if kernel.ndim != 2 or len(set(kernel.shape)) != 1:
        raise SchemaError(f"a kernel must be square, not {dict(kernel.sizes)}")
    kernel = squared(kernel, "kernel")
    rows, columns = kernel.dims
    values = _coordinate(kernel, by)
    order = np.argsort(values, kind="stable")
    order = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), _MOST)).astype(int))]
    shown = np.array(kernel.isel({rows: order, columns: order}).values, dtype=float)
    np.fill_diagonal(shown, np.nan)
    limit = float(np.nanpercentile(np.abs(shown), 99))
    figure = Figure(figsize=(7.6, 6.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        shown, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="antialiased", aspect="equal"
    )
    ordered = values[order]
    edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 0.5
    for edge in edges:
        axes.axhline(edge, color="black", lw=0.4)
        axes.axvline(edge, color="black", lw=0.4)
    bounds = np.concatenate([[-0.5], edges, [len(order) - 0.5]])
    if len(bounds) <= 41:
        middles = (bounds[1:] + bounds[:-1]) / 2
        names = [str(ordered[int(a + 0.5)]) for a in bounds[:-1]]
        axes.set(xticks=middles, yticks=middles, xticklabels=names, yticklabels=names)
    axes.set(xlabel=by, ylabel=by, title=f"{str(kernel.name).capitalize()} kernel, sorted by {by}")
    units = kernel.attrs.get("units", "1")
    label = str(kernel.name) + ("" if units == "1" else f" ({units})")
    figure.colorbar(image, ax=axes, label=label, shrink=0.85, extend="both")
    _believe(figure, kernel)
    return figure


def _believe(figure: Figure, x: xr.DataArray | xr.Dataset) -> None:
    """Print small, in the corner, how far to believe what is shown, where that is known."""
    if text := verdict_text(x.attrs):
        figure.text(0.005, 0.005, text, fontsize=7, color="0.4", ha="left", va="bottom")


@checked()
def top_correlated(
    neighbors: xr.DataTree | xr.Dataset,
    images: np.ndarray,
    references: Sequence[int],
    *,
    by: str,
    mark: str | None = None,
    shown: int = 8,
) -> Figure:
    """Draw the most correlated inputs of a few references (Adam et al. 2025a, figure 4).

    Parameters
    ----------
    neighbors
        As from `lkarray.neighbors`, computed.
    images
        Images of all samples, ``(n, height, width)`` or ``(n, height, width, 3)``: an array in
        their order, or a DataArray with their index in any order.
    references
        Values of the sample index.
    by
        Coordinate to name under each image.
    mark
        Boolean coordinate of samples to flag with a star.
    shown
        Neighbours of each reference.
    """
    neighbors = as_dataset(neighbors, "neighbors").compute()
    dim = str(next(d for d in neighbors["neighbor"].dims if d != RANK))
    labels = _coordinate(neighbors, by)
    flags = _coordinate(neighbors, mark) if mark else np.zeros(len(labels), bool)
    images = items(images, neighbors.indexes.get(dim), len(labels), dim=dim, what="images")
    index = neighbors.indexes.get(dim, pd.RangeIndex(len(labels)))
    require_unique(index, f"the index of {dim!r}")
    long = max((len(str(label)) for label in labels), default=0) > 4
    between = "\n" if long else "   "
    figure = Figure(figsize=(1.15 * (shown + 1) + 0.3, (1.4 + 0.2 * long) * len(references) + 0.8))
    grid = figure.subplots(len(references), shown + 1, squeeze=False)
    figure.subplots_adjust(
        left=0.02,
        right=0.98,
        top=1 - 0.8 / figure.get_figheight(),
        bottom=0.04,
        wspace=0.1,
        hspace=0.6 if long else 0.45,
    )
    for row, reference in zip(grid, references, strict=True):
        for axes in row:
            axes.axis("off")
        near = neighbors.isel({dim: index.get_loc(reference), RANK: slice(shown)})
        similarity = [None, *near["similarity"].values]
        for axes, sample, r in zip(
            row, [reference, *near["neighbor"].values], similarity, strict=False
        ):
            if r is not None and np.isnan(r):  # no more neighbours
                continue
            at = index.get_loc(sample)
            axes.imshow(images[at], cmap="gray_r", interpolation="nearest")
            star = "*" if flags[at] else ""
            text = f"{labels[at]}{star}" + ("" if r is None else f"{between}R {r:.2f}")
            axes.set_title(text, fontsize=9, fontweight="bold" if r is None else "normal")
    note = f"  (* {mark})" if mark else ""
    figure.suptitle(
        f"Reference (left) and its most correlated inputs, with {by}{note}",
        fontsize=11,
        y=1 - 0.12 / figure.get_figheight(),
        va="top",
    )
    _believe(figure, neighbors)
    return figure


@checked()
def gain_against_loss(tree: Losses, *, mark: str | None = None) -> Figure:
    """Draw each sample's loss gain against its loss at w* (Adam et al. 2025b, figure 1).

    Both axes are logarithmic where positive and linear around zero.

    Parameters
    ----------
    tree
        As for `lkarray.loss_gain`.
    mark
        Boolean coordinate of samples to set apart.
    """
    gain = computed(loss_gain(tree))
    node = losses_node(tree).to_dataset() if isinstance(tree, xr.DataTree) else tree
    loss = node[CENTER_LOSS.name].values
    flags = _coordinate(gain, mark).astype(bool) if mark else np.zeros(len(loss), bool)
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.add_subplot()
    size = float(np.clip(12000 / len(loss), 2, 18))
    axes.scatter(
        loss[~flags],
        gain.values[~flags],
        s=size,
        lw=0,
        alpha=0.7,
        color="#3f90da",
        label=f"not {mark}" if mark else None,
    )
    if mark:
        axes.scatter(
            loss[flags],
            gain.values[flags],
            s=2 * size,
            lw=0,
            alpha=0.85,
            marker="^",
            color="#bd1f01",
            label=mark,
        )
        axes.legend(frameon=False)
    axes.set_xscale("symlog", linthresh=_threshold(loss), linscale=0.5)
    axes.set_yscale("symlog", linthresh=_threshold(gain.values))
    axes.set(
        xlabel="loss at w* (nats)",
        ylabel="loss gain (nats)",
        title="Loss gain against loss, one point an input",
    )
    axes.grid(alpha=0.25)
    return figure


def _threshold(values: np.ndarray) -> float:
    positive = np.abs(values[values != 0])
    return float(np.percentile(positive, 2)) if len(positive) else 1.0


def _coordinate(x: xr.DataArray | xr.Dataset, name: str) -> np.ndarray:
    if name not in x.coords:
        raise SchemaError(
            f"there is no coordinate {name!r}; there are {sorted(map(str, x.coords))}"
        )
    return np.asarray(x.coords[name].values)


def _palette(count: int) -> list[Any]:
    """Return that many colours: told apart by colour-blind readers up to ten."""
    if count <= 10:
        return list(color_sequences["petroff10"][:count])
    return [colormaps["turbo"](t) for t in np.linspace(0.02, 0.98, count)]
