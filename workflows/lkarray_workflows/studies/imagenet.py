"""The loss kernel of GoogLeNet (InceptionV1) over images of ImageNet (loss-kernel section 4).

The images lie in a folder with ``train`` and ``val``, each of one folder a class, named by its
wnid, as torchvision's ``ImageNet`` unpacks them. Weights are a state dict of torchvision's
GoogLeNet; without any, the network is untrained, which serves as a control and says nothing about
ImageNet.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torchvision
from lkarray_workflows.shared import wnids
from lkarray_workflows.shared.common import Sampling, draw_losses, halves_agree
from PIL import Image
from pydantic import Field
from torch import nn
from torch.utils.data import Dataset

import lkarray as lk
from lkarray import errors, progress, workflow

PARTS = ("train", "val")


class Config(Sampling):
    """Settings: table 1 of the loss-kernel paper; ``probes`` is that of the Bayesian probes."""

    presets: ClassVar = {
        "paper": {"train": None},
        "probes": {
            "train": None,
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
    data: Path = Field(Path("imagenet"), description="folder of train/WNID and val/WNID")
    weights: Path | None = Field(None, description="state dict of torchvision's googlenet")
    train: int | None = Field(50_000, ge=10, description="training images to sample over; all")
    observed: int = Field(10_000, ge=20, description="validation images")
    side: int = Field(224, ge=32, description="pixels; images are cut from one eighth larger")
    neighbors: int = Field(30, ge=1)
    nbeta: float = Field(20.0, ge=0)
    gamma: float = Field(4000.0, gt=0)
    step_size: float = Field(5e-5, gt=0)
    chains: int = Field(15, ge=2)
    draws: int = Field(500, ge=2)
    burn_in: int = Field(100, ge=0)
    thin: int = Field(1, ge=1)


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    with workflow.Run("imagenet", config, folder) as state:
        paths = Paths(folder)
        network(config)  # weights that do not fit are told before images are read
        for part in PARTS:
            work = partial(make_pixels, config, paths, part, progress)
            state.stage(f"read {part}", work, [paths.labels(part)])
        state.stage("sample", lambda: sample(config, paths, progress), [paths.thumbnails])
        work = partial(wnids.relate, paths.store, config.neighbors, config.seed, show=progress)
        state.stage("map", work, [paths.map])
        state.stage("measure", lambda: measure(config, paths), [paths.metrics])
        state.stage("report", lambda: report(config, paths, state), [paths.index])
    return f"Report  {paths.index}\nStore   {paths.store}"


class Paths:
    """Where the study's files are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "store.zarr"
        self.thumbnails = self.store / "derived" / "thumbnails"
        self.map, self.metrics = self.store / "derived" / "map", folder / "metrics.json"
        self.report = folder / "report"
        self.index = self.report / "index.html"

    def pixels(self, part: str) -> Path:
        """Return where images of a part are, as bytes ``(n, side, side, 3)``."""
        return self.folder / f"{part}.npy"

    def labels(self, part: str) -> Path:
        """Return where their wnids are."""
        return self.folder / f"{part}_wnids.npy"


class Pixels(Dataset[tuple[torch.Tensor, int]]):
    """Images read at once from a file, normalised as torchvision's networks expect, and classes."""

    def __init__(self, paths: Paths, part: str) -> None:
        self.images = np.load(paths.pixels(part), mmap_mode="r")
        self.wnids: np.ndarray = np.load(paths.labels(part))
        number = {wnid: at for at, wnid in enumerate(lk.Taxonomy.imagenet().labels)}
        self.classes = [number[wnid] for wnid in self.wnids.tolist()]

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.from_numpy(np.array(self.images[index])).movedim(-1, 0).float() / 255
        mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (wnids.MEAN, wnids.DEVIATION))
        return (image - mean) / deviation, self.classes[index]


def files_of(config: Config, part: str) -> list[tuple[Path, str]]:
    """Return the images of a part to read and their wnids: some at random, in order.

    Raises
    ------
    StoreError
        The folder is not there, or holds folders that are not wnids of ImageNet.
    """
    root = config.data / part
    if not root.is_dir():
        raise errors.StoreError(
            f"there is no {root}. ImageNet needs an account at image-net.org; with its archives "
            f'in {config.data}, this unpacks them: python -c "from torchvision.datasets import '
            f"ImageNet; [ImageNet('{config.data}', s) for s in ('train', 'val')]\""
        )
    found = torchvision.datasets.ImageFolder(str(root))
    known = set(lk.Taxonomy.imagenet().labels)
    wrong = [name for name in found.classes if name not in known]
    if wrong:
        raise errors.StoreError(
            f"{root}: {wrong[:3]} are no wnids of ImageNet's 1,000 classes, such as n02085620; "
            "name each class's folder by its wnid"
        )
    samples = [(Path(path), found.classes[at]) for path, at in found.samples]
    count = config.train if part == "train" else config.observed
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


