"""What a draw is worth: estimates of one kernel against a long run, per draw and per second.

A network of digits is sampled at several localization strengths, long enough for half of the chains
to serve as the reference. The other half, the Laplace law and gradients then each estimate the same
kernel, and agreement with the reference, its own noise divided out, is measured against what they
cost (docs/noise.md; design of the estimates: Mehler's expansion, docs/methods/outcomes.md).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import lkarray as lk
from lkarray import progress, workflow
from lkarray_workflows.shared.common import (
    Numbers,
    accuracy,
    fit,
    keep_model,
    load_model,
    smoothed,
)
from lkarray_workflows.shared.estimates import (
    Pace,
    agreement,
    counts,
    curves,
    excess,
    least,
    pairs_of,
    shares,
)
from lkarray_workflows.shared.images import FOLDER, data_set, require_files, take_images
from lkarray_workflows.shared.noise_report import report
from lkarray_workflows.shared.recorded import lenet

#: Draws of two short runs, by which draws are timed.
PACED = (5, 45)


class Config(workflow.Config):
    """Settings; tuned on seed 0, reported on others."""

    presets: ClassVar = {
        "mnist": {
            "dataset": "mnist",
            "train": 60_000,
            "epochs": 5,
            "gammas": (30.0, 300.0, 1000.0, 3000.0),
            "nbeta": 100.0,
            "step_size": 1e-4,
            "thin": 10,
            "chains": 12,
            "draws": 200,
            "burn_in": 600,
            "sampler_batch": 256,
        },
        "small": {
            "train": 600,
            "observed": 60,
            "epochs": 20,
            "gammas": (300.0,),
            "chains": 4,
            "draws": 40,
            "burn_in": 20,
            "laplace_draws": 40,
            "smooth": 4,
            "rank": 10,
        },
    }

    seed: int = Field(1, ge=0, description="of the split, the training, the sampling")
    dataset: Literal["digits", "mnist"] = "digits"
    data: Path | None = Field(None, description=FOLDER)
    train: int = Field(1200, ge=100)
    observed: int = Field(300, ge=20, description="held-out images")
    epochs: int = Field(60, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(64, ge=1, description="of the training")
    gammas: Numbers = Field((30.0, 300.0, 3000.0), min_length=1)
    nbeta: float = Field(10.0, ge=0)
    step_size: float = Field(1e-3, gt=0, description="at most; 0.1 / gamma where that is less")
    sampler_batch: int = Field(128, ge=1)
    chains: int = Field(16, ge=4)
    draws: int = Field(400, ge=4, description="of a chain")
    burn_in: int = Field(1000, ge=0, description="steps")
    thin: int = Field(10, ge=1)
    laplace_draws: int = Field(400, ge=4, description="independent, together")
    rank: int = Field(100, ge=1, description="directions of curvature that the law knows")
    smooth: int = Field(32, ge=2, description="draws that gradients are averaged over")
    control: bool = Field(True, description="sample beside linear chains, from their law")


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    if config.dataset == "mnist":
        require_files(config, folder / "data.npz")  # type: ignore[arg-type]
    with workflow.Study("noise", config, folder, progress) as study:
        study.stage("data", make_data, "data.npz")
        study.stage("train", train, "model.pt")
        for gamma in config.gammas:
            at = f"gamma-{gamma:g}"
            study.stage(f"sample {gamma:g}", sample, f"{at}/sampled.json", gamma)
            study.stage(f"laplace {gamma:g}", sample_laplace, f"{at}/laplace.json", gamma)
            study.stage(f"gradients {gamma:g}", gradients, f"{at}/gradients.json", gamma)
        study.stage("measure", measure, "metrics.json")
        study.stage("report", report, "report/index.html")
    return f"Report  {study.index}\nStores  {folder}/gamma-*/*.zarr"


def make_data(study: Study) -> None:
    """Take the images to learn and those to observe."""
    config = study.config
    if config.dataset == "mnist":
        arrays = take_images(config, config.train, config.observed, seed=config.seed)  # type: ignore[arg-type]
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(config.seed).permutation(len(digits.target))
        images = (digits.images * (255 / 16)).round().astype(np.uint8)
        rows = {"train": order[: config.train], "test": order[-config.observed :]}
        arrays = {f"{s}_images": images[r] for s, r in rows.items()}
        arrays |= {f"{s}_labels": digits.target[r] for s, r in rows.items()}
    study.save("data.npz", **arrays)


def network(config: Config) -> nn.Module:
    """Return the untrained network: LeNet-5 for MNIST, one hidden layer of 24 for digits."""
    torch.manual_seed(config.seed)
    if config.dataset == "mnist":
        return lenet()
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


def train(study: Study) -> None:
    """Train with Adam."""
    config = study.config
    model = fit(
        network(config),
        data_set(study.path("data.npz"), "train"),
        rate=config.learning_rate,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        show=study.show,
    )
    keep_model(model, study.path("model.pt"))


def posterior_of(study: Study, gamma: float) -> tuple[lk.LocalPosterior, TensorDataset]:
    """Return the local posterior at one localization strength, and the observed images."""
    path, config = study.path("data.npz"), study.config
    model = load_model(network(config), study.path("model.pt"))
    data = data_set(path, "train")
    posterior = lk.LocalPosterior(model, data, nbeta=config.nbeta, gamma=gamma)
    return posterior, data_set(path, "test")


def control_of(config: Config, sampler: lk.Sampler) -> lk.Laplace | None:
    """Return the law of the linear chains beside a sampler's, if there are any."""
    if not config.control:
        return None
    return sampler if isinstance(sampler, lk.Laplace) else lk.Laplace(rank=config.rank)


