"""Pruning: train again on less and less, by what audits and IPS say of the images (PLGK A.4).

A network learns Fashion-MNIST (or MNIST, or SVHN), recorded; the losses of some test images are
audited, and training images are clustered by IPS. Then it learns again, from other initial weights
and in other orders, without a growing share of the images: those of least or most influence, the
most helpful or harmful, the redundant, whole clusters, or as many at random. Every run takes
equally many steps. The images are those of `audit_retraining` with the same seed and numbers, and
so are the choices that both make; ``data`` is therefore needed with ``trained`` too.

Influence is summed over the audited images: magnitudes, or, called net, the magnitude of the sum.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lkarray_workflows.shared import retraining
from lkarray_workflows.shared.common import Numbers
from lkarray_workflows.shared.images import CLASSES, data_set
from lkarray_workflows.shared.pruning_report import FIGURES, NOTHING, compare, draw, judge
from lkarray_workflows.shared.recorded import (
    TEST,
    Trained,
    Training,
    build,
    check,
    discard,
    plan,
    train,
)
from lkarray_workflows.shared.retraining import SETS, order, without, without_of_each
from pydantic import Field, field_validator
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

import lkarray as lk
from lkarray import workflow

#: What is removed, each once; `FIGURES` shares some.
ARMS = tuple(dict.fromkeys(arm for arms in FIGURES.values() for arm in arms))


class Config(Training):
    """Settings; with the defaults of `audit_retraining`, but fewer epochs."""

    presets: ClassVar = {
        "paper": {
            "dataset": "mnist",
            "batches": 200,
            "epochs": 50,
            "learning_rate": 1.5e-5,
            "audited": 256,
            "held_out": TEST - 256,
        },
        "small": {
            "batches": 8,
            "batch_size": 64,
            "epochs": 6,
            "audited": 64,
            "held_out": 1000,
            "shares": (0.2, 0.6),
            "seeds": 2,
            "times": 3,
        },
    }

    seed: int = Field(1, ge=0, description="of the audited run; the others have the seeds after it")
    batches: int = Field(20, ge=1, description="of an epoch")
    epochs: int = Field(15, ge=2)
    learning_rate: float = Field(1e-3, gt=0, description="of Adam")
    audited: int = Field(512, ge=2, description="test images")
    held_out: int = Field(4000, ge=2, description="other test images")
    shares: Numbers = Field((0.1, 0.2, 0.4, 0.6), min_length=1, description="that are removed")
    seeds: int = Field(5, ge=2, description="runs of each arm at each share")
    times: int = Field(6, ge=1, description="epochs whose gradients IPS compares")
    clusters: int = Field(100, ge=1, description="in all, where whole ones go")

    @field_validator("shares")
    @classmethod
    def _between(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < share <= 0.9 for share in shares):
            raise ValueError("shares lie above 0 and up to 0.9")
        return tuple(sorted(set(shares)))


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    check(config, seeds=2)  # the audited images are taken from the files, whoever trained
    with workflow.Run("pruning", config, folder) as state:
        run_: Trained = train(state, config, folder, progress)
        paths = Paths(folder, run_)
        state.stage("tests", lambda: make_tests(config, paths), [paths.tests])
        state.stage("audit", lambda: make_audit(paths, progress), [paths.scores])
        state.stage("clusters", lambda: make_merges(config, paths, progress), [paths.merges])
        for seed in seeds_of(config):
            for arm, share in [(NOTHING, 0.0), *((a, s) for a in ARMS for s in config.shares)]:
                out = paths.arm(arm, share, seed)
                work = partial(again, config, paths, arm, share, seed)
                state.stage(f"{arm}, {share:g}, seed {seed}", work, [out])
        state.stage("report", lambda: report(config, paths, state), [paths.index])
        discard(config, run_)
    return f"Report  {paths.index}\nStore   {paths.store}"


class Paths:
    """Where the study's files are, and the run that it audits."""

    def __init__(self, folder: Path, run: Trained) -> None:
        self.folder, self.report, self.run = folder, folder / "report", run
        self.tests, self.scores, self.merges = (
            folder / f"{name}.npz" for name in ("tests", "scores", "merges")
        )
        self.store, self.factors = folder / "audits.zarr", folder / "factors.zarr"
        self.index = self.report / "index.html"

    def arm(self, arm: str, share: float, seed: int) -> Path:
        """Return the outcome of an arm's run."""
        name = arm.replace(",", "").replace(" ", "_")
        return self.folder / "arms" / f"{name}_{share:g}_{seed}.json"


