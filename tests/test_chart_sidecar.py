"""Another chart includes the sidecar by three lines; its container starts before the agent and ends after it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from chart_support import (
    EXAMPLE,
    INPUTS,
    NAME,
    ROOT,
    VERSIONS,
    Object,
    Values,
    example,
    exporter,
    library,
    objects,
    only,
    parent,
    pod_spec,
    refusal,
    render,
    validate,
)

NATIVE = tuple(version for version in VERSIONS if version >= "1.29")

POD = """\
    metadata:
      labels:
        app: agent
        {{- include "coding-agent-exporter.sidecar.labels" CONTEXT | nindent 8 }}
      annotations:
        {{- include "coding-agent-exporter.sidecar.annotations" CONTEXT | nindent 8 }}
    spec:
      initContainers:
        {{- include "coding-agent-exporter.sidecar.initContainers" CONTEXT | nindent 8 }}
      containers:
        - name: agent
          image: agent
          volumeMounts: [{name: agent, mountPath: /agent}]
        {{- include "coding-agent-exporter.sidecar.containers" CONTEXT | nindent 8 }}
      terminationGracePeriodSeconds: {{ include "coding-agent-exporter.sidecar.terminationGracePeriodSeconds" CONTEXT }}
      volumes:
        - {name: agent, emptyDir: {}}
        {{- include "coding-agent-exporter.sidecar.volumes" CONTEXT | nindent 8 }}
"""

HASH = "$2y$10$g3fXtUnET/ESltBjnczp3.RZgaO12eTbUUy.zvWYAcEL7Pp1.jKsC"

SWITCHED_ON: Values = {
    "inputs": INPUTS, "podMonitor": {"enabled": True}, "podLabels": {"team": "agents"}, "podAnnotations": {"a": "b"},
    "otlp": {"endpoint": "http://otel:4318", "headers": {"authorization": "secret"}},
    "web": {"tls": {"enabled": True, "secretName": "tls"}, "basicAuth": {"enabled": True, "users": {"a": HASH}}},
    "scrape": {"basicAuth": {"secretName": "scraper"}, "tlsConfig": {"insecureSkipVerify": True}},
}


def included(directory: Path, values: Values, *, alias: str = "", kube: str = "1.31") -> list[Object]:
    context = f'(index .Subcharts "{alias}")' if alias else "."
    return objects({}, chart=parent(directory, values, POD.replace("CONTEXT", context), alias=alias), kube=kube)


def names(containers: list[Any] | None) -> list[str]:
    return [each["name"] for each in containers or []]


@pytest.mark.parametrize("kube", VERSIONS)
@pytest.mark.parametrize("values", [{"inputs": INPUTS}, SWITCHED_ON], ids=["least", "most"])
def test_kubernetes_takes_the_pod(values: Values, kube: str, tmp_path: Path) -> None:
    """A pod with the sidecar, and what this chart brings beside it, fits the schemas strictly."""
    for one in included(tmp_path, values, kube=kube):
        validate(one, kube)


@pytest.mark.parametrize("kube", VERSIONS)
def test_native_where_kubernetes_knows_it(kube: str, tmp_path: Path) -> None:
    """From 1.29 on it is an init container that stays, and holds the agent's start; below, a plain container."""
    spec = pod_spec(included(tmp_path, {"inputs": INPUTS}, kube=kube))
    container = exporter(spec)
    if kube in NATIVE:
        assert (names(spec["initContainers"]), names(spec["containers"])) == ([NAME], ["agent"])
        assert container["restartPolicy"] == "Always"
        assert container["startupProbe"]["httpGet"]["path"] == "/-/healthy"
    else:
        assert (names(spec["initContainers"]), names(spec["containers"])) == ([], ["agent", NAME])
        assert "restartPolicy" not in container
    # An exporter that still reads what is there must not make the agent's pod unready.
    assert "readinessProbe" not in container


