"""The studies of LeNet-5's training, run whole at small size on made images."""

import numpy as np
import pytest
from lkarray_workflows import audit_flips, audit_retraining, lenet_audit, lenet_path

import lkarray as lk
from tests.workflow.test_hierarchy_studies import check_report, garments  # noqa: F401

SMALL = [
    *("batches=8", "batch_size=64", "epochs=4", "learning_rate=6e-4", "features=40"),
    *("observed=120", "score_test=200", "score_train=120", "score_epochs=2", "neighbors=10"),
]


@pytest.mark.slow
def test_lenet_path__runs_whole_and_again(tmp_path, garments, caplog):  # noqa: F811
    config = lenet_path.Config.build("small", [*SMALL, f"data={garments}"])
    lenet_path.run(config, tmp_path / "run", progress=False)
    figures = ["temporal", "participation", "regime", "map", "axes_1", "axes_9"]
    metrics = check_report(tmp_path / "run", figures)
    assert metrics["map"]["within"] > metrics["map"]["between"]
    for name in ("feature_overlap", "subspace_overlap", "activation_overlap"):
        assert metrics["time"][name][-1] == pytest.approx(1, abs=1e-4)
    assert set(metrics["table"]) == set(lenet_path.SCORES)
    tree = lk.open(tmp_path / "run/train.zarr")
    assert tree["gradients"].sizes["time"] == 5
    K = tree["derived/temporal_kernel"]["temporal_kernel"].values
    assert (np.linalg.eigvalsh(K) > -1e-6 * np.trace(K)).all()
    assert lk.verify(tmp_path / "run/train.zarr") == []
    caplog.set_level("INFO")
    lenet_path.run(config, tmp_path / "run", progress=False)
    assert "lenet_path: report is done, reused" in caplog.text


@pytest.mark.slow
def test_lenet_audit__runs_whole_and_goes_on_after_a_failure(
    tmp_path,
    garments,  # noqa: F811
    monkeypatch,
    caplog,
):
    settings = (
        "audited=24", "detailed=6", "trak_train=120", "trak_size=64", "keep=true", "profiled=8",
    )  # fmt: skip
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
def test_audit_retraining__arms_are_of_equal_size_and_steps(tmp_path, garments):  # noqa: F811
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
    paths = audit_retraining.Paths(tmp_path / "run")
    kept = {
        arm: set(audit_retraining.kept_by(config, paths, arm, 2).tolist())
        for arm in audit_retraining.ARMS
    }
    net = np.load(paths.scores)["net"]
    gone = sorted(set(range(512)) - kept["most helpful"])
    assert net[gone].max() <= net[sorted(kept["most helpful"])].min()
    assert kept["random"] != set(audit_retraining.kept_by(config, paths, "random", 3).tolist())


@pytest.mark.slow
def test_audit_flips__ranks_changed_labels_by_every_score(tmp_path, garments):  # noqa: F811
    config = audit_flips.Config.build("small", ["epochs=30", "batch_size=32", f"data={garments}"])
    audit_flips.run(config, tmp_path / "run", progress=False)
    metrics = check_report(tmp_path / "run", ["scores", "suspects"])
    assert set(metrics["auroc"]) == set(audit_flips.SCORES)
    assert metrics["auroc"]["self-influence"][0] > 0.6
    assert min(metrics["facts"]["1"]["lc"]) > 0.99
