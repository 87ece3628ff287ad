"""Does training on attacked images spread what a network learns over more modes? (PLGK 6.3.1).

Two networks learn the same images for as many steps: one as they are, the other as attacked at
each step (PGD-AT, Madry et al. 2017). Of both: how many modes hold the energy of the training
gradients (table 3), how much larger the gradients of attacked images are than those of clean ones,
and in how few directions of the input the mode coefficients move: the rest is the nullspace, along
which the network's learning does not see an input change.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from lkarray_workflows.shared.attacks import attack, make_pairs, require_foolbox
from lkarray_workflows.shared.images import CLASSES
from lkarray_workflows.shared.recorded import (
    Trained,
    Training,
    check,
    discard,
    fit,
    logits_of,
    plan,
    require_enough,
    train,
)
from matplotlib.figure import Figure
from pydantic import Field, model_validator
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import plots, workflow

NETWORKS = ("standard", "attacked")
SHARES = (0.9, 0.95, 0.99)
#: Table 3 of the paper, of MNIST, and the ratio of energies beside it.
PAPER = {
    "standard": {"0.9": 12, "0.95": 32, "0.99": 109, "energy_ratio": 120},
    "attacked": {"0.9": 28, "0.95": 60, "0.99": 143, "energy_ratio": 53},
}


class Config(Training):
    """Settings. A step on attacked images costs as many passes more as the attack has steps."""

    presets: ClassVar = {
        "paper": {
            "dataset": "mnist",
            "epochs": 50,
            "learning_rate": 1.5e-5,
            "features": 5000,
            "parts": 50,
        },
        "small": {
            "batches": 10,
            "batch_size": 64,
            "epochs": 6,
            "learning_rate": 2e-3,
            "features": 150,
            "pairs": 8,
            "tried": 200,
            "parts": 2,
            "attack_steps": 3,
            "modes": 40,
            "seeds": 1,
        },
    }

    epochs: int = Field(10, ge=2)
    learning_rate: float = Field(1e-4, gt=0, description="of Adam")
    radius: float = Field(0.05, gt=0, description="of the attacks, largest change of a pixel")
    attack_steps: int = Field(5, ge=1, description="of the attack on each training batch")
    parts: int = Field(5, ge=1, description="that training on attacked images is kept in")
    features: int = Field(1000, ge=100, description="training images whose gradients give modes")
    pairs: int = Field(64, ge=2, description="images attacked, of either network")
    tried: int = Field(2000, ge=10, description="test images for robust accuracy")
    modes: int = Field(100, ge=10, description="whose coefficients' slopes are compared")
    seeds: int = Field(2, ge=1, description="pairs of networks")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        images = self.batches * self.batch_size
        require_enough(
            self, {"modes": self.features, "features": images, "parts": self.batches * self.epochs}
        )
        return self


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    check(config, config.seeds)
    require_foolbox()
    with workflow.Run("adversarial_training", config, folder) as state:
        runs = []
        for seed in range(config.seed, config.seed + config.seeds):
            home = folder if seed == config.seed else folder / f"seed_{seed}"
            every = config.batches * config.epochs  # the first state and the last
            found = train(state, config, home, progress, seed=seed, every=every)
            runs.append(Paths(home, found))
            for part in range(config.parts):
                work = partial(train_attacked, config, runs[-1], part, progress)
                state.stage(f"attacked {seed}, {part + 1}", work, [runs[-1].part(part)])
            for name in NETWORKS:
                work = partial(measure, config, runs[-1], name, progress)
                state.stage(f"{name} {seed}", work, [runs[-1].numbers(name)])
        index = folder / "report" / "index.html"
        state.stage("report", partial(report, config, runs, state), [index])
        discard(config, *(paths.run for paths in runs))
    return f"Report  {index}"


class Paths:
    """Where the files about one pair of networks are."""

    def __init__(self, folder: Path, run: Trained) -> None:
        self.folder, self.run = folder, run

    def part(self, part: int) -> Path:
        """Return the network and its optimizer after a part of the training."""
        return self.folder / f"attacked_{part + 1}.pt"

    def numbers(self, name: str) -> Path:
        """Return what was measured of a network."""
        return self.folder / f"{name}.json"

    def arrays(self, name: str) -> Path:
        """Return its spectrum and its images."""
        return self.folder / f"{name}.npz"

    def network(self, config: Config, name: str) -> nn.Sequential:
        """Return a trained network."""
        model: nn.Sequential = self.run.untrained()
        if name == "standard":
            weights = torch.load(self.run.model, weights_only=True)
        else:
            weights = torch.load(self.part(config.parts - 1), weights_only=True)["model"]
        model.load_state_dict(weights)
        return model.eval()


def train_attacked(config: Config, paths: Paths, part: int, show: bool) -> None:
    """Train on for a part of the steps, on images attacked anew at each."""
    run_, data = paths.run, paths.run.images("train")
    steps = config.batches * config.epochs
    ends = np.linspace(0, steps, config.parts + 1).round().astype(int)
    first, last = int(ends[part]), int(ends[part + 1])
    batches = plan(len(data), config.batch_size, steps, run_.seed)[first:last]
    model = run_.untrained()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    if part:
        before = torch.load(paths.part(part - 1), weights_only=True)
        model.load_state_dict(before["model"])
        optimizer.load_state_dict(before["optimizer"])
    seeds = iter(range(first, last))  # of the random starts: the same whatever is gone on with

    def altered(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        moved, _ = attack(
            model,
            images,
            labels,
            radius=config.radius,
            steps=config.attack_steps,
            seed=next(seeds),
        )
        out: torch.Tensor = moved
        return out

    fit(model, data, batches, config.learning_rate, show=show, altered=altered, optimizer=optimizer)
    with workflow.replacing(paths.part(part)) as new:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, new)


def measure(config: Config, paths: Paths, name: str, show: bool) -> None:
    """Measure a network: accuracy, spectrum, energies, directions of the input."""
    run_, model = paths.run, paths.network(config, name)
    data = run_.images("train")
    images, labels = (x[: config.tried] for x in run_.images("test").tensors)
    right = logits_of(model, images).argmax(1) == labels
    attacked, _ = attack(model, images, labels, radius=config.radius, seed=run_.seed)
    robust = logits_of(model, attacked).argmax(1) == labels
    pairs = make_pairs(
        model, data, config.pairs, kind="pgd", radius=config.radius, seed=run_.seed, errors=False
    )
    where = paths.folder / f"{name}.zarr"
    trace = lk.snapshot(model, data, store=where)
    options: dict[str, Any] = {"store": where, "progress": show}
    both = right_in_both(config, paths)
    moved, _ = attack(model, *both, radius=config.radius, seed=run_.seed)
    G = lk.gradient_features(trace, np.arange(config.features), [1], **options).isel(time=0)
    square = np.linalg.eigvalsh(lk.lgk(G).values.astype(np.float64))[::-1]
    values = np.sqrt(np.maximum(square, 0))
    ranks = {str(share): int(lk.energy_rank(values, share)) for share in SHARES}

    def energy_of(inputs: TensorDataset, name: str) -> float:
        """Return the mean square of the gradients' norms."""
        part = lk.gradient_features(trace, inputs, [1], name=name, **options)
        return float((part["gradient"].astype(np.float64) ** 2).sum("param").mean())

    energy = {kind: energy_of(pairs.data([kind]), kind) for kind in pairs.images}
    shared = {
        kind: energy_of(TensorDataset(of, both[1]), f"same_{kind}")
        for kind, of in (("clean", both[0]), ("adversarial", moved))
    }
    found = lk.modes(G, config.modes).compute()
    slopes = lk.mode_sensitivity(trace, found, pairs.data(["clean"]), 1, whole=True)["slope"]
    spectra = np.linalg.svd(slopes.values.astype(np.float64), compute_uv=False)
    size = slopes.sizes["input"]
    # Few have no slope at all: their coefficients do not move whatever is done to the image.
    active = np.array([int(lk.energy_rank(s, 0.99)) if s[0] > 0 else 0 for s in spectra])
    rank = np.array([int((s > s[0] * 1e-6).sum()) for s in spectra])
    joint = np.linalg.svd(
        slopes.values.reshape(-1, size).astype(np.float64), compute_uv=False
    )  # of all images together
    pictures: dict[str, Any] = {k: x.numpy() for k, x in pairs.images.items()}
    np.savez(paths.arrays(name), spectrum=values, **pictures)
    paths.numbers(name).write_text(
        json.dumps(
            {
                "accuracy": float(right.double().mean()),
                "robust": float(robust.double().mean()),
                "fooled": pairs.fooled,
                "ranks": ranks,
                "energy": energy,
                "energy_ratio": energy["adversarial"] / energy["clean"],
                "random_energy_ratio": energy["random"] / energy["clean"],
                "same_energy_ratio": shared["adversarial"] / shared["clean"],
                "participation_ratio": float(lk.participation_ratio(values)),
                "inputs": size,
                "modes": config.modes,
                "nullspace": {"mean": float(size - rank.mean()), "least": int(size - rank.max())},
                "active": {"mean": float(active.mean()), "most": int(active.max())},
                "active_of_all": int(lk.energy_rank(joint, 0.99)),
            }
        )
    )
    if not config.keep:
        lk.discard_gradients(where)


