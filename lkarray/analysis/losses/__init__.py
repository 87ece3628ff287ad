"""Analysis of losses(chain, draw, sample): kernels, neighbours, summaries, diagnostics."""

from lkarray.analysis.losses.diagnostics import diagnostics
from lkarray.analysis.losses.extrapolation import extrapolated
from lkarray.analysis.losses.judging import judge
from lkarray.analysis.losses.loss_kernels import correlation, covariance, influence
from lkarray.analysis.losses.montecarlo import mcse
from lkarray.analysis.losses.odds import log_odds
from lkarray.analysis.losses.reliability import at_equal_reliability, reliability
from lkarray.analysis.losses.residuals import residualize
from lkarray.analysis.losses.summaries import llc, loss_gain, loss_variance, singular_fluctuation

__all__ = [
    "at_equal_reliability",
    "correlation",
    "covariance",
    "diagnostics",
    "extrapolated",
    "influence",
    "judge",
    "llc",
    "log_odds",
    "loss_gain",
    "loss_variance",
    "mcse",
    "reliability",
    "residualize",
    "singular_fluctuation",
]
