"""The exporter accepts what the chart gives it: flags, variables, and the web configuration."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart_support import (
    CASES,
    CHART,
    ROOT,
    Object,
    Values,
    example,
    exporter,
    library,
    objects,
    pod_spec,
    render,
)
from coding_agent_exporter import config, webconfig
from coding_agent_exporter.export import target
from web_support import Authority

MANAGED = {
    "config.file", "web.listen-address", "web.telemetry-path", "web.config.file", "telemetry.dir", "usage.root",
    "sessions.dir", "state.path", "shutdown.linger", "otlp.endpoint", "otlp.protocol", "otlp.headers",
}
"""Settings that values of their own decide."""

RUNNING = [name for name, values in CASES.items() if values.get("mode")]


def secrets(found: list[Object]) -> dict[str, dict[str, str]]:
    return {one["metadata"]["name"]: one["stringData"] for one in found if one["kind"] == "Secret"}


def environment(container: Object, found: list[Object]) -> dict[str, str]:
    """The variables as the kubelet would set them; a Secret that the chart does not make has a header."""
    env = {}
    for each in container["env"]:
        source = each.get("valueFrom", {})
        if "secretKeyRef" in source:
            reference = source["secretKeyRef"]
            env[each["name"]] = secrets(found).get(reference["name"], {"headers": "a=b"})[reference["key"]]
        else:
            env[each["name"]] = each.get("value", "from-the-pod")
    return env


def run(container: Object, found: list[Object], root: Path) -> subprocess.CompletedProcess[str]:
    """`check` with what the container is given; paths of the container lie below `root`."""
    args = [re.sub(r"(?<==)/(agents|var|etc)/", rf"{root}/\1/", arg) for arg in container["args"]]
    for path in re.findall(r"=(/\S*/agents/\S+)", "\n".join(args)):
        Path(path).mkdir(parents=True, exist_ok=True)
    (root / "var/lib/coding-agent-exporter").mkdir(parents=True)
    ours = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    env = {**ours, **environment(container, found), "HOME": str(root / "var/lib/coding-agent-exporter")}
    return subprocess.run([sys.executable, "-m", "coding_agent_exporter", "check", *args], env=env, cwd=root,
                          capture_output=True, text=True, check=False, timeout=60)


def provide(found: list[Object], root: Path) -> None:
    """The files that Secrets put into the container."""
    web = root / "etc/coding-agent-exporter/web"
    tls = root / "etc/coding-agent-exporter/tls"
    web.mkdir(parents=True)
    tls.mkdir()
    text = next((data["web.yml"] for data in secrets(found).values() if "web.yml" in data), "")
    (web / "web.yml").write_text(text.replace(": /etc/", f": {root}/etc/"), encoding="utf-8")
    authority = Authority(tls, "ca")
    certificate, key = authority.issue("tls", "exporter")
    # As a Secret of type kubernetes.io/tls calls them.
    assert (certificate.name, key.name) == ("tls.crt", "tls.key")


@pytest.mark.parametrize("name", [*RUNNING, "example"])
def test_the_program_accepts_what_the_container_is_given(name: str, tmp_path: Path) -> None:
    """`coding-agent-exporter check`, with the rendered flags, variables and files, finds no problem."""
    found = objects({}, chart=example(tmp_path / "chart")) if name == "example" else objects(CASES[name])
    provide(found, tmp_path)
    done = run(exporter(pod_spec(found)), found, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no problems found" in done.stdout


def test_the_program_is_really_asked(tmp_path: Path) -> None:
    """A flag that it does not know is a failure of the test above."""
    found = objects({**CASES["deployment"], "extraArgs": ["--counters.zero-holt=1m"]})
    provide(found, tmp_path)
    done = run(exporter(pod_spec(found)), found, tmp_path)
    assert done.returncode == 2
    assert "unknown flag; did you mean --counters.zero-hold?" in done.stderr


@pytest.mark.parametrize("name", [name for name in RUNNING if CASES[name].get("web", {}).get("basicAuth")
                                  or CASES[name].get("web", {}).get("tls")])
def test_the_web_configuration_is_what_the_values_ask_for(name: str, tmp_path: Path) -> None:
    """Users, certificate and what clients have to show, as the exporter's own loader reads the Secret."""
    values, found = CASES[name]["web"], objects(CASES[name])
    provide(found, tmp_path)
    file = tmp_path / "etc/coding-agent-exporter/web/web.yml"
    loaded = webconfig.load(file)
    assert loaded.notes == ()
    assert loaded.users == values.get("basicAuth", {}).get("users", {})
    tls = values.get("tls")
    assert (loaded.tls is not None) == bool(tls)
    if loaded.tls is not None:
        assert {path.resolve() for path in loaded.files()} >= {
            tmp_path / "etc/coding-agent-exporter/tls" / each for each in ("tls.crt", "tls.key")}
        assert (loaded.tls.client_auth == "RequireAndVerifyClientCert") == bool(tls.get("verifyClients"))


