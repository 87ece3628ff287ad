"""The pass of one panel: some audited examples, followed backwards through the whole run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lkarray import stopping
from lkarray.auditing.blocks import join_features
from lkarray.auditing.per_step import PerStep
from lkarray.auditing.problem import Problem
from lkarray.auditing.states import States
from lkarray.auditing.sums import Sums
from lkarray.nn.features import Features

#: Audited examples that go through the model at once.
BATCH = 256


class Writer(Protocol):
    """Takes what a panel gives: see `lkarray.store.audit_panels.PanelWriter`.

    Attributes
    ----------
    audits
        The audited examples of the panel.
    """

    audits: slice

    def resume(self) -> tuple[int, dict[str, np.ndarray]] | None:
        """Return the stretches left and the state, of a pass that was cut off."""

    def due(self) -> bool:
        """Say whether it is time to commit."""

    def commit(self, left: int, state: Mapping[str, np.ndarray]) -> None:
        """Keep the state, with ``left`` stretches to go."""

    def write(self, values: np.ndarray, window: int | None) -> None:
        """Write influence of one window."""

    def finish(self, sums: Mapping[str, np.ndarray]) -> None:
        """Write the sums, and let the panel count."""


class Panel:
    """A panel being audited.

    Rows of its arrays are the audited numbers: of each output, those of every example.

    Parameters
    ----------
    problem
        The audit.
    writer
        Of the panel: knows its examples, and what an earlier pass left.
    memory
        Bytes for the states of the run.
    per_step
        What is done with each step.
    afresh
        Begin anew, whatever an earlier pass left.

    Attributes
    ----------
    left
        Stretches that are still to be taken.
    """

    def __init__(
        self,
        problem: Problem,
        writer: Writer,
        memory: int,
        per_step: type[PerStep],
        *,
        afresh: bool = False,
    ) -> None:
        self._problem, self._writer = problem, writer
        self._audits = np.arange(writer.audits.start, writer.audits.stop)
        self._like = problem.flat.theta
        self._blocks = problem.blocks()
        self._states = States(problem.trace, divided=problem.updates.divided, memory=memory)
        count = len(self._audits)
        self._sums = Sums(problem, count)
        self._per_step = per_step(problem, self._blocks, self._states, self._sums, count)
        self._later: Features | None = None
        self.left = len(problem.stretches)
        if not afresh:
            self._resume()

    # --- the pass -------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, tick: Callable[[int], None]) -> None:
        """Run to the beginning of the audited steps, and let the panel count.

        ``tick`` is told the steps taken.
        """
        problem, writer = self._problem, self._writer
        with stopping.held() as signals:
            if self.left == len(problem.stretches):
                self._value(problem.stop)
            while self.left:
                a, b = problem.stretches[self.left - 1]
                means = self._means(a, b)
                for step in reversed(range(a, b)):
                    self._step(step, means)
                self.left -= 1
                tick(b - a)
                if self.left and (writer.due() or signals.arrived):
                    writer.commit(self.left, self._state())
                signals.deliver()
            writer.finish(self._sums.results())

    def _step(self, step: int, means: list[Any]) -> None:
        theta = self._theta(step)
        self._per_step.take(step, theta, self._theta(step + 1) - theta, means)
        for values, window in self._per_step.close(step):
            self._writer.write(values, window)
        self._value(step)

    def _means(self, a: int, b: int) -> list[Any]:
        """Return the audited gradients over a stretch, of each block."""
        stencil = self._problem.stencil
        start, stop = (self._theta(step) for step in (a, b))
        nodes: list[tuple[float, Features]] = []
        for node, weight in zip(stencil.nodes, stencil.weights, strict=True):
            if node == 1 and self._later is not None:
                nodes.append((weight, self._later))
            else:
                theta = start + node * (stop - start)
                if node in (0, 1):  # the states themselves, to the bit: a resumed pass begins here
                    theta = stop if node else start
                nodes.append((weight, self._features(theta)))
        # The beginning of this stretch is the end of the one before it, which is taken next.
        shared = stencil.nodes[0] == 0 and stencil.nodes[-1] == 1
        self._later = nodes[0][1] if shared else None
        return [block.prepare(nodes) for block in self._blocks]

    def _features(self, theta: Tensor) -> Features:
        """Return the gradients of the audited numbers, ``(row, ...)``: output by output."""
        problem = self._problem
        problem.set(theta)
        return join_features(
            [
                engine.features(inputs, target)
                for engine in problem.engines
                for _, inputs, target in problem.data.numbered(BATCH, self._audits)
            ]
        )

    def _value(self, step: int) -> None:
        """Keep the audited numbers where an epoch begins or the run ends."""
        if not self._sums.is_edge(step):
            return
        problem = self._problem
        problem.set(self._theta(step))
        values = []
        for number in problem.audited.numbers:
            for _, inputs, target in problem.data.numbered(BATCH, self._audits):
                values.append(number(problem.flat(inputs), target))
        self._sums.keep_values(step, torch.cat(values))

    def _theta(self, step: int) -> Tensor:
        return torch.from_numpy(self._states.theta(step)).to(self._like)

    # --- to go on from --------------------------------------------------------------------------

    def _state(self) -> dict[str, np.ndarray]:
        return {**self._sums.arrays(), "tensors": self._carried, **self._per_step.arrays()}

    def _resume(self) -> None:
        resumed = self._writer.resume()
        if resumed is None:
            return
        left, state = resumed
        if not np.array_equal(state.get("tensors", self._carried), self._carried):
            return  # carried in another order, as other tensors had factors: begin anew
        self.left = left
        self._sums.restore(state)
        self._per_step.restore(state)

    @property
    def _carried(self) -> np.ndarray:
        """The tensors whose states are carried, in their order."""
        return np.asarray([tensor for block in self._blocks for tensor in block.tensors])
