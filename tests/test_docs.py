"""What the documentation names is there, what it quotes is accepted, and what there is it names."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tomllib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from coding_agent_exporter import cli, config, families, spans, webconfig
from coding_agent_exporter.model import Activity, Pressure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
PROG = "coding-agent-exporter"

OF_PROMETHEUS = {"job", "instance"}
"""Labels that a scrape adds."""

VALUES = {
    "activity": {activity.value for activity in Activity},
    "pressure": {pressure.value for pressure in Pressure},
    "cost_mode": {"api_key", "subscription"},
    "provenance": {"reported", "estimated"},
    "token_type": {"input", "output", "cache_read", "cache_creation"},
    "state": set(families.FILE_STATES),
    "outcome": {"ok", "failed", "error", "unknown"},
}
"""Labels with a closed set of values."""


RECORDED = {rule["record"] for file in ROOT.glob("grafana/rules/*.yaml")
            for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]
            if "record" in rule}
"""Series that the rules add."""


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
            if not languages or match[2] in languages:
                inner = re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)
                found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[2], inner))
    return found


def code(page: Path) -> str:
    """All that is written as code on a page, one piece a line."""
    text = page.read_text(encoding="utf-8")
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join([*inline, *(block.text for block in blocks() if block.page == page)])


def expressions() -> Iterator[str]:
    """Every PromQL expression: in a block of them an empty line stands between two."""
    for block in blocks("promql"):
        yield from (part for part in re.split(r"\n\s*\n", block.text.strip("\n")) if part.strip())


def on_every_page(test: Callable[..., None]) -> Callable[..., None]:
    marked: Callable[..., None] = pytest.mark.parametrize(
        "page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))(test)
    return marked


@on_every_page
def test_flags_exist(page: Path) -> None:
    """Every dotted flag is one of the exporter's, and so is every flag that follows the program's name."""
    known = {option.flag for option in config.OPTIONS} | {f"--no-{option.name}" for option in config.OPTIONS}
    written = set(re.findall(r"--[a-z]+(?:[.-][a-z]+)*\.[a-z-]*[a-z]", page.read_text(encoding="utf-8")))
    assert written - known == set()
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    for command in cli.COMMANDS:
        if command.add_arguments:
            command.add_arguments(parser)
    own = set(re.findall(r"--[a-z-]+", parser.format_help())) | {"--version"}
    # What follows a bare -- is another program's.
    after = " ".join(line.partition(" -- ")[0] for line in re.findall(rf"{PROG}\b(.*)", code(page)))
    assert set(re.findall(r"--[a-z.-]*[a-z]", after)) - known - own == set()


@on_every_page
def test_environment_variables_exist(page: Path) -> None:
    """Every variable with the exporter's prefix is one that it knows."""
    written = set(re.findall(r"CODING_AGENT_EXPORTER_\w+", page.read_text(encoding="utf-8")))
    assert written - {option.env for option in config.OPTIONS} == set()


@on_every_page
def test_commands_exist(page: Path) -> None:
    """What follows the program's name in code is a command."""
    written = set(re.findall(rf"(?:^|\s|/){PROG} ([a-z]+)", code(page), re.MULTILINE))
    assert written - {command.name for command in cli.COMMANDS} == set()


def test_every_command_is_in_the_readme() -> None:
    """A command that nobody reads of does not exist."""
    text = code(ROOT / "README.md")
    assert [command.name for command in cli.COMMANDS if f"{PROG} {command.name}" not in text] == []


@on_every_page
def test_metrics_exist(page: Path) -> None:
    """Every name with the prefix of the metrics is a family or is recorded; the package's own name is none."""
    text = page.read_text(encoding="utf-8")
    written = set(re.findall(r"(?<![\w/:])coding_agent_\w*[a-z](?![\w/*:])", text))
    assert written - families.BY_NAME.keys() - {"coding_agent_exporter"} == set()
    assert set(re.findall(r"\b[a-z]+:coding_agent_\w+:\w+", text)) - RECORDED == set()


