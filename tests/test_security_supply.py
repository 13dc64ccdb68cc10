"""What the program is made of: each part is listed with its licence, and a bill of materials says the same; and
SECURITY.md names nothing that is not there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from test_image import pins

TOP = Path(__file__).parent.parent
PERMISSIVE = {"MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "PSF-2.0", "ISC"}


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOP / "image" / script, *arguments], capture_output=True, text=True,
                          check=False, timeout=120)


def rows() -> list[list[str]]:
    text = (TOP / "docs" / "licenses.md").read_text(encoding="utf-8")
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("| ")][1:]


def linux(pinned: dict[str, str]) -> dict[str, str]:
    """Without what is pinned for other platforms."""
    return {name: version for name, version in pinned.items() if name != "httpx2-jsfetch"}


def test_the_list_of_licences_is_up_to_date() -> None:
    """Each pinned package is on the page in the version that is pinned, with the licence that its metadata names."""
    done = run("licenses.py", "--check")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    every = pins("requirements-build.txt") | linux(pins("requirements-grpc.txt"))
    assert {name: version for name, version, *_ in rows()} == every


def test_what_is_shipped_may_be_shipped() -> None:
    """Licences of what is in an image ask for no more than to be named; the build may use others."""
    for name, _, licence, where in rows():
        if where != "the build only":
            assert set(re.split(r" AND | OR ", licence)) <= PERMISSIVE, name


@pytest.mark.parametrize(("arguments", "files"), [
    ((), ("requirements.txt", "requirements-build.txt")),
    (("--grpc",), ("requirements.txt", "requirements-grpc.txt", "requirements-build.txt")),
], ids=["plain", "grpc"])
def test_the_bill_of_materials_is_what_is_pinned(arguments: tuple[str, ...], files: tuple[str, ...]) -> None:
    """CycloneDX's own library validates it; it holds every pin, with the hashes, a licence and a package URL; a second
    run gives the same bytes, and neither asks the network."""
    done = run("sbom.py", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert run("sbom.py", *arguments).stdout == done.stdout
    document: dict[str, Any] = json.loads(done.stdout)
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["component"]["name"] == "coding-agent-exporter"
    wanted: dict[str, str] = {}
    hashes: set[str] = set()
    for file in files:
        wanted |= linux(pins(file))
        hashes |= set(re.findall(r"sha256:([0-9a-f]{64})", (TOP / "image" / file).read_text()))
    found = {part["name"]: part for part in document["components"]}
    assert {name: part["version"] for name, part in found.items()} == wanted
    for part in found.values():
        assert part["purl"] == f"pkg:pypi/{part['name']}@{part['version']}"
        assert part["licenses"]
        assert part["hashes"]
        assert {one["content"] for one in part["hashes"]} <= hashes
    build = set(pins("requirements-build.txt")) - set(pins("requirements-grpc.txt"))
    assert {name for name, part in found.items() if part["scope"] == "excluded"} == build


def test_the_tests_that_are_named_as_proof_exist() -> None:
    """SECURITY.md names tests as `file.py::test`, and every row of its tables of threats names one."""
    text = (TOP / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)(?:\.py)?(?:::(test_\w+))?`", text)
    assert len(named) > 40
    for file, test in named:
        source = TOP / "tests" / f"{file}.py"
        assert source.exists(), file
        assert not test or f"def {test}(" in source.read_text(encoding="utf-8"), f"{file}::{test}"
    for table in re.findall(r"^\| threat \|.*?\n\n", text, re.MULTILINE | re.DOTALL):
        for row in table.strip().splitlines()[2:]:
            assert "`test_" in row.strip("|").split("|")[-1], f"no proof: {row}"
