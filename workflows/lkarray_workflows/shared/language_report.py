"""What neighbours of tokens share, as a figure."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

#: Shared by a token and its neighbours: a coordinate, and what to call it.
SHARED = {
    "next": "next token",
    "kind": "kind of next token",
    "previous": "previous token",
    "previous_kind": "kind of previous token",
    "sample": "window of text",
}


def draw_lifts(lifts: dict[str, dict[str, Any]]) -> Figure:
    """Draw what neighbours share, by each search."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for offset, (search, marker, color) in zip(
        (-0.12, 0.12), (("all", "o", "#3f90da"), ("other next token", "s", "#bd1f01")), strict=True
    ):
        names = [name for name in SHARED if name in lifts[search]]
        lines = np.array([list(SHARED).index(name) for name in names])
        lift, low, high = (
            np.array([lifts[search][n][key] for n in names]) for key in ("lift", "low", "high")
        )
        axes.errorbar(
            lift,
            lines + offset,
            xerr=np.abs([lift - low, high - lift]),
            fmt=marker,
            color=color,
            capsize=3,
            label=f"neighbours: {search}",
        )
    axes.axvline(1, color="black", lw=1, ls=":")
    axes.set_yticks(range(len(SHARED)), list(SHARED.values()))
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="lift (chance: 1)")
    axes.grid(axis="x", alpha=0.25)
    axes.legend(frameon=False)
    return figure
