"""The settings of Dask in `cluster/`, and the jobs and clusters that come of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask.config
import pytest
import yaml
from distributed import Client
from distributed.system import MEMORY_LIMIT

import lkarray as lk
from lkarray import errors
from tests.helpers.deployment import SLURM, TLS, keys_of, said
from tests.helpers.services import Slurm

pytestmark = pytest.mark.services


def defaults_of(package: str, name: str) -> dict[str, Any]:
    """Return the configuration that a package has of its own."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return yaml.safe_load(Path(spec.origin).with_name(name).read_text())


@pytest.mark.parametrize(
    ("path", "package"),
    [(SLURM / "jobqueue.yaml", "dask_jobqueue"), (TLS / "dask.yaml", "distributed")],
    ids=["jobqueue.yaml", "dask.yaml"],
)
def test_dask_settings__are_known_to_their_package(path: Path, package: str) -> None:
    pytest.importorskip(package)
    name = path.name if package == "dask_jobqueue" else "distributed.yaml"
    known = {key for key, _ in keys_of(defaults_of(package, name))}
    collected = dask.config.collect([str(path)], env={})
    given = dict(keys_of(collected))
    free = {key for key in given if key.startswith("jobqueue.slurm.scheduler-options.")}
    assert given.keys() - free <= known
    assert {key.rpartition(".")[2] for key in free} <= {"dashboard_address"}


@pytest.fixture
def jobqueue(tmp_path: Path) -> Iterator[None]:
    """Dask as a user has it who copied jobqueue.yaml, with logs and a dashboard of our own."""
    pytest.importorskip("dask_jobqueue")
    ours = dict(keys_of(yaml.safe_load((SLURM / "jobqueue.yaml").read_text())))
    dashboard = "jobqueue.slurm.scheduler-options.dashboard_address"
    assert ours[dashboard] == "127.0.0.1:8787"
    ours |= {dashboard: "127.0.0.1:0", "jobqueue.slurm.log-directory": str(tmp_path)}
    with dask.config.set(ours):
        yield


@pytest.mark.usefixtures("jobqueue")
def test_jobqueue_settings__make_the_job_they_say(tmp_path: Path) -> None:
    from dask_jobqueue.slurm import SLURMJob

    script = SLURMJob("tcp://127.0.0.1:8786", name="lkarray-worker").job_script()
    path = tmp_path / "job.sh"
    path.write_text(script)
    said("bash", "-n", path)
    lines = script.splitlines()
    for line in ("-n 1", "--cpus-per-task=8", "--mem=32G", "-t 02:00:00"):
        assert f"#SBATCH {line}" in lines
    (worker,) = (line for line in lines if "dask_worker" in line)
    assert lines.index("export OMP_NUM_THREADS=1") < lines.index(worker)
    for option in ("--nthreads 8", "--memory-limit 32.00GiB", "--interface lo", "--no-dashboard"):
        assert option in worker


@pytest.mark.usefixtures("jobqueue")
def test_jobqueue_settings__start_workers_that_compute(slurm: Slurm) -> None:
    from dask_jobqueue import SLURMCluster

    def threads() -> str | None:
        return os.environ.get("OMP_NUM_THREADS")

    with SLURMCluster() as cluster, Client(cluster) as client:
        cluster.scale(jobs=1)
        client.wait_for_workers(1, timeout=60)
        workers = client.scheduler_info()["workers"].values()
        assert {(w["nthreads"], w["memory_limit"]) for w in workers} == {
            (8, min(2**35, MEMORY_LIMIT))  # of the job, or of the machine
        }
        assert set(client.run(threads).values()) == {"1"}
        assert client.submit(sum, [1, 2, 3]).result() == 6
        assert "lkarray-worker" in slurm.call("squeue", "--noheader", "--format=%j")


@pytest.mark.usefixtures("jobqueue")
def test_connect__wins_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import dask_jobqueue

    made: list[dict[str, Any]] = []

    def cluster(**options: Any) -> None:
        made.append(options["scheduler_options"])
        raise OSError("not started")

    monkeypatch.setattr(dask_jobqueue, "SLURMCluster", cluster)
    mine = {"dashboard_address": "127.0.0.1:9998"}
    file = {"jobqueue.slurm.scheduler-options": {"dashboard_address": "127.0.0.1:9997"}}
    for given in ({}, {"dashboard": "127.0.0.1:9999"}, {"scheduler_options": mine}):
        with dask.config.set(file), pytest.raises(errors.ClusterError, match="not started"):
            lk.cluster.connect("slurm", **given)  # type: ignore[arg-type]
    ports = [options["dashboard_address"].rpartition(":")[2] for options in made]
    assert ports == ["9997", "9999", "9998"]


@pytest.mark.usefixtures("jobqueue", "slurm")
def test_connect__starts_secured_jobs(certificates: Path) -> None:
    with lk.cluster.connect("slurm", tls=certificates, dashboard="127.0.0.1:0") as client:
        assert client.scheduler.address.startswith("tls://127.0.0.1:")
        assert client.submit(sum, [1, 2, 3]).result() == 6
