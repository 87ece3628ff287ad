"""`lkarray run` as a scheduler calls it: real processes, on a study made for this."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from lkarray import workflow
from lkarray.errors import SettingsError
from lkarray.store import file_lock
from lkarray.store.objects import without_credentials
from lkarray.workflow.scheduling import input_hash, source_hash
from tests.helpers.commands import FIELDS, run, start, stop, told, wait_for

pytestmark = pytest.mark.services

STUDY = """
import multiprocessing, os, subprocess, threading, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from lkarray import workflow
from lkarray.errors import StoreError


class Config(workflow.Config):
    size: int = 1
    data: Path | None = None
    fault: str = ""


def run(config, folder, *, progress):
    with workflow.Run("fake", config, folder) as run:
        index = folder / "report" / "index.html"
        run.stage("first", lambda: (folder / "first").write_text("1"), [folder / "first"])
        run.stage("second", lambda: second(config, index), [index])
    return "closing words"


def second(config, index):
    print("printed by Python")
    subprocess.run(["echo", "printed by a child"])
    if config.fault and not Path("mended").exists():
        globals()[config.fault]()
    index.parent.mkdir(exist_ok=True)
    (index.parent / "metrics.json").write_text("{}")
    index.write_text("page")


def named():
    raise StoreError("no file at https://me:secret@host/x?token=hidden")


def unexpected():
    raise KeyError("surprise")


def slow():
    print("waiting", flush=True)
    time.sleep(60)


def deaf():
    try:
        slow()
    except BaseException:
        time.sleep(60)


def wrapped():
    try:
        slow()
    except BaseException:
        raise RuntimeError("a worker is gone")


def threaded():
    threading.Thread(target=time.sleep, args=(60,)).start()
    slow()


def pooled():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        Path("child").write_text(str(pool.submit(os.getpid).result()))
        pool.submit(time.sleep, 60)
        slow()
