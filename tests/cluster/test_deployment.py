"""The files of `cluster/`: each judged by the tool that will read it."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import dask.config
import psutil
import pytest
import yaml
from distributed import Client, LocalCluster, Security
from distributed.system import MEMORY_LIMIT

import lkarray as lk
from lkarray import errors
from lkarray._version import __version__
from lkarray.cli import main
from tests.helpers.services import Slurm, wait_for

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SLURM, KUBERNETES, SYSTEMD, TLS = (
    CLUSTER / name for name in ("slurm", "kubernetes", "systemd", "tls")
)
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
SCRIPTS = sorted([*SLURM.glob("*.sbatch"), *TLS.glob("*.sh")])
BATCH = sorted(SLURM.glob("*.sbatch"))
README = CLUSTER / "README.md"
MEBIBYTE = 2**20


def said(*command: str | Path, code: int | None = 0, **options: Any) -> str:
    """Return what a command wrote on both channels, its exit code being as expected."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    assert code is None or done.returncode == code, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def needs(program: str, package: str) -> str:
    """Return the path of a program, or skip."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"no {program} here: apt-get install --yes {package}")
    return path


def command_is_known(words: list[str]) -> None:
    """Fail unless the command line takes these words, every option being one of its own."""
    command: click.Command = main
    context = click.Context(main, info_name="lkarray")
    while isinstance(command, click.Group):
        name, words = words[0], words[1:]
        inner = command.get_command(context, name)
        assert inner is not None, f"lkarray has no command {name!r}"
        command = inner
    left = command.make_context(name, list(words), parent=context).params.get("rest", ())
    assert not left, f"lkarray {name} has no options {left}"


# --- Shell ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts__are_bash_and_stop_at_the_first_error(path: Path) -> None:
    said("bash", "-n", path)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    if shellcheck := shutil.which("shellcheck"):
        said(shellcheck, path)


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


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    folder = tmp_path / "tls"
    said(TLS / "make_certificates.sh", folder, "localhost", "127.0.0.1", "::1", "*.example.org")
    return folder


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


# --- Dask's configuration ------------------------------------------------------------------


def keys_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a configuration and their values."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


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


# --- Certificates --------------------------------------------------------------------------


def test_certificates__are_valid_for_the_names_and_readable_by_their_owner(
    certificates: Path,
) -> None:
    told = said(
        "openssl",
        "verify",
        "-x509_strict",
        "-CAfile",
        certificates / "ca.pem",
        certificates / "cert.pem",
    )
    assert told.strip().endswith("OK")
    text = said("openssl", "x509", "-in", certificates / "cert.pem", "-noout", "-text")
    names = re.findall(r"(?:DNS|IP Address):([^,\s]+)", text)
    assert names == ["localhost", "127.0.0.1", "0:0:0:0:0:0:0:1", "*.example.org"]
    assert "TLS Web Server Authentication, TLS Web Client Authentication" in text
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in certificates.iterdir()}
    assert modes == {"ca.pem": 0o644, "cert.pem": 0o644, "key.pem": 0o600}
    assert stat.S_IMODE(certificates.stat().st_mode) == 0o700


def test_certificates__are_not_overwritten(certificates: Path) -> None:
    before = {path: path.read_bytes() for path in certificates.iterdir()}
    told = said(TLS / "make_certificates.sh", certificates, "localhost", code=1)
    assert "is not overwritten" in told
    assert {path: path.read_bytes() for path in certificates.iterdir()} == before


@pytest.mark.parametrize("words", [[], ["only-a-folder"], ["folder", "no host"], ["folder", "-x"]])
def test_certificates__of_no_host_are_refused(words: list[str], tmp_path: Path) -> None:
    said(TLS / "make_certificates.sh", *words, code=2, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def security(folder: Path) -> Security:
    pair = {
        f"tls_{who}_{what}": str(folder / f"{what}.pem")
        for who in ("client", "scheduler", "worker")
        for what in ("cert", "key")
    }
    return Security(require_encryption=True, tls_ca_file=str(folder / "ca.pem"), **pair)


def tls_settings(certificates: Path) -> dict[str, Any]:
    """Return what tls/dask.yaml says, of another folder."""
    text = (TLS / "dask.yaml").read_text().replace("/etc/lkarray/tls", str(certificates))
    return dict(keys_of(yaml.safe_load(text)))


@pytest.fixture
def secured(certificates: Path) -> Iterator[str]:
    """The address of a cluster that wants certificates, as tls/dask.yaml sets it up."""
    with (
        dask.config.set(tls_settings(certificates)),
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            host="127.0.0.1",
            dashboard_address=None,
            security=Security(),
        ) as cluster,
    ):
        assert cluster.scheduler_address.startswith("tls://127.0.0.1:")
        address = cluster.scheduler_address
        with Client(address) as client:  # by the same file
            assert client.submit(sum, [1, 2, 3]).result(timeout=20) == 6
        yield address


def refused(address: str, security: Security | None) -> None:
    with pytest.raises(OSError):  # of a closed connection, or of a certificate that does not match
        Client(address, security=security, timeout=2)


def test_certificates__let_in_who_holds_them_and_nobody_else(
    secured: str, certificates: Path, tmp_path: Path
) -> None:
    with Client(secured, security=security(certificates)) as client:
        assert client.submit(sum, [1, 2, 3]).result(timeout=20) == 6

    others = tmp_path / "others"
    said(TLS / "make_certificates.sh", others, "localhost", "127.0.0.1")
    with dask.config.set({"distributed.comm.require-encryption": False}):
        refused(secured.replace("tls://", "tcp://"), Security(require_encryption=False))
        refused(secured, security(others))

    host, port = secured.removeprefix("tls://").split(":")
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    with (
        socket.create_connection((host, int(port)), timeout=5) as raw,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        ask_without_certificate(context, raw, host)


def ask_without_certificate(context: ssl.SSLContext, raw: socket.socket, host: str) -> None:
    """Talk to a scheduler knowing its authority, without a certificate of one's own."""
    with context.wrap_socket(raw, server_hostname=host) as channel:
        channel.sendall(bytes(64))
        if not channel.recv(1):
            raise ConnectionError("closed")


