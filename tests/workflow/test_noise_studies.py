"""The studies of what a draw is worth, run whole at small size."""

import numpy as np
import pytest
from PIL import Image

import lkarray as lk
from lkarray import errors
from lkarray_workflows.shared import estimates
from lkarray_workflows.studies import imagenet_gradients, noise
from tests.helpers.studies import check_report


def test_least__is_read_off_between_two_points():
    points = [
        {"draws": 10, "agreement": 0.5},
        {"draws": 1000, "agreement": 0.5 + 2 * (estimates.WANTED - 0.5)},
    ]
    assert estimates.least(points, "draws") == pytest.approx(100)
    assert estimates.least(points[:1], "draws") is None
    assert estimates.least(points[1:], "draws") == 1000


def test_extrapolated__takes_out_a_line_in_one_over_draws():
    points = [
        {"draws": n, "lift": {"depth": [4.0, 9.0], "lift": [1.5 - 1 / n, 3 - 2 / n]}}
        for n in (2, 8, 16, 32)
    ]
    rows = imagenet_gradients.extrapolated(points)
    assert [row["depth"] for row in rows] == [4.0, 9.0]
    assert [row["lift"] for row in rows] == pytest.approx([1.5, 3.0])


@pytest.mark.minutes
def test_noise__runs_whole_on_digits(tmp_path):
    config = noise.Config.build("small", [])
    noise.run(config, tmp_path / "run", progress=False)
    metrics = check_report(tmp_path / "run", ["against_draws", "against_seconds"])
    (kernel,) = metrics["kernels"]
    assert 0 < kernel["reference_reliability"] <= 1
    last = {name: points[-1]["agreement"] for name, points in kernel["curves"].items()}
    assert last["Gaussian estimate"] > last["losses"] - 0.05
    assert last["gradients, smoothed"] > 0.5


@pytest.mark.minutes
def test_imagenet_gradients__runs_whole_on_a_folder(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    rng = np.random.default_rng(0)
    for at, wnid in enumerate(lk.Taxonomy.imagenet().labels[:30]):
        folder = tmp_path / "images" / str(wnid)
        folder.mkdir(parents=True)
        pixels = rng.integers(0, 120, (80, 70 + at, 3)).astype(np.uint8)
        pixels[:, :, at % 3] += 100
        Image.fromarray(pixels).save(folder / "0.JPEG")
    config = imagenet_gradients.Config.build("small", [f"data={tmp_path / 'images'}"])
    imagenet_gradients.run(config, tmp_path / "run", progress=False)
    metrics = check_report(tmp_path / "run", ["map", "lift", "draws"])
    assert set(metrics["lifts"]) >= {imagenet_gradients.CENTER, "averaged, gamma 60000", "pixels"}
    with pytest.raises(errors.StoreError, match=r"has no n\d+/\*\.JPEG"):
        imagenet_gradients.files_of(config.model_copy(update={"data": tmp_path}))