def test_headers_and_attributes_arrive_as_they_were_written(tmp_path: Path) -> None:
    """Spaces, commas and equals signs survive the way through Secret and variable."""
    values = CASES["deployment-with-collector"]
    found = objects(values)
    env = environment(exporter(pod_spec(found)), found)
    settings = config.load(exporter(pod_spec(found))["args"], env, home=tmp_path, cwd=tmp_path)
    resolved = target.resolve(env, **settings.collector)
    assert resolved is not None
    assert resolved.headers == values["otlp"]["headers"]
    resource = target.resource(env, version="1", instance="x", host="h")
    assert resource.items() >= {
        "deployment.environment.name": "prod, eu", "k8s.cluster.name": "prod", "k8s.pod.name": "from-the-pod",
        "k8s.container.name": "coding-agent-exporter", "k8s.deployment.name": "agents-coding-agent-exporter"}.items()


def test_settings_are_what_the_values_say(tmp_path: Path) -> None:
    """Flags of `settings`, large numbers and switches among them, mean what was written."""
    found = objects(CASES["deployment-of-many-options"])
    settings = config.load(exporter(pod_spec(found))["args"], {}, home=tmp_path, cwd=tmp_path)
    assert settings.counters_max_series == 2_000_000
    assert settings.counters_zero_hold == 90
    assert settings.usage_agent_label
    assert settings.watch_force_polling
    assert settings.telemetry_info_labels == ("provider", "model")
    assert [(root.kind, root.alias, str(root.path)) for root in settings.roots if root.kind == "sessions"] == [
        ("sessions", "shared", "/agents/shared/sessions")]


def test_every_setting_has_a_place_in_the_values() -> None:
    """The schema of `settings` has each option of the program but those that the chart decides by itself."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    tables = schema["properties"]["settings"]["properties"]
    known = {f"{group}.{name}" for group, table in tables.items() for name in table["properties"]}
    assert known == {option.name for option in config.OPTIONS} - MANAGED
    for option in config.OPTIONS:
        if option.choices and option.name in known and option.name != "telemetry.info-labels":
            group, _, name = option.name.partition(".")
            assert set(tables[group]["properties"][name]["enum"]) == set(option.choices) - {""}


@pytest.mark.parametrize("option", [option for option in config.OPTIONS if option.name not in MANAGED], ids=str)
def test_every_default_can_be_written_out(option: config.Option) -> None:
    """What a setting is by default is a value that the schema takes and the program reads."""
    if not option.default:
        return
    group, _, name = option.name.partition(".")
    value: Any = option.default
    expected = f"{option.flag}={value}"
    if value in {"true", "false"}:
        value, expected = value == "true", f"--{'' if value == 'true' else 'no-'}{option.name}"
    elif value.isdigit() and option.type.name != "duration":
        value = int(value)
    values: Values = {**CASES["deployment"], "settings": {group: {name: value}}}
    args = exporter(pod_spec(objects(values)))["args"]
    assert expected in args


PAGES = (ROOT / "docs" / "kubernetes.md", CHART / "README.md")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_values_in_the_documentation_render(block: str) -> None:
    """Each values file of docs/kubernetes.md is one: the schema takes it, and nothing in it clashes."""
    assert block.startswith("# values.yaml")
    assert render(yaml.safe_load(block))


def test_the_documented_commands_render(tmp_path: Path) -> None:
    """`--set` of the commands in docs/kubernetes.md and in the chart's README make values that render."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    commands = re.findall(r"^helm install (?:.*\\\n)*.*$", text, re.MULTILINE)
    charts = {"helm/coding-agent-exporter": CHART, "helm/examples/pi-agent-job": example(tmp_path)}
    assert {command.split()[-1] for command in commands} == set(charts)
    for command in commands:
        expressions = [quoted or plain for quoted, plain in re.findall(r"--set (?:'([^']+)'|(\S+))", command)]
        values = library("helm_python").parse_set_string(",".join(expressions))
        assert objects(values, chart=charts[command.split()[-1]])
