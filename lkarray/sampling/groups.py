"""Chains that share a stack, run to the end of the schedule."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import zarr

from lkarray import store as stores
from lkarray.sampling.chain import Seat, Stack
from lkarray.sampling.job import Job
from lkarray.sampling.randomness import ChainRandomness
from lkarray.sampling.target import Target


def run_group(
    root: zarr.Group,
    job: Job,
    target: Target,
    chains: list[int],
    tick: Callable[[int], object],
) -> list[tuple[int, int]]:
    """Run chains that share a stack to the end of the schedule; return which diverged, and where.

    The caller has set the numerics and holds the store's writer lock; this one takes the lock of
    the group's own region.
    """
    width = target.flat.width
    with (
        stores.region_lock(root.store, f"{chains[0] // width * width}"),
        ThreadPoolExecutor(1, thread_name_prefix="lkarray-writer") as writer,
    ):
        seats = []
        for chain in chains:
            region = stores.ChainRegion(root, chain, writer)
            random = ChainRandomness(
                job.seed, chain, n=target.train.n, batch_size=job.batch_size, like=target.center
            )
            # Finished: by a worker that was given up before it could say so.
            if not region.diverged() and region.record.step < job.schedule.steps:
                seats.append(Seat(chain % width, chain, region, random))
        stack = Stack(target, job.sampler, job.schedule, seats, tick)
        stack.run()
    return stack.diverged