def step_size(config: Config, gamma: float) -> float:
    """Return the step size of SGLD at a localization strength."""
    return min(config.step_size, 0.1 / gamma)


def draw(study: Study, gamma: float, kind: str, sampler: lk.Sampler, **options: Any) -> None:
    """Sample losses and log-odds with a sampler; keep what draws take."""
    posterior, observed = posterior_of(study, gamma)
    options |= {
        "sampler": sampler,
        "outcomes": ("loss", "log_odds"),
        "seed": study.config.seed,
    }
    control = control_of(study.config, sampler)
    lk.sample(
        posterior,
        observed,
        store=study.path(f"gamma-{gamma:g}/{kind}.zarr"),
        coords={"label": observed.tensors[1].numpy()},
        control=control,
        progress=study.show,
        **options,
    )
    took = {}
    for name, law in {"plain": None, "controlled": control}.items():
        few = options | {"chains": 1, "burn_in": 0, "control": law, "progress": False}
        took[name] = seconds_of(posterior, observed, few)
    study.write(f"gamma-{gamma:g}/{kind}.json", took)


def seconds_of(
    posterior: lk.LocalPosterior, observed: TensorDataset, options: dict[str, Any]
) -> dict[str, float]:
    """Return what a draw takes, and what is done once before the first; of two short runs."""
    seconds = []
    for draws in PACED:
        began = time.perf_counter()
        lk.sample(posterior, observed, store=MemoryStore(), **options | {"draws": draws})
        seconds.append(time.perf_counter() - began)
    draw = max(seconds[1] - seconds[0], 0.0) / (PACED[1] - PACED[0])
    return {"draw": draw, "once": max(seconds[0] - PACED[0] * draw, 0.0)}


def sample(study: Study, gamma: float) -> None:
    """Sample by SGLD: the estimates, and the reference."""
    config = study.config
    draw(
        study,
        gamma,
        "sampled",
        lk.SGLD(step_size=step_size(config, gamma)),
        chains=config.chains,
        draws=config.draws,
        burn_in=config.burn_in,
        thin=config.thin,
        batch_size=config.sampler_batch,
    )


