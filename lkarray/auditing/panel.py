"""The pass of one panel: some audited examples, followed backwards through the whole run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lkarray import stopping
from lkarray.auditing.adjoint import Adjoint, Credit, Scratch, Step, inherited, pull_back
from lkarray.auditing.problem import ACTED, Problem, join
from lkarray.auditing.realised import Update, buffer_before
from lkarray.auditing.states import States
from lkarray.nn.features import Features

#: Audited examples that go through the model at once.
BATCH = 256


class Writer(Protocol):
    """Takes what a panel gives: see `lkarray.store.audits.PanelWriter`."""

    rows: slice

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
    afresh
        Begin anew, whatever an earlier pass left.
    """

    def __init__(
        self, problem: Problem, writer: Writer, memory: int, *, afresh: bool = False
    ) -> None:
        self._problem, self._writer = problem, writer
        self._n = writer.rows.stop - writer.rows.start
        self._rows = self._n * problem.outputs
        self._like = problem.flat.theta
        self._states = States(problem.trace, divided=problem.realised.divided, memory=memory)
        self._scratch = Scratch(problem.blocks, self._rows, self._like)
        acted = problem.request.credit == ACTED
        self._stateless = problem.request.bare or problem.realised.stateless
        # One adjoint for all windows, or one for each that has begun to be carried back.
        self._adjoints: dict[int, Adjoint] = {} if acted else {-1: self._begin()}
        self._credits: dict[int, Credit] = {}
        self._later: Features | None = None
        edges = [e for _, e, _ in problem.epochs] + [problem.stop]
        self._edges = np.asarray(edges)
        shape = (len(problem.windows), self._rows)
        self._sums = {
            "path": np.zeros((len(problem.epochs), self._rows)),
            "length": np.zeros(self._rows),
            "total": np.zeros(self._rows),
            "residual": np.zeros(shape if acted else (1, self._rows)),
            "values": np.zeros((len(edges), self._rows)),
        }
        self.left = len(problem.stretches)
        if not afresh:
            self._resume()

    def _begin(self) -> Adjoint:
        blocks, rows = self._problem.blocks, self._rows
        return Adjoint.begin(blocks, rows, self._like, stateless=self._stateless)

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
                    self._close(step)
                    self._value(step)
                self.left -= 1
                tick(b - a)
                if self.left and (writer.due() or signals.arrived):
                    writer.commit(self.left, self._state())
                signals.deliver()
            writer.finish(self._results())

    def _means(self, a: int, b: int) -> list[Any]:
        """Return the audited gradients over a stretch, of each block."""
        problem = self._problem
        start, stop = (self._theta(step) for step in (a, b))
        nodes: list[tuple[float, Features]] = []
        for at, weight in zip(problem.stencil.nodes, problem.stencil.weights, strict=True):
            if at == 1 and self._later is not None:
                nodes.append((weight, self._later))
            else:
                theta = start + at * (stop - start)
                if at in (0, 1):  # the states themselves, to the bit: a resumed pass may begin here
                    theta = stop if at else start
                nodes.append((weight, self._features(theta)))
        first = problem.stencil.nodes[0] == 0 and problem.stencil.nodes[-1] == 1
        self._later = nodes[0][1] if first else None
        return [block.prepare(nodes) for block in problem.blocks]

    def _features(self, theta: Tensor) -> Features:
        problem = self._problem
        problem.set(theta)
        rows = np.arange(self._writer.rows.start, self._writer.rows.stop)
        parts = []
        for engine in problem.engines:
            for _, inputs, target in problem.data.numbered(BATCH, rows):
                parts.append(engine.features(inputs, target))
        return join(parts)

    def _theta(self, step: int) -> Tensor:
        return torch.from_numpy(self._states.theta(step)).to(self._like)

    def _step(self, step: int, means: list[Any]) -> None:
        problem = self._problem
        theta = self._theta(step)
        moved = self._theta(step + 1) - theta
        if problem.request.bare:
            pairs = zip(problem.blocks, means, strict=True)
            along = sum(block.dot(mean, block.take(moved)).double() for block, mean in pairs)
            self._along(step, torch.as_tensor(along).cpu().numpy())
            return
        wanted, rows, places, size = problem.batch(step)
        training: list[Any] = [None] * len(problem.blocks)
        if len(wanted):
            problem.set(theta)
            found = problem.training.features(*problem.trace.train.take(wanted))
            training = [block.training(found) for block in problem.blocks]
        whole = len(wanted) == size
        gradients = [
            block.batch_mean(part) if whole else None
            for block, part in zip(problem.blocks, training, strict=True)
        ]
        self._check(step, gradients)
        updates = self._updates(step, gradients)
        where = None if len(rows) == len(wanted) == len(np.unique(rows)) else rows, places
        later = [
            problem.realised.momentum(step + 1, block.tensors, block.sizes)
            for block in problem.blocks
        ]
        counted = False
        for key, adjoint, windows in self._active(step):
            inside = key == -1 or bool(windows)
            taken = Step(
                theta,
                moved,
                updates,
                later,
                training,
                len(wanted),
                size,
                means if inside else None,
                self._adder(windows if key == -1 else [key], where),
            )
            residual, along = pull_back(adjoint, taken, self._scratch)
            if step == problem.start:
                residual += self._inherited(adjoint, updates, theta, moved, gradients)
            row = self._sums["residual"][max(key, 0)]
            row += residual.cpu().numpy()
            if inside and not counted:  # overlapping windows see the same
                self._along(step, along.cpu().numpy())
                counted = True

    def _updates(self, step: int, gradients: list[Tensor | None]) -> list[Update]:
        problem = self._problem
        vectors = []
        for found in (
            self._states.denominator(step) if problem.realised.divided else None,
            None if problem.realised.plain else self._states.diagonal(step),
        ):
            vectors.append(None if found is None else torch.from_numpy(found).to(self._like))
        denominator, diagonal = vectors
        return [
            problem.realised.at(
                step,
                block.tensors,
                block.sizes,
                None if denominator is None else block.take(denominator),
                gradient,
                None if diagonal is None else block.take(diagonal),
            )
            for block, gradient in zip(problem.blocks, gradients, strict=True)
        ]

    def _check(self, step: int, gradients: list[Tensor | None]) -> None:
        """Raise unless the batch's gradient is the one that was recorded."""
        problem = self._problem
        known = [gradient for gradient in gradients if gradient is not None]
        # A tensor in two groups of parameters would count twice.
        if len(known) < len(gradients) or problem.incomplete:
            return
        square = sum(float(gradient.double().square().sum()) for gradient in known)
        if not problem.check_norm(step, square):
            problem.refuse_other_gradients(range(problem.start, step + 1))

    def _inherited(
        self,
        adjoint: Adjoint,
        updates: list[Update],
        theta: Tensor,
        moved: Tensor,
        gradients: list[Tensor | None],
    ) -> Tensor:
        """Return what momentum from before the first step adds to the residual."""
        problem = self._problem
        if not adjoint.state:
            return torch.zeros(self._rows, dtype=torch.float64)
        buffers: list[Tensor | None]
        if problem.start == 0:
            found = problem.trace.inherited()
            vector = None if found is None else torch.from_numpy(found).to(self._like)
            buffers = [None if vector is None else block.take(vector) for block in problem.blocks]
        else:
            buffers = []
            for block, update, gradient in zip(problem.blocks, updates, gradients, strict=True):
                assert gradient is not None
                here = block.take(moved), block.take(theta)
                buffers.append(buffer_before(update, here[0], here[1], gradient))
        return inherited(adjoint, [update.mu for update in updates], buffers)

    # --- windows of time ----------------------------------------------------------------------

    def _active(self, step: int) -> list[tuple[int, Adjoint, list[int]]]:
        """Return the adjoints that reach a step: their keys, and the windows that it is in."""
        problem = self._problem
        inside = [w for w, (a, b) in enumerate(problem.windows) if a <= step < b]
        if problem.request.credit != ACTED:
            for window in inside:
                self._open(window)
            return [(-1, self._adjoints[-1], inside)]
        for window in inside:
            if window not in self._adjoints:
                self._adjoints[window] = self._begin()
                self._open(window)
        return [
            (key, adjoint, [key] if key in inside else [])
            for key, adjoint in self._adjoints.items()
        ]

    def _open(self, window: int) -> None:
        if window not in self._credits:
            problem = self._problem
            shape = (problem.layers, problem.length, self._rows)
            self._credits[window] = Credit(self._like.new_zeros(shape))

    def _adder(
        self, windows: list[int], where: tuple[np.ndarray | None, np.ndarray]
    ) -> Callable[[int, Tensor], None]:
        """Return what adds products to the influence of some windows.

        ``where`` says which examples of the batch (``None``: each one once) go to which places.
        """
        rows, places = where
        device = self._like.device
        at = None if rows is None else torch.from_numpy(rows).to(device)
        to = torch.from_numpy(places).to(device)

        def add(layer: int, products: Tensor) -> None:
            found = products.T if at is None else products.T[at]
            for window in windows:
                self._credits[window].influence[layer].index_add_(0, to, found)

        return add

    def _close(self, step: int) -> None:
        """Write what can gain no more influence."""
        problem = self._problem
        for window in list(self._credits):
            start, _ = problem.windows[window]
            if step > start:
                continue
            if problem.request.credit == ACTED:
                if step > problem.start and not self._spent(start, step):
                    continue
                del self._adjoints[window]
            self._write(window)

    def _spent(self, start: int, step: int) -> bool:
        """Say whether momentum has forgotten, by a step, what a later one did."""
        problem = self._problem
        if problem.realised.stateless:
            return True
        momentum = problem.realised.largest_momentum(step, start)
        return bool(momentum < 1e-3 * torch.finfo(self._like.dtype).eps)

    def _write(self, window: int) -> None:
        problem = self._problem
        found = self._credits.pop(window).influence
        self._sums["total"] += found.sum((0, 1), dtype=torch.float64).cpu().numpy()
        shape = (problem.layers, problem.length, problem.outputs, self._n)
        values = found.view(shape).permute(1, 3, 2, 0).cpu().numpy()
        if problem.audited.outputs is None:
            values = values[:, :, 0]
        if "param" not in problem.groups:
            values = values[..., 0]
        self._writer.write(values, window if "time" in problem.groups else None)

    # --- sums -----------------------------------------------------------------------------------

    def _along(self, step: int, along: np.ndarray) -> None:
        epoch = int(np.searchsorted(self._edges, step, side="right")) - 1
        self._sums["path"][epoch] += along
        self._sums["length"] += np.abs(along)

    def _value(self, step: int) -> None:
        """Keep the audited numbers where an epoch begins or the run ends."""
        at = np.flatnonzero(self._edges == step)
        if not len(at):
            return
        problem = self._problem
        problem.set(self._theta(step))
        rows = np.arange(self._writer.rows.start, self._writer.rows.stop)
        parts = []
        for number in problem.audited.numbers:
            for _, inputs, target in problem.data.numbered(BATCH, rows):
                parts.append(number(problem.flat(inputs), target))
        self._sums["values"][at[0]] = torch.cat(parts).double().cpu().numpy()

    def _results(self) -> Mapping[str, np.ndarray]:
        sums, values = self._sums, self._sums["values"]
        path = sums["path"].cumsum(0)
        found = {
            "change": values[-1] - values[0],
            "total": sums["total"],
            "path": path[-1],
            "length": sums["length"],
            "reconstruction": path,
            "epoch_change": values[1:] - values[0],
        }
        out = {name: self._shaped(array) for name, array in found.items()}
        residual = self._shaped(sums["residual"])
        split = self._problem.request.credit == ACTED and "time" in self._problem.groups
        out["residual"] = np.moveaxis(residual, 0, -1) if split else residual.sum(0)
        return out

    def _shaped(self, rows: np.ndarray) -> np.ndarray:
        """Return ``(..., row)`` as ``(..., audit[, output])``."""
        problem = self._problem
        if problem.audited.outputs is None:
            return rows
        apart = rows.reshape(*rows.shape[:-1], problem.outputs, self._n)
        return np.swapaxes(apart, -1, -2)

    # --- to go on from --------------------------------------------------------------------------

    def _state(self) -> dict[str, np.ndarray]:
        out = {f"sum-{name}": array for name, array in self._sums.items()}
        out["tensors"] = self._carried
        for key, adjoint in self._adjoints.items():
            out[f"adjoint{key}"] = np.asarray(adjoint.scales)
            for i, q in enumerate(adjoint.state):
                out[f"adjoint{key}-{i}"] = q.cpu().numpy()
        for window, credit in self._credits.items():
            out[f"credit{window}"] = credit.influence.cpu().numpy()
        return out

    def _resume(self) -> None:
        found = self._writer.resume()
        if found is None:
            return
        left, state = found
        if not np.array_equal(state.get("tensors", self._carried), self._carried):
            return  # carried in another order, as other tensors had factors: begin anew
        self.left = left
        for name in self._sums:
            self._sums[name] = state[f"sum-{name}"]
        windows = range(len(self._problem.windows))
        for key in (-1, *windows):
            if f"adjoint{key}" in state:
                adjoint = self._adjoints[key] = self._begin()
                adjoint.scales = state[f"adjoint{key}"].tolist()
                for i, q in enumerate(adjoint.state):
                    q.copy_(torch.from_numpy(state[f"adjoint{key}-{i}"]))
        for window in windows:
            if f"credit{window}" in state:
                self._open(window)
                held = torch.from_numpy(state[f"credit{window}"])
                self._credits[window].influence.copy_(held)

    @property
    def _carried(self) -> np.ndarray:
        """The tensors whose states are carried, in their order."""
        return np.asarray([tensor for block in self._problem.blocks for tensor in block.tensors])
