"""What serves every analysis: the Gram over named dims, spectra, groups, alignment, operators."""

from lkarray.kernels.alignment import cka, cka_curve, frobenius
from lkarray.kernels.gram import gram
from lkarray.kernels.groups import group_mean
from lkarray.kernels.histogram import histogram
from lkarray.kernels.neighbors import neighbors
from lkarray.kernels.operators import linear_operator
from lkarray.kernels.ranks import energy_rank, participation_ratio
from lkarray.kernels.shrinkage import ledoit_wolf
from lkarray.kernels.spectra import eigh, svd
from lkarray.kernels.unfolding import params, unfold

__all__ = [
    "cka",
    "cka_curve",
    "eigh",
    "energy_rank",
    "frobenius",
    "gram",
    "group_mean",
    "histogram",
    "ledoit_wolf",
    "linear_operator",
    "neighbors",
    "params",
    "participation_ratio",
    "svd",
    "unfold",
]
