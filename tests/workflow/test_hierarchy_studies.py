"""The studies on WordNet's labels, run whole at small size on real definitions and made images."""

import numpy as np
import pytest

import lkarray as lk
from lkarray import errors
from lkarray_workflows.studies import fashion, glosses
from tests.helpers.studies import check_report

SMALL = [
    "train=1000",
    "observed=200",
    "epochs=10",
    "batch_size=50",
    "width=32",
    "draws=30",
    "burn_in=10",
    "thin=1",
]


@pytest.mark.minutes
def test_fashion__runs_whole_and_again(tmp_path, garments, wordnet, caplog):
    config = fashion.Config.build("small", [*SMALL, f"data={garments}"])
    fashion.run(config, tmp_path / "run", progress=False)
    figures = ["by_distance", *(f"matrix_{name}" for name in fashion.KERNELS)]
    metrics = check_report(tmp_path / "run", figures)
    assert metrics["accuracy"] > 0.9
    assert set(metrics["trained"]["nearest_classes"]) > {"trouser", "gym shoe"}
    low, high = metrics["trained"]["rank_correlation"][1:]
    assert -1.5 < low < high < 1.5
    tree = lk.open(tmp_path / "run/trained.zarr")
    assert tree["derived/by_distance_images"]["label_mean"].shape == (10, 10)
    assert lk.verify(tmp_path / "run/trained.zarr") == []
    caplog.set_level("INFO")
    fashion.run(config, tmp_path / "run", progress=False)
    assert "fashion: report is done, reused" in caplog.text


def test_fashion__missing_files_are_named(tmp_path, garments):
    (garments / "t10k-labels-idx1-ubyte.gz").unlink()
    config = fashion.Config.build("small", [f"data={garments}"])
    with pytest.raises(errors.StoreError, match="has no t10k-labels-idx1-ubyte or .*gz"):
        fashion.run(config, tmp_path / "run", progress=False)


@pytest.mark.minutes
def test_glosses__classes_are_the_deepest_large_hypernyms(wordnet):
    nouns, classes = glosses.assign_classes(40, 30)
    of = dict(zip(nouns, classes, strict=True))
    names, counts = np.unique(classes, return_counts=True)
    assert counts.min() >= 30
    assert 800 < len(names) < 1000
    assert 75_000 < len(nouns) < 82_200
    assert "city.n.01" not in of, "its class has too few members"
    for noun in ("poodle.n.01", "copper.n.01", "violin.n.01", "paris.n.01"):
        synset = wordnet.synset(noun)
        above = {s for path in synset.hypernym_paths() for s in path} - {synset}
        large = [
            s
            for s in above
            if len(set(s.closure(lambda s: s.hyponyms() + s.instance_hyponyms()))) >= 40
        ]
        deepest = max(s.min_depth() for s in large)
        assert of[noun] in {s.name() for s in large if s.min_depth() == deepest}


@pytest.mark.slow
def test_glosses__small_runs_whole(tmp_path, wordnet):
    config = glosses.Config.build("small")
    glosses.run(config, tmp_path, progress=False)
    figures = ["controls", "by_depth", "settings", "by_distance", "matrix"]
    metrics = check_report(tmp_path, figures)
    assert metrics["held_out"] == config.held_out
    random = metrics["pooled_lift"]["random"]
    assert random["low"][2] < 1 < random["high"][2]
    kernels = metrics["kernels"]
    assert kernels["trained"]["held_out_accuracy"] > 5 * kernels["untrained 0"]["held_out_accuracy"]
