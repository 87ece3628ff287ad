"""Sampling the local posterior of a trained model. The torch half; meets Dask at the store."""

from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.run import sample
from lkarray.sampling.samplers import SGLD

__all__ = ["SGLD", "LocalPosterior", "sample"]
