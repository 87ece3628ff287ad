"""What the optimizer did at each recorded step, ready for the adjoint pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lkarray.store import trace_layout
from lkarray.training.optimizers import RULES, kind_named

if TYPE_CHECKING:
    from lkarray.training.trace import Trace

#: A number of all elements of a block, or one of each, ``(element,)``.
Scale = float | Tensor


@dataclass(frozen=True)
class Update:
    """The realised quantities of one step, for some tensors (docs/methods/adjoint.md).

    ``u = clip g + coupled theta``; ``b = mu b' + s u``; the parameters move by
    ``- q b - n u - decoupled theta``.
    """

    mu: Scale
    s: Scale
    q: Scale
    n: Scale
    clip: Scale
    coupled: Scale
    decoupled: Scale


class Realised:
    """The recorded updates, by step.

    Parameters
    ----------
    trace
        The run.
    plain
        Take every step for one of plain gradient descent with the recorded learning rate: no
        preconditioner, momentum, clipping or decay. What TracIn assumes.
    """

    def __init__(self, trace: Trace, *, plain: bool = False) -> None:
        self._trace, self.plain = trace, plain
        self._fields = {name: i for i, name in enumerate(trace_layout.FIELDS)}
        divides = RULES[kind_named(trace.fingerprint.optimizer)].divides
        self._divides = "" if plain else divides
        self._group_of = trace.fingerprint.group_of
        self._values = trace.coefficients.copy()
        frozen = sorted(set(range(self._values.shape[1])) - set(self._group_of))
        self._values[:, frozen] = 0  # groups of frozen parameters alone have no numbers

    @property
    def divided(self) -> bool:
        """Whether updates need what the optimizer divided by."""
        return bool(self._divides)

    @property
    def stateless(self) -> bool:
        """Whether no step has momentum, so that nothing is carried from step to step."""
        return self.plain or not self._values[:, :, self._fields["mu"]].any()

    def momentum(self, step: int, tensors: Sequence[int], sizes: Sequence[int]) -> Scale:
        """Return ``mu`` of a step; 0 after the last."""
        if self.plain or step >= self._trace.steps:
            return 0.0
        return self._spread("mu", step, tensors, sizes)

    def largest_momentum(self, start: int, stop: int) -> float:
        """Return what momentum leaves at most, at step ``start``, of a step ``stop``."""
        mu = np.abs(self._values[start + 1 : stop + 1, :, self._fields["mu"]])
        return float(mu.prod(0).max())

    def at(
        self,
        step: int,
        tensors: Sequence[int],
        sizes: Sequence[int],
        denominator: Tensor | None,
        gradient: Tensor | None = None,
        diagonal: Tensor | None = None,
    ) -> Update:
        """Return the update of some tensors, whose elements lie side by side.

        Parameters
        ----------
        step
            Which.
        tensors, sizes
            Indices among the trace's tensors, and their numbers of elements.
        denominator
            What the step divided by, ``(element,)``.
        gradient
            Mean gradient of the batch, unclipped, ``(element,)``: says what clipping by value
            did, where that was not stored.
        diagonal
            Factors of clipping, ``(element,)``, where they were stored.
        """
        if self.plain:
            rate = self._spread("learning_rate", step, tensors, sizes)
            return Update(0.0, 1.0, rate, 0.0, 1.0, 0.0, 0.0)
        values = {
            name: self._spread(name, step, tensors, sizes)
            for name in ("mu", "s", "q", "n", "coupled", "decoupled")
        }
        if denominator is not None:
            for name in self._divides.lower():
                values[name] = values[name] / denominator
        return Update(**values, clip=self._clip(step, tensors, sizes, gradient, diagonal))

    def _spread(self, field: str, step: int, tensors: Sequence[int], sizes: Sequence[int]) -> Scale:
        row = self._values[step, :, self._fields[field]]
        return _join([float(row[self._group_of[i]]) for i in tensors], sizes, self._trace)

    def _clip(
        self,
        step: int,
        tensors: Sequence[int],
        sizes: Sequence[int],
        gradient: Tensor | None,
        diagonal: Tensor | None,
    ) -> Scale:
        trace = self._trace
        if diagonal is not None and not bool((diagonal == 1).all()):
            return diagonal
        bound = float(trace.clip_bounds[step])
        if np.isfinite(bound) and gradient is not None:
            # 0/0 is 1: the derivative of clipping at nothing.
            clipped = gradient.clamp(-bound, bound) / gradient
            return torch.where(gradient == 0, torch.ones_like(gradient), clipped)
        return _join([float(trace.clip[step, i]) for i in tensors], sizes, trace)


def _join(values: list[float], sizes: Sequence[int], trace: Trace) -> Scale:
    """Return one number if all are the same, and otherwise one of each element."""
    if len(set(values)) == 1:
        return values[0]
    like = trace.flat.theta
    each = torch.tensor(values, dtype=like.dtype, device=like.device)
    return torch.repeat_interleave(each, torch.tensor(sizes, device=like.device))


def buffer_before(update: Update, moved: Tensor, theta: Tensor, gradient: Tensor) -> Tensor | None:
    """Return the momentum buffer that a step began with, from how far it moved; see `Update`.

    ``None`` where the step has no momentum. Raises ``ValueError`` where the learning rate is zero,
    so that the step does not tell.
    """
    if not isinstance(update.mu, Tensor) and update.mu == 0:
        return None
    if bool((torch.as_tensor(update.q) == 0).any()):
        raise ValueError(
            "the first step audited had the learning rate zero, which hides the momentum that it "
            "began with; begin at another step"
        )
    u = update.clip * gradient + update.coupled * theta
    after = -(moved + update.n * u + update.decoupled * theta) / update.q
    before = (after - update.s * u) / update.mu
    return before if isinstance(update.mu, float) else before.nan_to_num(0.0, 0.0, 0.0)
