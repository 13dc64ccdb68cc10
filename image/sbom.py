"""Takes the locked packages and docs/licenses.md, gives a bill of materials in CycloneDX's JSON on standard output.

    python image/sbom.py [--grpc] > sbom.cdx.json

Needs no network, and gives the same bytes for the same locks. What comes with the base image is not in it: that is
for a scanner of the image to say.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
import uuid
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from licenses import TOP, Package, listed, locked
from packageurl import PackageURL

VERSION = SchemaVersion.V1_6
NAMESPACE = uuid.UUID("8f7e1d5c-3f57-4f0e-9a53-0a6a6f0e9f0b")
"""Of serial numbers, which are made of the content."""


def component(package: Package, licence: str) -> Component:
    """A locked package. The hashes are of all its distributions, as the lock file does not tell which is which."""
    return Component(
        name=package.name, version=package.version, bom_ref=f"pkg:pypi/{package.name}@{package.version}",
        purl=PackageURL("pypi", name=package.name, version=package.version),
        # A part of the build is not a part of the image.
        scope=ComponentScope.EXCLUDED if package.where == "the build only" else ComponentScope.REQUIRED,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest) for digest in package.hashes],
        licenses=[LicenseFactory().make_from_string(licence)])


def bom(*, grpc: bool) -> Bom:
    """The bill of materials of an image. Raises KeyError: docs/licenses.md is out of date."""
    project: dict[str, Any] = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    licences = listed()
    parts = [component(package, licences[package.name, package.version]) for package in locked()
             if grpc or package.where != "the image with gRPC"]
    made = Bom(components=parts)
    made.metadata.component = whole = Component(
        type=ComponentType.APPLICATION, name=project["name"], version=project["version"],
        bom_ref=project["name"], description=project["description"],
        purl=PackageURL("pypi", name=project["name"], version=project["version"]),
        licenses=[LicenseFactory().make_from_string(project["license"])])
    made.register_dependency(whole, parts)
    made.serial_number = uuid.uuid5(NAMESPACE, ",".join(sorted(str(part.purl) for part in [whole, *parts])))
    return made


def text(made: Bom) -> str:
    """The document, without the time at which it was made. Raises ValueError: CycloneDX's schema does not allow it."""
    made.metadata.timestamp = None  # type: ignore[assignment]  # it may be left out, and then two runs are the same
    document = make_outputter(made, OutputFormat.JSON, VERSION).output_as_string(indent=2)
    if wrong := JsonStrictValidator(VERSION).validate_str(document):
        raise ValueError(f"not what CycloneDX's schema allows: {wrong}")
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description="Print a bill of materials in CycloneDX's JSON.")
    parser.add_argument("--grpc", action="store_true", help="of the image with gRPC")
    print(text(bom(grpc=parser.parse_args().grpc)))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