def seeds_of(config: Config) -> range:
    """Return the seeds of the runs that are compared."""
    return range(config.seed + 1, config.seed + 1 + config.seeds)


def make_tests(config: Config, paths: Paths) -> None:
    """Take the test images to audit, and others, as `audit_retraining` does."""
    taken = retraining.take(
        config,
        config.batches * config.batch_size,
        config.audited,
        config.held_out,
        seed=config.seed,
    )
    found = {name: values for name, values in taken.items() if not name.startswith("train")}
    np.savez(paths.tests, **found)


def make_audit(paths: Paths, show: bool) -> None:
    """Audit; keep what each training image did to the audited losses."""
    audited = data_set(paths.tests, "audited")
    found = retraining.influence(paths.run.trace(), audited, paths.store, show)
    np.savez(paths.scores, **found)


def make_merges(config: Config, paths: Paths, show: bool) -> None:
    """Cluster the images of each class by IPS, and keep the order in which they become one.

    IPS between classes is mostly negative, so that no cluster of use crosses them, and 51,200
    images need no more than one class's kernel at a time.
    """
    trace, labels = paths.run.trace(), paths.run.images("train").tensors[1].numpy()
    factors = lk.gradient_factors(
        trace,
        np.arange(len(labels)),
        paths.run.epochs(config.times),
        store=paths.factors,
        progress=show,
    )
    found = []
    for label in np.unique(labels):
        of = np.flatnonzero(labels == label)
        distance = lk.chord_distance(lk.ips(factors.isel(example=of))).values
        gone, into, height = merges(distance)
        found.append((of[gone], of[into], height))
    gone, into, height = (np.concatenate(parts) for parts in zip(*found, strict=True))
    by = np.argsort(height, kind="stable")  # those of a class stay in their order
    np.savez(paths.merges, gone=gone[by], into=into[by], height=height[by])
    lk.discard_gradients(paths.factors)  # GBs that nothing else reads


