"""Which inputs a network treats alike over its whole training (Anonymous 2026, 6.2, A.16.2).

LeNet-5 learns MNIST (or Fashion-MNIST, or SVHN) as in Anonymous 2026, A.3. Intrinsic perceptual
similarity (IPS) of test images, summed over epochs: its map (figure 5), similarity to one image on
the map and against distance (figure 6), what the axes show within a class (figure 7), and IPS as a
score of difficulty beside others (table 1).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from pydantic import Field

import lkarray as lk
from lkarray import plots, store, workflow
from lkarray_workflows.shared.common import plain_numbers
from lkarray_workflows.shared.images import CLASSES, NAMES
from lkarray_workflows.shared.recorded import (
    TEST,
    Trained,
    Training,
    check,
    discard,
    last_hidden,
    logits_of,
    losses_of,
    train,
)

#: Scores of table 1, and the paper's numbers, of MNIST.
PAPER = {
    "IPS norm": (0.9009, 0.5008, 0.2667),
    "IPS class margin": (1.0, 1.0, 0.8046),
    "hidden top-k similarity": (0.8633, 0.3929, 0.6253),
    "max-softmax": (0.9054, 0.4964, 0.9823),
    "logit margin": (0.9016, 0.4786, 0.9729),
}
MEASURES = ("auroc", "aupr", "spearman")
#: Classes whose axes are shown; of digits the paper has 7.
SHOWN = {"fashion": (1, 9), "mnist": (7, 1), "svhn": (7, 1)}


class Config(Training):
    """Settings; the defaults are the paper's."""

    presets: ClassVar = {
        "paper": {},
        "small": {
            "batches": 10,
            "batch_size": 64,
            "epochs": 4,
            "learning_rate": 1e-3,
            "observed": 400,
            "score_test": 400,
            "score_train": 500,
            "score_epochs": 4,
            "neighbors": 15,
            "replicates": 200,
        },
    }

    observed: int = Field(2000, ge=50, le=TEST, description="test images of the map")
    neighbors: int = Field(30, ge=2, description="of each image, which UMAP keeps together")
    score_test: int = Field(2000, ge=50, le=TEST, description="test images of table 1")
    score_train: int = Field(5000, ge=50, description="training images of table 1")
    score_epochs: int = Field(10, ge=1, description="epochs, evenly spaced, of table 1")
    replicates: int = Field(1000, ge=0, description="resamplings of table 1's intervals")


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    check(config)
    with workflow.Study("ips_map", config, folder, progress) as study:
        recorded = train(study, every=config.batches)
        for name, work in STAGES.items():
            study.stage(name, work, f"{name}.json", recorded)
        study.stage("report", report, "report/index.html", recorded)
        if not config.keep:
            lk.discard_gradients(study.path("maps.zarr"))
        discard(config, recorded)
    return f"Report  {study.index}\nStore   {study.path('maps.zarr')}"


def factors(study: Study, run: Trained) -> dict[str, xr.Dataset]:
    """Return the gradients' factors, of every epoch for the map and of some for table 1.

    Those that are stored already are opened.
    """
    config = study.config
    trace = run.trace()
    some = run.epochs(config.score_epochs + 1)[:-1]  # the last has no step, and so no weight
    sets: dict[str, tuple[str, int, Any]] = {
        "map": ("test", config.observed, "epoch"),
        "score_test": ("test", config.score_test, some),
        "score_train": ("train", config.score_train, some),
    }
    by_set = {}
    for name, (split, count, times) in sets.items():
        images = run.images(split, count)
        by_set[name] = lk.gradient_factors(
            trace,
            images,
            times,
            name=name,
            coords={"label": images.tensors[1].numpy()},
            store=study.path("maps.zarr"),
            progress=study.show,
        )
    return by_set


def make_factors(study: Study, run: Trained) -> None:
    """Store the factors of the images' gradients."""
    sizes = {name: int(stored.nbytes) for name, stored in factors(study, run).items()}
    study.write("factors.json", sizes)


