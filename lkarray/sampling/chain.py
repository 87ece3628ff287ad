"""One chain on one device: step, observe, hand to the store."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lkarray import schema
from lkarray.nn import Batches, FlatModel, PerExampleLoss
from lkarray.sampling.randomness import ChainRandomness
from lkarray.sampling.samplers import SGLD
from lkarray.store import ChainRegion


@dataclass(frozen=True)
class Target:
    """What is sampled and what is observed, on its device: shared by all chains."""

    flat: FlatModel
    center: Tensor
    train: Batches
    observed: Batches
    loss: PerExampleLoss
    nbeta: float
    gamma: float
    eval_rows: int

    def observe(self) -> np.ndarray:
        """Return the losses of all observed samples at the present weights, float32."""
        with torch.inference_mode():
            parts = [
                self.loss(self.flat(inputs), targets).float()
                for inputs, targets in self.observed.slices(self.eval_rows)
            ]
            losses = parts[0] if len(parts) == 1 else torch.cat(parts)
            return losses.cpu().numpy()


@dataclass(frozen=True)
class Schedule:
    """Which steps are taken and which give a draw."""

    draws: int
    burn_in: int
    thin: int

    @property
    def steps(self) -> int:
        """Steps of a whole chain."""
        return self.burn_in + self.draws * self.thin

    def gives_draw(self, taken: int) -> bool:
        """Say whether a draw follows when ``taken`` steps have been taken."""
        return taken > self.burn_in and (taken - self.burn_in) % self.thin == 0


def run_chain(
    target: Target,
    sampler: SGLD,
    schedule: Schedule,
    region: ChainRegion,
    random: ChainRandomness,
    tick: Callable[[], object],
) -> bool:
    """Run one chain from where its region stands to the end of the schedule.

    Returns whether the chain stayed finite. ``tick`` is called after every step. The draw at
    which the chain turned non-finite is stored and flagged, and the chain stops there.
    """
    if region.diverged():
        return False
    flat = target.flat
    state = region.state()
    flat.theta.copy_(target.center if state is None else torch.from_numpy(state))
    taken, diverged = region.record.step, False
    share = flat.theta.new_full((random.batch,), 1 / random.batch)
    while taken < schedule.steps and not diverged:
        minibatch = _step(target, sampler, random, taken, share)
        taken += 1
        if schedule.gives_draw(taken):
            losses = target.observe()
            stats = _statistics(target, sampler, minibatch)
            # A float64 sum of float32 numbers is finite just when all of them are.
            finite = math.isfinite(losses.sum(dtype=np.float64))
            diverged = bool(stats[schema.DIVERGED.name]) or not finite
            region.append(losses, stats | {schema.DIVERGED.name: diverged})
        if region.due():
            region.commit(taken, _state(flat))
        tick()
    if region.uncommitted():
        region.commit(taken, _state(flat))
    region.wait()
    return not diverged


def _step(
    target: Target, sampler: SGLD, random: ChainRandomness, step: int, share: Tensor
) -> Tensor:
    """Take one step; return the losses of its minibatch before the move."""
    flat = target.flat
    inputs, targets = target.train.take(random.indices(step))
    flat.grad.zero_()
    losses = target.loss(flat(inputs), targets)
    if share.shape != losses.shape or share.dtype != losses.dtype:
        share = losses.new_full(losses.shape, 1 / len(losses))
    # The gradient of the mean, without a node for the mean.
    torch.autograd.backward(losses, share)
    sampler.step(
        flat.theta,
        flat.grad,
        random.noise(step),
        target.center,
        nbeta=target.nbeta,
        gamma=target.gamma,
    )
    return losses.detach()


def _statistics(target: Target, sampler: SGLD, minibatch: Tensor) -> dict[str, float | bool]:
    grad, moved = target.flat.grad, target.flat.theta - target.center
    # Dot products rather than norms: half the cost, which counts when each step gives a draw.
    loss = float(minibatch.sum()) / len(minibatch)
    gradient, distance = math.sqrt(float(grad.dot(grad))), math.sqrt(float(moved.dot(moved)))
    return {
        schema.MINIBATCH_LOSS.name: loss,
        schema.GRADIENT_NORM.name: gradient,
        schema.DISTANCE.name: distance,
        schema.STEP_SIZE.name: sampler.step_size,
        schema.DIVERGED.name: not math.isfinite(loss + gradient + distance),
    }


def _state(flat: FlatModel) -> np.ndarray:
    return flat.theta.detach().to("cpu", copy=True).numpy()
