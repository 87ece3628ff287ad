"""What the optimizer did at each recorded step, ready for the adjoint pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lkarray.auditing.blocks import Block
from lkarray.store import trace_layout
from lkarray.training.optimizers import RULES, kind_named
from lkarray.training.trace import Trace

#: A number of all elements of a block, or one of each, ``(element,)``.
Scale = float | Tensor


@dataclass(frozen=True, kw_only=True)
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


class Updates(ABC):
    """What each step is taken for; the recorded one, or another, as an attribution has it.

    Parameters
    ----------
    trace
        The run.
    """

    #: Whether updates need what the optimizer divided by.
    divided: bool
    #: Whether they need the stored factors of clipping.
    clipped: bool
    #: Whether no step has momentum, so that nothing is carried from step to step.
    stateless: bool
    #: Why influences by these do not add up to the change; empty if they do.
    incomplete: str = ""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._fields = {name: i for i, name in enumerate(trace_layout.FIELDS)}
        self._group_of = trace.fingerprint.group_of
        self._scalars = trace.coefficients.copy()  # (step, group, field)
        frozen = sorted(set(range(self._scalars.shape[1])) - set(self._group_of))
        self._scalars[:, frozen] = 0  # groups of frozen parameters alone have no numbers

    @abstractmethod
    def momentum(self, step: int, block: Block) -> Scale:
        """Return ``mu`` of a step; 0 after the last."""

    @abstractmethod
    def needs_gradient(self, step: int, start: int) -> bool:
        """Say whether only the batch's gradient tells a step's update, in a pass to ``start``."""

    @abstractmethod
    def at(
        self,
        step: int,
        block: Block,
        *,
        denominator: Tensor | None,
        gradient: Tensor | None,
        diagonal: Tensor | None,
    ) -> Update:
        """Return the update of a block's tensors.

        Parameters
        ----------
        step, block
            Which.
        denominator
            What the step divided by, ``(element,)``.
        gradient
            Mean gradient of the batch, unclipped, ``(element,)``: says what clipping by value
            did, where that was not stored.
        diagonal
            Factors of clipping, ``(element,)``, where they were stored.
        """

    def largest_momentum(self, start: int, stop: int) -> float:
        """Return what momentum leaves at most, at step ``start``, of a step ``stop``."""
        mu = np.abs(self._scalars[start + 1 : stop + 1, :, self._fields["mu"]])
        return float(mu.prod(0).max())

    def _spread(self, field: str, step: int, block: Block) -> Scale:
        of_groups = self._scalars[step, :, self._fields[field]]
        of_tensors = [float(of_groups[self._group_of[i]]) for i in block.tensors]
        return _join(of_tensors, block, self._trace)


class PlainDescent(Updates):
    """Every step is taken for one of plain gradient descent with the recorded learning rate.

    No preconditioner, momentum, clipping or decay: what TracIn assumes.
    """

    divided = clipped = False
    stateless = True
    incomplete = "steps are taken for plain gradient descent"

    @override
    def momentum(self, step: int, block: Block) -> Scale:
        return 0.0

    @override
    def needs_gradient(self, step: int, start: int) -> bool:
        return False

    @override
    def at(
        self,
        step: int,
        block: Block,
        *,
        denominator: Tensor | None,
        gradient: Tensor | None,
        diagonal: Tensor | None,
    ) -> Update:
        rate = self._spread("learning_rate", step, block)
        return Update(mu=0.0, s=1.0, q=rate, n=0.0, clip=1.0, coupled=0.0, decoupled=0.0)


class RecordedUpdates(Updates):
    """Every step as the optimizer took it."""

    clipped = True

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self._divides = RULES[kind_named(trace.fingerprint.optimizer)].divides
        self.divided = bool(self._divides)
        self.stateless = not self._scalars[:, :, self._fields["mu"]].any()

    @override
    def momentum(self, step: int, block: Block) -> Scale:
        if step >= self._trace.steps:
            return 0.0
        return self._spread("mu", step, block)

    @override
    def needs_gradient(self, step: int, start: int) -> bool:
        bound = float(self._trace.clip_bounds[step])
        clipped = np.isfinite(bound) and self._trace.every > 1  # whose factors were not stored
        return bool(clipped or step == start > 0)  # or the buffer that the first step began with

    @override
    def at(
        self,
        step: int,
        block: Block,
        *,
        denominator: Tensor | None,
        gradient: Tensor | None,
        diagonal: Tensor | None,
    ) -> Update:
        scalars = {
            name: self._spread(name, step, block)
            for name in ("mu", "s", "q", "n", "coupled", "decoupled")
        }
        if denominator is not None:
            for name in self._divides.lower():
                scalars[name] = scalars[name] / denominator  # (element,)
        return Update(**scalars, clip=self._clip(step, block, gradient, diagonal))

    def _clip(
        self, step: int, block: Block, gradient: Tensor | None, diagonal: Tensor | None
    ) -> Scale:
        trace = self._trace
        if diagonal is not None and not bool((diagonal == 1).all()):
            return diagonal
        bound = float(trace.clip_bounds[step])
        if np.isfinite(bound) and gradient is not None:
            # 0/0 is 1: the derivative of clipping at nothing.
            clipped = gradient.clamp(-bound, bound) / gradient
            return torch.where(gradient == 0, torch.ones_like(gradient), clipped)
        return _join([float(trace.clip[step, i]) for i in block.tensors], block, trace)


def _join(values: list[float], block: Block, trace: Trace) -> Scale:
    """Return one number if all are the same, and otherwise one of each element."""
    if len(set(values)) == 1:
        return values[0]
    like = trace.flat.theta
    each = torch.tensor(values, dtype=like.dtype, device=like.device)
    return torch.repeat_interleave(each, torch.tensor(block.sizes, device=like.device))


def buffer_before(update: Update, moved: Tensor, theta: Tensor, gradient: Tensor) -> Tensor | None:
    """Return the momentum buffer that a step began with, from how far it moved; see `Update`.

    ``None`` where the step has no momentum. Raises ``ValueError`` where the learning rate is zero,
    so that the step does not tell.
    """
    if not isinstance(update.mu, Tensor) and update.mu == 0:
        return None
    q = update.q
    if bool((q == 0).any()) if isinstance(q, Tensor) else q == 0:
        raise ValueError(
            "the first step audited had the learning rate zero, which hides the momentum that it "
            "began with; begin at another step"
        )
    u = update.clip * gradient + update.coupled * theta
    after = -(moved + update.n * u + update.decoupled * theta) / update.q
    before = (after - update.s * u) / update.mu
    return before if isinstance(update.mu, float) else before.nan_to_num(0.0, 0.0, 0.0)
