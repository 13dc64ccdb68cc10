"""What the chart renders, Kubernetes and the Prometheus operator take; what cannot work it refuses."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from chart_support import (
    CASES,
    CHART,
    GOLDEN,
    INPUTS,
    ROOT,
    VERSIONS,
    Values,
    exporter,
    golden,
    library,
    notes,
    objects,
    only,
    pod_spec,
    refusal,
    render,
    validate,
)

if TYPE_CHECKING:
    from collections.abc import Callable

WORKLOADS = {"daemonset": "DaemonSet", "deployment": "Deployment"}

RESTRICTED = {
    "runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
}


def case(name: str, **more: Any) -> Values:
    return {**copy.deepcopy(CASES[name]), **more}


@pytest.mark.parametrize("name", CASES)
def test_lint_has_nothing_to_say(name: str) -> None:
    """Strict lint finds neither errors nor warnings, whatever is switched on."""
    report = library("helm_python").lint(CHART, CASES[name], strict=True, kube_version="v1.31.0")
    # An icon is a picture on a web page; Helm asks for one as information (1).
    assert [found for found in report["messages"] if found["severity"] > 1] == []
    assert report["errors"] == []


@pytest.mark.parametrize("kube", VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_kubernetes_takes_every_object(name: str, kube: str) -> None:
    """Each object fits the schema of its kind, strictly: without fields that nobody knows."""
    for one in objects(CASES[name], kube=kube):
        validate(one, kube)


@pytest.mark.parametrize("name", GOLDEN)
def test_main_modes_render_as_recorded(name: str, tmp_path: Path) -> None:
    """The whole of what Kubernetes is given; `python tests/chart_support.py` records it anew."""
    assert golden(name, tmp_path) == GOLDEN[name].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_objects_are_told_apart_and_belong_to_the_release(name: str) -> None:
    """No two objects have one name, names fit, and all carry the labels that Helm's tools look for."""
    found = objects(CASES[name])
    keys = [(one["kind"], one["metadata"]["name"]) for one in found]
    assert len(keys) == len(set(keys))
    for one in found:
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,61}[a-z0-9]", one["metadata"]["name"])
        labels = one["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "agents"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels.items() >= CASES[name].get("commonLabels", {}).items()


@pytest.mark.parametrize(("mode", "kind"), WORKLOADS.items())
def test_pods_are_restricted(mode: str, kind: str) -> None:
    """Non-root, no capabilities, read-only root, no token; every agent's directory is mounted read-only."""
    found = objects(CASES[mode])
    spec, container = pod_spec(found), exporter(pod_spec(found))
    assert container["securityContext"] == RESTRICTED
    assert spec["automountServiceAccountToken"] is False
    assert only(found, "ServiceAccount")["automountServiceAccountToken"] is False
    writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["/var/lib/coding-agent-exporter"]
    # fsGroup would change the group of files on any other claim.
    claims = {volume["name"]: volume["persistentVolumeClaim"].get("readOnly", False) for volume in spec["volumes"]
              if "persistentVolumeClaim" in volume}
    assert claims.items() <= {"coding-agent-exporter-state": False, "agents-shared": True, "agents-mngr": True}.items()
    assert only(found, kind)["spec"]["selector"]["matchLabels"].items() <= \
        only(found, kind)["spec"]["template"]["metadata"]["labels"].items()


def test_the_daemonset_gives_its_state_to_the_exporter_and_does_nothing_else_as_root() -> None:
    """The kubelet makes a hostPath for root: one init container may change owners, and mounts the state alone."""
    (init,) = pod_spec(objects(CASES["daemonset"]))["initContainers"]
    assert init["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
    assert [mount["mountPath"] for mount in init["volumeMounts"]] == ["/var/lib/coding-agent-exporter"]
    for other in ("daemonset-as-root", "daemonset-without-chown", "daemonset-with-emptydir"):
        assert "initContainers" not in pod_spec(objects(CASES[other]))


def test_the_state_is_given_away_by_what_the_init_container_runs(
        tool: Callable[[str], str], tmp_path: Path) -> None:
    """Its script changes the owner of the directory and of what lies in it, here to the owner it has."""
    (tmp_path / "state.db").touch()
    (init,) = pod_spec(objects(CASES["daemonset"]))["initContainers"]
    _, flag, script, directory, uid, gid = init["command"]
    assert (flag, directory, uid, gid) == ("-c", "/var/lib/coding-agent-exporter", "65532", "65532")
    own = tmp_path.stat()
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(own.st_uid), str(own.st_gid)], check=True)
    tmp_path.chmod(0o700)
    if own.st_uid == 0:  # as in the container: what another user keeps to itself, root with CHOWN alone cannot list
        os.chown(tmp_path, 65532, 65532)
        limit = [tool("setpriv"), "--bounding-set=-all,+chown", "--inh-caps=-all,+chown"]
        subprocess.run([*limit, sys.executable, "-c", script, str(tmp_path), "1000", "1001"], check=True)
        owners = {(path.stat().st_uid, path.stat().st_gid) for path in (tmp_path, tmp_path / "state.db")}
        assert owners == {(1000, 1001)}
    refused = subprocess.run([sys.executable, "-c", script, str(tmp_path / "none"), "1", "1"], capture_output=True,
                             check=False)
    assert refused.returncode == 1


