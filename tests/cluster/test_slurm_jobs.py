"""`cluster/slurm`: its batch files run on a real Slurm."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.deployment import SLURM
from tests.helpers.services import Slurm, wait_for

pytestmark = pytest.mark.services
BATCH = sorted(SLURM.glob("*.sbatch"))
MEBIBYTE = 2**20

# --- Slurm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
def test_batch_files__are_accepted_by_slurm(path: Path, slurm: Slurm, tmp_path: Path) -> None:
    told = slurm.call("sbatch", "--test-only", str(path), "digits", cwd=tmp_path)
    assert re.search(r"Job \d+ to start at", told), told


def over(state: str) -> bool:
    return state.split()[0] in {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


def pretend(folder: Path, script: str) -> str:
    """Make a virtual environment whose `lkarray` is a script; return its path."""
    program = folder / "pretended" / "bin" / "lkarray"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/usr/bin/env bash\n{script}\n")
    program.chmod(0o755)
    return str(program.parents[1])


def log_of(folder: Path, job: str) -> str:
    return "".join(path.read_text() for path in folder.glob(f"*-{job}.log"))


def test_slurm_job__tries_later_when_the_run_is_in_use(slurm: Slurm, tmp_path: Path) -> None:
    venv = pretend(tmp_path, "[[ ${SLURM_RESTART_COUNT:-0} == 1 ]] || exit 3")
    script = str(SLURM / "lkarray.sbatch")
    job = slurm.submit(script, "digits", cwd=tmp_path, LKARRAY_VENV=venv)
    assert slurm.wait(job, over) == "COMPLETED 0:0"
    assert "stopped with code 3" in log_of(tmp_path, job)


def test_slurm_job__fails_when_the_run_fails_or_makes_no_progress(
    slurm: Slurm, tmp_path: Path
) -> None:
    script = str(SLURM / "lkarray.sbatch")
    failing = slurm.submit(
        script, "digits", cwd=tmp_path, LKARRAY_VENV=pretend(tmp_path / "a", "exit 1")
    )
    stuck = slurm.submit(
        script,
        "digits",
        cwd=tmp_path,
        LKARRAY_RESTARTS="0",
        LKARRAY_VENV=pretend(tmp_path / "b", "exit 3"),
    )
    assert slurm.wait(failing, over) == "FAILED 1:0"
    assert slurm.wait(stuck, over) == "FAILED 1:0"
    assert "requeued 0 times and not done" in log_of(tmp_path, stuck)


def test_slurm_job__can_be_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    venv = pretend(tmp_path, "touch began; exec sleep 100")
    script = str(SLURM / "lkarray.sbatch")
    job = slurm.submit(script, "digits", cwd=tmp_path, LKARRAY_VENV=venv)
    wait_for((tmp_path / "began").exists, bool)
    slurm.call("scancel", job)
    assert slurm.wait(job, over).startswith("CANCELLED")


@pytest.fixture
def venv(tmp_path: Path) -> str:
    """A virtual environment's folder whose programs are this one's."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name, module in {"lkarray": "lkarray", "dask": "dask", "python": ""}.items():
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {module and "-m " + module} "$@"\n')
        path.chmod(0o755)
    return str(programs.parent)


TINY = """
import time
from typing import ClassVar
from lkarray import workflow

class Config(workflow.Config):
    presets: ClassVar = {"quick": {"seed": 7}}
    seed: int = 0

def run(config, folder, *, progress=True):
    first, second, began = folder / "first", folder / "second", folder / "began"

    def takes_long_the_first_time():
        if not began.exists():
            began.touch()
            time.sleep(200)
        second.touch()

    with workflow.Run("tiny", config, folder) as state:
        state.stage("first", first.touch, [first])
        state.stage("second", takes_long_the_first_time, [second])
    return "done"
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A folder for PYTHONPATH, in which the workflow `tiny` is installed."""
    about = tmp_path / "site" / "tiny-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[lkarray.workflows]\ntiny = tiny_study\n")
    (about.parent / "tiny_study.py").write_text(TINY)
    return str(about.parent)


def results_of(folder: Path, job: str) -> list[dict[str, Any]]:
    """Return the lines of JSON in a job's log."""
    lines = log_of(folder, job).splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_slurm_job__goes_on_after_its_time_limit_and_is_not_done_twice(
    slurm: Slurm, tmp_path: Path, venv: str, tiny: str
) -> None:
    words = (str(SLURM / "lkarray.sbatch"), "tiny", "quick", "out", "--seed", "8")
    job = slurm.submit(*words, cwd=tmp_path, LKARRAY_VENV=venv, PYTHONPATH=tiny)
    wait_for(lambda: list(tmp_path.glob("out/**/began")), bool)
    # What Slurm sends two minutes ahead of the limit, by --signal=B:USR1@120.
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait(job, over) == "COMPLETED 0:0"
    last = results_of(tmp_path, job)[-1]
    assert last["status"] == "done"
    assert last["reused"] == ["first"]

    again = slurm.submit(*words, cwd=tmp_path, LKARRAY_VENV=venv, PYTHONPATH=tiny)
    assert slurm.wait(again, over) == "COMPLETED 0:0"
    assert [line["status"] for line in results_of(tmp_path, again)] == ["unchanged"]


@pytest.mark.slow
def test_slurm_job__runs_the_digits(slurm: Slurm, tmp_path: Path, venv: str) -> None:
    script = str(SLURM / "lkarray.sbatch")
    job = slurm.submit(script, "digits", "quick", "out", cwd=tmp_path, LKARRAY_VENV=venv)
    assert slurm.wait(job, over, 240) == "COMPLETED 0:0", log_of(tmp_path, job)
    assert Path(results_of(tmp_path, job)[-1]["report"]).exists()


PROGRAM = """
import os
from distributed import Client
with Client(os.environ["DASK_SCHEDULER_ADDRESS"]) as client:
    client.wait_for_workers(2, timeout=40)
    workers = client.scheduler_info()["workers"].values()
    shapes = {(worker["nthreads"], worker["memory_limit"]) for worker in workers}
    blas = set(client.run(lambda: os.environ["OMP_NUM_THREADS"]).values())
    scheme = client.scheduler.address.split(":")[0]
    print("reached", scheme, shapes, blas, client.submit(sum, [1, 2]).result())
"""


def test_slurm_cluster__computes_in_one_allocation_with_certificates(
    slurm: Slurm, tmp_path: Path, venv: str, certificates: Path
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    job = slurm.submit(
        "--cpus-per-task=1",
        "--mem-per-cpu=1000M",
        str(SLURM / "cluster.sbatch"),
        "python",
        "program.py",
        cwd=tmp_path,
        LKARRAY_VENV=venv,
        LKARRAY_INTERFACE="lo",
        LKARRAY_TLS=str(certificates),
        LKARRAY_SCRATCH=str(tmp_path),
    )
    state, log = slurm.wait(job, over, 90), log_of(tmp_path, job)
    assert state == "COMPLETED 0:0", log
    assert f"reached tls {{(1, {900 * MEBIBYTE})}} {{'1'}} 3" in log, log
    assert not list(tmp_path.glob("scheduler-*.json"))
    assert "dashboard at:  http://127.0.0.1:" in log


def test_slurm_cluster__starts_nothing_without_certificates(
    slurm: Slurm, tmp_path: Path, venv: str
) -> None:
    job = slurm.submit(str(SLURM / "cluster.sbatch"), "true", cwd=tmp_path, LKARRAY_VENV=venv)
    assert slurm.wait(job, over) == "FAILED 2:0"
    assert "has no key.pem" in log_of(tmp_path, job)
