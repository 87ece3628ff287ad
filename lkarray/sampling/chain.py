"""One chain on one device: step, observe, hand to the store."""

from __future__ import annotations

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
        out = torch.empty(self.observed.n, dtype=torch.float32, device=self.flat.device)
        with torch.inference_mode():
            for part, inputs, targets in self.observed.slices(self.eval_rows):
                out[part] = self.loss(self.flat(inputs), targets)
        return out.cpu().numpy()


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
    while taken < schedule.steps and not diverged:
        minibatch = _step(target, sampler, random, taken)
        taken += 1
        if schedule.gives_draw(taken):
            losses = target.observe()
            stats = _statistics(target, sampler, minibatch)
            diverged = bool(stats[schema.DIVERGED.name]) or not np.isfinite(losses).all()
            region.append(losses, stats | {schema.DIVERGED.name: diverged})
        if region.due():
            region.commit(taken, _state(flat))
        tick()
    if region.uncommitted():
        region.commit(taken, _state(flat))
    region.wait()
    return not diverged


def _step(target: Target, sampler: SGLD, random: ChainRandomness, step: int) -> Tensor:
    """Take one step; return the losses of its minibatch before the move."""
    flat = target.flat
    inputs, targets = target.train.take(random.indices(step))
    flat.grad.zero_()
    losses = target.loss(flat(inputs), targets)
    # The gradient of the mean, without a node for the mean.
    torch.autograd.backward(losses, losses.new_full(losses.shape, 1 / len(losses)))
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
    values = {
        schema.MINIBATCH_LOSS.name: float(minibatch.mean()),
        schema.GRADIENT_NORM.name: float(target.flat.grad.norm()),
        schema.DISTANCE.name: float((target.flat.theta - target.center).norm()),
    }
    finite = bool(np.isfinite(list(values.values())).all())
    return {
        **values,
        schema.STEP_SIZE.name: sampler.step_size,
        schema.DIVERGED.name: not finite,
    }


def _state(flat: FlatModel) -> np.ndarray:
    return flat.theta.detach().to("cpu", copy=True).numpy()
