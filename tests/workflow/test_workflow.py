import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from matplotlib.image import imread
from pydantic import Field

import lkarray as lk
from lkarray import errors, progress, workflow
from lkarray.cli import main
from lkarray.store import file_lock


class Config(workflow.Config):
    presets = {"small": {"size": 2}}  # noqa: RUF012
    size: int = Field(10, ge=1)
    rate: float = 0.5


def test_config__takes_presets_and_settings_with_their_types():
    assert Config.build() == Config(size=10, rate=0.5)
    config = Config.build("small", ["rate=1e-3"])
    assert (config.size, config.rate) == (2, 1e-3)


@pytest.mark.parametrize(
    ("preset", "setting", "message"),
    [
        ("huge", [], "preset 'huge' is not one of"),
        ("default", ["size"], "not of the form key=value"),
        ("default", ["sise=3"], r"'sise' is not one of \['rate', 'size'\]"),
        ("default", ["size=0"], "size: .*greater than or equal to 1, not '0'"),
        ("default", ["size=many"], "size: .*integer"),
    ],
)
def test_config__refuses_what_does_not_fit(preset, setting, message):
    with pytest.raises(ValueError, match=message):
        Config.build(preset, setting)


def stages(folder, config=None, *, fail=None):
    """Run three stages that each write a file, and say which of them ran."""
    ran = []

    def work(name):
        def write():
            if name == fail:
                raise RuntimeError("stopped")
            ran.append(name)
            (folder / name).write_text(name)

        return write

    with workflow.Run("study", config or Config(), folder) as run:
        for name in ("a", "b", "c"):
            run.stage(name, work(name), [folder / name])
    return ran


def test_run__continues_where_it_stopped(tmp_path):
    with pytest.raises(RuntimeError):
        stages(tmp_path, fail="b")
    assert stages(tmp_path) == ["b", "c"]
    assert stages(tmp_path) == []


def test_run__repeats_a_stage_whose_files_are_gone_and_all_later_ones(tmp_path):
    stages(tmp_path)
    (tmp_path / "b").unlink()
    assert stages(tmp_path) == ["b", "c"]


def test_run__a_stage_that_fails_while_it_is_repeated_does_not_count(tmp_path):
    stages(tmp_path)
    (tmp_path / "b").unlink()

    def half_done():
        (tmp_path / "b").write_text("half")
        raise RuntimeError("killed")

    with workflow.Run("study", Config(), tmp_path) as run:
        run.stage("a", half_done, [tmp_path / "a"])
        with pytest.raises(RuntimeError):
            run.stage("b", half_done, [tmp_path / "b"])
    assert stages(tmp_path) == ["b", "c"]


def test_run__refuses_a_folder_of_other_settings(tmp_path):
    stages(tmp_path)
    with pytest.raises(errors.FingerprintError, match=r"\(size: stored 10, now 3\)"):
        stages(tmp_path, Config(size=3))
    assert stages(tmp_path) == []


