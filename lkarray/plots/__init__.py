"""Figures: one function each, returning a Matplotlib ``Figure`` and touching no global state."""

from lkarray.plots.audit import (
    completeness,
    concentration,
    decision,
    influential_images,
    layer_epoch,
)
from lkarray.plots.figures import gain_against_loss, kernel_matrix, neighbor_map, top_correlated
from lkarray.plots.hierarchy import (
    correlation_against_distance,
    hierarchy_matrices,
    lift_by_depth,
    lift_curves,
    transitions,
)
from lkarray.plots.training import axis_extremes, over_training, temporal_structure

__all__ = [
    "axis_extremes",
    "completeness",
    "concentration",
    "correlation_against_distance",
    "decision",
    "gain_against_loss",
    "hierarchy_matrices",
    "influential_images",
    "kernel_matrix",
    "layer_epoch",
    "lift_by_depth",
    "lift_curves",
    "neighbor_map",
    "over_training",
    "temporal_structure",
    "top_correlated",
    "transitions",
]
