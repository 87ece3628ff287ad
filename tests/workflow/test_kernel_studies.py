"""The studies of the loss-kernel and Bayesian-probe papers, run whole at small size."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import lkarray as lk
from lkarray import errors
from lkarray_workflows.studies import (
    development,
    digits_probe,
    gamma_sweep,
    imagenet,
    imagenet_prototypes,
    language,
    mislabeled_images,
    modular_arithmetic,
)
from tests.helpers.studies import check_report

pytestmark = pytest.mark.slow


def run_twice(study, config, folder, caplog, figures):
    """Run, check the report, run again: nothing is done twice. Return the metrics."""
    study.run(config, folder, progress=False)
    metrics = check_report(folder, figures)
    caplog.set_level("INFO")
    study.run(config, folder, progress=False)
    assert f"{study.__name__.split('.')[-1]}: report is done, reused" in caplog.text
    return metrics


def test_modular_arithmetic__learns_and_sees_the_tasks(tmp_path, caplog):
    config = modular_arithmetic.Config.build("small", ["draws=60"])
    figures = "axis", "covariances", "map", "map_b"
    metrics = run_twice(modular_arithmetic, config, tmp_path / "run", caplog, figures)
    assert metrics["accuracy"]["trained"] == 1
    assert metrics["accuracy"]["held_out"] > 0.9
    within = metrics["mean_correlation"]["addition, addition"]["value"]
    assert within > metrics["mean_correlation"]["addition, division"]["value"]
    assert metrics["neighbors_of_same_task"] > metrics["chance_same_task"] + 0.05
    assert 0 <= metrics["pc1_auroc"]["value"] <= 1
    assert metrics["pc1_auroc"]["error"] > 0
    unit = metrics["pc1_of_unit_vectors_auroc"]
    assert unit != metrics["pc1_auroc"]
    assert lk.verify(tmp_path / "run/store.zarr") == []


def test_modular_arithmetic__tables_of_both_tasks_are_right():
    pairs = modular_arithmetic.all_pairs(7)
    a, b, result, added = (pairs[name] for name in ("a", "b", "result", "task"))
    added = added == 0
    np.testing.assert_array_equal(result[added], (a + b)[added] % 7)
    np.testing.assert_array_equal((result * b % 7)[~added], a[~added])
    assert (b[~added] != 0).all()
    assert len(set(zip(a, b, added, strict=True))) == len(a) == 7 * 7 + 7 * 6
    with pytest.raises(ValueError, match="must be a prime, not 9"):
        modular_arithmetic.all_pairs(9)


def test_digits_probe__gains_of_changed_labels_are_larger(tmp_path, garments, caplog):
    settings = "train=800", "test=300", "relabelled_epochs=150", "mapped=300", "batch_size=32"
    config = digits_probe.Config.build("small", [*settings, f"data={garments}"])
    figures = "gain_against_loss", "gallery", "map", "relabelled"
    metrics = run_twice(digits_probe, config, tmp_path / "run", caplog, figures)
    assert metrics["relabelled"]["auroc"]["loss gain"]["value"] > 0.6
    assert -1 <= metrics["clean"]["pearson"]["value"] <= 1


def test_mislabeled_images__variance_finds_changed_labels(tmp_path, garments, caplog):
    settings = "train=800", "observed=400", "test=200", "width=8"
    config = mislabeled_images.Config.build("small", [*settings, f"data={garments}"])
    figures = "gain", "map", "variance"
    metrics = run_twice(mislabeled_images, config, tmp_path / "run", caplog, figures)
    assert metrics["auroc"]["loss variance"]["value"] > 0.7
    assert metrics["variance"]["ratio"]["value"] > 1.5


def test_gamma_sweep__kernels_at_every_gamma(tmp_path, garments, wordnet, caplog):
    settings = "train=800", "observed=200", "neighbors=15"
    config = gamma_sweep.Config.build("small", [*settings, f"data={garments}"])
    figures = "by_distance", "cka", "convergence", "lift"
    metrics = run_twice(gamma_sweep, config, tmp_path / "run", caplog, figures)
    assert [kernel["gamma"] for kernel in metrics["kernels"]] == [100, 10_000]
    table = np.array(metrics["cka"])
    np.testing.assert_allclose(table, table.T, atol=1e-6)
    np.testing.assert_allclose(np.diag(metrics["cka_without_noise"]), 1, atol=1e-5)
    assert (np.diff([kernel["cka"] for kernel in metrics["kernels"]])[:, -3:] > -0.02).all()


def test_development__kernels_of_checkpoints(tmp_path, garments, wordnet, caplog):
    settings = "train=800", "observed=200", "neighbors=15", "steps=0,10"
    config = development.Config.build("small", [*settings, f"data={garments}"])
    metrics = run_twice(development, config, tmp_path / "run", caplog, ["maps", "curves"])
    checkpoints = metrics["checkpoints"]
    assert [entry["step"] for entry in checkpoints] == [0, 10, 10 * 7]
    assert checkpoints[-1]["cka_to_final"] == pytest.approx(1)
    assert checkpoints[0]["cka_to_final"] < 0.99
    assert checkpoints[-1]["accuracy"] > checkpoints[0]["accuracy"]
    wrong = development.Config.build("small", [*settings[:3], "steps=70", f"data={garments}"])
    with pytest.raises(ValueError, match="steps must lie between 0 and 69"):
        development.run(wrong, tmp_path / "wrong", progress=False)


@pytest.fixture
def imagenet_folder(tmp_path):
    """A folder as ImageNet's, of eight classes: each of its own colour and bright rows."""
    rng = np.random.default_rng(0)
    root = tmp_path / "imagenet"
    for part, count in (("train", 24), ("val", 10)):
        for at, wnid in enumerate(list(lk.Taxonomy.imagenet().labels)[::125]):
            (root / part / wnid).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (80, 70 + at, 3)).astype(np.uint8)
                pixels[:, :, at % 3] += 100
                pixels[8 * at : 8 * at + 10] += 30
                Image.fromarray(pixels).save(root / part / wnid / f"{i}.jpg")
    return root