def test_every_metric_of_the_exporter_itself_is_explained() -> None:
    """docs/operating.md says of each what it means when it is not as it should be."""
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    own = [name for name in families.BY_NAME if name.startswith("coding_agent_exporter_")]
    assert [name for name in own if name not in text] == []


@on_every_page
def test_selectors_match_something(page: Path) -> None:
    """Selectors and samples name labels that their family has, and values that these labels can have."""
    for name, matchers in re.findall(r"(coding_agent_\w+)\{([^}]*)\}", code(page)):
        family = families.BY_NAME[name]
        for label, operator, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers):
            assert label in {*family.labels, *OF_PROMETHEUS}, f"{name}{{{matchers}}}"
            if label in VALUES:
                values = value.split("|") if "~" in operator else [value]
                assert set(values) <= VALUES[label], f"{name}{{{matchers}}}"


@pytest.mark.parametrize(
    "block", [block for block in blocks("text") if block.text.startswith("coding_agent_")], ids=str)
def test_quoted_samples_are_as_they_are_served(block: Block) -> None:
    """An excerpt of /metrics parses, and each sample has the labels of its family, in the order of the encoder."""
    served = list(text_string_to_metric_families(block.text))
    assert sum(len(family.samples) for family in served) == len(block.text.splitlines())
    for family in served:
        for sample in family.samples:
            assert list(sample.labels) == sorted(families.BY_NAME[sample.name].labels)


