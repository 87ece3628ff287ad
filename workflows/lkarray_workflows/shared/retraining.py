"""What studies share that train again without some of the images: data, influence, who goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray.errors import SettingsError
from lkarray.training import Trace
from lkarray_workflows.shared.images import Source, take_images
from lkarray_workflows.shared.recorded import fit

SETS = ("audited", "held_out")


def take(source: Source, train: int, audited: int, held_out: int, *, seed: int) -> dict[str, Any]:
    """Return training images, test images to audit, and others: ``audited_images``, ..."""
    kept: dict[str, Any] = take_images(source, train, audited + held_out, seed=seed)
    for split, wanted in (("train", train), ("test", audited + held_out)):
        if len(kept[f"{split}_labels"]) < wanted:
            raise SettingsError(
                f"{wanted:,} {split} images are wanted, and there are "
                f"{len(kept[f'{split}_labels']):,}; ask for fewer"
            )
    for kind in ("images", "labels"):
        both = kept.pop(f"test_{kind}")
        kept[f"audited_{kind}"], kept[f"held_out_{kind}"] = np.split(both, [audited])
    return kept


def influence(trace: Trace, audited: TensorDataset, store: Path, show: bool) -> dict[str, Any]:
    """Audit; return each training image's summed influence, ``net`` and ``gross``, and ``lc``.

    ``net`` sums over the audited images, so that what lowered their losses is negative; ``gross``
    sums magnitudes.
    """
    audit = lk.audit(trace, audited, store=store, progress=show)
    each = audit["influence"].astype(np.float64)
    net, gross = each.sum("audit").values, abs(each).sum("audit").values
    return {"net": net, "gross": gross, "lc": audit.attrs["lc"]}


def order(arm: str, net: np.ndarray, gross: np.ndarray, seed: int) -> np.ndarray:
    """Return all images, in the order in which an arm removes them."""
    if arm == "random":
        return np.random.default_rng(seed).permutation(len(net))
    return np.argsort(
        {
            "nothing": np.arange(len(net)),
            "least influential": gross,
            "least influential, net": abs(net),
            "most influential": -gross,
            "most influential, net": -abs(net),
            "most helpful": net,
            "most harmful": -net,
        }[arm]
    )


def without(order: np.ndarray, count: int) -> np.ndarray:
    """Return which images are left when so many have gone."""
    return np.sort(order[count:])


def without_of_each(order: np.ndarray, labels: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Return which images are left when so many of each class have gone."""
    classes = np.unique(labels)
    return np.sort(
        np.concatenate(
            [
                order[labels[order] == label][count:]
                for label, count in zip(classes, counts, strict=True)
            ]
        )
    )


def again(
    model: nn.Sequential,
    data: TensorDataset,
    kept: np.ndarray,
    batches: Sequence[torch.Tensor],
    rate: float,
    tests: Mapping[str, TensorDataset],
) -> dict[str, Any]:
    """Train on what is kept, in batches of places in it; return the outcome on test images.

    An image that is kept several times is drawn several times.
    """
    images, labels = data.tensors
    fit(model, TensorDataset(images[kept], labels[kept]), batches, rate)
    outcomes = {name: outcome(model, test) for name, test in tests.items()}
    return outcomes | {"images": len(np.unique(kept)), "steps": len(batches)}


def outcome(model: nn.Module, data: TensorDataset) -> dict[str, float]:
    """Return the mean loss, in nats, and the accuracy."""
    images, labels = data.tensors
    with torch.inference_mode():
        output = model.eval()(images)
    right = (output.argmax(1) == labels).float().mean()
    return {"loss": float(F.cross_entropy(output, labels)), "accuracy": float(right)}
