"""`open_trace`: a recorded training run, to be asked for its states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from lkarray.arguments import checked
from lkarray.errors import FingerprintError
from lkarray.nn.batches import MapDataset
from lkarray.nn.losses import LossFunction
from lkarray.nn.modes import with_gradients
from lkarray.store import trace_layout, trajectory
from lkarray.store.committed import read_rows
from lkarray.store.location import StoreLike
from lkarray.training.optimizers import RULES, kind_named
from lkarray.training.recorded_steps import RecordedSteps
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

    Examples
    --------
    >>> import torch, lkarray as lk
    >>> from torch.utils.data import TensorDataset
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    >>> inputs = torch.randn(8, 2)
    >>> data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    >>> from zarr.storage import MemoryStore
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> store = MemoryStore()
    >>> with lk.record(model, optimizer, data, store=store, progress=False) as trace:
    ...     for batch in [[0, 1, 2, 3], [4, 5, 6, 7]]:
    ...         with trace.step(batch):
    ...             optimizer.zero_grad()
    ...             output = model(data.tensors[0][batch])
    ...             torch.nn.functional.cross_entropy(output, data.tensors[1][batch]).backward()
    ...             optimizer.step()
    >>> again = lk.open_trace(store, model, data)
    >>> again.steps
    2
    """
    return Trace(path, model, train_set, loss)


class Trace(RecordedSteps):
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
        super().__init__(path, model, train_set, loss)
        self._check_first()

    def _check_first(self) -> None:
        """Compare the loss of the first batch: what no hash sees."""
        recorded = self.losses[0]
        self.set(0)
        inputs, target = self.train.take(self.batch(0))
        with torch.no_grad():
            now = float(self.loss(self.flat(inputs), target).mean())
        if not abs(now - recorded) <= 1e-3 * max(abs(recorded), 1e-3):
            raise FingerprintError(
                f"{self.where}: the first batch had the mean loss {recorded:.6g}, and now has "
                f"{now:.6g}; the model's buffers, data or code have changed since"
            )

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
                place = step // self.every
                if block is None or not first <= place < first + len(block):
                    first = place // rows * rows
                    last = first + rows if self.every > 1 else min(first + rows, self.steps)
                    block = read_rows(kept, first, last)
                yield step, block[place - first].copy()
            else:
                if replay is None or replay.step // self.every != step // self.every:
                    replay = Replay(self, step // self.every)
                yield step, replay.until(step)

    def denominator(self, step: int) -> np.ndarray | None:
        """Return what a step's update was divided by, ``(param,)``; ``None`` if by nothing.

        Of Adam ``sqrt(v) + eps`` with its correction for bias.
        """
        if RULES[kind_named(self.fingerprint.optimizer)].denominator is None:
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
        buffer = trajectory.kept_state(self.root, 0).get(self.fingerprint.buffer or "")
        return None if buffer is None or np.isnan(buffer).all() else np.nan_to_num(buffer)

    def set(self, step: int) -> None:
        """Give ``flat`` the parameters before a step."""
        self.set_parameters(self.parameters(step))

    def set_parameters(self, theta: np.ndarray | Tensor) -> None:
        """Give ``flat`` some parameters, ``(param,)``."""
        self.flat.load(theta)


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
