"""What a draw is worth: estimates of one kernel against a long run, per draw and per second.

A network of digits is sampled at several localization strengths, long enough for half of the chains
to serve as the reference. The other half, the Laplace law and gradients then each estimate the same
kernel, and agreement with the reference, its own noise divided out, is measured against what they
cost (docs/noise.md; design of the estimates: Mehler's expansion, docs/methods/outcomes.md).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from pydantic import Field
from torch import nn
from torch.utils.data import TensorDataset

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
from lkarray_workflows.shared.images import FOLDER, data_set, require_files, take_images
from lkarray_workflows.shared.recorded import lenet

#: Estimates from draws: what each is of, how, and whether with the control.
ESTIMATES = {
    "losses": ("loss", "sample", False),
    "log-odds": ("log_odds", "sample", False),
    "log-odds, controlled": ("log_odds", "sample", True),
    "Gaussian estimate": ("losses", "gaussian", False),
    "Gaussian estimate, controlled": ("losses", "gaussian", True),
}
#: Agreement with the truth of an estimate whose reliability is 0.9.
WANTED = 0.9**0.5


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
    """Sample losses and log-odds with a sampler; keep what a draw took."""
    posterior, observed = posterior_of(study, gamma)
    began = time.perf_counter()
    tree = lk.sample(
        posterior,
        observed,
        sampler=sampler,
        store=study.path(f"gamma-{gamma:g}/{kind}.zarr"),
        outcomes=("loss", "log_odds"),
        coords={"label": observed.tensors[1].numpy()},
        seed=study.config.seed,
        control=control_of(study.config, sampler),
        progress=study.show,
        **options,
    )
    seconds = time.perf_counter() - began
    count = tree["losses"].sizes["chain"] * tree["losses"].sizes["draw"]
    study.write(f"gamma-{gamma:g}/{kind}.json", {"seconds_a_draw": seconds / count})


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


def counts(most: int) -> list[int]:
    """Return numbers to try: 1, 2, 4, ... and the most there are."""
    return [n for n in (2**i for i in range(20)) if n < most] + [most]


def gradients(study: Study, gamma: float) -> None:
    """Take gradients of log-odds at w*, and averaged over more and more draws of the law."""
    config = study.config
    posterior, observed = posterior_of(study, gamma)
    took = {}
    if config.control:  # of the law of the linear chains, for what they predict
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


def pairs_of(kernel: Any) -> np.ndarray:
    """Return the entries of a kernel over pairs, each once."""
    values = np.asarray(kernel)
    return np.asarray(values[np.triu_indices(len(values), 1)], dtype=float)


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of two kernels over pairs of inputs."""
    return float(np.corrcoef(a, b)[0, 1])


def estimate(losses: xr.Dataset, name: str, features: xr.Dataset | None = None) -> np.ndarray:
    """Return R over pairs by one of `ESTIMATES`; ``features`` are those of its control."""
    variable, how, controlled = ESTIMATES[name]
    if how == "gaussian":
        control = features if controlled else None
        return pairs_of(lk.correlation(losses, estimator="gaussian", control=control).values)
    if controlled:
        both = losses[[variable, f"{variable}_prediction"]]
        return pairs_of(lk.correlation(both, control=features).values)
    return pairs_of(lk.correlation(losses[variable]).values)


