"""What studies of a convolutional network on Fashion-MNIST share: settings, data, what is counted.

Classes stand in WordNet's hierarchy, and images in groups of brightness.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from pydantic import Field
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import workflow
from lkarray_workflows.shared.common import Sampling, convolutional, plain_numbers, without_chain
from lkarray_workflows.shared.images import FOLDER, Dataset, data_set, take_images

#: WordNet's synset of each class.
SYNSETS: dict[Hashable, str] = {
    0: "jersey.n.03",  # "T-shirt/top": a T-shirt is a jersey in WordNet
    1: "trouser.n.01",
    2: "pullover.n.01",
    3: "dress.n.01",
    4: "coat.n.01",
    5: "sandal.n.01",
    6: "shirt.n.01",
    7: "gym_shoe.n.01",  # "Sneaker"
    8: "bag.n.04",
    9: "boot.n.01",  # "Ankle boot"
}


class Garments(Sampling):
    """Settings of the images, the network and the sampling."""

    seed: int = Field(1, ge=0, description="of the images, the training, the sampling")
    dataset: ClassVar[Dataset] = "fashion"
    data: Path | None = Field(None, description=FOLDER)
    train: int = Field(20_000, ge=50, le=60_000, description="training images")
    observed: int = Field(1000, ge=100, le=10_000, description="test images")
    width: int = Field(16, ge=1, description="channels of the first layer")
    epochs: int = Field(15, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(128, ge=1, description="of the training")
    neighbors: int = Field(30, ge=1)
    step_size: float = Field(2e-5, gt=0)
    burn_in: int = Field(300, ge=0)


def make_data(study: workflow.Study[Garments]) -> None:
    """Take training images, and observed ones from the test images."""
    config = study.config
    study.save("data.npz", **take_images(config, config.train, config.observed, seed=config.seed))


def network(config: Garments) -> nn.Module:
    """Return the untrained network."""
    torch.manual_seed(config.seed)
    return convolutional(config.width)


def observed_images(study: workflow.Study[Garments]) -> tuple[TensorDataset, dict[str, Any]]:
    """Return the observed images, and their labels and groups of brightness."""
    observed = data_set(study.path("data.npz"), "test")
    images, labels = (tensor.numpy() for tensor in observed.tensors)
    return observed, {"label": labels, "brightness": brightness(images)}


def wordnet_of(study: workflow.Study[Any]) -> lk.Taxonomy:
    """Return WordNet above the classes, and keep it in a file of the study."""
    taxonomy = lk.Taxonomy.wordnet(SYNSETS)
    with study.writing("taxonomy.json") as new:
        taxonomy.to_json(new)
    return taxonomy


def rank_correlation(by_distance: xr.Dataset) -> dict[str, float]:
    """Return the rank correlation of mean R with distance, and its interval."""
    return {key: float(by_distance[f"rank_{key}"]) for key in ("correlation", "low", "high")}


def brightness(images: np.ndarray, groups: int = 8) -> np.ndarray:
    """Return the group of each image by its mean brightness: equally many images in each."""
    mean = images.reshape(len(images), -1).mean(1)
    inner = np.quantile(mean, np.linspace(0, 1, groups + 1)[1:-1])
    return np.asarray(np.searchsorted(inner, mean))


def garment_lifts(losses: xr.DataArray, taxonomy: lk.Taxonomy, k: int, seed: int) -> dict[str, Any]:
    """Return how much more often neighbours share class, brightness and ancestors than chance.

    Each with its standard error, or interval, of which inputs (labels) were asked about and of the
    sampling, by leaving out chains, together. Brightness and ancestors are counted among
    neighbours of other classes, so that neither is the class again.
    """

    def lifts(some: xr.DataArray) -> list[xr.Dataset]:
        near, other = (lk.neighbors(some, k, exclude=kind).compute() for kind in (None, "label"))
        return [
            lk.attribute_lift(near, "label", seed=seed),
            lk.attribute_lift(other, "brightness", seed=seed),
        ]

    def pooled(some: xr.DataArray) -> list[float]:
        return [float(lift["pooled_lift"]) for lift in lifts(some)]

    values, by_chains = without_chain(losses, pooled)
    by_queries = [float(lift["pooled_standard_error"]) for lift in lifts(losses)]
    both = np.hypot(by_chains, by_queries)
    lift = lk.taxonomic_lift(losses, taxonomy, k=k, seed=seed)
    return {
        **{
            name: {
                "value": float(values[i]),
                "error": float(both[i]),
                "error_of_chains": float(by_chains[i]),
            }
            for i, name in enumerate(("class", "brightness"))
        },
        "depths": [int(d) for d in lift["depth"].values],
        "pooled_lift": plain_numbers(lift["pooled_lift"].values),
        "low": plain_numbers(lift["pooled_low"].values),
        "high": plain_numbers(lift["pooled_high"].values),
    }


def points_of(entries: Sequence[dict[str, Any]], column: int) -> list[tuple[float | None, ...]]:
    """Return the lift at one depth with its interval, of each entry that has `garment_lifts`."""
    keys = "pooled_lift", "low", "high"
    return [tuple(entry["lifts"][key][column] for key in keys) for entry in entries]
