"""How many chains share a stack on a device: measured once, then stored with the run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lkarray import progress as bars
from lkarray.nn import Batches, FlatModel
from lkarray.sampling.chain import Schedule
from lkarray.sampling.randomness import ChainRandomness
from lkarray.sampling.samplers import Sampler, StepInput
from lkarray.sampling.target import Minibatch, Target

logger = logging.getLogger("lkarray")

#: Runs that are shorter than this one chain at a time are not stacked: little is gained, and
#: last bits would depend on a clock.
WORTH_SECONDS = 60.0
#: How much faster a stack must be: what differs by less is decided by the noise of a clock.
DECISIVE = 1.2

_LARGEST_LAYER = {"cpu": 4 << 20, "cuda": 256 << 20}
_ROWS = {"cpu": 4096, "cuda": 16384}
_STACK_BYTES = 1 << 30
_REPEATS = 5
_FEW = 2  # items, or slices, on which a stack is tried
#: What one measurement takes about, and a trial of the whole stack at most.
_PART_SECONDS, _SLOW_SECONDS = 0.5, 5.0


@dataclass(frozen=True)
class Pace:
    """What the chains of a run do: how they step, when they give a draw, on how many items."""

    sampler: Sampler
    schedule: Schedule
    batch_size: int | None


def evaluation_rows(flat: FlatModel, data: Batches) -> int:
    """Return how many items to evaluate at once: what the largest layer makes of them fits.

    On a CPU, layers that stay within a core's cache are faster than larger ones; on a GPU they
    must fill it. The number depends on shapes alone, so that it is the same in every run.
    """
    kind = flat.device.type
    # All chains of a stack make their own of it, side by side: the limit is shared among them.
    largest = data.item_bytes
    handles = []

    def measure(module: nn.Module, args: object, output: object) -> None:
        nonlocal largest
        largest = max([largest, *(t.nbytes for t in _tensors(output))])

    try:
        handles = [module.register_forward_hook(measure) for module in flat.module.modules()]
        with torch.inference_mode():
            inputs, _ = next(iter(data.slices(1)))
            flat(inputs)
    finally:
        for handle in handles:
            handle.remove()
    limit = _LARGEST_LAYER.get(kind, 64 << 20) // flat.width
    return max(1, min(data.n, _ROWS.get(kind, 4096), limit // largest))


def _tensors(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors(entry)


def choose_target(
    asked: int | str, chains: int, make: Callable[[int], Target], pace: Pace
) -> Target:
    """Return the target with as many chains stacked as asked, or as is best.

    Parameters
    ----------
    asked
        A width, or ``"auto"``: one chain at a time unless the run takes long enough to matter,
        the model can be stacked, and a stack was measured to be decisively faster. That is
        measured on as many items as take some seconds, not on all.
    chains
        Chains of the run.
    make
        Makes the target for a width.
    pace
        Of the run.

    Raises
    ------
    ValueError
        The width asked for cannot be stacked; the message says why.
    """
    alone = make(1)
    if isinstance(asked, int):
        if asked == 1:
            return alone
        stacked = make(asked)
        reason = _unstackable(alone, stacked, pace)
        if reason:
            raise ValueError(
                f"the model's chains cannot be stacked ({reason}); use chains_per_device=1"
            )
        return stacked
    values = (len(alone.recorded) + (alone.control is not None)) * sum(
        observed.data.n for observed in alone.observed
    )
    # Each chain of a stack keeps a block of up to 512 draws in memory until it is written.
    most = min(chains, max(1, _STACK_BYTES // (8 * values * min(pace.schedule.draws, 512))))
    if most == 1:
        return alone
    with bars.busy("measuring layouts"):
        return _fastest(alone, most, chains, make, pace)


def _fastest(
    alone: Target, most: int, chains: int, make: Callable[[int], Target], pace: Pace
) -> Target:
    """Return the target of a width of up to ``most`` that is decisively the fastest."""
    cost = _seconds(alone, pace)
    if cost * pace.schedule.steps * chains < WORTH_SECONDS:
        return alone
    least = _timed(alone, partial(_trial, alone, pace, 0))
    best, best_cost = alone, cost
    for width in sorted({most, -(-most // 2), min(4, most)} - {1}, reverse=True):
        if least * width > _SLOW_SECONDS:  # such a model fills the device by itself
            continue
        try:
            stacked = make(width)
            reason = _unstackable(alone, stacked, pace)
            if reason:
                logger.info("chains run one at a time, since they cannot be stacked: %s", reason)
                return alone
            stacked_cost = _seconds(stacked, pace) / width
        except torch.cuda.OutOfMemoryError:
            continue
        if stacked_cost * DECISIVE < cost and stacked_cost < best_cost:
            best, best_cost = stacked, stacked_cost
    logger.info(
        "chains_per_device=%d: %.2g s a step and chain, %.2g one at a time",
        best.flat.width,
        best_cost,
        cost,
    )
    return best


class _Trial:
    """Steps of a stack as a run takes them, on a few of the items that a step takes.

    Parameters
    ----------
    target, pace
        Of the run.
    first
        The chain in the first seat; the others follow it.
    """

    def __init__(self, target: Target, pace: Pace, first: int = 0) -> None:
        self._target, self._sampler, self._first = target, pace.sampler, first
        theta = target.flat.theta
        self._state = {name: torch.zeros_like(theta) for name in pace.sampler.carries}
        self._noise, self._signs = torch.zeros_like(theta), torch.zeros_like(theta)
        n, size = target.train.n, pace.batch_size
        self._everything = size is None or size >= n
        self._taken = 0
        #: Of what a step is made: slices of the whole training set, or items of a minibatch.
        self.whole = -(-n // target.train_rows) if self._everything else int(size or n)
        target.start()

    def step(self, count: int) -> Tensor:
        """Take a step on ``count`` of ``whole``; return the minibatch's losses."""
        target, flat, step = self._target, self._target.flat, self._taken
        self._taken += 1
        n, size = target.train.n, None if self._everything else count
        seats = [
            ChainRandomness(0, self._first + seat, n=n, batch_size=size, like=target.center)
            for seat in range(flat.width)
        ]
        minibatch = self._minibatch(seats, step)
        curvature = None
        if self._sampler.needs_curvature:
            for random, signs in zip(seats, self._signs, strict=True):
                random.signs(step, signs)
            curvature = target.curvature(minibatch, self._signs, limit=count)
        losses = target.gradient(minibatch, limit=count)
        for random, noise in zip(seats, self._noise, strict=True):
            random.noise(step, noise)
        if flat.mask is not None:
            self._noise.mul_(flat.mask)
        self._sampler.step(
            StepInput(
                theta=flat.theta,
                grad=flat.grad,
                noise=self._noise,
                center=target.center,
                nbeta=target.nbeta,
                gamma=target.gamma,
                step=step,
                state=self._state,
                curvature=curvature,
                law=target.law,
            )
        )
        return losses

    def _minibatch(self, seats: list[ChainRandomness], step: int) -> Minibatch:
        """Return the indices of each seat, ``(chain, batch)``; ``(batch,)`` where it is alone."""
        if self._everything:
            return None
        if self._target.train.held:
            rows = torch.stack([random.rows(step) for random in seats])
            return rows[0] if len(seats) == 1 else rows
        indices = np.stack([random.indices(step) for random in seats])
        return indices[0] if len(seats) == 1 else indices


