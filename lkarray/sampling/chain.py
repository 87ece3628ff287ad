"""The chains of one stack: step, observe, hand to the store."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lkarray import schema, stopping
from lkarray.errors import StoreError
from lkarray.sampling.control import STATE as CONTROL
from lkarray.sampling.mailbox import Mailbox
from lkarray.sampling.randomness import ChainRandomness
from lkarray.sampling.samplers import Move, Sampler, StepInput, row_sums
from lkarray.sampling.starting import first_offset
from lkarray.sampling.target import Minibatch, Target
from lkarray.store import ChainRegion

logger = logging.getLogger("lkarray")

#: Every so many draws a Metropolis test is evaluated, at the cost of one more gradient: it tells
#: whether the step size is too large.
TEST_EVERY = 50

_STATISTICS = {s.name: f"{schema.SAMPLE_STATS}/{s.name}" for s in schema.STATS}
_ON_DEVICE = (schema.MINIBATCH_LOSS, schema.GRADIENT_NORM, schema.DISTANCE, schema.ACCEPTANCE)


@dataclass(frozen=True)
class Schedule:
    """Which steps are taken and which give a draw."""

    draws: int
    burn_in: int
    thin: int

    @property
    def steps(self) -> int:
        """Steps of a whole chain."""
        return self.burn_in + self.draws * self.thin

    def gives_draw(self, taken: int) -> bool:
        """Say whether a draw follows when ``taken`` steps have been taken."""
        return taken > self.burn_in and (taken - self.burn_in) % self.thin == 0

    def tests(self, taken: int) -> bool:
        """Say whether the draw after ``taken`` steps is one whose step is tested."""
        return (taken - self.burn_in) % (self.thin * TEST_EVERY) == self.thin


@dataclass(frozen=True)
class Seat:
    """One chain, and where it sits: its row of the stack's buffers."""

    row: int
    chain: int
    region: ChainRegion
    random: ChainRandomness


