"""Analysis of gradient(time, example, param): kernels, modes, overlaps, difficulty."""

from lkarray.analysis.gradients.difficulty import difficulty_table, hidden_similarity, ips_scores
from lkarray.analysis.gradients.gradient_kernels import (
    angle_distance,
    chord_distance,
    ips,
    lgk,
    plgk,
    temporal_kernel,
)
from lkarray.analysis.gradients.influence_over_time import influence_over_time
from lkarray.analysis.gradients.mode_shifts import mode_shifts
from lkarray.analysis.gradients.modes import (
    cancellation_ratio,
    mode_coefficients,
    modes,
    parameter_modes,
    temporal_modes,
)
from lkarray.analysis.gradients.online_modes import online_modes
from lkarray.analysis.gradients.overlaps import (
    activation_overlap,
    feature_overlap,
    subspace_overlap,
)
from lkarray.analysis.gradients.tangent_kernels import lntk, pntk

__all__ = [
    "activation_overlap",
    "angle_distance",
    "cancellation_ratio",
    "chord_distance",
    "difficulty_table",
    "feature_overlap",
    "hidden_similarity",
    "influence_over_time",
    "ips",
    "ips_scores",
    "lgk",
    "lntk",
    "mode_coefficients",
    "mode_shifts",
    "modes",
    "online_modes",
    "parameter_modes",
    "plgk",
    "pntk",
    "subspace_overlap",
    "temporal_kernel",
    "temporal_modes",
]