def make_map(study: Study, run: Trained) -> None:
    """Embed test images by IPS, misclassified ones marked."""
    config = study.config
    kernel = lk.ips(factors(study, run)["map"]).compute()
    images, labels = run.images("test", config.observed).tensors
    wrong = (logits_of(run.final(), images).argmax(1) != labels).numpy()
    kernel = kernel.assign_coords(misclassified=("example", wrong))
    points = lk.embed(kernel, seed=config.seed, k=config.neighbors)
    store.put(study.path("maps.zarr"), "ips", kernel)
    store.put(study.path("maps.zarr"), "map", points)
    codes, xy = labels.numpy(), points.values
    centers = {c: np.median(xy[codes == c], axis=0) for c in np.unique(codes)}
    far = np.linalg.norm(xy - np.stack([centers[c] for c in codes]), axis=1)
    first, last = np.triu_indices(len(codes), 1)
    values, same = kernel.values[first, last], codes[first] == codes[last]
    metrics = {
        "within": float(values[same].mean()),
        "between": float(values[~same].mean()),
        "between_negative": float((values[~same] < 0).mean()),
        "distance_from_class_center": {
            name: float(np.median(far[chosen])) if chosen.any() else None
            for name, chosen in (("wrong", wrong), ("right", ~wrong))
        },
        "accuracy": float((~wrong).mean()),
    }
    study.write("map.json", metrics)


def similarity(study: Study, run: Trained) -> None:
    """Compare similarity with distance on the map; choose the first image that is right as target.

    The paper does not say how its target was chosen.
    """
    kernel, points = read(study, "ips"), read(study, "map")
    table = lk.similarity_by_distance(kernel, points)
    store.put(study.path("maps.zarr"), "similarity_by_distance", table)
    rank = plain_numbers(table["rank_correlation"].values)
    metrics = {
        "rank_correlation": dict(zip(table["pairs"].values.tolist(), rank, strict=True)),
        **{
            key: {
                name: plain_numbers(table[key].sel(pairs=name).values)
                for name in ("within", "between")
            }
            for key in ("distance", "mean", "sd", "count")
        },
        "target": int(np.argmin(points["misclassified"].values)),
    }
    study.write("similarity.json", metrics)


def scores(study: Study, run: Trained) -> None:
    """Table 1: scores of difficulty, against misclassification and loss."""
    config = study.config
    made = factors(study, run)
    test = run.images("test", config.score_test)
    model = run.final()
    logits = logits_of(model, test.tensors[0])
    predicted, labels = logits.argmax(1).numpy(), test.tensors[1].numpy()
    own = lk.ips_scores(
        lk.ips(made["score_test"], made["score_train"]), "label_2", predicted
    ).compute()
    trace = run.trace()
    known, unknown = (
        lk.activations(trace, images, [trace.steps], module=last_hidden(model)).isel(time=0)
        for images in (run.images("train", config.score_train), test)
    )
    train_labels = made["score_train"]["label"].values
    near = lk.hidden_similarity(unknown, known, train_labels, predicted).compute()
    top = logits.topk(2).values
    values: tuple[np.ndarray, ...] = (
        own["norm"].values,
        own["margin"].values,
        near.values,
        torch.softmax(logits, 1).amax(1).numpy(),
        (top[:, 0] - top[:, 1]).numpy(),
    )
    share = float((predicted != labels).mean())
    if share in (0, 1):  # nothing to tell apart
        study.write("scores.json", {"table": {}, "share_wrong": share})
        return
    table = lk.difficulty_table(
        dict(zip(PAPER, values, strict=True)),
        predicted != labels,
        losses_of(model, test),
        replicates=config.replicates,
        seed=config.seed,
    )
    store.put(study.path("maps.zarr"), "difficulty", table)
    rows = {
        name: dict(
            zip(table, plain_numbers([table[key].sel(score=name) for key in table]), strict=True)
        )
        for name in PAPER
    }
    study.write("scores.json", {"table": rows, "share_wrong": table.attrs["share_wrong"]})


def read(study: Study, name: str) -> xr.DataArray:
    """Return a result that the study stored."""
    node = lk.open(study.path("maps.zarr"))[f"derived/{name}"].to_dataset().load()
    (values,) = node.data_vars.values()
    return values


#: What the study does to the run, in this order.
STAGES: dict[str, Callable[[Study, Trained], None]] = {
    "factors": make_factors,
    "map": make_map,
    "similarity": similarity,
    "scores": scores,
}


