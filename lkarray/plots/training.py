"""Figures of training runs: time, regimes, and what the axes of a map show."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from lkarray.schema import COMPONENT, MODE, TIME


def temporal_structure(
    kernel: xr.DataArray, modes: xr.Dataset, *, labels: np.ndarray | None = None, k: int = 5
) -> Figure:
    """Draw the temporal kernel as cosines, and its leading modes over time (PLGK figure 23).

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
    values = kernel.values.astype(np.float64)
    norm = np.sqrt(np.diag(values))
    at = np.asarray(kernel[TIME] if labels is None else labels)
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    half = (at[-1] - at[0]) / max(len(at) - 1, 1) / 2
    edges = (at[0] - half, at[-1] + half)
    image = left.imshow(
        values / np.outer(norm, norm),
        vmin=0, vmax=1, cmap="viridis", origin="lower", extent=(*edges, *edges),
    )  # fmt: skip
    figure.colorbar(image, ax=left, label="cosine of all gradients")
    name = "epoch" if labels is not None else "step"
    left.set(xlabel=name, ylabel=name, title="Temporal kernel, normalised")
    for mode in range(min(k, modes.sizes[MODE])):
        share = float(modes["share"][mode])
        right.plot(at, modes["loading"].isel(mode=mode), label=f"mode {mode + 1} ({share:.1%})")
    right.axhline(0, color="0.7", lw=0.8, zorder=0)
    right.set(xlabel=name, ylabel="loading", title="Temporal modes, and their share of energy")
    right.legend(frameon=False)
    return figure


def over_training(
    curves: Mapping[str, xr.DataArray], *, ylabel: str, title: str, labels: np.ndarray | None = None
) -> Figure:
    """Draw quantities of each time against time (PLGK figures 14 and 24)."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot(curve[TIME] if labels is None else labels, curve, label=name)
    axes.set(xlabel="step" if labels is None else "epoch", ylabel=ylabel, title=title)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return figure


def axis_extremes(points: xr.DataArray, images: np.ndarray, *, rows: int = 5) -> Figure:
    """Show the images at both ends of each axis of a map (PLGK figure 7).

    Parameters
    ----------
    points
        ``(example, component)``, of one class to see what the axes say within it.
    images
        ``(example, height, width)``, in the same order.
    rows
        Of the square of images at each end.
    """
    xy = points.transpose(..., COMPONENT).values
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
    blank = 1.0 if colours else np.nan
    out = np.full((rows * (height + 1), rows * (width + 1), *colours), blank)
    for i, image in enumerate(images[: rows * rows]):
        y, x = divmod(i, rows)
        y, x = y * (height + 1), x * (width + 1)
        out[y : y + height, x : x + width] = image
    return out
