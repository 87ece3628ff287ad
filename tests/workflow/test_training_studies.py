"""The studies of LeNet-5's training, run whole at small size on made images."""

import numpy as np
import pytest

import lkarray as lk
from lkarray import workflow
from lkarray_workflows.studies import (
    audit_flips,
    audit_retraining,
    ips_map,
    lenet_audit,
    lenet_training,
)
from tests.helpers.studies import check_report

SMALL = ["batches=8", "batch_size=64", "epochs=4", "learning_rate=6e-4"]
IPS_MAP = [
    *("observed=120", "score_test=200", "score_train=120", "score_epochs=2", "neighbors=10"),
    "replicates=20",
]


@pytest.mark.slow
def test_lenet_training__runs_whole_and_is_used_by_ips_map(tmp_path, garments, caplog):
    config = lenet_training.Config.build("small", [*SMALL, "features=40", f"data={garments}"])
    lenet_training.run(config, tmp_path / "run", progress=False)
    metrics = check_report(tmp_path / "run", ["loss", "temporal", "participation", "regime"])
    for name in lenet_training.OVERLAPS:
        assert metrics["time"][name][-1] == pytest.approx(1, abs=1e-4)
    assert len(metrics["time"]["participation_ratio"]) == 5
    tree = lk.open(tmp_path / "run/gradients.zarr")
    assert list(tree.children) == ["derived"]  # the tensor is gone
    K = tree["derived/temporal_kernel"]["temporal_kernel"].values
    assert K.shape == (4, 4)
    assert (np.linalg.eigvalsh(K) > -1e-6 * np.trace(K)).all()
    for store in ("train.zarr", "gradients.zarr"):
        assert lk.verify(tmp_path / "run" / store) == []
    caplog.set_level("INFO")
    lenet_training.run(config, tmp_path / "run", progress=False)
    assert "lenet_training: report is done, reused" in caplog.text

    before = sorted(p for p in (tmp_path / "run").rglob("*") if p.is_file())
    settings = [*IPS_MAP, f"trained={tmp_path / 'run'}"]
    ips_map.run(ips_map.Config.build("small", settings), tmp_path / "map", progress=False)
    metrics = check_report(tmp_path / "map", ["map", "target", "distance", "axes_1", "axes_7"])
    assert set(metrics["seconds"]) == {"factors", "map", "similarity", "scores"}
    assert sorted(p for p in (tmp_path / "run").rglob("*") if p.is_file()) == before
    other = ips_map.Config.build("small", [*settings, "epochs=3", "seed=2"])
    with pytest.raises(ValueError, match=r"seed \(1, here 2\), epochs \(4, here 3\)"):
        ips_map.run(other, tmp_path / "other", progress=False)


@pytest.mark.slow
def test_ips_map__runs_whole_and_again(tmp_path, garments, caplog):
    config = ips_map.Config.build("small", [*SMALL, *IPS_MAP, f"data={garments}"])
    ips_map.run(config, tmp_path / "run", progress=False)
    metrics = check_report(tmp_path / "run", ["map", "target", "distance", "axes_1", "axes_7"])
    assert metrics["map"]["within"] > metrics["map"]["between"]
    assert metrics["similarity"]["rank_correlation"]["within"] < 0
    assert sum(metrics["similarity"]["count"]["within"]) < 120 * 119 / 2
    assert set(metrics["table"]) == set(ips_map.PAPER)
    for row in metrics["table"].values():
        for name in ips_map.MEASURES:
            assert row[f"{name}_low"] - 1e-9 <= row[name] <= row[f"{name}_high"] + 1e-9
    tree = lk.open(tmp_path / "run/maps.zarr")
    assert set(tree["derived"].children) == {"ips", "map", "similarity_by_distance", "difficulty"}
    ips = tree["derived/ips"]["ips"]
    assert ips.shape == (120, 120)
    np.testing.assert_array_equal(ips.values.diagonal(), 1)
    assert list(tree.children) == ["derived"]  # factors and the recorded states are gone
    assert "trajectory" not in {path.name for path in (tmp_path / "run/train.zarr").iterdir()}
    caplog.set_level("INFO")
    ips_map.run(config, tmp_path / "run", progress=False)
    assert "ips_map: report is done, reused" in caplog.text


