"""Taking recorded steps again: the states between those that `record(every=k)` kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lkarray.errors import FingerprintError
from lkarray.store import trace_layout, trajectory
from lkarray.training.capture import Capture
from lkarray.training.optimizers import kind_named
from lkarray.training.recorded_steps import RecordedSteps


class Replay:
    """Steps taken again from a kept state, with the optimizer that took them.

    Forward and backward passes, clipping and the update are those of the recorded run, on its
    batches; on the same device, torch version and threads the bits are the same, and the next
    kept state is compared when it is reached.

    Parameters
    ----------
    trace
        The run.
    kept
        Which kept state to start from.
    compare
        Raise where a kept state that is reached is not the one stored.

    Attributes
    ----------
    step
        The step that ``parameters`` come before.
    """

    def __init__(self, trace: RecordedSteps, kept: int, *, compare: bool = True) -> None:
        self._trace, self._compares = trace, compare
        self.step = kept * trace.every
        module = trace.flat.module
        parameters = dict(module.named_parameters())
        moving = {name: parameters[name] for name in trace.names}
        groups: list[dict[str, Any]] = [{"params": []} for _ in trace.fingerprint.groups]
        for name, g in zip(trace.names, trace.fingerprint.group_of, strict=True):
            groups[g]["params"].append(moving[name])
        now = trace.options(min(self.step, trace.steps - 1))
        for group, fixed, changing in zip(groups, trace.fingerprint.groups, now, strict=True):
            group.update(fixed | changing)
        kind: Any = kind_named(trace.fingerprint.optimizer)
        self._optimizer = kind(groups)
        self._capture = Capture(moving, self._optimizer)
        state = trajectory.kept_state(trace.root, kept)
        state[trace_layout.PARAMETERS.name] = trajectory.kept_parameters(trace.root, kept)
        self._capture.load(state)

    def until(self, step: int) -> np.ndarray:
        """Take steps up to the one before ``step``; return the parameters there."""
        while self.step < step:
            self._take()
        return self._capture.theta().cpu().numpy()

    def state(self) -> dict[str, np.ndarray]:
        """Return the parameters and what the optimizer carries, as `record` keeps them."""
        return self._capture.state() | {"parameters": self._capture.theta().cpu().numpy()}

    def denominator(self) -> np.ndarray | None:
        """Return what the step just taken divided by."""
        divisor = self._capture.denominator()
        return None if divisor is None else divisor.cpu().numpy()

    def _take(self) -> None:
        trace, step = self._trace, self.step
        inputs, target = trace.train.take(trace.batch(step))
        self._optimizer.zero_grad(set_to_none=False)
        with torch.enable_grad():
            trace.loss(trace.flat(inputs), target).mean().backward()
        bound = float(trace.clip_bounds[step])
        for i, p in enumerate(self._capture.parameters):
            assert p.grad is not None
            if np.isfinite(bound):
                p.grad.clamp_(-bound, bound)
            elif trace.clip[step, i] != 1:
                p.grad.mul_(torch.tensor(trace.clip[step, i], dtype=p.dtype, device=p.device))
        for group, options in zip(self._optimizer.param_groups, trace.options(step), strict=True):
            group.update(options)
        self._optimizer.step()
        self.step += 1
        if self._compares and self.step % trace.every == 0 and self.step < trace.steps:
            self._compare()

    def _compare(self) -> None:
        kept = trajectory.kept_parameters(self._trace.root, self.step // self._trace.every)
        if not np.array_equal(kept, self._capture.theta().cpu().numpy()):
            raise FingerprintError(
                f"{self._trace.where}: steps taken again do not arrive at the state kept before "
                f"step {self.step}; use the device, threads and torch version of the recording"
            )
