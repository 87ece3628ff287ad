"""ImageNet's hierarchy from gradients: one backward pass an image, and averages over draws.

One real image of each of the 1,000 classes, and EfficientNet-Lite0. Near the trained weights the
loss kernel is that of gradients (docs/noise.md), so it needs no chain: gradients of log-odds at the
weights themselves, and averaged over independent draws of the Gaussian law that the posterior is to
all purposes, at several localization strengths. Lift against WordNet stands beside that of what
needs no kernel: penultimate features, logits, errors of the outputs, pixels, untrained weights.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from pydantic import Field
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import errors, plots, progress, workflow
from lkarray.analysis.losses.extrapolation import at_infinity
from lkarray_workflows.shared import wnids
from lkarray_workflows.shared.common import Numbers, curve_with_errors, smoothed
from lkarray_workflows.shared.efficientnet import network, outputs
from lkarray_workflows.studies.imagenet import read_image

CLASSES = 1000
CENTER, UNTRAINED = "gradients at w*", "gradients, untrained weights"


class Config(workflow.Config):
    """Settings; the loss-kernel paper has gamma 4,000 and nbeta 20 for InceptionV1."""

    presets: ClassVar = {
        "small": {
            "classes": 30,
            "side": 64,
            "smoothed_side": 48,
            "gammas": (60_000.0,),
            "smooth": 2,
            "sketch": 4096,
            "neighbors": 5,
        },
    }

    seed: int = Field(1, ge=0, description="of the draws, the sketch, the untrained weights")
    data: Path = Field(Path("imagenet_1000"), description="folder of WNID/*.JPEG, one or more each")
    classes: int = Field(CLASSES, ge=20, le=CLASSES, description="the first, by wnid")
    side: int = Field(224, ge=32, description="pixels, at w*")
    smoothed_side: int = Field(128, ge=32, description="pixels, where gradients are averaged")
    sketch: int = Field(65_536, ge=256, description="numbers that are kept of a gradient")
    nbeta: float = Field(20.0, ge=0)
    gammas: Numbers = Field((60_000.0, 16_000.0, 4000.0), min_length=1)
    smooth: int = Field(32, ge=2, description="draws that gradients are averaged over")
    neighbors: int = Field(30, ge=1)


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    with workflow.Study("imagenet_gradients", config, folder, progress) as study:
        network()  # weights that are not there are told before images are read
        study.stage("read", read_images, "pixels.npy")
        study.stage("controls", controls, "controls.npz")
        study.stage("center", center, ("center.npz", "center.json"), True)
        study.stage("untrained", center, ("untrained.npz", "untrained.json"), False)
        for gamma in config.gammas:
            name = f"gamma-{gamma:g}"
            for draws in counts(config.smooth):
                study.stage(
                    f"smooth {gamma:g} {draws}", smooth, f"{name}/{draws}.npz", gamma, draws
                )
        study.stage("measure", measure, "metrics.json")
        study.stage("report", report, "report/index.html")
    return f"Report  {study.index}\nStores  {folder}/*.zarr"


def counts(most: int) -> list[int]:
    """Return numbers of draws after which the kernel is looked at."""
    return [n for n in (2, 4, 8, 16, 32, 64, 128) if n < most] + [most]


def files_of(config: Config) -> list[tuple[str, Path]]:
    """Return the wnid and the first image of each class.

    Raises
    ------
    StoreError
        The folder is not there, or lacks a class.
    """
    labels = lk.Taxonomy.imagenet().labels[: config.classes]
    firsts = []
    for wnid in labels:
        images = sorted((config.data / str(wnid)).glob("*.JPEG"))
        if not images:
            raise errors.StoreError(
                f"{config.data} has no {wnid}/*.JPEG; give a folder with one folder a class, named "
                "by its wnid, with at least one image (ImageNet's validation images, say)"
            )
        firsts.append((str(wnid), images[0]))
    return firsts


def read_images(study: Study) -> None:
    """Read the middle of each image, at the larger side."""
    config = study.config
    files = files_of(config)
    bar = progress.bar("images", total=len(files), show=study.show)
    with ThreadPoolExecutor() as pool, bar:
        images = []
        for image in pool.map(lambda file: read_image(file[1], config.side), files):
            images.append(image)
            bar.update()
    with study.writing("pixels.npy") as new:
        np.save(new, np.stack(images))


def labels_of(study: Study) -> np.ndarray:
    """Return the wnid of each image."""
    return np.array([wnid for wnid, _ in files_of(study.config)])


def data_set(study: Study, side: int) -> TensorDataset:
    """Return the images of a side as the network takes them, and their classes."""
    pixels = torch.from_numpy(np.load(study.path("pixels.npy"))).movedim(-1, 1).float() / 255
    if side != pixels.shape[-1]:
        pixels = torch.nn.functional.interpolate(
            pixels, size=(side, side), mode="bilinear", antialias=True
        )
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (wnids.MEAN, wnids.DEVIATION))
    return TensorDataset((pixels - mean) / deviation, torch.arange(len(pixels)))


def controls(study: Study) -> None:
    """Keep what needs no gradient: features, logits, errors, pixels; and what is right."""
    config = study.config
    kept: dict[str, np.ndarray] = {}
    for side in (config.side, config.smoothed_side):
        inputs, targets = data_set(study, side).tensors
        seen = outputs(network(), inputs, show=study.show)
        wrong = seen["logits"].softmax(1)
        wrong[torch.arange(len(targets)), targets] -= 1
        kept |= {
            f"penultimate features, {side}": seen["penultimate"].numpy(),
            f"logits, {side}": seen["logits"].numpy(),
            f"softmax minus target, {side}": wrong.numpy(),
            f"right {side}": (seen["logits"].argmax(1) == targets).numpy(),
        }
    small = torch.nn.functional.interpolate(inputs, size=(32, 32), mode="area")
    kept["pixels"] = small.flatten(1).numpy()
    study.save("controls.npz", **kept)


def posterior_of(study: Study, side: int, gamma: float, trained: bool = True) -> Any:
    """Return the local posterior over the images of a side, and these images."""
    data, config = data_set(study, side), study.config
    model = network(config.seed, trained=trained)
    return lk.LocalPosterior(model, data, nbeta=config.nbeta, gamma=gamma), data


def features(
    study: Study, store: str, side: int, gamma: float, draws: int, *, trained: bool
) -> Any:
    """Return gradient features of the images, averaged over draws of N(w*, I / gamma)."""
    config = study.config
    posterior, data = posterior_of(study, side, gamma, trained)
    return lk.laplace(
        posterior,
        data,
        rank=0,
        sketch=config.sketch,
        smooth=draws,
        seed=config.seed,
        coords={"label": labels_of(study)},
        store=study.path(store),
        progress=study.show,
    )


def center(study: Study, trained: bool) -> None:
    """Take gradients of log-odds at the weights themselves."""
    began, config = time.perf_counter(), study.config
    name = "center" if trained else "untrained"
    side = config.side if trained else config.smoothed_side
    feature = features(study, f"{name}.zarr", side, config.gammas[0], 0, trained=trained)
    study.save(f"{name}.npz", kernel=lk.correlation(feature).values)
    study.write(f"{name}.json", {"seconds": time.perf_counter() - began})


def smooth(study: Study, gamma: float, draws: int) -> None:
    """Average gradients over more draws than before; keep the kernel, and that of each half."""
    name = f"gamma-{gamma:g}"
    side = study.config.smoothed_side
    feature = features(study, f"{name}.zarr", side, gamma, draws, trained=True)
    reliability = np.float64(feature.attrs["reliability"])
    study.save(f"{name}/{draws}.npz", kernel=smoothed(feature), reliability=reliability)


def lift_of(study: Study, near: xr.Dataset) -> xr.Dataset:
    """Return the taxonomic lift of neighbours."""
    return wnids.lift_of(near, labels_of(study), study.config.seed)


def near_of(study: Study, kernel: np.ndarray) -> xr.Dataset:
    """Return the nearest of each image under a similarity matrix."""
    values, k = np.array(kernel), study.config.neighbors
    np.fill_diagonal(values, -np.inf)
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return xr.Dataset(
        {
            "neighbor": (("sample", "rank"), order),
            "similarity": (("sample", "rank"), np.take_along_axis(values, order, 1)),
        },
        coords={
            "sample": np.arange(len(values)),
            "rank": np.arange(k),
            "label": ("sample", labels_of(study)),
        },
    )


def cosine(values: np.ndarray) -> np.ndarray:
    """Return the correlation of rows."""
    return np.asarray(np.corrcoef(values))


def kernels_of(study: Study) -> dict[str, np.ndarray]:
    """Return every kernel and control, by what it is."""
    kernels = {
        CENTER: study.load("center.npz")["kernel"],
        UNTRAINED: study.load("untrained.npz")["kernel"],
    }
    for gamma in study.config.gammas:
        kept = study.load(f"gamma-{gamma:g}/{study.config.smooth}.npz")
        kernels[f"averaged, gamma {gamma:g}"] = kept["kernel"]
    for name, values in study.load("controls.npz").items():
        if not name.startswith("right"):
            kernels[name] = cosine(values)
    return kernels


def right_at(study: Study, gamma: float, draws: int = 4) -> float:
    """Return the share of images that networks of the law get right."""
    inputs, targets = data_set(study, study.config.smoothed_side).tensors
    model = network()
    random = torch.Generator().manual_seed(study.config.seed)
    center = {name: p.detach().clone() for name, p in model.named_parameters()}
    shares = []
    for _ in range(draws):
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.randn(p.shape, generator=random)
                p.copy_(center[name] + noise / gamma**0.5)
        logits = outputs(model, inputs)["logits"]
        shares.append(float((logits.argmax(1) == targets).float().mean()))
    return float(np.mean(shares))


def extrapolated(points: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return lift without end of draws, by depth: a straight line in 1 / draws, and its error."""
    some = points[-3:] if len(points) > 3 else points
    draws = [point["draws"] for point in some]
    y = np.array([point["lift"]["lift"] for point in some], dtype=float)  # (point, depth)
    if len(draws) < 2:
        return []
    limits, _, misfits = at_infinity(draws, y)
    depths = some[0]["lift"]["depth"]
    return [
        {"depth": depth, "lift": float(limit), "misfit": float(misfit)}
        for depth, limit, misfit in zip(depths, limits, misfits, strict=True)
        if np.isfinite(limit)
    ]


