"""How chains are laid out on a device: measured once, then stored with the run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lkarray import progress as bars
from lkarray.nn import Batches, FlatModel
from lkarray.sampling.chain import Schedule
from lkarray.sampling.randomness import ChainRandomness
from lkarray.sampling.samplers import Sampler
from lkarray.sampling.target import Target

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


def evaluation_rows(flat: FlatModel, data: Batches) -> int:
    """Return how many items to evaluate at once: what the largest layer makes of them fits.

    On a CPU, layers that stay within a core's cache are faster than larger ones; on a GPU they
    must fill it. The number depends on shapes alone, so that it is the same in every run.
    """
    kind = flat.device.type
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
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def choose_target(
    asked: int | str,
    chains: int,
    make: Callable[[int], Target],
    sampler: Sampler,
    schedule: Schedule,
    *,
    batch_size: int | None,
) -> Target:
    """Return the target with as many chains stacked as asked, or as is best.

    Parameters
    ----------
    asked
        A number, or ``"auto"``: one at a time unless the run takes long enough to matter, the
        model can be stacked, and a stack was measured to be decisively faster. That is measured
        on as many items as take some seconds, not on all.
    chains
        Chains of the run.
    make
        Makes the target for a width.
    sampler, schedule, batch_size
        Of the run.

    Raises
    ------
    ValueError
        The number asked for cannot be stacked; the message says why.
    """
    alone = make(1)
    if isinstance(asked, int):
        if asked == 1:
            return alone
        stacked = make(asked)
        reason = _unstackable(alone, stacked, sampler, batch_size)
        if reason:
            raise ValueError(
                f"the model's chains cannot be stacked ({reason}); use chains_per_device=1"
            )
        return stacked
    values = sum(observed.data.n for observed in alone.observed)
    most = min(chains, max(1, _STACK_BYTES // (8 * values * min(schedule.draws, 512))))
    if most == 1:
        return alone
    with bars.busy("measuring layouts"):
        return _fastest(alone, most, chains, make, sampler, schedule, batch_size)


def _fastest(
    alone: Target,
    most: int,
    chains: int,
    make: Callable[[int], Target],
    sampler: Sampler,
    schedule: Schedule,
    batch_size: int | None,
) -> Target:
    """Return the target of a width of up to ``most`` that is decisively the fastest."""
    cost = _seconds(alone, sampler, schedule, batch_size)
    if cost * schedule.steps * chains < WORTH_SECONDS:
        return alone
    least = _timed(alone, partial(_trial, alone, sampler, batch_size, 0))
    best = alone, cost
    for width in sorted({most, -(-most // 2), min(4, most)} - {1}, reverse=True):
        if least * width > _SLOW_SECONDS:  # such a model fills the device by itself
            continue
        try:
            stacked = make(width)
            reason = _unstackable(alone, stacked, sampler, batch_size)
            if reason:
                logger.info("chains run one at a time, since they cannot be stacked: %s", reason)
                return alone
            found = _seconds(stacked, sampler, schedule, batch_size) / width
        except torch.cuda.OutOfMemoryError:
            continue
        if found * DECISIVE < cost and found < best[1]:
            best = stacked, found
    target, found = best
    logger.info(
        "chains_per_device=%d: %.2g s a step and chain, %.2g one at a time",
        target.flat.width,
        found,
        cost,
    )
    return target


class _Walk:
    """Steps of a target's chains as a run takes them, on a part of what a step takes.

    Parameters
    ----------
    target, sampler, batch_size
        Of the run.
    first
        The chain in the first row; the others follow it.
    """

    def __init__(
        self, target: Target, sampler: Sampler, batch_size: int | None, first: int = 0
    ) -> None:
        self._target, self._sampler, self._first = target, sampler, first
        self._theta = target.flat.theta
        self._vectors = {name: torch.zeros_like(self._theta) for name in sampler.carries}
        self._noise, self._signs = torch.zeros_like(self._theta), torch.zeros_like(self._theta)
        n = target.train.n
        self._everything = batch_size is None or batch_size >= n
        self._number = 0
        #: Of what a step is made: slices of the whole training set, or items of a minibatch.
        self.whole = -(-n // target.train_rows) if self._everything else int(batch_size or n)
        target.start()

    def step(self, part: int) -> Tensor:
        """Take a step on ``part`` of ``whole``; return the minibatch's losses."""
        target, flat, number = self._target, self._target.flat, self._number
        self._number += 1
        size = None if self._everything else part
        each = [
            ChainRandomness(
                0, self._first + row, n=target.train.n, batch_size=size, like=target.center
            )
            for row in range(flat.width)
        ]
        rows: Tensor | np.ndarray | None = None
        if not self._everything and target.train.held:
            rows = torch.stack([random.rows(number) for random in each])
        elif not self._everything:
            rows = np.stack([random.indices(number) for random in each])
        if rows is not None and flat.width == 1:
            rows = rows[0]
        curvature = None
        if self._sampler.needs_curvature:
            for random, signs in zip(each, self._signs, strict=True):
                random.signs(number, signs)
            curvature = target.curvature(rows, self._signs, limit=part)
        losses = target.gradient(rows, limit=part)
        for random, noise in zip(each, self._noise, strict=True):
            random.noise(number, noise)
        if flat.mask is not None:
            self._noise.mul_(flat.mask)
        self._sampler.step(
            self._theta,
            flat.grad,
            self._noise,
            target.center,
            nbeta=target.nbeta,
            gamma=target.gamma,
            step=number,
            state=self._vectors,
            curvature=curvature,
        )
        return losses