@pytest.mark.parametrize(("name", "scheme"), [
    ("deployment", {}), ("deployment-with-tls", {"scheme": "HTTPS"}), ("deployment-with-password", None),
    ("deployment-with-client-certificates", None), ("deployment-with-a-web-config-of-its-own", {}),
])
def test_probes_get_past_passwords_and_certificates(name: str, scheme: dict[str, str] | None) -> None:
    """The exporter asks for a password on every path: where it does, probes only connect."""
    container = exporter(pod_spec(objects(CASES[name])))
    for probe, path in (("startupProbe", "healthy"), ("livenessProbe", "healthy"), ("readinessProbe", "ready")):
        if scheme is None:
            assert container[probe]["tcpSocket"] == {"port": "agent-metrics"}
        else:
            assert container[probe]["httpGet"] == {"path": f"/-/{path}", "port": "agent-metrics", **scheme}


@pytest.mark.parametrize(("name", "kind", "endpoints"), [
    ("deployment-with-client-certificates", "PodMonitor", "podMetricsEndpoints"),
    ("deployment-with-tls", "ServiceMonitor", "endpoints"),
])
def test_monitors_know_how_to_get_in(name: str, kind: str, endpoints: str) -> None:
    """Scheme, certificates and password of a monitor follow from what the exporter asks for."""
    values = CASES[name]
    (endpoint,) = only(objects(values), kind)["spec"][endpoints]
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"] == values["scrape"]["tlsConfig"]
    keys = {part: endpoint.get("basicAuth", {}).get(part) for part in ("username", "password")}
    asked = values["web"].get("basicAuth", {}).get("enabled")
    assert keys == {part: {"name": "scraper", "key": part} if asked else None for part in keys}


