"""The loss kernel of single tokens in context, of a small GPT that learned WordNet's definitions.

Every loss of a next token is a sample. Tokens whose losses vary together are found for each, and
what they share is counted against chance: the next token itself, which is the obvious confound
(noise in the output layer alone makes one token's losses vary together), and, among pairs of
different next tokens, what is left: the kind of word, the previous token, the window of text.
"""

from __future__ import annotations

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
from lkarray_workflows.shared.common import (
    Block,
    Sampling,
    draw_losses,
    halves_agree,
    keep_model,
    load_model,
)
from lkarray_workflows.shared.estimates import curves, pairs_of
from lkarray_workflows.shared.language_report import SHARED, draw_lifts
from lkarray_workflows.shared.tokens import END, UNKNOWN, kind_of, split_text

#: Tokens by which estimates are compared.
TOKENS = 1000
#: Which pairs the search leaves out.
SEARCHES = {"all": None, "other next token": "next"}


class Config(Sampling):
    """Settings; tuned on seed 0, reported on seed 1."""

    presets: ClassVar = {
        "paper": {"chains": 8, "draws": 1000},
        "small": {
            "definitions": 4000,
            "vocabulary": 800,
            "width": 32,
            "epochs": 6,
            "windows": 60,
            "chains": 3,
            "draws": 60,
            "burn_in": 60,
            "thin": 2,
        },
    }

    seed: int = Field(1, ge=0, description="of the texts, the training, the sampling")
    definitions: int = Field(40_000, ge=200, description="of WordNet, at random")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of the definitions")
    vocabulary: int = Field(3000, ge=20, description="most frequent tokens")
    window: int = Field(32, ge=4, description="tokens of context")
    windows: int = Field(300, ge=4, description="held-out windows observed")
    width: int = Field(96, ge=8, multiple_of=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    epochs: int = Field(12, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    batch_size: int = Field(64, ge=1, description="of the training")
    neighbors: int = Field(30, ge=1)
    nbeta: float = Field(300.0, ge=0)
    gamma: float = Field(30_000.0, gt=0)
    step_size: float = Field(1e-5, gt=0)
    sampler_batch: int = Field(64, ge=1)
    chains: int = Field(4, ge=2)
    draws: int = Field(200, ge=2)
    burn_in: int = Field(300, ge=0)
    thin: int = Field(4, ge=1)


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    sources.open_wordnet()  # missing, it is told before a folder is made
    with workflow.Study("language", config, folder, progress) as study:
        study.stage("data", make_data, "data.npz")
        study.stage("train", train, "model.pt")
        study.stage("sample", sample, "store.zarr")
        study.stage("map", relate, "store.zarr/derived/map")
        study.stage("measure", measure, "metrics.json")
        study.stage("report", report, "report/index.html")
    return f"Report  {study.index}\nStore   {study.path('store.zarr')}"


class GPT(nn.Module):
    """A causal transformer with learned places."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.tokens = nn.Embedding(vocabulary, config.width)
        self.places = nn.Parameter(0.02 * torch.randn(config.window, config.width))
        self.blocks = nn.Sequential(
            *(Block(config.width, config.heads) for _ in range(config.layers))
        )
        self.head = nn.Linear(config.width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Take ``(window, place)`` and return ``(window, place, token)``."""
        return self.head(self.blocks(self.tokens(ids) + self.places))


def make_data(study: Study) -> None:
    """Split WordNet's definitions, count tokens, and pack both splits into windows.

    Raises
    ------
    LookupError
        WordNet is not installed; the message says how to get it.
    """
    config = study.config
    wordnet = sources.open_wordnet()
    rng = np.random.default_rng(config.seed)
    texts = sorted({sense.definition() for sense in wordnet.all_synsets()})
    chosen = rng.permutation(len(texts))[: config.definitions]
    cut = round(config.held_out * len(chosen))
    splits = {"observed": chosen[:cut], "train": chosen[cut:]}
    tokens = {
        split: [t for i in places for t in (*split_text(texts[i]), END)]
        for split, places in splits.items()
    }
    names, counts = np.unique(tokens["train"], return_counts=True)
    frequent = names[np.lexsort((names, -counts))][: config.vocabulary - 1]
    words = [UNKNOWN, *frequent.tolist()]
    number = {word: i for i, word in enumerate(words)}
    packed: dict[str, Any] = {}
    for split, own in tokens.items():
        ids = np.array([number.get(token, 0) for token in own])
        packed[split] = ids[: len(ids) // config.window * config.window].reshape(-1, config.window)
    some = rng.permutation(len(packed["observed"]))[: config.windows]
    packed["observed"] = packed["observed"][np.sort(some)]
    kinds = [kind_of(word, wordnet) for word in words]
    study.save("data.npz", words=np.array(words), kinds=np.array(kinds), **packed)


def data_set(study: Study, split: str) -> TensorDataset:
    """Return the windows of a split, ``(window, place)``."""
    with np.load(study.path("data.npz")) as data:
        return TensorDataset(torch.from_numpy(data[split]))


def words_of(study: Study) -> tuple[np.ndarray, np.ndarray]:
    """Return the vocabulary and the kind of each token."""
    with np.load(study.path("data.npz")) as data:
        return data["words"], data["kinds"]


def network(study: Study) -> nn.Module:
    """Return the untrained network."""
    return GPT(study.config, len(words_of(study)[0]))


def train(study: Study) -> None:
    """Train with Adam, the learning rate falling to zero."""
    config = study.config
    (windows,) = data_set(study, "train").tensors
    model = network(study)
    steps = config.epochs * -(-len(windows) // config.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=steps
    )
    shuffle = torch.Generator().manual_seed(config.seed)
    with progress.bar("training", total=steps, show=study.show) as bar:
        for _ in range(config.epochs):
            for batch in torch.randperm(len(windows), generator=shuffle).split(config.batch_size):
                optimizer.zero_grad()
                token_losses(model, windows[batch]).mean().backward()
                optimizer.step()
                schedule.step()
                bar.update()
    keep_model(model, study.path("model.pt"))


def token_losses(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Return the loss of each next token, ``(window, place - 1)``."""
    scores = model(windows)[:, :-1]
    return F.cross_entropy(scores.movedim(-1, 1), windows[:, 1:], reduction="none")


def sample(study: Study) -> None:
    """Sample around the network; observe every next token of the held-out windows."""
    observed = data_set(study, "observed")
    draw_losses(
        study.config,
        load_model(network(study), study.path("model.pt")),
        data_set(study, "train"),
        observed,
        study.path("store.zarr"),
        batch_size=study.config.sampler_batch,
        seed=study.config.seed,
        show=study.show,
        coords={},
        loss="next_token",
        outcomes=("loss", "log_odds"),
    )


def losses_of(study: Study) -> xr.DataArray:
    """Return the losses ``(chain, draw, position)`` of known next tokens, with what they are."""
    return outcomes_of(study)["loss"]


def outcomes_of(study: Study) -> xr.Dataset:
    """Return losses and log-odds ``(chain, draw, position)`` of known next tokens."""
    words, kinds = words_of(study)
    (windows,) = data_set(study, "observed").tensors
    ids = windows.numpy()
    losses = lk.open(study.path("store.zarr"))["losses"].to_dataset()[["loss", "log_odds"]]
    flat = losses.stack(position=("sample", "token")).reset_index("position")
    after, before = ids[:, 1:].ravel(), ids[:, :-1].ravel()
    flat = flat.assign_coords(
        {
            "next": ("position", words[after]),
            "kind": ("position", kinds[after]),
            "previous": ("position", words[before]),
            "previous_kind": ("position", kinds[before]),
        }
    )
    return flat.isel(position=np.flatnonzero(after))


def name_of(search: str) -> str:
    """Return what the store calls the neighbours of a search."""
    return "neighbors_" + search.replace(" ", "_")


def relate(study: Study) -> None:
    """Find neighbours by each search; embed those of other next tokens."""
    losses = losses_of(study)
    with progress.dask_bar("neighbours", show=study.show):
        for search, exclude in SEARCHES.items():
            near = lk.neighbors(losses, study.config.neighbors, exclude=exclude)
            store.put(study.path("store.zarr"), name_of(search), near)
    near = neighbors_of(study, "other next token")
    with progress.busy("map (UMAP)", show=study.show):
        store.put(study.path("store.zarr"), "map", lk.embed(near, seed=study.config.seed))


def neighbors_of(study: Study, search: str) -> xr.Dataset:
    """Return stored neighbours, in memory."""
    return lk.open(study.path("store.zarr"))[f"derived/{name_of(search)}"].to_dataset().load()


def worth_of_draws(study: Study) -> dict[str, list[dict[str, float]]]:
    """Return how estimates from one half of the chains agree with R of the other, by draws.

    Of some tokens; the noise of the other half is divided out.
    """
    outcomes, rng = outcomes_of(study), np.random.default_rng(study.config.seed)
    some = rng.choice(outcomes.sizes["position"], min(TOKENS, outcomes.sizes["position"]), False)
    outcomes = outcomes.isel(position=np.sort(some)).load()
    half = outcomes.sizes["chain"] // 2
    tried, kept = outcomes.isel(chain=slice(half)), outcomes.isel(chain=slice(half, None))
    truth = pairs_of(lk.correlation(kept["loss"]).values)
    ceiling = float(lk.reliability(kept["loss"])) ** 0.5
    return dict(curves(tried, truth, ceiling))


def measure(study: Study) -> None:
    """Compute every number of the report."""
    losses = losses_of(study)
    lifts: dict[str, dict[str, Any]] = {}
    for search in SEARCHES:
        near = neighbors_of(study, search)
        lifts[search] = {}
        for attribute in SHARED:
            if attribute == SEARCHES[search]:
                continue
            lift = lk.attribute_lift(near, near[attribute].values, seed=study.config.seed)
            named = {"lift": "pooled_lift", "low": "pooled_low", "high": "pooled_high"}
            lifts[search][attribute] = {key: float(lift[name]) for key, name in named.items()}
    model = load_model(network(study), study.path("model.pt"))
    with torch.no_grad():
        held_out = {
            split: float(token_losses(model, data_set(study, split).tensors[0][:1000]).mean())
            for split in ("train", "observed")
        }
    ids = data_set(study, "train").tensors[0].ravel()
    share = np.bincount(ids.numpy(), minlength=len(words_of(study)[0])) / len(ids)
    entropy = float(-(share[share > 0] * np.log(share[share > 0])).sum())
    tree = lk.open(study.path("store.zarr"))
    metrics = {
        "tokens": losses.sizes["position"],
        "loss": {**held_out, "of token frequencies": entropy},
        "lifts": lifts,
        "mean_gain": float(lk.loss_gain(tree).mean()),
        "agreement_of_halves": halves_agree(losses),
        "worth_of_draws": worth_of_draws(study),
    }
    study.write("metrics.json", metrics)


def in_context(study: Study, place: tuple[int, int], before: int = 7) -> str:
    """Return a next token in brackets, after the words before it."""
    (sample, token), (vocabulary, _) = place, words_of(study)
    window = vocabulary[data_set(study, "observed").tensors[0][sample].numpy()]
    seen = window[max(0, token + 1 - before) : token + 1]
    return " ".join(seen) + f" [{window[token + 1]}]"


def rows_of(study: Study, m: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the table at the top of the report; some tokens with their nearest end it."""
    rows = [
        (
            "Loss of a next token: training, held out, of the tokens' frequencies (nats)",
            f"{m['loss']['train']:.2f}, {m['loss']['observed']:.2f}, "
            f"{m['loss']['of token frequencies']:.2f}",
            "",
        ),
    ]
    for search, lifts in m["lifts"].items():
        rows += [
            (
                f"Neighbours ({search}) share the {SHARED[name]}",
                "{lift:.2f} ({low:.2f} to {high:.2f}) times as often as chance".format(**lift),
                "",
            )
            for name, lift in lifts.items()
        ]
    rows.append(
        ("Agreement of R between halves of the chains", f"{m['agreement_of_halves']:.2f}", "")
    )
    for name, points in m["worth_of_draws"].items():
        told = ", ".join(f"{p['agreement']:.2f} by {p['draws']} draws" for p in points)
        rows.append((f"Agreement of R from few draws with the other half's: {name}", told, ""))
    near = neighbors_of(study, "other next token")
    chosen = np.random.default_rng(study.config.seed).choice(m["tokens"], 12, replace=False)
    places = list(zip(near["sample"].values.tolist(), near["token"].values.tolist(), strict=True))
    for position in np.sort(chosen):
        nearest = near["neighbor"].values[position, :3].astype(int)
        told = "; ".join(in_context(study, places[other], before=4) for other in nearest)
        rows.append(
            (in_context(study, places[position]), told, "nearest three of other next tokens")
        )
    return rows


def report(study: Study) -> None:
    """Write the report folder."""
    config, path = study.config, study.path("store.zarr")
    m = study.read("metrics.json")
    points = lk.open(path)["derived/map"].to_dataset()["embedding"].load()
    figures = [
        workflow.Figure(
            "lifts",
            "What tokens that vary together share",
            "Times as often as chance, with 95% intervals; the same next token is the confound.",
            draw_lifts(m["lifts"]),
        ),
        workflow.Figure(
            "map",
            "Tokens in context by their losses",
            "UMAP at distance 1 - R, edges of one next token removed.",
            plots.neighbor_map(points, by="kind"),
        ),
    ]
    study.report(
        title="The loss kernel of tokens in context",
        summary=[
            f"A causal transformer of {config.layers} layers, trained on "
            f"{config.definitions:,} definitions of WordNet; {m['tokens']:,} next tokens of "
            f"held-out ones observed, {config.chains} chains of {config.draws} draws. The "
            "papers have no such study."
        ],
        metrics=m,
        rows=rows_of(study, m),
        figures=figures,
        next_steps=f'losses = lk.open("{path}")["losses"].to_dataset()["loss"]\n'
        'losses.stack(position=("sample", "token"))',
    )
