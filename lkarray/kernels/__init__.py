"""The named kernels: a few lines each on the engine."""

from lkarray.kernels.alignment import cka, cka_curve, frobenius
from lkarray.kernels.audit_modes import audit_modes, extend_audit
from lkarray.kernels.audits import completeness, gross_influence, net_influence
from lkarray.kernels.diagnostics import diagnostics
from lkarray.kernels.difficulty import difficulty_table, hidden_similarity, ips_scores
from lkarray.kernels.gradients import (
    angle_distance,
    chord_distance,
    ips,
    lgk,
    plgk,
    temporal_kernel,
)
from lkarray.kernels.gram import gram
from lkarray.kernels.groups import group_mean, linear_operator
from lkarray.kernels.histogram import histogram
from lkarray.kernels.influential import concentration, most_influential
from lkarray.kernels.losses import (
    correlation,
    covariance,
    influence,
)
from lkarray.kernels.mode_shifts import mode_shifts
from lkarray.kernels.modes import (
    cancellation_ratio,
    mode_coefficients,
    modes,
    parameter_modes,
    temporal_modes,
)
from lkarray.kernels.montecarlo import mcse
from lkarray.kernels.neighbors import neighbors
from lkarray.kernels.online import online_modes
from lkarray.kernels.operators import lntk, pntk
from lkarray.kernels.ranks import energy_rank, participation_ratio
from lkarray.kernels.regime import (
    activation_overlap,
    feature_overlap,
    influence_over_time,
    subspace_overlap,
)
from lkarray.kernels.residuals import residualize
from lkarray.kernels.shrinkage import ledoit_wolf
from lkarray.kernels.spectra import eigh, svd
from lkarray.kernels.summaries import llc, loss_gain, loss_variance, singular_fluctuation
from lkarray.kernels.unfolding import params, unfold

__all__ = [
    "activation_overlap",
    "angle_distance",
    "audit_modes",
    "cancellation_ratio",
    "chord_distance",
    "cka",
    "cka_curve",
    "completeness",
    "concentration",
    "correlation",
    "covariance",
    "diagnostics",
    "difficulty_table",
    "eigh",
    "energy_rank",
    "extend_audit",
    "feature_overlap",
    "frobenius",
    "gram",
    "gross_influence",
    "group_mean",
    "hidden_similarity",
    "histogram",
    "influence",
    "influence_over_time",
    "ips",
    "ips_scores",
    "ledoit_wolf",
    "lgk",
    "linear_operator",
    "llc",
    "lntk",
    "loss_gain",
    "loss_variance",
    "mcse",
    "mode_coefficients",
    "mode_shifts",
    "modes",
    "most_influential",
    "neighbors",
    "net_influence",
    "online_modes",
    "parameter_modes",
    "params",
    "participation_ratio",
    "plgk",
    "pntk",
    "residualize",
    "singular_fluctuation",
    "subspace_overlap",
    "svd",
    "temporal_kernel",
    "temporal_modes",
    "unfold",
]
