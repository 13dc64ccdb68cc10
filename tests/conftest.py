"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import shutil
import tarfile
from typing import TYPE_CHECKING

import pytest

from support import DATA

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def adversarial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked trees of nasty usage logs: `<n>/agents/...` and `<n>/expected.json`."""
    target = tmp_path_factory.mktemp("adversarial")
    with tarfile.open(DATA / "adversarial.tar.xz") as archive:
        archive.extractall(target, filter="data")
    return target / "adversarial"


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """The path of a program that is no Python package. Missing, it skips the test; in CI it fails it."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            if os.environ.get("REQUIRE_TOOLS") == "1":
                pytest.fail(f"{name} is not installed, and REQUIRE_TOOLS=1 says that it must be")
            pytest.skip(f"{name} is not installed")
        return path

    return find


@pytest.fixture(scope="session")
def amount() -> Callable[[int, int], int]:
    """How much of an endurance test to do: the first number in `make test`, the second in `make endurance`."""
    long = os.environ.get("ENDURANCE") == "1"

    def choose(short: int, full: int) -> int:
        return full if long else short

    return choose
