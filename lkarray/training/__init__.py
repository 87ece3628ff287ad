"""Training runs: recorded step by step, opened again, and turned into gradient tensors."""

from lkarray.training.features import gradient_factors, gradient_features, gradient_plan
from lkarray.training.frozen import snapshot
from lkarray.training.hidden import activations, mode_sensitivity
from lkarray.training.means import mean_gradient
from lkarray.training.optimizers import RULES, Coefficients, Rule
from lkarray.training.projection import Projection
from lkarray.training.recorder import Recorder
from lkarray.training.recording import record
from lkarray.training.repairing import repair_trace
from lkarray.training.shifting import shift_modes
from lkarray.training.trace import Trace, open_trace

__all__ = [
    "RULES",
    "Coefficients",
    "Projection",
    "Recorder",
    "Rule",
    "Trace",
    "activations",
    "gradient_factors",
    "gradient_features",
    "gradient_plan",
    "mean_gradient",
    "mode_sensitivity",
    "open_trace",
    "record",
    "repair_trace",
    "shift_modes",
    "snapshot",
]
