"""How the loss kernel develops: its maps, alignment and lift at checkpoints through training.

A convolutional network learns Fashion-MNIST and is kept at some steps. The loss kernel of test
images is computed at each; maps share one setting of UMAP, so that what changes is the kernel
(Adam et al. 2025a, appendix D.5, figure 8, there with GoogLeNet on ImageNet).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from pydantic import Field
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import progress, workflow
from lkarray.analysis.hierarchy import sources
from lkarray.errors import SettingsError
from lkarray_workflows.shared.common import (
    Numbers,
    accuracy,
    curve_with_errors,
    draw_losses,
    fit,
    halves_agree,
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
from lkarray_workflows.shared.images import NAMES, data_set, require_files


class Config(Garments):
    """Settings."""

    presets: ClassVar = {
        # Steps of D.5, and table 1's row of section 4: of GoogLeNet, not tuned for this network.
        "paper": {
            "observed": 10_000,
            "epochs": 40,
            "steps": (0, 710, 1388, 3290, 5298),
            "chains": 15,
            "draws": 500,
            "burn_in": 100,
            "thin": 1,
            "step_size": 5e-5,
            "nbeta": 20,
            "gamma": 4000,
        },
        "small": {
            "train": 2000,
            "observed": 400,
            "epochs": 10,
            "width": 8,
            "steps": (0, 20),
            "chains": 3,
            "draws": 40,
            "burn_in": 60,
            "thin": 2,
        },
    }

    steps: Numbers = Field((0, 10, 50, 200, 800), description="to keep, beside the last")


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    require_files(config, folder / "data.npz")
    sources.open_wordnet()  # asked for at the end
    with workflow.Study("development", config, folder, progress) as study:
        study.stage("data", make_data, "data.npz")
        study.stage("train", train, "models.pt")
        study.stage("sample", sample, "store.zarr")
        study.stage("map", make_maps, "maps.npz")
        study.stage("measure", measure, "metrics.json")
        study.stage("report", report, "report/index.html")
    return f"Report  {study.index}\nStore   {study.path('store.zarr')}"


def train(study: Study) -> None:
    """Train with Adam, and keep the weights before some steps, and the last.

    Raises
    ------
    SettingsError
        A step to keep is not one of the training's.
    """
    config = study.config
    data, model = data_set(study.path("data.npz"), "train"), network(config)
    last = config.epochs * -(-len(data) // config.batch_size)
    wanted = {int(step) for step in config.steps}
    if not wanted or min(wanted) < 0 or max(wanted) >= last:
        raise SettingsError(f"steps must lie between 0 and {last - 1}, not {sorted(wanted)}")
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def keep(step: int) -> None:
        if step in wanted or step == last:
            kept[step] = {name: t.clone() for name, t in model.state_dict().items()}

    fit(
        model,
        data,
        rate=config.learning_rate,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        show=study.show,
        before_step=keep,
    )
    keep(last)
    with study.writing("models.pt") as new:
        torch.save(kept, new)


def sample(study: Study) -> None:
    """Sample around each checkpoint."""
    config = study.config
    observed, coords = observed_images(study)
    draw_losses(
        config,
        network(config),
        data_set(study.path("data.npz"), "train"),
        observed,
        study.path("store.zarr"),
        batch_size=config.sampler_batch,
        seed=config.seed,
        show=study.show,
        checkpoints=torch.load(study.path("models.pt"), weights_only=True),
        coords=coords,
    )


def losses_of(study: Study) -> xr.DataArray:
    """Return the losses ``(checkpoint, chain, draw, sample)``."""
    return lk.open(study.path("store.zarr"))["losses"].to_dataset()["loss"]


def make_maps(study: Study) -> None:
    """Map the images at each checkpoint, with edges within a class removed (appendix B)."""
    losses = losses_of(study)
    points = []
    with progress.bar(
        "maps (UMAP)", total=losses.sizes["checkpoint"], unit="map", show=study.show
    ) as b:
        for step in losses["checkpoint"].values:
            near = lk.neighbors(
                losses.sel(checkpoint=step), study.config.neighbors, exclude="label"
            ).compute()
            points.append(lk.embed(near, seed=study.config.seed).values)
            b.update()
    study.save("maps.npz", points=np.stack(points))


def numbers_of(
    model: nn.Module, data: TensorDataset, losses: xr.DataArray, final: xr.DataArray
) -> dict[str, Any]:
    """Return how right a checkpoint's network is, and how near its kernel is to the final one."""
    return {
        "accuracy": float(accuracy(model, data).mean()),
        "cka_to_final": float(lk.cka(losses, final, normalize="cosine")),
        "cka_without_noise": float(lk.cka(losses, final, normalize="cosine", debiased="draws")),
    }


def measure(study: Study) -> None:
    """Compute every number of the report."""
    config, taxonomy = study.config, wordnet_of(study)
    losses, weights = losses_of(study), torch.load(study.path("models.pt"), weights_only=True)
    final = losses.isel(checkpoint=-1, drop=True)
    test = data_set(study.path("data.npz"), "test")
    checkpoints: list[dict[str, Any]] = []
    with progress.bar("checkpoints", total=len(weights), unit="kernel", show=study.show) as bar:
        for step, state in weights.items():
            x = losses.sel(checkpoint=step, drop=True)
            model = network(config)
            model.load_state_dict(state)
            by_distance = lk.correlation_by_distance(x, taxonomy, seed=config.seed)
            checkpoints.append(
                {
                    "step": step,
                    **numbers_of(model, test, x, final),
                    "lifts": garment_lifts(x, taxonomy, config.neighbors, config.seed),
                    "rank_correlation": rank_correlation(by_distance),
                    "same_class": float(by_distance["correlation"].sel(distance=0)),
                    "agreement_of_halves": halves_agree(x),
                }
            )
            bar.update()
    study.write("metrics.json", {"checkpoints": checkpoints})


