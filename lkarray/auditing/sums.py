"""What a panel's audited numbers add up to, beside the influences."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lkarray.auditing.problem import Problem
from lkarray.schema import TIME


class Sums:
    """Sums over the steps taken so far, from the last one backwards, in float64.

    Parameters
    ----------
    problem
        The audit.
    count
        Audited examples of the panel. A row is an audited number: of each output, those of every
        example.
    """

    def __init__(self, problem: Problem, count: int) -> None:
        self._problem, self._count = problem, count
        rows = count * problem.outputs
        first_steps = [start for _, start, _ in problem.epochs]
        self._edges = np.asarray([*first_steps, problem.stop])
        windows = len(problem.windows) if problem.by_acted else 1
        self._arrays = {
            "path": np.zeros((len(first_steps), rows)),
            "length": np.zeros(rows),
            "total": np.zeros(rows),
            "residual": np.zeros((windows, rows)),
            "values": np.zeros((len(self._edges), rows)),
        }

    def is_edge(self, step: int) -> bool:
        """Say whether the audited numbers are wanted before a step: where an epoch begins or ends.

        The number of steps stands for the end of the run.
        """
        return step in self._edges

    def keep_values(self, step: int, values: Tensor) -> None:
        """Keep the audited numbers at an edge, ``(row,)``."""
        edge = np.flatnonzero(self._edges == step)[0]
        self._arrays["values"][edge] = values.double().cpu().numpy()

    def add_path(self, step: int, along: Tensor) -> None:
        """Add the mean gradients times a step, ``(row,)``."""
        terms = along.cpu().numpy()
        epoch = int(np.searchsorted(self._edges, step, side="right")) - 1
        self._arrays["path"][epoch] += terms
        self._arrays["length"] += np.abs(terms)

    def add_residual(self, window: int, residual: Tensor) -> None:
        """Add to the residual of a window of time, ``(row,)``; there is one where they share it."""
        self._arrays["residual"][window] += residual.cpu().numpy()

    def add_influence(self, influence: Tensor) -> None:
        """Add a window's influence, ``(layer, example or group, row)``, to the total."""
        self._arrays["total"] += influence.sum((0, 1), dtype=torch.float64).cpu().numpy()

    def results(self) -> dict[str, np.ndarray]:
        """Return the sums as they are stored, ``(..., audit[, output])``."""
        values = self._arrays["values"]  # (edge, row), edges ascending
        path = self._arrays["path"].cumsum(0)  # (epoch, row), by the end of each
        sums = {
            "change": values[-1] - values[0],
            "total": self._arrays["total"],
            "path": path[-1],
            "length": self._arrays["length"],
            "reconstruction": path,
            "epoch_change": values[1:] - values[0],
        }
        out = {name: self._by_audit(array) for name, array in sums.items()}
        residual = self._by_audit(self._arrays["residual"])
        split = self._problem.by_acted and TIME in self._problem.groups
        out["residual"] = np.moveaxis(residual, 0, -1) if split else residual.sum(0)
        return out

    def _by_audit(self, array: np.ndarray) -> np.ndarray:
        """Return ``(..., row)`` as ``(..., audit[, output])``."""
        if self._problem.audited.outputs is None:
            return array
        apart = array.reshape(*array.shape[:-1], self._problem.outputs, self._count)
        return np.swapaxes(apart, -1, -2)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what a pass can go on from."""
        return {f"sum-{name}": array for name, array in self._arrays.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take back what `arrays` gave."""
        for name in self._arrays:
            self._arrays[name] = state[f"sum-{name}"]