class Stack:
    """Chains that share a stack, from where their regions stand to the end of the schedule.

    Chains may stand at different steps, as a kill between their commits leaves them: those
    behind run alone until the others' step is reached. A seat without a running chain is
    computed and dropped, so that the numbers of a chain depend on the width of the stack alone,
    not on who else sits in it.

    Parameters
    ----------
    target
        What is sampled and observed.
    sampler, schedule
        How a step moves, and which steps give draws.
    seats
        The chains; none of them diverged or finished.
    tick
        Called after every step with the number of chains that moved.

    Attributes
    ----------
    diverged
        Chain and draw of each that turned non-finite. That draw is stored and flagged, the
        chain stops there, and the others go on.
    """

    def __init__(
        self,
        target: Target,
        sampler: Sampler,
        schedule: Schedule,
        seats: Sequence[Seat],
        tick: Callable[[int], object],
    ) -> None:
        assert all(seat.region.record.step < schedule.steps for seat in seats), "finished chains"
        self._target, self._sampler, self._schedule = target, sampler, schedule
        self._waiting = sorted(seats, key=lambda seat: (seat.region.record.step, seat.chain))
        self._active: list[Seat] = []
        self._tick = tick
        self._mail = Mailbox()
        self._sent: tuple[list[Seat], float] = [], 0.0
        theta = target.flat.theta
        carries = [*sampler.carries]
        if target.control is not None and not sampler.independent:
            carries.append(CONTROL)
        self._vectors = {name: torch.zeros_like(theta) for name in carries}
        self._noise = torch.zeros_like(theta)
        self._noise_rows = self._noise.unbind()
        self._untested = theta.new_full((len(theta),), math.nan)
        self._signs = torch.zeros_like(theta) if sampler.needs_curvature else None
        self._taken = 0
        self._signals = stopping.Signals()
        self._due: Sequence[Tensor] | None = None  # statistics of a draw that is being observed
        self.diverged: list[tuple[int, int]] = []

    def run(self) -> None:
        """Run to the end of the schedule, or until every chain has diverged.

        What stops it, Ctrl-C say, is raised once everything is committed: at the end of the step,
        or before the step has moved anything.
        """
        self._target.start()
        with stopping.held() as self._signals:
            try:
                self._run()
            except StoreError:
                raise
            except BaseException as error:
                if self._signals.open or self._due is not None:
                    self._signals.open = False
                    stopping.kept(self._rescue, error)
                if not isinstance(error, Exception):
                    self._say(error)
                raise

    def _rescue(self) -> None:
        """Commit what was done before an error."""
        if self._due is not None:
            self._send(self._due)
        self._keep()

    def _say(self, error: BaseException) -> None:
        """Tell what is safe where the run was stopped."""
        draws = {seat.chain: seat.region.committed.draws for seat in self._active}
        draws |= {seat.chain: seat.region.record.draws for seat in self._waiting}
        text = ", ".join(f"{count} of chain {chain}" for chain, count in sorted(draws.items()))
        said = f"sampling was stopped; draws that are stored and safe: {text}"
        error.add_note(f"{said}. The same call continues from there")
        logger.warning("%s. The same call continues from there", said)

    def _run(self) -> None:
        while self._active or self._waiting:
            if not self._active:
                self._taken = self._waiting[0].region.record.step
            self._admit()
            self._step()
            self._signals.open = True
            self._signals.deliver()
            self._tick(len(self._active))
            self._signals.open = False
            if self._taken == self._schedule.steps:
                break
        self._keep()

    def _keep(self) -> None:
        """Commit every running chain, and wait until that is on disk."""
        self._commit()
        for seat in self._active:
            seat.region.wait()

    def _admit(self) -> None:
        """Seat the chains that stand at the present step."""
        while self._waiting and self._waiting[0].region.record.step == self._taken:
            seat = self._waiting.pop(0)
            theta = self._target.flat.theta
            state = seat.region.state()
            vectors = {schema.PARAMETERS.name: theta} | self._vectors
            if state is None:
                self._begin(seat)
            else:
                for name, vector in vectors.items():
                    vector[seat.row] = torch.from_numpy(state[name])
            self._active.append(seat)

    def _begin(self, seat: Seat) -> None:
        """Put a chain at its start."""
        self._target.flat.theta[seat.row] = self._target.center
        for vector in self._vectors.values():
            vector[seat.row] = 0
        if self._target.starts is not None:
            offset = first_offset(self._target.starts, seat.random)
            self._target.flat.theta[seat.row] += offset
            if CONTROL in self._vectors:
                self._vectors[CONTROL][seat.row] = offset

    def _step(self) -> None:
        """Take one step; where it gives a draw, observe and send it."""
        target, sampler, step = self._target, self._sampler, self._taken
        flat = target.flat
        draws = self._schedule.gives_draw(step + 1)
        tests = draws and sampler.testable and self._schedule.tests(step + 1)
        self._signals.open = True  # nothing has moved yet
        rows = None if sampler.independent else self._rows(step)
        curvature = None
        if self._signs is not None:
            for seat in self._active:
                seat.random.signs(step, self._signs[seat.row])
            curvature = target.curvature(rows, self._signs)
        minibatch = None if sampler.independent else target.gradient(rows)
        self._signals.open = False
        for seat in self._active:
            seat.random.noise(step, self._noise_rows[seat.row])
        if flat.mask is not None:
            self._noise.mul_(flat.mask)
        self._move_control(step)
        # Of where the step begins: taken before it moves.
        statistics, before = [self._untested, self._untested], None
        if minibatch is not None and draws:
            statistics = [minibatch.mean(1), _norm(flat.grad)]
            before = (flat.theta.clone(), flat.grad.clone(), minibatch) if tests else None
        sampler.step(
            StepInput(
                theta=flat.theta,
                grad=flat.grad,
                noise=self._noise,
                center=target.center,
                nbeta=target.nbeta,
                gamma=target.gamma,
                step=step,
                state=self._vectors,
                curvature=curvature,
                law=target.law,
            )
        )
        self._taken += 1
        if draws:
            accepted = self._untested
            if before is not None:
                accepted = self._acceptance(rows, step, *before)
            self._due = [*statistics, target.distance(), accepted]
            self._send(self._due)
        if any(seat.region.due() for seat in self._active):
            self._commit()

    def _move_control(self, step: int) -> None:
        """Take the step of the linear chains, with the noise that the chains' own step has."""
        offsets, control, target = self._vectors.get(CONTROL), self._target.control, self._target
        if offsets is None or control is None:
            return
        eps = self._sampler.size(step)
        for seat in self._active:  # by itself: its numbers do not depend on the width
            row, noise = offsets[seat.row], self._noise_rows[seat.row]
            control.move(row, noise, eps=eps, nbeta=target.nbeta, gamma=target.gamma)

    def _rows(self, step: int) -> Minibatch:
        """Return the minibatch of each seat; empty seats share the first chain's."""
        first = self._active[0]
        if first.random.everything:
            return None
        held, width = self._target.train.held, self._target.flat.width
        if width == 1:
            return first.random.rows(step) if held else first.random.indices(step)
        pick = {seat.row: seat.random for seat in self._active}
        random = [pick.get(row, first.random) for row in range(width)]
        if held:
            return torch.stack([chain.rows(step) for chain in random])  # (chain, batch)
        return np.stack([chain.indices(step) for chain in random])

    def _acceptance(
        self, rows: Minibatch, step: int, theta: Tensor, grad: Tensor, minibatch: Tensor
    ) -> Tensor:
        """Return the probability that a Metropolis test accepts the step just taken.

        The energy and both proposals (`Sampler.log_ratio`) are evaluated on the step's own
        minibatch: it measures the error of the step size, not of the minibatch.
        """
        target = self._target
        after = target.gradient(rows)
        moved, center = target.flat.theta, target.center
        drop = target.nbeta * (minibatch.double().mean(1) - after.double().mean(1))
        drop += target.gamma / 2 * row_sums((theta - moved) * (theta + moved - 2 * center))
        both = target.nbeta * (grad + target.flat.grad)
        both += target.gamma * (theta + moved - 2 * center)
        move = Move(step, both, self._noise, self._vectors, target.law)
        log_ratio = self._sampler.log_ratio(drop, move)
        return log_ratio.clamp(max=0).exp().to(minibatch.dtype)

    def _send(self, statistics: Sequence[Tensor]) -> None:
        target = self._target
        draw = target.observe() | target.measure()
        if target.control is not None:
            offsets = self._vectors.get(CONTROL)
            draw |= target.predict(
                target.flat.theta - target.center if offsets is None else offsets
            )
        draw["statistics"] = torch.stack(list(statistics), dim=1)  # (chain, statistic)
        self._due = None
        self._receive()  # the draw before: its copies were made while this one was computed
        self._mail.send(draw)
        self._sent = list(self._active), self._sampler.size(self._taken - 1)
        if any(seat.region.room() == 1 for seat in self._active):
            self._receive()

    def _receive(self) -> None:
        """Hand the draw that is on its way to the regions, and retire chains that diverged."""
        if self._mail.empty:
            return
        arrays = self._mail.receive()
        statistics = arrays.pop("statistics")
        seats, size = self._sent
        for seat in seats:
            draw: dict[str, np.ndarray | float | bool] = {k: v[seat.row] for k, v in arrays.items()}
            numbers = statistics[seat.row].tolist()
            draw |= {_STATISTICS[s.name]: v for s, v in zip(_ON_DEVICE, numbers, strict=True)}
            draw[_STATISTICS[schema.STEP_SIZE.name]] = size
            told = numbers[2:3] if self._sampler.independent else numbers[:3]
            finite = math.isfinite(sum(told)) and all(
                _finite(values[seat.row])
                for path, values in arrays.items()
                if path.startswith(schema.LOSSES)
            )
            draw[_STATISTICS[schema.DIVERGED.name]] = not finite
            seat.region.append(draw)
            if not finite:
                self._retire(seat)

    def _retire(self, seat: Seat) -> None:
        seat.region.commit(self._taken, self._state(seat.row))
        seat.region.wait()
        self.diverged.append((seat.chain, seat.region.draws - 1))
        self._active.remove(seat)
        # An empty seat is computed all the same: from w*, where everything is finite.
        self._target.flat.theta[seat.row] = self._target.center
        for vector in (self._noise, *self._vectors.values()):
            vector[seat.row] = 0

    def _commit(self) -> None:
        """Commit every running chain at the present step."""
        self._receive()
        for seat in self._active:
            if seat.region.uncommitted() or seat.region.record.step != self._taken:
                seat.region.commit(self._taken, self._state(seat.row))

    def _state(self, row: int) -> Mapping[str, np.ndarray]:
        vectors = {schema.PARAMETERS.name: self._target.flat.theta} | self._vectors
        return {k: v[row].detach().to("cpu", copy=True).numpy() for k, v in vectors.items()}


def _norm(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=1)


def _finite(values: np.ndarray) -> bool:
    if values.ndim > 1:  # of tokens: NaN is padding, and what is not finite is infinite
        return not np.isinf(values).any()
    # A float64 sum of float32 numbers is finite just when all of them are.
    return math.isfinite(values.sum(dtype=np.float64))
