"""What the pruning study says: arms against random removal, the paper's claims, figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

NOTHING, RANDOM = "nothing", "random"
_BASELINES = (RANDOM, "random of each class")
_LEAST = ("least influential", "least influential, net")
_LEAST_EACH = ("least influential of each class", "least influential of each class, net")
_MOST = ("most influential", "most influential, net")
#: The arms of each figure of the paper: 21, and 22.
FIGURES = {
    "least_important": (
        RANDOM,
        "most redundant",
        "most redundant, up-weighted",
        *_LEAST,
        *_LEAST_EACH,
        "random of each class",
    ),
    "most_important": (
        RANDOM,
        "most redundant",
        "whole clusters",
        *_MOST,
        "most helpful",
        "most harmful",
    ),
}

Outcomes = dict[str, dict[str, list[dict[str, Any]]]]  # of each seed, by arm and share


def compare(found: Outcomes) -> dict[str, dict[str, dict[str, Any]]]:
    """Return each arm's held-out accuracy (points) and loss (nats) minus random's, by share."""
    return {
        arm: {
            share: {
                "accuracy": _paired(runs, found[RANDOM][share], "accuracy", 100),
                "loss": _paired(runs, found[RANDOM][share], "loss", 1),
            }
            for share, runs in shares.items()
        }
        for arm, shares in found.items()
        if arm != RANDOM
    }


def _paired(
    runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], key: str, scale: float
) -> dict[str, Any]:
    gaps = scale * (_values(runs, key) - _values(others, key))
    mean = float(gaps.mean())
    half = float(student.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps) ** 0.5)
    return {
        "by_seed": gaps.tolist(),
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "every_seed": bool((gaps * np.sign(mean) > 0).all()),
    }


def _values(runs: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([one["held_out"][key] for one in runs])


def judge(gaps: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Say of each of the paper's claims whether it holds, and what was measured (PLGK A.4)."""
    at = {  # (share, seed)
        arm: np.array([one["accuracy"]["by_seed"] for one in shares.values()])
        for arm, shares in gaps.items()
    }
    shares = [float(share) for share in next(iter(gaps.values()))]
    least, most = (tuple(a for a in arms if a not in _BASELINES) for arms in FIGURES.values())
    harmful = "most harmful"

    def count(arms: Sequence[str], sign: int) -> tuple[int, str]:
        right = [arm for arm in arms if (sign * at[arm].mean(0) > 0).all()]
        rest = ", ".join(f"{a} ({at[a].mean():+.2f})" for a in arms if a not in right)
        said = f"{len(right)} of {len(arms)} methods" + (f"; not: {rest} points" if rest else "")
        return len(right), said

    def first(
        arms: Sequence[str], pick: Callable[[Sequence[float]], Any], wanted: Sequence[str]
    ) -> tuple[int, str]:
        chosen = [arms[int(pick([at[arm][s].mean() for arm in arms]))] for s in range(len(shares))]
        said = "; ".join(f"{share:.0%}: {arm}" for share, arm in zip(shares, chosen, strict=True))
        return sum(arm in wanted for arm in chosen), said

    half = len(shares) / 2
    above, said_above = count(least, 1)
    below, said_below = count(most, -1)
    best, said_best = first(least, np.argmax, _LEAST + _LEAST_EACH)
    worst, said_worst = first(most, np.argmin, ("most helpful", harmful))
    mildest, said_mildest = first(most, np.argmax, _MOST)
    low, said_low = first((*least, harmful), np.argmin, (harmful,))
    out = {
        "Least important: essentially all methods do better than random (all but one at most)": (
            above >= len(least) - 1,
            said_above,
        ),
        "Least important: the least influential are the best to cut (at most shares)": (
            best > half,
            said_best,
        ),
    }
    for of, each in zip(_LEAST, _LEAST_EACH, strict=True):
        gain = at[each] - at[of]
        out[f"{each}: gains more over {of} the more is cut"] = (
            bool((gain[-1] > gain[0]).all() and (gain[-1] > 0).all()),
            "gain by share: " + ", ".join(f"{one:+.2f}" for one in gain.mean(1)) + " points",
        )
    out |= {
        "Most harmful: below random and every method of figure 21 (at most shares)": (
            low > half and count((harmful,), -1)[0] == 1,
            f"{at[harmful].mean():+.2f} points; lowest at {said_low}",
        ),
        "Most important: all methods cost more than random": (below == len(most), said_below),
        "Most important: the most influential cost least of all methods (at most shares)": (
            mildest > half,
            said_mildest,
        ),
        "Most important: the most helpful or harmful cost most (at most shares)": (
            worst > half,
            said_worst,
        ),
    }
    return {claim: {"holds": bool(holds), "measured": said} for claim, (holds, said) in out.items()}


#: Petroff's colours, told apart with any colour vision; markers tell them apart again.
_STYLES = tuple(
    zip(
        ("#3f90da", "#ffa90e", "#bd1f01", "#832db6", "#a96b59", "#e76300", "#717581"),
        "os^DvPX",
        strict=True,
    )
)


def draw(found: Outcomes, whole: Sequence[dict[str, Any]], arms: Sequence[str]) -> Figure:
    """Draw accuracies of some arms against the share removed, and their differences to random."""
    shares = np.array([float(share) for share in found[RANDOM]])
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = {  # (share, seed), per cent
        arm: np.array([100 * _values(runs, "accuracy") for runs in found[arm].values()])
        for arm in arms
    }
    left.axhline(
        100 * _values(whole, "accuracy").mean(), color="0.3", lw=1.2, ls=":", label="nothing"
    )
    styles = iter(_STYLES)
    for place, (arm, of) in enumerate(values.items()):
        color, marker = ("black", "*") if arm == RANDOM else next(styles)
        x = 100 * shares + 0.6 * (place - (len(arms) - 1) / 2)  # side by side, so that bars show
        for axes, y in ((left, of), (right, of - values[RANDOM])):
            if axes is right and arm == RANDOM:
                continue
            mean = y.mean(1)
            bars = np.stack([mean - y.min(1), y.max(1) - mean])
            axes.errorbar(
                x,
                mean,
                bars,
                color=color,
                marker=marker,
                ms=7,
                lw=1.5,
                elinewidth=1,
                ls="--" if arm == RANDOM else "-",
                label=arm,
            )
    right.axhline(0, color="black", lw=1.2, ls="--")
    left.set(ylabel="accuracy on held-out test images (%)", title="Accuracy")
    right.set(ylabel="accuracy minus random's (points)", title="Minus random removal, by seed")
    for axes in (left, right):
        axes.set(xlabel="training images removed (%)", xticks=100 * shares)
        axes.grid(alpha=0.25)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        frameon=False,
    )
    return figure
