"""Pruning: train again on less and less, by what audits and IPS say of the images.

See Anonymous 2026, A.4.

A network learns MNIST (or Fashion-MNIST, or SVHN), recorded; the losses of some test images are
audited, and training images are clustered by IPS. Then it learns again, from other initial weights
and in other orders, without a growing share of the images: those of least or most influence, the
most helpful or harmful, the redundant, whole clusters, or as many at random. Every run takes
equally many steps. The images are those of `audit_retraining` with the same seed and numbers, and
so are the choices that both make; ``data`` is therefore needed with ``trained`` too.

Influence is summed over the audited images: magnitudes, or, called net, the magnitude of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

import lkarray as lk
from lkarray import workflow
from lkarray_workflows.shared import retraining
from lkarray_workflows.shared.common import Numbers
from lkarray_workflows.shared.images import CLASSES, data_set
from lkarray_workflows.shared.pruning_report import (
    FIGURES,
    NOTHING,
    compare,
    figures_of,
    judge,
    rows_of,
)
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

#: What is removed, each once; `FIGURES` shares some.
ARMS = tuple(dict.fromkeys(arm for arms in FIGURES.values() for arm in arms))


class Config(Training):
    """Settings; with the defaults of `audit_retraining`, but fewer epochs."""

    presets: ClassVar = {
        "paper": {
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


Study = workflow.Study[Config]


def run(config: Config, folder: Path, *, progress: bool = True) -> str:
    """Run the study in ``folder``, or continue it; return what to tell the user."""
    check(config, seeds=2)  # the audited images are taken from the files, whoever trained
    with workflow.Study("pruning", config, folder, progress) as study:
        recorded = train(study)
        study.stage("tests", make_tests, "tests.npz")
        study.stage("audit", make_audit, "scores.npz", recorded)
        study.stage("clusters", make_merges, "merges.npz", recorded)
        for seed in seeds_of(config):
            for arm, share in [(NOTHING, 0.0), *((a, s) for a in ARMS for s in config.shares)]:
                out = file_of(arm, share, seed)
                study.stage(
                    f"{arm}, {share:g}, seed {seed}", again, out, recorded, arm, share, seed
                )
        study.stage("report", report, "report/index.html")
        discard(config, recorded)
    return f"Report  {study.index}\nStore   {study.path('audits.zarr')}"


def file_of(arm: str, share: float, seed: int) -> str:
    """Return the name of the file with the outcome of an arm's run."""
    return f"arms/{arm.replace(',', '').replace(' ', '_')}_{share:g}_{seed}.json"


def seeds_of(config: Config) -> range:
    """Return the seeds of the runs that are compared."""
    return range(config.seed + 1, config.seed + 1 + config.seeds)


def make_tests(study: Study) -> None:
    """Take the test images to audit, and others, as `audit_retraining` does."""
    config = study.config
    taken = retraining.take(
        config,
        config.batches * config.batch_size,
        config.audited,
        config.held_out,
        seed=config.seed,
    )
    tests = {name: values for name, values in taken.items() if not name.startswith("train")}
    study.save("tests.npz", **tests)


def make_audit(study: Study, run: Trained) -> None:
    """Audit; keep what each training image did to the audited losses."""
    audited = data_set(study.path("tests.npz"), "audited")
    scores = retraining.influence(run.trace(), audited, study.path("audits.zarr"), study.show)
    study.save("scores.npz", **scores)


def make_merges(study: Study, run: Trained) -> None:
    """Cluster the images of each class by IPS, and keep the order in which they become one.

    IPS between classes is mostly negative, so that no cluster of use crosses them, and 51,200
    images need no more than one class's kernel at a time.
    """
    trace, labels = run.trace(), run.images("train").tensors[1].numpy()
    factors = lk.gradient_factors(
        trace,
        np.arange(len(labels)),
        run.epochs(study.config.times),
        store=study.path("factors.zarr"),
        progress=study.show,
    )
    by_class = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        distance = lk.chord_distance(lk.ips(factors.isel(example=own))).values
        gone, into, height = merges(distance)
        by_class.append((own[gone], own[into], height))
    gone, into, height = (np.concatenate(side) for side in zip(*by_class, strict=True))
    rising = np.argsort(height, kind="stable")  # those of a class stay in their order
    study.save("merges.npz", gone=gone[rising], into=into[rising], height=height[rising])
    lk.discard_gradients(study.path("factors.zarr"))  # GBs that nothing else reads


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
    stands = np.arange(n)
    for merge in reversed(range(min(count, len(gone)))):
        stands[gone[merge]] = stands[into[merge]]
    return stands


def quotas(labels: np.ndarray, count: int) -> np.ndarray:
    """Return how many of each class go: ``count`` in all, by largest remainder."""
    sizes = np.unique_counts(labels).counts
    exact = sizes * (count / len(labels))
    quota = np.floor(exact).astype(int)
    short = count - int(quota.sum())
    quota[np.argsort(quota - exact, kind="stable")[:short]] += 1
    return np.asarray(quota)


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


def again(study: Study, run: Trained, arm: str, share: float, seed: int) -> None:
    """Train one arm, and measure it."""
    config = study.config
    data = run.images("train")
    images, labels = data.tensors
    known = {"label": labels.numpy(), **study.load("scores.npz"), **study.load("merges.npz")}
    kept = kept_by(arm, round(share * len(labels)), known, config.clusters, seed)
    steps = plan(len(kept), config.batch_size, config.batches * config.epochs, seed)
    outcome = retraining.again(
        build(config.network, images.shape[1:], seed),
        data,
        kept,
        steps,
        config.learning_rate,
        {name: data_set(study.path("tests.npz"), name) for name in SETS},
    )
    study.write(file_of(arm, share, seed), outcome)


def report(study: Study) -> None:
    """Write the report folder."""
    config = study.config

    def read(arm: str, share: float) -> list[dict[str, Any]]:
        return [study.read(file_of(arm, share, seed)) for seed in seeds_of(config)]

    whole = read(NOTHING, 0.0)
    outcomes = {arm: {f"{share:g}": read(arm, share) for share in config.shares} for arm in ARMS}
    gaps = compare(outcomes)
    claims = judge(gaps)
    correlation = float(study.load("scores.npz")["lc"])
    study.report(
        title="Training again on less and less",
        summary=f"{config.batches * config.batch_size:,} training images of "
        f"{CLASSES[config.dataset][0]}, {config.batches * config.epochs:,} steps in every "
        f"run, {config.seeds} seeds; {config.held_out:,} test images that the audit never "
        "saw. Differences are paired by seed: mean and 95% interval (t) over seeds. A "
        "method is above or below random if its difference, averaged over the shares, has "
        "that sign for every seed. The paper's claims are of MNIST.",
        metrics={
            "nothing": whole,
            "arms": outcomes,
            "minus_random": gaps,
            "claims": claims,
            "lc": correlation,
        },
        rows=rows_of(whole, gaps, claims, correlation),
        figures=figures_of(outcomes, whole),
        next_steps=f'audit = lk.open("{study.path("audits.zarr")}")["audit"].to_dataset()\n'
        "lk.most_influential(audit, 10)",
    )
