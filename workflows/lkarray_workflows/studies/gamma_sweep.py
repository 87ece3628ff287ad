"""The loss kernel against gamma: what a tighter hold on the weights makes alike.

A convolutional network learns Fashion-MNIST; its local posterior is sampled at several localization
strengths. Kernels are compared with each other by CKA, with themselves over the number of draws,
and with the garments' places in WordNet and their brightness, which stands for the paper's colour
(loss-kernel appendix D.3, figure 6).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from lkarray_workflows.shared.common import (
    Numbers,
    Sampling,
    accuracy,
    brightness,
    convolutional,
    curve_with_errors,
    draw_losses,
    fit,
    garment_lifts,
    halves_agree,
    keep_model,
    load_model,
)
from lkarray_workflows.shared.images import FOLDER, Dataset, data_set, require_files, take_images
from lkarray_workflows.studies.fashion import SYNSETS
from matplotlib.figure import Figure
from pydantic import Field
from torch import nn

import lkarray as lk
from lkarray import plots, progress, store, workflow
from lkarray.analysis.hierarchy import sources


class Config(Sampling):
    """Settings."""

    presets: ClassVar = {
        # Table 1's row of D.3: of GoogLeNet on ImageNet, not tuned for this network.
        "paper": {
            "gammas": (100, 300, 600, 900, 1200, 1500, 3000),
            "observed": 10_000,
            "chains": 5,
            "draws": 1200,
            "burn_in": 2000,
            "thin": 1,
            "step_size": 1e-4,
            "nbeta": 20,
        },
        "small": {
            "train": 2000,
            "observed": 400,
            "epochs": 10,
            "width": 8,
            "gammas": (100, 10_000),
            "chains": 3,
            "draws": 40,
            "burn_in": 60,
            "thin": 2,
        },
    }

    seed: int = Field(1, ge=0, description="of the images, the training, the sampling")
    dataset: ClassVar[Dataset] = "fashion"
    data: Path | None = Field(None, description=FOLDER)
    train: int = Field(20_000, ge=50, le=60_000, description="training images")
    observed: int = Field(1000, ge=100, le=10_000, description="test images")
    width: int = Field(16, ge=1, description="channels of the first layer")
    epochs: int = Field(15, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(128, ge=1, description="of the training")
    gammas: Numbers = Field((100, 300, 1000, 3000, 10_000), min_length=2)
    neighbors: int = Field(30, ge=1)
    step_size: float = Field(2e-5, gt=0)
    burn_in: int = Field(300, ge=0)


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    require_files(config, folder / "data.npz")
    sources.open_wordnet()  # asked for at the end
    with workflow.Run("gamma_sweep", config, folder) as state:
        paths = Paths(folder)
        state.stage("data", lambda: make_data(config, paths), [paths.data])
        state.stage("train", lambda: train(config, paths, progress), [paths.model])
        for gamma in config.gammas:
            work = partial(sample, config, paths, gamma, progress)
            state.stage(f"sample {gamma:g}", work, [paths.store(gamma)])
        state.stage("measure", lambda: measure(config, paths, progress), [paths.metrics])
        state.stage("report", lambda: report(config, paths, state), [paths.index])
    return f"Report  {paths.index}\nStores  {folder}/gamma-*.zarr"


class Paths:
    """Where the study's files are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.model = folder, folder / "data.npz", folder / "model.pt"
        self.metrics = folder / "metrics.json"
        self.report = folder / "report"
        self.index = self.report / "index.html"

    def store(self, gamma: float) -> Path:
        """Return the store of one localization strength."""
        return self.folder / f"gamma-{gamma:g}.zarr"


def make_data(config: Config, paths: Paths) -> None:
    """Take training images, and observed ones from the test images."""
    kept = take_images(config, config.train, config.observed, seed=config.seed)
    np.savez(paths.data, **kept)


def network(config: Config) -> nn.Module:
    """Return the untrained network."""
    torch.manual_seed(config.seed)
    model: nn.Module = convolutional(config.width)
    return model


def train(config: Config, paths: Paths, show: bool) -> None:
    """Train with Adam."""
    model = fit(
        network(config),
        data_set(paths.data, "train"),
        rate=config.learning_rate,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        show=show,
    )
    keep_model(model, paths.model)


