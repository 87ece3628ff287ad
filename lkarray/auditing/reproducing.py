"""Whether gradients taken now are those of the run that was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lkarray.errors import FingerprintError
from lkarray.nn.flat import FlatModel
from lkarray.nn.reference import Reference
from lkarray.store import trace_layout, trajectory
from lkarray.training.checking import literal
from lkarray.training.trace import Trace

#: Relative difference of gradient norms beyond which a step is not the recorded one.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3}


@dataclass(frozen=True, kw_only=True)
class RecordedNorms:
    """The recorded norms of the batches' gradients.

    Attributes
    ----------
    trace
        The run.
    places
        Where each parameter lies in a vector of all that moved, by name.
    norms
        Of every step's gradient.
    """

    trace: Trace
    places: dict[str, slice]
    norms: np.ndarray

    def agree(self, step: int, square: float) -> bool:
        """Say whether a batch gradient of a squared norm is the recorded one."""
        recorded = float(self.norms[step])
        tolerance = _TOLERANCE.get(self.trace.flat.theta.dtype, 1e-2)
        return bool(abs(square**0.5 - recorded) <= tolerance * recorded + 1e-7)

    def refuse_other_gradients(self, steps: Sequence[int]) -> None:
        """Raise for the first of some steps whose batch gradient is not the recorded one."""
        trace = self.trace
        # All that moved in the run, of which the audit may be of a part.
        flat = FlatModel(trace.flat.module, trainable=[literal(name) for name in trace.names])
        reference = Reference(flat, trace.loss)
        for step, theta in trace.states(steps):
            flat.load(theta, self.places)
            batch = trace.batch(step)
            mean = reference.total(*trace.train.take(batch)) / len(batch)
            square = float(mean.square().sum())
            if not self.agree(step, square):
                raise FingerprintError(
                    f"{trace.where}: the gradient of step {step} has the norm {square**0.5:.6g}, "
                    f"and {float(self.norms[step]):.6g} was recorded; the data, the model's code "
                    "or its buffers have changed since, so that the run cannot be audited"
                )

    def refuse_other_run(self, start: int, stop: int) -> None:
        """Raise unless three steps of some, from end to end, have the recorded gradients."""
        for step in sorted({start, (start + stop) // 2, stop - 1}):
            try:
                self.refuse_other_gradients([step])
            except FingerprintError:
                self.refuse_other_gradients(range(start, step + 1))  # to name the first
                raise


def recorded_norms(trace: Trace) -> RecordedNorms:
    """Return the recorded norms of a run."""
    places = dict(zip(trace.names, map(slice, trace.starts, trace.stops), strict=True))
    norms = trajectory.step_rows(trace.root, trace_layout.NORM.name, 0, trace.steps)
    return RecordedNorms(trace=trace, places=places, norms=norms)