def merges(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which image each merge removes, which one then stands for it, and their heights.

    By complete linkage, so that no two images of a cluster are further apart than its height. A
    cluster's representative is that of its two halves which is nearer to all its images.
    """
    n = len(distance)
    tree = linkage(squareform(distance, checks=False), "complete")
    images = [np.array([i]) for i in range(n)]
    stands, gone, into = list(range(n)), [], []
    for left, right in tree[:, :2].astype(int).tolist():
        together = np.concatenate([images[left], images[right]])
        two = [stands[left], stands[right]]
        near = int(distance[np.ix_(two, together)].mean(1).argmin())
        gone.append(two[1 - near])
        into.append(two[near])
        images.append(together)
        stands.append(two[near])
        images[left] = images[right] = np.empty(0, int)  # not n lists of up to n
    return np.array(gone), np.array(into), tree[:, 2]


def stand_for(gone: np.ndarray, into: np.ndarray, count: int, n: int) -> np.ndarray:
    """Return the representative of each image after so many merges, ``(n,)``."""
    found = np.arange(n)
    for at in reversed(range(min(count, len(gone)))):
        found[gone[at]] = found[into[at]]
    return found


def quotas(labels: np.ndarray, count: int) -> np.ndarray:
    """Return how many of each class go: ``count`` in all, by largest remainder."""
    sizes = np.unique_counts(labels).counts
    exact = sizes * (count / len(labels))
    found = np.floor(exact).astype(int)
    short = count - int(found.sum())
    found[np.argsort(found - exact, kind="stable")[:short]] += 1
    return np.asarray(found)


def kept_by(
    arm: str, count: int, known: Mapping[str, np.ndarray], clusters: int, seed: int
) -> np.ndarray:
    """Return the training images that an arm learns from, each as often as it draws it.

    Parameters
    ----------
    arm, count
        What is removed, and how many images.
    known
        ``label``, ``net``, ``gross`` of each image; ``gone``, ``into`` of each merge.
    clusters
        How many there are where whole ones go: in an order drawn with ``seed``, the last in part.
    """
    labels, n = known["label"], len(known["label"])
    gone, into = known["gone"], known["into"]
    if arm.startswith("most redundant"):
        stands = stand_for(gone, into, count, n)
        kept = stands if arm.endswith("up-weighted") else np.unique(stands)
        return np.sort(kept)
    if arm == "whole clusters":
        _, cluster = np.unique(stand_for(gone, into, n - clusters, n), return_inverse=True)
        turn = np.random.default_rng(seed).permutation(cluster.max() + 1)
        return np.asarray(without(np.argsort(turn[cluster], kind="stable"), count))
    plain = arm.replace(" of each class", "")
    removed = order(plain, known["net"], known["gross"], seed)
    if plain != arm:
        return np.asarray(without_of_each(removed, labels, quotas(labels, count).tolist()))
    return np.asarray(without(removed, count))


def again(config: Config, paths: Paths, arm: str, share: float, seed: int) -> None:
    """Train one arm, and measure it."""
    data = paths.run.images("train")
    images, labels = data.tensors
    with np.load(paths.scores) as scores, np.load(paths.merges) as merged:
        known = {"label": labels.numpy(), **scores, **merged}
    kept = kept_by(arm, round(share * len(labels)), known, config.clusters, seed)
    steps = plan(len(kept), config.batch_size, config.batches * config.epochs, seed)
    found = retraining.again(
        build(config.network, images.shape[1:], seed),
        data,
        kept,
        steps,
        config.learning_rate,
        {name: data_set(paths.tests, name) for name in SETS},
    )
    out = paths.arm(arm, share, seed)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found))


def report(config: Config, paths: Paths, state: workflow.Run) -> None:
    """Write the report folder."""

    def read(arm: str, share: float) -> list[dict[str, Any]]:
        return [json.loads(paths.arm(arm, share, s).read_text()) for s in seeds_of(config)]

    whole = read(NOTHING, 0.0)
    found = {arm: {f"{share:g}": read(arm, share) for share in config.shares} for arm in ARMS}
    gaps = compare(found)
    claims = judge(gaps)
    with np.load(paths.scores) as scores:
        correlation = float(scores["lc"])
    rows = (
        [
            (claim, "holds" if one["holds"] else "does NOT hold", one["measured"])
            for claim, one in claims.items()
        ]
        + [
            (
                "Accuracy and loss with all images",
                "{:.2%}, {:.4f} nats".format(
                    *(
                        np.mean([one["held_out"][key] for one in whole])
                        for key in ("accuracy", "loss")
                    )
                ),
                f"{config.seeds} seeds",
            ),
            ("Audit: correlation with the true changes (LC)", f"{correlation:.6f}", ""),
        ]
        + [
            (
                f"{arm}, {float(share):.0%} removed: accuracy minus random's",
                "{mean:+.2f} points [{low:+.2f}, {high:+.2f}], ".format(**one["accuracy"])
                + ("every seed" if one["accuracy"]["every_seed"] else "not every seed"),
                "loss {mean:+.4f} nats [{low:+.4f}, {high:+.4f}]".format(**one["loss"]),
            )
            for arm, shares in gaps.items()
            for share, one in shares.items()
        ]
    )
    captions = {
        "least_important": "Images that should matter least (PLGK figure 21). The most harmful "
        "are in the other figure, as in the paper.",
        "most_important": "Images that should matter most (figure 22).",
    }
    about = (
        " Left: mean accuracy on test images that the audit never saw; bars reach over the seeds. "
        "Right: the same minus that of random removal, seed by seed."
    )
    workflow.write_report(
        workflow.Report(
            title="Training again on less and less",
            summary=[
                f"{config.batches * config.batch_size:,} training images of "
                f"{CLASSES[config.dataset][0]}, {config.batches * config.epochs:,} steps in every "
                f"run, {config.seeds} seeds; {config.held_out:,} test images that the audit never "
                "saw. Differences are paired by seed: mean and 95% interval (t) over seeds. A "
                "method is above or below random if its difference, averaged over the shares, has "
                "that sign for every seed. The paper's claims are of MNIST."
            ],
            metrics={
                "nothing": whole,
                "arms": found,
                "minus_random": gaps,
                "claims": claims,
                "lc": correlation,
                "seconds": state.seconds(),
                "config": config.model_dump(mode="json"),
            },
            rows=rows,
            figures=[
                workflow.Figure(
                    name,
                    f"Removing the {name.replace('_', ' ')}",
                    captions[name] + about,
                    draw(found, whole, arms),
                )
                for name, arms in FIGURES.items()
            ],
            settings=config.model_dump(mode="json"),
            next_steps=f'audit = lk.open("{paths.store}")["audit"].to_dataset()\n'
            "lk.most_influential(audit, 10)",
        ),
        paths.report,
    )