def figures_of(study: Study, checkpoints: list[dict[str, Any]]) -> list[workflow.Figure]:
    """Return the figures of the report."""
    points = study.load("maps.npz")["points"]
    labels = losses_of(study)["label"].values
    return [
        workflow.Figure(
            "maps",
            "Maps through training",
            "UMAP at distance 1 - R with one setting; "
            "edges within a class removed, so classes gather only through others "
            "(figure 8).",
            draw_maps(points, labels, [entry["step"] for entry in checkpoints]),
        ),
        workflow.Figure(
            "curves",
            "Alignment and lift through training",
            "CKA with the last "
            "kernel, plain and with Monte-Carlo noise taken out; lifts against chance.",
            draw_curves(checkpoints),
        ),
    ]


def rows_of(checkpoints: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report."""
    text = "{value:.2f} +- {error:.2f}".format
    rows = []
    for entry in checkpoints:
        rows += [
            (
                f"Step {entry['step']}: CKA with the last kernel, noise taken out",
                f"{entry['cka_to_final']:.3f}, {entry['cka_without_noise']:.3f}",
                "",
            ),
            (
                "... lift of class, of brightness",
                text(**entry["lifts"]["class"]) + ", " + text(**entry["lifts"]["brightness"]),
                "chance: 1",
            ),
            ("... right, of the test images", f"{entry['accuracy']:.1%}", ""),
            (
                "... agreement of R between halves of the chains",
                f"{entry['agreement_of_halves']:.2f}",
                "",
            ),
        ]
    return rows


def report(study: Study) -> None:
    """Write the report folder."""
    config, path = study.config, study.path("store.zarr")
    metrics = study.read("metrics.json")
    checkpoints = metrics["checkpoints"]
    study.report(
        title="How the loss kernel develops through training",
        summary=[
            f"{config.train:,} training images of Fashion-MNIST, {config.observed:,} test "
            f"images observed, {config.chains} chains of {config.draws} draws at each "
            "checkpoint. The paper shows maps of GoogLeNet on ImageNet and no numbers."
        ],
        metrics=metrics,
        rows=rows_of(checkpoints),
        figures=figures_of(study, checkpoints),
        next_steps=f'losses = lk.open("{path}")["losses"].to_dataset()["loss"]\n'
        "lk.cka(losses.isel(checkpoint=0), losses.isel(checkpoint=-1))",
    )


def draw_maps(points: np.ndarray, labels: np.ndarray, steps: list[int]) -> Figure:
    """Draw a map for each checkpoint."""
    from matplotlib import color_sequences

    columns = min(3, len(steps))
    lines = -(-len(steps) // columns)
    figure = Figure(figsize=(4.2 * columns + 1.5, 4.2 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    palette = color_sequences["petroff10"]
    for axes, xy, step in zip(grid, points, steps, strict=False):
        for label in np.unique(labels):
            own = xy[labels == label]
            axes.scatter(
                own[:, 0],
                own[:, 1],
                s=6,
                lw=0,
                color=palette[label % 10],
                label=NAMES["fashion"][label],
            )
        axes.set(xticks=[], yticks=[], title=f"step {step:,}")
    for axes in grid:
        axes.set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, markerscale=3)
    return figure


def draw_curves(checkpoints: list[dict[str, Any]]) -> Figure:
    """Draw CKA, accuracy and lifts against the step."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    left, right, deep = figure.subplots(1, 3)
    steps = [max(entry["step"], 1) for entry in checkpoints]
    lines = {
        "cka_to_final": ("CKA with the last kernel", "o-"),
        "cka_without_noise": ("... noise taken out", "s--"),
        "accuracy": ("right, of the test images", "^:"),
    }
    for key, (label, style) in lines.items():
        left.plot(steps, [entry[key] for entry in checkpoints], style, ms=4, label=label)
    for name, style in {"class": "o-", "brightness": "s--"}.items():
        lifts = [entry["lifts"][name] for entry in checkpoints]
        right.errorbar(
            steps,
            [v["value"] for v in lifts],
            [v["error"] for v in lifts],
            fmt=style,
            ms=4,
            capsize=3,
            label=name,
        )
    for column, depth in enumerate(checkpoints[0]["lifts"]["depths"]):
        points = points_of(checkpoints, column)
        curve_with_errors(deep, steps, points, f"depth {depth}")
    right.set(ylabel="lift (chance: 1)", title="class and brightness")
    deep.set(ylabel="lift (chance: 1)", title="common ancestor in WordNet, other classes")
    left.set(ylabel="CKA, share")
    for axes in (right, deep):
        axes.axhline(1, color="black", lw=0.8, ls=":")
    for axes in (left, right, deep):
        axes.set(xscale="log", xlabel="training step (0 drawn at 1)")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return figure