def some(losses: xr.Dataset, count: int) -> xr.Dataset:
    """Return the first draws of few chains, or as many of each: ``count`` together, or more."""
    chains = losses.sizes["chain"]
    each = -(-count // chains)
    return losses.isel(draw=slice(max(each, 2)))


def curves(
    losses: xr.Dataset,
    truth: np.ndarray,
    ceiling: float,
    seconds: float,
    features: xr.Dataset | None,
) -> Iterator[Any]:
    """Yield what each estimate from draws agrees at with the truth, by the number of draws."""
    for name, (*_, controlled) in ESTIMATES.items():
        if controlled and features is None:
            continue
        points = []
        for count in counts(losses.sizes["chain"] * losses.sizes["draw"])[3:]:
            few = some(losses, count)
            number = few.sizes["chain"] * few.sizes["draw"]
            value = agreement(estimate(few, name, features), truth) / ceiling
            points.append({"draws": number, "seconds": number * seconds, "agreement": value})
        yield name, points


def least(points: list[dict[str, float]], what: str) -> float | None:
    """Return the draws, or seconds, from which on agreement is that of reliability 0.9.

    Between two points along the logarithm; ``None`` where it is not reached.
    """
    last = None
    for point in points:
        if point["agreement"] >= WANTED:
            if last is None:
                return point[what]
            share = (WANTED - last["agreement"]) / (point["agreement"] - last["agreement"])
            return float(last[what] * (point[what] / last[what]) ** share)
        last = point
    return None


def same_label(kernel: np.ndarray, labels: np.ndarray, k: int = 10) -> float:
    """Return the share of the k most correlated inputs that have an input's own label."""
    values = np.array(kernel, dtype=float)
    np.fill_diagonal(values, -np.inf)
    near = np.argpartition(-values, k, axis=1)[:, :k]
    return float((labels[near] == labels[:, None]).mean())


def shares(losses: xr.Dataset, gradients: np.ndarray) -> dict[str, float]:
    """Return `same_label` by few draws, by all, by outcomes taken as Gaussian, by gradients."""
    labels = losses["label"].values
    few = some(losses, 80)
    kernels = {
        f"{few.sizes['chain'] * few.sizes['draw']} draws": lk.correlation(few["loss"]),
        "all draws": lk.correlation(losses["loss"]),
        "all draws, Gaussian estimate": lk.correlation(losses, estimator="gaussian"),
        "gradients at w*": gradients,
    }
    return {name: same_label(np.asarray(kernel), labels) for name, kernel in kernels.items()}


def kernel_numbers(study: Study, gamma: float) -> dict[str, Any]:
    """Return the curves of all estimates at one localization strength."""
    folder = f"gamma-{gamma:g}"
    losses = lk.open(study.path(f"{folder}/sampled.zarr"))["losses"].to_dataset().load()
    tried, kept = losses.isel(chain=slice(0, None, 2)), losses.isel(chain=slice(1, None, 2))
    truth = pairs_of(lk.correlation(kept["loss"]).values)
    ceiling = float(lk.reliability(kept["loss"])) ** 0.5
    seconds = study.read(f"{folder}/sampled.json")["seconds_a_draw"]
    features = {
        place: lk.open(study.path(f"{folder}/{place}.zarr"))["features"].to_dataset().load()
        for place in (("control", "center") if study.config.control else ())
    }
    by_estimate = dict(curves(tried, truth, ceiling, seconds, features.get("control")))
    laplace = lk.open(study.path(f"{folder}/laplace.zarr"))["losses"].to_dataset().load()
    took = study.read(f"{folder}/laplace.json")["seconds_a_draw"]
    for name, points in curves(laplace, truth, ceiling, took, features.get("center")):
        by_estimate[f"Laplace draws, {name}"] = points
    smoothed, spent = [], 0.0
    for smooth, seconds in study.read(f"{folder}/gradients.json").items():
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


def excess(values: np.ndarray) -> np.ndarray:
    """Return the excess kurtosis along the last axis."""
    z = values - values.mean(-1, keepdims=True)
    return np.asarray((z**4).mean(-1) / (z**2).mean(-1) ** 2 - 3)


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


def rows_of(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report."""

    def text(value: float | None, unit: str) -> str:
        return "not reached" if value is None else f"{value:.3g} {unit}"

    rows = []
    for kernel in metrics["kernels"]:
        rows.append(
            (
                f"gamma {kernel['gamma']:g}: the 10 nearest that have the same label",
                ", ".join(f"{name} {value:.2f}" for name, value in kernel["same_label"].items()),
                "",
            )
        )
        for name, points in kernel["curves"].items():
            rows.append(
                (
                    f"gamma {kernel['gamma']:g}: {name}",
                    text(kernel["draws_needed"][name], "draws")
                    + ", "
                    + text(kernel["seconds_needed"][name], "s"),
                    f"at {points[-1]['draws']} draws: {points[-1]['agreement']:.3f}",
                )
            )
    return rows


def draw_curves(metrics: dict[str, Any], what: str) -> Figure:
    """Draw agreement with the reference against draws or seconds, a panel a gamma."""
    kernels = metrics["kernels"]
    figure = Figure(figsize=(4.6 * len(kernels) + 1.6, 4.4), layout="constrained")
    colors = ["#717581", "#3f90da", "#832db6", "#bd1f01", "#ffa90e"]
    styles: dict[str, Any] = {}
    for name, color in zip(ESTIMATES, colors, strict=True):
        styles[name] = {"color": color, "marker": "o"}
        styles[f"Laplace draws, {name}"] = {"color": color, "marker": "s", "ls": "--"}
    styles["gradients at w*"] = {"color": "#94a4a2", "marker": "*", "ms": 11, "ls": ""}
    styles["gradients, smoothed"] = {"color": "#e76300", "marker": "^"}
    for axes, kernel in zip(
        figure.subplots(1, len(kernels), squeeze=False)[0], kernels, strict=True
    ):
        for name, points in kernel["curves"].items():
            axes.plot(
                [p[what] for p in points],
                [p["agreement"] for p in points],
                label=name,
                **({"ms": 4, "lw": 1.3} | styles[name]),
            )
        axes.axhline(WANTED, color="black", lw=0.8, ls=":")
        axes.set(
            xscale="log",
            ylim=(0, 1.03),
            xlabel=what,
            title=f"gamma {kernel['gamma']:g}",
        )
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("agreement with R of a long run")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure


def report(study: Study) -> None:
    """Write the report folder."""
    config, metrics = study.config, study.read("metrics.json")
    what = "LeNet-5, MNIST" if config.dataset == "mnist" else "one hidden layer, digits"
    study.report(
        title="What a draw is worth",
        summary=[
            f"{what}: {config.observed} held-out images, nbeta {config.nbeta:g}. R of losses from "
            "one half of the chains is the reference; agreement is the correlation over pairs of "
            "images, divided by the root of the reference's reliability. The dotted line is that "
            "of an estimate of reliability 0.9. With the control, seconds of every estimate from "
            "draws hold its cost.",
        ],
        metrics=metrics,
        rows=rows_of(metrics),
        figures=[
            workflow.Figure(
                f"against_{what}",
                f"Against {what}",
                f"Agreement with the reference, by {what} spent.",
                draw_curves(metrics, what),
            )
            for what in ("draws", "seconds")
        ],
        next_steps=f'tree = lk.open("{study.path(f"gamma-{config.gammas[0]:g}/sampled.zarr")}")\n'
        'lk.correlation(tree["losses"], estimator="gaussian")',
    )
