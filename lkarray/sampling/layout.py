"""How chains are laid out on a device: measured once, then stored with the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor, nn

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
        model can be stacked, and a stack was measured to be decisively faster.
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
        reason = _unstackable(alone, stacked)
        if reason:
            raise ValueError(
                f"the model's chains cannot be stacked ({reason}); use chains_per_device=1"
            )
        return stacked
    values = sum(observed.data.n for observed in alone.observed)
    most = min(chains, max(1, _STACK_BYTES // (8 * values * min(schedule.draws, 512))))
    if most == 1:
        return alone
    cost = _seconds(alone, sampler, schedule, batch_size)
    if cost * schedule.steps * chains < WORTH_SECONDS:
        return alone
    best = alone, cost
    for width in sorted({most, -(-most // 2), min(4, most)} - {1}, reverse=True):
        try:
            stacked = make(width)
            reason = _unstackable(alone, stacked)
            if reason:
                logger.info("chains run one at a time: %s", reason)
                break
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


def _unstackable(alone: Target, stacked: Target) -> str | None:
    """Return why the stack cannot stand for chains run alone, if it cannot."""
    stacked.start()
    data = stacked.observed[0].data
    inputs, target = next(iter(data.slices(min(2, data.n))))
    try:
        with torch.no_grad():
            found = stacked.flat.losses(stacked.loss, inputs, target, shared=True)
            inputs, target = next(iter(data.slices(min(2, data.n))))  # as they were
            expected = alone.flat.losses(alone.loss, inputs, target, shared=True)
    except Exception as error:  # torch.func has many ways to refuse a module
        return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    if not torch.allclose(found, expected.expand_as(found), rtol=1e-3, atol=1e-4):
        return "its losses differ under torch.func.vmap"
    return None


def _seconds(target: Target, sampler: Sampler, schedule: Schedule, batch_size: int | None) -> float:
    """Return the seconds of one step of the whole stack, its share of a draw included."""
    target.start()
    theta = target.flat.theta
    random = ChainRandomness(0, 0, n=target.train.n, batch_size=batch_size, like=target.center)
    vectors = {name: torch.zeros_like(theta) for name in sampler.carries}
    noise = torch.zeros_like(theta)

    def rows(step: int) -> Tensor | None:
        if random.everything or not target.train.held:
            return None
        row = random.rows(step)
        return row if len(theta) == 1 else row.expand(len(theta), -1).contiguous()

    def step(number: int) -> None:
        target.gradient(rows(number))
        random.noise(number, noise[0])
        sampler.step(
            theta,
            target.flat.grad,
            noise,
            target.center,
            nbeta=target.nbeta,
            gamma=target.gamma,
            step=number,
            state=vectors,
        )

    def timed(work: Callable[[], object]) -> float:
        _wait(target)
        began = time.perf_counter()
        work()
        _wait(target)
        return time.perf_counter() - began

    numbers = iter(range(10_000))
    for number in islice(numbers, 2):
        step(number)
    target.observe()
    # The least of several is what the work takes; the rest is what else the machine does.
    moving = min(timed(lambda: step(next(numbers))) for _ in range(_REPEATS))
    target.start()
    seeing = min(timed(target.observe) for _ in range(3))
    return moving + seeing / schedule.thin


def _wait(target: Target) -> None:
    if target.flat.device.type == "cuda":
        torch.cuda.synchronize(target.flat.device)
