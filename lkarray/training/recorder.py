"""A run being recorded: what each step leaves, and how a killed run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lkarray import store
from lkarray.errors import FingerprintError, LockedError, StoreError
from lkarray.nn.batches import MapDataset
from lkarray.nn.losses import LossFunction
from lkarray.nn.modes import gradients_on
from lkarray.nn.trainable import require_module
from lkarray.store import trace_layout, trajectory
from lkarray.store.location import StoreLike, create_root, exists, open_root
from lkarray.store.writing_trace import StepValues, TraceWriter
from lkarray.training import guards
from lkarray.training.capture import Capture, clipping
from lkarray.training.checking import StepCheck
from lkarray.training.identity import fingerprint, layout_of
from lkarray.training.schedule import load_schedule, schedule_state
from lkarray.training.trace import Trace, open_trace

Indices = Sequence[int] | np.ndarray | Tensor


class Recorder:
    """A run being recorded; made by `record`.

    Attributes
    ----------
    steps
        Steps of this run so far, those recorded before it among them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        train_set: MapDataset,
        loss: str | LossFunction,
        path: StoreLike,
        scheduler: Any,
        every: int,
        check_every: int,
        num_workers: int = 0,
    ) -> None:
        for name, value in (("every", every), ("check_every", check_every)):
            if value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        require_module(model)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be torch's, not {type(optimizer).__name__}")
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        self._every, self._check_every, self._path = every, check_every, path
        self._check = StepCheck(model, optimizer, train_set, loss, num_workers)
        self._capture = Capture(self._check.parameters, optimizer)
        self._train_set, self._loss = train_set, loss
        self._held = guards.held(model, optimizer)
        self.steps = 0
        self._open = False
        self._stack = ExitStack()
        self._after: Tensor | None = None
        self._applied: Tensor | None = None
        self._buffered: list[bool] = []
        self._taken: tuple[np.ndarray, Tensor | None]
        self._refused: StoreError | None = None  # why nothing can be written
        self._broken = False  # an update was begun, and its step is not recorded

    # --- the context --------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        if self._open:
            raise ValueError("this recorder is already open")
        with ExitStack() as stack:
            target = store.as_store(self._path)
            try:
                stack.enter_context(store.writer_lock(target))
            except LockedError:
                raise
            except StoreError as error:  # a run that is recorded whole needs no writing
                self._refused = error
            self._root, layout = self._prepare()
            executor = ThreadPoolExecutor(1, thread_name_prefix="lkarray-trace")
            stack.callback(executor.shutdown)
            self._writer = TraceWriter(self._root, layout, executor)
            capture = self._capture
            for i, parameter in enumerate(capture.parameters):
                hook = parameter.register_post_accumulate_grad_hook(self._keeper(i))
                stack.callback(hook.remove)
            pre = self._optimizer.register_step_pre_hook(self._before_update)
            stack.callback(pre.remove)
            post = self._optimizer.register_step_post_hook(self._after_update)
            stack.callback(post.remove)
            self._after = capture.theta()
            self._stack = stack.pop_all()
        self._open, self._inside = True, False
        return self

    def __exit__(self, *error: object) -> None:
        self._open = False
        with self._stack:
            if self._refused is not None:
                return
            self._writer.commit(self._state())
            self._writer.wait()
            store.finish(self._root)
        if not any(error) and self.steps == self._writer.committed == 0:
            raise ValueError(guards.NOTHING)

    def _prepare(self) -> tuple[Any, trace_layout.TraceLayout]:
        """Make the trace, or check that the one there is of this run."""
        layout = layout_of(self._capture, len(self._optimizer.param_groups), self._every)
        now = fingerprint(self._model, self._check, self._capture, self._every).stored()
        target = store.as_store(self._path)
        if exists(target):
            root = create_root(target) if self._refused is None else open_root(target)
            before = trajectory.trace_fingerprint(root)
            if before is not None:
                where = store.describe(target)
                remedy = (
                    "give the model and optimizer as they were before training, or another store="
                )
                store.refuse_changes(before, now, where, remedy=remedy)
                return root, layout
        if self._refused is not None:
            raise self._refused
        return trace_layout.create_trace(target, layout, now), layout

    def _keeper(self, index: int) -> Callable[[Tensor], None]:
        def keep(parameter: Tensor) -> None:
            if self._inside:
                self._capture.keep_raw(index)

        return keep

    def _state(self) -> dict[str, np.ndarray]:
        extra = schedule_state(self._optimizer, self._scheduler, whole=not self._broken)
        text = np.asarray([extra], np.dtypes.StringDType())
        assert self._after is not None
        return self._capture.state() | {"parameters": self._after.cpu().numpy(), "extra": text}

    def trace(self) -> Trace:
        """Return what was recorded, once the context is left; see `open_trace`."""
        if self._open:
            raise ValueError("leave the recorder first: the trace is whole after the with block")
        loss = None if isinstance(self._loss, str) else self._loss
        return open_trace(self._path, self._model, self._train_set, loss=loss)

    # --- a step -------------------------------------------------------------------------------

    @contextmanager
    def step(self, indices: Indices) -> Iterator[None]:
        """Record one optimizer step, taken inside.

        Parameters
        ----------
        indices
            Of the batch's examples in the training set, ``(batch,)``; repeated ones count as often.

        Raises
        ------
        ValueError
            Indices are none, or out of range; parameters changed since the last step; the
            optimizer took no step, or several; BatchNorm or dropout was in train mode; or a check
            failed (see `record`).
        NonFiniteError
            The gradient or the new parameters are not finite.
        FingerprintError
            A step that is stored already came out differently.
        """
        batch = self._begin(indices)
        before = self._after
        assert before is not None
        self._inside, self._applied = True, None
        self._capture.raw.zero_()
        state = None
        if self.steps % self._every == 0 and (self._every > 1 or self.steps == 0):
            state = self._capture.state()
        self._buffered = self._capture.buffered()
        try:
            yield
        finally:
            self._inside = False
        self._finish(batch, before, state)

    def _begin(self, indices: Indices) -> np.ndarray:
        if not self._open:
            raise ValueError("open the recorder first: with lk.record(...) as trace:")
        if self._inside:
            raise ValueError("steps cannot be nested: leave one before the next begins")
        batch = guards.as_indices(indices, self.steps)
        n = self._check.train.n
        guards.refuse_thawed(self._held, self._capture.names, self.steps)
        guards.refuse_positions(batch, n, self.steps)
        self._check.refuse_train_mode(self._model, self.steps)
        assert self._after is not None
        guards.refuse_moved(self._capture.theta(), self._after, self.steps)
        if self._writer.due() and self.steps >= self._writer.committed:
            self._writer.commit(self._state())
        return batch.astype(np.int64)

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._inside:
            raise ValueError("optimizer.step() was called outside trace.step(...)")
        if self._applied is not None:
            raise ValueError(
                f"optimizer.step() was called twice in step {self.steps}; a step is one update"
            )
        if any(a is not None for a in (*args[1:], *kwargs.values())):  # the first is itself
            raise ValueError("optimizer.step(closure) cannot be recorded; call backward before it")
        guards.refuse_stale(self._held)
        self._applied = self._capture.applied()
        self._broken = True

    def _after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Now, not at the end of the step: a scheduler inside it changes the options.
        self._taken = self._capture.coefficients(self._buffered), self._capture.denominator()

    def _finish(
        self, batch: np.ndarray, before: Tensor, state: dict[str, np.ndarray] | None
    ) -> None:
        capture, applied, step = self._capture, self._applied, self.steps
        if applied is None:
            raise ValueError(f"optimizer.step() was not called in step {step}")
        after = capture.theta()
        norm = float(torch.linalg.vector_norm(capture.raw))
        guards.refuse_non_finite(norm, after, step)
        factors, bound, diagonal = clipping(capture.raw, applied, capture.places)
        if diagonal is not None and np.isinf(bound) and self._every > 1:
            raise ValueError(
                f"step {step}: the gradient was changed in a way that cannot be repeated from what "
                "is stored; record with every=1"
            )
        coefficients, denominator = self._taken
        loss = np.nan
        if step < 2 or step % self._check_every == 0:
            loss = self._check.gradient(before, capture.raw, batch, step)
            if self._every > 1:
                self._check.refuse_other_bits(before, capture.raw, batch)
            self._check.update(capture, before, after, applied, coefficients, denominator, step)
        values: dict[str, Any] = {
            trace_layout.COEFFICIENTS.name: coefficients,
            trace_layout.CLIP.name: factors,
            trace_layout.CLIP_VALUE.name: bound,
            trace_layout.BATCH.name: batch,
            trace_layout.LOSS.name: loss,
            trace_layout.NORM.name: norm,
        }
        if step % self._every == 0:
            values[trace_layout.PARAMETERS.name] = before.cpu().numpy()
        if denominator is not None and self._every == 1:
            values[trace_layout.DENOMINATOR.name] = denominator.cpu().numpy()
        if step < self._writer.committed:
            self._compare(values, step)
        elif self._refused is not None:
            raise self._refused
        else:
            kept = None if diagonal is None or self._every > 1 else diagonal.cpu().numpy()
            self._writer.append(StepValues(values, state, kept))
        self._after, self._broken = after, False
        self.steps += 1

    # --- going on with a run that was killed --------------------------------------------------

    def _compare(self, values: dict[str, Any], step: int) -> None:
        """Raise unless a step that is stored came out the same."""
        stored = trajectory.read_step(self._root, step, self._every)
        batch = stored[trace_layout.BATCH.name]
        stored[trace_layout.BATCH.name] = batch[batch >= 0]
        differ = [n for n in stored if n in values and not np.array_equal(stored[n], values[n])]
        if differ:
            raise FingerprintError(
                f"{store.describe(self._root.store)} has step {step} with other {differ}; nothing "
                "was touched. The loop must repeat the run exactly (the same order of batches, the "
                "same device and threads), or go on with trace.remaining(batches); or give another "
                "store="
            )

    def remaining(self, batches: Iterable[Indices]) -> Iterator[Indices]:
        """Yield the batches of steps that are not stored yet, with everything set back to them.

        Parameters
        ----------
        batches
            Of the whole run, in order.

        Yields
        ------
        indices
            To pass to `step`. Before the first, the model, the optimizer and the scheduler are set
            to the state after the last stored step.

        Raises
        ------
        FingerprintError
            A batch that is stored differs from the one given.
        """
        stored, given = self._writer.committed, iter(batches)
        if stored and self.steps == 0:
            for step, batch in enumerate(islice(given, stored)):
                self._compare({trace_layout.BATCH.name: guards.as_indices(batch, step)}, step)
            self._restore()
        yield from given

    def _restore(self) -> None:
        state = trajectory.last_state(self._root)
        load_schedule(str(state.pop("extra")[0]), self._optimizer, self._scheduler)
        with gradients_on():
            self._capture.load(state)
        self._after = self._capture.theta()
        self.steps = self._writer.committed
