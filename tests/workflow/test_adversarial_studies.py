"""The studies of attacked images, run whole at small size on made images."""

import json

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.io import savemat

import lkarray as lk
from lkarray_workflows.shared import adversarial_modes
from lkarray_workflows.shared.adversarial_cure import CURES
from lkarray_workflows.shared.adversarial_report import claims, over_networks
from lkarray_workflows.shared.attacks import KINDS
from lkarray_workflows.studies import adversarial, adversarial_sweep, adversarial_training, svhn
from tests.helpers.studies import check_report

SMALL = [
    *("batches=8", "batch_size=64", "epochs=4", "learning_rate=6e-4", "pairs=5", "tried=400"),
    *("detailed=2", "features=100", "modes=50", "times=3", "correction_steps=3", "radius=0.4"),
]


@pytest.mark.slow
def test_adversarial__cut_off_in_the_middle_gives_the_same_numbers(
    tmp_path,
    garments,
    monkeypatch,
    caplog,
):
    config = adversarial.Config.build("small", [*SMALL, f"data={garments}"])
    adversarial.run(config, tmp_path / "whole", progress=False)
    whole = check_report(tmp_path / "whole", ("layers", "regime", "shifts", "cancellation", "cure"))

    def fail(*args, **options):
        raise RuntimeError("cut off")

    for name in ("mode_sensitivity", "shift_modes", "gross_influence", "online_modes"):
        with monkeypatch.context() as broken:
            broken.setattr(lk, name, fail)
            with pytest.raises(RuntimeError, match="cut off"):
                adversarial.run(config, tmp_path / "run", progress=False)
    caplog.set_level("INFO")
    adversarial.run(config, tmp_path / "run", progress=False)
    for stage in ("train 1", "pairs 1", "modes 1", "cure 1", "audit 1", "layers 1", "outputs 1"):
        assert f"adversarial: {stage} is done, reused" in caplog.text
    resumed = check_report(tmp_path / "run", ("path", "magnitude", "influence", "inputs"))
    for key in ("networks", "claims"):
        assert resumed[key] == whole[key]
    first = resumed["networks"][0]
    assert first["audit"]["lc"] > 0.99
    assert first["outputs"]["lc"] > 0.99
    assert set(first["modes"]["cancellation"]) == set(KINDS)
    assert first["cure"]["accuracy"]["clean"] == 1
    assert first["cure"]["accuracy"]["adversarial"] == 0
    assert set(first["cure"]["accuracy"]) == {*KINDS[:3], *CURES}
    assert set(resumed["networks"][1]) == {"modes", "cure"}
    assert lk.verify(tmp_path / "run/analysis.zarr") == []
    assert not (tmp_path / "run/train.zarr/trajectory").exists()


@pytest.mark.minutes
def test_adversarial_sweep__tries_every_combination(tmp_path, garments, caplog):
    settings = [*("batches=8", "batch_size=64", "epochs=4", "learning_rate=6e-4", "pairs=5")]
    settings += ["tried=400", "features=100", "modes=50", "correction_steps=2"]
    config = adversarial_sweep.Config.build("small", [*settings, f"data={garments}"])
    adversarial_sweep.run(config, tmp_path / "run", progress=False)
    metrics = check_report(tmp_path / "run", ["corrections"])
    assert set(metrics["attacks"]) == {"pgd:0.4", "l2_pgd:4"}
    for one in metrics["attacks"].values():
        assert len(one["corrections"]) == 6  # one radius, two shifts, three sets of drives
        assert one["shift_ratio"] > 1
        assert set(one["cancellation"]) == set(KINDS[:3])
        best = adversarial_sweep.best_of(one["corrections"])
        assert best["drives"] in adversarial_sweep.DRIVES[:2]
        assert all(
            best["adversarial"] + best["random"] >= r["adversarial"] + r["random"]
            for r in one["corrections"]
            if r["drives"] != "signs at random"
        )
    assert not (tmp_path / "run/train.zarr/trajectory").exists()
    caplog.set_level("INFO")
    adversarial_sweep.run(config, tmp_path / "run", progress=False)
    assert "adversarial_sweep: l2_pgd:4 is done, reused" in caplog.text


@pytest.mark.parametrize("attack", ["pgd", "pgd:", "pgd:0", "pgd:nan", "rays:0.1"])
def test_adversarial_sweep__attacks_are_kinds_with_a_radius(attack):
    assert adversarial_sweep.Config.build("small", ["attacks=fgsm:0.1,pgd:1"]).attacks[1] == "pgd:1"
    with pytest.raises(ValueError, match=f"{attack!r} is no attack: one of"):
        adversarial_sweep.Config.build("small", [f"attacks=fgsm:0.1,{attack}"])


def test_claims__need_every_network():
    def network(cured, noise, ratio):
        cures = {"cured adversarial": cured, "adversarial + random": noise}
        cures |= dict.fromkeys(("signs at random", "attacked again"), 0.5)
        gaps = {kind: {"mean": ratio} for kind in ("clean", "random", "natural error")}
        return {"cure": {"accuracy": cures}, "modes": {"paired_cancellation": gaps}}

    decided = claims([network(0.8, 0.1, -0.2), network(0.4, 0.1, 0.1)])
    held = {claim: judged["holds"] for claim, judged in decided.items()}
    assert held["the correction restores more than adversarial + random does"]
    assert not held["the correction restores more than attacked again does"]
    assert not held["adversarial images cancel more than natural error images of equal loss"]
    gap = decided["adversarial images cancel more than clean images"]
    assert gap["differences"] == [0.2, -0.1]