def sample(config: Config, paths: Paths, gamma: float, show: bool) -> None:
    """Sample at one localization strength, with random numbers of its own."""
    observed = data_set(paths.data, "test")
    groups = brightness(observed.tensors[0].numpy())
    draw_losses(
        config,
        load_model(network(config), paths.model),
        data_set(paths.data, "train"),
        observed,
        paths.store(gamma),
        seed=config.seed + config.gammas.index(gamma),
        gamma=gamma,
        show=show,
        coords={"label": observed.tensors[1].numpy(), "brightness": groups},
    )


def losses_of(config: Config, paths: Paths) -> dict[float, xr.DataArray]:
    """Return the losses at each localization strength."""
    return {g: lk.open(paths.store(g))["losses"].to_dataset()["loss"] for g in config.gammas}


def measure(config: Config, paths: Paths, show: bool) -> None:
    """Compute every number of the report."""
    taxonomy = lk.Taxonomy.wordnet(SYNSETS)
    taxonomy.to_json(paths.folder / "taxonomy.json")
    losses = losses_of(config, paths)
    found: list[dict[str, Any]] = []
    with progress.bar("gammas", total=len(losses), unit="kernel", show=show) as bar:
        for gamma, x in losses.items():
            by_distance = lk.correlation_by_distance(x, taxonomy, seed=config.seed)
            store.put(paths.store(gamma), "by_distance", by_distance)
            curve = lk.cka_curve(x).compute()
            tree = lk.open(paths.store(gamma))
            found.append(
                {
                    "gamma": gamma,
                    "lifts": garment_lifts(x, taxonomy, config.neighbors, config.seed),
                    "rank_correlation": {
                        key: float(by_distance[f"rank_{key}"])
                        for key in ("correlation", "low", "high")
                    },
                    "same_class": float(by_distance["correlation"].sel(distance=0)),
                    "draws": (curve["draws"].values * x.sizes["chain"]).tolist(),
                    "cka": curve.values.tolist(),
                    "mean_gain": float(lk.loss_gain(tree["losses"]).mean()),
                    "agreement_of_halves": halves_agree(x),
                    "verdicts": list(lk.diagnostics(tree).attrs["verdicts"]),
                }
            )
            bar.update()
    with progress.busy("alignment", show=show):
        pairs = {
            kind: [[alignment(a, b, kind) for b in losses.values()] for a in losses.values()]
            for kind in ("plain", "draws")
        }
    model = load_model(network(config), paths.model)
    metrics = {
        "kernels": found,
        "cka": pairs["plain"],
        "cka_without_noise": pairs["draws"],
        "accuracy": {
            "training": float(accuracy(model, data_set(paths.data, "train")).mean()),
            "test": float(accuracy(model, data_set(paths.data, "test")).mean()),
        },
    }
    paths.metrics.write_text(json.dumps(metrics, indent=2, allow_nan=False))


def alignment(a: xr.DataArray, b: xr.DataArray, kind: str) -> float:
    """Return the CKA of two correlation kernels, their Monte-Carlo noise left in or taken out."""
    debiased: bool | str = False if kind == "plain" else kind
    return float(lk.cka(a, b, normalize="cosine", debiased=debiased))