def make_pixels(config: Config, paths: Paths, part: str, show: bool) -> None:
    """Read the images of a part into one file of bytes: decoded once, not at every step."""
    files = files_of(config, part)
    path = paths.pixels(part)
    shape = (len(files), config.side, config.side, 3)
    kept = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)

    def read(row: int) -> None:
        kept[row] = read_image(files[row][0], config.side)

    bar = progress.bar(f"{part} images", total=len(files), show=show)
    with bar, ThreadPoolExecutor() as pool:
        for _ in pool.map(read, range(len(files))):
            bar.update()
    kept.flush()
    labels = paths.labels(part)
    with workflow.replacing(labels) as new:
        np.save(new, np.array([wnid for _, wnid in files]))


def network(config: Config) -> nn.Module:
    """Return GoogLeNet with the weights given, or untrained.

    Raises
    ------
    StoreError
        The weights are not there, or are of another network.
    """
    torch.manual_seed(config.seed)
    model: nn.Module = torchvision.models.googlenet(
        weights=None,
        aux_logits=False,
        init_weights=True,
        transform_input=config.weights is not None,
    )
    if config.weights is not None:
        if not config.weights.is_file():
            raise errors.StoreError(
                f"there is no file {config.weights}; torchvision's weights are fetched by: python "
                '-c "import torch, torchvision; torch.save(torchvision.models.googlenet(weights='
                f"'DEFAULT').state_dict(), '{config.weights}')\""
            )
        state = torch.load(config.weights, weights_only=True, map_location="cpu")
        state = {name: value for name, value in state.items() if not name.startswith("aux")}
        try:
            model.load_state_dict(state)
        except (RuntimeError, AttributeError) as error:
            first = str(error).splitlines()[-1].strip()
            raise errors.StoreError(
                f"{config.weights} holds no weights of torchvision's googlenet: {first}"
            ) from None
    return model.eval()


def sample(config: Config, paths: Paths, show: bool) -> None:
    """Sample around the network over the training images; observe the validation images."""
    train, observed = (Pixels(paths, part) for part in PARTS)
    draw_losses(
        config,
        network(config),
        train,
        observed,
        paths.store,
        seed=config.seed,
        show=show,
        coords={"label": observed.wnids, "class_number": np.array(observed.classes)},
    )
    wnids.keep_thumbnails(paths.store, np.asarray(observed.images))


def measure(config: Config, paths: Paths) -> None:
    """Compute every number of the report."""
    tree = lk.open(paths.store)
    losses, near = wnids.losses_of(paths.store), wnids.neighbors_of(paths.store)
    images = tree["derived/thumbnails"].to_dataset()["thumbnail"].values
    groups = lk.color_groups(images, 10)
    everywhere = lk.neighbors(losses, config.neighbors).compute()
    lift = wnids.lift_of(near, near["label"].values, config.seed)
    colored = near.assign_coords(color=("sample", groups.values))
    color = lk.attribute_lift(colored, "color", seed=config.seed)
    own = lk.attribute_lift(everywhere, "label", seed=config.seed)

    def pooled(found: Any) -> dict[str, float | None]:
        pair = {"value": found["pooled_lift"], "error": found["pooled_standard_error"]}
        return {key: float(v) if np.isfinite(v) else None for key, v in pair.items()}

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
    paths.metrics.write_text(json.dumps(metrics, indent=2, allow_nan=False))


def report(config: Config, paths: Paths, state: workflow.Run) -> None:
    """Write the report folder."""
    m = json.loads(paths.metrics.read_text())
    near = wnids.neighbors_of(paths.store)
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
    trained = "an untrained network" if config.weights is None else f"weights of {config.weights}"
    workflow.write_report(
        workflow.Report(
            title="The loss kernel of GoogLeNet on ImageNet",
            summary=[
                f"{m['images']:,} validation images of {m['classes']:,} classes, {trained}; "
                f"{config.chains} chains of {config.draws} draws, nbeta {config.nbeta:g}, gamma "
                f"{config.gamma:g}, step {config.step_size:g}."
            ],
            metrics={**m, "seconds": state.seconds(), "config": config.model_dump(mode="json")},
            rows=rows,
            figures=wnids.figures(paths.store, lift, seed=config.seed),
            settings=config.model_dump(mode="json"),
            next_steps=f'tree = lk.open("{paths.store}")\ntree["derived/neighbors"]',
        ),
        paths.report,
    )
