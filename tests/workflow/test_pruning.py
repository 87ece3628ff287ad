"""The pruning study: its choices against brute force, and whole at tiny size on made images."""

import json
from itertools import combinations

import numpy as np
import pytest

import lkarray as lk
from lkarray import workflow
from lkarray_workflows.shared import pruning_report, retraining
from lkarray_workflows.studies import audit_retraining, pruning
from tests.helpers.studies import check_report

N, CLASSES = 60, 4


@pytest.fixture
def known():
    """Images of four classes of unlike sizes, with made influence and distances."""
    rng = np.random.default_rng(0)
    label = np.sort(rng.choice(CLASSES, N, p=[0.4, 0.3, 0.2, 0.1]))
    net = rng.standard_normal(N)
    points = rng.standard_normal((N, 3))
    distance = np.linalg.norm(points[:, None] - points, axis=2)
    gone, into, height = pruning.merges(distance)
    return {
        "label": label,
        "net": net,
        "gross": abs(net) + rng.random(N),
        "gone": gone,
        "into": into,
        "height": height,
        "distance": distance,
    }


def removed(arm, count, known, seed=1):
    kept = pruning.kept_by(arm, count, known, 12, seed)
    assert (np.diff(kept) > 0).all()
    return set(range(N)) - set(kept.tolist())


@pytest.mark.parametrize(
    ("arm", "score"),
    [
        ("least influential", lambda net, gross: gross),
        ("least influential, net", lambda net, gross: abs(net)),
        ("most influential", lambda net, gross: -gross),
        ("most influential, net", lambda net, gross: -abs(net)),
        ("most helpful", lambda net, gross: net),
        ("most harmful", lambda net, gross: -net),
    ],
)
def test_kept_by__goes_by_influence(known, arm, score):
    values = score(known["net"], known["gross"])
    expected = set(sorted(range(N), key=lambda i: values[i])[:17])
    assert removed(arm, 17, known) == expected
    assert removed(arm, 0, known) == set()
    if arm.startswith("least"):
        each = removed(arm.replace("influential", "influential of each class"), 17, known)
        for label, quota in enumerate(pruning.quotas(known["label"], 17)):
            of = np.flatnonzero(known["label"] == label).tolist()
            assert each & set(of) == set(sorted(of, key=lambda i: values[i])[:quota])


def test_kept_by__random_depends_on_the_seed_and_grows_with_the_share(known):
    for arm in ("random", "random of each class", "whole clusters"):
        less, more, other = (
            removed(arm, count, known, seed) for count, seed in ((17, 1), (30, 1), (17, 2))
        )
        assert (len(less), len(more)) == (17, 30)
        assert less != other
        assert arm == "random of each class" or less < more


@pytest.mark.parametrize("count", [0, 1, 17, 36, 59])
def test_quotas__add_up_and_keep_the_shares_of_classes(known, count):
    quotas = pruning.quotas(known["label"], count)
    assert quotas.sum() == count
    exact = np.bincount(known["label"]) * count / N
    assert (abs(quotas - exact) < 1).all()


def complete_linkage(distance, count):
    """Return clusters after so many merges, by trying all pairs each time."""
    clusters = [{i} for i in range(len(distance))]
    for _ in range(count):
        a, b = min(
            combinations(clusters, 2), key=lambda two: distance[np.ix_(*map(list, two))].max()
        )
        clusters = [c for c in clusters if c not in (a, b)] + [a | b]
    return clusters


@pytest.mark.parametrize("count", [0, 1, 20, 45, 59])
def test_redundancy__one_of_each_cluster_stays_and_stands_for_it(known, count):
    clusters = complete_linkage(known["distance"], count)
    stands = pruning.stand_for(known["gone"], known["into"], count, N)
    assert {frozenset(np.flatnonzero(stands == i).tolist()) for i in set(stands.tolist())} == set(
        map(frozenset, clusters)
    )
    assert all(stands[i] == i for i in stands)
    kept = pruning.kept_by("most redundant", count, known, 12, 1)
    assert len(kept) == N - count
    assert all(len(cluster & set(kept.tolist())) == 1 for cluster in clusters)
    drawn = pruning.kept_by("most redundant, up-weighted", count, known, 12, 1)
    assert len(drawn) == N
    times = dict(zip(*np.unique(drawn, return_counts=True), strict=True))
    assert times == {stands[min(cluster)]: len(cluster) for cluster in clusters}
    if count:
        widest = max(known["distance"][np.ix_(list(c), list(c))].max() for c in clusters)
        assert known["height"][count - 1] == pytest.approx(widest)