def promtool(path: str, what: str, file: Path) -> str:
    """What `promtool check` says; its complaint is the test's."""
    done = subprocess.run([path, "check", what, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promql_parses(tool: Callable[[str], str], tmp_path: Path) -> None:
    """promtool takes every expression as a recording rule."""
    rules = tmp_path / "rules.yml"
    lines = ["groups:", "- name: docs", "  rules:"]
    count = 0
    for expression in expressions():
        lines += [f"  - record: docs:{count}", "    expr: |2"]
        lines += [f"      {line}" for line in expression.splitlines()]
        count += 1
    rules.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert f"{count} rules found" in promtool(tool("promtool"), "rules", rules)
    assert count > 5


@pytest.mark.parametrize("block", [each for each in blocks("yaml") if "scrape_configs" in each.text], ids=str)
def test_scrape_configuration_is_taken(block: Block, tool: Callable[[str], str], tmp_path: Path) -> None:
    """promtool takes the configuration, and its target is the exporter's default port."""
    file = tmp_path / "prometheus.yml"
    file.write_text(block.text, encoding="utf-8")
    assert "SUCCESS" in promtool(tool("promtool"), "config", file)
    port = next(option.default for option in config.OPTIONS if option.name == "web.listen-address")
    assert f"localhost{port}" in block.text


FOREIGN = ("scrape_configs:", "rule_files:", "receivers:", "route:", "apiVersion:", "# values.yaml")
"""What opens the YAML of other programs: Prometheus, OpenTelemetry Collector, Alertmanager, Grafana, Helm."""


@pytest.mark.parametrize("block", [each for each in blocks("yaml") if not each.text.startswith(FOREIGN)], ids=str)
def test_web_configuration_is_taken(block: Block) -> None:
    """All other YAML is a web configuration that can be honoured as it stands."""
    assert webconfig.parse(block.text.encode(), ROOT / "web.yml").notes == ()


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml_is_taken(block: Block, tmp_path: Path) -> None:
    """Every TOML file in the documentation is a configuration of the exporter."""
    config.load(["--config.file=x.toml"], {}, home=tmp_path, cwd=tmp_path, read=lambda _: block.text)


@pytest.mark.parametrize("block", blocks("ini"), ids=str)
def test_the_service_starts_the_exporter(block: Block, tmp_path: Path) -> None:
    """The settings in ExecStart are taken, and systemd waits longer than the exporter lingers."""
    flags = re.search(rf"^ExecStart=\S+/{PROG} (.*)$", block.text, re.MULTILINE)
    assert flags is not None
    settings = config.load(flags[1].split(), {}, home=tmp_path, cwd=tmp_path)
    patience = re.search(r"^TimeoutStopSec=(\d+)s$", block.text, re.MULTILINE)
    assert patience is not None
    assert int(patience[1]) > settings.shutdown_linger


def test_the_documented_attributes_are_those_of_spans() -> None:
    """docs/spans.md names every attribute that a span can have, and no other; and so do all other pages."""
    names = r"`((?:gen_ai|coding_agent|error)\.[a-z_.]*[a-z])`"
    metrics = {family.otlp for family in families.FAMILIES}
    written = {page.name: set(re.findall(names, page.read_text(encoding="utf-8"))) - metrics for page in PAGES}
    # The name of an event, which stands on a span, but is no attribute of it.
    assert written.pop("spans.md") == spans.ALLOWED | {spans.COMPACTION}
    assert {name for found in written.values() for name in found} <= spans.ALLOWED | {spans.COMPACTION}


def trees() -> set[str]:
    """The recorded traces as docs/spans.md shows them: name, start, duration, cost, error."""
    def lines(node: dict[str, Any], zero: datetime, depth: int = 0) -> Iterator[str]:
        start, end = datetime.fromisoformat(node["start"]), datetime.fromisoformat(node["end"])
        at, took = (round(span.total_seconds() * 1000) for span in (start - zero, end - start))
        name, found = "  " * depth + node["name"], node["attributes"]
        cost, error = found.get("coding_agent.cost.usd", ""), found.get("error.type", "")
        yield f"{name:29}{at:7} ms{took:7} ms  {cost!s:10} {error}".rstrip() + "\n"
        for child in node.get("children", ()):
            yield from lines(child, zero, depth + 1)

    golden = (ROOT / "tests" / "data" / "spans").glob("*.json")
    roots = [root for path in golden for root in json.loads(path.read_text(encoding="utf-8"))]
    return {"".join(lines(root, datetime.fromisoformat(root["start"]))) for root in roots}


@pytest.mark.parametrize("block", [each for each in blocks("text") if each.text.startswith("invoke_agent")], ids=str)
def test_the_traces_shown_are_recorded_ones(block: Block) -> None:
    """A trace in the documentation is what the exporter makes of a recording."""
    assert block.text in trees()


@on_every_page
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links are files of the repository, and their fragments are headings there."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert fragment in slugs, target


@on_every_page
def test_paths_exist(page: Path) -> None:
    """Paths of the repository that are written as code are there; so are the targets of make."""
    for path in re.findall(r"(?<![\w./-])((?:src|tests|docs|\.ci)/[\w./*-]+)", code(page)):
        assert list(ROOT.glob(path.rstrip("/."))), path
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|\s)make ([a-z]+)", code(page), re.MULTILINE)) - targets == set()


def test_the_architecture_names_every_module_in_its_layer() -> None:
    """The table in docs/architecture.md goes from the top layer down, and leaves none out; what it names is there."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE)
    package = ROOT / "src" / "coding_agent_exporter"
    assert [name for name in named if not (package / name).is_file()] == []
    assert len(named) == len(set(named))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = project["tool"]["importlinter"]["contracts"][0]
    level = {name.strip(): number for number, layer in enumerate(contract["layers"]) for name in layer.split("|")}
    tops = [re.split(r"[/.]", name)[0] for name in named]
    # import-linter fails for a module that is in no layer.
    assert set(tops) == {*level, *contract["exhaustive_ignores"]}
    levels = [level[top] for top in tops if top in level]
    assert levels == sorted(levels)


def test_nothing_of_a_machine_is_in_the_documentation() -> None:
    """Paths are those of nobody's machine."""
    texts = {str(page): page.read_text(encoding="utf-8") for page in PAGES}
    assert [page for page, text in texts.items() if re.search(r"/(tmp|work|root)/", text)] == []
