"""What studies of the local posterior share: its settings, training, sampling, what is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes
from pydantic import BeforeValidator, Field
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import progress, workflow
from lkarray.engine.numbers import reciprocal
from lkarray.nn.batches import MapDataset


def _split(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


#: A setting of several numbers; on the command line ``--gammas 100,1000``.
Numbers = Annotated[tuple[float, ...], BeforeValidator(_split)]
#: One of several words, likewise.
Words = Annotated[tuple[str, ...], BeforeValidator(_split)]


class Posterior(Protocol):
    """Settings that say how to sample: those of `Sampling`, or a study's own of the same names."""

    @property
    def nbeta(self) -> float:
        """Inverse temperature times the number of training inputs."""

    @property
    def gamma(self) -> float:
        """Localization."""

    @property
    def step_size(self) -> float:
        """Step size of SGLD."""

    @property
    def chains(self) -> int:
        """Number of chains."""

    @property
    def draws(self) -> int:
        """Draws of a chain."""

    @property
    def burn_in(self) -> int:
        """Steps before the first draw."""

    @property
    def thin(self) -> int:
        """Steps between draws."""


class Sampling(workflow.Config):
    """Settings of the local posterior and of SGLD (table 1 of both papers)."""

    nbeta: float = Field(100.0, ge=0)
    gamma: float = Field(1000.0, gt=0)
    step_size: float = Field(1e-4, gt=0)
    sampler_batch: int = Field(256, ge=1, description="batch size of the sampler")
    chains: int = Field(4, ge=2)
    draws: int = Field(200, ge=2, description="of a chain")
    burn_in: int = Field(200, ge=0, description="steps")
    thin: int = Field(5, ge=1, description="steps between draws")