def right_in_both(config: Config, paths: Paths) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images that both networks get right, whether or not an attack fools them."""
    images, labels = paths.run.images("train").tensors
    right = torch.ones(len(labels), dtype=torch.bool)
    for name in NETWORKS:
        right &= logits_of(paths.network(config, name), images).argmax(1) == labels
    return images[right][: config.pairs], labels[right][: config.pairs]


# --- report -----------------------------------------------------------------------------------


def report(config: Config, runs: list[Paths], state: workflow.Run) -> None:
    """Write the report folder."""
    numbers = {
        name: [json.loads(paths.numbers(name).read_text()) for paths in runs] for name in NETWORKS
    }
    rows: list[tuple[str, str, str]] = []

    def add(what: str, value: Any, form: str, paper: str = "") -> None:
        text = "; ".join(
            f"{name} " + ", ".join(form.format(value(one)) for one in numbers[name])
            for name in NETWORKS
        )
        rows.append((what, text, paper))

    add("Right: test images", lambda one: one["accuracy"], "{:.1%}", "paper: similar")
    add(
        f"... attacked within {config.radius:g}",
        lambda one: one["robust"],
        "{:.1%}",
        "paper: attacked 36%",
    )
    for share in map(str, SHARES):
        paper = ", ".join(f"{name} {PAPER[name][share]}" for name in NETWORKS)
        add(
            f"Modes that hold {float(share):.0%} of the energy of training gradients",
            lambda one, share=share: one["ranks"][share],
            "{}",
            f"paper: {paper}",
        )
    add(
        "Energy of gradients, attacked over clean images",
        lambda one: one["energy_ratio"],
        "{:.1f}",
        "paper: about 120, 53",
    )
    add(
        "... of images that both get right, fooled or not",
        lambda one: one["same_energy_ratio"],
        "{:.2f}",
    )
    add("... with as much noise over clean", lambda one: one["random_energy_ratio"], "{:.2f}")
    add(
        f"Input directions along which no coefficient of {config.modes} modes moves, mean",
        lambda one: one["nullspace"]["mean"],
        "{:.0f}",
        "paper: at least pixels minus modes",
    )
    add(
        "Input directions that hold 99% of how they move: mean of images, of all images together",
        lambda one: "{:.1f} ({})".format(one["active"]["mean"], one["active_of_all"]),
        "{}",
    )
    more = {
        share: [
            a["ranks"][share] / s["ranks"][share]
            for s, a in zip(*(numbers[n] for n in NETWORKS), strict=True)
        ]
        for share in map(str, SHARES)
    }
    less = [
        a["same_energy_ratio"] / s["same_energy_ratio"]
        for s, a in zip(*(numbers[n] for n in NETWORKS), strict=True)
    ]
    wider = [
        a["active"]["mean"] - s["active"]["mean"]
        for s, a in zip(*(numbers[n] for n in NETWORKS), strict=True)
    ]
    claims = {
        "training on attacked images needs more modes for 90% of the energy": min(more["0.9"]) > 1,
        "... for 95%": min(more["0.95"]) > 1,
        "... for 99%": min(more["0.99"]) > 1,
        "attacks amplify its gradients less, of the same images": max(less) < 1,
        "its coefficients move along more input directions": min(wider) > 0,
    }
    rows += [(claim, "holds" if held else "does NOT hold", "") for claim, held in claims.items()]
    workflow.write_report(
        workflow.Report(
            title="What training on attacked images changes",
            summary=[
                f"{config.network} on {CLASSES[config.dataset][0]}, {config.epochs} epochs, Adam "
                f"{config.learning_rate:g}; attacks by PGD within {config.radius:g}, "
                f"{config.attack_steps} steps of it on each training batch, 40 where robustness "
                f"is measured; {config.seeds} pairs of networks. The paper's numbers are of MNIST."
            ],
            metrics={
                "networks": numbers,
                "claims": claims,
                "more_modes": more,
                "energy_ratio_quotient": less,
                "seconds": state.seconds(),
                "config": config.model_dump(mode="json"),
            },
            rows=rows,
            figures=[
                workflow.Figure(
                    "energy",
                    "Energy of training gradients by modes",
                    "Share that the leading modes hold; a line for each network.",
                    draw(runs),
                ),
                *(
                    workflow.Figure(
                        f"images_{name}",
                        f"Images that fool the {name} network",
                        "Clean, attacked, with as much noise, and the attack.",
                        images(runs[0], name),
                    )
                    for name in NETWORKS
                ),
            ],
            settings=config.model_dump(mode="json"),
            next_steps=f"lkarray run adversarial --radius {config.radius:g}",
        ),
        runs[0].folder / "report",
    )


def draw(runs: list[Paths]) -> Figure:
    """Draw the cumulative energy of each network's modes."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for name, color, style in zip(NETWORKS, ("#0072B2", "#D55E00"), ("-", "--"), strict=True):
        for i, paths in enumerate(runs):
            with np.load(paths.arrays(name)) as found:
                energy = found["spectrum"] ** 2
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


def images(paths: Paths, name: str, count: int = 4) -> Figure:
    """Show clean and attacked images of a network."""
    with np.load(paths.arrays(name)) as found:
        columns = {
            kind: [
                np.moveaxis(x, 0, -1).squeeze(-1) if x.shape[0] == 1 else np.moveaxis(x, 0, -1)
                for x in found[kind][:count]
            ]
            for kind in ("clean", "adversarial", "random")
        }
    pairs = zip(columns["adversarial"], columns["clean"], strict=True)
    columns["attack"] = [a - c for a, c in pairs]
    rows = list(zip(*columns.values(), strict=True))
    figure: Figure = plots.image_rows(rows, list(columns))
    return figure
