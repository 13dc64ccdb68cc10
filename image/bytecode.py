"""Takes the final stage of the image, gives it the bytecode of all modules that the exporter can come to import.

Runs in that stage, as its base brings Python without bytecode and its root is read-only when it runs: without, each
start would compile 200 modules. Compiling the whole standard library instead would cost 14 MB. Importing them all
also proves that the wheels are those of this Python.
"""

from __future__ import annotations

import importlib
import pkgutil
import py_compile
import sys

import coding_agent_exporter

LATE = ("bcrypt", "genai_prices", "opentelemetry.proto.collector.metrics.v1.metrics_service_pb2", "ssl", "yaml")
"""Imported when somebody needs them, not with the exporter's own modules."""

EXTRAS = {"grpc", "rich"}
"""Libraries of extras: gRPC is in the image only if asked for; the screen of `top` is for a person's own machine."""


def main() -> None:
    ours = pkgutil.walk_packages(coding_agent_exporter.__path__, "coding_agent_exporter.")
    for name in (*LATE, *(module.name for module in ours)):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
    for spec in [module.__spec__ for module in list(sys.modules.values())]:
        if spec is not None and spec.origin is not None and spec.cached is not None:
            # Unchecked: some builders set the times of files, after which other bytecode would count as outdated.
            py_compile.compile(spec.origin, spec.cached, doraise=True,
                               invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


if __name__ == "__main__":
    main()
