"""Samplers as stores name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lkarray.sampling.independent import Laplace
from lkarray.sampling.informed import InformedLangevin
from lkarray.sampling.samplers import SGHMC, SGLD, RMSpropSGLD, Sampler
from lkarray.sampling.schedules import SCHEDULES

#: Of a stored sampler's settings: a hash of the law that independent draws came from.
LAW = "law"

SAMPLERS = {kind.__name__: kind for kind in (SGLD, RMSpropSGLD, SGHMC, InformedLangevin, Laplace)}


def start_from(start: Mapping[str, Any] | None, sampler: Sampler) -> Laplace | None:
    """Return the law that a store's chains started in; ``None`` of those that started at w*."""
    if start is None:
        return None
    return Laplace(rank=int(start["rank"]), step_size=sampler.step_size)


def control_from(control: Mapping[str, Any] | None) -> Laplace | None:
    """Return the law of a store's linear chains; ``None`` where there are none."""
    if control is None:
        return None
    return Laplace(rank=int(control["rank"]), step_size=float(control["step_size"]))


def sampler_from(settings: Mapping[str, Any]) -> Sampler:
    """Return the sampler that a store's settings describe.

    Raises
    ------
    ValueError
        Its schedule is a function of the user's own, which the store cannot hold.
    """
    options = {name: value for name, value in settings.items() if name != LAW}
    kind = SAMPLERS[options.pop("name")]
    schedule = options.pop("schedule", None)
    if isinstance(schedule, Mapping):
        own = dict(schedule)
        schedule = SCHEDULES[own.pop("name")](**own)
    elif isinstance(schedule, str):
        raise ValueError(
            f"the sampler's schedule, {schedule}, is a function that a store cannot hold; pass "
            "sampler=, the one that sampled"
        )
    return kind(schedule=schedule, **options)
