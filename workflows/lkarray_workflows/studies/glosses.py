"""Glosses: what the kernel of a text classifier sees of WordNet's hierarchy.

Inputs are WordNet's noun definitions, as hashed TF-IDF words; classes are about 900 hypernyms.
A network with a narrow layer learns to name the class from the definition, and the loss
correlation kernel of held-out definitions is compared with the hierarchy by taxonomic lift
(Adam et al. 2025a, D.2), beside three controls: untrained networks of the same shape, the
correlation of the inputs themselves, and random neighbours. What counts is what training adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import progress, store, workflow
from lkarray.analysis.hierarchy import sources
from lkarray_workflows.shared.common import draw_losses
from lkarray_workflows.shared.glosses_report import (
    HEADLINE,
    STORE,
    curve,
    differences,
    report,
    untrained_of,
)


class Config(workflow.Config):
    """Settings; tuned on seed 0, reported on others."""

    presets: ClassVar = {
        "paper": {"chains": 8, "draws": 1000},
        "small": {
            "features": 512,
            "epochs": 3,
            "held_out": 1000,
            "chains": 3,
            "draws": 60,
            "thin": 2,
            "burn_in": 50,
            "untrained": 2,
            "gammas": "",
            "least_members": 200,
            "smallest": 250,
        },
    }

    seed: int = Field(1, ge=0, description="of the split, the training, the sampling")
    smallest: int = Field(40, ge=2, description="descendants that a class must have")
    least_members: int = Field(30, ge=4, description="definitions that a class must have")
    held_out: int = Field(4000, ge=50, description="definitions kept from training and observed")
    features: int = Field(2048, ge=16, description="hashed words")
    width: int = Field(64, ge=2, description="units of the narrow layer")
    epochs: int = Field(30, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(1e-5, ge=0)
    batch_size: int = Field(256, ge=1, description="of the training and of the sampler")
    nbeta: float = Field(100.0, ge=0)
    gamma: float = Field(1000.0, gt=0)
    step_size: float = Field(3e-4, gt=0)
    chains: int = Field(6, ge=3)
    draws: int = Field(400, ge=2)
    burn_in: int = Field(100, ge=0)
    thin: int = Field(4, ge=1)
    neighbors: int = Field(30, ge=1)
    untrained: int = Field(5, ge=2, description="untrained networks")
    gammas: str = Field("100,3000", description="other localizations, comma separated")
    free_head: bool = Field(True, description="whether to sample with the head free too")


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    sources.open_wordnet()  # missing, it is told before a folder is made
    with workflow.Study("glosses", config, folder, progress) as study:
        study.stage("data", make_data, ["words.npz", "data.npz", "taxonomy.json"])
        study.stage("train", train, "models.pt")
        for kernel in kernels(config):
            study.stage(f"sample {kernel.name}", sample, file_of(kernel.name), kernel)
        study.stage("lift", measure, "lifts.json")
        study.stage("report", report, "report/index.html")
    return f"Report  {study.index}\nStores  {folder}/*.zarr"


def file_of(kernel: str) -> str:
    """Return the name of a kernel's store."""
    return f"{kernel.replace(' ', '_')}.zarr"


@dataclass(frozen=True)
class Kernel:
    """One network and one way to perturb it: with its head free, or held."""

    name: str
    model: str
    gamma: float
    head: bool = False


def kernels(config: Config) -> list[Kernel]:
    """Return every kernel of the study, the headline's first."""
    gammas = [float(text) for text in config.gammas.split(",") if text.strip()]
    return [
        Kernel(HEADLINE, "trained", config.gamma),
        *(Kernel(name, name, config.gamma) for name in untrained_names(config)),
        *(Kernel(f"gamma {gamma:g}", "trained", gamma) for gamma in gammas),
        Kernel("early", "early", config.gamma),
        *[Kernel("free head", "trained", config.gamma, head=True)] * config.free_head,
    ]


def untrained_names(config: Config) -> list[str]:
    """Return the names of the untrained networks."""
    return [f"untrained {i}" for i in range(config.untrained)]