def _unstackable(
    alone: Target, stacked: Target, sampler: Sampler, batch_size: int | None
) -> str | None:
    """Return why the stack cannot stand for chains run alone, if it cannot.

    Both take some steps on few items, each chain with a minibatch, noise and signs of its own;
    the first and the last chain of the stack must go where they go alone.
    """
    try:
        together = _trial(stacked, sampler, batch_size, 0)
        for row in {0, stacked.flat.width - 1}:
            apart = _trial(alone, sampler, batch_size, row)
            for what, values in together.items():
                if not _agree(values[row], apart[what][0]):
                    return f"its {what} differ under torch.func.vmap"
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # torch.func has many ways to refuse a module
        return (str(error).strip() or repr(error)).splitlines()[0]
    finally:
        alone.start()
        stacked.start()
    return None


def _trial(
    target: Target, sampler: Sampler, batch_size: int | None, first: int
) -> dict[str, Tensor]:
    """Return what some steps of the chains give, by name, each ``(chain, ...)``."""
    walk = _Walk(target, sampler, batch_size, first)
    few = min(_FEW, walk.whole)
    losses = [walk.step(few) for _ in range(2)]
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


def _seconds(target: Target, sampler: Sampler, schedule: Schedule, batch_size: int | None) -> float:
    """Return the seconds of one step of the whole stack, its share of a draw included."""
    walk = _Walk(target, sampler, batch_size)
    moving = _measured(target, walk.step, walk.whole)
    target.start()
    passes = max(-(-observed.data.n // observed.rows) for observed in target.observed)
    seeing = _measured(target, lambda part: target.observe(limit=part), passes)
    target.start()
    return moving + seeing / schedule.thin


def _measured(target: Target, work: Callable[[int], object], whole: int) -> float:
    """Return the seconds of ``work(whole)``.

    Work that takes long is measured on a part, in proportion. On CUDA it is done whole, so that
    memory that does not suffice shows here.
    """
    one = _timed(target, partial(work, 1))
    if one < 2 * _PART_SECONDS:  # the first pays for first calls
        one = min(one, _timed(target, partial(work, 1)))
    part = max(1, min(whole, int(_PART_SECONDS / max(one, 1e-9))))
    if target.flat.device.type == "cuda":
        part = whole
    # The least of several is what the work takes; the rest is what else the machine does.
    least, spent = (one, one) if part == 1 else (math.inf, 0.0)
    for _ in range(1 + _REPEATS):
        if spent >= 2 * _PART_SECONDS:
            break
        found = _timed(target, partial(work, part))
        least, spent = min(least, found), spent + found
    return least * whole / part


def _timed(target: Target, work: Callable[[], object]) -> float:
    _wait(target)
    began = time.perf_counter()
    work()
    _wait(target)
    return time.perf_counter() - began


def _wait(target: Target) -> None:
    if target.flat.device.type == "cuda":
        torch.cuda.synchronize(target.flat.device)
