"""The states of a recorded run from the last to the first, read in blocks or taken again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import zarr

from lkarray import schema
from lkarray.errors import MemoryBudgetError
from lkarray.store import trace_layout, trajectory
from lkarray.store.nodes import stored_at
from lkarray.training.replay import Replay
from lkarray.training.trace import Trace


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """Consecutive steps: parameters before each, and what updates divided by and were clipped by.

    The arrays are ``(step, param)``.
    """

    start: int
    theta: np.ndarray
    denominator: np.ndarray | None
    diagonal: np.ndarray | None


class States:
    """Parameters and denominators of a run, asked for in descending order of steps.

    Two segments of steps are held. Where ``record(every=k)`` kept fewer states, a segment is taken
    again from the state kept before it.

    Parameters
    ----------
    trace
        The run.
    divided
        Whether denominators are wanted.
    memory
        Bytes that the segments may take.
    """

    def __init__(self, trace: Trace, *, divided: bool, memory: int) -> None:
        self._trace, self._divided = trace, divided
        self._length = segment_length(trace, divided=divided, memory=memory)
        self._held: dict[int, _Segment] = {}
        group = trace.root[schema.TRAJECTORY]
        assert isinstance(group, zarr.Group)
        self._clipped = trace.every == 1 and trace_layout.DIAGONAL.name in group

    def theta(self, step: int) -> np.ndarray:
        """Return the parameters before a step, ``(param,)``; the number of steps gives the last."""
        if step == self._trace.steps:
            return self._trace.parameters(step)
        segment = self._segment(step)
        return np.asarray(segment.theta[step - segment.start])

    def denominator(self, step: int) -> np.ndarray | None:
        """Return what a step's update was divided by, ``(param,)``."""
        segment = self._segment(step)
        return None if segment.denominator is None else segment.denominator[step - segment.start]

    def diagonal(self, step: int) -> np.ndarray | None:
        """Return the stored factors of element-wise clipping, ``(param,)``."""
        segment = self._segment(step)
        return None if segment.diagonal is None else segment.diagonal[step - segment.start]

    def _segment(self, step: int) -> _Segment:
        number = self._number(step)
        if number not in self._held:
            # Two at most: a stretch may end in the segment after the one that it begins in.
            for old in sorted(self._held)[1:]:
                del self._held[old]
            start, stop = self._bounds(number)
            read = self._read if self._trace.every == 1 else self._replay
            self._held[number] = read(start, stop)
        return self._held[number]

    def _number(self, step: int) -> int:
        if self._trace.every == 1:
            return step // self._length
        per = -(-self._trace.every // self._length)
        return step // self._trace.every * per + step % self._trace.every // self._length

    def _bounds(self, number: int) -> tuple[int, int]:
        every, length = self._trace.every, self._length
        if every == 1:
            start, end = number * length, (number + 1) * length
        else:
            kept, within = divmod(number, -(-every // length))
            start = kept * every + within * length
            end = min(start + length, (kept + 1) * every)
        return start, min(end, self._trace.steps)

    def _read(self, start: int, stop: int) -> _Segment:
        root = self._trace.root

        def steps_of(name: str) -> np.ndarray:
            return trajectory.step_rows(root, name, start, stop)

        return _Segment(
            start=start,
            theta=steps_of(trace_layout.PARAMETERS.name),
            denominator=steps_of(trace_layout.DENOMINATOR.name) if self._divided else None,
            diagonal=steps_of(trace_layout.DIAGONAL.name) if self._clipped else None,
        )

    def _replay(self, start: int, stop: int) -> _Segment:
        replay = Replay(self._trace, start // self._trace.every)
        theta, denominators = [], []
        for step in range(start, stop):
            theta.append(replay.until(step))
            if self._divided:
                replay.until(step + 1)
                denominator = replay.denominator()
                assert denominator is not None
                denominators.append(denominator)
        divided = np.stack(denominators) if self._divided else None
        return _Segment(start=start, theta=np.stack(theta), denominator=divided, diagonal=None)


def segment_length(trace: Trace, *, divided: bool, memory: int) -> int:
    """Return the steps of a segment: a block of the store, or what lies between kept states.

    Raises
    ------
    MemoryBudgetError
        Two segments of one step do not fit.
    """
    size = int(trace.stops[-1]) * np.dtype(trace.fingerprint.dtype).itemsize * (1 + divided)
    fit = memory // (2 * size)
    if fit < 1:
        raise MemoryBudgetError(
            f"two states of the run take {2 * size / 2**20:.0f} MiB, and {memory / 2**20:.0f} MiB "
            "are there for them; set memory= to more"
        )
    if trace.every > 1:
        return int(min(fit, trace.every))
    array = stored_at(trace.root, f"{schema.TRAJECTORY}/{trace_layout.PARAMETERS.name}")
    return int(min(fit, array.chunks[0]))