def sample_laplace(study: Study, gamma: float) -> None:
    """Take independent draws of the Laplace law."""
    config = study.config
    sampler = lk.Laplace(rank=config.rank)
    draw(study, gamma, "laplace", sampler, chains=2, draws=config.laplace_draws // 2, burn_in=0)


def gradients(study: Study, gamma: float) -> None:
    """Take gradients of log-odds at w*, and averaged over more and more draws of the law."""
    config = study.config
    posterior, observed = posterior_of(study, gamma)
    took = {}
    if config.control:  # of the law of the linear chains, for what they predict
        began = time.perf_counter()
        lk.laplace(
            posterior,
            observed,
            rank=config.rank,
            step_size=step_size(config, gamma),
            sketch=None,
            seed=config.seed,
            store=study.path(f"gamma-{gamma:g}/control.zarr"),
            progress=study.show,
        )
        took["control"] = time.perf_counter() - began
    for smooth in (0, *counts(config.smooth)[1:]):
        place = "center" if smooth == 0 else "smooth"
        began = time.perf_counter()
        feature = lk.laplace(
            posterior,
            observed,
            rank=config.rank,
            sketch=None,
            smooth=smooth,
            seed=config.seed,
            store=study.path(f"gamma-{gamma:g}/{place}.zarr"),
            progress=study.show,
        )
        kernel = smoothed(feature) if smooth else lk.correlation(feature).values
        took[str(smooth)] = time.perf_counter() - began
        study.save(f"gamma-{gamma:g}/gradients-{smooth}.npz", kernel=kernel)
    study.write(f"gamma-{gamma:g}/gradients.json", took)


def pace_of(study: Study, file: str, features: float) -> Pace:
    """Return what draws took; ``features`` are the seconds of the control's."""
    took = study.read(file)
    plain, controlled = took["plain"], took["controlled"]
    return Pace(plain["draw"], plain["once"], controlled["draw"], controlled["once"] + features)


def kernel_numbers(study: Study, gamma: float) -> dict[str, Any]:
    """Return the curves of all estimates at one localization strength."""
    folder = f"gamma-{gamma:g}"
    losses = lk.open(study.path(f"{folder}/sampled.zarr"))["losses"].to_dataset().load()
    tried, kept = losses.isel(chain=slice(0, None, 2)), losses.isel(chain=slice(1, None, 2))
    truth = pairs_of(lk.correlation(kept["loss"]).values)
    ceiling = float(lk.reliability(kept["loss"])) ** 0.5
    spent_on = study.read(f"{folder}/gradients.json")
    features = {
        place: lk.open(study.path(f"{folder}/{place}.zarr"))["features"].to_dataset().load()
        for place in (("control", "center") if study.config.control else ())
    }
    pace = pace_of(study, f"{folder}/sampled.json", spent_on.pop("control", 0.0))
    # Chains that begin at w* have their burn-in to take; linear ones, and theirs, begin in the law.
    waiting = tried.sizes["chain"] * study.config.burn_in / study.config.thin * pace.plain
    pace = pace._replace(once=pace.once + waiting)
    by_estimate = dict(curves(tried, truth, ceiling, pace, features.get("control")))
    laplace = lk.open(study.path(f"{folder}/laplace.zarr"))["losses"].to_dataset().load()
    pace = pace_of(study, f"{folder}/laplace.json", spent_on["0"])
    for name, points in curves(laplace, truth, ceiling, pace, features.get("center")):
        by_estimate[f"Laplace draws, {name}"] = points
    smoothed, spent = [], 0.0
    for smooth, seconds in spent_on.items():
        kernel = pairs_of(study.load(f"{folder}/gradients-{smooth}.npz")["kernel"])
        spent = seconds if smooth == "0" else spent + seconds
        value = agreement(kernel, truth) / ceiling
        smoothed.append({"draws": max(int(smooth), 1), "seconds": spent, "agreement": value})
    by_estimate["gradients at w*"], by_estimate["gradients, smoothed"] = smoothed[:1], smoothed[1:]
    kurtosis = {
        name: float(np.median(excess(losses[name].stack(s=("chain", "draw")).values)))
        for name in ("loss", "log_odds")
    }
    at_center = study.load(f"{folder}/gradients-0.npz")["kernel"]
    return {
        "gamma": gamma,
        "same_label": shares(losses, at_center),
        "reference_draws": kept.sizes["chain"] * kept.sizes["draw"],
        "reference_reliability": ceiling**2,
        "kurtosis": kurtosis,
        "mean_gain": float(lk.loss_gain(losses).mean()),
        "mean_gain_laplace": float(lk.loss_gain(laplace).mean()),
        "curves": by_estimate,
        "draws_needed": {name: least(points, "draws") for name, points in by_estimate.items()},
        "seconds_needed": {name: least(points, "seconds") for name, points in by_estimate.items()},
        "verdicts": list(lk.diagnostics(losses).attrs["verdicts"]),
    }


def measure(study: Study) -> None:
    """Compute every number of the report."""
    config, path = study.config, study.path("data.npz")
    model = load_model(network(config), study.path("model.pt"))
    kernels = []
    with progress.bar("gammas", total=len(config.gammas), show=study.show) as bar:
        for gamma in config.gammas:
            kernels.append(kernel_numbers(study, gamma))
            bar.update()
    right = {s: float(accuracy(model, data_set(path, s)).mean()) for s in ("train", "test")}
    study.write("metrics.json", {"kernels": kernels, "accuracy": right})