def figures_of(study: Study, run: Trained, target: int) -> list[workflow.Figure]:
    """Return the figures of the map."""
    config = study.config
    kernel, points = read(study, "ips"), read(study, "map")
    by_distance = (
        lk.open(study.path("maps.zarr"))["derived/similarity_by_distance"].to_dataset().load()
    )
    names = NAMES[config.dataset]
    codes = points["label"].values
    named = points.assign_coords({"class": ("example", [names[c] for c in codes])})
    drawn = plots.neighbor_map(named, by="class", mark="misclassified")
    drawn.axes[0].set_title(f"IPS map of {len(points):,} test images")
    with np.load(run.data) as data:
        images = data["test_images"][: config.observed]
    target_name = f"The target is the first image that is right: {names[codes[target]]}"
    figures = [
        workflow.Figure(
            "map",
            "IPS map",
            "By class; misclassified images are ringed (Anonymous 2026, figure 5).",
            drawn,
        ),
        workflow.Figure(
            "target",
            "Similarity to one image",
            f"{target_name}. All images, and those of its class (figure 6).",
            plots.similarity_to_target(points, kernel[target], target),
        ),
        workflow.Figure(
            "distance",
            "Similarity against distance on the map",
            f"{target_name}. Gray: similarities to it; colour: all pairs, by bins of distance.",
            plots.similarity_against_distance(points, kernel[target], target, by_distance),
        ),
    ]
    for c in SHOWN[config.dataset]:
        own = codes == c
        if own.sum() > 1:
            figures.append(
                workflow.Figure(
                    f"axes_{c}",
                    f"Axes of the map within class {names[c]}",
                    "Images at the ends of each axis (figure 7).",
                    plots.axis_extremes(points[own], images[own]),
                )
            )
    return figures


def rows_of(
    map_: dict[str, Any], near: dict[str, Any], table: dict[str, Any]
) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report."""
    far, rank = map_["distance_from_class_center"], near["rank_correlation"]
    return [
        ("Accuracy on test images", f"{map_['accuracy']:.1%}", "paper (MNIST): 93%"),
        (
            "IPS within / between classes",
            f"{map_['within']:.3f} / {map_['between']:.3f}",
            "paper: positive / negative",
        ),
        ("Pairs of two classes with negative IPS", f"{map_['between_negative']:.1%}", ""),
        (
            "Distance from the class's center on the map, wrong / right",
            f"{shown(far['wrong'])} / {shown(far['right'])}",
            "paper: errors at the edges",
        ),
        (
            "Rank correlation of IPS and distance on the map, within / between classes",
            f"{shown(rank['within'])} / {shown(rank['between'])}",
            "paper: similarity falls smoothly",
        ),
        ("Share of images that are wrong, the AUPR of chance", f"{table['share_wrong']:.1%}", ""),
    ] + [
        (
            f"{name}: AUROC, AUPR, Spearman with -loss",
            ", ".join(interval(row, key) for key in MEASURES),
            "paper (MNIST): {:.3f}, {:.3f}, {:.3f}".format(*PAPER[name]),
        )
        for name, row in table["table"].items()
    ]


def report(study: Study, run: Trained) -> None:
    """Write the report folder."""
    config = study.config
    made, map_, near, table = (study.read(f"{name}.json") for name in STAGES)
    study.report(
        title="Which inputs look alike to LeNet-5",
        summary=[
            f"{config.batches * config.batch_size:,} training images of "
            f"{CLASSES[config.dataset][0]}, {config.epochs} epochs, Adam "
            f"{config.learning_rate:g}; IPS once an epoch. The gradient of a loss holds its "
            "label, so that classes are islands by construction in part (remark 4.3).",
            f"Table 1: {config.score_test:,} test and {config.score_train:,} training images; "
            "brackets are 95% intervals, bootstrapped over test images.",
        ],
        metrics={
            "map": map_,
            "similarity": near,
            **table,
            "paper": PAPER,
            "factor_bytes": made,
        },
        rows=rows_of(map_, near, table),
        figures=figures_of(study, run, near["target"]),
        next_steps=f'similarity = lk.open("{study.path("maps.zarr")}")["derived/ips"]["ips"]\n'
        "lk.embed(similarity, k=10)",
    )


def shown(value: float | None) -> str:
    """Return a number as a row of the report has it."""
    return "none" if value is None else f"{value:.2f}"


def interval(row: dict[str, float | None], key: str) -> str:
    """Return a number and its interval, if there is one."""
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    ends = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{'none' if row[key] is None else format(row[key], '.3f')}{ends}"
