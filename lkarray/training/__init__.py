"""Training runs: recorded step by step, opened again, and turned into gradient tensors."""

from lkarray.training.features import gradient_features
from lkarray.training.optimizers import RULES, Coefficients, Rule
from lkarray.training.projection import Projection
from lkarray.training.recorder import Recorder, record
from lkarray.training.trace import Trace, open_trace

__all__ = [
    "RULES",
    "Coefficients",
    "Projection",
    "Recorder",
    "Rule",
    "Trace",
    "gradient_features",
    "open_trace",
    "record",
]
