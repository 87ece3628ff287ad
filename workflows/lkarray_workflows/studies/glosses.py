"""Glosses: what the kernel of a text classifier sees of WordNet's hierarchy.

Inputs are WordNet's noun definitions, as hashed TF-IDF words; classes are about 900 hypernyms.
A network with a narrow layer learns to name the class from the definition, and the loss
correlation kernel of held-out definitions is compared with the hierarchy by taxonomic lift
(loss-kernel D.2), beside three controls: untrained networks of the same shape, the
correlation of the inputs themselves, and random neighbours. What counts is what training adds.
"""

from __future__ import annotations

import json
from functools import partial
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
from lkarray import plots, progress, store, workflow
from lkarray.analysis.hierarchy import sources

HEADLINE = "trained"
_CONTROLS = ("untrained", "inputs", "random")


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


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    sources.open_wordnet()  # missing, it is told before a folder is made
    with workflow.Run("glosses", config, folder) as state:
        paths = Paths(folder)
        state.stage(
            "data", lambda: make_data(config, paths), [paths.words, paths.facts, paths.taxonomy]
        )
        state.stage("train", lambda: train(config, paths, progress), [paths.models])
        for kernel in kernels(config):
            state.stage(
                f"sample {kernel.name}",
                partial(sample, config, paths, kernel, progress),
                [paths.store(kernel.name)],
            )
        state.stage("lift", lambda: measure(config, paths, progress), [paths.metrics])
        state.stage("report", lambda: report(config, paths, state), [paths.index])
    return f"Report  {paths.index}\nStores  {folder}/*.zarr"


class Paths:
    """Where the study's files are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.words = folder / "words.npz"
        self.facts = folder / "data.npz"
        self.taxonomy = folder / "taxonomy.json"
        self.models = folder / "models.pt"
        self.metrics = folder / "lifts.json"
        self.report = folder / "report"
        self.index = self.report / "index.html"

    def store(self, kernel: str) -> Path:
        """Return a kernel's store."""
        return self.folder / f"{kernel.replace(' ', '_')}.zarr"


class Kernel:
    """One network and one way to perturb it."""

    def __init__(self, name: str, model: str, gamma: float, head: bool = False) -> None:
        self.name, self.model, self.gamma, self.head = name, model, gamma, head


def kernels(config: Config) -> list[Kernel]:
    """Return every kernel of the study, the headline's first."""
    out = [Kernel(HEADLINE, "trained", config.gamma)]
    out += [
        Kernel(f"untrained {at}", f"untrained {at}", config.gamma) for at in range(config.untrained)
    ]
    gammas = [float(text) for text in config.gammas.split(",") if text.strip()]
    out += [Kernel(f"gamma {gamma:g}", "trained", gamma) for gamma in gammas]
    out += [Kernel("early", "early", config.gamma)]
    out += [Kernel("free head", "trained", config.gamma, head=True)] * config.free_head
    return out


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
    for row in range(len(nouns)):
        line = lines.indices[lines.indptr[row] : lines.indptr[row + 1]].tolist()
        above = [a for a in line if below[a] >= smallest and whole.nodes[a] != nouns[row]]
        best = min(above, key=lambda a: (-depth[a], below[a], whole.nodes[a]), default=-1)
        chosen.append(str(whole.nodes[best]) if best >= 0 else "")
    names, counts = np.unique(chosen, return_counts=True)
    kept = {n for n, count in zip(names, counts, strict=True) if n and count >= least}
    pairs = [(n, c) for n, c in zip(nouns, chosen, strict=True) if c in kept]
    return [n for n, _ in pairs], [c for _, c in pairs]


def make_data(config: Config, paths: Paths) -> None:
    """Choose classes, hash definitions, split, and keep the hierarchy above the classes."""
    from scipy import sparse
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

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
    lk.Taxonomy.wordnet(names.tolist()).to_json(paths.taxonomy)
    sparse.save_npz(paths.words, weigh.transform(counts).astype(np.float32))
    np.savez(paths.facts, label=label, synset=nouns, classes=names, held_out=held_out)


