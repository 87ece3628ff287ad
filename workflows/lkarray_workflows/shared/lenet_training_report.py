"""What the study of one training run says: the table and the figures of its report."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

import lkarray as lk
from lkarray import plots, workflow

OVERLAPS = ("feature_overlap", "subspace_overlap", "activation_overlap")


def rows_of(metrics: dict[str, Any], steps: int) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report."""
    means, sizes, time = (metrics[name] for name in ("losses", "parameters", "time"))
    ratio = time["participation_ratio"]
    half = [int((np.array(time[name]) > 0.5).argmax()) for name in OVERLAPS]
    return [
        *((f"Right: {split} images", f"{x:.1%}", "") for split, x in metrics["accuracy"].items()),
        ("Mean loss, first epoch and last", f"{means[0]:.3f}, {means[-1]:.3f} nats", ""),
        ("Steps", f"{steps:,}", ""),
        (
            "Parameters",
            f"{sum(sizes.values()):,}",
            ", ".join(f"{name} {size:,}" for name, size in sizes.items()),
        ),
        ("Energy of the first temporal mode", f"{metrics['temporal_share'][0]:.1%}", ""),
        (
            "Participation ratio, first epoch / last",
            f"{ratio[0]:.1f} / {ratio[-1]:.1f}",
            "paper: falls",
        ),
        (
            "First epoch with half the final overlap (features, subspace, activations)",
            " / ".join(map(str, half)),
            "paper: epochs 5 to 10",
        ),
    ]


def figures_of(study: workflow.Study[Any], metrics: dict[str, Any]) -> list[workflow.Figure]:
    """Return the figures of the report."""
    derived, time = lk.open(study.path("gradients.zarr"))["derived"], metrics["time"]
    kernel = derived["temporal_kernel"].to_dataset()["temporal_kernel"].load()
    modes = derived["temporal_modes"].to_dataset().load()
    epochs = np.arange(len(time["participation_ratio"]))
    ratio = xr.DataArray(time["participation_ratio"], dims="time")
    losses = xr.DataArray(metrics["losses"], dims="time")
    overlaps = {n.replace("_", " "): xr.DataArray(time[n], dims="time") for n in OVERLAPS}
    return [
        workflow.Figure(
            "loss",
            "Loss over training",
            "Mean of 2,000 training images, or all, at each epoch's start and the end.",
            plots.over_training(
                {"mean loss": losses}, ylabel="loss (nats)", title="Training", labels=epochs
            ),
        ),
        workflow.Figure(
            "temporal",
            "Gradients over training",
            "All gradients, epoch against epoch, and temporal modes (Anonymous 2026, figure 23).",
            plots.temporal_structure(kernel, modes, labels=epochs[:-1]),
        ),
        workflow.Figure(
            "participation",
            "Participation ratio",
            "Of the spectrum of the gradients at each epoch (figure 24).",
            plots.over_training(
                {"participation ratio": ratio},
                ylabel="modes",
                title="Effective modes",
                labels=epochs,
            ),
        ),
        workflow.Figure(
            "regime",
            "Kernel-regime metrics",
            "Each epoch compared with the end (figure 14).",
            plots.over_training(
                overlaps,
                ylabel="overlap with the end",
                title="Approach to the kernel regime",
                labels=epochs,
            ),
        ),
    ]
