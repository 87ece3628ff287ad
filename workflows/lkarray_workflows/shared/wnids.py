"""What studies of ImageNet's classes share: neighbours, map, lifts and galleries of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import lkarray as lk
from lkarray import plots, progress, store, workflow
from lkarray_workflows.shared.common import plain_numbers

#: Means and deviations of ImageNet's channels, as networks of torchvision expect.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def keep_thumbnails(path: Path, images: np.ndarray, size: int = 64) -> None:
    """Store small copies of square images ``(sample, height, width, 3)`` of bytes.

    As ``thumbnail(sample, y, x, color)`` beside the losses. ``size`` is the largest side.
    """
    side = images.shape[1]
    small = images
    if side > size:
        from torch import from_numpy
        from torch.nn.functional import interpolate

        planes = from_numpy(np.ascontiguousarray(images)).movedim(-1, 1).float()
        shrunk = interpolate(planes, size=(size, size), mode="area")
        small = shrunk.round().byte().movedim(1, -1).numpy()
    dims = "sample", "y", "x", "color"
    store.put(path, "thumbnails", xr.DataArray(small, dims=dims, name="thumbnail"))


def relate(study: workflow.Study[Any], name: str) -> None:
    """Find neighbours of other classes; embed the images at distance 1 - R (appendix B)."""
    path, config = study.path(name), study.config
    near = lk.neighbors(losses_of(path), config.neighbors, exclude="label")
    with progress.dask_bar("neighbours", show=study.show):
        store.put(path, "neighbors", near)
    near = neighbors_of(path)
    with progress.busy("map (UMAP)", show=study.show):
        store.put(path, "map", lk.embed(near, seed=config.seed))


def losses_of(path: Path) -> xr.DataArray:
    """Return the losses of a store."""
    return lk.open(path)["losses"].to_dataset()["loss"]


def neighbors_of(path: Path) -> xr.Dataset:
    """Return neighbours that were stored, in memory."""
    return lk.open(path)["derived/neighbors"].to_dataset().load()


def lift_of(near_or_losses: Any, labels: np.ndarray, seed: int, k: int = 30) -> xr.Dataset:
    """Return the taxonomic lift of neighbours or losses, over the classes that occur."""
    taxonomy = lk.Taxonomy.imagenet().subset(np.unique(labels).tolist())
    return lk.taxonomic_lift(near_or_losses, taxonomy, k=k, seed=seed)


_CURVE = ("depth", "lift", "low", "high")


def numbers(lift: xr.Dataset) -> dict[str, list[float | None]]:
    """Return the pooled lift by depth, with its interval, as plain numbers."""
    of = {"depth": "depth", "lift": "pooled_lift", "low": "pooled_low", "high": "pooled_high"}
    return {name: plain_numbers(lift[variable].values) for name, variable in of.items()}


def lift_text(lift: dict[str, list[Any]]) -> str:
    """Return a lift by depth as one line, with its interval where there is one."""
    depths = []
    for depth, value, low, high in zip(*(lift[key] for key in _CURVE), strict=True):
        if value is not None:
            ends = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
            depths.append(f"{depth:.0f}: {value:.2f}{ends}")
    return ", ".join(depths)


def figures(path: Path, lift: xr.Dataset, *, shown: int = 6, seed: int = 0) -> list[Any]:
    """Draw map and matrix by hierarchy, the most correlated images, the lift (figures 1, 4, 5)."""
    taxonomy = lk.Taxonomy.imagenet()
    losses = losses_of(path)
    occurring = taxonomy.subset(np.unique(losses["label"].values).tolist())
    by_distance = lk.correlation_by_distance(losses, occurring, replicates=0).compute()
    tree = lk.open(path)
    points, near = tree["derived/map"].to_dataset()["embedding"].load(), neighbors_of(path)
    titles = [taxonomy.title(wnid)[:14] for wnid in near["label"].values.tolist()]
    near = near.assign_coords(title=("sample", titles))
    chosen = np.random.default_rng(seed).choice(near.sizes["sample"], shown, replace=False)
    images = tree["derived/thumbnails"].to_dataset()["thumbnail"].values
    hues: Any = taxonomy.hues()
    references: Any = near.indexes.get("sample", np.arange(len(titles)))[np.sort(chosen)]
    return [
        workflow.Figure(
            "map",
            "The images by their losses",
            "UMAP at distance 1 - R, edges within a class removed; colour is the place of the "
            "class in WordNet, so that related classes look alike (figure 1).",
            plots.neighbor_map(points, by="label", hues=hues),
        ),
        workflow.Figure(
            "matrix",
            "Mean correlation of classes, beside their distance",
            "Classes in the hierarchy's order (figure 1B).",
            plots.hierarchy_matrices(by_distance),
        ),
        workflow.Figure(
            "nearest",
            "Most correlated images of other classes",
            "References drawn at random (figures 4 and 10).",
            plots.top_correlated(near, images, references, by="title"),
        ),
        workflow.Figure(
            "lift",
            "Taxonomic lift against depth",
            "A curve for each depth of the reference's class (figure 5); chance is 1.",
            plots.lift_by_depth(lift),
        ),
    ]
