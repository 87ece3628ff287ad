"""`open_trace`: a recorded training run, to be asked for its states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor, nn

from lkarray import schema, store
from lkarray.arguments import checked
from lkarray.errors import FingerprintError, StoreError
from lkarray.nn.batches import Batches, MapDataset
from lkarray.nn.flat import FlatModel
from lkarray.nn.losses import NAMED, LossFunction, PerExampleLoss, per_example_loss
from lkarray.nn.modes import with_gradients
from lkarray.nn.trainable import require_module
from lkarray.store import trace_layout, trajectory
from lkarray.store.chunks import read_whole
from lkarray.store.committed import read_rows
from lkarray.store.location import StoreLike, open_root
from lkarray.store.nodes import stored_at
from lkarray.training.checking import literal
from lkarray.training.identity import code
from lkarray.training.optimizers import RULES, kind_named
from lkarray.training.replay import Replay


@checked()
@with_gradients
def open_trace(
    path: StoreLike,
    model: nn.Module,
    train_set: MapDataset,
    *,
    loss: LossFunction | None = None,
) -> Trace:
    """Open a training run that `record` stored, also one that is still going on.

    Parameters
    ----------
    path
        Path, URL or Zarr store.
    model
        The module that was trained, with any weights; frozen ones as they were.
    train_set
        The data it was trained on.
    loss
        The callable that was given to `record`, if it was not a name.

    Returns
    -------
    Trace
        With every step that was committed.

    Raises
    ------
    TypeError
        ``model`` is no module: a state dict, say, or a file.
    StoreError
        There is no trace, or it has no committed step.
    FingerprintError
        The model's code, the data or the loss are not those of the trace; or the loss of the
        first batch is not the one recorded.
    DamagedError
        Something that was committed is missing or cannot be read, now or when it is asked for.
    """
    return Trace(path, model, train_set, loss)


class Trace:
    """A recorded training run; made by `open_trace`.

    Attributes
    ----------
    steps
        Committed steps. There are ``steps + 1`` states: before each step, and after the last.
    names, starts, stops
        The parameter tensors, and their places along ``param``.
    flat
        A copy of the model, whose weights are the ones last asked for.
    train_set, train, loss
        The training data as they were given, as batches, and the per-example loss.
    """

    def __init__(
        self, path: StoreLike, model: nn.Module, train_set: MapDataset, loss: LossFunction | None
    ) -> None:
        require_module(model)
        self.root = open_root(path)
        mark = trajectory.trace_fingerprint(self.root)
        if mark is None:
            raise StoreError(
                f"{self.where} holds no training run; record one with lk.record(..., store=...)"
            )
        self.mark = mark
        self.steps, _ = trajectory.read_steps(self.root)
        if self.steps == 0:
            raise StoreError(f"{self.where} holds no committed step yet; run the training again")
        columns = {key: read_whole(self._array(key)) for key in _TENSORS}
        self.names, self.modules = ([str(v) for v in columns[k]] for k in _TENSORS[:2])
        self.starts, self.stops = (columns[k] for k in _TENSORS[2:])
        self.every = int(mark["every"])
        self.loss = self._loss(loss)
        self._refuse("code", code(model), "the model is not the one that was trained")
        device = next(model.parameters()).device
        self.flat = FlatModel(model, trainable=[literal(name) for name in self.names])
        self.train_set = train_set
        self.train = Batches(train_set, name="train_set", device=device)
        self._refuse("train_set", self.train.identity, "train_set is not what was trained on")
        self._check_first()

    @property
    def where(self) -> str:
        """Name of the store, for messages."""
        return store.describe(self.root.store)

    def _loss(self, loss: LossFunction | None) -> PerExampleLoss:
        name = self.mark["loss"]
        if loss is None and name not in NAMED:
            raise FingerprintError(
                f"{self.where} was recorded with the loss {name!r}; pass the callable as loss="
            )
        found = per_example_loss(name if loss is None else loss).per_example
        self._refuse("loss", found.name, "the loss is not the one that was trained with")
        return found

    def _refuse(self, key: str, now: Any, what: str) -> None:
        if self.mark[key] != now:
            raise FingerprintError(
                f"{self.where}: {what} (stored {self.mark[key]}, now {now}); open it with the same "
                "code and data"
            )

    def _check_first(self) -> None:
        """Compare the loss of the first batch: what no hash sees."""
        recorded = self.losses[0]
        self.set(0)
        inputs, target = self.train.take(self.batch(0))
        with torch.no_grad():
            found = float(self.loss(self.flat(inputs), target).mean())
        if not abs(found - recorded) <= 1e-3 * max(abs(recorded), 1e-3):
            raise FingerprintError(
                f"{self.where}: the first batch had the mean loss {recorded:.6g}, and now has "
                f"{found:.6g}; the model's buffers, data or code have changed since"
            )

    # --- what was recorded --------------------------------------------------------------------

    def _array(self, name: str) -> zarr.Array:
        return stored_at(self.root, f"{schema.TRAJECTORY}/{name}")

    def _row(self, name: str) -> np.ndarray:
        return trajectory.step_rows(self.root, name, 0, self.steps)

    @cached_property
    def losses(self) -> np.ndarray:
        """Mean loss of the batch before each step, ``(step,)`` nats; NaN where unchecked."""
        return self._row(trace_layout.LOSS.name)

    @cached_property
    def coefficients(self) -> np.ndarray:
        """Scalars of each update, ``(step, group, field)``; see ``lkarray.training.optimizers``."""
        return self._row(trace_layout.COEFFICIENTS.name)

    @property
    def learning_rates(self) -> np.ndarray:
        """Learning rate of each step, ``(step,)``, of the optimizer's first group that trains."""
        first = min(self.mark["group_of"])  # groups before it are of frozen parameters alone
        return np.asarray(self.coefficients[:, first, trace_layout.FIELDS.index("learning_rate")])

    def options(self, step: int) -> list[dict[str, Any]]:
        """Return the options of each of the optimizer's groups that may change with the steps."""
        out = []
        for row in self.coefficients[step].tolist():
            of = dict(zip(trace_layout.FIELDS, row, strict=True))
            found: dict[str, Any] = {"lr": of["learning_rate"], "weight_decay": of["weight_decay"]}
            if not np.isnan(of["beta2"]):
                found["betas"] = (of["mu"], of["beta2"])
            elif self.mark["optimizer"] != "Adagrad":
                found["momentum"] = of["mu"]
            out.append(found)
        return out

    @cached_property
    def clip_bounds(self) -> np.ndarray:
        """Bound of clipping by value, ``(step,)``; infinite where there was none."""
        return self._row(trace_layout.CLIP_VALUE.name)

    @cached_property
    def clip(self) -> np.ndarray:
        """Factor that clipping gave each tensor's gradient, ``(step, tensor)``."""
        return self._row(trace_layout.CLIP.name)

    @cached_property
    def batches(self) -> np.ndarray:
        """Examples of each batch, ``(step, position)``; -1 where a batch is smaller."""
        return self._row(trace_layout.BATCH.name)

    def batch(self, step: int) -> np.ndarray:
        """Return the examples of one step's batch."""
        row: np.ndarray = self.batches[step]
        return np.asarray(row[row >= 0])

    @cached_property
    def epochs(self) -> np.ndarray:
        """First step of each epoch, ``(epoch,)``.

        An epoch ends where a batch has an example that the epoch has seen already. Where batches
        are drawn with replacement, it is as many examples as the run has seen in all.
        """
        return epoch_starts(self.batches, self.train.n)

    # --- states -------------------------------------------------------------------------------

    def parameters(self, step: int) -> np.ndarray:
        """Return the parameters before a step, ``(param,)``; ``steps`` gives the final ones."""
        return next(iter(self.states([step])))[1]

    def states(self, steps: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(step, parameters)`` for ascending steps, 0 to ``steps``; reads each block once.

        With ``record(every=k)`` the steps between kept ones are taken again.
        """
        wanted = [int(step) for step in steps]
        if any(not 0 <= step <= self.steps for step in wanted) or wanted != sorted(wanted):
            raise ValueError(
                f"steps must ascend within 0 to {self.steps}, the state after the last, not "
                f"{wanted[:5]}..."
            )
        kept = self._array(trace_layout.PARAMETERS.name)
        rows = kept.chunks[0]
        block, first, replay = None, -1, None
        for step in wanted:
            if step == self.steps and step % self.every == 0:
                yield step, trajectory.last_state(self.root)[trace_layout.PARAMETERS.name]
            elif step % self.every == 0:
                at = step // self.every
                if block is None or not first <= at < first + len(block):
                    first = at // rows * rows
                    last = first + rows if self.every > 1 else min(first + rows, self.steps)
                    block = read_rows(kept, first, last)
                yield step, block[at - first].copy()
            else:
                if replay is None or replay.step // self.every != step // self.every:
                    replay = Replay(self, step // self.every)
                yield step, replay.until(step)

    def denominator(self, step: int) -> np.ndarray | None:
        """Return what a step's update was divided by, ``(param,)``; ``None`` if by nothing.

        Of Adam ``sqrt(v) + eps`` with its correction for bias.
        """
        if RULES[kind_named(self.mark["optimizer"])].denominator is None:
            return None
        if not 0 <= step < self.steps:
            raise ValueError(f"step must be 0 to {self.steps - 1}, not {step}")
        if self.every == 1:
            name = trace_layout.DENOMINATOR.name
            return np.asarray(trajectory.step_rows(self.root, name, step, step + 1)[0])
        replay = Replay(self, step // self.every)
        replay.until(step + 1)
        return replay.denominator()

    def inherited(self) -> np.ndarray | None:
        """Return the momentum buffer that the run began with, ``(param,)``; ``None``: no buffer."""
        found = trajectory.kept_state(self.root, 0).get(self.mark["buffer"])
        return None if found is None or np.isnan(found).all() else np.nan_to_num(found)

    def set(self, step: int) -> None:
        """Give ``flat`` the parameters before a step."""
        self.set_parameters(self.parameters(step))

    def set_parameters(self, theta: np.ndarray | Tensor) -> None:
        """Give ``flat`` some parameters, ``(param,)``."""
        values = theta if isinstance(theta, Tensor) else torch.from_numpy(theta)
        self.flat.theta[0].copy_(values)


#: What is stored of the parameter tensors.
_TENSORS = (schema.TENSOR, schema.MODULE.name, schema.START.name, schema.STOP.name)


def epoch_starts(batches: np.ndarray, n: int) -> np.ndarray:
    """Return the first step of each epoch; see `Trace.epochs`."""
    starts, seen = [0], np.zeros(n, bool)
    for step, row in enumerate(batches):
        batch = row[row >= 0]
        if seen[batch].any():
            starts.append(step)
            seen[:] = False
        seen[batch] = True
    whole = len(np.unique(batches[batches >= 0]))
    before = np.concatenate(([0], np.cumsum((batches >= 0).sum(1))))
    lengths = np.diff(before[starts])
    if len(lengths) and np.median(lengths) < whole / 2:
        marks = np.arange(0, before[-1], whole)
        return np.asarray(np.searchsorted(before, marks, side="right") - 1)
    return np.asarray(starts)
