"""Whether training on attacked images spreads what a network learns over more modes.

See Anonymous 2026, 6.3.1.

Two networks learn the same images for as many steps: one as they are, the other as attacked at
each step (PGD-AT, Madry et al. 2017). Of both: how many modes hold the energy of the training
gradients (table 3), how much larger the gradients of attacked images are than those of clean ones,
and in how few directions of the input the mode coefficients move: the rest is the nullspace, along
which the network's learning does not see an input change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import xarray as xr
from pydantic import Field, model_validator
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import workflow
from lkarray.training import Trace
from lkarray_workflows.shared.adversarial_training_report import NETWORKS, SHARES, report
from lkarray_workflows.shared.attacks import Pairs, attack, make_pairs, require_foolbox
from lkarray_workflows.shared.recorded import (
    Trained,
    Training,
    check,
    discard,
    fit,
    logits_of,
    plan,
    require_enough,
    train,
)


class Config(Training):
    """Settings. A step on attacked images costs as many passes more as the attack has steps."""

    presets: ClassVar = {
        "paper": {
            "epochs": 50,
            "learning_rate": 1.5e-5,
            "features": 5000,
            "parts": 50,
        },
        "small": {
            "batches": 10,
            "batch_size": 64,
            "epochs": 6,
            "learning_rate": 2e-3,
            "features": 150,
            "pairs": 8,
            "tried": 200,
            "parts": 2,
            "attack_steps": 3,
            "modes": 40,
            "seeds": 1,
        },
    }

    epochs: int = Field(10, ge=2)
    learning_rate: float = Field(1e-4, gt=0, description="of Adam")
    radius: float = Field(0.05, gt=0, description="of the attacks, largest change of a pixel")
    attack_steps: int = Field(5, ge=1, description="of the attack on each training batch")
    parts: int = Field(5, ge=1, description="that training on attacked images is kept in")
    features: int = Field(1000, ge=100, description="training images whose gradients give modes")
    pairs: int = Field(64, ge=2, description="images attacked, of either network")
    tried: int = Field(2000, ge=10, description="test images for robust accuracy")
    modes: int = Field(100, ge=10, description="whose coefficients' slopes are compared")
    seeds: int = Field(2, ge=1, description="pairs of networks")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        images = self.batches * self.batch_size
        require_enough(
            self, {"modes": self.features, "features": images, "parts": self.batches * self.epochs}
        )
        return self


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    check(config, config.seeds)
    require_foolbox()
    with workflow.Study("adversarial_training", config, folder, progress) as study:
        networks = []
        every = config.batches * config.epochs  # the first state and the last
        for seed in range(config.seed, config.seed + config.seeds):
            home = study if seed == config.seed else study.within(f"seed_{seed}")
            recorded = train(home, seed=seed, every=every)
            networks.append((home, recorded))
            for share in range(config.parts):
                name = f"attacked {seed}, {share + 1}"
                home.stage(name, train_attacked, weights_of(share), recorded, share)
            for name in NETWORKS:
                home.stage(f"{name} {seed}", measure, f"{name}.json", recorded, name)
        homes = [home for home, _ in networks]
        study.stage("report", report, "report/index.html", homes)
        discard(config, *(recorded for _, recorded in networks))
    return f"Report  {study.index}"


def weights_of(share: int) -> str:
    """Return the file of the network and its optimizer after a share of the training."""
    return f"attacked_{share + 1}.pt"


def network(study: Study, run: Trained, name: str) -> nn.Sequential:
    """Return a trained network."""
    if name == "standard":
        return run.final()
    model = run.untrained()
    path = study.path(weights_of(study.config.parts - 1))
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model.eval()


def train_attacked(study: Study, run: Trained, share: int) -> None:
    """Train on for a share of the steps, on images attacked anew at each."""
    config = study.config
    data = run.images("train")
    steps = config.batches * config.epochs
    ends = np.linspace(0, steps, config.parts + 1).round().astype(int)
    first, last = int(ends[share]), int(ends[share + 1])
    batches = plan(len(data), config.batch_size, steps, run.seed)[first:last]
    model = run.untrained()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    if share:
        before = torch.load(study.path(weights_of(share - 1)), weights_only=True)
        model.load_state_dict(before["model"])
        optimizer.load_state_dict(before["optimizer"])
    seeds = iter(range(first, last))  # of the random starts: the same whatever is gone on with

    def altered(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        moved, _ = attack(
            model,
            images,
            labels,
            radius=config.radius,
            steps=config.attack_steps,
            seed=next(seeds),
        )
        return moved

    fit(
        model,
        data,
        batches,
        config.learning_rate,
        show=study.show,
        altered=altered,
        optimizer=optimizer,
    )
    with study.writing(weights_of(share)) as new:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, new)


def measure(study: Study, run: Trained, name: str) -> None:
    """Measure a network: accuracy, spectrum, energies, directions of the input."""
    config, model = study.config, network(study, run, name)
    data, where = run.images("train"), study.path(f"{name}.zarr")
    images, labels = (x[: config.tried] for x in run.images("test").tensors)
    right = logits_of(model, images).argmax(1) == labels
    attacked, _ = attack(model, images, labels, radius=config.radius, seed=run.seed)
    robust = logits_of(model, attacked).argmax(1) == labels
    pairs = make_pairs(
        model, data, config.pairs, kind="pgd", radius=config.radius, seed=run.seed, errors=False
    )
    trace = lk.snapshot(model, data, store=where)
    options: dict[str, Any] = {"store": where, "progress": study.show}
    both = right_in_both(study, run)
    moved, _ = attack(model, *both, radius=config.radius, seed=run.seed)
    G = lk.gradient_features(trace, np.arange(config.features), [1], **options).isel(time=0)
    square = np.linalg.eigvalsh(lk.lgk(G).values.astype(np.float64))[::-1]
    spectrum = np.sqrt(np.maximum(square, 0))

    def energy_of(inputs: TensorDataset, name: str) -> float:
        """Return the mean square of the gradients' norms."""
        gradients = lk.gradient_features(trace, inputs, [1], name=name, **options)["gradient"]
        return float((gradients.astype(np.float64) ** 2).sum("param").mean())

    energy = {kind: energy_of(pairs.data([kind]), kind) for kind in pairs.images}
    same = {
        kind: energy_of(TensorDataset(some, both[1]), f"same_{kind}")
        for kind, some in (("clean", both[0]), ("adversarial", moved))
    }
    slopes = slopes_of(trace, G, pairs, config.modes)
    pictures: dict[str, Any] = {k: x.numpy() for k, x in pairs.images.items()}
    study.save(f"{name}.npz", spectrum=spectrum, **pictures)
    metrics = {
        "accuracy": float(right.double().mean()),
        "robust": float(robust.double().mean()),
        "fooled": pairs.fooled,
        "ranks": {str(share): int(lk.energy_rank(spectrum, share)) for share in SHARES},
        "energy": energy,
        "energy_ratio": energy["adversarial"] / energy["clean"],
        "random_energy_ratio": energy["random"] / energy["clean"],
        "same_energy_ratio": same["adversarial"] / same["clean"],
        "participation_ratio": float(lk.participation_ratio(spectrum)),
        "modes": config.modes,
        **directions(slopes),
    }
    study.write(f"{name}.json", metrics)
    if not config.keep:
        lk.discard_gradients(where)