def test_imagenet__runs_whole_on_a_folder(tmp_path, imagenet_folder, caplog):
    weights = tmp_path / "weights.pt"
    torch.manual_seed(0)
    network = torchvision.models.googlenet(weights=None, init_weights=False)  # with its aux heads
    torch.save(network.state_dict(), weights)
    config = imagenet.Config.build(
        "small", ["network=googlenet", f"data={imagenet_folder}", f"weights={weights}"]
    )
    metrics = run_twice(
        imagenet, config, tmp_path / "run", caplog, ["map", "matrix", "nearest", "lift"]
    )
    assert (metrics["images"], metrics["classes"]) == (60, 8)
    assert metrics["lift"]["lift"][0] == pytest.approx(1)
    tree = lk.open(tmp_path / "run/store.zarr")
    assert tree["derived/thumbnails"]["thumbnail"].shape == (60, 64, 64, 3)
    near = tree["derived/neighbors"].to_dataset()
    labels = near["label"].values
    assert (labels[near["neighbor"].values.astype(int)] != labels[:, None]).all()
    numbers = {wnid: at for at, wnid in enumerate(lk.Taxonomy.imagenet().labels)}
    assert tree["losses"]["class_number"].values.tolist() == [numbers[x] for x in labels]
    assert lk.verify(tmp_path / "run/store.zarr") == []


def test_imagenet__of_a_flat_folder_holds_to_what_it_observes(tmp_path, imagenet_folder):
    data = imagenet_folder / "val"
    settings = [f"data={data}", "observed=1000", "train=1000", "side=32", "draws=4"]
    config = imagenet.Config.build("small", settings)
    assert config.network == imagenet.LITE0
    assert imagenet.files_of(config, "train") == imagenet.files_of(config, "val")
    imagenet.run(config, tmp_path / "run", progress=False)
    metrics = check_report(tmp_path / "run", ["map", "matrix", "nearest", "lift"])
    assert (metrics["images"], metrics["classes"]) == (80, 8)
    train, observed = (np.load(tmp_path / f"run/{split}.npy") for split in imagenet.SPLITS)
    np.testing.assert_array_equal(train, observed)