def data_set(paths: Paths, *, held_out: bool) -> tuple[TensorDataset, np.ndarray]:
    """Return one side of the split, and where its inputs are among all."""
    from scipy import sparse

    with np.load(paths.facts) as facts:
        at = np.flatnonzero(facts["held_out"] == held_out)
        label = facts["label"][at]
    words = sparse.csr_array(sparse.load_npz(paths.words))[at].toarray()
    return TensorDataset(torch.from_numpy(words), torch.from_numpy(label)), at


def network(config: Config, classes: int, seed: int) -> nn.Sequential:
    """Return an untrained network: a narrow layer and a head."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(config.features, config.width), nn.ReLU(), nn.Linear(config.width, classes)
    )


def train(config: Config, paths: Paths, show: bool) -> None:
    """Train one network with Adam; keep it, its first epoch, and the untrained ones."""
    data, _ = data_set(paths, held_out=False)
    words, labels = data.tensors
    classes = int(labels.max()) + 1
    states = {
        f"untrained {at}": network(config, classes, 1000 * (config.seed + 1) + at).state_dict()
        for at in range(config.untrained)
    }
    model = network(config, classes, config.seed)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    shuffle = torch.Generator().manual_seed(config.seed)
    steps = -(-len(labels) // config.batch_size)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * steps)
    with progress.bar("training", total=config.epochs, unit="epoch", show=show) as bar:
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
    with workflow.replacing(paths.models) as part:
        torch.save(states, part)


def load_model(config: Config, paths: Paths, name: str) -> nn.Module:
    """Return one of the networks."""
    state = torch.load(paths.models, weights_only=True)[name]
    model = network(config, len(state["2.bias"]), 0)
    model.load_state_dict(state)
    return model


def sample(config: Config, paths: Paths, kernel: Kernel, show: bool) -> None:
    """Sample around one network and observe the held-out definitions."""
    data, _ = data_set(paths, held_out=False)
    observed, at = data_set(paths, held_out=True)
    with np.load(paths.facts) as facts:
        coords = {"label": facts["classes"][facts["label"][at]], "synset": facts["synset"][at]}
    posterior = lk.LocalPosterior(
        load_model(config, paths, kernel.model),
        data,
        nbeta=config.nbeta,
        gamma=kernel.gamma,
        trainable=None if kernel.head else ["0.*"],
    )
    lk.sample(
        posterior,
        observed,
        sampler=lk.SGLD(step_size=config.step_size),
        store=paths.store(kernel.name),
        chains=config.chains,
        draws=config.draws,
        burn_in=config.burn_in,
        thin=config.thin,
        batch_size=config.batch_size,
        coords=coords,
        seed=config.seed,
        progress=show,
    )


def random_neighbors(losses: xr.Dataset, k: int, seed: int) -> xr.Dataset:
    """Return a table of random inputs of other labels."""
    label = losses["label"].values
    rng = np.random.default_rng(seed)
    near = np.stack([rng.choice(np.flatnonzero(label != own), k, replace=False) for own in label])
    coords = {"sample": np.arange(len(label)), "label": ("sample", label)}
    attrs = {"exclude": "label", "k": k, "largest": 1}
    return xr.Dataset({"neighbor": (("sample", "rank"), near)}, coords=coords, attrs=attrs)


def inputs_as_losses(paths: Paths, losses: xr.Dataset) -> xr.DataArray:
    """Return the input features in the place of draws, so that R is their correlation."""
    words = data_set(paths, held_out=True)[0].tensors[0].numpy()
    return xr.DataArray(
        words.T[None],
        dims=("chain", "draw", "sample"),
        coords={"sample": np.arange(len(words)), "label": ("sample", losses["label"].values)},
        name="loss",
    )


def measure(config: Config, paths: Paths, show: bool) -> None:
    """Compute every lift, keep each, and write the numbers."""
    taxonomy = lk.Taxonomy.from_json(paths.taxonomy)
    options: dict[str, Any] = {"k": config.neighbors, "seed": config.seed, "keep_replicates": True}
    lifts: dict[str, xr.Dataset] = {}
    scores: dict[str, Any] = {}
    first = lk.open(paths.store(HEADLINE))["losses"].to_dataset()
    chosen = kernels(config)
    with progress.bar("lift", total=len(chosen), unit="kernel", show=show) as bar:
        for kernel in chosen:
            losses = lk.open(paths.store(kernel.name))["losses"].to_dataset()
            lifts[kernel.name] = lk.taxonomic_lift(losses, taxonomy, **options)
            scores[kernel.name] = quality(config, paths, kernel, losses)
            bar.update()
    lifts["inputs"] = lk.taxonomic_lift(inputs_as_losses(paths, first), taxonomy, **options)
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
        store.put(paths.store(HEADLINE), f"lift_{name.replace(',', '').replace(' ', '_')}", lift)
    by_distance = lk.correlation_by_distance(first, taxonomy, replicates=20, seed=config.seed)
    store.put(paths.store(HEADLINE), "by_distance", by_distance)
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
    paths.metrics.write_text(json.dumps(metrics, indent=2, allow_nan=False))


def curve(lift: xr.Dataset) -> dict[str, list[float | None]]:
    """Return a pooled curve with its interval, as plain numbers."""
    names = {"lift": "pooled_lift", "low": "pooled_low", "high": "pooled_high"}
    return {
        name: [float(v) if np.isfinite(v) else None for v in lift[of].values]
        for name, of in names.items()
    }


def untrained_of(lifts: dict[str, xr.Dataset]) -> list[xr.Dataset]:
    """Return the lifts of the untrained networks."""
    return [lift for name, lift in lifts.items() if name.startswith("untrained")]


def differences(trained: xr.Dataset, plain: list[xr.Dataset]) -> list[dict[str, Any]]:
    """Return pooled lift of the trained network minus the mean of a control's, by depth.

    Errors: of labels, replicate by replicate, since both were resampled alike; of the trained
    network's chains; and of which untrained networks there were, their own chains included.
    """
    out = []
    for depth in trained["depth"].values:
        at = {"depth": depth}
        values = np.array([float(lift["pooled_lift"].sel(at)) for lift in plain])
        value = float(trained["pooled_lift"].sel(at)) - values.mean()
        if not np.isfinite(value):
            continue
        mean = sum(lift["pooled_replicate"].sel(at).values for lift in plain) / len(plain)
        labels = np.nanstd(trained["pooled_replicate"].sel(at).values - mean, ddof=1)
        chains = float(trained["pooled_standard_error_chains"].sel(at))
        seeds = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
        error = float(np.sqrt(labels**2 + chains**2 + seeds**2))
        shared = float((trained["pairs"] * trained["base_rate"].fillna(0)).sel(at).sum())
        out.append(
            {
                "depth": int(depth),
                "trained": float(trained["pooled_lift"].sel(at)),
                "control": float(values.mean()),
                "difference": value,
                "low": value - 1.96 * error,
                "high": value + 1.96 * error,
                "pairs_expected_to_share": shared,
            }
        )
    return out


def quality(config: Config, paths: Paths, kernel: Kernel, losses: xr.Dataset) -> dict[str, float]:
    """Return how well a network classifies, and how steady its kernel is."""
    observed, _ = data_set(paths, held_out=True)
    words, labels = observed.tensors
    with torch.inference_mode():
        logits = load_model(config, paths, kernel.model)(words)
        accuracy = (logits.argmax(1) == labels).float().mean()
        loss = F.cross_entropy(logits, labels)
    halves = [
        losses["loss"].isel(chain=slice(first, None, 2), sample=slice(0, 1000)) for first in (0, 1)
    ]
    one, two = (lk.correlation(half).values for half in halves)
    pairs = np.triu(np.ones(one.shape, bool), 1)
    return {
        "held_out_accuracy": float(accuracy),
        "held_out_loss": float(loss),
        "loss_gain": float(lk.loss_gain(losses).mean()),
        "mean_correlation": float(one[pairs].mean()),
        "agreement_of_half_kernels": float(np.corrcoef(one[pairs], two[pairs])[0, 1]),
    }


def report(config: Config, paths: Paths, state: workflow.Run) -> None:
    """Write figures, numbers and page."""
    metrics = json.loads(paths.metrics.read_text())
    derived = lk.open(paths.store(HEADLINE))["derived"]
    lift = {
        name.removeprefix("lift_").replace("_", " "): node.to_dataset().compute()
        for name, node in derived.children.items()
        if name.startswith("lift_")
    }
    by_distance = derived["by_distance"].to_dataset().compute()
    compared = {
        "trained": lift["trained"],
        **{f"untrained ({at})": part for at, part in enumerate(untrained_of(lift))},
        "inputs": lift["inputs"],
        "random": lift["random"],
    }
    settings = {
        "trained": lift["trained"],
        **{
            name: part
            for name, part in lift.items()
            if name in ("early", "free head", "trained label component removed")
            or name.startswith("gamma")
        },
    }
    figures = [
        workflow.Figure(
            "controls",
            "Trained, and the controls",
            "Pooled lift under the matched base rate, pairs of one label excluded. Bars are 95% "
            "intervals: labels resampled, chains deleted.",
            plots.lift_curves(compared, title="Taxonomic lift of held-out definitions"),
        ),
        workflow.Figure(
            "by_depth",
            "By query depth",
            "The trained network, one curve for each query depth.",
            plots.lift_by_depth(lift["trained"]),
        ),
        workflow.Figure(
            "settings",
            "Settings",
            "The trained network under other localizations, with the "
            "head free, after one epoch, and without each label's shared component.",
            plots.lift_curves(settings, title="What the lift depends on"),
        ),
        workflow.Figure(
            "by_distance",
            "Correlation against distance",
            "Mean correlation of losses by distance of the labels in WordNet.",
            plots.correlation_against_distance({"trained": by_distance}),
        ),
        workflow.Figure(
            "matrix",
            "By label",
            "Mean correlation between classes, in the hierarchy's order, beside their distance.",
            plots.hierarchy_matrices(by_distance),
        ),
    ]
    rows = [
        (
            f"Pooled lift at depth {d['depth']}: trained minus {name}",
            f"{d['difference']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f})",
            f"{d['trained']:.2f} against {d['control']:.2f}",
        )
        for name in ("untrained", "inputs")
        for d in metrics[f"trained_minus_{name}"]
        if d["depth"] >= 1 and d["pairs_expected_to_share"] >= 100
    ]
    rows += [
        (
            f"{name}: accuracy, loss, agreement of half kernels",
            f"{k['held_out_accuracy']:.1%}, {k['held_out_loss']:.2f}, "
            f"{k['agreement_of_half_kernels']:.2f}",
            "",
        )
        for name, k in metrics["kernels"].items()
    ]
    workflow.write_report(
        workflow.Report(
            title="Glosses: what of WordNet does a definition classifier's loss kernel see?",
            summary=[
                f"{metrics['held_out']:,} held-out definitions, {metrics['classes']} classes, "
                f"{metrics['draws']:,} draws. Lift above 1 means that the inputs whose losses "
                "move together share ancestors more often than chance. Only what exceeds the "
                "controls can be owed to what the network learned.",
            ],
            metrics={**metrics, "seconds": state.seconds(), "config": config.model_dump()},
            rows=rows,
            figures=figures,
            settings=config.model_dump(),
            next_steps="import lkarray as lk\n"
            f'losses = lk.open("{paths.store(HEADLINE)}")["losses"]\n'
            f'taxonomy = lk.Taxonomy.from_json("{paths.taxonomy}")\n'
            "lk.taxonomic_lift(losses, taxonomy)",
        ),
        paths.report,
    )
