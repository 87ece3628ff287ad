"""`cluster/kubernetes`: manifests as Kubernetes takes them, and the image."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask.config
import pytest
import yaml

import lkarray as lk
from lkarray import errors
from lkarray._version import __version__
from tests.helpers.deployment import KUBERNETES, ROOT, command_is_known, said

pytestmark = pytest.mark.services

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