def report(config: Config, paths: Paths, state: workflow.Run) -> None:
    """Write the report folder."""
    m = json.loads(paths.metrics.read_text())
    kernels = m["kernels"]
    curves = {
        f"gamma {g:g}": lk.open(paths.store(g))["derived/by_distance"].to_dataset().compute()
        for g in config.gammas
    }
    figures = [
        workflow.Figure(
            "cka",
            "Alignment of kernels",
            "CKA of the correlation kernels at any two "
            "gammas, with Monte-Carlo noise, and corrected for it by splitting chains "
            "(figure 6B).",
            draw_cka(m, config.gammas),
        ),
        workflow.Figure(
            "convergence",
            "Convergence",
            "CKA of the covariance kernel of some draws with that of all (figure 6A).",
            draw_convergence(kernels),
        ),
        workflow.Figure(
            "by_distance",
            "Correlation against distance in WordNet",
            "Distance 0 is one class (figure 6C).",
            plots.correlation_against_distance(curves),
        ),
        workflow.Figure(
            "lift",
            "What neighbours share",
            "Lift of class, of brightness among "
            "neighbours of other classes, and of common ancestors among those "
            "(figure 6D).",
            draw_lift(kernels),
        ),
    ]
    rows = []
    for one in kernels:
        lifts, rank = one["lifts"], one["rank_correlation"]
        text = "{value:.2f} +- {error:.2f}".format
        rows += [
            (
                f"gamma {one['gamma']:g}: lift of class, of brightness",
                text(**lifts["class"]) + ", " + text(**lifts["brightness"]),
                "chance: 1",
            ),
            (
                "... rank correlation of mean R with distance in WordNet",
                "{correlation:.2f} ({low:.2f} to {high:.2f})".format(**rank),
                "paper: falls with gamma",
            ),
            (
                "... agreement of R between halves of the chains",
                f"{one['agreement_of_halves']:.2f}",
                "",
            ),
        ]
    rows.append(("Right: training, test", "{training:.1%}, {test:.1%}".format(**m["accuracy"]), ""))
    workflow.write_report(
        workflow.Report(
            title="The loss kernel against gamma",
            summary=[
                f"{config.train:,} training images of Fashion-MNIST, {config.observed:,} test "
                f"images observed, {config.chains} chains of {config.draws} draws at each gamma. "
                "The paper has GoogLeNet on ImageNet; brightness in eight groups stands for its "
                "colours. Ten classes say little about a hierarchy: intervals are wide."
            ],
            metrics={**m, "seconds": state.seconds(), "config": config.model_dump(mode="json")},
            rows=rows,
            figures=figures,
            settings=config.model_dump(mode="json"),
            next_steps=f'a = lk.open("{paths.store(config.gammas[0])}")["losses"]\n'
            f'b = lk.open("{paths.store(config.gammas[-1])}")["losses"]\n'
            'lk.cka(a, b, normalize="cosine", debiased="draws")',
        ),
        paths.report,
    )


def draw_cka(m: dict[str, Any], gammas: tuple[float, ...]) -> Figure:
    """Draw both tables of alignments."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    names = [f"{g:g}" for g in gammas]
    titles = {"cka": "CKA", "cka_without_noise": "CKA, noise taken out"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        table = np.asarray(m[key])
        picture = axes.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        for (i, j), value in np.ndenumerate(table):
            axes.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if value < 0.6 else "black",
            )
        axes.set(xlabel="gamma", ylabel="gamma", title=title)
    figure.colorbar(picture, ax=figure.axes[:2])
    return figure


def draw_convergence(kernels: list[dict[str, Any]]) -> Figure:
    """Draw CKA with the final kernel against the draws of all chains."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for one in kernels:
        axes.plot(one["draws"], one["cka"], "o-", ms=3, label=f"gamma {one['gamma']:g}")
    axes.set(
        xlabel="draws of all chains", ylabel="CKA with the kernel of all draws", ylim=(None, 1.01)
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def draw_lift(kernels: list[dict[str, Any]]) -> Figure:
    """Draw lifts against gamma."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    gammas = [one["gamma"] for one in kernels]
    styles = {"class": ("o-", "#3f90da"), "brightness": ("s--", "#ffa90e")}
    for name, (style, color) in styles.items():
        lifts = [one["lifts"][name] for one in kernels]
        left.errorbar(
            gammas,
            [v["value"] for v in lifts],
            [v["error"] for v in lifts],
            fmt=style,
            color=color,
            capsize=3,
            label=name,
        )
    for column, depth in enumerate(kernels[0]["lifts"]["depths"]):
        points = [
            tuple(one["lifts"][key][column] for key in ("pooled_lift", "low", "high"))
            for one in kernels
        ]
        curve_with_errors(right, gammas, points, f"depth {depth}")
    for axes, title in ((left, "class and brightness"), (right, "common ancestor in WordNet")):
        axes.axhline(1, color="black", lw=0.8, ls=":")
        axes.set(xscale="log", xlabel="gamma", ylabel="lift (chance: 1)", title=title)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure
