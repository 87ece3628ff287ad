"""The named kernels: a few lines each on the engine."""

from lkarray.kernels.alignment import cka, cka_curve, frobenius
from lkarray.kernels.diagnostics import diagnostics
from lkarray.kernels.gram import gram
from lkarray.kernels.groups import group_mean, linear_operator
from lkarray.kernels.histogram import histogram
from lkarray.kernels.losses import (
    correlation,
    covariance,
    influence,
)
from lkarray.kernels.montecarlo import mcse
from lkarray.kernels.neighbors import neighbors
from lkarray.kernels.ranks import energy_rank, participation_ratio
from lkarray.kernels.residuals import residualize
from lkarray.kernels.shrinkage import ledoit_wolf
from lkarray.kernels.spectra import eigh, svd
from lkarray.kernels.summaries import llc, loss_gain, loss_variance, singular_fluctuation

__all__ = [
    "cka",
    "cka_curve",
    "correlation",
    "covariance",
    "diagnostics",
    "eigh",
    "energy_rank",
    "frobenius",
    "gram",
    "group_mean",
    "histogram",
    "influence",
    "ledoit_wolf",
    "linear_operator",
    "llc",
    "loss_gain",
    "loss_variance",
    "mcse",
    "neighbors",
    "participation_ratio",
    "residualize",
    "singular_fluctuation",
    "svd",
]
