"""Does it hold for another network and other data? Audit, map and attacks again.

See Anonymous 2026, A.15, A.16.

A small CNN of 2.5 times LeNet-5's parameters learns SVHN (or with ``--dataset fashion`` what needs
no network), recorded once. Then `lenet_audit`, `ips_map` and `adversarial` are asked of that run,
each in a folder of its own with its own report, and what they say stands here beside the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

from matplotlib.figure import Figure
from matplotlib.image import imread
from pydantic import Field

import lkarray as lk
from lkarray import workflow
from lkarray.errors import SettingsError
from lkarray_workflows.shared.attacks import require_foolbox
from lkarray_workflows.shared.images import CLASSES, Dataset
from lkarray_workflows.shared.recorded import SHARED, Training, check
from lkarray_workflows.studies import adversarial, ips_map, lenet_audit, lenet_training


class Config(Training):
    """Settings. The paper gives none of the training's but the network and the data."""

    presets: ClassVar = {
        "paper": {
            "batches": 200,
            "epochs": 50,
            "learning_rate": 1e-4,
            "audited": 256,
            "pairs": 64,
            "detailed": 12,
            "observed": 2000,
            "features": 1000,
            "times": 51,
            "profiled": 2000,
        },
        "small": {
            "batches": 10,
            "batch_size": 64,
            "epochs": 6,
            "learning_rate": 1e-3,
            "audited": 16,
            "detailed": 4,
            "pairs": 6,
            "observed": 200,
            "features": 120,
            "times": 4,
            "profiled": 10,
            "modes": 60,
            "radius": 0.3,
            "trak_size": 64,
        },
    }

    dataset: Dataset = "svhn"
    network: Literal["lenet", "cnn"] = "cnn"
    batches: int = Field(60, ge=1, description="of an epoch")
    epochs: int = Field(6, ge=2)
    learning_rate: float = Field(5e-4, gt=0, description="of Adam")
    audited: int = Field(64, ge=2, description="test images")
    detailed: int = Field(8, ge=1, description="audited by layer and epoch too")
    profiled: int = Field(60, ge=2, description="steps whose cost is measured")
    trak_size: int = Field(512, ge=8, description="columns of TRAK's projection")
    observed: int = Field(1000, ge=50, description="test images of the map, and of its scores")
    pairs: int = Field(24, ge=2, description="images attacked")
    radius: float = Field(0.05, gt=0, description="of the attack: it needs less here (figure 35)")
    features: int = Field(500, ge=100, description="training images whose gradients give modes")
    modes: int = Field(125, ge=50)
    times: int = Field(7, ge=3, description="epochs, evenly spaced, of what is asked over time")


Study = workflow.Study[Config]


#: Of A.16's tables: mean reconstruction error, correlation; seconds over training's, GiB.
PAPER = {
    "audit": ((0.0404, 0.99789), (8.3, 10.7)),
    "supersampled twice": ((0.0327, 0.99907), (9.2, 10.8)),
    "stride 2": ((0.1255, 0.98326), (7.4, 16.0)),
}
#: Figures of each study that are shown here too.
SHOWN = {
    "audit": ("completeness", "decision", "class_own", "class_decided"),
    "map": ("map", "target", "distance"),
    "adversarial": ("inputs", "influence", "magnitude", "regime", "shifts", "cancellation"),
}


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the studies in ``folder``, or continue them; return what to tell the user."""
    if config.trained is not None:
        raise SettingsError(
            "svhn trains a network for its studies: --trained is a setting of those"
        )
    check(config)
    require_foolbox()
    prepared = studies(config, folder)  # and with that their settings are checked
    with workflow.Study("svhn", config, folder, progress) as study:
        for name, work in prepared.items():
            study.stage(name, work, f"{name}/report/index.html")
        study.stage("report", report, "report/index.html")
        if not config.keep:
            lk.discard_trace(study.path("training/train.zarr"))
            lk.discard_gradients(study.path("training/gradients.zarr"))
    return f"Report  {study.index}"


def studies(config: Config, folder: Path) -> dict[str, Callable[[Study], object]]:
    """Return what runs each study in its folder."""
    shared = {key: getattr(config, key) for key in (*SHARED, "data")}
    shared |= {"trained": folder / "training"}

    def prepared(module: Any, name: str, **options: Any) -> Callable[[Study], object]:
        settings = module.Config(**(shared | options))

        def work(study: Study) -> object:
            return module.run(settings, study.path(name), progress=study.show)

        return work

    scores = {"score_test": config.observed, "score_train": config.observed}
    return {
        "training": prepared(
            lenet_training, "training", trained=None, keep=True, features=config.features
        ),
        "audit": prepared(
            lenet_audit,
            "audit",
            audited=config.audited,
            detailed=min(config.detailed, config.audited),
            profiled=config.profiled,
            trak_size=config.trak_size,
            trak_train=min(5120, config.batches * config.batch_size),
        ),
        "map": prepared(
            ips_map,
            "map",
            observed=config.observed,
            **scores,
            score_epochs=min(10, config.epochs),
        ),
        "adversarial": prepared(
            adversarial,
            "adversarial",
            pairs=config.pairs,
            radius=config.radius,
            tried=min(4000, config.batches * config.batch_size),
            detailed=min(config.detailed, config.pairs),
            predicted=2,
            features=config.features,
            modes=config.modes,
            times=config.times,
            seeds=1,
            correction=config.radius,
        ),
    }


def cost_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return what the network is, and what its audits reach and cost."""
    table, profile = metrics["audit"]["table"], metrics["audit"]["profile"]
    sizes = metrics["training"]["parameters"]
    return [
        ("Parameters", f"{sum(sizes.values()):,}", "paper: about 2.5 times LeNet-5's 61,706"),
        (
            "Right: training, test",
            "{train:.1%}, {test:.1%}".format(**metrics["training"]["accuracy"]),
            "",
        ),
        *(
            (
                f"{name}: mean reconstruction error, correlation",
                f"{table[name]['mre']:.4f}, {table[name]['lc']:.6f}",
                "paper: {:g}, {:g}".format(*accuracy),
            )
            for name, (accuracy, _) in PAPER.items()
        ),
        *(
            (
                f"{name}: seconds over training's, GiB",
                f"{profile[name]['seconds'] / profile['training']['seconds']:.2f}, "
                f"{profile[name]['gib']:.2f}",
                "paper: {:g}, {:g}".format(*cost),
            )
            for name, (_, cost) in PAPER.items()
        ),
    ]