def assign_classes(smallest: int, least: int) -> tuple[list[str], list[str]]:
    """Return noun synsets and the class of each, names.

    The class is the deepest hypernym with at least ``smallest`` descendants, kept when at least
    ``least`` synsets have it; between equally deep ones, the smaller.
    """
    wordnet = sources.open_wordnet()
    nouns = [s.name() for s in wordnet.all_synsets("n")]
    whole = lk.Taxonomy.wordnet(nouns)
    lines = whole.lines
    below = np.bincount(lines.indices, minlength=len(whole.nodes)) - 1
    depth = whole.depths()
    chosen = []

    def rank(node: int) -> tuple[Any, ...]:
        return -depth[node], below[node], whole.nodes[node]

    for row in range(len(nouns)):
        line = lines.indices[lines.indptr[row] : lines.indptr[row + 1]].tolist()
        above = [a for a in line if below[a] >= smallest and whole.nodes[a] != nouns[row]]
        best = min(above, key=rank, default=-1)
        chosen.append(str(whole.nodes[best]) if best >= 0 else "")
    names, counts = np.unique(chosen, return_counts=True)
    kept = {n for n, count in zip(names, counts, strict=True) if n and count >= least}
    pairs = [(n, c) for n, c in zip(nouns, chosen, strict=True) if c in kept]
    return [n for n, _ in pairs], [c for _, c in pairs]


def make_data(study: Study) -> None:
    """Choose classes, hash definitions, split, and keep the hierarchy above the classes."""
    from scipy import sparse
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    config = study.config
    nouns, classes = assign_classes(config.smallest, config.least_members)
    wordnet = sources.open_wordnet()
    glosses = [wordnet.synset(name).definition() for name in nouns]
    rng = np.random.default_rng(config.seed)
    held_out = np.zeros(len(nouns), bool)
    held_out[rng.choice(len(nouns), config.held_out, replace=False)] = True
    counts = HashingVectorizer(
        n_features=config.features, alternate_sign=False, norm=None, stop_words="english"
    ).transform(glosses)
    weigh = TfidfTransformer(sublinear_tf=True).fit(counts[~held_out])
    names, label = np.unique(classes, return_inverse=True)
    with study.writing("taxonomy.json") as new:
        lk.Taxonomy.wordnet(names.tolist()).to_json(new)
    with study.writing("words.npz") as new:
        sparse.save_npz(new, weigh.transform(counts).astype(np.float32))
    study.save("data.npz", label=label, synset=nouns, classes=names, held_out=held_out)


def data_set(study: Study, *, held_out: bool) -> tuple[TensorDataset, np.ndarray]:
    """Return one side of the split, and where its inputs are among all."""
    from scipy import sparse

    with np.load(study.path("data.npz")) as facts:
        places = np.flatnonzero(facts["held_out"] == held_out)
        label = facts["label"][places]
    words = sparse.csr_array(sparse.load_npz(study.path("words.npz")))[places].toarray()
    return TensorDataset(torch.from_numpy(words), torch.from_numpy(label)), places


