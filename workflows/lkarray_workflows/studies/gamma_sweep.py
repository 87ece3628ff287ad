"""The loss kernel against gamma: what a tighter hold on the weights makes alike.

A convolutional network learns Fashion-MNIST; its local posterior is sampled at several localization
strengths. Kernels are compared with each other by CKA, with themselves over the number of draws,
and with the garments' places in WordNet and their brightness, which stands for the paper's colour
(Adam et al. 2025a, appendix D.3, figure 6).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from pydantic import Field

import lkarray as lk
from lkarray import plots, progress, store, workflow
from lkarray.analysis.hierarchy import sources
from lkarray_workflows.shared.common import (
    Numbers,
    accuracy,
    curve_with_errors,
    draw_losses,
    fit,
    halves_agree,
    keep_model,
    load_model,
)
from lkarray_workflows.shared.garments import (
    Garments,
    garment_lifts,
    make_data,
    network,
    observed_images,
    points_of,
    rank_correlation,
    wordnet_of,
)
from lkarray_workflows.shared.images import data_set, require_files


class Config(Garments):
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

    gammas: Numbers = Field((100, 300, 1000, 3000, 10_000), min_length=2)


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    require_files(config, folder / "data.npz")
    sources.open_wordnet()  # asked for at the end
    with workflow.Study("gamma_sweep", config, folder, progress) as study:
        study.stage("data", make_data, "data.npz")
        study.stage("train", train, "model.pt")
        for gamma in config.gammas:
            study.stage(f"sample {gamma:g}", sample, f"gamma-{gamma:g}.zarr", gamma)
        study.stage("measure", measure, "metrics.json")
        study.stage("report", report, "report/index.html")
    return f"Report  {study.index}\nStores  {folder}/gamma-*.zarr"


def train(study: Study) -> None:
    """Train with Adam."""
    config = study.config
    model = fit(
        network(config),
        data_set(study.path("data.npz"), "train"),
        rate=config.learning_rate,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        show=study.show,
    )
    keep_model(model, study.path("model.pt"))


def store_of(study: Study, gamma: float) -> Path:
    """Return the store of one localization strength."""
    return study.path(f"gamma-{gamma:g}.zarr")


def sample(study: Study, gamma: float) -> None:
    """Sample at one localization strength, with random numbers of its own."""
    config = study.config
    observed, coords = observed_images(study)
    draw_losses(
        config.model_copy(update={"gamma": gamma}),
        load_model(network(config), study.path("model.pt")),
        data_set(study.path("data.npz"), "train"),
        observed,
        store_of(study, gamma),
        batch_size=config.sampler_batch,
        seed=config.seed + config.gammas.index(gamma),
        show=study.show,
        coords=coords,
    )


def losses_of(study: Study) -> dict[float, xr.DataArray]:
    """Return the losses at each localization strength."""
    return {
        g: lk.open(store_of(study, g))["losses"].to_dataset()["loss"] for g in study.config.gammas
    }


def kernel_numbers(
    study: Study, gamma: float, losses: xr.DataArray, taxonomy: lk.Taxonomy
) -> dict[str, Any]:
    """Return what is counted of the kernel at one localization strength."""
    config, path = study.config, store_of(study, gamma)
    by_distance = lk.correlation_by_distance(losses, taxonomy, seed=config.seed)
    store.put(path, "by_distance", by_distance)
    curve = lk.cka_curve(losses).compute()
    tree = lk.open(path)
    return {
        "gamma": gamma,
        "lifts": garment_lifts(losses, taxonomy, config.neighbors, config.seed),
        "rank_correlation": rank_correlation(by_distance),
        "same_class": float(by_distance["correlation"].sel(distance=0)),
        "draws": (curve["draws"].values * losses.sizes["chain"]).tolist(),
        "cka": curve.values.tolist(),
        "mean_gain": float(lk.loss_gain(tree["losses"]).mean()),
        "agreement_of_halves": halves_agree(losses),
        "verdicts": list(lk.diagnostics(tree).attrs["verdicts"]),
    }


def measure(study: Study) -> None:
    """Compute every number of the report."""
    config, taxonomy = study.config, wordnet_of(study)
    losses = losses_of(study)
    kernels: list[dict[str, Any]] = []
    with progress.bar("gammas", total=len(losses), unit="kernel", show=study.show) as bar:
        for gamma, x in losses.items():
            kernels.append(kernel_numbers(study, gamma, x, taxonomy))
            bar.update()
    with progress.busy("alignment", show=study.show):
        pairs = {
            kind: [[alignment(a, b, kind) for b in losses.values()] for a in losses.values()]
            for kind in ("plain", "draws")
        }
    model, path = load_model(network(config), study.path("model.pt")), study.path("data.npz")
    metrics = {
        "kernels": kernels,
        "cka": pairs["plain"],
        "cka_without_noise": pairs["draws"],
        "accuracy": {
            "training": float(accuracy(model, data_set(path, "train")).mean()),
            "test": float(accuracy(model, data_set(path, "test")).mean()),
        },
    }
    study.write("metrics.json", metrics)


def alignment(a: xr.DataArray, b: xr.DataArray, kind: str) -> float:
    """Return the CKA of two correlation kernels, their Monte-Carlo noise left in or taken out."""
    debiased: bool | str = False if kind == "plain" else kind
    return float(lk.cka(a, b, normalize="cosine", debiased=debiased))


def figures_of(study: Study, metrics: dict[str, Any]) -> list[workflow.Figure]:
    """Return the figures of the report."""
    gammas = study.config.gammas
    curves = {
        f"gamma {g:g}": lk.open(store_of(study, g))["derived/by_distance"].to_dataset().compute()
        for g in gammas
    }
    return [
        workflow.Figure(
            "cka",
            "Alignment of kernels",
            "CKA of the correlation kernels at any two "
            "gammas, with Monte-Carlo noise, and corrected for it by splitting chains "
            "(figure 6B).",
            draw_cka(metrics, gammas),
        ),
        workflow.Figure(
            "convergence",
            "Convergence",
            "CKA of the covariance kernel of some draws with that of all (figure 6A).",
            draw_convergence(metrics["kernels"]),
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
            draw_lift(metrics["kernels"]),
        ),
    ]


def rows_of(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report."""
    rows = []
    for kernel in metrics["kernels"]:
        lifts, rank = kernel["lifts"], kernel["rank_correlation"]
        text = "{value:.2f} +- {error:.2f}".format
        rows += [
            (
                f"gamma {kernel['gamma']:g}: lift of class, of brightness",
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
                f"{kernel['agreement_of_halves']:.2f}",
                "",
            ),
        ]
    rows.append(
        ("Right: training, test", "{training:.1%}, {test:.1%}".format(**metrics["accuracy"]), "")
    )
    return rows