def measure(study: Study) -> None:
    """Compute every number of the report."""
    config = study.config
    curves = {}
    with progress.bar("lifts", total=len(config.gammas), show=study.show) as bar:
        for gamma in config.gammas:
            points = []
            for draws in counts(config.smooth):
                kept = study.load(f"gamma-{gamma:g}/{draws}.npz")
                lift = wnids.numbers(lift_of(study, near_of(study, kept["kernel"])))
                reliable = float(kept["reliability"])
                points.append({"draws": draws, "lift": lift, "reliability": reliable})
            curves[f"{gamma:g}"] = {
                "right": right_at(study, gamma),
                "points": points,
                "extrapolated": extrapolated(points),
            }
            bar.update()
    held = study.load("controls.npz")
    metrics = {
        "lifts": {
            name: wnids.numbers(lift_of(study, near_of(study, kernel)))
            for name, kernel in kernels_of(study).items()
        },
        "curves": curves,
        "right": {n.split()[1]: float(v.mean()) for n, v in held.items() if n.startswith("right")},
        "center_seconds": study.read("center.json")["seconds"],
    }
    study.write("metrics.json", metrics, allow_nan=True)


def rows_of(m: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report."""
    rows = [
        (f"Lift by depth: {name}", wnids.lift_text(lift), "chance: 1")
        for name, lift in m["lifts"].items()
    ]
    for gamma, curve in m["curves"].items():
        last = curve["points"][-1]
        rows += [
            (
                f"gamma {gamma}: reliability of R; images right there",
                f"{last['reliability']:.2f} of {last['draws']} draws; {curve['right']:.1%}",
                "",
            ),
            (
                "... lift by depth, extrapolated to infinitely many draws",
                ", ".join(f"{e['depth']:.0f}: {e['lift']:.2f}" for e in curve["extrapolated"]),
                "",
            ),
        ]
    rows.append(("Seconds of the gradients at w*", f"{m['center_seconds']:.0f}", "bar: 300"))
    return rows


def draw_curves(m: dict[str, Any]) -> Figure:
    """Draw lift against draws at some depths, a panel a gamma."""
    figure = Figure(figsize=(4.4 * len(m["curves"]) + 0.6, 4.2), layout="constrained")
    panels = figure.subplots(1, len(m["curves"]), squeeze=False, sharey=True)[0]
    for axes, (gamma, curve) in zip(panels, m["curves"].items(), strict=True):
        draws = [point["draws"] for point in curve["points"]]
        for column, depth in enumerate(curve["points"][0]["lift"]["depth"]):
            if depth in (4, 6, 7, 9, 12):
                points = [
                    tuple(point["lift"][key][column] for key in ("lift", "low", "high"))
                    for point in curve["points"]
                ]
                curve_with_errors(axes, draws, points, f"depth {depth:.0f}")
        axes.axhline(1, color="black", lw=1, ls=":")
        axes.set(xscale="log", xlabel="draws", title=f"gamma {gamma}: {curve['right']:.0%} right")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("lift (chance: 1)")
    panels[0].legend(frameon=False)
    return figure


def report(study: Study) -> None:
    """Write the report folder."""
    config, m = study.config, study.read("metrics.json")
    kernels = kernels_of(study)
    shown = {name: lift_of(study, near_of(study, kernel)) for name, kernel in kernels.items()}
    near = near_of(study, kernels[CENTER])
    taxonomy = lk.Taxonomy.imagenet()
    points = lk.embed(near, seed=config.seed)
    hues: Any = taxonomy.hues()
    figures = [
        workflow.Figure(
            "map",
            "The images by their gradients",
            "UMAP of the cosines of gradients of log-odds at w*; colour is the place of the class "
            "in WordNet, so that related classes look alike.",
            plots.neighbor_map(points, by="label", hues=hues),
        ),
        workflow.Figure(
            "lift",
            "Lift of kernels and controls",
            "Neighbours share an ancestor at this depth so many times as often as chance.",
            plots.lift_curves(shown, title="Taxonomic lift of 1,000 images"),
        ),
        workflow.Figure(
            "draws",
            "Lift against draws",
            "Gradients averaged over draws of N(w*, I / gamma).",
            draw_curves(m),
        ),
    ]
    study.report(
        title="ImageNet's hierarchy from gradients",
        summary=[
            f"{config.classes:,} images of ImageNet, one a class; EfficientNet-Lite0's published "
            f"weights; gradients of log-odds, sketched to {config.sketch:,} numbers; at w* with "
            f"{config.side} pixels, averaged over {config.smooth} draws with "
            f"{config.smoothed_side}."
        ],
        metrics=m,
        rows=rows_of(m),
        figures=figures,
        next_steps=f'features = lk.open("{study.path("center.zarr")}")["features"]\n'
        "lk.taxonomic_lift(features, lk.Taxonomy.imagenet())",
    )
