"""The Kubernetes manifests: the RayJob by KubeRay's own schema, and all of them by each other."""

import json
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.config import ServeConfig
from deploy.credentials import write_credentials
from deploy.doctor.layout import cpus_per_node
from deploy.settings import DEPLOY
from tests.deploy.processes import ROOT

SCHEMA = json.loads((ROOT / "tests/data/kubernetes/rayjob_v1.schema.json").read_text())
STOP_MARGIN_S = 15


def manifests(name: str) -> dict[str, Any]:
    """The objects of a file by kind."""
    text = (DEPLOY / "kubernetes" / name).read_text()
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(text)}


OBJECTS = manifests("rayjob.yaml")
JOB = OBJECTS["RayJob"]["spec"]
HEAD = JOB["rayClusterSpec"]["headGroupSpec"]
(WORKERS,) = JOB["rayClusterSpec"]["workerGroupSpecs"]
PODS = [HEAD["template"], WORKERS["template"]]
CONFIG = ServeConfig.from_dict(yaml.safe_load(OBJECTS["ConfigMap"]["data"]["config.yaml"]))


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["spec"]["containers"]
    return only


def test_kuberay_accepts_the_job() -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate({"spec": JOB})


@pytest.mark.parametrize(
    "wrong", [{"entryPoint": "x"}, {"backoffLimit": "3"}, {"rayClusterSpec": {}}], ids=str
)
def test_the_schema_refuses_what_kuberay_would(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate({"spec": {**JOB, **wrong}})


def test_there_is_a_worker_for_every_node_and_cores_for_its_ranks() -> None:
    assert CONFIG.ray.placement_strategy == "STRICT_SPREAD"
    replicas = {WORKERS[key] for key in ("replicas", "minReplicas", "maxReplicas")}
    assert replicas == {CONFIG.parallel.num_nodes}
    assert HEAD["rayStartParams"]["num-cpus"] == HEAD["rayStartParams"]["num-gpus"] == "0"
    resources = container(WORKERS["template"])["resources"]
    assert resources["limits"] == resources["requests"]
    assert float(resources["limits"]["cpu"]) == cpus_per_node(CONFIG)


def test_the_entrypoint_is_our_job_with_the_mounted_configuration() -> None:
    module, option, path = JOB["entrypoint"].removeprefix("python -m ").split()
    assert (module, option) == ("deploy.job", "--config")
    mounted = {m["name"]: m["mountPath"] for m in container(HEAD["template"])["volumeMounts"]}
    assert path == f"{mounted['config']}/config.yaml"
    for file in ("token_file", "admin_token_file", "tls_cert_file", "tls_key_file"):
        assert getattr(CONFIG.server, file).startswith(mounted["server"] + "/")
    for pod in PODS:
        mounts = {m["name"]: m["mountPath"] for m in container(pod)["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["spec"]["volumes"]}
        assert CONFIG.model.startswith(mounts["models"] + "/")


def test_the_secret_is_made_of_what_credentials_writes(tmp_path) -> None:
    write_credentials(tmp_path, ["expertmesh"], days=1)
    made = {file.name for file in tmp_path.iterdir()}
    text = (DEPLOY / "kubernetes" / "rayjob.yaml").read_text()
    into_secret = {word.rpartition("made/")[2] for word in text.split() if "made/" in word}
    assert into_secret == made & into_secret
    assert "ca.key" not in into_secret
    needed = {
        getattr(CONFIG.server, file).rpartition("/")[2]
        for file in ("token_file", "admin_token_file", "tls_cert_file", "tls_key_file")
    }
    assert needed | {"ca.pem"} == into_secret


def test_clients_reach_the_ports_that_the_server_opens() -> None:
    ports = {port["name"]: port["containerPort"] for port in container(HEAD["template"])["ports"]}
    assert (ports["grpc"], ports["http"]) == (CONFIG.server.port, CONFIG.server.http_port)
    assert all(port["targetPort"] in ports for port in OBJECTS["Service"]["spec"]["ports"])
    opened = [rule.get("ports", []) for rule in OBJECTS["NetworkPolicy"]["spec"]["ingress"]]
    assert {port["port"] for rule in opened for port in rule} == {"grpc", "http", "dashboard"}


def test_selectors_find_the_pods_that_they_mean() -> None:
    head, workers = (pod["metadata"]["labels"].items() for pod in PODS)
    service = OBJECTS["Service"]["spec"]["selector"].items()
    assert service <= head
    assert not service <= workers
    policy = OBJECTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items()
    assert policy <= head
    assert policy <= workers
    spread = WORKERS["template"]["spec"]["affinity"]["podAntiAffinity"]
    (rule,) = spread["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["labelSelector"]["matchLabels"].items() <= workers


def test_ray_is_the_version_we_pin_and_lets_a_stopped_job_drain() -> None:
    assert f"ray=={JOB['rayClusterSpec']['rayVersion']}" in (ROOT / "constraints.txt").read_text()
    environment = {e["name"]: e["value"] for e in container(HEAD["template"])["env"]}
    wait_s = float(environment["RAY_JOB_STOP_WAIT_TIME_S"])
    assert wait_s >= CONFIG.server.drain_timeout_s + STOP_MARGIN_S
    assert HEAD["template"]["spec"]["terminationGracePeriodSeconds"] >= wait_s
    assert JOB["rayClusterSpec"]["authOptions"]["mode"] == "token"


def test_nothing_runs_as_root() -> None:
    for pod in PODS:
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        security = container(pod)["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"]["drop"] == ["ALL"]


def test_metrics_are_scraped_where_they_are() -> None:
    monitor = manifests("podmonitor.yaml")["PodMonitor"]["spec"]
    head = HEAD["template"]["metadata"]["labels"].items()
    assert monitor["selector"]["matchLabels"].items() <= head
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in container(HEAD["template"])["ports"]}
    assert (endpoint["path"], endpoint["scheme"]) == ("/metrics", "https")
