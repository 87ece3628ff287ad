"""What the pruning study says: arms against random removal, the paper's claims, figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

from lkarray import workflow

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


def compare(outcomes: Outcomes) -> dict[str, dict[str, dict[str, Any]]]:
    """Return each arm's held-out accuracy (points) and loss (nats) minus random's, by share."""
    return {
        arm: {
            share: {
                "accuracy": _paired(runs, outcomes[RANDOM][share], "accuracy", 100),
                "loss": _paired(runs, outcomes[RANDOM][share], "loss", 1),
            }
            for share, runs in shares.items()
        }
        for arm, shares in outcomes.items()
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
    return np.array([run["held_out"][key] for run in runs])


@dataclass(frozen=True)
class Gaps:
    """Each arm's accuracy minus random's, ``(share, seed)`` points, and the shares."""

    of: dict[str, np.ndarray]
    shares: list[float]

    def means(self, arm: str) -> np.ndarray:
        """Return the mean over shares, by seed."""
        return np.asarray(self.of[arm].mean(0))

    def count(self, arms: Sequence[str], sign: int) -> tuple[int, str]:
        """Return how many arms have a sign for every seed, and what to say of them."""
        right = [arm for arm in arms if (sign * self.means(arm) > 0).all()]
        rest = ", ".join(f"{a} ({self.of[a].mean():+.2f})" for a in arms if a not in right)
        said = f"{len(right)} of {len(arms)} methods" + (f"; not: {rest} points" if rest else "")
        return len(right), said

    def first(
        self, arms: Sequence[str], pick: Callable[[Sequence[float]], Any], wanted: Sequence[str]
    ) -> tuple[bool, str]:
        """Say whether the arm picked at each share is a wanted one, at most shares."""
        chosen = [
            arms[int(pick([self.of[arm][row].mean() for arm in arms]))]
            for row in range(len(self.shares))
        ]
        named = zip(self.shares, chosen, strict=True)
        said = "; ".join(f"{share:.0%}: {arm}" for share, arm in named)
        return sum(arm in wanted for arm in chosen) > len(self.shares) / 2, said


def judge(gaps: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Say of each of the paper's claims whether it holds, and what was measured.

    See Anonymous 2026, A.4.
    """
    of = {
        arm: np.array([entry["accuracy"]["by_seed"] for entry in shares.values()])
        for arm, shares in gaps.items()
    }
    table = Gaps(of, [float(share) for share in next(iter(gaps.values()))])
    least, most = (tuple(a for a in arms if a not in _BASELINES) for arms in FIGURES.values())
    claims = _judge_least(table, least) | _judge_most(table, least, most)
    return {
        claim: {"holds": bool(holds), "measured": said} for claim, (holds, said) in claims.items()
    }


def _judge_least(table: Gaps, least: Sequence[str]) -> dict[str, tuple[bool, str]]:
    above, said_above = table.count(least, 1)
    claims = {
        "Least important: essentially all methods do better than random (all but one at most)": (
            above >= len(least) - 1,
            said_above,
        ),
        "Least important: the least influential are the best to cut (at most shares)": table.first(
            least, np.argmax, _LEAST + _LEAST_EACH
        ),
    }
    for plain, each in zip(_LEAST, _LEAST_EACH, strict=True):
        gain = table.of[each] - table.of[plain]
        claims[f"{each}: gains more over {plain} the more is cut"] = (
            bool((gain[-1] > gain[0]).all() and (gain[-1] > 0).all()),
            "gain by share: " + ", ".join(f"{mean:+.2f}" for mean in gain.mean(1)) + " points",
        )
    return claims


def _judge_most(
    table: Gaps, least: Sequence[str], most: Sequence[str]
) -> dict[str, tuple[bool, str]]:
    harmful = "most harmful"
    below, said_below = table.count(most, -1)
    lowest, said_lowest = table.first((*least, harmful), np.argmin, (harmful,))
    return {
        "Most harmful: below random and every method of figure 21 (at most shares)": (
            lowest and table.count((harmful,), -1)[0] == 1,
            f"{table.of[harmful].mean():+.2f} points; lowest at {said_lowest}",
        ),
        "Most important: all methods cost more than random": (below == len(most), said_below),
        "Most important: the most influential cost least of all methods (at most shares)": (
            table.first(most, np.argmax, _MOST)
        ),
        "Most important: the most helpful or harmful cost most (at most shares)": table.first(
            most, np.argmin, ("most helpful", harmful)
        ),
    }


#: Petroff's colours, told apart with any colour vision; markers tell them apart again.
_STYLES = tuple(
    zip(
        ("#3f90da", "#ffa90e", "#bd1f01", "#832db6", "#a96b59", "#e76300", "#717581"),
        "os^DvPX",
        strict=True,
    )
)


def draw(outcomes: Outcomes, whole: Sequence[dict[str, Any]], arms: Sequence[str]) -> Figure:
    """Draw accuracies of some arms against the share removed, and their differences to random."""
    shares = np.array([float(share) for share in outcomes[RANDOM]])
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = {  # (share, seed), per cent
        arm: np.array([100 * _values(runs, "accuracy") for runs in outcomes[arm].values()])
        for arm in arms
    }
    left.axhline(
        100 * _values(whole, "accuracy").mean(), color="0.3", lw=1.2, ls=":", label="nothing"
    )
    styles = iter(_STYLES)
    for place, (arm, accuracies) in enumerate(values.items()):
        color, marker = ("black", "*") if arm == RANDOM else next(styles)
        x = 100 * shares + 0.6 * (place - (len(arms) - 1) / 2)  # side by side, so that bars show
        for axes, y in ((left, accuracies), (right, accuracies - values[RANDOM])):
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


def rows_of(
    whole: Sequence[dict[str, Any]],
    gaps: dict[str, dict[str, dict[str, Any]]],
    claims: dict[str, dict[str, Any]],
    correlation: float,
) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report."""
    accuracy, loss = (_values(whole, key).mean() for key in ("accuracy", "loss"))
    return [
        *(
            (claim, "holds" if judged["holds"] else "does NOT hold", judged["measured"])
            for claim, judged in claims.items()
        ),
        (
            "Accuracy and loss with all images",
            f"{accuracy:.2%}, {loss:.4f} nats",
            f"{len(whole)} seeds",
        ),
        ("Audit: correlation with the true changes (LC)", f"{correlation:.6f}", ""),
        *(
            (
                f"{arm}, {float(share):.0%} removed: accuracy minus random's",
                "{mean:+.2f} points [{low:+.2f}, {high:+.2f}], ".format(**gap["accuracy"])
                + ("every seed" if gap["accuracy"]["every_seed"] else "not every seed"),
                "loss {mean:+.4f} nats [{low:+.4f}, {high:+.4f}]".format(**gap["loss"]),
            )
            for arm, shares in gaps.items()
            for share, gap in shares.items()
        ),
    ]


def figures_of(outcomes: Outcomes, whole: Sequence[dict[str, Any]]) -> list[workflow.Figure]:
    """Return the figures of the report."""
    captions = {
        "least_important": "Images that should matter least (Anonymous 2026, figure 21). The most "
        "harmful are in the other figure, as in the paper.",
        "most_important": "Images that should matter most (figure 22).",
    }
    about = (
        " Left: mean accuracy on test images that the audit never saw; bars reach over the seeds. "
        "Right: the same minus that of random removal, seed by seed."
    )
    return [
        workflow.Figure(
            name,
            f"Removing the {name.replace('_', ' ')}",
            captions[name] + about,
            draw(outcomes, whole, arms),
        )
        for name, arms in FIGURES.items()
    ]