def test_over_networks__is_students_interval():
    """Against the table's quantile: 4.303 at two degrees of freedom (Student 1908)."""
    shares = [0.85, 0.9, 0.95]
    half = 4.303 * 0.05 / np.sqrt(3)
    assert over_networks(shares) == f"; mean 90.0% [{0.9 - half:.1%}, {min(0.9 + half, 1):.1%}]"
    assert over_networks(shares[:1]) == ""


def test_shifts_of__kinds_are_compared_pair_by_pair(rng):
    pairs, modes = 4, 60
    kinds, coefficients = np.repeat(KINDS, pairs), rng.normal(size=(len(KINDS) * pairs, modes))
    coords = {"example": np.arange(len(kinds)), "kind": ("example", kinds)}
    by_kind = adversarial_modes.shifts_of(
        xr.Dataset({"drive": ("mode", rng.normal(size=modes))}),
        xr.DataArray(coefficients, dims=("example", "mode"), coords=coords),
        xr.Dataset(
            {"sensitivity": (("example", "mode"), np.abs(coefficients[:, :50]))}, coords=coords
        ),
    )
    for kind, start in (("adversarial", pairs), ("random", 2 * pairs)):
        moved = coefficients[start : start + pairs] - coefficients[:pairs]
        expected = np.abs(moved[:, :50]).mean(0)
        np.testing.assert_allclose(by_kind[kind]["shift"], expected)


def test_with_drive__is_of_the_whole_training_set(rng):
    gradients = rng.normal(size=(30, 12))
    _, s, v = np.linalg.svd(gradients, full_matrices=False)
    modes = xr.Dataset({"direction": (("mode", "param"), v[:4]), "singular_value": ("mode", s[:4])})
    mean = xr.DataArray(gradients.mean(0), dims="param")
    driven = adversarial_modes.with_drive(modes, mean, 30, 30)
    np.testing.assert_allclose(driven["drive"], (gradients @ v[:4].T).sum(0))
    np.testing.assert_allclose(driven["alignment"] * driven["singular_value"], driven["drive"])
    # The modes of the same gradients four times over have singular values twice as large.
    more = adversarial_modes.with_drive(modes, mean, 120, 30)
    np.testing.assert_allclose(more["drive"], 4 * driven["drive"])
    np.testing.assert_allclose(more["alignment"], 2 * driven["alignment"])


@pytest.mark.slow
def test_adversarial_training__goes_on_with_a_part(tmp_path, garments, monkeypatch):
    settings = [
        *("batches=6", "batch_size=64", "epochs=5", "learning_rate=2e-3", "pairs=4", "tried=150"),
        *("features=100", "parts=3", "radius=0.1", "attack_steps=2"),
    ]
    config = adversarial_training.Config.build("small", [*settings, f"data={garments}"])
    adversarial_training.run(config, tmp_path / "whole", progress=False)
    whole = check_report(tmp_path / "whole", ("energy", "images_standard", "images_attacked"))
    plain = adversarial_training.train_attacked

    def fail(config, paths, part, show):
        if part == 1:
            raise RuntimeError("cut off")
        plain(config, paths, part, show)

    with monkeypatch.context() as broken:
        broken.setattr(adversarial_training, "train_attacked", fail)
        with pytest.raises(RuntimeError, match="cut off"):
            adversarial_training.run(config, tmp_path / "run", progress=False)
    first = torch.load(tmp_path / "run/attacked_1.pt", weights_only=True)["model"]
    adversarial_training.run(config, tmp_path / "run", progress=False)
    again = torch.load(tmp_path / "run/attacked_1.pt", weights_only=True)["model"]
    assert all(torch.equal(first[key], again[key]) for key in first)
    metrics = json.loads((tmp_path / "run/report/metrics.json").read_text())
    assert metrics["networks"] == whole["networks"]
    for of in metrics["networks"].values():
        assert of[0]["ranks"]["0.9"] <= of[0]["ranks"]["0.95"] <= of[0]["ranks"]["0.99"]
        assert of[0]["nullspace"]["least"] >= 784 - of[0]["modes"]
        assert min(of[0]["same_energy_ratio"], *of[0]["energy"].values()) > 0
        assert of[0]["active"]["most"] <= of[0]["modes"]


@pytest.mark.slow
def test_svhn__runs_on_files_in_svhns_format(tmp_path, caplog):
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for part, n in (("train", 900), ("test", 300)):
        labels = rng.integers(0, 10, n)
        images = rng.integers(0, 120, (n, 32, 32, 3))
        for row in (0, 1):
            images[np.arange(n), 3 * labels + row] += 100
        # As published: images last, and 10 for the digit 0.
        stored = {
            "X": images.astype(np.uint8).transpose(1, 2, 3, 0),
            "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8),
        }
        savemat(folder / f"{part}_32x32.mat", stored)
    config = svhn.Config.build(
        "small",
        [
            f"data={folder}",
            "batches=8",
            "radius=0.5",
            "pairs=4",
            "observed=100",
            *("learning_rate=6e-4", "epochs=4"),
        ],
    )
    svhn.run(config, tmp_path / "run", progress=False)
    shown = ("audit_decision", "map_map", "adversarial_regime", "adversarial_inputs")
    metrics = check_report(tmp_path / "run", shown)
    assert sum(metrics["training"]["parameters"].values()) == pytest.approx(2.5 * 61_706, rel=0.05)
    assert metrics["audit"]["table"]["audit"]["lc"] > 0.99
    assert not (tmp_path / "run/training/train.zarr/trajectory").exists()
    caplog.set_level("INFO")
    svhn.run(config, tmp_path / "run", progress=False)
    assert "svhn: adversarial is done, reused" in caplog.text
    with pytest.raises(ValueError, match="svhn trains a network"):
        svhn.run(config.model_copy(update={"trained": tmp_path}), tmp_path / "x", progress=False)
