"""What was recorded of the steps of a run, with the model, data and loss that took them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import zarr
from torch import nn

from lkarray import schema, store
from lkarray.errors import FingerprintError, StoreError
from lkarray.nn.batches import Batches, MapDataset
from lkarray.nn.flat import FlatModel
from lkarray.nn.losses import NAMED, LossFunction, PerExampleLoss, per_example_loss
from lkarray.nn.trainable import require_module
from lkarray.store import trace_layout, trajectory
from lkarray.store.chunks import read_whole
from lkarray.store.location import StoreLike, open_root
from lkarray.store.nodes import stored_at
from lkarray.training.checking import literal
from lkarray.training.identity import TraceFingerprint, code

#: What is stored of the parameter tensors.
_TENSORS = (schema.TENSOR, schema.MODULE.name, schema.START.name, schema.STOP.name)


class RecordedSteps:
    """The committed steps of a run; see `Trace` for the attributes. Made of what a store has."""

    def __init__(
        self, path: StoreLike, model: nn.Module, train_set: MapDataset, loss: LossFunction | None
    ) -> None:
        require_module(model)
        self.root = open_root(path)
        fingerprint = TraceFingerprint.of_store(self.root)
        if fingerprint is None:
            raise StoreError(
                f"{self.where} holds no training run; record one with lk.record(..., store=...)"
            )
        self.fingerprint = fingerprint
        self.steps, _ = trajectory.read_steps(self.root)
        if self.steps == 0:
            raise StoreError(f"{self.where} holds no committed step yet; run the training again")
        columns = {key: read_whole(self._array(key)) for key in _TENSORS}
        self.names, self.modules = ([str(v) for v in columns[k]] for k in _TENSORS[:2])
        self.starts, self.stops = (columns[k] for k in _TENSORS[2:])
        self.every = fingerprint.every
        self.loss = self._loss(loss)
        self._refuse(fingerprint.code, code(model), "the model is not the one that was trained")
        device = next(model.parameters()).device
        self.flat = FlatModel(model, trainable=[literal(name) for name in self.names])
        self.train_set = train_set
        self.train = Batches(train_set, name="train_set", device=device)
        self._refuse(
            fingerprint.train_set, self.train.identity, "train_set is not what was trained on"
        )

    @property
    def where(self) -> str:
        """Name of the store, for messages."""
        return store.describe(self.root.store)

    def _loss(self, loss: LossFunction | None) -> PerExampleLoss:
        name = self.fingerprint.loss
        if loss is None and name not in NAMED:
            raise FingerprintError(
                f"{self.where} was recorded with the loss {name!r}; pass the callable as loss="
            )
        per_example = per_example_loss(name if loss is None else loss).per_example
        self._refuse(
            self.fingerprint.loss, per_example.name, "the loss is not the one that was trained with"
        )
        return per_example

    def _refuse(self, stored: str, now: str, what: str) -> None:
        if stored != now:
            raise FingerprintError(
                f"{self.where}: {what} (stored {stored}, now {now}); open it with the same code "
                "and data"
            )

    def _array(self, name: str) -> zarr.Array:
        return stored_at(self.root, f"{schema.TRAJECTORY}/{name}")

    def _per_step(self, name: str) -> np.ndarray:
        return trajectory.step_rows(self.root, name, 0, self.steps)

    @cached_property
    def losses(self) -> np.ndarray:
        """Mean loss of the batch before each step, ``(step,)`` nats; NaN where unchecked."""
        return self._per_step(trace_layout.LOSS.name)

    @cached_property
    def coefficients(self) -> np.ndarray:
        """Scalars of each update, ``(step, group, field)``; see ``lkarray.training.optimizers``."""
        return self._per_step(trace_layout.COEFFICIENTS.name)

    @property
    def learning_rates(self) -> np.ndarray:
        """Learning rate of each step, ``(step,)``, of the optimizer's first group that trains."""
        first = min(self.fingerprint.group_of)  # groups before it are of frozen parameters alone
        return np.asarray(self.coefficients[:, first, trace_layout.FIELDS.index("learning_rate")])

    def options(self, step: int) -> list[dict[str, Any]]:
        """Return the options of each of the optimizer's groups that may change with the steps."""
        by_group = []
        for row in self.coefficients[step].tolist():
            taken = dict(zip(trace_layout.FIELDS, row, strict=True))
            options: dict[str, Any] = {
                "lr": taken["learning_rate"],
                "weight_decay": taken["weight_decay"],
            }
            if not np.isnan(taken["beta2"]):
                options["betas"] = (taken["mu"], taken["beta2"])
            elif self.fingerprint.optimizer != "Adagrad":
                options["momentum"] = taken["mu"]
            by_group.append(options)
        return by_group

    @cached_property
    def clip_bounds(self) -> np.ndarray:
        """Bound of clipping by value, ``(step,)``; infinite where there was none."""
        return self._per_step(trace_layout.CLIP_VALUE.name)

    @cached_property
    def clip(self) -> np.ndarray:
        """Factor that clipping gave each tensor's gradient, ``(step, tensor)``."""
        return self._per_step(trace_layout.CLIP.name)

    @cached_property
    def batches(self) -> np.ndarray:
        """Examples of each batch, ``(step, position)``; -1 where a batch is smaller."""
        return self._per_step(trace_layout.BATCH.name)

    def batch(self, step: int) -> np.ndarray:
        """Return the examples of one step's batch."""
        examples = self.batches[step]
        return np.asarray(examples[examples >= 0])
