"""What studies of recorded runs refuse before any work, and count."""

import gzip
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from click.testing import CliRunner

from lkarray import errors, plots
from lkarray.cli import main
from lkarray.plots.training import mosaic
from lkarray_workflows.shared import images, recorded, retraining
from lkarray_workflows.studies import (
    adversarial,
    adversarial_training,
    audit_flips,
    audit_retraining,
    development,
    digits_probe,
    fashion,
    gamma_sweep,
    glosses,
    imagenet,
    ips_map,
    language,
    lenet_audit,
    lenet_training,
    mislabeled_images,
    modular_arithmetic,
    pruning,
    svhn,
)
from tests.helpers.hungry import hungry


def finished(folder, config, *, states=True):
    """A folder as a finished run of lenet_training leaves it, without its arrays."""
    folder.mkdir()
    record = {
        "workflow": "lenet_training",
        "lkarray": "0",
        "config": config.model_dump(mode="json"),
        "stages": {"report": {"outputs": [], "seconds": 1}},
    }
    (folder / "run.json").write_text(json.dumps(record))
    if states:
        (folder / "train.zarr/trajectory").mkdir(parents=True)
    return folder


def test_check__takes_a_finished_run_of_the_same_settings(tmp_path):
    other = finished(tmp_path / "r", recorded.Training(seed=3))
    recorded.check(recorded.Training(seed=3, trained=other))
    with pytest.raises(ValueError, match=r"other settings: seed \(3, here 4\)"):
        recorded.check(recorded.Training(seed=4, trained=other))
    with pytest.raises(ValueError, match=r"holds no run; make it with: lkarray run lenet_training"):
        recorded.check(recorded.Training(trained=tmp_path))
    gone = finished(tmp_path / "g", recorded.Training(), states=False)
    with pytest.raises(ValueError, match="no recorded states any more"):
        recorded.check(recorded.Training(trained=gone))


TAKERS = [ips_map, lenet_audit, adversarial, adversarial_training, pruning]


@pytest.mark.parametrize("study", TAKERS)
def test_trained__brings_its_data_and_settings(study, tmp_path):
    run = recorded.Training(seed=3, dataset="fashion", data=tmp_path, batches=20, epochs=7)
    folder = finished(tmp_path / "r", run)
    for preset in ("default", "small"):
        config = study.Config.build(preset, [f"trained={folder}", "keep=true"])
        for key in (*recorded.SHARED, "data"):
            assert getattr(config, key) == getattr(run, key)
        recorded.check(config)
    config = study.Config.build("default", [f"trained={folder}", "dataset=mnist", "epochs=8"])
    with pytest.raises(ValueError, match=r"dataset \(fashion, here mnist\), epochs \(7, here 8\)"):
        recorded.check(config)


def test_trained__of_another_study_brings_nothing(tmp_path):
    other = finished(tmp_path / "r", recorded.Training(seed=3))
    text = (other / "run.json").read_text().replace("lenet_training", "ips_map")
    (other / "run.json").write_text(text)
    config = ips_map.Config.build("default", [f"trained={other}"])
    assert config.seed == 1
    with pytest.raises(ValueError, match="no finished run of lenet_training but ips_map"):
        recorded.check(config)


def test_check__wants_files_of_later_networks(tmp_path):
    other = finished(tmp_path / "r", recorded.Training())
    config = recorded.Training(trained=other)
    with pytest.raises(errors.StoreError, match="import MNIST as D"):
        recorded.check(config, seeds=2)
    with pytest.raises(errors.StoreError, match=r"has no train-images-idx3-ubyte or .*gz: python"):
        recorded.check(config.model_copy(update={"data": tmp_path}), seeds=2)