def _unstackable(alone: Target, stacked: Target, pace: Pace) -> str | None:
    """Return why the stack cannot stand for chains run alone, if it cannot.

    Both take some steps on few items, each chain with a minibatch, noise and signs of its own;
    the chains in the first and the last seat must go where they go alone.
    """
    try:
        together = _trial(stacked, pace, 0)
        for seat in {0, stacked.flat.width - 1}:
            apart = _trial(alone, pace, seat)
            for what, values in together.items():
                if not _agree(values[seat], apart[what][0]):
                    return f"its {what} differ under torch.func.vmap"
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # torch.func has many ways to refuse a module
        return (str(error).strip() or repr(error)).splitlines()[0]
    finally:
        alone.start()
        stacked.start()
    return None


def _trial(target: Target, pace: Pace, first: int) -> dict[str, Tensor]:
    """Return what some steps of the chains give, by name, each ``(chain, ...)``."""
    trial = _Trial(target, pace, first)
    few = min(_FEW, trial.whole)
    # Two steps: the second is the first whose vectors of state are not zero.
    losses = [trial.step(few) for _ in range(2)]
    return {
        "losses": torch.cat([*losses, target.first_losses(_FEW)], dim=1),
        "gradients": target.flat.grad.clone(),
        "steps": target.flat.theta - target.center,
    }


def _agree(a: Tensor, b: Tensor) -> bool:
    """Say whether two vectors differ by rounding at most; what is not finite must be so in both."""
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = (values.double().nan_to_num(0, 0, 0) for values in (a, b))
    return float((a - b).norm()) <= 1e-2 * float(b.norm()) + 1e-5


def _seconds(target: Target, pace: Pace) -> float:
    """Return the seconds of one step of the whole stack, its share of a draw included."""
    trial = _Trial(target, pace)
    moving = _measured(target, trial.step, trial.whole)
    target.start()
    passes = max(-(-observed.data.n // observed.rows) for observed in target.observed)
    seeing = _measured(target, lambda count: target.observe(limit=count), passes)
    target.start()
    return moving + seeing / pace.schedule.thin


def _measured(target: Target, work: Callable[[int], object], whole: int) -> float:
    """Return the seconds of ``work(whole)``.

    Work that takes long is measured on a few of ``whole``, in proportion. On CUDA it is done
    whole, so that memory that does not suffice shows here.
    """
    # Twice, however long it took: the first pays for what a process does once (modules that torch
    # loads late took over a second), and times ``whole`` that looked like a run of minutes.
    first = min(_timed(target, partial(work, 1)) for _ in range(2))
    count = max(1, min(whole, int(_PART_SECONDS / max(first, 1e-9))))
    if target.flat.device.type == "cuda":
        count = whole
    # The least of several is what the work takes; the rest is what else the machine does.
    least, spent = (first, first) if count == 1 else (math.inf, 0.0)
    for _ in range(1 + _REPEATS):
        if spent >= 2 * _PART_SECONDS:
            break
        seconds = _timed(target, partial(work, count))
        least, spent = min(least, seconds), spent + seconds
    return least * whole / count


def _timed(target: Target, work: Callable[[], object]) -> float:
    _wait(target)
    began = time.perf_counter()
    work()
    _wait(target)
    return time.perf_counter() - began


def _wait(target: Target) -> None:
    if target.flat.device.type == "cuda":
        torch.cuda.synchronize(target.flat.device)
