"""The runs of this process: `observe` and `repair` need not be given their posteriors again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lkarray.sampling.fingerprints import Fingerprint
from lkarray.sampling.job import Job

_remembered: dict[str, Job] = {}
_REMEMBERED = 32  # two of each run


@contextmanager
def forgetting() -> Iterator[None]:
    """Forget the runs inside, as those of pilots, which would crowd out others."""
    before = dict(_remembered)
    try:
        yield
    finally:
        _remembered.clear()
        _remembered.update(before)


def remember(fingerprint: Fingerprint, job: Job) -> None:
    """Keep the posterior and sampler of a run of this process, for `observe` and `repair`."""
    for key in (_key(fingerprint.of_chains()), _key(fingerprint.of_observed())):
        _remembered.pop(key, None)  # the last one made is the last to be forgotten
        _remembered[key] = job
    while len(_remembered) > _REMEMBERED:
        del _remembered[next(iter(_remembered))]


def remembered(fingerprint: Fingerprint, *, observed: bool = False) -> Job | None:
    """Return the job of this process that such a run was made by, if there was one.

    With ``observed``, one that observed the same too.
    """
    chosen = fingerprint.of_observed() if observed else fingerprint.of_chains()
    return _remembered.get(_key(chosen))


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, default=str)
