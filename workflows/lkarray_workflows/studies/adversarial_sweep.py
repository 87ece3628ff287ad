"""What the correction of attacked images depends on: attack, tau, radius, whose drives.

See Anonymous 2026, 6.3, A.9.

The paper says that a correction along the modes of the training gradients restores attacked images,
and gives neither the attack nor the correction's radius and shift tau, nor over which images drives
are summed. Of one network, every combination is tried beside the controls: noise as large, signs of
drives at random, another attack. What is chosen on one seed is to be read off at another's.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from pydantic import Field, model_validator

import lkarray as lk
from lkarray import store, workflow
from lkarray_workflows.shared.adversarial_cure import corrected
from lkarray_workflows.shared.adversarial_modes import SENSITIVE, modes_at_end
from lkarray_workflows.shared.attacks import (
    ATTACKS,
    KINDS,
    Attack,
    Pairs,
    attack,
    lengths,
    make_pairs,
    noise_like,
    require_foolbox,
)
from lkarray_workflows.shared.common import Numbers, Words
from lkarray_workflows.shared.images import CLASSES
from lkarray_workflows.shared.recorded import (
    Trained,
    Training,
    check,
    discard,
    logits_of,
    require_enough,
    train,
)

#: Images whose drives a correction goes against: the whole training set, or those of the modes.
DRIVES = ("all images", "images of the modes", "signs at random")
PERTURBED = KINDS[:3]


class Config(Training):
    """Settings; of the training the paper's."""

    presets: ClassVar = {
        "small": {
            "batches": 10,
            "batch_size": 64,
            "epochs": 6,
            "learning_rate": 2e-3,
            "attacks": ("pgd:0.4", "l2_pgd:4"),
            "corrections": (1.0,),
            "shifts": (1.0, 100.0),
            "tried": 600,
            "pairs": 8,
            "features": 150,
            "modes": 60,
            "correction_steps": 4,
        },
    }

    attacks: Words = Field(
        ("pgd:0.1", "pgd:0.2", "pgd:0.3", "deepfool:4"), min_length=1, description="kind:radius"
    )
    corrections: Numbers = Field(
        (0.5, 1.0), min_length=1, description="radii of the correction over the attack's size"
    )
    shifts: Numbers = Field((1.0, 10.0, 100.0), min_length=1, description="tau of algorithm 2")
    tried: int = Field(4000, ge=10, description="training images that are candidates")
    pairs: int = Field(32, ge=2, description="images attacked")
    features: int = Field(1000, ge=100, description="training images whose gradients give modes")
    modes: int = Field(125, ge=SENSITIVE)
    leading: int = Field(10, ge=1, description="modes that the correction shifts")
    correction_steps: int = Field(20, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        images = self.batches * self.batch_size
        require_enough(
            self,
            {
                "leading": self.modes,
                "modes": self.features,
                "pairs": self.tried,
                "features": images,
                "tried": images,
            },
        )
        for name in self.attacks:
            split(name)
        if min(*self.corrections, *self.shifts) <= 0:
            raise ValueError("corrections and shifts are above 0")
        return self


Study = workflow.Study[Config]


def split(name: str) -> tuple[Attack, float]:
    """Return the kind of an attack and its radius from ``"pgd:0.2"``."""
    kind, _, radius = name.partition(":")
    try:
        size = float(radius)
    except ValueError:
        size = 0.0
    if kind not in ATTACKS or not 0 < size < np.inf:
        raise ValueError(f"{name!r} is no attack: one of {sorted(ATTACKS)}, a colon, a radius")
    return cast(Attack, kind), size


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    check(config)
    require_foolbox()
    with workflow.Study("adversarial_sweep", config, folder, progress) as study:
        recorded = train(study, every=config.batches * config.epochs)  # the first state, the last
        study.stage("modes", make_modes, "modes.json", recorded)
        for name in config.attacks:
            study.stage(name, measure, file_of(name), recorded, name)
        study.stage("report", report, "report/index.html")
        discard(config, recorded)
        if not config.keep:
            lk.discard_gradients(study.path("modes.zarr"))
    return f"Report  {study.index}"


def file_of(name: str) -> str:
    """Return the name of the file with an attack's numbers."""
    return f"{name.replace(':', '_')}.json"


def make_modes(study: Study, run: Trained) -> None:
    """Decompose the training gradients at the end."""
    config, path = study.config, study.path("modes.zarr")
    G, modes = modes_at_end(run, config.features, config.modes, path, study.show)
    own = lk.mode_coefficients(modes, G.isel(time=0)).sum("example").compute()
    store.put(path, "modes", modes.assign(own_drive=("mode", own.values)).drop_vars("left"))
    signs = np.sign(modes["drive"].values) == np.sign(own.values)
    study.write("modes.json", {"signs_agree": float(signs[: config.leading].mean())})


def open_modes(study: Study) -> xr.Dataset:
    """Return the modes, with either drive."""
    modes: xr.Dataset = lk.open(study.path("modes.zarr"))["derived/modes"].to_dataset().load()
    return modes


def measure(study: Study, run: Trained, name: str) -> None:
    """Attack some images; measure shifts, cancellation, and every correction."""
    config, (kind, radius) = study.config, split(name)
    images = run.images("train", config.tried)
    pairs = make_pairs(
        run.final(), images, config.pairs, kind=kind, radius=radius, seed=run.seed, errors=False
    )
    modes = open_modes(study)
    moved = pairs.images["adversarial"] - pairs.images["clean"]
    sizes = moved.abs().flatten(1).amax(1) if ATTACKS[kind][1] == "linf" else lengths(moved)
    numbers = {
        "fooled": pairs.fooled,
        "size": float(sizes.median()),
        **coefficients_of(study, run, pairs, modes, file_of(name)[: -len(".json")]),
        "corrections": [
            one
            for factor in config.corrections
            for one in corrections_of(study, run, pairs, modes, kind, factor, float(sizes.median()))
        ],
    }
    study.write(file_of(name), numbers)


def coefficients_of(
    study: Study, run: Trained, pairs: Pairs, modes: xr.Dataset, name: str
) -> dict[str, Any]:
    """Return how far attacks shift mode coefficients, and how far their pushes cancel."""
    trace = run.trace()
    kinds = pairs.coords(PERTURBED)
    inputs = lk.gradient_features(
        trace,
        pairs.data(PERTURBED),
        [trace.steps],
        coords=kinds,
        name=name,
        store=study.path("modes.zarr"),
        progress=study.show,
    )
    # Examples of one kind stand beside those of another by their pairs, not by their numbers.
    coefficients = lk.mode_coefficients(modes, inputs.isel(time=0)).compute().drop_vars("example")
    of_kind = {kind: coefficients[kinds["kind"] == kind] for kind in PERTURBED}
    top = {"mode": slice(SENSITIVE)}
    shifts = {
        kind: lk.mode_shifts(modes.isel(top), of_kind["clean"].isel(top), of_kind[kind].isel(top))
        for kind in PERTURBED[1:]
    }
    attacked, noisy = (float(shifts[kind]["shift"].mean()) for kind in PERTURBED[1:])
    ratios = {
        kind: lk.cancellation_ratio(modes, of_kind[kind]).isel(mode=-1).values for kind in PERTURBED
    }
    gap = ratios["adversarial"] - ratios["clean"]
    return {
        "shift_ratio": attacked / noisy,
        "effective_modes": float(
            shifts["adversarial"]["effective_modes"].sel(factor="contribution")
        ),
        "cancellation": {kind: float(np.nanmean(ratio)) for kind, ratio in ratios.items()},
        "adversarial_minus_clean": {
            "mean": float(np.nanmean(gap)),
            "error": float(np.nanstd(gap, ddof=1) / np.isfinite(gap).sum() ** 0.5),
        },
    }


def corrections_of(
    study: Study,
    run: Trained,
    pairs: Pairs,
    modes: xr.Dataset,
    kind: Attack,
    factor: float,
    size: float,
) -> list[dict[str, Any]]:
    """Return shares of images that are right, of every correction of one radius, and controls."""
    config, model, labels = study.config, run.final(), pairs.labels["clean"]
    radius, adversarial = factor * size, pairs.images["adversarial"]

    def right(images: torch.Tensor) -> float:
        return float((logits_of(model, images).argmax(1) == labels).double().mean())

    leading = modes.isel(mode=slice(config.leading))
    signs = np.random.default_rng(run.seed).choice([-1.0, 1.0], config.leading)
    drives = dict(
        zip(DRIVES, (leading["drive"], leading["own_drive"], ("mode", signs)), strict=True)
    )
    said = logits_of(model, adversarial).argmax(1)
    again, _ = attack(model, adversarial, said, kind=kind, radius=radius, seed=run.seed)
    rows = []
    for shift, drive in product(config.shifts, DRIVES):
        turned = leading.assign(drive=drives[drive])
        moved = {
            some: corrected(
                run,
                pairs,
                some,
                turned,
                norm=ATTACKS[kind][1],
                shift=shift,
                radius=radius,
                steps=config.correction_steps,
            )
            for some in PERTURBED[1:]
        }
        change = moved["adversarial"] - adversarial
        noisy = noise_like(adversarial, change, kind, run.seed + 1)
        back = torch.cosine_similarity(
            change.flatten(1), (adversarial - pairs.images["clean"]).flatten(1), dim=1
        )
        rows.append(
            {
                "correction": factor,
                "shift": shift,
                "drives": drive,
                "adversarial": right(moved["adversarial"]),
                "random": right(moved["random"]),
                "noise": right(noisy),
                "attacked again": right(again),
                "cosine": float(back.mean()),
            }
        )
    return rows


def best_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the correction by the modes that leaves most images right, attacked or noisy."""
    by_modes = [row for row in rows if row["drives"] != DRIVES[2]]
    return max(by_modes, key=lambda row: row["adversarial"] + row["random"])


def rows_of(numbers: dict[str, Any], pairs: int) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report."""
    rows = []
    for name, one in numbers.items():
        best = best_of(one["corrections"])
        gap = one["adversarial_minus_clean"]
        rows += [
            (f"{name}: fools the network", f"{one['fooled']:.1%}", "most, in the paper"),
            (f"{name}: adversarial over random shift", f"{one['shift_ratio']:.1f}", "paper: 80"),
            (
                f"{name}: effective modes of the contribution",
                f"{one['effective_modes']:.1f}",
                "paper: 2.4",
            ),
            (
                f"{name}: cancellation ratio, adversarial minus clean",
                f"{gap['mean']:+.3f} +- {gap['error']:.3f}",
                "paper: negative",
            ),
            (
                f"{name}: best of {len(one['corrections'])} corrections of {pairs} images "
                f"(radius {best['correction']:g} of the attack's, tau {best['shift']:g}, drives of "
                f"{best['drives']})",
                f"adversarial {best['adversarial']:.1%}, random {best['random']:.1%}",
                "paper: 87.5%, 100%",
            ),
            (
                f"{name}: ... noise as large, attacked again",
                f"{best['noise']:.1%}, {best['attacked again']:.1%}",
                "paper: 15.6%, not tried",
            ),
        ]
    return rows


def report(study: Study) -> None:
    """Write the report folder."""
    config = study.config
    numbers = {name: study.read(file_of(name)) for name in config.attacks}
    agree = study.read("modes.json")
    study.report(
        title="What a correction of attacked images depends on",
        summary=[
            f"{config.network} on {CLASSES[config.dataset][0]}, {config.epochs} epochs, Adam "
            f"{config.learning_rate:g}, seed {config.seed}; {config.pairs} training images that "
            f"each attack fools. Of the {config.leading} leading modes, drives of "
            f"{config.features:,} images have the sign of those of the whole training set for "
            f"{agree['signs_agree']:.0%}.",
            "A best correction is the best of many on these images: what it does is to be read at "
            "the same settings in a run of another seed.",
        ],
        metrics={"attacks": numbers, **agree},
        rows=rows_of(numbers, config.pairs),
        figures=[
            workflow.Figure(
                "corrections",
                "Attacked images that corrections restore",
                "Solid: by modes; dashed: signs of drives at random; gray: noise as large; dotted: "
                "attacked again.",
                draw(numbers, config.corrections),
            )
        ],
        next_steps=f'lk.open("{study.path("modes.zarr")}")["derived/modes"]',
    )


def draw(numbers: dict[str, Any], corrections: tuple[float, ...]) -> Figure:
    """Draw the share of restored images against tau, a panel for each attack and radius."""
    figure = Figure(
        figsize=(2.6 * len(numbers) + 0.6, 2.4 * len(corrections) + 0.4), layout="constrained"
    )
    grid = figure.subplots(len(corrections), len(numbers), squeeze=False, sharey=True)
    for line, factor in zip(grid, corrections, strict=True):
        for axes, (name, one) in zip(line, numbers.items(), strict=True):
            rows = [row for row in one["corrections"] if row["correction"] == factor]
            for drive, style in zip(DRIVES, ("C0o-", "C1s-", "C2^--"), strict=True):
                own = [row for row in rows if row["drives"] == drive]
                x = [row["shift"] for row in own]
                axes.plot(x, [row["adversarial"] for row in own], style, ms=4, label=drive)
                if drive == DRIVES[0]:
                    axes.plot(x, [row["noise"] for row in own], color="0.6", label="noise")
            axes.axhline(rows[0]["attacked again"], color="black", ls=":", label="attacked again")
            axes.set(xscale="log", ylim=(-0.03, 1.03), title=f"{name}, radius x {factor:g}")
            axes.title.set_fontsize(9)
            axes.grid(alpha=0.25)
    for axes in grid[-1]:
        axes.set_xlabel("shift tau")
    for axes in grid[:, 0]:
        axes.set_ylabel("right")
    grid[0, -1].legend(fontsize=6.5, frameon=False)
    return figure
