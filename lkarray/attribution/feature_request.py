"""What `laplace` was asked for, and what of it fits a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lkarray._version import __version__
from lkarray.attribution.feature_maker import moving
from lkarray.attribution.outcome_scalars import outcome_scalars
from lkarray.errors import MemoryBudgetError
from lkarray.nn import Batches, FlatModel
from lkarray.nn.flat import hash_weights
from lkarray.sampling.posterior import LocalPosterior
from lkarray.store.fingerprints import hash_labels

_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class FeatureRequest:
    """What `laplace` was asked for, checked."""

    posterior: LocalPosterior
    outcome: str
    rank: int
    step_size: float
    sketch: int | None
    smooth: int
    seed: int
    budget: int
    in_memory: bool

    @property
    def bends(self) -> bool:
        """Whether the curvature counts, and the training set is read."""
        return self.rank > 0 and self.posterior.nbeta > 0

    @property
    def halves(self) -> int:
        """Sums that a sample has: over even and over odd draws, or one at w*."""
        return 2 if self.smooth else 1

    def check(self) -> None:
        """Raise where the loss has no such outcome, or there is no law."""
        outcome_scalars(self.outcome, self.posterior.loss)
        if self.posterior.gamma == 0:
            raise ValueError("features need gamma above 0, by which Sigma is bounded")

    def fingerprint(
        self, data: Batches, train: Batches | None, labels: Mapping[str, np.ndarray], dtype: str
    ) -> dict[str, Any]:
        """Return what a store must share with this call to be gone on with."""
        posterior = self.posterior
        return {
            "lkarray": __version__,
            "torch": torch.__version__,
            "weights": hash_weights(posterior.model),
            "train_data": None if train is None else train.identity,
            "observed_data": data.identity,
            "coords": hash_labels(labels),
            "loss": posterior.loss.name,
            "nbeta": posterior.nbeta,
            "gamma": posterior.gamma,
            "trainable": posterior.trainable,
            "outcome": self.outcome,
            "rank": self.rank,
            "sketch": self.sketch,
            "smoothed": self.smooth > 0,
            "seed": self.seed,
            "precision": dtype,
        } | ({"step_size": self.step_size} if self.step_size else {})

    def sketched(self, flat: FlatModel, n: int) -> int | str:
        """Return the size of the sketch, or ``"none"`` where features are kept whole."""
        params, size = moving(flat), self.sketch
        copies = self.halves**2 if self.in_memory else 1
        fits = copies * n * params * flat.theta.element_size() <= self.budget
        return "none" if size is None or size >= params or fits else size

    def require_memory(self, flat: FlatModel, n: int, modes: int) -> int:
        """Return the bytes of a sample's sums; raise where the budget does not do."""
        item = flat.theta.element_size()
        if self.bends:
            vector = flat.theta.shape[1] * item
            basis = min(2 * self.rank + 16, moving(flat)) * vector
            if basis > self.budget:
                rank = max(0, (self.budget // vector - 16) // 2)
                raise MemoryBudgetError(
                    f"the curvature of rank {self.rank} takes {basis / 2**20:.0f} MiB; set memory= "
                    f"to that or more, or rank={rank}"
                )
        each = self.halves * modes * item
        total = self.halves * n * each
        if self.in_memory and total > self.budget:
            raise MemoryBudgetError(
                f"features of {n} samples take {total / 2**20:.0f} MiB; give a store=, a smaller "
                f"sketch=, or memory= of {total / 2**20 + 1:.0f} MiB or more"
            )
        return each

    def rows(self, each: int, n: int) -> int:
        """Return the samples of a block, whose sums take ``each`` bytes."""
        rows = int(max(1, min(_BLOCK_BYTES, self.budget // 8) // each))
        if rows > 128:
            rows -= rows % 128
        return min(rows, n)
