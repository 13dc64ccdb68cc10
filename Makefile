# make run    the exporter, from this checkout:  make run ARGS="--web.listen-address=:9000"
# make demo   made-up agents with the exporter beside them:  make demo ARGS="--for 60s"
# make test   the tests; ARGS goes to pytest:    make test ARGS="tests/test_config.py -k env"
# make lint   ruff, mypy, import-linter, and whether the generated docs and dashboards are up to date
# make bench  the benchmarks; ARGS="--full" adds one of 5,000,000 events
# make endurance  the long form of the tests that try to break it: takes an hour; ARGS="-k crash" for one part
# make docs   write the generated docs and dashboards
# make pictures  draw docs/images over a simulated week; needs prometheus and promtool, takes minutes
# make image  build the container image and try it: needs buildah, debootstrap and root, or skips with the reason
# make sbom   write build/sbom.cdx.json and build/sbom-grpc.cdx.json: what the images are made of, for programs
# make clean  remove what the above made
#
# Needs Python 3.11 or newer with its venv module; everything else goes into .venv, from the index that pip is
# configured with.
#
# The package in .venv is always a built wheel, never an editable install: tests and `make run` see what a user
# would install, and a file missing from the wheel fails here first. Rebuilding after an edit takes about a
# second and no network, as the build backend stays in .venv.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := $(shell find src -name '*.py' -o -name py.typed)
SHIPPED := $(wildcard grafana/dashboards/*.json grafana/rules/*.yaml)
MIN_PYTHON := 3.11

markdown_of = $(PY) -c 'from coding_agent_exporter import $(1) as m; print(m.markdown(), end="")'
outdated = { echo 'the generated docs are out of date: make docs' >&2; exit 1; }

.PHONY: run demo test lint bench endurance docs pictures image sbom clean
.DELETE_ON_ERROR:

run: $(VENV)/.package
	@exec $(VENV)/bin/coding-agent-exporter $(ARGS)

demo: $(VENV)/.package
	@exec $(VENV)/bin/coding-agent-exporter demo $(ARGS)

test: $(VENV)/.package $(VENV)/.dev
	$(PY) -m pytest $(ARGS)

lint: $(VENV)/.package $(VENV)/.dev
	$(VENV)/bin/ruff check src tests benchmarks grafana helm image
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	@$(call markdown_of,config) | diff -u docs/configuration.md - || $(outdated)
	@$(call markdown_of,families) | diff -u docs/metrics.md - || $(outdated)
	@$(PY) -m grafana --check
	@$(PY) helm/readme.py --check
	@$(PY) image/licenses.py --check

bench: $(VENV)/.package $(VENV)/.dev
	$(PY) -m benchmarks $(ARGS)

# -rP shows what each of them measured.
endurance: $(VENV)/.package $(VENV)/.dev
	ENDURANCE=1 $(PY) -m pytest -rP tests/test_endurance_*.py tests/test_security_links.py $(ARGS)

docs: $(VENV)/.package $(VENV)/.dev
	$(call markdown_of,config) > docs/configuration.md
	$(call markdown_of,families) > docs/metrics.md
	$(PY) -m grafana
	$(PY) helm/readme.py
	$(PY) image/licenses.py

image: $(VENV)/.package $(VENV)/.dev
	IMAGE_TEST=1 $(PY) -m pytest -rP tests/test_image.py $(ARGS)

pictures: $(VENV)/.package $(VENV)/.dev
	$(PY) -m grafana.pictures

sbom: $(VENV)/.dev
	@mkdir -p build
	$(PY) image/sbom.py > build/sbom.cdx.json
	$(PY) image/sbom.py --grpc > build/sbom-grpc.cdx.json

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests benchmarks grafana helm image -name __pycache__ -type d -prune -exec rm -rf {} +

# Dependencies come in when pyproject.toml changes, and only then. pip knows --group since 25.1.
$(VENV)/.made: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN_PYTHON)".split("."))))' || \
	    { echo "Python $(MIN_PYTHON) or newer is needed; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	    { echo "$(PYTHON) lacks its venv module (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade 'pip>=25.1'
	$(PY) -m pip install --quiet --group build
	$(PY) -m pip install --quiet --no-build-isolation .
	touch $@

# --no-build-isolation: with the backend at hand a rebuild neither downloads nor waits.
$(VENV)/.package: $(VENV)/.made $(SOURCES) $(SHIPPED) README.md LICENSE
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	touch $@

$(VENV)/.dev: $(VENV)/.made
	$(PY) -m pip install --quiet --group dev
	touch $@