def test_it_only_reads(tmp_path: Path) -> None:
    """It mounts the agent's volume read-only, and writes to a volume of its own."""
    spec = pod_spec(included(tmp_path, {"inputs": INPUTS}))
    mounts = {mount["name"]: mount for mount in exporter(spec)["volumeMounts"]}
    assert mounts["agent"] == {"name": "agent", "mountPath": "/agents/pi", "readOnly": True}
    assert set(mounts) == {"agent", "coding-agent-exporter-state"}
    assert [volume for volume in spec["volumes"] if volume["name"] != "agent"] == [
        {"name": "coding-agent-exporter-state", "emptyDir": {"sizeLimit": "512Mi"}}]


def test_it_lingers_for_two_scrapes_within_the_grace_of_the_pod(tmp_path: Path) -> None:
    """By default the exporter waits over twice the scrape interval, and is not killed meanwhile."""
    found = included(tmp_path, {"inputs": INPUTS, "podMonitor": {"enabled": True}})
    (linger,) = (arg for arg in exporter(pod_spec(found))["args"] if arg.startswith("--shutdown.linger="))
    seconds = int(linger.removeprefix("--shutdown.linger=").removesuffix("s"))
    (endpoint,) = only(found, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert 2 * int(endpoint["interval"].removesuffix("s")) < seconds < pod_spec(found)["terminationGracePeriodSeconds"]


def test_prometheus_finds_the_pod(tmp_path: Path) -> None:
    """PodMonitor selects a label that the pod has, and that no pod of another release has."""
    found = included(tmp_path, {"inputs": INPUTS, "podMonitor": {"enabled": True}})
    labels = only(found, "Deployment")["spec"]["template"]["metadata"]["labels"]
    spec = only(found, "PodMonitor")["spec"]
    assert spec["selector"]["matchLabels"] == {NAME: "agents-coding-agent-exporter"}
    assert labels[NAME] == "agents-coding-agent-exporter"
    assert spec["podMetricsEndpoints"][0]["port"] == exporter(pod_spec(found))["ports"][0]["name"]


def test_what_the_container_names_is_there(tmp_path: Path) -> None:
    """Volumes and Secrets that the pod refers to are rendered, or were given by name."""
    found = included(tmp_path, SWITCHED_ON)
    spec = pod_spec(found)
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert {mount["name"] for mount in exporter(spec)["volumeMounts"]} <= set(volumes)
    secrets = {one["metadata"]["name"] for one in found if one["kind"] == "Secret"} | {"tls"}
    assert {volume["secret"]["secretName"] for volume in volumes.values() if "secret" in volume} <= secrets
    references = [each["valueFrom"]["secretKeyRef"]["name"] for each in exporter(spec)["env"]
                  if "secretKeyRef" in each.get("valueFrom", {})]
    assert len(references) == 1
    assert set(references) <= secrets


def test_another_header_is_another_pod(tmp_path: Path) -> None:
    """A variable from a Secret is read once: the pod changes with the Secret."""
    def annotations(directory: str, header: str) -> dict[str, str]:
        values = {**SWITCHED_ON, "otlp": {"endpoint": "http://otel:4318", "headers": {"authorization": header}}}
        (tmp_path / directory).mkdir()
        found: dict[str, str] = only(included(tmp_path / directory, values), "Deployment")[
            "spec"]["template"]["metadata"]["annotations"]
        return found

    first, second = annotations("a", "one"), annotations("b", "two")
    assert first["a"] == second["a"] == "b"
    assert first["checksum/otlp"] != second["checksum/otlp"]


def test_a_dependency_by_another_name(tmp_path: Path) -> None:
    """With an alias the chart's own context is given, and all is as without."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    aliased = pod_spec(included(tmp_path / "a", {"inputs": INPUTS}, alias="telemetry"))
    assert exporter(aliased) == exporter(pod_spec(included(tmp_path / "b", {"inputs": INPUTS})))


@pytest.mark.parametrize(("values", "sentence"), [
    ({}, "inputs must name at least one directory of agents in mode sidecar"),
    ({"mode": "daemonset", "inputs": [{"name": "pi", "hostPath": "/x", "sessions": "."}]},
     "coding-agent-exporter.sidecar.* are for mode sidecar, and mode is daemonset"),
    ({"inputs": [{"name": "pi", "hostPath": "/x", "sessions": "."}]}, "pi has a hostPath, which is for mode daemonset"),
])
def test_what_cannot_work_is_refused_with_a_sentence(values: Values, sentence: str, tmp_path: Path) -> None:
    """Also what is wrong only once a pod includes the container."""
    assert sentence in refusal({}, chart=parent(tmp_path, values, POD.replace("CONTEXT", ".")))


def test_the_context_of_another_chart_is_refused_with_a_sentence(tmp_path: Path) -> None:
    """With an alias, or from a chart further up, the templates cannot find their values, and say what to give them."""
    chart = parent(tmp_path, {"inputs": INPUTS}, POD.replace("CONTEXT", "."), alias="telemetry")
    assert 'give (index .Subcharts "<its alias>")' in refusal({}, chart=chart)


@pytest.mark.parametrize("kube", NATIVE)
def test_the_example_is_taken(kube: str, tmp_path: Path) -> None:
    """The Job with a pi agent, as it stands in helm/examples, fits the schemas strictly."""
    found = objects({}, chart=example(tmp_path), kube=kube)
    assert {one["kind"] for one in found} == {"Job", "PodMonitor"}
    for one in found:
        validate(one, kube)


def test_lint_has_nothing_to_say_of_the_example(tmp_path: Path) -> None:
    """Strict lint finds neither errors nor warnings in it."""
    report = library("helm_python").lint(example(tmp_path), {}, strict=True, kube_version="v1.31.0")
    assert [found for found in report["messages"] if found["severity"] > 1] == []
    assert report["errors"] == []


def test_the_example_reads_where_its_agent_writes(tmp_path: Path) -> None:
    """Each directory that the agent is told to write to is, through the shared volume, one that the exporter reads."""
    spec = pod_spec(objects({}, chart=example(tmp_path)))
    (agent,) = spec["containers"]
    env = {each["name"]: each["value"] for each in agent["env"]}
    assert agent["volumeMounts"] == [{"name": "agent", "mountPath": "/agent"}]
    mounted = {mount["mountPath"] for mount in exporter(spec)["volumeMounts"] if mount["name"] == "agent"}
    assert mounted == {"/agents/pi", "/agents/mngr"}
    paths = [arg.rpartition("=")[2] for arg in exporter(spec)["args"] if "=/agents/" in arg]
    read = {re.sub(r"^/agents/\w+", "/agent", path) for path in paths}
    assert read == {env["PI_TELEMETRY_DIR"], f"{env['PI_CODING_AGENT_DIR']}/sessions", env["MNGR_HOST_DIR"]}
    assert env["MNGR_AGENT_STATE_DIR"].startswith(f"{env['MNGR_HOST_DIR']}/agents/")
    assert exporter(spec)["securityContext"]["runAsUser"] == agent["securityContext"]["runAsUser"]


def test_the_example_finds_its_dependency(tmp_path: Path) -> None:
    """`helm dependency update` packs this chart by the path in the example's Chart.yaml; what renders is the same."""
    helm = Path(shutil.copytree(ROOT / "helm", tmp_path / "helm", ignore=shutil.ignore_patterns("charts", "*.lock")))
    chart = helm / "examples" / EXAMPLE.name
    library("helm_python").dependency_update(chart, skip_refresh=True)
    (dependency,) = library("helm_python").dependency_list(chart)
    assert dependency["status"] == "ok"
    assert render({}, chart=chart) == render({}, chart=example(tmp_path / "other"))