def finding_rows(metrics: dict[str, Any], pairs: int) -> list[tuple[str, str, str]]:
    """Return what the map and the attacks show."""
    attacked, near = metrics["adversarial"]["networks"][0], metrics["map"]["map"]
    regime = attacked["time"]["half_way"]
    return [
        (
            "IPS within and between classes",
            f"{near['within']:.3f}, {near['between']:.3f}",
            "paper: much higher within",
        ),
        (
            "Loss audit of attacked images: mean error, correlation",
            f"{attacked['audit']['mre']:.4f}, {attacked['audit']['lc']:.6f}",
            "paper: 0.046, 0.993",
        ),
        *(
            (
                f"Gross influence on {kind} images over clean ones",
                f"{attacked['audit']['gross'][kind] / attacked['audit']['gross']['clean']:.2f}",
                "paper: higher" if kind == "adversarial" else "",
            )
            for kind in ("adversarial", "random", "natural error")
        ),
        (
            "Median correlation of influence on adversarial with that on clean images",
            f"{sorted(attacked['audit']['correlation']['adversarial'])[pairs // 2]:.3f}",
            "paper: above 0.99",
        ),
        (
            "Epochs half way to the end's features, subspace, activations",
            f"{regime['features']}, {regime['subspace']}, {regime['activations']}",
            "paper: 10 to 20",
        ),
        (
            "Adversarial over random shift of mode coefficients",
            f"{attacked['modes']['shift_ratio']:.1f}",
            "paper: about 100",
        ),
    ]


def report(study: Study) -> None:
    """Write the report folder, from the studies' own."""
    config = study.config
    metrics = {name: study.read(f"{name}/report/metrics.json") for name in ("training", *SHOWN)}
    study.report(
        title="Another network, other data",
        summary=[
            f"{config.network} on {CLASSES[config.dataset][0]}, {config.epochs} epochs of "
            f"{config.batches} batches, Adam {config.learning_rate:g}. The paper's numbers are "
            "of SVHN.",
            "The studies' own reports are in the folders training, audit, map, adversarial.",
        ],
        metrics=metrics,
        rows=cost_rows(metrics) + finding_rows(metrics, config.pairs),
        figures=[
            workflow.Figure(
                f"{name}_{figure}",
                f"{name.capitalize()}: {figure}",
                "",
                picture(study.path(f"{name}/report/{figure}.png")),
            )
            for name, figures in SHOWN.items()
            for figure in figures
        ],
        next_steps=f'tree = lk.open("{study.path("audit/audits.zarr")}")',
    )


def picture(path: Path) -> Figure:
    """Return an image file as a figure."""
    image = imread(path)
    height, width = image.shape[:2]
    figure = Figure(figsize=(width / 130, height / 130))
    figure.figimage(image)
    return figure