def test_imagenet__networks_are_known():
    with pytest.raises(ValueError, match="network must be efficientnet_lite0 or a classifier"):
        imagenet.Config.build("small", ["network=fcn_resnet50"])
    with pytest.raises(ValueError, match="has weights of its own: name the network that x.pt is"):
        imagenet.Config.build("small", ["weights=x.pt"])
    model = imagenet.network(imagenet.Config.build("small", ["network=squeezenet1_1"]))
    assert type(model).__name__ == "SqueezeNet"


def test_imagenet__tells_what_does_not_fit(tmp_path, imagenet_folder):
    def run(*settings):
        config = imagenet.Config.build("small", ["network=googlenet", *settings])
        imagenet.run(config, Path(tempfile.mkdtemp(dir=tmp_path)), progress=False)

    with pytest.raises(errors.StoreError, match="torchvision.datasets import ImageNet"):
        run(f"data={tmp_path / 'nowhere'}")
    with pytest.raises(errors.StoreError, match="torchvision's weights are fetched by"):
        run(f"data={imagenet_folder}", "weights=nowhere.pt")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(errors.StoreError, match="no weights of torchvision's googlenet"):
        run(f"data={imagenet_folder}", f"weights={tmp_path / 'other.pt'}")
    (imagenet_folder / "val/cats").mkdir()
    Image.new("RGB", (40, 40)).save(imagenet_folder / "val/cats/0.jpg")
    with pytest.raises(errors.StoreError, match=r"\['cats'\] are no wnids"):
        run(f"data={imagenet_folder}")


def test_imagenet_prototypes__runs_whole(tmp_path, caplog):
    config = imagenet_prototypes.Config.build("small", ["classes=30"])
    figures = "controls", "draws", "map", "matrix", "nearest", "lift"
    metrics = run_twice(imagenet_prototypes, config, tmp_path / "run", caplog, figures)
    assert metrics["intended"] > 0.1  # chance: a thousandth
    controls = {"penultimate features", "pixels", "random"}
    names = {name for name, _ in imagenet_prototypes.KERNELS.values()}
    assert set(metrics["lifts"]) == controls | names
    frozen = lk.open(tmp_path / "run/frozen.zarr").attrs["lkarray"]["losses"]["trainable"]
    assert frozen
    assert "_fc.weight" not in frozen
    assert metrics["mean_gain"]["frozen"] < metrics["mean_gain"]["whole"]


def test_language__finds_the_same_next_token_first(tmp_path, wordnet, caplog):
    config = language.Config.build("small", ["epochs=10", "windows=40"])
    metrics = run_twice(language, config, tmp_path / "run", caplog, ["lifts", "map"])
    assert metrics["loss"]["observed"] < metrics["loss"]["of token frequencies"]
    assert metrics["lifts"]["all"]["next"]["low"] > 2
    assert "next" not in metrics["lifts"]["other next token"]
    tree = lk.open(tmp_path / "run/store.zarr")
    assert tree["losses"]["loss"].dims == ("chain", "draw", "sample", "token")
    near = tree["derived/neighbors_other_next_token"].to_dataset()
    after = near["next"].values
    assert (after[near["neighbor"].values.astype(int)] != after[:, None]).all()


def test_language__tokens_and_their_kinds(wordnet):
    text = "Having 3 people's hats-on (often)."
    words = ["having", "3", "people's", "hats", "-", "on", "(", "often", ")", "."]
    assert language.split_text(text) == words
    kinds = [language.kind_of(w, language.sources.open_wordnet()) for w in ("dog", "run", "3", ";")]
    assert kinds == ["noun", "verb", "number", "mark"]
    assert language.kind_of("often", None) == "function word"
