"""The study of LeNet-5's training, run whole at small size on made images."""

import numpy as np
import pytest
from lkarray_workflows import lenet_path

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
