"""The correction of perturbed images by shifts of mode coefficients, and its controls.

A stage of `adversarial` (Anonymous 2026, algorithm 2, A.9, table 2).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import store, workflow
from lkarray_workflows.shared.attacks import ATTACKS, KINDS, Pairs, attack, lengths, noise_like
from lkarray_workflows.shared.recorded import Trained, logits_of, losses_of

if TYPE_CHECKING:
    from lkarray_workflows.studies.adversarial import Config

#: What is done to perturbed images before they are shown to the network again (table 2).
CURES = (
    "cured adversarial",
    "cured random",
    "adversarial + random",
    "signs at random",
    "attacked again",
)
DRAWS = 4  # of random signs


def corrected(
    run: Trained,
    pairs: Pairs,
    kind: str,
    modes: xr.Dataset,
    *,
    norm: Any,
    shift: float,
    radius: float,
    steps: int,
) -> torch.Tensor:
    """Return images of a kind, changed so that the modes' coefficients go against their drives."""
    images, trace = pairs.images[kind], run.trace()
    return lk.shift_modes(
        trace,
        modes,
        TensorDataset(images, pairs.labels["clean"]),
        trace.steps,
        shift=shift,
        radius=radius,
        norm=norm,
        steps=steps,
        away_from=images - pairs.images["clean"],
    )


def cure(study: workflow.Study[Config], run: Trained) -> None:
    """Shift mode coefficients against the drives, by small changes of the inputs; and controls."""
    config, seed, model = study.config, run.seed, run.final()
    pairs = Pairs.load(study.path("pairs.npz"))
    modes = lk.open(study.path("analysis.zarr"))["derived/modes"].to_dataset().load()
    leading = modes.isel(mode=slice(config.leading))
    draws = np.random.default_rng(seed).choice([-1.0, 1.0], (DRAWS, config.leading))
    adversarial = pairs.images["adversarial"]
    move = partial(
        corrected,
        run,
        pairs,
        norm=ATTACKS[config.attack][1],
        shift=config.shift,
        radius=config.correction,
        steps=config.correction_steps,
    )
    moved = {
        "cured adversarial": move("adversarial", leading),
        "cured random": move("random", leading),
    }
    turned = [move("adversarial", leading.assign(drive=("mode", signs))) for signs in draws]
    moved["signs at random"] = turned[0]
    change = moved["cured adversarial"] - adversarial
    moved["adversarial + random"] = noise_like(adversarial, change, config.attack, seed + 1)
    said = logits_of(model, adversarial).argmax(1)
    again, _ = attack(
        model, adversarial, said, kind=config.attack, radius=config.correction, seed=seed
    )
    moved["attacked again"] = again
    arrays: dict[str, Any] = {kind: images.numpy() for kind, images in moved.items()}
    study.save("cured.npz", **arrays)
    images = {kind: pairs.images[kind] for kind in KINDS[:3]} | {k: moved[k] for k in CURES}
    store.put(study.path("analysis.zarr"), "cured_losses", losses_over(study, run, pairs, images))
    study.write("cure.json", cure_numbers(model, pairs, images, turned))


def losses_over(
    study: workflow.Study[Config], run: Trained, pairs: Pairs, images: dict[str, torch.Tensor]
) -> xr.DataArray:
    """Return the losses of images of each kind over training."""
    labels = pairs.labels["clean"]
    data = TensorDataset(torch.cat(list(images.values())), labels.repeat(len(images)))
    steps, epochs = run.times(study.config.times)
    return xr.DataArray(
        run.losses_along(data, steps),
        dims=("time", "example"),
        name="loss",
        coords={
            "kind": ("example", np.repeat(list(images), len(labels)).astype(object)),
            "epoch": ("time", epochs),
        },
    )


def cure_numbers(
    model: nn.Module, pairs: Pairs, images: dict[str, torch.Tensor], turned: list[torch.Tensor]
) -> dict[str, Any]:
    """Return accuracies, losses and sizes of the changes; ``turned`` has every draw of signs."""
    labels = pairs.labels["clean"]

    def accuracy(some: torch.Tensor) -> float:
        return float((logits_of(model, some).argmax(1) == labels).double().mean())

    accuracies = {kind: accuracy(some) for kind, some in images.items()}
    # One draw of signs may be nearly the true one: the accuracy is the mean over draws.
    accuracies["signs at random"] = float(np.mean([accuracy(some) for some in turned]))
    sizes = {
        kind: images[kind] - pairs.images["random" if kind == "cured random" else "adversarial"]
        for kind in CURES
    }
    attacked = pairs.images["adversarial"] - pairs.images["clean"]
    cosine = torch.cosine_similarity(
        sizes["cured adversarial"].flatten(1), attacked.flatten(1), dim=1
    )
    return {
        "accuracy": accuracies,
        "losses": {
            kind: float(losses_of(model, TensorDataset(some, labels)).mean())
            for kind, some in images.items()
        },
        "cosine": {"mean": float(cosine.mean()), "deviation": float(cosine.std())},
        "l2_of_attack": float(lengths(attacked).mean()),
        "l2": {kind: float(lengths(x).mean()) for kind, x in sizes.items()},
        "largest": {kind: float(x.abs().max()) for kind, x in sizes.items()},
        "pairs": len(labels),
    }