def network(config: Config, classes: int, seed: int) -> nn.Sequential:
    """Return an untrained network: a narrow layer and a head."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(config.features, config.width), nn.ReLU(), nn.Linear(config.width, classes)
    )


def train(study: Study) -> None:
    """Train one network with Adam; keep it, its first epoch, and the untrained ones."""
    config = study.config
    data, _ = data_set(study, held_out=False)
    labels = data.tensors[1]
    classes, steps = int(labels.max()) + 1, -(-len(labels) // config.batch_size)
    states = {
        name: network(config, classes, 1000 * (config.seed + 1) + i).state_dict()
        for i, name in enumerate(untrained_names(config))
    }
    model = network(config, classes, config.seed)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * steps)
    words = data.tensors[0]
    shuffle = torch.Generator().manual_seed(config.seed)
    with progress.bar("training", total=config.epochs, unit="epoch", show=study.show) as bar:
        for epoch in range(config.epochs):
            for batch in torch.randperm(len(labels), generator=shuffle).split(config.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(words[batch]), labels[batch]).backward()
                optimizer.step()
                rates.step()
            if epoch == 0:
                states["early"] = {k: v.clone() for k, v in model.state_dict().items()}
            bar.update()
    states["trained"] = model.state_dict()
    with study.writing("models.pt") as new:
        torch.save(states, new)


def load_model(study: Study, name: str) -> nn.Module:
    """Return one of the networks."""
    state = torch.load(study.path("models.pt"), weights_only=True)[name]
    model = network(study.config, len(state["2.bias"]), 0)
    model.load_state_dict(state)
    return model


def sample(study: Study, kernel: Kernel) -> None:
    """Sample around one network and observe the held-out definitions."""
    config = study.config
    data, _ = data_set(study, held_out=False)
    observed, places = data_set(study, held_out=True)
    with np.load(study.path("data.npz")) as facts:
        coords = {
            "label": facts["classes"][facts["label"][places]],
            "synset": facts["synset"][places],
        }
    draw_losses(
        config.model_copy(update={"gamma": kernel.gamma}),
        load_model(study, kernel.model),
        data,
        observed,
        study.path(file_of(kernel.name)),
        batch_size=config.batch_size,
        seed=config.seed,
        coords=coords,
        show=study.show,
        trainable=None if kernel.head else ["0.*"],
    )


def random_neighbors(losses: xr.Dataset, k: int, seed: int) -> xr.Dataset:
    """Return a table of random inputs of other labels."""
    label = losses["label"].values
    rng = np.random.default_rng(seed)
    near = np.stack([rng.choice(np.flatnonzero(label != own), k, replace=False) for own in label])
    coords = {"sample": np.arange(len(label)), "label": ("sample", label)}
    attrs = {"exclude": "label", "k": k, "largest": 1}
    return xr.Dataset({"neighbor": (("sample", "rank"), near)}, coords=coords, attrs=attrs)


def inputs_as_losses(study: Study, losses: xr.Dataset) -> xr.DataArray:
    """Return the input features in the place of draws, so that R is their correlation."""
    words = data_set(study, held_out=True)[0].tensors[0].numpy()
    return xr.DataArray(
        words.T[None],
        dims=("chain", "draw", "sample"),
        coords={"sample": np.arange(len(words)), "label": ("sample", losses["label"].values)},
        name="loss",
    )


def measure(study: Study) -> None:
    """Compute every lift, keep each, and write the numbers."""
    config = study.config
    taxonomy = lk.Taxonomy.from_json(study.path("taxonomy.json"))
    options: dict[str, Any] = {"k": config.neighbors, "seed": config.seed, "keep_replicates": True}
    lifts: dict[str, xr.Dataset] = {}
    scores: dict[str, Any] = {}
    first = lk.open(study.path(STORE))["losses"].to_dataset()
    chosen = kernels(config)
    with progress.bar("lift", total=len(chosen), unit="kernel", show=study.show) as bar:
        for kernel in chosen:
            losses = lk.open(study.path(file_of(kernel.name)))["losses"].to_dataset()
            lifts[kernel.name] = lk.taxonomic_lift(losses, taxonomy, **options)
            scores[kernel.name] = quality(study, kernel, losses)
            bar.update()
    lifts["inputs"] = lk.taxonomic_lift(inputs_as_losses(study, first), taxonomy, **options)
    near = random_neighbors(first, config.neighbors, config.seed)
    lifts["random"] = lk.taxonomic_lift(near, taxonomy, **options)
    printed = {
        "random, printed base": lk.taxonomic_lift(near, taxonomy, base="dataset", **options),
        "trained, printed base": lk.taxonomic_lift(first, taxonomy, base="dataset", **options),
        "trained, least correlated": lk.taxonomic_lift(first, taxonomy, largest=False, **options),
        "trained, label component removed": lk.taxonomic_lift(
            lk.residualize(first), taxonomy, **options
        ),
    }
    for name, lift in (lifts | printed).items():
        key = f"lift_{name.replace(',', '').replace(' ', '_')}"
        store.put(study.path(STORE), key, lift)
    by_distance = lk.correlation_by_distance(first, taxonomy, replicates=20, seed=config.seed)
    store.put(study.path(STORE), "by_distance", by_distance)
    metrics = {
        "classes": len(taxonomy),
        "held_out": first["loss"].sizes["sample"],
        "draws": first["loss"].sizes["draw"] * first["loss"].sizes["chain"],
        "pooled_lift": {name: curve(lift) for name, lift in (lifts | printed).items()},
        "trained_minus_untrained": differences(lifts[HEADLINE], untrained_of(lifts)),
        "trained_minus_inputs": differences(lifts[HEADLINE], [lifts["inputs"]]),
        "rank_correlation_with_distance": {
            name: float(by_distance[name]) for name in ("rank_correlation", "rank_low", "rank_high")
        },
        "kernels": scores,
    }
    study.write("lifts.json", metrics)


def quality(study: Study, kernel: Kernel, losses: xr.Dataset) -> dict[str, float]:
    """Return how well a network classifies, and how steady its kernel is."""
    observed, _ = data_set(study, held_out=True)
    words, labels = observed.tensors
    with torch.inference_mode():
        logits = load_model(study, kernel.model)(words)
        accuracy = (logits.argmax(1) == labels).float().mean()
        loss = F.cross_entropy(logits, labels)
    halves = [
        losses["loss"].isel(chain=slice(first, None, 2), sample=slice(0, 1000)) for first in (0, 1)
    ]
    left, right = (lk.correlation(half).values for half in halves)
    pairs = np.triu(np.ones(left.shape, bool), 1)
    return {
        "held_out_accuracy": float(accuracy),
        "held_out_loss": float(loss),
        "loss_gain": float(lk.loss_gain(losses).mean()),
        "mean_correlation": float(left[pairs].mean()),
        "agreement_of_half_kernels": float(np.corrcoef(left[pairs], right[pairs])[0, 1]),
    }
