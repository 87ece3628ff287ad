"""Adversarial images, and what to hold beside them: noise of equal size, errors of equal loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

#: Foolbox's class of each attack, the norm of its perturbation, and its steps of one gradient.
ATTACKS = {
    "pgd": ("LinfPGD", "linf"), "fgsm": ("FGSM", "linf"), "l2_pgd": ("L2PGD", "l2"),
    "deepfool": ("L2DeepFoolAttack", "l2"),
}  # fmt: skip
Attack = Literal["pgd", "fgsm", "l2_pgd", "deepfool"]


def _foolbox() -> Any:
    import warnings

    with warnings.catch_warnings():
        # Its module of blurs, which nothing here uses, imports by a name that SciPy gives up.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            import foolbox
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"attacks need {error.name}: pip install 'lkarray[adversarial]'"
            ) from None
    return foolbox


def attack(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, kind: Attack = "pgd",
    radii: Sequence[float], seed: int = 0, steps: int | None = None,
) -> tuple[torch.Tensor, np.ndarray]:  # fmt: skip
    """Return images that fool a network, and the radius at which each does, NaN where none does.

    Of several radii (of pixel values 0 to 1, in the attack's norm) the smallest that fools is
    taken; an image that none fools is returned as attacked with the largest.
    """
    foolbox = _foolbox()
    name, _ = ATTACKS[kind]
    options = {} if steps is None or kind == "fgsm" else {"steps": steps}
    attacker = getattr(foolbox.attacks, name)(**options)
    on = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=images.device)
    torch.manual_seed(seed)  # of random starts
    _, found, fooled = attacker(on, images, labels, epsilons=sorted(radii))
    at = np.full(len(images), np.nan)
    out = found[-1].detach().clone()
    for radius, moved, done in reversed(list(zip(sorted(radii), found, fooled, strict=True))):
        out[done] = moved[done].detach()
        at[done.numpy()] = radius
    return out, at


def lengths(x: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm of each, shaped to multiply them."""
    found: torch.Tensor = x.flatten(1).norm(dim=1).view(-1, *(1,) * (x.ndim - 1))
    return found


def noise_like(images: torch.Tensor, delta: torch.Tensor, kind: Attack, seed: int) -> torch.Tensor:
    """Return images with random perturbations as large as others.

    Random signs times the largest entry, for attacks in the maximum norm; else normal noise; both
    then of the same L2 norm, as near as pixels between 0 and 1 allow (Gaussian noise at the edge of
    the range is cut off, so it is scaled up until its norm is right, in a few steps).
    """
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(delta.shape, generator=random)
    if ATTACKS[kind][1] == "linf":
        noise = noise.sign()
    wanted, scale = lengths(delta), lengths(delta) / lengths(noise)
    for _ in range(20):
        moved = (images + scale * noise).clamp(0, 1)
        scale = scale * wanted / lengths(moved - images).clamp_min(1e-12)
    return (images + scale * noise).clamp(0, 1)


def natural_errors(losses: np.ndarray, wrong: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return misclassified images whose losses are nearest to some, each taken once.

    The match of least total distance in log loss (the assignment problem).
    """
    from scipy.optimize import linear_sum_assignment

    at = np.flatnonzero(wrong)
    if len(at) < len(wanted):
        raise ValueError(
            f"{len(at)} of the test images are misclassified, and {len(wanted)} are needed to set "
            "beside the adversarial ones; take fewer pairs"
        )
    tiny = 1e-9
    cost = np.abs(np.log(losses[at] + tiny)[None] - np.log(wanted + tiny)[:, None])
    rows, columns = linear_sum_assignment(cost)
    return np.asarray(at[columns[np.argsort(rows)]])