def slopes_of(trace: Trace, G: xr.Dataset, pairs: Pairs, count: int) -> np.ndarray:
    """Return how mode coefficients of clean images change with them, ``(example, mode, input)``."""
    modes = lk.modes(G, count).compute()
    slopes = lk.mode_sensitivity(trace, modes, pairs.data(["clean"]), 1, whole=True)["slope"]
    return np.asarray(slopes.values.astype(np.float64))


def directions(slopes: np.ndarray) -> dict[str, Any]:
    """Return in how many directions of the input coefficients move, and in how many they do not."""
    spectra, size = np.linalg.svd(slopes, compute_uv=False), slopes.shape[-1]
    # Few have no slope at all: their coefficients do not move whatever is done to the image.
    active = np.array([int(lk.energy_rank(s, 0.99)) if s[0] > 0 else 0 for s in spectra])
    rank = np.array([int((s > s[0] * 1e-6).sum()) for s in spectra])
    of_all = np.linalg.svd(slopes.reshape(-1, size), compute_uv=False)
    return {
        "inputs": size,
        "nullspace": {"mean": float(size - rank.mean()), "least": int(size - rank.max())},
        "active": {"mean": float(active.mean()), "most": int(active.max())},
        "active_of_all": int(lk.energy_rank(of_all, 0.99)),
    }


def right_in_both(study: Study, run: Trained) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images that both networks get right, whether or not an attack fools them."""
    config = study.config
    images, labels = run.images("train").tensors
    right = torch.ones(len(labels), dtype=torch.bool)
    for name in NETWORKS:
        right &= logits_of(network(study, run, name), images).argmax(1) == labels
    return images[right][: config.pairs], labels[right][: config.pairs]