def test_certificates__are_used_by_hosts_reached_by_ssh(
    ssh_options: dict[str, Any], certificates: Path
) -> None:
    with (
        dask.config.set(tls_settings(certificates)),
        lk.cluster.connect(
            "ssh://127.0.0.1", threads=1, dashboard="127.0.0.1:0", **ssh_options
        ) as client,
    ):
        assert client.scheduler.address.startswith("tls://127.0.0.1:")
        assert client.submit(sum, [1, 2, 3]).result() == 6
        worker = psutil.Process(*client.run(os.getpid).values())
        started = [worker, worker.parent(), psutil.Process(client.run_on_scheduler(os.getpid))]
        listening = {
            (process.pid, c.laddr.ip)
            for process in started
            for c in process.net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        }
    assert len({pid for pid, _ in listening}) == 3  # worker, its nanny, scheduler
    assert {address for _, address in listening} == {"127.0.0.1"}


# --- Kubernetes ----------------------------------------------------------------------------


def manifests() -> list[Any]:
    out = []
    for path in sorted(KUBERNETES.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            out.append(pytest.param(document, id=f"{path.name}-{document['kind']}"))
    return out


def strict(schema: Any) -> Any:
    """Return a schema of a CRD in which fields that it does not name are errors."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {
        key: {name: strict(field) for name, field in value.items()}
        if key == "properties"
        else strict(value)
        for key, value in schema.items()
    }
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out


def crd(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a Dask resource that ships with dask-kubernetes."""
    spec = find_spec("dask_kubernetes")
    assert spec is not None
    assert spec.origin is not None
    name = f"{document['kind'].lower()}.yaml"
    charts = Path(spec.origin).parent / "operator" / "deployment" / "helm"
    (path,) = charts.glob(f"*/crds/{name}")
    (definition,) = yaml.safe_load_all(path.read_text())
    group, version = document["apiVersion"].split("/")
    assert definition["spec"]["group"] == group
    (served,) = (v for v in definition["spec"]["versions"] if v["name"] == version)
    schema = strict(served["schema"]["openAPIV3Schema"])
    schema["properties"] |= {key: {} for key in ("apiVersion", "kind", "metadata")}
    return schema


def judge(document: Mapping[str, Any]) -> None:
    """Fail where Kubernetes would."""
    if document["apiVersion"].startswith("kubernetes.dask.org/"):
        import jsonschema

        jsonschema.validate(document, crd(document))
    else:
        import kubernetes_validate

        kubernetes_validate.validate(document, "1.31", strict=True)


@pytest.mark.parametrize("document", manifests())
def test_manifests__are_what_kubernetes_takes(document: dict[str, Any]) -> None:
    pytest.importorskip("dask_kubernetes")
    pytest.importorskip("kubernetes_validate")
    judge(document)


@pytest.mark.parametrize("document", manifests())
def test_manifests__with_a_field_nobody_knows_would_be_noticed(document: dict[str, Any]) -> None:
    pytest.importorskip("dask_kubernetes")
    pytest.importorskip("kubernetes_validate")
    wrong = copy.deepcopy(document)
    pod = pod_specs(wrong)
    (pod[0]["containers"][0] if pod else wrong["spec"])["imagePulPolicy"] = "Always"
    with pytest.raises(Exception, match="imagePulPolicy"):
        judge(wrong)


def pod_specs(document: Any) -> list[dict[str, Any]]:
    """Return the pods that a manifest describes."""
    if isinstance(document, list):
        return [pod for item in document for pod in pod_specs(item)]
    if not isinstance(document, dict):
        return []
    own = [document] if "containers" in document else []
    return own + [pod for value in document.values() for pod in pod_specs(value)]


def test_pods__run_as_nobody_within_limits_and_mount_what_there_is() -> None:
    documents = [parameter.values[0] for parameter in manifests()]
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    pods = pod_specs(documents)
    assert len(pods) == 3
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim")
            assert claim is None or claim["claimName"] in claims
        for container in pod["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert "memory" in container["resources"]["limits"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
            assert container["image"].endswith(f":{__version__}")


def test_cron_job__runs_one_at_a_time_and_knows_the_exit_codes() -> None:
    job = yaml.safe_load((KUBERNETES / "cronjob.yaml").read_text())["spec"]
    assert job["concurrencyPolicy"] == "Forbid"
    spec = job["jobTemplate"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # or no podFailurePolicy works
    rules = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert rules == {3: "Ignore", 2: "FailJob"}
    command_is_known(container["args"])


def test_dask_cluster__is_reached_by_name_and_keeps_workers_in_their_limit() -> None:
    (cluster, policy) = yaml.safe_load_all((KUBERNETES / "daskcluster.yaml").read_text())
    name = cluster["metadata"]["name"]
    assert cluster["spec"]["scheduler"]["service"]["selector"]["dask.org/cluster-name"] == name
    assert policy["spec"]["podSelector"]["matchLabels"] == {"dask.org/cluster-name": name}
    (scheduler,) = cluster["spec"]["scheduler"]["spec"]["containers"]
    (worker,) = cluster["spec"]["worker"]["spec"]["containers"]
    assert "127.0.0.1:8787" in scheduler["args"]
    words, limits = worker["args"], worker["resources"]["limits"]
    threads = words[words.index("--nthreads") + 1]
    memory = words[words.index("--memory-limit") + 1]
    assert threads == limits["cpu"]
    pod = dask.utils.parse_bytes(limits["memory"].replace("Gi", "GiB"))
    assert 0.85 < dask.utils.parse_bytes(memory) / pod < 0.95
    assert {"name": "OMP_NUM_THREADS", "value": "1"} in worker["env"]
    for container in (scheduler, worker):
        dask_command_is_known(container)


def dask_command_is_known(container: Mapping[str, Any]) -> None:
    """Fail unless a container starts Dask with options that it has, whatever the image starts."""
    assert container["command"] == ["dask"]
    program, *words = container["args"]
    told = said(sys.executable, "-m", "dask", program, "--help")
    for option in (word for word in words if word.startswith("--")):
        assert option in told


def test_connect__makes_a_dask_cluster_that_kubernetes_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operator = pytest.importorskip("dask_kubernetes.operator")
    made: list[dict[str, Any]] = []

    def cluster(**options: Any) -> None:
        made.append(options)
        raise OSError("there is no Kubernetes here")

    monkeypatch.setattr(operator, "KubeCluster", cluster)
    with pytest.raises(errors.ClusterError, match="there is no Kubernetes here"):
        lk.cluster.connect("kubernetes", image="mine", threads=4, memory="9 GiB", namespace="n")
    (options,) = made
    spec = options.pop("custom_cluster_spec")
    assert options == {"namespace": "n"}
    judge(spec)
    (scheduler,) = spec["spec"]["scheduler"]["spec"]["containers"]
    (worker,) = spec["spec"]["worker"]["spec"]["containers"]
    assert {scheduler["image"], worker["image"]} == {"mine"}
    assert spec["spec"]["worker"]["replicas"] == 1
    assert {"name": "OMP_NUM_THREADS", "value": "1"} in worker["env"]
    assert worker["args"][-4:] == ["--nthreads", "4", "--memory-limit", f"{9 * 2**30}B"]
    for container in (scheduler, worker):
        dask_command_is_known(container)
    for wrong, message in [
        ({"tls": None}, "needs image="),
        ({"threads": 2, "target": "kubernetes://lkarray"}, "settings of its manifest"),
    ]:
        with pytest.raises(ValueError, match=message):
            lk.cluster.connect(wrong.pop("target", "kubernetes"), **wrong)  # type: ignore[arg-type]


def test_connect__leaves_a_dask_cluster_that_it_did_not_make(
    monkeypatch: pytest.MonkeyPatch, certificates: Path
) -> None:
    """The operator's own class, without the requests with which it starts."""
    kubecluster = pytest.importorskip("dask_kubernetes.operator.kubecluster.kubecluster")
    seen: list[Any] = []

    async def start(cluster: Any) -> None:
        seen.append(cluster)

    monkeypatch.setattr(kubecluster.KubeCluster, "_start", start)
    monkeypatch.setattr(kubecluster, "DaskCluster", None)  # deleting it would need this
    with pytest.raises(ValueError, match="Not Connected"):
        lk.cluster.connect("kubernetes://lkarray", timeout=0.1)
    cluster, *_ = seen
    assert (cluster.name, cluster.shutdown_on_close) == ("lkarray", False)
    assert cluster.create_mode == kubecluster.CreateMode.CONNECT_ONLY
    with pytest.raises(ValueError, match="kubernetes takes no tls="):
        lk.cluster.connect("kubernetes://lkarray", tls=certificates)


# --- The image -----------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (KUBERNETES / "Containerfile").read_text(), flags=re.M)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]  # type: ignore[misc]


def test_containerfile__copies_what_there_is_and_runs_as_nobody() -> None:
    steps = instructions()
    known = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in steps} <= known
    base = [rest for name, rest in steps if name == "FROM"]
    assert base == ["python:3.11-slim"]
    copied = [word for name, rest in steps if name == "COPY" for word in rest.split()[:-1]]
    assert copied
    assert [word for word in copied if not (ROOT / word).exists()] == []
    needed = {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "lkarray", "workflows"}
    assert set(copied) == needed
    (user,) = (rest for name, rest in steps if name == "USER")
    assert user.split(":")[0] == "10001"
    names = [name for name, _ in steps]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert ("ENTRYPOINT", '["lkarray"]') in steps
    assert "://" not in (KUBERNETES / "Containerfile").read_text()
    (install,) = (rest for name, rest in steps if "pip install" in rest)
    assert "--constraint constraints.txt" in install
    extras = dict(rest.split("=") for name, rest in steps if name == "ARG")["EXTRAS"]
    offered = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert set(extras.split(",")) <= set(offered)


# --- systemd and cron ----------------------------------------------------------------------


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, whose program is one that exists."""
    for path in SYSTEMD.glob("lkarray@.*"):
        text = path.read_text().replace("/opt/lkarray/bin/lkarray", "/bin/true")
        (tmp_path / path.name).write_text(text)
    return tmp_path


def test_units__are_what_systemd_takes(units: Path) -> None:
    analyze = needs("systemd-analyze", "systemd")
    for unit in ("lkarray@.service", "lkarray@.timer", "lkarray@digits.service"):
        assert said(analyze, "verify", "--man=no", f"./{unit}", cwd=units) == ""


def test_units__with_a_setting_nobody_knows_would_be_noticed(units: Path) -> None:
    analyze = needs("systemd-analyze", "systemd")
    path = units / "lkarray@.service"
    path.write_text(path.read_text().replace("MemoryMax=", "MemoryMost="))
    assert "MemoryMost" in said(analyze, "verify", "--man=no", path, code=None)


def test_service__is_hardened_and_knows_the_exit_codes(units: Path) -> None:
    text = (SYSTEMD / "lkarray@.service").read_text()
    for line in ("Type=oneshot", "SuccessExitStatus=3 143", "TimeoutStartSec=infinity"):
        assert line in text.splitlines()
    (command,) = re.findall(r"^ExecStart=\S+ (.+)$", text, flags=re.M)
    command_is_known([word for word in command.split() if word != "$LKARRAY_ARGS"])
    analyze = needs("systemd-analyze", "systemd")
    said(analyze, "security", "--offline=yes", "--threshold=25", "./lkarray@.service", cwd=units)


def test_timer__comes_every_night_and_catches_up(units: Path) -> None:
    text = (SYSTEMD / "lkarray@.timer").read_text()
    assert "Persistent=true" in text.splitlines()
    (when,) = re.findall(r"^OnCalendar=(.+)$", text, flags=re.M)
    analyze = needs("systemd-analyze", "systemd")
    days = re.findall(
        r"(?:Next elapse|Iter\. #\d+): \w+ (\S+) 02:30:00",
        said(analyze, "calendar", "--iterations=3", when),
    )
    assert len(set(days)) == 3


def test_crontab__has_five_fields_and_a_command() -> None:
    text = (SYSTEMD / "crontab").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert text.endswith("\n")  # or cron drops the last line
    assert lines.pop(0) == "SHELL=/bin/sh"
    (line,) = lines
    *fields, command = line.split(maxsplit=5)
    for field, (least, most) in zip(
        fields, [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)], strict=True
    ):
        assert re.fullmatch(r"\*|\d+", field)
        assert field == "*" or least <= int(field) <= most
    assert "%" not in command
    said("sh", "-n", "-c", command)
    program, *words = command.partition(" >>")[0].split()
    assert program.endswith("/lkarray")
    command_is_known(words)


def test_crontab__is_what_cron_takes(tmp_path: Path) -> None:
    crontab = needs("crontab", "cron")
    if "dry run" not in said(crontab, "-h", code=None):  # Debian's has it, elsewhere -n is a host
        pytest.skip("this crontab checks no file without installing it")
    said(crontab, "-n", SYSTEMD / "crontab")
    wrong = tmp_path / "crontab"
    wrong.write_text((SYSTEMD / "crontab").read_text().replace("30 2 *", "30 25 *"))
    assert "bad hour" in said(crontab, "-n", wrong, code=1)


# --- README --------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), flags=re.M | re.S)


def test_readme__names_each_file_and_no_other() -> None:
    text = README.read_text()
    linked = set(re.findall(r"\]\((?!https?:)([^)#]+)\)", text))
    assert [name for name in linked if not (CLUSTER / name).exists()] == []
    here = {str(path.relative_to(CLUSTER)) for path in FILES if path != README}
    assert here <= linked
    named = re.findall(r"\bcluster/[\w@./-]+", "\n".join(blocks("bash") + blocks("python")))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_readme__has_commands_that_are_understood() -> None:
    for block in blocks("bash"):
        said("bash", "-n", "-c", block)
        for line in block.replace("\\\n", " ").splitlines():
            words = line.partition("#")[0].split()
            if words[:1] == ["lkarray"]:
                command_is_known(words[1:])
    for block in blocks("python"):
        compile(block, str(README), "exec")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files__name_no_index_and_no_address_of_one_machine(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"https?://(?!127\.0\.0\.1|localhost)", text)
    assert str(ROOT) not in text