@pytest.mark.slow
def test_lenet_audit__runs_whole_and_goes_on_after_a_failure(
    tmp_path,
    garments,
    monkeypatch,
    caplog,
):
    settings = (
        "audited=24",
        "detailed=6",
        "trak_train=120",
        "trak_size=64",
        "keep=true",
        "profiled=8",
    )
    config = lenet_audit.Config.build("small", [*settings, f"data={garments}"])

    def fail(*args, **options):
        raise RuntimeError("cut off")

    with monkeypatch.context() as broken:
        broken.setattr(lk, "reconstruction", fail)
        with pytest.raises(RuntimeError, match="cut off"):
            lenet_audit.run(config, tmp_path / "run", progress=False)
    caplog.set_level("INFO")
    lenet_audit.run(config, tmp_path / "run", progress=False)
    for stage in ("data 1", "train 1", "audit", "detail"):
        assert f"lenet_audit: {stage} is done, reused" in caplog.text
    figures = "completeness", "decision", "images", "class_own", "concentration", "layers"
    metrics = check_report(tmp_path / "run", figures)
    table = metrics["table"]
    profile = metrics["profile"]
    assert set(profile) == {"training", "audit", *lenet_audit.RULES}
    assert profile["audit"]["seconds"] > profile["training"]["seconds"]
    assert table["audit"]["lc"] > 0.999
    assert table["euler"]["mre"] > 3 * table["audit"]["mre"]
    assert table["supersampled twice"]["mre"] < 2 * table["audit"]["mre"]
    assert set(table) > {"TracIn, last layer", "TRAK, 5 checkpoints"}
    tree = lk.open(tmp_path / "run/audits.zarr")
    detailed = tree["audit_detail"]["influence"]
    assert set(detailed.dims) == {"group", "audit", "layer", "epoch"}
    whole = tree["audit"]["influence"].isel(audit=slice(0, 6))
    total = detailed.sum(["group", "layer", "epoch"]).values
    np.testing.assert_allclose(total, whole.sum("example").values, rtol=1e-3, atol=1e-5)
    assert lk.verify(tmp_path / "run/train.zarr") == []
    assert lk.verify(tmp_path / "run/audits.zarr") == []


@pytest.mark.slow
def test_audit_retraining__arms_are_of_equal_size_and_steps(tmp_path, garments):
    config = audit_retraining.Config.build(
        "small", ["audited=40", "held_out=60", "epochs=3", f"data={garments}"]
    )
    audit_retraining.run(config, tmp_path / "run", progress=False)
    metrics = check_report(tmp_path / "run", ["arms"])
    sizes = {arm: runs[0]["images"] for arm, runs in metrics["arms"].items()}
    assert sizes.pop("nothing") == 8 * 64
    assert abs(sizes.pop(audit_retraining.BALANCED) - 0.8 * 8 * 64) < 5
    assert list(lk.open(tmp_path / "run/train.zarr").children) == ["audit"]
    assert set(sizes.values()) == {round(0.8 * 8 * 64)}
    assert len(metrics["claims"]) == 6
    study = workflow.Study("audit_retraining", config, tmp_path / "run", show=False)
    kept = {
        arm: set(audit_retraining.kept_by(study, arm, 2).tolist()) for arm in audit_retraining.ARMS
    }
    net = study.load("scores.npz")["net"]
    gone = sorted(set(range(512)) - kept["most helpful"])
    assert net[gone].max() <= net[sorted(kept["most helpful"])].min()
    assert kept["random"] != set(audit_retraining.kept_by(study, "random", 3).tolist())


@pytest.mark.slow
def test_audit_flips__ranks_changed_labels_by_every_score(tmp_path, garments):
    config = audit_flips.Config.build("small", ["epochs=30", "batch_size=32", f"data={garments}"])
    audit_flips.run(config, tmp_path / "run", progress=False)
    metrics = check_report(tmp_path / "run", ["scores", "suspects"])
    assert set(metrics["auroc"]) == set(audit_flips.SCORES)
    assert metrics["auroc"]["self-influence"][0] > 0.6
    assert min(metrics["facts"]["1"]["lc"]) > 0.98  # of few, large steps
