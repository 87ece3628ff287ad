"""The windows of time that are open: the influence they gain, and the adjoints that reach them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lkarray.auditing.adjoint import Adjoint
from lkarray.auditing.blocks import Block
from lkarray.auditing.places import BatchPlaces
from lkarray.auditing.problem import Problem

#: The key of the one adjoint of all windows, where influence counts when an example is seen.
SHARED = -1


@dataclass(frozen=True, kw_only=True)
class Reach:
    """An adjoint that reaches a step.

    Attributes
    ----------
    window
        The one that its residual belongs to; the first where all share it.
    adjoint
        The adjoint.
    inside
        Whether it takes up the step's mean gradients: the shared one always, a window's own one
        where the step is in that window.
    gaining
        The windows that its products are added to.
    """

    window: int
    adjoint: Adjoint
    inside: bool
    gaining: Sequence[int]


class Windows:
    """What is carried back for each window of time, and what each has gained.

    By ``credit="seen"`` one adjoint serves all windows, and a step's products go to the windows
    that it is in. By ``credit="acted"`` each window has an adjoint, which goes on before the
    window's beginning, until momentum has forgotten what came before.

    Parameters
    ----------
    problem
        The audit.
    blocks
        Its tensors.
    rows
        Audited numbers of the panel.
    """

    def __init__(self, problem: Problem, blocks: Sequence[Block], rows: int) -> None:
        self._problem, self._blocks, self._rows = problem, blocks, rows
        self._like = problem.flat.theta
        self._adjoints: dict[int, Adjoint] = {} if problem.by_acted else {SHARED: self._begin()}
        # (layer, example or group, row) of each open window
        self._influence: dict[int, Tensor] = {}

    def _begin(self) -> Adjoint:
        stateless = self._problem.updates.stateless
        return Adjoint.begin(self._blocks, self._rows, self._like, stateless=stateless)

    def _open(self, window: int) -> None:
        if window in self._influence:
            return
        shape = (self._problem.layers, self._problem.places.length, self._rows)
        self._influence[window] = self._like.new_zeros(shape)
        if self._problem.by_acted:
            self._adjoints[window] = self._begin()

    def reaching(self, step: int) -> list[Reach]:
        """Return the adjoints that reach a step; opens the windows that it is in."""
        inside = [w for w, (a, b) in enumerate(self._problem.windows) if a <= step < b]
        for window in inside:
            self._open(window)
        if not self._problem.by_acted:
            shared = self._adjoints[SHARED]
            return [Reach(window=0, adjoint=shared, inside=True, gaining=inside)]
        return [
            Reach(window=window, adjoint=adjoint, inside=window in inside, gaining=[window])
            for window, adjoint in self._adjoints.items()
        ]

    def adder(self, windows: Sequence[int], batch: BatchPlaces) -> Callable[[int, Tensor], None]:
        """Return what adds products to the influence of some windows, layer by layer."""
        device = self._like.device
        places = torch.from_numpy(batch.places).to(device)
        members = None if batch.each_once else torch.from_numpy(batch.members).to(device)

        def add(layer: int, products: Tensor) -> None:
            by_place = products.T if members is None else products.T[members]  # (place, row)
            for window in windows:
                self._influence[window][layer].index_add_(0, places, by_place)

        return add

    def close(self, step: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the windows that can gain nothing before a step, with their influence."""
        problem = self._problem
        for window in list(self._influence):
            start, _ = problem.windows[window]
            if step > start:
                continue
            if problem.by_acted:
                if step > problem.start and not self._spent(start, step):
                    continue
                del self._adjoints[window]
            yield window, self._influence.pop(window)

    def _spent(self, start: int, step: int) -> bool:
        """Say whether momentum has forgotten, by a step, what a later one did."""
        if self._problem.updates.stateless:
            return True
        momentum = self._problem.updates.largest_momentum(step, start)
        return bool(momentum < 1e-3 * torch.finfo(self._like.dtype).eps)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what a pass can go on from."""
        out: dict[str, np.ndarray] = {}
        for key, adjoint in self._adjoints.items():
            out |= adjoint.arrays(f"adjoint{key}")
        for window, influence in self._influence.items():
            out[f"credit{window}"] = influence.cpu().numpy()
        return out

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take back what `arrays` gave."""
        for window in range(len(self._problem.windows)):
            if f"credit{window}" in state:
                self._open(window)
                self._influence[window].copy_(torch.from_numpy(state[f"credit{window}"]))
        for key, adjoint in self._adjoints.items():
            adjoint.restore(f"adjoint{key}", state)