def report(study: Study) -> None:
    """Write the report folder."""
    config, metrics = study.config, study.read("metrics.json")
    study.report(
        title="The loss kernel against gamma",
        summary=[
            f"{config.train:,} training images of Fashion-MNIST, {config.observed:,} test "
            f"images observed, {config.chains} chains of {config.draws} draws at each gamma. "
            "The paper has GoogLeNet on ImageNet; brightness in eight groups stands for its "
            "colours. Ten classes say little about a hierarchy: intervals are wide."
        ],
        metrics=metrics,
        rows=rows_of(metrics),
        figures=figures_of(study, metrics),
        next_steps=f'a = lk.open("{store_of(study, config.gammas[0])}")["losses"]\n'
        f'b = lk.open("{store_of(study, config.gammas[-1])}")["losses"]\n'
        'lk.cka(a, b, normalize="cosine", debiased="draws")',
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
    for kernel in kernels:
        axes.plot(kernel["draws"], kernel["cka"], "o-", ms=3, label=f"gamma {kernel['gamma']:g}")
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
    gammas = [kernel["gamma"] for kernel in kernels]
    styles = {"class": ("o-", "#3f90da"), "brightness": ("s--", "#ffa90e")}
    for name, (style, color) in styles.items():
        lifts = [kernel["lifts"][name] for kernel in kernels]
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
        points = points_of(kernels, column)
        curve_with_errors(right, gammas, points, f"depth {depth}")
    for axes, title in ((left, "class and brightness"), (right, "common ancestor in WordNet")):
        axes.axhline(1, color="black", lw=0.8, ls=":")
        axes.set(xscale="log", xlabel="gamma", ylabel="lift (chance: 1)", title=title)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure
