"""The loss kernel of a network over images of ImageNet.

See Adam et al. 2025a, section 4, where it is GoogLeNet (InceptionV1).

The images lie in a folder with ``train`` and ``val``, each of one folder a class, named by its
wnid, as torchvision's ``ImageNet`` unpacks them; or in a folder of such folders, which then are
both what the network is held to and what is observed. The network is EfficientNet-Lite0, whose
weights come with the extra ``prototypes``, or a classifier of torchvision's by its name, with a
state dict; without one it is untrained, which serves as a control and says nothing about ImageNet.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torchvision
import xarray as xr
from PIL import Image
from pydantic import Field, model_validator
from torch import nn
from torch.utils.data import Dataset

import lkarray as lk
from lkarray import errors, progress, workflow
from lkarray_workflows.shared import efficientnet, wnids
from lkarray_workflows.shared.common import Sampling, draw_losses, halves_agree, plain_numbers

SPLITS = ("train", "val")
LITE0 = "efficientnet_lite0"
#: What torchvision's networks need beside their names, with their published weights or without.
OPTIONS: dict[str, dict[str, Any]] = {
    name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")
}


class Config(Sampling):
    """Settings, tried on EfficientNet-Lite0 and 1,000 images.

    ``paper`` is table 1 of the loss-kernel paper, ``probes`` that of the Bayesian probes.
    """

    presets: ClassVar = {
        "paper": {
            "network": "googlenet",
            "train": None,
            "gamma": 4000,
            "step_size": 5e-5,
            "chains": 15,
            "draws": 500,
            "burn_in": 100,
            "thin": 1,
        },
        "probes": {
            "network": "googlenet",
            "train": None,
            "burn_in": 100,
            "thin": 1,
            "observed": 2500,
            "sampler_batch": 64,
            "chains": 30,
            "draws": 1000,
            "step_size": 1e-4,
            "nbeta": 10,
            "gamma": 1000,
        },
        "small": {
            "train": 200,
            "observed": 60,
            "side": 64,
            "sampler_batch": 16,
            "chains": 2,
            "draws": 10,
            "burn_in": 4,
            "neighbors": 10,
        },
    }

    seed: int = Field(1, ge=0, description="of the choice of images, the sampling")
    data: Path = Field(
        Path("imagenet"), description="folder of train/WNID and val/WNID, or of WNID alone"
    )
    network: str = Field(LITE0, description="or a classifier of torchvision's, by its name")
    weights: Path | None = Field(None, description="state dict of a network of torchvision's")
    train: int | None = Field(50_000, ge=10, description="training images to sample over; all")
    observed: int = Field(10_000, ge=20, description="validation images")
    side: int = Field(224, ge=32, description="pixels; images are cut from one eighth larger")
    neighbors: int = Field(30, ge=1)
    nbeta: float = Field(20.0, ge=0)
    gamma: float = Field(60_000.0, gt=0)
    step_size: float = Field(1e-5, gt=0)
    chains: int = Field(4, ge=2)
    draws: int = Field(100, ge=2)
    burn_in: int = Field(20, ge=0)
    thin: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _known(self) -> Self:
        names = torchvision.models.list_models(module=torchvision.models)
        if self.network not in (LITE0, *names):
            raise ValueError(
                f"network must be {LITE0} or a classifier of torchvision's, such as googlenet or "
                f"resnet18, not {self.network!r}"
            )
        if self.network == LITE0 and self.weights is not None:
            raise ValueError(
                f"{LITE0} has weights of its own: name the network that {self.weights} is of, "
                "--network googlenet say"
            )
        return self


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    with workflow.Study("imagenet", config, folder, progress) as study:
        network(config)  # weights that do not fit are told before images are read
        for split in SPLITS:
            study.stage(f"read {split}", make_pixels, f"{split}_wnids.npy", split)
        study.stage("sample", sample, "store.zarr/derived/thumbnails")
        study.stage("map", wnids.relate, "store.zarr/derived/map", "store.zarr")
        study.stage("measure", measure, "metrics.json")
        study.stage("report", report, "report/index.html")
    return f"Report  {study.index}\nStore   {study.path('store.zarr')}"


class Pixels(Dataset[tuple[torch.Tensor, int]]):
    """Images read at once from a file, normalised as torchvision's networks expect, and classes."""

    def __init__(self, study: Study, split: str) -> None:
        self.images = np.load(study.path(f"{split}.npy"), mmap_mode="r")
        self.wnids: np.ndarray = np.load(study.path(f"{split}_wnids.npy"))
        number = {wnid: i for i, wnid in enumerate(lk.Taxonomy.imagenet().labels)}
        self.classes = [number[wnid] for wnid in self.wnids.tolist()]

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.from_numpy(np.array(self.images[index])).movedim(-1, 0).float() / 255
        mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (wnids.MEAN, wnids.DEVIATION))
        return (image - mean) / deviation, self.classes[index]


def files_of(config: Config, split: str) -> list[tuple[Path, str]]:
    """Return the images of a split to read and their wnids: some at random, in order.

    Raises
    ------
    StoreError
        The folder is not there, or holds folders that are not wnids of ImageNet.
    """
    flat = config.data.is_dir() and not any((config.data / each).is_dir() for each in SPLITS)
    root = config.data if flat else config.data / split
    if not root.is_dir() or not any(root.iterdir()):
        raise errors.StoreError(
            f"there are no images in {root}. ImageNet needs an account at image-net.org; with its "
            f'archives in {config.data}, this unpacks them: python -c "from torchvision.datasets '
            f"import ImageNet; [ImageNet('{config.data}', s) for s in ('train', 'val')]\""
        )
    images = torchvision.datasets.ImageFolder(str(root))
    known = set(lk.Taxonomy.imagenet().labels)
    wrong = [name for name in images.classes if name not in known]
    if wrong:
        raise errors.StoreError(
            f"{root}: {wrong[:3]} are no wnids of ImageNet's 1,000 classes, such as n02085620; "
            "name each class's folder by its wnid"
        )
    samples = [(Path(path), images.classes[label]) for path, label in images.samples]
    count = config.train if split == "train" else config.observed
    if count is not None and count < len(samples):
        rows = np.random.default_rng(config.seed).choice(len(samples), count, replace=False)
        samples = [samples[row] for row in np.sort(rows)]
    return samples


def read_image(path: Path, side: int) -> np.ndarray:
    """Return the middle of an image as bytes ``(side, side, 3)``."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
        scale = (side + side // 7) / min(image.size)
        width, height = (max(side, round(length * scale)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - side) // 2, (height - side) // 2
        return np.asarray(image.crop((left, top, left + side, top + side)))


def make_pixels(study: Study, split: str) -> None:
    """Read the images of a split into one file of bytes: decoded once, not at every step."""
    files = files_of(study.config, split)
    side = study.config.side
    with study.writing(f"{split}.npy") as new:
        pixels = np.lib.format.open_memmap(
            new, mode="w+", dtype=np.uint8, shape=(len(files), side, side, 3)
        )

        def read(row: int) -> None:
            pixels[row] = read_image(files[row][0], side)

        bar = progress.bar(f"{split} images", total=len(files), show=study.show)
        with bar, ThreadPoolExecutor() as pool:
            for _ in pool.map(read, range(len(files))):
                bar.update()
        pixels.flush()
    with study.writing(f"{split}_wnids.npy") as new:
        np.save(new, np.array([wnid for _, wnid in files]))


def network(config: Config) -> nn.Module:
    """Return the network with its weights, or untrained.

    Raises
    ------
    StoreError
        The weights are not there, or are of another network.
    """
    if config.network == LITE0:
        return efficientnet.network(config.seed)
    torch.manual_seed(config.seed)
    options = OPTIONS.get(config.network, {})
    if options:  # these two were trained on pixels of another scale
        options = {**options, "transform_input": config.weights is not None}
    model: nn.Module = torchvision.models.get_model(config.network, weights=None, **options)
    if config.weights is not None:
        if not config.weights.is_file():
            raise errors.StoreError(
                f"there is no file {config.weights}; torchvision's weights are fetched by: python "
                '-c "import torch, torchvision; torch.save(torchvision.models.get_model('
                f"'{config.network}', weights='DEFAULT').state_dict(), '{config.weights}')\""
            )
        state = torch.load(config.weights, weights_only=True, map_location="cpu")
        if options:
            state = {name: value for name, value in state.items() if not name.startswith("aux")}
        try:
            model.load_state_dict(state)
        except (RuntimeError, AttributeError) as error:
            first = str(error).splitlines()[-1].strip()
            raise errors.StoreError(
                f"{config.weights} holds no weights of torchvision's {config.network}: {first}"
            ) from None
    return model.eval()


def sample(study: Study) -> None:
    """Sample around the network over the training images; observe the validation images."""
    config = study.config
    train, observed = (Pixels(study, split) for split in SPLITS)
    draw_losses(
        config,
        network(config),
        train,
        observed,
        study.path("store.zarr"),
        batch_size=config.sampler_batch,
        seed=config.seed,
        show=study.show,
        coords={"label": observed.wnids, "class_number": np.array(observed.classes)},
    )
    wnids.keep_thumbnails(study.path("store.zarr"), np.asarray(observed.images))


def measure(study: Study) -> None:
    """Compute every number of the report."""
    config = study.config
    path = study.path("store.zarr")
    tree = lk.open(path)
    losses, near = wnids.losses_of(path), wnids.neighbors_of(path)
    images = tree["derived/thumbnails"].to_dataset()["thumbnail"].values
    groups = lk.color_groups(images, 10)
    everywhere = lk.neighbors(losses, config.neighbors).compute()
    lift = wnids.lift_of(near, near["label"].values, config.seed)
    colored = near.assign_coords(color=("sample", groups.values))
    color = lk.attribute_lift(colored, "color", seed=config.seed)
    own = lk.attribute_lift(everywhere, "label", seed=config.seed)

    def pooled(lift: xr.Dataset) -> dict[str, float | None]:
        pair = [lift["pooled_lift"], lift["pooled_standard_error"]]
        return dict(zip(("value", "error"), plain_numbers(pair), strict=True))

    metrics = {
        "images": losses.sizes["sample"],
        "classes": len(np.unique(near["label"].values)),
        "lift": wnids.numbers(lift),
        "class_lift": pooled(own),
        "color_lift": pooled(color),
        "mean_gain": float(lk.loss_gain(tree).mean()),
        "agreement_of_halves": halves_agree(losses),
        "verdicts": list(lk.diagnostics(tree).attrs["verdicts"]),
    }
    study.write("metrics.json", metrics)


def report(study: Study) -> None:
    """Write the report folder."""
    config, path = study.config, study.path("store.zarr")
    m = study.read("metrics.json")
    near = wnids.neighbors_of(path)
    lift = wnids.lift_of(near, near["label"].values, config.seed)

    def text(pair: dict[str, float | None]) -> str:
        return " +- ".join("none" if v is None else f"{v:.2f}" for v in pair.values())

    rows = [
        (
            "Lift by depth of the common ancestor, other classes only",
            wnids.lift_text(m["lift"]),
            "chance: 1; the paper's figure 5 has it rise with depth",
        ),
        ("Lift of the class among all neighbours", text(m["class_lift"]), "chance: 1"),
        (
            "Lift of the colour group among neighbours of other classes",
            text(m["color_lift"]),
            "chance: 1",
        ),
        ("Mean loss gain (nats)", f"{m['mean_gain']:.3g}", ""),
        ("Agreement of R between halves of the chains", f"{m['agreement_of_halves']:.2f}", ""),
    ]
    trained = f"{config.network}, weights of {config.weights}"
    if config.weights is None:
        trained = LITE0 if config.network == LITE0 else f"{config.network}, untrained"
    study.report(
        title="The loss kernel of a network on ImageNet",
        summary=[
            f"{m['images']:,} images of {m['classes']:,} classes, {trained}; "
            f"{config.chains} chains of {config.draws} draws, nbeta {config.nbeta:g}, gamma "
            f"{config.gamma:g}, step {config.step_size:g}."
        ],
        metrics=m,
        rows=rows,
        figures=wnids.figures(path, lift, seed=config.seed),
        next_steps=f'tree = lk.open("{path}")\ntree["derived/neighbors"]',
    )
