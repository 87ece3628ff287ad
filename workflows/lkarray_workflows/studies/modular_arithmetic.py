"""Modular arithmetic: the loss kernel of two tasks that share nothing but weights.

A two-layer transformer (Power et al. 2022, with a vocabulary for each task) learns addition and
division modulo 97. The loss kernel of 10,000 inputs should fall apart into the two tasks, and a
small cluster of the trivial divisions 0 / b (loss-kernel section 3, figure 3, appendix C).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from lkarray_workflows.shared.common import (
    Block,
    Sampling,
    accuracy,
    area,
    draw_losses,
    fit,
    halves_agree,
    keep_model,
    load_model,
    without_chain,
)
from matplotlib.figure import Figure
from pydantic import Field
from torch import nn
from torch.utils.data import TensorDataset

import lkarray as lk
from lkarray import plots, progress, store, workflow
from lkarray.errors import SettingsError

TASKS = ("addition", "division")
_COLOURS = {"addition": "#3f90da", "division": "#ffa90e", "between": "#717581"}


class Config(Sampling):
    """Settings: the paper's posterior; 15 x 100 draws, eight steps apart, instead of 30 x 800."""

    presets: ClassVar = {
        "paper": {"chains": 30, "draws": 800, "thin": 1},
        "small": {
            "modulus": 31,
            "observed": 600,
            "chains": 4,
            "draws": 100,
            "thin": 8,
            "burn_in": 100,
            "train_share": 0.8,
            "batch_size": 128,
            "sampler_batch": 128,
            "width": 64,
        },
    }

    seed: int = Field(1, ge=0, description="of the split, the training, the sampling")
    modulus: int = Field(97, ge=5, description="a prime")
    train_share: float = Field(0.6, gt=0, lt=1, description="of all pairs, trained on")
    observed: int = Field(5000, ge=20, description="inputs of each task, at random from all pairs")
    width: int = Field(128, ge=8, multiple_of=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    epochs: int = Field(1000, ge=1, description="at most")
    generalize: float = Field(0.99, ge=0, le=1, description="share of held-out pairs to get right")
    settle: int = Field(20, ge=0, description="epochs after that, the rate falling to 0")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1.0, ge=0, description="decoupled, as in Power et al.")
    batch_size: int = Field(512, ge=1, description="of the training")
    neighbors: int = Field(30, ge=1)
    nbeta: float = Field(500.0, ge=0)
    gamma: float = Field(30_000.0, gt=0)
    step_size: float = Field(2e-7, gt=0)
    sampler_batch: int = Field(512, ge=1)
    chains: int = Field(15, ge=3)
    draws: int = Field(100, ge=2)
    burn_in: int = Field(200, ge=0)
    thin: int = Field(8, ge=1)


class Transformer(nn.Module):
    """The result of two tokens, as logits over the vocabularies of both tasks."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.tokens = nn.Embedding(2 * config.modulus, config.width)
        self.blocks = nn.Sequential(
            *(Block(config.width, config.heads) for _ in range(config.layers))
        )
        self.head = nn.Linear(config.width, 2 * config.modulus, bias=False)
        place = torch.arange(2)[:, None] / 10_000 ** (
            torch.arange(0, config.width, 2) / config.width
        )
        self.register_buffer("places", torch.stack((place.sin(), place.cos()), -1).flatten(1))

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        """Take ``(input, 2)`` and return ``(input, token)``."""
        out: torch.Tensor = self.head(self.blocks(self.tokens(pairs) + self.places)[..., -1, :])
        return out


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    with workflow.Run("modular_arithmetic", config, folder) as state:
        paths = Paths(folder)
        state.stage("data", lambda: make_data(config, paths), [paths.data])
        state.stage("train", lambda: train(config, paths, progress), [paths.model])
        state.stage("sample", lambda: sample(config, paths, progress), [paths.store])
        state.stage("map", lambda: make_map(config, paths, progress), [paths.map])
        state.stage("measure", lambda: measure(config, paths, progress), [paths.metrics])
        state.stage("report", lambda: report(config, paths, state), [paths.index])
    return f"Report  {paths.index}\nStore   {paths.store}"


class Paths:
    """Where the study's files are."""

    def __init__(self, folder: Path) -> None:
        self.data, self.model = folder / "data.npz", folder / "model.pt"
        self.store = folder / "store.zarr"
        self.map = self.store / "derived" / "map"
        self.metrics = folder / "metrics.json"
        self.report = folder / "report"
        self.index = self.report / "index.html"


