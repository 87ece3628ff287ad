"""How the loss kernel develops: its maps, alignment and lift at checkpoints through training.

A convolutional network learns Fashion-MNIST and is kept at some steps. The loss kernel of test
images is computed at each; maps share one setting of UMAP, so that what changes is the kernel
(loss-kernel appendix D.5, figure 8, there with GoogLeNet on ImageNet).
"""

from __future__ import annotations

import json
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
)
from lkarray_workflows.shared.images import (
    FOLDER,
    NAMES,
    Dataset,
    data_set,
    require_files,
    take_images,
)
from lkarray_workflows.studies.fashion import SYNSETS
from matplotlib.figure import Figure
from pydantic import Field
from torch import nn

import lkarray as lk
from lkarray import progress, workflow
from lkarray.analysis.hierarchy import sources
from lkarray.errors import SettingsError


class Config(Sampling):
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

    seed: int = Field(1, ge=0, description="of the images, the training, the sampling")
    dataset: ClassVar[Dataset] = "fashion"
    data: Path | None = Field(None, description=FOLDER)
    train: int = Field(20_000, ge=50, le=60_000, description="training images")
    observed: int = Field(1000, ge=100, le=10_000, description="test images")
    width: int = Field(16, ge=1, description="channels of the first layer")
    epochs: int = Field(15, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(128, ge=1, description="of the training")
    steps: Numbers = Field((0, 10, 50, 200, 800), description="to keep, beside the last")
    neighbors: int = Field(30, ge=1)
    step_size: float = Field(2e-5, gt=0)
    burn_in: int = Field(300, ge=0)


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    require_files(config, folder / "data.npz")
    sources.open_wordnet()  # asked for at the end
    with workflow.Run("development", config, folder) as state:
        paths = Paths(folder)
        state.stage("data", lambda: make_data(config, paths), [paths.data])
        state.stage("train", lambda: train(config, paths, progress), [paths.models])
        state.stage("sample", lambda: sample(config, paths, progress), [paths.store])
        state.stage("map", lambda: make_maps(config, paths, progress), [paths.maps])
        state.stage("measure", lambda: measure(config, paths, progress), [paths.metrics])
        state.stage("report", lambda: report(config, paths, state), [paths.index])
    return f"Report  {paths.index}\nStore   {paths.store}"


class Paths:
    """Where the study's files are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.models = folder, folder / "data.npz", folder / "models.pt"
        self.store, self.maps = folder / "store.zarr", folder / "maps.npz"
        self.metrics = folder / "metrics.json"
        self.report = folder / "report"
        self.index = self.report / "index.html"


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
    """Train with Adam, and keep the weights before some steps, and the last.

    Raises
    ------
    SettingsError
        A step to keep is not one of the training's.
    """
    data, model = data_set(paths.data, "train"), network(config)
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
        show=show,
        before_step=keep,
    )
    keep(last)
    with workflow.replacing(paths.models) as part:
        torch.save(kept, part)


def sample(config: Config, paths: Paths, show: bool) -> None:
    """Sample around each checkpoint."""
    observed = data_set(paths.data, "test")
    groups = brightness(observed.tensors[0].numpy())
    draw_losses(
        config,
        network(config),
        data_set(paths.data, "train"),
        observed,
        paths.store,
        seed=config.seed,
        show=show,
        checkpoints=torch.load(paths.models, weights_only=True),
        coords={"label": observed.tensors[1].numpy(), "brightness": groups},
    )


def losses_of(paths: Paths) -> xr.DataArray:
    """Return the losses ``(checkpoint, chain, draw, sample)``."""
    return lk.open(paths.store)["losses"].to_dataset()["loss"]


def make_maps(config: Config, paths: Paths, show: bool) -> None:
    """Map the images at each checkpoint, with edges within a class removed (appendix B)."""
    losses = losses_of(paths)
    points = []
    with progress.bar("maps (UMAP)", total=losses.sizes["checkpoint"], unit="map", show=show) as b:
        for step in losses["checkpoint"].values:
            near = lk.neighbors(
                losses.sel(checkpoint=step), config.neighbors, exclude="label"
            ).compute()
            points.append(lk.embed(near, seed=config.seed).values)
            b.update()
    np.savez(paths.maps, points=np.stack(points))


def measure(config: Config, paths: Paths, show: bool) -> None:
    """Compute every number of the report."""
    taxonomy = lk.Taxonomy.wordnet(SYNSETS)
    taxonomy.to_json(paths.folder / "taxonomy.json")
    losses, states = losses_of(paths), torch.load(paths.models, weights_only=True)
    final = losses.isel(checkpoint=-1, drop=True)
    found: list[dict[str, Any]] = []
    with progress.bar("checkpoints", total=len(states), unit="kernel", show=show) as bar:
        for step, state in states.items():
            x = losses.sel(checkpoint=step, drop=True)
            model = network(config)
            model.load_state_dict(state)
            by_distance = lk.correlation_by_distance(x, taxonomy, seed=config.seed)
            found.append(
                {
                    "step": step,
                    "accuracy": float(accuracy(model, data_set(paths.data, "test")).mean()),
                    "cka_to_final": float(lk.cka(x, final, normalize="cosine")),
                    "cka_without_noise": float(
                        lk.cka(x, final, normalize="cosine", debiased="draws")
                    ),
                    "lifts": garment_lifts(x, taxonomy, config.neighbors, config.seed),
                    "rank_correlation": {
                        key: float(by_distance[f"rank_{key}"])
                        for key in ("correlation", "low", "high")
                    },
                    "same_class": float(by_distance["correlation"].sel(distance=0)),
                    "agreement_of_halves": halves_agree(x),
                }
            )
            bar.update()
    paths.metrics.write_text(json.dumps({"checkpoints": found}, indent=2, allow_nan=False))


def report(config: Config, paths: Paths, state: workflow.Run) -> None:
    """Write the report folder."""
    m = json.loads(paths.metrics.read_text())
    found = m["checkpoints"]
    with np.load(paths.maps) as maps:
        points = maps["points"]
    labels = losses_of(paths)["label"].values
    figures = [
        workflow.Figure(
            "maps",
            "Maps through training",
            "UMAP at distance 1 - R with one setting; "
            "edges within a class removed, so classes gather only through others "
            "(figure 8).",
            draw_maps(points, labels, [one["step"] for one in found]),
        ),
        workflow.Figure(
            "curves",
            "Alignment and lift through training",
            "CKA with the last "
            "kernel, plain and with Monte-Carlo noise taken out; lifts against chance.",
            draw_curves(found),
        ),
    ]
    text = "{value:.2f} +- {error:.2f}".format
    rows = []
    for one in found:
        rows += [
            (
                f"Step {one['step']}: CKA with the last kernel, noise taken out",
                f"{one['cka_to_final']:.3f}, {one['cka_without_noise']:.3f}",
                "",
            ),
            (
                "... lift of class, of brightness",
                text(**one["lifts"]["class"]) + ", " + text(**one["lifts"]["brightness"]),
                "chance: 1",
            ),
            ("... right, of the test images", f"{one['accuracy']:.1%}", ""),
            (
                "... agreement of R between halves of the chains",
                f"{one['agreement_of_halves']:.2f}",
                "",
            ),
        ]
    workflow.write_report(
        workflow.Report(
            title="How the loss kernel develops through training",
            summary=[
                f"{config.train:,} training images of Fashion-MNIST, {config.observed:,} test "
                f"images observed, {config.chains} chains of {config.draws} draws at each "
                "checkpoint. The paper shows maps of GoogLeNet on ImageNet and no numbers."
            ],
            metrics={**m, "seconds": state.seconds(), "config": config.model_dump(mode="json")},
            rows=rows,
            figures=figures,
            settings=config.model_dump(mode="json"),
            next_steps=f'losses = lk.open("{paths.store}")["losses"].to_dataset()["loss"]\n'
            "lk.cka(losses.isel(checkpoint=0), losses.isel(checkpoint=-1))",
        ),
        paths.report,
    )


def draw_maps(points: np.ndarray, labels: np.ndarray, steps: list[int]) -> Figure:
    """Draw a map for each checkpoint."""
    from matplotlib import color_sequences

    columns = min(3, len(steps))
    rows = -(-len(steps) // columns)
    figure = Figure(figsize=(4.2 * columns + 1.5, 4.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    palette = color_sequences["petroff10"]
    for axes, xy, step in zip(grid, points, steps, strict=False):
        for label in np.unique(labels):
            at = labels == label
            axes.scatter(
                xy[at, 0],
                xy[at, 1],
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


def draw_curves(found: list[dict[str, Any]]) -> Figure:
    """Draw CKA, accuracy and lifts against the step."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    left, right, deep = figure.subplots(1, 3)
    steps = [max(one["step"], 1) for one in found]
    lines = {
        "cka_to_final": ("CKA with the last kernel", "o-"),
        "cka_without_noise": ("... noise taken out", "s--"),
        "accuracy": ("right, of the test images", "^:"),
    }
    for key, (label, style) in lines.items():
        left.plot(steps, [one[key] for one in found], style, ms=4, label=label)
    for name, style in {"class": "o-", "brightness": "s--"}.items():
        lifts = [one["lifts"][name] for one in found]
        right.errorbar(
            steps,
            [v["value"] for v in lifts],
            [v["error"] for v in lifts],
            fmt=style,
            ms=4,
            capsize=3,
            label=name,
        )
    for column, depth in enumerate(found[0]["lifts"]["depths"]):
        points = [
            tuple(one["lifts"][key][column] for key in ("pooled_lift", "low", "high"))
            for one in found
        ]
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