@pytest.mark.parametrize(
    "study",
    [
        *(ips_map, lenet_audit, lenet_training, adversarial, pruning, svhn, adversarial_training),
        *(audit_flips, audit_retraining, development, digits_probe, fashion, gamma_sweep),
        mislabeled_images,
    ],
)
def test_studies__refuse_missing_files_before_they_make_a_folder(study, tmp_path):
    with pytest.raises(errors.StoreError, match="no --data with"):
        study.run(study.Config.build("small"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("study", [adversarial, adversarial_training, svhn])
def test_studies__of_attacks_need_foolbox_before_they_train(study, tmp_path, monkeypatch):
    def missing():
        raise ModuleNotFoundError("attacks need foolbox: pip install 'lkarray[adversarial]'")

    monkeypatch.setattr(study, "require_foolbox", missing)
    monkeypatch.setattr(study, "check", lambda *args: None)
    with pytest.raises(ModuleNotFoundError, match=r"lkarray\[adversarial\]"):
        study.run(study.Config.build("small"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("study", "settings", "message"),
    [
        (adversarial, ["leading=300"], "leading=300 is more than there are: 60"),
        (adversarial, ["features=100", "modes=125"], "modes=125 is more than there are: 100"),
        (adversarial, ["batches=2"], "features=150 is more than there are: 128"),
        (adversarial, ["predicted=9"], "predicted=9 is more than there are: 8"),
        (adversarial_training, ["modes=200"], "modes=200 is more than there are: 150"),
        (lenet_audit, ["audited=4", "detailed=5"], "detailed=5 is more than there are: 4"),
    ],
)
def test_configs__refuse_what_does_not_fit_together(study, settings, message):
    with pytest.raises(ValueError, match=f"settings do not fit: {message}"):
        study.Config.build("small", settings)


def test_svhn__its_studies_settings_are_checked_with_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(svhn, "check", lambda config: None)
    config = svhn.Config.build("small", ["pairs=700"])
    with pytest.raises(ValueError, match="pairs=700 is more than there are"):
        svhn.run(config, tmp_path / "run", progress=False)


def test_retraining__refuses_more_images_than_there_are(monkeypatch):
    def few(source, train, test, *, seed):
        return {"train_labels": np.zeros(min(train, 50)), "test_labels": np.zeros(min(test, 20))}

    monkeypatch.setattr(retraining, "take_images", few)
    with pytest.raises(ValueError, match="25 test images are wanted, and there are 20"):
        retraining.take(None, 50, 5, 20, seed=0)


def test_ips_map__numbers_that_are_missing_are_said_so():
    assert ips_map.interval({"auroc": None}, "auroc") == "none"
    text = ips_map.interval({"auroc": 0.5, "auroc_low": 0.25, "auroc_high": 0.75}, "auroc")
    assert text == "0.500 [0.250, 0.750]"


@pytest.mark.parametrize("study", [glosses, language, gamma_sweep, development, fashion])
def test_studies__of_wordnet_want_it_before_they_make_a_folder(study, tmp_path, monkeypatch):
    def missing():
        raise errors.MissingCorpusError("nltk's WordNet corpus is missing; get it with: ...")

    monkeypatch.setattr("lkarray.analysis.hierarchy.sources.open_wordnet", missing)
    monkeypatch.setattr(study, "require_files", lambda *args: None, raising=False)
    with pytest.raises(errors.MissingCorpusError):
        study.run(study.Config.build("small"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_cli__settings_that_do_not_fit_exit_with_two(tmp_path):
    words = ["run", "modular_arithmetic", "--preset", "small", "--modulus", "9"]
    result = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "m")])
    assert result.exit_code == 2
    assert "modulus must be a prime" in result.output
    assert "Traceback" not in result.output
    words = ["run", "ips_map", "--trained", str(tmp_path), "--out", str(tmp_path / "i")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "holds no run" in result.output


def idx(folder, splits, suffix=""):
    """Files as MNIST and Fashion-MNIST are published."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, (pixels, labels) in splits.items():
        part = "t10k" if split == "test" else split
        for kind, header, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            data = bytes(header) + values.tobytes()
            path = folder / f"{part}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(data) if suffix else data)
    return folder


def made(n=3):
    rng = np.random.default_rng(0)
    return {
        split: (rng.integers(0, 256, (n, 28, 28)).astype(np.uint8), np.arange(n, dtype=np.uint8))
        for split in ("train", "test")
    }


def archive(path, splits):
    arrays = {
        f"{split}_{kind}": values
        for split, both in splits.items()
        for kind, values in zip(("images", "labels"), both, strict=True)
    }
    np.savez_compressed(path, **arrays)
    return path


@pytest.mark.parametrize("dataset", ["mnist", "fashion"])
@pytest.mark.parametrize("kind", ["torchvision", "files", "packed files", "folder", "archive"])
def test_read_images__from_files_of_each_kind(tmp_path, dataset, kind):
    splits = made()
    if kind == "torchvision":
        idx(tmp_path / images.CLASSES[dataset][1], splits)
        data = tmp_path
    elif kind in ("files", "packed files"):
        data = idx(tmp_path, splits, ".gz" if "packed" in kind else "")
    else:
        path = archive(tmp_path / f"{dataset}.npz", splits)
        data = tmp_path if kind == "folder" else path
    images.require_files(audit_flips.Config(dataset=dataset, data=data))
    for split, (pixels, labels) in splits.items():
        read, own = images.read_images(data, split, dataset)
        np.testing.assert_array_equal(read, pixels)
        np.testing.assert_array_equal(own, labels)


def test_read_images__files_of_the_other_data_set_are_refused(tmp_path):
    splits = made(12)
    for split, (_, labels) in splits.items():
        labels[:10] = images.FIRST["fashion"][split]
    idx(tmp_path, splits, ".gz")
    for split in splits:
        images.read_images(tmp_path, split, "fashion")
        with pytest.raises(errors.StoreError, match="is of FashionMNIST, and MNIST was asked for"):
            images.read_images(tmp_path, split, "mnist")


def test_read_images__damaged_files_are_named(tmp_path):
    splits = made()
    idx(tmp_path / "idx", splits, ".gz")
    path = tmp_path / "idx/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(errors.StoreError, match=f"{path} cannot be read"):
        images.read_images(tmp_path / "idx", "train", "mnist")
    splits["train"] = (splits["train"][0], splits["train"][1][:2])
    idx(tmp_path / "few", splits)
    with pytest.raises(errors.StoreError, match="has 3 images and 2 labels for train"):
        images.read_images(tmp_path / "few", "train", "mnist")
    lacks = tmp_path / "lacks.npz"
    np.savez(lacks, train_images=splits["train"][0])
    with pytest.raises(errors.StoreError, match=r"lacks.npz cannot be read \('train_labels"):
        images.read_images(lacks, "train", "mnist")


def test_how_to_get__says_every_way():
    assert "apt-get install dataset-fashion-mnist" in images.how_to_get("fashion")
    assert "apt-get" not in images.how_to_get("mnist")
    assert "; or: --data mnist.npz, an archive of train_images" in images.how_to_get("mnist")
    assert "npz" not in images.how_to_get("svhn")
    with pytest.raises(errors.StoreError, match="there is no nowhere with MNIST's images: python"):
        images.require_files(audit_flips.Config(data="nowhere"))


#: Rows of the papers' tables 1: batch size, chains, draws, burn-in, step size, nbeta, gamma.
TABLES = {
    "modular_arithmetic": (512, 30, 800, 200, 2e-7, 500, 30_000),
    "imagenet": (256, 15, 500, 100, 5e-5, 20, 4000),
    "mislabeled_images": (256, 8, 1000, 100, 1e-5, 20, 4000),
    "gamma_sweep": (256, 5, 1200, 2000, 1e-4, 20, None),
    "development": (256, 15, 500, 100, 5e-5, 20, 4000),
    "digits_probe": (64, 5, 500, 10, 5e-3, 10, 30),
}


@pytest.mark.parametrize(
    "study",
    [modular_arithmetic, imagenet, mislabeled_images, gamma_sweep, development, digits_probe],
)
def test_presets__of_the_papers_are_their_tables(study):
    needed = ["data=x"] if study is imagenet else []
    config = study.Config.build("paper", needed)
    values = (
        config.sampler_batch,
        config.chains,
        config.draws,
        config.burn_in,
        config.step_size,
        config.nbeta,
        config.gamma,
    )
    name = study.__name__.rsplit(".", 1)[1]
    for value, expected in zip(values, TABLES[name], strict=True):
        assert expected is None or value == expected
    assert config.thin == 1


def test_peak_memory__is_of_the_process_itself():
    """Not what its parent had before, which a new process inherits in getrusage."""
    held = np.ones(300 << 17)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        off = pool.submit(hungry, 100).result()
    assert held[0] == 1
    assert abs(off) < 20 << 20


def test_mosaic__bytes_of_three_colours_are_not_all_white():
    images = np.full((2, 3, 3, 3), 51, np.uint8)
    tiled = mosaic(images, 2)
    assert tiled[0, 0].tolist() == [0.2] * 3
    assert tiled.max() == 1  # the gap
    grey = mosaic(images[..., 0], 2)
    assert grey[0, 0] == 51
    assert plots.image_rows([[images[0] / 255]], ["a"]).axes[0].images[0].get_clim() == (0, 1)