@pytest.mark.parametrize("name", [name for name, values in CASES.items() if values.get("mode") == "deployment"])
def test_monitors_find_the_pods(name: str) -> None:
    """PodMonitor, Service, ServiceMonitor and policies select the labels, and name the port, that are there."""
    found = objects(CASES[name])
    template = only(found, "Deployment")["spec"]["template"]
    labels, ports = template["metadata"]["labels"], exporter(template["spec"])["ports"]
    for one in found:
        spec = one.get("spec", {})
        match one["kind"]:
            case "PodMonitor":
                assert spec["selector"]["matchLabels"].items() <= labels.items()
                assert spec["podMetricsEndpoints"][0]["port"] == ports[0]["name"]
            case "ServiceMonitor":
                service = only(found, "Service")
                assert spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
                assert spec["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
            case "Service":
                assert spec["selector"].items() <= labels.items()
                assert spec["ports"][0]["targetPort"] == ports[0]["name"]
            case "NetworkPolicy":
                assert spec["podSelector"]["matchLabels"].items() <= labels.items()
                assert spec["ingress"][0]["ports"][0]["port"] == ports[0]["containerPort"]
            case "PodDisruptionBudget":
                assert spec["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize(("endpoint", "protocol", "port"), [
    ("http://otel:4318", "", 4318), ("https://otel.example/base", "", 443), ("http://otel.example", "", 80),
    ("http://[fd00::1]:4318/x", "", 4318), ("otel.example", "grpc", 443), ("otel:4317", "grpc", 4317),
    ("http://otel.example", "grpc", 4317),
])
def test_what_leaves_is_limited_to_the_collector_and_dns(endpoint: str, protocol: str, port: int) -> None:
    """The policy opens the port that the exporter connects to; without a collector nothing leaves."""
    values = case("deployment", networkPolicy={"enabled": True}, otlp={"endpoint": endpoint, "protocol": protocol})
    first, dns = only(objects(values), "NetworkPolicy")["spec"]["egress"]
    assert first["ports"] == [{"port": port, "protocol": "TCP"}]
    assert {each["port"] for each in dns["ports"]} == {53}
    closed = only(objects(CASES["deployment-closed-in"]), "NetworkPolicy")["spec"]
    assert (closed["policyTypes"], closed["egress"]) == (["Ingress", "Egress"], [])


def test_an_agents_own_traffic_is_left_alone() -> None:
    """In a pod with an agent the policy says nothing of what leaves it."""
    assert only(objects(CASES["sidecar-network"]), "NetworkPolicy")["spec"]["policyTypes"] == ["Ingress"]


BCRYPT = "$2y$10$g3fXtUnET/ESltBjnczp3.RZgaO12eTbUUy.zvWYAcEL7Pp1.jKsC"
DAEMONSET, DEPLOYMENT = CASES["daemonset"], CASES["deployment"]


