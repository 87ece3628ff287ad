"""`lkarray run digits` as a scheduler calls it: stopped, killed, finished and unchanged."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.commands import run, start, stop, told, wait_for

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def nightly(tmp_path_factory):
    """A folder in which digits was stopped, killed and then finished, and what was said."""
    folder = tmp_path_factory.mktemp("nightly")
    words = "digits", "--preset", "quick", "--if-changed", "--json"
    process = start(folder, *words)
    wait_for(process, "digits: train")
    stopped, seconds = stop(process)
    process = start(folder, *words)
    wait_for(process, "digits: sample")
    time.sleep(1)
    process.kill()
    process.communicate()
    return SimpleNamespace(
        folder=folder, stopped=stopped, seconds=seconds, done=told(start(folder, *words))
    )


def test_digits__stopped_while_it_trains_ends_at_once(nightly):
    assert (nightly.stopped.status, nightly.stopped.exit_code) == ("stopped", 143)
    assert list(nightly.stopped.stages) == ["data"]
    assert nightly.seconds < 6


def test_digits__stopped_and_killed_it_comes_to_the_same_numbers(nightly, digits):
    assert nightly.done.status == "done"
    assert nightly.done.reused == ["data", "train"]
    expected, resumed = (
        json.loads(Path(path).read_text())
        for path in (digits / "runs/digits/report/metrics.json", nightly.done.metrics)
    )
    del expected["seconds"], resumed["seconds"]
    assert resumed == expected


def test_digits__unchanged_it_runs_no_stage_and_does_not_load_torch(nightly):
    files = {p: p.stat().st_mtime_ns for p in Path(nightly.done.folder).rglob("*")}
    words = "digits", "--preset", "quick", "--if-changed"
    said = run(nightly.folder, *words, python=("-X", "importtime"))
    assert (said.status, said.folder) == ("unchanged", nightly.done.folder)
    assert said.seconds < 2
    assert said.stages == nightly.done.stages
    imported = {line.rpartition("|")[2].strip() for line in said.err.splitlines()}
    assert "lkarray.workflow" in imported
    assert "torch" not in imported
    assert " INFO " not in said.err
    assert {p: p.stat().st_mtime_ns for p in Path(said.folder).rglob("*")} == files
