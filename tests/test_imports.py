"""What a plain exporter does not load: start-up time and memory are part of what it promises."""

from __future__ import annotations

import subprocess
import sys

import pytest

# prometheus_client itself imports ssl and http.server; nothing else that serves plain HTTP needs them.
NOT_NEEDED = (
    "anyio", "asyncio", "bcrypt", "genai_prices", "multiprocessing", "opentelemetry", "pydantic", "watchfiles", "yaml",
)


def loaded(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after a statement."""
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("name", NOT_NEEDED)
def test_serving_plain_http_does_not_load(name: str, served: set[str]) -> None:
    """Prices, passwords, YAML and event loops are loaded by the first thing that needs them, if anything does."""
    assert name not in served


def test_help_and_errors_in_settings_do_not_load_the_exporter() -> None:
    """`--help` answers without prometheus_client, sqlite3 and the pipeline."""
    modules = loaded("import coding_agent_exporter.cli")
    assert "coding_agent_exporter.cli" in modules
    assert not modules & {"coding_agent_exporter.pipeline", "prometheus_client", "sqlite3"}


@pytest.fixture(scope="module")
def served() -> set[str]:
    modules = loaded("import coding_agent_exporter.serve")
    assert "coding_agent_exporter.pipeline" in modules
    return modules
