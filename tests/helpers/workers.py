"""Chains on workers that take their time, so that kills fall inside commits."""

from __future__ import annotations

import os
import time

import lkarray as lk
from tests.helpers.networks import classification, small_network

CHAINS, DRAWS = 4, 250


class Slow(lk.SGLD):
    """SGLD that takes its time and commits at every draw, so that kills fall inside commits."""

    def step(self, given):
        from lkarray.store import commit

        super().step(given)
        if pause := os.environ.get("LKARRAY_TEST_PAUSE"):  # in workers only
            commit.COMMIT_SECONDS = commit._COMMIT_SHARE = 0.0
            time.sleep(float(pause))


Slow.__name__ = "SGLD"


def posterior():
    return lk.LocalPosterior(small_network(), classification(n=100), nbeta=10.0, gamma=50.0)


def sample(path, client, **options):
    chosen = {"sampler": Slow(step_size=1e-3), "chains": CHAINS, "draws": DRAWS} | options
    return lk.sample(
        posterior(),
        classification(n=100),
        burn_in=5,
        batch_size=16,
        store=path,
        client=client,
        progress=False,
        **chosen,
    )


def identical(a, b):
    groups = ("losses", "sample_stats")
    return all(a[g].to_dataset().compute().identical(b[g].to_dataset().compute()) for g in groups)
