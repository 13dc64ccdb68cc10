"""Takes the chart and values, gives its tests what Helm makes of them, and judges it as Kubernetes would.

`python tests/chart_support.py` writes the golden renders anew.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import DATA

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm" / "coding-agent-exporter"
EXAMPLE = ROOT / "helm" / "examples" / "pi-agent-job"
NAME = "coding-agent-exporter"
VERSIONS = ("1.25", "1.27", "1.29", "1.31", "1.34", "1.37")
"""Kubernetes, from the oldest that Chart.yaml permits; 1.29 is the first with native sidecars."""

Values = dict[str, Any]
Object = dict[str, Any]

CASES: dict[str, Values] = yaml.safe_load((DATA / "chart" / "cases.yaml").read_text(encoding="utf-8"))
GOLDEN = {name: DATA / "chart" / "golden" / f"{name}.yaml"
          for name in ("sidecar-monitored", "daemonset", "deployment", "example")}
INPUTS = [{"name": "pi", "volume": "agent", "sessions": "sessions"}]


def library(name: str) -> Any:
    """A package of the group `dev`. Missing, it skips the test; in CI it fails it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if os.environ.get("REQUIRE_TOOLS") == "1":
            pytest.fail(f"the Python package {name} is not installed, and REQUIRE_TOOLS=1 says that it must be")
        pytest.skip(f"the Python package {name} is not installed")


@cache
def _loaded(chart: Path) -> Any:
    helm = library("helm_python")
    # Helm tells of every symbolic link that it follows.
    helm.disable_logging()
    return helm.Chart.load(chart)


def render(values: Values, *, chart: Path = CHART, kube: str = "1.31", name: str = "agents",
           namespace: str = "ai") -> dict[str, str]:
    """Template to text, as `helm template --kube-version` gives it. Raises HelmError, also for the schema's sake."""
    loaded = _loaded(chart)
    loaded.validate_schema(values)
    # Chart.render() has no version of Kubernetes; the library below it has.
    options = {"name": name, "namespace": namespace, "kube_version": f"v{kube}.0"}
    native = importlib.import_module("helm_python._native")
    rendered: dict[str, str] = json.loads(native.call_string(
        "helm_render", loaded._raw(), json.dumps(values), json.dumps(options)))
    return rendered


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes's strict readers take it: PyYAML lets the last of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key stands twice: {keys}"
        return super().construct_mapping(node, deep)


def objects(values: Values, *, chart: Path = CHART, kube: str = "1.31", name: str = "agents") -> list[Object]:
    """The objects, in the order of their templates."""
    rendered = render(values, chart=chart, kube=kube, name=name)
    texts = [text for path, text in sorted(rendered.items()) if not path.endswith("NOTES.txt")]
    return [each for text in texts for each in yaml.load_all(text, _Loader) if each]


def only(found: list[Object], kind: str) -> Object:
    """The one object of a kind."""
    (one,) = (each for each in found if each["kind"] == kind)
    return one


def notes(values: Values, **how: Any) -> str:
    return render(values, **how)[f"{NAME}/templates/NOTES.txt"]


def refusal(values: Values, *, chart: Path = CHART) -> str:
    """What Helm says to values that must not render."""
    with pytest.raises(library("helm_python").HelmError) as caught:
        render(values, chart=chart)
    return str(caught.value)


def pod_spec(found: list[Object]) -> Object:
    """The pod of the one workload."""
    (workload,) = (each for each in found if "template" in each.get("spec", {}))
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def exporter(spec: Object) -> Object:
    """The exporter's container in a pod, wherever it is."""
    (one,) = (each for each in [*(spec.get("initContainers") or []), *spec["containers"]] if each["name"] == NAME)
    container: Object = one
    return container


@cache
def _crd(kind: str) -> Any:
    """Its schema, closed: the operator would drop what it does not know without a word."""
    def close(node: Any) -> Any:
        if isinstance(node, list):
            return [close(each) for each in node]
        if not isinstance(node, dict):
            return node
        closed = {key: close(each) for key, each in node.items()}
        if isinstance(node.get("properties"), dict) and node["properties"] and "additionalProperties" not in node:
            closed["additionalProperties"] = False
        return closed

    file = DATA / "chart" / "crds" / f"{kind}.json"
    return library("jsonschema").Draft7Validator(close(json.loads(file.read_text(encoding="utf-8"))))


@cache
def _kubernetes() -> Any:
    found = library("kubernetes_validate")
    # It reads two megabytes of definitions for each object.
    found.utils.schema_contents = cache(found.utils.schema_contents)
    return found


def validate(one: Object, kube: str) -> None:
    """Raise what is wrong with an object: by the operator's schemas, or strictly by those of a Kubernetes."""
    if one["apiVersion"] == "monitoring.coreos.com/v1":
        _crd(one["kind"]).validate(one)
    else:
        _kubernetes().validate(one, kube, strict=True)


def parent(directory: Path, values: Values, pod: str, *, alias: str = "") -> Path:
    """A chart that has this one as a dependency, and one template: a Deployment with `pod` as its pod template."""
    chart = directory / "parent"
    (chart / "templates").mkdir(parents=True)
    dependency = {"name": NAME, "version": "*", "repository": "", **({"alias": alias} if alias else {})}
    meta = {"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": [dependency]}
    (chart / "Chart.yaml").write_text(yaml.safe_dump(meta), encoding="utf-8")
    (chart / "values.yaml").write_text(yaml.safe_dump({alias or NAME: values}), encoding="utf-8")
    head = ("apiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: parent\nspec:\n"
            "  selector:\n    matchLabels: {app: agent}\n  template:\n")
    (chart / "templates" / "deployment.yaml").write_text(head + pod, encoding="utf-8")
    vendor(chart)
    return chart


def vendor(chart: Path) -> None:
    """What `helm dependency update` does for a chart that names this one by its path."""
    (chart / "charts").mkdir()
    (chart / "charts" / NAME).symlink_to(CHART)


def example(directory: Path) -> Path:
    """A copy of the example with its dependency in place."""
    chart = Path(shutil.copytree(EXAMPLE, directory / EXAMPLE.name, ignore=shutil.ignore_patterns("charts", "*.lock")))
    vendor(chart)
    return chart


def golden(name: str, directory: Path) -> str:
    """What a golden file holds: all that Kubernetes is given."""
    found = objects({}, chart=example(directory)) if name == "example" else objects(CASES[name])
    return yaml.safe_dump_all(found, sort_keys=False, width=120)


def main() -> None:
    import tempfile

    for name, file in GOLDEN.items():
        with tempfile.TemporaryDirectory() as directory:
            file.write_text(golden(name, Path(directory)), encoding="utf-8")


if __name__ == "__main__":
    main()
