"""One sampling run as plain values, which go to whatever process runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from lkarray.nn.batches import MapDataset
from lkarray.nn.outcomes import Outcome
from lkarray.sampling.chain import Schedule
from lkarray.sampling.fingerprints import Fingerprint
from lkarray.sampling.independent import Laplace
from lkarray.sampling.posterior import LocalPosterior
from lkarray.sampling.samplers import Sampler
from lkarray.sampling.target import Observable

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class Job:
    """What is sampled, observed and recorded; can be sent to another process."""

    posterior: LocalPosterior
    # By group of the store: "losses", and "losses_<name>" of further sets; coords as well.
    observed: Mapping[str, MapDataset]
    coords: Mapping[str, Mapping[str, np.ndarray]]
    sampler: Sampler
    schedule: Schedule
    batch_size: int | None
    seed: int
    device: torch.device | str | None = None
    autocast: str | None = None
    compile: bool = False
    observables: Mapping[str, Observable] = field(default_factory=dict)
    num_workers: int = 0
    outcomes: tuple[Outcome, ...] = ()
    start: Laplace | None = None  # the law that chains start in; None starts them at w*
    control: Laplace | None = None  # the law of the linear chains beside them, if there are any


@dataclass(frozen=True)
class RunOptions:
    """How far a job is run, where, and what is shown of it; see `lkarray.sample`."""

    chains: int
    chains_per_device: int | str = "auto"
    resume: bool = True
    client: Client | None = None
    progress: bool = True


@dataclass(frozen=True)
class Prepared:
    """What is known of a job once its data were read and its model tried.

    ``center`` has losses and outcomes at w* by the paths of those of draws, ``(sample, ...)``; none
    where they are stored.
    """

    fingerprint: Fingerprint
    n_train: int
    n_parameters: int
    center: dict[str, np.ndarray]
