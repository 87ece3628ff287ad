"""What a panel's pass does with each step: find influences, or integrate along the path alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lkarray.auditing.adjoint import Adjoint, Scratch, Step, inherited, pull_back
from lkarray.auditing.blocks import Block
from lkarray.auditing.places import BatchPlaces
from lkarray.auditing.problem import Problem
from lkarray.auditing.realised import Update, buffer_before
from lkarray.auditing.states import States
from lkarray.auditing.sums import Sums
from lkarray.auditing.windows import Windows
from lkarray.schema import PARAM, TIME


class PerStep(ABC):
    """What is done with each step of a pass.

    Parameters
    ----------
    problem, blocks
        The audit, and its tensors.
    states
        Of the run.
    sums
        Where sums over steps are added up.
    count
        Audited examples of the panel.
    """

    def __init__(
        self, problem: Problem, blocks: Sequence[Block], states: States, sums: Sums, count: int
    ) -> None:
        self._problem, self._blocks, self._states = problem, blocks, states
        self._sums, self._count = sums, count

    @abstractmethod
    def take(self, step: int, theta: Tensor, moved: Tensor, means: Sequence[Any]) -> None:
        """Take one step backwards.

        Parameters
        ----------
        step
            Its number.
        theta, moved
            Parameters before it, and how it changed them, ``(param,)``.
        means
            Of each block: the audited gradients over the stretch.
        """

    def close(self, step: int) -> Iterator[tuple[np.ndarray, int | None]]:
        """Yield influences that are whole once a step is taken, each with its window if asked for.

        ``(example or group, audit[, output][, layer])``.
        """
        yield from ()

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what a pass can go on from."""
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take back what `arrays` gave."""
        del state


class PathOnly(PerStep):
    """Integrate along the path, and leave the training examples out."""

    @override
    def take(self, step: int, theta: Tensor, moved: Tensor, means: Sequence[Any]) -> None:
        pairs = zip(self._blocks, means, strict=True)
        along = [block.dot(mean, block.take(moved)).double() for block, mean in pairs]
        self._sums.add_path(step, sum(along[1:], along[0]))


class Influences(PerStep):
    """Find the influence of every training example."""

    def __init__(
        self, problem: Problem, blocks: Sequence[Block], states: States, sums: Sums, count: int
    ) -> None:
        super().__init__(problem, blocks, states, sums, count)
        self._like = problem.flat.theta
        self._rows = count * problem.outputs
        self._scratch = Scratch(blocks, self._rows, self._like)
        self._windows = Windows(problem, blocks, self._rows)

    @override
    def take(self, step: int, theta: Tensor, moved: Tensor, means: Sequence[Any]) -> None:
        problem = self._problem
        batch = problem.batch(step)
        training = self._training(batch, theta)
        gradients = [
            block.batch_mean(of_block) if batch.whole else None
            for block, of_block in zip(self._blocks, training, strict=True)
        ]
        problem.require_recorded(step, gradients)
        updates = self._updates(step, gradients)
        later_mu = [problem.updates.momentum(step + 1, block) for block in self._blocks]
        counted = False
        for reach in self._windows.reaching(step):
            taken = Step(
                theta=theta,
                moved=moved,
                updates=updates,
                later_mu=later_mu,
                training=training,
                count=len(batch.examples),
                size=batch.size,
                means=means if reach.inside else None,
                add=self._windows.adder(reach.gaining, batch),
            )
            residual, along = pull_back(reach.adjoint, taken, self._scratch)
            if step == problem.start:
                residual = residual.cpu() + self._inherited(reach.adjoint, taken, gradients)
            self._sums.add_residual(reach.window, residual)
            if reach.inside and not counted:  # overlapping windows see the same
                self._sums.add_path(step, along)
                counted = True

    def _training(self, batch: BatchPlaces, theta: Tensor) -> list[Any]:
        """Return the gradients of a batch's examples at some parameters, of each block."""
        if not len(batch.examples):
            return [None] * len(self._blocks)
        self._problem.set(theta)
        features = self._problem.training.features(*self._problem.trace.train.take(batch.examples))
        return [block.training(features) for block in self._blocks]

    def _updates(self, step: int, gradients: Sequence[Tensor | None]) -> list[Update]:
        updates = self._problem.updates
        denominator = self._vector(self._states.denominator(step) if updates.divided else None)
        diagonal = self._vector(self._states.diagonal(step) if updates.clipped else None)
        return [
            updates.at(
                step,
                block,
                denominator=None if denominator is None else block.take(denominator),
                gradient=gradient,
                diagonal=None if diagonal is None else block.take(diagonal),
            )
            for block, gradient in zip(self._blocks, gradients, strict=True)
        ]

    def _vector(self, values: np.ndarray | None) -> Tensor | None:
        return None if values is None else torch.from_numpy(values).to(self._like)

    def _inherited(
        self, adjoint: Adjoint, first: Step, gradients: Sequence[Tensor | None]
    ) -> Tensor:
        """Return what momentum from before the first step adds to the residual, ``(row,)``."""
        if not adjoint.state:
            return torch.zeros(self._rows, dtype=torch.float64, device="cpu")
        buffers: list[Tensor | None]
        if self._problem.start == 0:
            vector = self._vector(self._problem.trace.inherited())
            buffers = [None if vector is None else block.take(vector) for block in self._blocks]
        else:  # in the middle of the run: told by how far the first step moved
            buffers = []
            for block, update, gradient in zip(self._blocks, first.updates, gradients, strict=True):
                assert gradient is not None
                moved, theta = block.take(first.moved), block.take(first.theta)
                buffers.append(buffer_before(update, moved, theta, gradient))
        return inherited(adjoint, [update.mu for update in first.updates], buffers)

    @override
    def close(self, step: int) -> Iterator[tuple[np.ndarray, int | None]]:
        problem = self._problem
        for window, influence in self._windows.close(step):
            self._sums.add_influence(influence)
            # (layer, example, output, audit) to (example, audit, output, layer)
            shape = (problem.layers, problem.places.length, problem.outputs, self._count)
            values = influence.view(shape).permute(1, 3, 2, 0).cpu().numpy()
            if problem.audited.outputs is None:
                values = values[:, :, 0]
            if PARAM not in problem.groups:
                values = values[..., 0]
            yield values, window if TIME in problem.groups else None

    @override
    def arrays(self) -> dict[str, np.ndarray]:
        return self._windows.arrays()

    @override
    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self._windows.restore(state)