def fit(
    model: nn.Module,
    data: TensorDataset,
    *,
    rate: float,
    batch_size: int,
    epochs: int,
    seed: int,
    weight_decay: float = 0.0,
    show: bool = False,
    learned: Callable[[nn.Module], bool] | None = None,
    settle: int = 0,
    before_step: Callable[[int], None] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Train by AdamW, unless there is another ``optimizer``, on shuffled batches.

    Where an epoch leaves the model such that ``learned(model)`` is true, ``settle`` epochs end
    the training, over which the learning rate falls to zero: networks trained on with weight
    decay may leave their minimum again. ``before_step`` is called with the number of each step.
    """
    inputs, targets = data.tensors
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=weight_decay)
    shuffle = torch.Generator().manual_seed(seed)
    left: float = float("inf")  # of the epochs that settle
    step = 0
    with progress.bar("training", total=epochs, unit="epoch", show=show) as bar:
        for _ in range(epochs):
            model.train()
            for batch in torch.randperm(len(targets), generator=shuffle).split(batch_size):
                if before_step is not None:
                    before_step(step)
                step += 1
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
                optimizer.step()
            bar.update()
            if left == float("inf") and learned is not None and learned(model.eval()):
                left = settle + 1
            left -= 1
            if left <= 0:
                break
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, left / (settle + 1))
    return model.eval()


def convolutional(width: int = 16, classes: int = 10) -> nn.Module:
    """Return an untrained network of two convolutions and two linear layers, of 28 x 28 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(98 * width, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each added and then normalised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take and return ``(input, place, width)``."""
        mixed = self.attention(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0)
        q, k, v = (side.transpose(-3, -2) for side in mixed)  # (input, head, place, width)
        # Written out: torch.func has no batched form of the fused attention.
        future = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)
        likeness = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
        seen = likeness.softmax(-1) @ v
        x = self.first(x + self.out(seen.transpose(-3, -2).flatten(-2)))
        return self.second(x + self.narrow(self.wide(x).relu()))


def accuracy(model: nn.Module, data: TensorDataset, rows: int = 2000) -> np.ndarray:
    """Return which inputs the model gets right, ``(sample,)`` of bool."""
    model.eval()
    with torch.inference_mode():
        right = [
            model(inputs).argmax(1) == targets
            for inputs, targets in zip(*(t.split(rows) for t in data.tensors), strict=True)
        ]
    return np.asarray(torch.cat(right).numpy())


def keep_model(model: nn.Module, path: Path) -> None:
    """Save weights in one move."""
    with workflow.replacing(path) as new:
        torch.save(model.state_dict(), new)


def load_model(model: nn.Module, path: Path) -> nn.Module:
    """Return the model with saved weights, in eval mode."""
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def draw_losses(
    settings: Posterior,
    model: nn.Module,
    train: MapDataset,
    observed: MapDataset,
    store: Path,
    *,
    batch_size: int,
    seed: int,
    coords: Mapping[str, Any],
    show: bool = False,
    trainable: Any = None,
    checkpoints: Mapping[Any, Any] | None = None,
    loss: str = "cross_entropy",
    outcomes: Sequence[str] = ("loss",),
) -> xr.DataTree:
    """Sample around a model, or checkpoints of it, as the settings say; observe some inputs."""
    posterior = lk.LocalPosterior(
        model,
        train,
        loss,
        nbeta=settings.nbeta,
        gamma=settings.gamma,
        trainable=trainable,
    )
    return lk.sample(
        posterior,
        observed,
        sampler=lk.SGLD(step_size=settings.step_size),
        store=store,
        chains=settings.chains,
        draws=settings.draws,
        burn_in=settings.burn_in,
        thin=settings.thin,
        batch_size=batch_size,
        coords=coords,
        seed=seed,
        progress=show,
        checkpoints=checkpoints,
        outcomes=outcomes,
    )


def without_chain(losses: xr.DataArray, value: Callable[[xr.DataArray], Any]) -> tuple[Any, Any]:
    """Return a number or array of the draws, and its standard error.

    The jackknife over chains (Efron 1982; docs/methods/uncertainty.md).
    """
    chains = losses.sizes["chain"]
    whole = np.asarray(value(losses), float)
    rest = np.stack(
        [
            np.asarray(value(losses.isel(chain=[c for c in range(chains) if c != out])), float)
            for out in range(chains)
        ]
    )
    error = np.sqrt((chains - 1) * rest.var(0))
    return (whole, error) if whole.ndim else (float(whole), float(error))


def halves_agree(losses: xr.DataArray, rows: int = 2000, seed: int = 0) -> float:
    """Return the correlation, over pairs of some inputs, of R from two halves of the chains.

    The mean over ways to halve them; `lkarray.reliability` is that of all draws.
    """
    (dim,) = set(losses.dims) - {"chain", "draw"}
    n = losses.sizes[dim]
    chosen = np.sort(np.random.default_rng(seed).choice(n, min(rows, n), replace=False))
    found = lk.reliability(losses.isel({dim: chosen}), seed=seed).compute()
    return float(found["halves"])


def smoothed(features: xr.Dataset) -> np.ndarray:
    """Return R of averaged gradients, from products of different draws only: ``(sample, sample)``.

    Noise of a draw is common to all inputs, and would correlate them. An input whose two halves
    point apart, as noise makes few draws do, has no measured norm: its similarities are 0.
    """
    halves = features["feature_half"]
    product = lk.covariance(halves.isel(half=0), halves.isel(half=1)).values.astype(float)
    product = (product + product.T) / 2
    scale = reciprocal(np.sqrt(np.maximum(np.diag(product), 0)))
    return np.asarray(np.clip(product * np.outer(scale, scale), -1, 1))


def curve_with_errors(
    axes: Axes, x: Sequence[float], points: Sequence[tuple[float | None, ...]], label: str
) -> None:
    """Draw values with their intervals, ``(value, low, high)``, where all values are known."""
    table = np.array(points, dtype=float)  # None is NaN
    if not np.isnan(table[:, 0]).any():
        ends = np.nan_to_num(np.abs(table[:, 1:] - table[:, :1])).T
        axes.errorbar(x, table[:, 0], ends, fmt="o-", ms=4, capsize=2, lw=1.3, label=label)


def area(flags: np.ndarray, score: np.ndarray) -> float:
    """Return the area under the ROC curve (AUROC)."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(flags, score))


def plain_numbers(values: Any) -> list[float | None]:
    """Return numbers as JSON has them: what is not finite is missing."""
    return [float(value) if np.isfinite(value) else None for value in values]


def with_error(losses: xr.DataArray, value: Callable[[xr.DataArray], Any]) -> dict[str, float]:
    """Return a number of the draws, and its standard error, by `without_chain`."""
    return dict(zip(("value", "error"), without_chain(losses, value), strict=True))