def test_redundancy__copies_go_first():
    rng = np.random.default_rng(1)
    points = rng.standard_normal((10, 3)).repeat([4, 3, 1, 1, 1, 1, 1, 1, 1, 1], axis=0)
    points += 1e-6 * rng.standard_normal(points.shape)
    gone, _, height = pruning.merges(np.linalg.norm(points[:, None] - points, axis=2))
    assert set(gone[:5].tolist()) < set(range(7))
    assert len({0, 1, 2, 3} - set(gone[:5].tolist())) == 1
    assert height[4] < 1e-4 < height[5]


def test_kept_by__clusters_go_whole_but_for_one(known):
    clusters = complete_linkage(known["distance"], N - 12)
    gone = removed("whole clusters", 25, known)
    assert sum(0 < len(cluster & gone) < len(cluster) for cluster in clusters) <= 1
    assert len(gone) == 25


def outcomes(points):
    """Return made outcomes: each arm's accuracy above 0.5, at two shares, for three seeds."""
    return {
        arm: {
            share: [
                {"held_out": {"accuracy": 0.5 + (gain + 0.1 * seed) / 100, "loss": 1 - gain}}
                for seed in range(3)
            ]
            for share, gain in zip(("0.2", "0.6"), points.get(arm, (1, 1)), strict=True)
        }
        for arm in pruning.ARMS
    }


def test_compare__is_paired_by_seed():
    gaps = pruning_report.compare(outcomes({"random": (0, 0), "most harmful": (-2, -4)}))
    gap = gaps["most harmful"]["0.6"]
    assert gap["accuracy"]["by_seed"] == pytest.approx([-4] * 3)
    assert gap["accuracy"]["low"] == pytest.approx(-4)  # what seeds share falls out
    assert gap["loss"]["mean"] == pytest.approx(4)
    assert gap["accuracy"]["every_seed"]
    assert "random" not in gaps


def test_compare__interval_is_students():
    made = outcomes({"random": (0, 0)})
    for seed, extra in enumerate((0.0, 0.01, 0.02)):
        made["most helpful"]["0.2"][seed]["held_out"]["accuracy"] += extra
    gap = pruning_report.compare(made)["most helpful"]["0.2"]["accuracy"]
    assert gap["mean"] == pytest.approx(2)
    assert gap["high"] - gap["mean"] == pytest.approx(4.302653 / 3**0.5, rel=1e-5)


def test_judge__tells_the_papers_findings_from_their_opposite():
    paper = {
        "random": (0, 0),
        "least influential": (1, 2),
        "least influential of each class": (2, 5),
        "least influential, net": (1, 2),
        "least influential of each class, net": (2, 4),
        "most redundant": (-1, -1),
        "most redundant, up-weighted": (0.5, 0.5),
        "most influential": (-0.5, -0.5),
        "most influential, net": (-2, -2),
        "most helpful": (-5, -9),
        "most harmful": (-6, -8),
        "whole clusters": (-3, -3),
    }
    judged = pruning_report.judge(pruning_report.compare(outcomes(paper)))
    assert [claim for claim, verdict in judged.items() if not verdict["holds"]] == []
    turned = {arm: (-a, -b) for arm, (a, b) in paper.items()}
    judged = pruning_report.judge(pruning_report.compare(outcomes(turned)))
    assert [claim for claim, verdict in judged.items() if verdict["holds"]] == []
    said = next(iter(judged.values()))["measured"]
    assert said.startswith("1 of 6 methods; not: most redundant, up-weighted (-0.50), least")


TINY = [
    *("batches=4", "batch_size=64", "epochs=2", "audited=24", "held_out=60", "shares=0.25,0.5"),
    *("times=2", "clusters=20"),
]