def all_pairs(modulus: int) -> dict[str, np.ndarray]:
    """Return every input of both tasks, additions first: ``a``, ``b``, ``result``, ``task``.

    Raises
    ------
    SettingsError
        The modulus is not a prime, so that some numbers have no inverse.
    """
    if any(modulus % n == 0 for n in range(2, int(modulus**0.5) + 1)):
        raise SettingsError(f"modulus must be a prime, not {modulus}: division needs inverses")
    a, b = (x.ravel() for x in np.meshgrid(np.arange(modulus), np.arange(modulus), indexing="ij"))
    inverse = np.array([pow(int(n), modulus - 2, modulus) for n in range(modulus)])
    return {
        "a": np.concatenate((a, a[b > 0])),
        "b": np.concatenate((b, b[b > 0])),
        "result": np.concatenate(((a + b) % modulus, (a * inverse[b] % modulus)[b > 0])),
        "task": np.repeat([0, 1], [len(a), (b > 0).sum()]),
    }


def make_data(config: Config, paths: Paths) -> None:
    """Split all pairs at random; choose those to observe, additions first."""
    pairs = all_pairs(config.modulus)
    rng = np.random.default_rng(config.seed)
    n = len(pairs["task"])
    trained = np.zeros(n, bool)
    trained[rng.choice(n, round(config.train_share * n), replace=False)] = True
    chosen = []
    for task in (0, 1):
        (of,) = np.nonzero(pairs["task"] == task)
        chosen.append(np.sort(rng.choice(of, min(config.observed, len(of)), replace=False)))
    kept: dict[str, Any] = {"trained": trained, "observed": np.concatenate(chosen), **pairs}
    np.savez(paths.data, **kept)


def data_set(paths: Paths, which: str) -> TensorDataset:
    """Return ``trained``, ``held_out`` or ``observed`` pairs of tokens, and their results."""
    with np.load(paths.data) as data:
        rows = {"trained": data["trained"], "held_out": ~data["trained"]}.get(
            which, data["observed"]
        )
        size = data["a"].max() + 1
        tokens = np.stack((data["a"], data["b"], data["result"]), 1) + size * data["task"][:, None]
    chosen = torch.from_numpy(tokens[rows])
    return TensorDataset(chosen[:, :2].contiguous(), chosen[:, 2].contiguous())


def train(config: Config, paths: Paths, show: bool) -> None:
    """Train until every training pair is right and most others are; let the network settle."""
    data, other = data_set(paths, "trained"), data_set(paths, "held_out")
    model = fit(
        Transformer(config),
        data,
        rate=config.learning_rate,
        weight_decay=config.weight_decay,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        show=show,
        settle=config.settle,
        learned=lambda model: bool(
            accuracy(model, data).all() and accuracy(model, other).mean() >= config.generalize
        ),
    )
    keep_model(model, paths.model)


def sample(config: Config, paths: Paths, show: bool) -> None:
    """Sample the local posterior and observe inputs of both tasks."""
    with np.load(paths.data) as data:
        rows = data["observed"]
        coords = {name: data[name][rows] for name in ("a", "b", "result", "trained")}
        task = np.array(TASKS)[data["task"][rows]]
    coords["task"] = task
    coords["kind"] = np.where((task == "division") & (coords["a"] == 0), "0 / b", task)
    draw_losses(
        config,
        load_model(Transformer(config), paths.model),
        data_set(paths, "trained"),
        data_set(paths, "observed"),
        paths.store,
        seed=config.seed,
        coords=coords,
        show=show,
    )


def losses_of(paths: Paths) -> xr.DataArray:
    """Return the losses of the observed inputs."""
    return lk.open(paths.store)["losses"].to_dataset()["loss"]


def make_map(config: Config, paths: Paths, show: bool) -> None:
    """Find neighbours, and embed them at distance 1 - R."""
    with progress.dask_bar("neighbours", show=show):
        near = lk.neighbors(losses_of(paths), config.neighbors)
        store.put(paths.store, "neighbors", near)
    near = lk.open(paths.store)["derived/neighbors"].to_dataset()
    with progress.busy("map (UMAP)", show=show):
        store.put(paths.store, "map", lk.embed(near, seed=config.seed))


