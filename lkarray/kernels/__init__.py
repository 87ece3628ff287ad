"""The named kernels: a few lines each on the engine."""

from lkarray.kernels.gram import gram
from lkarray.kernels.losses import (
    correlation,
    covariance,
    influence,
    llc,
    loss_gain,
    loss_variance,
    singular_fluctuation,
)
from lkarray.kernels.neighbors import neighbors

__all__ = [
    "correlation",
    "covariance",
    "gram",
    "influence",
    "llc",
    "loss_gain",
    "loss_variance",
    "neighbors",
    "singular_fluctuation",
]