@pytest.mark.parametrize(("values", "sentence"), [
    ({"shutdown": {"linger": "1m"}}, "shutdown.linger (1m) must be shorter than terminationGracePeriodSeconds (60)"),
    ({"podMonitor": {"enabled": True}, "scrape": {"interval": "30s"}}, "must be more than twice scrape.interval (30s)"),
    ({"shutdown": {"linger": "56s"}, "otlp": {"endpoint": "http://x"}},
     "(56s) and settings.otlp.flush-timeout (5s) together must be shorter than terminationGracePeriodSeconds (60)"),
    ({"podMonitor": {"enabled": True}, "settings": {"counters": {"zero-hold": "15s"}}},
     "must be more than settings.counters.zero-hold (15s) and twice scrape.interval (15s) together"),
    ({"scrape": {"interval": "5s"}}, "scrape.timeout (10s) must not be longer than scrape.interval (5s)"),
    ({**DEPLOYMENT, "podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}, "exclude each other"),
    ({"serviceMonitor": {"enabled": True}}, "mode sidecar has none: use podMonitor.enabled"),
    ({"service": {"enabled": True}}, "service.enabled needs pods of this chart"),
    ({**DEPLOYMENT, "replicas": 2}, "replicas must be 1 (or 0)"),
    ({**DAEMONSET, "podDisruptionBudget": {"enabled": True}}, "podDisruptionBudget.enabled is for mode deployment"),
    ({**DAEMONSET, "state": {"type": "persistentVolumeClaim"}}, "state.type persistentVolumeClaim is for mode"),
    ({**DEPLOYMENT, "state": {"type": "hostPath"}}, "state.type hostPath is for mode daemonset"),
    ({**DEPLOYMENT, "securityContext": {"runAsUser": 0}}, "Kubernetes would not start the container"),
    ({"web": {"tls": {"enabled": True}}}, "web.tls.enabled needs web.tls.secretName"),
    ({"web": {"tls": {"verifyClients": True}}}, "web.tls.verifyClients needs web.tls.enabled"),
    ({"web": {"basicAuth": {"enabled": True}}}, "web.basicAuth.enabled needs web.basicAuth.users"),
    ({"web": {"existingSecret": "x", "basicAuth": {"users": {"a": BCRYPT}}}}, "would not be in it"),
    ({"podMonitor": {"enabled": True}, "web": {"basicAuth": {"enabled": True, "users": {"a": BCRYPT}}}},
     "web.basicAuth.enabled needs scrape.basicAuth.secretName"),
    ({"podMonitor": {"enabled": True}, "web": {"tls": {"enabled": True, "secretName": "x"}}},
     "web.tls.enabled needs scrape.tlsConfig"),
    ({"otlp": {"headers": {"a": "b"}}}, "otlp.headers needs otlp.endpoint"),
    ({"otlp": {"existingSecret": "b"}}, "otlp.existingSecret needs otlp.endpoint"),
    ({"otlp": {"endpoint": "http://x", "existingSecret": "b", "headers": {"a": "b"}}}, "exclude each other"),
    ({"mode": "deployment"}, "inputs must name at least one directory of agents in mode deployment"),
    ({"mode": "daemonset", "inputs": INPUTS}, "mode daemonset needs an input with a hostPath"),
    ({"mode": "deployment", "inputs": DAEMONSET["inputs"]}, "pi has a hostPath, which is for mode daemonset"),
    ({"mode": "deployment", "inputs": INPUTS * 2}, 'inputs: the name "pi" is given twice'),
    ({"mode": "deployment", "inputs": INPUTS}, "pi is on the volume agent, which is not one of extraVolumes"),
    ({**DAEMONSET, "updateStrategy": {"rollingUpdate": {"maxSurge": 1}}}, "maxSurge (1) must be 0"),
    ({"web": {"telemetryPath": "/-/healthy"}}, "must not be below /-/"),
    ({"extraArgs": ["--shutdown.linger=5m"]}, "extraArgs: --shutdown.linger has a value of its own"),
    ({"settings": {"usage": {"agent-label": True}}, "extraArgs": ["--no-usage.agent-label"]},
     "extraArgs: --usage.agent-label has a value of its own"),
    ({"prometheusRule": {"alertLabels": {"severity": "page"}}}, "alertLabels cannot have severity"),
])
def test_what_cannot_work_is_refused_with_a_sentence(values: Values, sentence: str) -> None:
    """Nothing is rendered, and the message says which values clash, and why."""
    assert sentence in refusal(values)


@pytest.mark.parametrize("values", [
    {"modus": "sidecar"}, {"mode": "statefulset"}, {"image": {"registry": "x"}}, {"shutdown": {"linger": "soon"}},
    {"shutdown": {"linger": 30}}, {"terminationGracePeriodSeconds": "1m"}, {"web": {"port": 70000}},
    {"web": {"basicAuth": {"users": {"a": "secret"}}}}, {"otlp": {"protocol": "http/json"}},
    {"settings": {"counters": {"zero-holt": "1m"}}}, {"settings": {"counters": {"max-series": "many"}}},
    {"settings": {"state": {"path": "/x"}}}, {"settings": {"log": {"level": "loud"}}},
    {"inputs": [{"name": "pi", "sessions": "sessions"}]}, {"inputs": [{"name": "pi", "volume": "a"}]},
    {"inputs": [{"name": "pi", "volume": "a", "existingClaim": "b", "sessions": "."}]},
    {"inputs": [{"name": "pi", "volume": "a", "sessions": "/abs"}]},
    {"inputs": [{"name": "pi", "volume": "a", "sessions": "a/../.."}]},
    {"inputs": [{"name": "a,b", "volume": "a", "sessions": "."}]}, {"scrape": {"interval": "0"}},
    {"prometheusRule": {"alerts": {"CodingAgentLost": {"severity": "page"}}}},
    {"prometheusRule": {"alerts": {"CodingAgentLost": {"thresholds": {"agents": "2"}}}}},
    {"prometheusRule": {"budgets": {"year": 5}}}, {"prometheusRule": {"budgets": {"day": 0}}},
    {"dashboards": {"labels": {"grafana_dashboard": 1}}}, {"state": {"type": "nfs"}}, {"podLabels": {"a": 1}},
], ids=str)
def test_the_schema_rejects(values: Values) -> None:
    """Names that are none, and values of another kind."""
    assert "\n- at '/" in refusal(values) or "additional properties 'modus' not allowed" in refusal(values)


@pytest.mark.parametrize("name", ["otlp", "scrape", "web", "state", "prometheusRule", "settings", "mode"])
def test_a_name_with_nothing_below_is_refused(name: str) -> None:
    """Where a values file has a map's name and all below it commented out, Helm deletes the defaults."""
    assert f"missing property '{name}'" in refusal({**DAEMONSET, name: None})


@pytest.mark.parametrize("name", ["securityContext", "podSecurityContext", "startupProbe", "resources",
                                  "updateStrategy", "commonLabels", "podLabels", "extraVolumes", "nodeSelector"])
def test_null_takes_a_default_away(name: str) -> None:
    """So that a cluster that sets them itself (security contexts of OpenShift) can."""
    for one in objects({**DAEMONSET, name: None}):
        validate(one, "1.31")


def test_the_schema_takes_what_a_parent_gives() -> None:
    """A parent chart's `global`, and the switch that its condition names, are no mistakes."""
    render({"global": {"imageRegistry": "x"}, "enabled": True})


def test_the_schema_knows_every_value() -> None:
    """Each key of values.yaml is described, and each closed part of the schema has the keys of values.yaml."""
    schema = yaml.safe_load((CHART / "values.schema.json").read_text(encoding="utf-8"))

    def compare(table: dict[str, Any], part: dict[str, Any], path: str) -> None:
        known: dict[str, Any] = part.get("properties", {})
        if part.get("additionalProperties") is not False or path == ".settings":
            return
        assert set(table) <= set(known), path
        for name, value in table.items():
            if isinstance(value, dict):
                compare(value, known[name], f"{path}.{name}")

    compare(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")), schema, "")
    assert set(schema["properties"]) - {"global", "enabled"} == set(_defaults())


def _defaults() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    return found


def test_notes_say_how_to_look() -> None:
    """The notes name the pods of the mode, the port, and what is missing."""
    assert "-l coding-agent-exporter=agents-coding-agent-exporter -o name" in notes({})
    assert "Neither podMonitor.enabled nor serviceMonitor.enabled" in notes({})
    assert "never completes" in notes({}, kube="1.28")
    assert "never completes" not in notes({}, kube="1.29")
    text = notes(CASES["deployment-of-many-options"])
    assert "curl http://localhost:9999/agents/metrics" in text
    assert "-l app.kubernetes.io/name=cae,app.kubernetes.io/instance=agents" in text
    assert "curl https://" in notes(CASES["deployment-with-tls"])
    assert "No budgets are set" in notes(CASES["rules"])
    assert "No budgets are set" not in notes(CASES["rules-and-dashboards"])


def test_the_archive_renders_as_the_directory_does(tmp_path: Path) -> None:
    """What is published is complete: rules and dashboards are links here, and files in the archive."""
    archive = library("helm_python").package(CHART, destination=tmp_path)
    with tarfile.open(archive) as packed:
        assert all(member.isfile() for member in packed.getmembers())
        names = {member.name for member in packed.getmembers()}
    assert {f"coding-agent-exporter/files/{path.parent.name}/{path.name}"
            for path in (ROOT / "grafana").glob("*/*.[yj]*")} <= names
    for values in CASES.values():
        assert render(values, chart=Path(archive)) == render(values)


def test_versions_are_those_of_the_package() -> None:
    """Chart, image and program are released together."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    meta = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert (meta["version"], meta["appVersion"]) == (version, version)


def test_the_readme_is_up_to_date_and_complete() -> None:
    """The chart's README is what its generator makes of values.yaml, where every key is described."""
    done = subprocess.run([sys.executable, ROOT / "helm" / "readme.py", "--check"], capture_output=True, text=True,
                          check=False)
    assert (done.returncode, done.stderr) == (0, "")