def first_component(losses: xr.DataArray, center: xr.DataArray, *, of: str = "chain") -> np.ndarray:
    """Return the inputs' places on the first principal component of their expected changes.

    An input's expected changes are its mean loss in each chain less its loss at w*. The paper's
    are "normalized", not saying how: of each chain, to mean 0 and deviation 1 over the inputs, or
    of each input (``of="sample"``), to length 1.
    """
    change = (losses.mean("draw", dtype=np.float64) - center).transpose("sample", "chain").values
    if of == "sample":
        length = np.linalg.norm(change, axis=1, keepdims=True)
        change = np.divide(change, length, out=np.zeros_like(change), where=length > 0)
    x = change - change.mean(0)
    if of == "chain":
        x /= x.std(0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return np.asarray(u[:, 0] * s[0])


def folded(flags: np.ndarray, score: np.ndarray) -> float:
    """Return the AUROC of a score whose sign means nothing."""
    value: float = area(flags, score)
    return max(value, 1 - value)


def moments(losses: xr.DataArray, first: int) -> dict[str, dict[str, float]]:
    """Return mean, deviation, skewness and excess kurtosis of K within and between tasks.

    The ``first`` inputs are additions. Pairs of an input with itself are left out.
    """
    K = lk.covariance(losses).data
    n = losses.sizes["sample"]
    own = lk.loss_variance(losses).values.astype(np.float64)
    parts = {
        "addition": (slice(0, first),) * 2,
        "division": (slice(first, n),) * 2,
        "between": (slice(0, first), slice(first, n)),
    }
    import dask

    sums = dask.compute(
        {  # all from the same tiles
            name: [(K[at].astype(np.float64) ** power).sum() for power in (1, 2, 3, 4)]
            for name, at in parts.items()
        }
    )[0]
    found = {}
    for name, (rows, columns) in parts.items():
        count = (rows.stop - rows.start) * (columns.stop - columns.start)
        total = np.array(sums[name], float)
        if rows == columns:
            count -= rows.stop - rows.start
            total -= [(own[rows] ** power).sum() for power in (1, 2, 3, 4)]
        m1, m2, m3, m4 = total / count
        variance = m2 - m1**2
        third = m3 - 3 * m1 * m2 + 2 * m1**3
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        found[name] = {
            "mean": m1,
            "deviation": variance**0.5,
            "skewness": third / variance**1.5,
            "excess_kurtosis": fourth / variance**2 - 3,
        }
    return found


def measure(config: Config, paths: Paths, show: bool) -> None:
    """Compute every number of the report."""
    tree = lk.open(paths.store)
    node = tree["losses"].to_dataset()
    losses, center = node["loss"], node["center_loss"]
    task, kind = node["task"].values, node["kind"].values
    division = task == "division"
    near = tree["derived/neighbors"].to_dataset()["neighbor"].values

    def means(x: xr.DataArray) -> np.ndarray:
        found = lk.group_mean(x, "kind", self_pairs=False)
        return np.asarray(found.sel(kind=_KINDS, kind_2=_KINDS).values)

    def first_axis(of: str, x: xr.DataArray) -> float:
        return folded(division, first_component(x, center, of=of))

    with progress.busy("numbers", show=show):
        mean, error = without_chain(losses, means)
        axes = {of: without_chain(losses, partial(first_axis, of)) for of in ("chain", "sample")}
        leading = lk.svd(losses, 1, over=("chain", "draw"), center="pooled", normalize="cosine")
        u = leading["u"].isel(mode=0).values
        spread = moments(losses, int((~division).sum()))
        bound = 4 * max(one["deviation"] for one in spread.values())
        counts = lk.histogram(losses, "task", bins=161, bounds=(-bound, bound), kernel="covariance")
        store.put(paths.store, "covariances", counts)
        model = load_model(Transformer(config), paths.model)
        right = {
            which: float(accuracy(model, data_set(paths, which)).mean())
            for which in ("trained", "held_out")
        }
        facts = lk.diagnostics(tree)
        metrics = {
            "accuracy": right,
            "pc1_auroc": dict(zip(("value", "error"), axes["chain"], strict=True)),
            "pc1_of_unit_vectors_auroc": dict(zip(("value", "error"), axes["sample"], strict=True)),
            "center_loss_auroc": folded(division, center.values),
            "leading_mode_auroc": folded(division, u),
            "mean_correlation": {
                f"{a}, {b}": {"value": mean[i, j], "error": error[i, j]}
                for i, a in enumerate(_KINDS)
                for j, b in enumerate(_KINDS)
                if i <= j
            },
            "covariance": spread,
            "neighbors_of_same_task": float((task[near] == task[:, None]).mean()),
            "chance_same_task": float(np.mean([(task == name).mean() ** 2 for name in TASKS]) * 2),
            "zero": {
                "inputs": int((kind == "0 / b").sum()),
                "neighbors_that_are": float((kind[near] == "0 / b")[kind == "0 / b"].mean()),
                "chance": float((kind == "0 / b").mean()),
            },
            "agreement_of_halves": halves_agree(losses),
            "verdicts": list(facts.attrs["verdicts"]),
        }
    paths.metrics.write_text(json.dumps(metrics, indent=2, allow_nan=False))


_KINDS = [*TASKS, "0 / b"]


def report(config: Config, paths: Paths, state: workflow.Run) -> None:
    """Write the report folder."""
    m = json.loads(paths.metrics.read_text())
    tree = lk.open(paths.store)
    node = tree["losses"].to_dataset()
    points = tree["derived/map"].to_dataset()["embedding"]
    counts = tree["derived/covariances"].to_dataset().compute()
    places = first_component(node["loss"], node["center_loss"])
    figures = [
        workflow.Figure(
            "map",
            "The map by task",
            "UMAP at distance 1 - R (figure 3A).",
            plots.neighbor_map(points, by="kind"),
        ),
        workflow.Figure(
            "map_b", "The same map by b", "Figure 3C.", plots.neighbor_map(points, by="b")
        ),
        workflow.Figure(
            "axis",
            "One axis tells the tasks apart",
            "First principal component of "
            "the inputs' expected loss changes by chain, each chain scaled to "
            "deviation 1 (figure 3B).",
            draw_axis(places, node["task"].values, m),
        ),
        workflow.Figure(
            "covariances",
            "Covariances within and between the tasks",
            "Every pair of different inputs (figure 3D).",
            draw_covariances(counts),
        ),
    ]
    r, k = m["mean_correlation"], m["covariance"]
    rows = [
        (
            "AUROC of the first component for the task",
            "{value:.3f} +- {error:.3f}".format(**m["pc1_auroc"]),
            "paper: 0.931",
        ),
        (
            "... inputs scaled to length 1 instead of chains to deviation 1",
            "{value:.3f} +- {error:.3f}".format(**m["pc1_of_unit_vectors_auroc"]),
            "the paper does not say which",
        ),
        ("AUROC of the loss at w* alone", f"{m['center_loss_auroc']:.3f}", "not given"),
        ("AUROC of the leading mode of R", f"{m['leading_mode_auroc']:.3f}", ""),
        *(
            (f"Mean R: {pair}", "{value:+.4f} +- {error:.4f}".format(**found), "")
            for pair, found in r.items()
        ),
        *(
            (
                f"K {name}: deviation, skewness, excess kurtosis",
                "{deviation:.2e}, {skewness:.1f}, {excess_kurtosis:.0f}".format(**found),
                "paper: narrow, about normal" if name == "between" else "paper: heavy tails",
            )
            for name, found in k.items()
        ),
        (
            "Nearest inputs of the same task",
            f"{m['neighbors_of_same_task']:.1%}",
            f"chance {m['chance_same_task']:.1%}",
        ),
        (
            "Nearest inputs of 0 / b that are 0 / b too",
            f"{m['zero']['neighbors_that_are']:.1%}",
            f"chance {m['zero']['chance']:.1%}",
        ),
        (
            "Right, of trained and of other inputs",
            "{trained:.1%}, {held_out:.1%}".format(**m["accuracy"]),
            "paper: 100% of trained",
        ),
        ("Agreement of R between halves of the chains", f"{m['agreement_of_halves']:.2f}", ""),
    ]
    workflow.write_report(
        workflow.Report(
            title="Modular arithmetic: two tasks in one network",
            summary=[
                f"Addition and division modulo {config.modulus} with separate vocabularies; "
                f"{node.sizes['sample']:,} inputs, {config.chains} chains of {config.draws} draws. "
                "Errors are one standard error, from leaving out one chain at a time."
            ],
            metrics={**m, "seconds": state.seconds(), "config": config.model_dump(mode="json")},
            rows=rows,
            figures=figures,
            settings=config.model_dump(mode="json"),
            next_steps=f'losses = lk.open("{paths.store}")["losses"]\n'
            'lk.group_mean(losses, "task", self_pairs=False)',
        ),
        paths.report,
    )


def draw_axis(places: np.ndarray, task: np.ndarray, m: dict[str, Any]) -> Figure:
    """Draw how the inputs of each task lie along the component."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(places.min(), places.max(), 81).tolist()
    for name in TASKS:
        axes.hist(places[task == name], edges, label=name, color=_COLOURS[name], alpha=0.65)
    axes.set(
        xlabel="first principal component",
        ylabel="inputs",
        title=f"AUROC {m['pc1_auroc']['value']:.3f}",
    )
    axes.legend(frameon=False)
    return figure


def draw_covariances(counts: xr.Dataset) -> Figure:
    """Draw the distribution of K within each task and between them."""
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    pairs = {"addition": ("addition",) * 2, "division": ("division",) * 2, "between": TASKS}
    width = float(counts["bin_right"][0] - counts["bin_left"][0])
    for name, (first, second) in pairs.items():
        one = counts["count"].sel(task=first, task_2=second).values
        total = one.sum() + sum(
            int(counts[end].sel(task=first, task_2=second)) for end in ("below", "above")
        )
        label = "addition with division" if name == "between" else f"within {name}"
        style = "--" if name == "between" else "-"
        density = np.where(one > 0, one / total / width, np.nan)
        axes.plot(counts["bin"], density, color=_COLOURS[name], ls=style, label=label)
    axes.set(
        yscale="log",
        xlabel="covariance of losses (nat$^2$)",
        ylabel="density",
        title="Entries of the loss kernel",
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure
