"""Where between two states of the path a gradient is taken, and what it weighs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Nodes within a step, from 0 (before it) to 1 (after it), and their weights.
RULES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "euler": ((0.0,), (1.0,)),
    "trapezoid": ((0.0, 1.0), (0.5, 0.5)),
    "midpoint": ((0.5,), (1.0,)),
    "simpson": ((0.0, 0.5, 1.0), (1 / 6, 4 / 6, 1 / 6)),
}


@dataclass(frozen=True, kw_only=True)
class Stencil:
    """A rule of integration along a straight stretch of the path.

    Attributes
    ----------
    nodes
        Ascending, from 0 to 1.
    weights
        Of the nodes; their sum is 1.
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]


def stencil(rule: str, supersample: int = 1) -> Stencil:
    """Return a rule, repeated on ``supersample`` equal pieces of the stretch.

    ``trapezoid`` on two of them is the stencil 1/4, 1/2, 1/4 of Anonymous 2026, A.2.7.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {sorted(RULES)}, not {rule!r}")
    if not isinstance(supersample, int) or supersample < 1:
        raise ValueError(f"supersample must be a positive integer, not {supersample!r}")
    nodes, weights = RULES[rule]
    total: dict[float, float] = {}
    for stretch in range(supersample):
        for node, weight in zip(nodes, weights, strict=True):
            # Rounded: the end of one stretch and the beginning of the next are one node.
            place = float(np.round((stretch + node) / supersample, 12))
            total[place] = total.get(place, 0.0) + weight / supersample
    return Stencil(nodes=tuple(sorted(total)), weights=tuple(total[node] for node in sorted(total)))


def stretches(start: int, stop: int, stride: int) -> list[tuple[int, int]]:
    """Return the stretches ``[a, b)`` of ``stride`` steps, the last perhaps shorter."""
    return [(a, min(a + stride, stop)) for a in range(start, stop, stride)]
