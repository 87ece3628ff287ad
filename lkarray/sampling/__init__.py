"""Sampling the local posterior of a trained model. The torch half; meets Dask at the store."""

from lkarray.nn.outcomes import Outcome
from lkarray.sampling import schedules
from lkarray.sampling.independent import Laplace
from lkarray.sampling.informed import InformedLangevin
from lkarray.sampling.pilots import suggest
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.repairing import repair
from lkarray.sampling.replay import observe
from lkarray.sampling.run import sample
from lkarray.sampling.samplers import SGHMC, SGLD, RMSpropSGLD, Sampler, StepInput

__all__ = [
    "SGHMC",
    "SGLD",
    "InformedLangevin",
    "Laplace",
    "LocalPosterior",
    "Outcome",
    "RMSpropSGLD",
    "Sampler",
    "StepInput",
    "observe",
    "repair",
    "sample",
    "schedules",
    "suggest",
]
