"""Figures: one function each, returning a Matplotlib ``Figure`` and touching no global state."""

from lkarray.plots.audit import (
    completeness,
    concentration,
    decision,
    influential_images,
    layer_epoch,
)
from lkarray.plots.figures import gain_against_loss, kernel_matrix, neighbor_map, top_correlated
from lkarray.plots.groups import (
    groups_along,
    image_rows,
    influence_against,
    influence_along_path,
    mode_scatter,
    regime,
)
from lkarray.plots.hierarchy import (
    correlation_against_distance,
    hierarchy_matrices,
    lift_by_depth,
    lift_curves,
    transitions,
)
from lkarray.plots.training import (
    axis_extremes,
    over_training,
    similarity_against_distance,
    similarity_to_target,
    temporal_structure,
)

__all__ = [
    "axis_extremes",
    "completeness",
    "concentration",
    "correlation_against_distance",
    "decision",
    "gain_against_loss",
    "groups_along",
    "hierarchy_matrices",
    "image_rows",
    "influence_against",
    "influence_along_path",
    "influential_images",
    "kernel_matrix",
    "layer_epoch",
    "lift_by_depth",
    "lift_curves",
    "mode_scatter",
    "neighbor_map",
    "over_training",
    "regime",
    "similarity_against_distance",
    "similarity_to_target",
    "temporal_structure",
    "top_correlated",
    "transitions",
]