def test_run__refuses_a_file_a_broken_record_and_a_second_run(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(errors.StoreError, match="is a file"):
        stages(tmp_path / "file")
    folder = tmp_path / "run"
    stages(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(errors.StoreError, match="cannot be read"):
        stages(folder)
    with file_lock(tmp_path / "held"):
        code = "import sys; from tests.workflow.test_workflow import Path, stages;"
        done = subprocess.run(
            [sys.executable, "-c", code + "stages(Path(sys.argv[1]))", str(tmp_path / "held")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"LockedError: {tmp_path}/held is in use by process {os.getpid()}" in done.stderr


class Tiny(workflow.Config):
    """Settings of a study in a test."""

    size: int = 3


def squares(study):
    study.save("squares.npz", values=np.arange(study.config.size) ** 2)


def total(study, added):
    study.write("total.json", {"total": int(study.load("squares.npz")["values"].sum()) + added})


def report(study):
    figure = Figure()
    figure.add_subplot().plot([0, 1])
    study.report(
        "Squares",
        "Of small numbers.",
        metrics=study.read("total.json"),
        rows=[("Total", "5", "5")],
        figures=[workflow.Figure("line", "A line", "None.", figure)],
        next_steps="pass",
    )


def tiny(folder, size=3):
    with workflow.Study("tiny", Tiny(size=size), folder, show=False) as study:
        study.stage("squares", squares, "squares.npz")
        study.within("inner").stage("inner", squares, ["squares.npz"])
        study.stage("total", total, "total.json", 1)
        study.stage("report", report, "report/index.html")
    return study


def test_study__does_stages_and_reports_with_seconds_and_settings(tmp_path):
    assert tiny(tmp_path).reused == []
    metrics = json.loads((tmp_path / "report/metrics.json").read_text())
    assert metrics["total"] == 6
    assert metrics["config"] == {"size": 3}
    assert list(metrics["seconds"]) == ["squares", "inner", "total"]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["stages"]["inner"]["outputs"] == ["inner/squares.npz"]
    assert 'src="line.png"' in (tmp_path / "report/index.html").read_text()
    assert tiny(tmp_path).reused == ["squares", "inner", "total", "report"]
    with pytest.raises(errors.FingerprintError, match="size: stored 3, now 4"):
        tiny(tmp_path, 4)


def test_study__a_failure_while_a_file_is_written_leaves_the_old_one_whole(tmp_path, monkeypatch):
    study = workflow.Study("tiny", Tiny(), tmp_path, show=False)
    squares(study)
    study.write("total.json", {"total": 1})

    def cut_off(file, **arrays):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(np, "savez", cut_off)
        with pytest.raises(KeyboardInterrupt):
            study.save("squares.npz", values=np.zeros(3))
    with pytest.raises(ValueError, match="not JSON compliant"):
        study.write("total.json", {"total": float("nan")})
    assert study.load("squares.npz")["values"].tolist() == [0, 1, 4]
    assert study.read("total.json") == {"total": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["squares.npz", "total.json"]


def test_digits__writes_its_report_and_says_where(digits):
    report = digits / "runs/digits/report"
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["samples"] == 1500
    assert metrics["flipped"] == 150
    assert metrics["accuracy"]["clean"] > 0.98
    for name in ("loss_variance", "loss_gain"):
        assert metrics["auroc_flipped"][name] > 0.9
    near = metrics["nearest_neighbor"]
    assert near["same_label"] > 5 * near["chance_same_label"]
    assert near["chance_same_label"] == pytest.approx(0.1, abs=0.01)
    flips = metrics["flipped_nearest_of_another_label"]
    assert flips["same_true_class"] > 2 * flips["chance_same_true_class"]
    assert 0.1 < metrics["agreement_of_half_kernels"] < 1
    page = (report / "index.html").read_text()
    for name in ("map", "correlation", "top_correlated", "gain_against_loss"):
        assert f'src="{name}.png"' in page
        image = imread(report / f"{name}.png")
        assert min(image.shape[:2]) > 500
        assert image.std() > 0.05
    said = (digits / "said.txt").read_text()
    for path in ("runs/digits/report/index.html", "runs/digits/store.zarr"):
        assert path in said
        assert (digits / path).exists()
    assert "lkarray info" in said


def test_digits__flips_a_tenth_of_the_labels_and_no_others(digits):
    losses = lk.open(digits / "runs/digits/store.zarr")["losses"]
    changed = losses["label"].values != losses["true_label"].values
    assert (changed == losses["flipped"].values).all()
    assert changed.mean() == pytest.approx(0.1)


def test_digits__a_second_run_reuses_the_store_and_says_so(digits):
    store = digits / "runs/digits/store.zarr"
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*")}
    result = run_in(digits, "run", "digits", "--preset", "quick")
    assert "The store was complete and was reused" in result.stdout
    assert "digits: sample is done, reused" in result.stderr
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*")} == before


def test_digits__refuses_other_settings_in_the_same_folder(digits):
    result = run_in(digits, "run", "digits", "--preset", "quick", "--set", "seed=5", code=2)
    assert "seed: stored 1, now 5" in result.stderr


def test_digits__killed_runs_resume_to_the_same_numbers(digits, tmp_path):
    command = [sys.executable, "-m", "lkarray", "run", "digits", "--preset", "quick"]
    for seconds in (5.0, 8.0):
        with subprocess.Popen(
            command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ) as process:
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
    run_in(tmp_path, "run", "digits", "--preset", "quick")
    expected, resumed = (
        lk.open(folder / "runs/digits/store.zarr")["losses"].to_dataset().compute()
        for folder in (digits, tmp_path)
    )
    assert resumed.identical(expected)


def run_in(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lkarray", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.filterwarnings("error")
def test_progress__without_ipywidgets_is_plain_and_warns_of_nothing(monkeypatch):
    from tqdm.std import tqdm

    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert type(progress.bar("sampling", total=2)) is tqdm


def test_cli__info_says_what_a_store_holds(digits):
    result = invoke("info", digits / "runs/digits/store.zarr")
    assert result.exit_code == 0
    for text in (
        " stored\n",
        "loss(chain 2, draw 150, sample 1,500)",
        "[150, 150]",
        "label",
        "nbeta: 100.0",
        "/derived/neighbors  neighbor(sample, rank)",
    ):
        assert text in result.output


def test_cli__verify_exits_with_one_and_names_the_piece(store):
    assert invoke("verify", store).exit_code == 0
    (store / "losses/loss/c/0/0/0").unlink()
    result = invoke("verify", store)
    assert result.exit_code == 1
    assert "missing: losses/loss/c/0/0/0" in result.output


def test_cli__errors_are_one_line_and_an_exit_code(tmp_path):
    result = invoke("info", tmp_path / "nothing")
    assert result.exit_code == 1
    assert result.output.startswith("lkarray: there is no store at")
    assert invoke("run", "nothing").exit_code == 2
    assert "there is no workflow 'nothing'" in invoke("run", "nothing").output
    assert invoke("run", "digits", "--set", "seed=-1", "--out", tmp_path / "x").exit_code == 2
    studies = (
        "adversarial adversarial_sweep adversarial_training audit_flips audit_retraining "
        "development digits digits_probe fashion gamma_sweep glosses imagenet imagenet_gradients "
        "imagenet_prototypes ips_map language lenet_audit lenet_training mislabeled_images "
        "modular_arithmetic noise pruning svhn"
    )
    assert invoke("run").output.split() == studies.split()
    assert not (tmp_path / "x").exists()


def test_cli__settings_are_options_too(monkeypatch, tmp_path):
    from lkarray_workflows.studies import digits

    built = []
    monkeypatch.setattr(digits, "run", lambda config, folder, progress: built.append(config) or "")
    words = "--seed=5", "--draws", "70", "--preset", "quick", "--out", tmp_path
    assert invoke("run", "digits", *words).exit_code == 0
    assert built == [digits.Config.build("quick", ["seed=5", "draws=70"])]
    result = invoke("run", "digits", "--sede", "5")
    assert result.exit_code == 2
    assert "setting 'sede' is not one of" in result.output
    assert "unexpected 'seed=5'" in invoke("run", "digits", "seed=5").output


def test_cli__a_folder_in_use_exits_with_three(tmp_path):
    with file_lock(tmp_path):
        result = run_in(tmp_path, "run", "digits", "--out", str(tmp_path), code=3)
    assert "is in use by process" in result.stderr
