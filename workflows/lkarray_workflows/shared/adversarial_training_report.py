"""What the study of training on attacked images says: table 3 of Anonymous 2026, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lkarray import plots, workflow
from lkarray_workflows.shared.images import CLASSES

NETWORKS = ("standard", "attacked")
SHARES = (0.9, 0.95, 0.99)
#: Table 3 of the paper, of MNIST, and the ratio of energies beside it.
PAPER = {
    "standard": {"0.9": 12, "0.95": 32, "0.99": 109, "energy_ratio": 120},
    "attacked": {"0.9": 28, "0.95": 60, "0.99": 143, "energy_ratio": 53},
}
Row = tuple[str, str, str]


def report(study: workflow.Study[Any], homes: Sequence[workflow.Study[Any]]) -> None:
    """Write the report folder, of pairs of networks in folders of their own."""
    config = study.config
    numbers = {name: [home.read(f"{name}.json") for home in homes] for name in NETWORKS}
    compared = compare(numbers)
    claims = judge(compared)
    study.report(
        title="What training on attacked images changes",
        summary=f"{config.network} on {CLASSES[config.dataset][0]}, {config.epochs} epochs, Adam "
        f"{config.learning_rate:g}; attacks by PGD within {config.radius:g}, "
        f"{config.attack_steps} steps of it on each training batch, 40 where robustness "
        f"is measured; {config.seeds} pairs of networks. The paper's numbers are of MNIST.",
        metrics={
            "networks": numbers,
            "claims": claims,
            "more_modes": {str(share): compared[str(share)] for share in SHARES},
            "energy_ratio_quotient": compared["same_energy_ratio"],
        },
        rows=rows_of(numbers, config.radius, config.modes)
        + [(claim, "holds" if held else "does NOT hold", "") for claim, held in claims.items()],
        figures=[
            workflow.Figure(
                "energy",
                "Energy of training gradients by modes",
                "Share that the leading modes hold; a line for each network.",
                draw(homes),
            ),
            *(
                workflow.Figure(
                    f"images_{name}",
                    f"Images that fool the {name} network",
                    "Clean, attacked, with as much noise, and the attack.",
                    draw_images(homes[0], name),
                )
                for name in NETWORKS
            ),
        ],
        next_steps=f"lkarray run adversarial --radius {config.radius:g}",
    )


def compare(numbers: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Return of each pair of networks what training on attacked images multiplies, or adds."""
    pairs = list(zip(numbers["standard"], numbers["attacked"], strict=True))
    return {
        **{
            share: [attacked["ranks"][share] / plain["ranks"][share] for plain, attacked in pairs]
            for share in map(str, SHARES)
        },
        "same_energy_ratio": [
            attacked["same_energy_ratio"] / plain["same_energy_ratio"] for plain, attacked in pairs
        ],
        "active": [
            attacked["active"]["mean"] - plain["active"]["mean"] for plain, attacked in pairs
        ],
    }


def judge(compared: dict[str, list[float]]) -> dict[str, bool]:
    """Say which claims hold for every pair."""
    return {
        "training on attacked images needs more modes for 90% of the energy": (
            min(compared["0.9"]) > 1
        ),
        "... for 95%": min(compared["0.95"]) > 1,
        "... for 99%": min(compared["0.99"]) > 1,
        "attacks amplify its gradients less, of the same images": (
            max(compared["same_energy_ratio"]) < 1
        ),
        "its coefficients move along more input directions": min(compared["active"]) > 0,
    }


def rows_of(numbers: dict[str, list[dict[str, Any]]], radius: float, modes: int) -> list[Row]:
    """Return the table at the top of the report."""

    def row(what: str, form: str, paper: str = "") -> Row:
        text = "; ".join(
            f"{name} " + ", ".join(form.format(**measured) for measured in numbers[name])
            for name in NETWORKS
        )
        return what, text, paper

    return [
        row("Right: test images", "{accuracy:.1%}", "paper: similar"),
        row(f"... attacked within {radius:g}", "{robust:.1%}", "paper: attacked 36%"),
        *(
            row(
                f"Modes that hold {share:.0%} of the energy of training gradients",
                f"{{ranks[{share}]}}",
                "paper: " + ", ".join(f"{name} {PAPER[name][str(share)]}" for name in NETWORKS),
            )
            for share in SHARES
        ),
        row(
            "Energy of gradients, attacked over clean images",
            "{energy_ratio:.1f}",
            "paper: about 120, 53",
        ),
        row("... of images that both get right, fooled or not", "{same_energy_ratio:.2f}"),
        row("... with as much noise over clean", "{random_energy_ratio:.2f}"),
        row(
            f"Input directions along which no coefficient of {modes} modes moves, mean",
            "{nullspace[mean]:.0f}",
            "paper: at least pixels minus modes",
        ),
        row(
            "Input directions that hold 99% of how they move: mean of images, of all images "
            "together",
            "{active[mean]:.1f} ({active_of_all})",
        ),
    ]


def draw(homes: Sequence[workflow.Study[Any]]) -> Figure:
    """Draw the cumulative energy of each network's modes."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for name, color, style in zip(NETWORKS, ("#0072B2", "#D55E00"), ("-", "--"), strict=True):
        for i, home in enumerate(homes):
            energy = home.load(f"{name}.npz")["spectrum"] ** 2
            share = np.cumsum(energy) / energy.sum()
            axes.plot(
                np.arange(1, len(share) + 1),
                share,
                color=color,
                ls=style,
                label=None if i else f"{name} images",
            )
    for share in SHARES:
        axes.axhline(share, color="0.7", lw=0.8, zorder=0)
    axes.set(xscale="log", xlabel="leading modes", ylabel="share of energy", ylim=(0, 1.02))
    axes.legend(frameon=False, title="trained on")
    axes.grid(alpha=0.25)
    return figure


def draw_images(home: workflow.Study[Any], name: str, count: int = 4) -> Figure:
    """Show clean and attacked images of a network."""
    arrays = home.load(f"{name}.npz")
    columns = {
        kind: [np.moveaxis(x, 0, -1) for x in arrays[kind][:count]]
        for kind in ("clean", "adversarial", "random")
    }
    if arrays["clean"].shape[1] == 1:
        columns = {kind: [x.squeeze(-1) for x in images] for kind, images in columns.items()}
    pairs = zip(columns["adversarial"], columns["clean"], strict=True)
    columns["attack"] = [attacked - clean for attacked, clean in pairs]
    return plots.image_rows(list(zip(*columns.values(), strict=True)), list(columns))
