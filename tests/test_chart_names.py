"""Names and labels of what the chart renders: taken by Kubernetes for every release, and never two things' at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from chart_support import CASES, INPUTS, NAME, Values, objects, only, parent, refusal, validate

DEPLOYMENT: Values = {
    **CASES["deployment"],
    **{name: {"enabled": True} for name in (
        "service", "podMonitor", "networkPolicy", "dashboards", "podDisruptionBudget", "prometheusRule")},
    "web": {"tls": {"enabled": True, "secretName": "2024"}}, "scrape": {"tlsConfig": {"insecureSkipVerify": True}},
    "otlp": {"endpoint": "http://otel:4318", "headers": {"a": "b"}}, "priorityClassName": "7",
}
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
LONGEST = 53
"""Characters that Helm lets the name of a release have."""


@pytest.mark.parametrize(("release", "values"), [
    ("agents", {}), ("agents.v1", {}), ("a" * LONGEST, {}), ("a" * 48 + ".b.cd", {}),
    ("123", {"fullnameOverride": "x" * 63}), ("true", {"fullnameOverride": "a" + "." * 61 + "b"}),
    ("agents", {"nameOverride": "n" * 62 + ".n"}),
    ("0" * LONGEST, {"fullnameOverride": "a-exporter"}),
])
def test_kubernetes_takes_the_names_of_every_release(release: str, values: Values) -> None:
    """Dots, the longest names, and names that YAML would take for numbers or truths; a Service is the strictest."""
    for one in objects({**DEPLOYMENT, **values}, name=release):
        validate(one, "1.31")
        name = one["metadata"]["name"]
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
        if one["kind"] == "Service":
            assert re.fullmatch(r"[a-z][-a-z0-9]{0,62}", name)
        labels = one["metadata"]["labels"]
        assert all(LABEL.fullmatch(value) for value in labels.values()), labels


def test_two_releases_never_share_a_name() -> None:
    """Names that differ at the end of what Helm allows are still two."""
    one, other = (objects(DEPLOYMENT, name="a" * (LONGEST - 1) + last) for last in "bc")
    names = {(each["kind"], each["metadata"]["name"]) for each in one}
    assert not names & {(each["kind"], each["metadata"]["name"]) for each in other}


def test_one_label_asked_for_twice_is_there_once() -> None:
    """`release` among all objects' labels and among a monitor's is one key of the YAML; the monitor's wins."""
    found = objects({"commonLabels": {"release": "all"},
                     "podMonitor": {"enabled": True}, "scrape": {"labels": {"release": "b"}},
                     "prometheusRule": {"enabled": True, "labels": {"release": "c"}},
                     "dashboards": {"enabled": True, "labels": {"release": "d"}}})
    assert [(one["kind"], one["metadata"]["labels"]["release"]) for one in found] == [
        *[("ConfigMap", "d")] * 4, ("PodMonitor", "b"), ("PrometheusRule", "c")]


@pytest.mark.parametrize(("values", "sentence"), [
    ({"commonLabels": {"app.kubernetes.io/name": "x"}}, "commonLabels cannot have app.kubernetes.io/name"),
    ({"scrape": {"labels": {"helm.sh/chart": "x"}}}, "scrape.labels cannot have helm.sh/chart"),
    ({**DEPLOYMENT, "podLabels": {"app.kubernetes.io/name": "x"}}, "podLabels cannot have app.kubernetes.io/name"),
    ({"podLabels": {NAME: "x"}}, f"podLabels cannot have {NAME}, by which the pods are selected"),
    ({**DEPLOYMENT, "fullnameOverride": "1a"}, "a Service cannot be named 1a"),
])
def test_what_would_break_selectors_is_refused(values: Values, sentence: str) -> None:
    """Labels that the chart goes by are its own, and a Service's name begins with a letter."""
    assert sentence in refusal(values)


def test_a_pod_of_another_chart_keeps_its_own_labels() -> None:
    """In mode sidecar the pod is another chart's, and may be named as that one likes."""
    objects({"podLabels": {"app.kubernetes.io/name": "agent"}})


TWICE = """\
apiVersion: v1
kind: Pod
metadata:
  name: %(alias)s
  labels:
    {{- include "coding-agent-exporter.sidecar.labels" (index .Subcharts "%(alias)s") | nindent 4 }}
spec:
  containers: [{name: agent, image: agent}]
"""


def test_a_chart_that_has_this_one_twice_scrapes_no_pod_twice(tmp_path: Path) -> None:
    """Each PodMonitor selects the pods of its own dependency; selected by both, their spend would count twice."""
    aliases = ("pi", "claude")
    chart = parent(tmp_path, {}, "")
    (chart / "templates" / "deployment.yaml").write_text("---\n".join(TWICE % {"alias": alias} for alias in aliases))
    meta = yaml.safe_load((chart / "Chart.yaml").read_text())
    meta["dependencies"] = [{**meta["dependencies"][0], "alias": alias} for alias in aliases]
    (chart / "Chart.yaml").write_text(yaml.safe_dump(meta))
    found = objects({alias: {"inputs": INPUTS, "podMonitor": {"enabled": True}} for alias in aliases}, chart=chart)
    pods = {one["metadata"]["name"]: one["metadata"]["labels"] for one in found if one["kind"] == "Pod"}
    monitors = [one["spec"]["selector"]["matchLabels"] for one in found if one["kind"] == "PodMonitor"]
    selected = [[name for name, labels in pods.items() if selector.items() <= labels.items()] for selector in monitors]
    assert sorted(selected) == [["claude"], ["pi"]]


def test_numbers_stay_numbers() -> None:
    """Large integers of a values file are floats to Helm; Kubernetes takes no 1e+06."""
    values = {**DEPLOYMENT, "terminationGracePeriodSeconds": 1_000_000, "securityContext": {"runAsUser": 1_000_700_000}}
    workload = only(objects(values), "Deployment")
    validate(workload, "1.31")
    assert workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 1_000_000