@pytest.mark.slow
def test_pruning__runs_whole_and_goes_on_to_the_same_numbers(
    tmp_path,
    garments,
    monkeypatch,
    caplog,
):
    config = pruning.Config.build("small", [*TINY, f"data={garments}"])
    pruning.run(config, tmp_path / "whole", progress=False)
    metrics = check_report(tmp_path / "whole", pruning.FIGURES)
    assert set(metrics["arms"]) == set(pruning.ARMS)
    for shares in metrics["arms"].values():
        for share, runs in shares.items():
            for outcome in runs:
                assert outcome["images"] == round(256 * (1 - float(share)))
                assert outcome["steps"] == 8
    assert [(outcome["images"], outcome["steps"]) for outcome in metrics["nothing"]] == [
        (256, 8)
    ] * 2
    assert len(metrics["claims"]) == 8
    assert lk.verify(tmp_path / "whole/audits.zarr") == []
    kept = [path for path in (tmp_path / "whole/train.zarr").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < 2**16  # the run was discarded
    assert not (tmp_path / "whole/factors.zarr").exists()

    trained, calls = retraining.again, []

    def fail(*args):
        calls.append(args)
        if len(calls) > 30:
            raise RuntimeError("cut off")
        return trained(*args)

    with monkeypatch.context() as broken:
        broken.setattr(retraining, "again", fail)
        with pytest.raises(RuntimeError, match="cut off"):
            pruning.run(config, tmp_path / "run", progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/arms").iterdir()}
    assert len(before) == 30
    caplog.set_level("INFO")
    pruning.run(config, tmp_path / "run", progress=False)
    assert "pruning: most harmful, 0.5, seed 2 is done, reused" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = json.loads((tmp_path / "run/report/metrics.json").read_text())
    for name in ("nothing", "arms", "minus_random", "claims", "lc"):
        assert again[name] == metrics[name]
    caplog.clear()
    pruning.run(config, tmp_path / "run", progress=False)
    assert "pruning: report is done, reused" in caplog.text


@pytest.mark.slow
def test_pruning__chooses_as_audit_retraining_does(tmp_path, garments, monkeypatch):
    def stop(*args):
        raise RuntimeError("enough")

    config = pruning.Config.build("small", [*TINY, f"data={garments}"])
    monkeypatch.setattr(pruning, "make_merges", stop)
    with pytest.raises(RuntimeError, match="enough"):
        pruning.run(config, tmp_path / "pruning", progress=False)
    other = audit_retraining.Config.build(
        "small",
        ["batches=4", "epochs=2", "audited=24", "held_out=60", "share=0.25", f"data={garments}"],
    )
    study = workflow.Study("audit_retraining", other, tmp_path / "other", show=False)
    audit_retraining.make_data(study)
    audit_retraining.make_audit(study)
    with (
        np.load(tmp_path / "pruning/tests.npz") as tests,
        np.load(study.path("data.npz")) as data,
        np.load(tmp_path / "pruning/data.npz") as trained,
    ):
        for name in tests:
            np.testing.assert_array_equal(tests[name], data[name])
        np.testing.assert_array_equal(trained["train_images"], data["train_images"])
        labels = data["train_labels"]
    with np.load(tmp_path / "pruning/scores.npz") as scores:
        known = {**scores, "label": labels, "gone": None, "into": None}
    for arm in ("random", "most helpful", "least influential", "most harmful"):
        np.testing.assert_array_equal(
            pruning.kept_by(arm, 64, known, 20, 2), audit_retraining.kept_by(study, arm, 2)
        )


def test_config__shares_are_checked_and_in_order():
    assert pruning.Config.build("small", ["shares=0.6,0.2"]).shares == (0.2, 0.6)
    with pytest.raises(ValueError, match="shares lie above 0"):
        pruning.Config.build("small", ["shares=0.2,1"])


def test_make_merges__goes_on_from_a_cut_off_cleanup(tmp_path, monkeypatch):
    """Killed while the factors were being deleted: what is left of them is not taken for whole."""
    from types import SimpleNamespace

    import torch
    from torch import nn
    from torch.utils.data import TensorDataset
    from zarr.storage import LocalStore

    import lkarray as lk

    torch.manual_seed(0)
    data = TensorDataset(torch.rand(40, 6), torch.arange(40) % 2)
    trace = lk.snapshot(nn.Linear(6, 2), data, store=tmp_path / "t")
    run = SimpleNamespace(trace=lambda: trace, images=lambda part: data, epochs=lambda count: [0])
    config = pruning.Config.build("small", ["times=1"])
    study = workflow.Study("pruning", config, tmp_path, show=False)
    pruning.make_merges(study, run)
    whole = study.load("merges.npz")
    study.path("merges.npz").unlink()

    plain = LocalStore.delete_dir

    def killed(store, prefix):
        chunks = [p for p in (store.root / "gradients_factors").rglob("c/*/*") if p.is_file()]
        if not chunks:  # a group being begun
            return plain(store, prefix)
        chunks[0].unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(LocalStore, "delete_dir", killed)
        with pytest.raises(KeyboardInterrupt):
            pruning.make_merges(study, run)
    pruning.make_merges(study, run)
    for name, values in study.load("merges.npz").items():
        np.testing.assert_array_equal(values, whole[name])