"""


@pytest.fixture
def study(tmp_path):
    """A folder in which the study ``fake`` is installed, and its source."""
    package = tmp_path / "site"
    info = package / "fake-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lkarray.workflows]\nfake = fake_study\n")
    (package / "fake_study.py").write_text(STUDY)
    return package / "fake_study.py"


def test_json__of_a_run_that_is_done(study, tmp_path):
    said = run(tmp_path, "fake", "--out", "out")
    folder = tmp_path / "out"
    assert (said.workflow, said.status, said.exit_code, said.error) == ("fake", "done", 0, None)
    assert (said.folder, said.report) == (str(folder), f"{folder}/report/index.html")
    assert said.metrics == f"{folder}/report/metrics.json"
    assert list(said.stages) == ["first", "second"]
    assert said.reused == []
    assert said.seconds >= sum(said.stages.values())
    for text in ("printed by Python", "printed by a child", " INFO fake: second"):
        assert text in said.err
    assert run(tmp_path, "fake", "--out", "out").reused == ["first", "second"]


def test_json__without_it_people_read_the_closing_words(study, tmp_path):
    out, _ = start(tmp_path, "fake").communicate()
    assert sorted(out.splitlines()) == ["closing words", "printed by Python", "printed by a child"]


def test_json__of_a_failure_that_lkarray_names_has_no_credentials(study, tmp_path):
    said = run(tmp_path, "fake", "--fault", "named")
    assert (said.status, said.exit_code) == ("failed", 1)
    assert said.error == "no file at https://host/x"
    assert list(said.stages) == ["first"]
    assert said.report is None
    assert "Traceback" not in said.err


def test_json__of_a_failure_that_nobody_expected_has_a_traceback_beside_it(study, tmp_path):
    said = run(tmp_path, "fake", "--fault", "unexpected")
    assert (said.status, said.exit_code, said.error) == ("failed", 1, "'surprise'")
    assert "Traceback" in said.err
    (tmp_path / "mended").touch()
    said = run(tmp_path, "fake", "--fault", "unexpected")
    assert (said.status, said.reused) == ("done", ["first"])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nothing"], "there is no workflow 'nothing'"),
        ([], "name the workflow"),
        (["fake", "--sise", "3"], "'sise' is not one of"),
        (["fake", "--size", "many"], "size: "),
        (["fake", "size=3"], "unexpected 'size=3'"),
        (["fake", "--preset"], "'--preset' requires an argument"),
        (["fake", "--if-changed", "--data", "gone"], "cannot read gone"),
        (["fake", "--if-changed", "--data", "empty"], "empty is empty"),
        (["fake", "--if-changed", "--data", "."], "lies in"),
    ],
)
def test_json__of_what_is_refused_before_anything_is_made(study, tmp_path, words, error):
    (tmp_path / "empty").mkdir()
    said = told(start(tmp_path, "--json", *words)) if "--preset" in words else run(tmp_path, *words)
    assert (said.status, said.exit_code, said.stages) == ("refused", 2, {})
    assert error in said.error
    assert not (tmp_path / "runs").exists()


def test_json__other_settings_in_the_same_folder_are_refused(study, tmp_path):
    run(tmp_path, "fake", "--out", "out")
    said = run(tmp_path, "fake", "--out", "out", "--size", "2")
    assert (said.status, said.exit_code) == ("refused", 2)
    assert "size: stored 1, now 2" in said.error


@pytest.mark.parametrize("words", [[], ["--if-changed"]])
def test_json__a_folder_in_use_is_locked_and_the_line_says_by_whom(study, tmp_path, words):
    with file_lock(tmp_path / "out"):
        said = run(tmp_path, "fake", "--out", "out", *words)
    assert (said.status, said.exit_code) == ("locked", 3)
    assert f"is in use by process {os.getpid()}" in said.error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop__ends_at_once_and_the_next_run_goes_on(study, tmp_path, number):
    words = "fake", "--if-changed", "--fault", "slow"
    process = start(tmp_path, *words, "--json")
    wait_for(process, "waiting")
    said, seconds = stop(process, number)
    assert (said.status, said.exit_code) == ("stopped", 128 + number)
    assert said.err.splitlines()[-1] == "lkarray: stopped; run again to continue"
    assert list(said.stages) == ["first"]
    assert seconds < 4
    (tmp_path / "mended").touch()
    said = run(tmp_path, *words)
    assert (said.status, said.reused) == ("done", ["first"])


@pytest.mark.parametrize("fault", ["wrapped", "deaf", "threaded", "pooled"])
def test_stop__what_does_not_end_by_itself_is_ended_with_its_children(study, tmp_path, fault):
    process = start(tmp_path, "fake", "--fault", fault, "--json")
    wait_for(process, "waiting")
    said, seconds = stop(process)
    assert said.status == "stopped"
    assert said.err.count("lkarray: stopped; run again to continue") == 1
    assert seconds < 10
    if fault == "pooled":
        child = int((tmp_path / "child").read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    with file_lock(tmp_path / "runs" / "fake"):
        pass


def test_if_changed__each_change_has_a_folder_of_its_own(study, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.csv").write_text("1")
    words = "fake", "--if-changed", "--data", "data", "--out", "out"
    latest = tmp_path / "out" / "latest"

    def made(*more, status="done"):
        said = run(tmp_path, *words, *more)
        assert said.status == status
        assert latest.resolve() == Path(said.folder)
        return said.folder

    folders = [made()]
    assert made(status="unchanged") == folders[0]
    folders.append(made("--size", "2"))
    assert made("--size=2", "--set", "fault=", status="unchanged") == folders[1]
    (data / ".seen").write_text("names with a dot do not count")
    assert made(status="unchanged") == folders[0]
    (data / "rows.csv").write_text("1, 2")
    folders.append(made())
    study.write_text(STUDY.replace("page", "another page"))
    folders.append(made())
    assert len(set(folders)) == 4
    for folder in folders:
        assert (Path(folder) / "report" / "index.html").exists()
    record = json.loads((latest / "run.json").read_text())
    assert record["inputs"] == {"data": input_hash(data)}
    assert record["finished"] >= record["stages"]["second"]["ended"][:19]


def test_if_changed__a_file_that_is_gone_from_a_complete_run_is_made_again(study, tmp_path):
    folder = Path(run(tmp_path, "fake", "--if-changed").folder)
    shutil.rmtree(folder / "report")
    said = run(tmp_path, "fake", "--if-changed")
    assert (said.status, said.folder, said.reused) == ("done", str(folder), ["first"])


def test_if_changed__a_run_that_failed_is_no_run_to_keep(study, tmp_path):
    words = "fake", "--if-changed", "--fault", "named"
    assert run(tmp_path, *words).status == "failed"
    assert not (tmp_path / "runs" / "fake" / "latest").exists()
    assert run(tmp_path, *words).status == "failed"
    (tmp_path / "mended").touch()
    assert run(tmp_path, *words).status == "done"


def test_if_changed__a_folder_where_links_cannot_be_made_is_told(study, tmp_path):
    (tmp_path / "out" / "latest").mkdir(parents=True)
    said = run(tmp_path, "fake", "--if-changed", "--out", "out")
    assert said.status == "done"
    assert "WARNING cannot link out/latest" in said.err


def test_run__is_finished_only_when_the_study_returns(tmp_path):
    from lkarray.workflow.running import finish, is_complete

    with workflow.Run("study", workflow.Config(), tmp_path) as state:
        state.stage("a", (tmp_path / "a").touch, [tmp_path / "a"])
    assert not is_complete(tmp_path)
    finish(tmp_path, {})
    assert is_complete(tmp_path)
    before = (tmp_path / "run.json").stat().st_mtime_ns
    finish(tmp_path, {})
    assert (tmp_path / "run.json").stat().st_mtime_ns == before
    (tmp_path / "a").unlink()
    with workflow.Run("study", workflow.Config(), tmp_path) as state:
        state.stage("a", (tmp_path / "a").touch, [tmp_path / "a"])
    assert not is_complete(tmp_path)


def test_source_hash__follows_imports_of_the_package_and_no_others(tmp_path, monkeypatch):
    package = tmp_path / "made_up"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "sub" / "__init__.py").write_text("from . import deep")
    (package / "sub" / "deep.py").touch()
    (package / "study.py").write_text(
        "import numpy\nfrom made_up import common\nimport made_up.sub"
    )
    (package / "common.py").write_text("raise RuntimeError('imported')")
    (package / "other.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    seen = {source_hash("made_up.study")}
    for name in ("common", "study", "sub/__init__", "sub/deep"):
        path = package / f"{name}.py"
        path.write_text(path.read_text() + "\n# edited")
        seen.add(source_hash("made_up.study"))
    assert len(seen) == 5
    (package / "other.py").write_text("edited = True")
    assert source_hash("made_up.study") in seen
    with pytest.raises(SettingsError, match="the source of nowhere"):
        source_hash("nowhere.study")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at s3://key:p/w@host/a?X-Amz=1 now", "at s3://host/a now"),
        ("'https://u:p@h:80/a@b?q'", "'https://h:80/a@b'"),
        ("u:p@h is no URL; see lkarray.io?", "u:p@h is no URL; see lkarray.io?"),
    ],
)
def test_without_credentials__keeps_the_rest(text, shown):
    assert without_credentials(text) == shown


def test_docs__have_every_field_and_exit_code():
    page = (Path(__file__).parents[2] / "docs" / "scheduling.md").read_text()
    for word in [*FIELDS, "done", "unchanged", "failed", "refused", "locked", "stopped"]:
        assert f"`{word}`" in page
    for link in re.findall(r"\]\((\.\./[^)]+)\)", page):
        assert (Path(__file__).parents[2] / "docs" / link).exists()
