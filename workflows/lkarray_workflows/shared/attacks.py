"""Adversarial images, and what to hold beside them: noise of equal size, errors of equal loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lkarray import workflow
from lkarray.errors import MissingPackageError, SettingsError
from lkarray_workflows.shared.recorded import logits_of, losses_of

#: Foolbox's class of each attack, the norm of its perturbation, and its steps of one gradient.
ATTACKS = {
    "pgd": ("LinfPGD", "linf"),
    "fgsm": ("FGSM", "linf"),
    "l2_pgd": ("L2PGD", "l2"),
    "deepfool": ("L2DeepFoolAttack", "l2"),
}
Attack = Literal["pgd", "fgsm", "l2_pgd", "deepfool"]
#: Groups of inputs, in the order in which figures draw them.
KINDS = ("clean", "adversarial", "random", "natural error")


def require_foolbox() -> Any:
    """Return foolbox, or say how to get it."""
    import warnings

    with warnings.catch_warnings():
        # Its module of blurs, which nothing here uses, imports by a name that SciPy gives up.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            import foolbox
        except ModuleNotFoundError as error:
            raise MissingPackageError(
                f"attacks need {error.name}: pip install 'lkarray[adversarial]'"
            ) from None
    return foolbox


def attack(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    radius: float,
    kind: Attack = "pgd",
    seed: int = 0,
    steps: int | None = None,
) -> tuple[torch.Tensor, np.ndarray]:
    """Return images moved by at most a radius to fool a network, and which of them do.

    The radius is of pixel values 0 to 1, in the attack's norm. Fewer ``steps`` than the attack's
    own are longer: together 2.5 radii.
    """
    foolbox = require_foolbox()
    options: dict[str, Any] = {}
    if steps is not None and "pgd" in kind:
        options = {"steps": steps, "rel_stepsize": 2.5 / steps}
    attacker = getattr(foolbox.attacks, ATTACKS[kind][0])(**options)
    on = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=images.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of random starts
        _, moved, fooled = attacker(on, images, labels, epsilons=radius)
    return moved.detach(), np.asarray(fooled.cpu().numpy())


def lengths(x: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm of each, shaped to multiply them."""
    norms: torch.Tensor = x.flatten(1).norm(dim=1)
    return norms.view(-1, *(1,) * (x.ndim - 1))


def noise_like(images: torch.Tensor, delta: torch.Tensor, kind: Attack, seed: int) -> torch.Tensor:
    """Return images with random perturbations as large as others.

    Random signs, for attacks in the maximum norm, else normal noise; of the same L2 norm as the
    others have, as near as pixels between 0 and 1 allow (noise at the edge of the range is cut
    off, so it is scaled up until its norm is right, in a few steps).
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

    candidates = np.flatnonzero(wrong)
    if len(candidates) < len(wanted):
        raise SettingsError(
            f"{len(candidates)} of the images are misclassified, and {len(wanted)} are needed to "
            "set beside the adversarial ones; take fewer pairs"
        )
    tiny = 1e-9
    cost = np.abs(np.log(losses[candidates] + tiny)[None] - np.log(wanted + tiny)[:, None])
    rows, columns = linear_sum_assignment(cost)
    return np.asarray(candidates[columns[np.argsort(rows)]])


@dataclass(frozen=True)
class Pairs:
    """Images of each kind, in the same order: clean, attacked, as much noise, as high a loss.

    Attributes
    ----------
    images
        By kind, ``(pair, channel, row, column)``.
    labels
        By kind: natural errors are other images, with labels of their own.
    fooled
        Share of the images tried that the attack fooled the network on.
    """

    images: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]
    fooled: float

    def data(self, kinds: Sequence[str] = KINDS, count: int | None = None) -> TensorDataset:
        """Return all images, kind by kind."""
        tensors = [
            torch.cat([by_kind[kind][:count] for kind in kinds])
            for by_kind in (self.images, self.labels)
        ]
        return TensorDataset(*tensors)

    def coords(self, kinds: Sequence[str] = KINDS, count: int | None = None) -> dict[str, Any]:
        """Return the kind and the pair of each of them."""
        n = len(next(iter(self.labels.values()))[:count])
        return {
            "kind": np.repeat(np.array(kinds, dtype=object), n).astype(str),
            "pair": np.tile(np.arange(n), len(kinds)),
        }

    def save(self, path: Path) -> None:
        """Write them."""
        arrays: dict[str, Any] = {f"images {kind}": x.numpy() for kind, x in self.images.items()}
        arrays |= {f"labels {kind}": y.numpy() for kind, y in self.labels.items()}
        workflow.save_arrays(path, fooled=self.fooled, **arrays)

    @classmethod
    def load(cls, path: Path) -> Pairs:
        """Read them."""
        with np.load(path) as arrays:
            images, labels = (
                {
                    name.removeprefix(prefix): torch.from_numpy(arrays[name])
                    for name in arrays
                    if name.startswith(prefix)
                }
                for prefix in ("images ", "labels ")
            )
            return cls(images, labels, float(arrays["fooled"]))


def make_pairs(
    model: nn.Module,
    data: TensorDataset,
    count: int,
    *,
    kind: Attack,
    radius: float,
    seed: int,
    errors: bool = True,
) -> Pairs:
    """Return so many images that a network gets right and an attack fools it on, and the others.

    Raises
    ------
    SettingsError
        The attack fools it on too few, or too few are misclassified as they are.
    """
    images, labels = data.tensors
    right = (logits_of(model, images).argmax(1) == labels).numpy()
    left = np.flatnonzero(right)
    chosen, moved_ = np.empty(0, int), []
    while len(chosen) < count and len(left):
        tried, left = left[: 4 * count], left[4 * count :]
        moved, fooled = attack(
            model, images[tried], labels[tried], kind=kind, radius=radius, seed=seed
        )
        # In batches of another size: a network may say otherwise there.
        fooled &= (logits_of(model, moved).argmax(1) != labels[tried]).numpy()
        chosen = np.append(chosen, tried[fooled])
        moved_.append(moved[torch.from_numpy(fooled)])
    if len(chosen) < count:
        raise SettingsError(
            f"{kind} within {radius} fools the network on {len(chosen)} of {right.sum()} images, "
            f"and {count} are needed; take a larger --radius or fewer --pairs"
        )
    share = len(chosen) / (right.sum() - len(left))
    chosen, adversarial = chosen[:count], torch.cat(moved_)[:count]
    clean, own = images[chosen], labels[chosen]
    by_kind = {
        "clean": clean,
        "adversarial": adversarial,
        "random": noise_like(clean, adversarial - clean, kind, seed),
    }
    named = dict.fromkeys(by_kind, own)
    if errors:
        wanted = losses_of(model, TensorDataset(adversarial, own))
        matched = natural_errors(losses_of(model, data), ~right, wanted)
        by_kind["natural error"], named["natural error"] = images[matched], labels[matched]
    return Pairs(by_kind, named, float(share))
