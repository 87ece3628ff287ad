"""What the study of LeNet-5's decisions says: tables beside the paper's, figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

import lkarray as lk
from lkarray import plots, store, workflow
from lkarray_workflows.shared.images import CLASSES, NAMES
from lkarray_workflows.shared.recorded import Trained

#: What the paper has for each (A.5, A.11, A.12; MNIST): mean reconstruction error, correlation.
#: Its TracIn of all layers (0.090, 0.991) is its euler rule, and so beside ours: it follows Adam's
#: updates, where TracIn as published, and here, multiplies gradients by the learning rate alone.
PAPER = {
    "audit": (0.0104, 0.999998),
    "euler": (0.0901, 0.990681),
    "supersampled twice": (0.0104, 0.999998),
    "stride 2": (0.0133, 0.999976),
    "stride 5": (0.0217, 0.999786),
    "TRAK, 1 checkpoint": (2.3902, 0.6099),
    "TRAK, 5 checkpoints": (2.9349, 0.5152),
}


#: Of A.5's table: seconds over those of plain training, GiB.
PAPER_COST = {
    "training": (1.0, 0.435),
    "audit": (17.8, 2.915),
    "euler": (17.5, 2.859),
    "supersampled twice": (18.4, 3.039),
    "stride 2": (13.9, 4.991),
    "stride 5": (9.0, 5.084),
}


def wrong_of(audit: xr.Dataset) -> np.ndarray:
    """Return which audited images the network takes for another class."""
    return np.flatnonzero(audit["label"].values != audit["predicted"].values)


def figures_of(study: workflow.Study[Any], run: Trained) -> list[workflow.Figure]:
    """Return the figures of the report."""
    tree = lk.open(study.path("audits.zarr"))
    audit, detailed = (tree[name].to_dataset() for name in ("audit", "audit_detail"))
    wrong = wrong_of(audit)
    place = int(wrong[0]) if len(wrong) else 0
    which = "One wrong decision" if len(wrong) else "One decision (none is wrong)"
    with np.load(run.data) as data:
        train_images, test_images = data["train_images"], data["test_images"]
    decided = int(audit["predicted"][place])
    top = lk.most_influential(audit, 25).compute()
    by = lk.most_influential(audit, 25, by="train_label").compute()
    store.put(study.path("audits.zarr"), "most_influential", top)
    names = NAMES[run.config.dataset]
    said = f"{names[int(audit['label'][place])]} taken for {names[decided]}"
    return [
        workflow.Figure(
            "completeness",
            "Reconstruction over training",
            "Mean error, and correlation with the true changes (Anonymous 2026, figure 1).",
            plots.completeness(audit),
        ),
        workflow.Figure(
            "decision",
            which,
            f"A {said}, and the influence of every training image on its loss, sorted (figure 2).",
            plots.decision(audit, place, image=test_images[place]),
        ),
        workflow.Figure(
            "images",
            "What helped and what harmed",
            "Training images that lowered its loss most, and that raised it most (figure 3).",
            plots.influential_images(top, train_images, place),
        ),
        *(
            workflow.Figure(
                f"class_{kind}",
                f"The same among {names[label]}",
                f"Images of the class that it {verb} (figure 4).",
                plots.influential_images(by.sel(train_label=label), train_images, place),
            )
            for kind, verb, label in (
                ("decided", "was taken for", decided),
                ("own", "is of", int(audit["label"][place])),
            )
        ),
        workflow.Figure(
            "concentration",
            "Concentration of influence",
            "Share of the summed magnitudes held by the most influential training images.",
            plots.concentration(audit),
        ),
        workflow.Figure(
            "layers",
            "Influence by layer and epoch",
            "Sums, and sums of magnitudes over classes of training images (figure 10).",
            plots.layer_epoch(detailed),
        ),
    ]


def rows_of(
    table: dict[str, Any], profile: dict[str, Any], wrong: float
) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report; ``wrong`` is a share of the audited images."""
    return [
        (
            f"{name}: mean reconstruction error, correlation",
            f"{row['mre']:.5f}, {row['lc']:.7f}",
            "paper: {:g}, {:g}".format(*PAPER[name]) if name in PAPER else "",
        )
        for name, row in table.items()
    ] + [
        *(
            (
                f"{name}: seconds over training's, GiB",
                f"{row['seconds'] / profile['training']['seconds']:.2f}, {row['gib']:.2f}",
                "paper: {:g}, {:g}".format(*PAPER_COST[name]),
            )
            for name, row in profile.items()
        ),
        ("Mean change of a loss", f"{table['audit']['change']:.3f} nats", ""),
        ("Parts against their sum (closure)", f"{table['audit']['closure']:.1e}", ""),
        (
            "Accuracy on the audited images",
            f"{1 - wrong:.1%}",
            "paper: 93% (of MNIST's test set)",
        ),
    ]


def report(study: workflow.Study[Any], run: Trained) -> None:
    """Write the report folder."""
    config, path = study.config, study.path("audits.zarr")
    tree = lk.open(path)
    audit, detailed = (tree[name].to_dataset() for name in ("audit", "audit_detail"))
    wrong = len(wrong_of(audit)) / audit.sizes["audit"]
    table = {"audit": study.read("audit.json"), **study.read("rules.json")}
    table |= study.read("others.json")
    profile = study.read("profile.json")
    count = len(run.images("train"))
    study.report(
        title="LeNet-5's decisions, decomposed",
        summary=[
            f"{count:,} training images of "
            f"{CLASSES[config.dataset][0]}, {config.epochs} epochs, Adam "
            f"{config.learning_rate:g}; {config.audited} test images audited. The paper's "
            "numbers are of MNIST."
        ],
        metrics={
            "table": table,
            "profile": profile,
            "layers": by_layer(detailed),
        },
        rows=rows_of(table, profile, wrong),
        figures=figures_of(study, run),
        next_steps=f'audit = lk.open("{path}")["audit"].to_dataset()\n'
        "lk.most_influential(audit, 10)",
    )


def by_layer(detailed: xr.Dataset) -> dict[str, Any]:
    """Return net and gross influence of layers and epochs, ``(layer, epoch)``, means of images."""
    parts = {"net": lk.net_influence(detailed), "gross": lk.gross_influence(detailed)}
    tables = {k: v.mean("audit").transpose("layer", "epoch").values for k, v in parts.items()}
    return {"names": [str(name) for name in detailed["layer"].values]} | {
        name: table.tolist() for name, table in tables.items()
    }
