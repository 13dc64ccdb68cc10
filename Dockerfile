# The image of coding-agent-exporter: Debian's Python without a shell or a package manager, the exporter, its
# dependencies with their hashes, and their bytecode, as the root file system is meant to be read-only.
#
#   docker build -t coding-agent-exporter .
#   docker buildx build --platform linux/amd64,linux/arm64 -t coding-agent-exporter .
#   buildah build --format docker -t coding-agent-exporter .      (the OCI format has no HEALTHCHECK)
#
# docs/image.md says what can be set, and how to build behind a mirror.

# Both have the same minor version of Python; the last RUN fails where they have not. For a build that can be
# repeated give digests: --build-arg RUNTIME=gcr.io/distroless/python3-debian13:nonroot@sha256:...
ARG BUILDER=docker.io/library/python:3.13-slim-trixie
ARG RUNTIME=gcr.io/distroless/python3-debian13:nonroot


FROM ${BUILDER} AS build
# EXTRA=grpc adds OTLP over gRPC, and 20 MB.
ARG EXTRA=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN ["python3", "-m", "venv", "/venv"]
COPY image/requirements*.txt image/
# The secret is a pip.conf, for those who have an index of their own; nothing of it stays in a layer.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    /venv/bin/pip install --quiet --require-hashes --only-binary=:all: -r image/requirements-build.txt && \
    /venv/bin/pip download --quiet --require-hashes --only-binary=:all: --no-deps --dest /wheels \
        -r "image/requirements${EXTRA:+-$EXTRA}.txt"
COPY pyproject.toml README.md LICENSE ./
COPY grafana/dashboards grafana/dashboards
COPY grafana/rules grafana/rules
COPY src src
RUN /venv/bin/pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir /wheels . && \
    /venv/bin/pip install --quiet --no-index --no-deps --no-compile --target /app /wheels/*.whl && \
    # The one program that is kept runs on the Python of the final stage.
    sed '1c#!/usr/bin/python3' /app/bin/coding-agent-exporter > /build/coding-agent-exporter && \
    chmod 755 /build/coding-agent-exporter && \
    rm -r /app/bin && \
    # Any user may keep state there, so that --user works; a new volume takes over owner and mode.
    mkdir -p /build/state && mkdir -m 1777 /build/state/coding-agent-exporter
COPY image/healthcheck.py /app/


FROM ${RUNTIME}
# HOME is where the agent's home directory is to be mounted: ~/.pi and the like mean what they mean to the agent.
# XDG_STATE_HOME is the default of --state.path, which a TOML file can still set.
ENV HOME=/agent \
    XDG_STATE_HOME=/var/lib \
    PYTHONPATH=/app \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
COPY --from=build /app /app
COPY --from=build /build/coding-agent-exporter /usr/local/bin/
COPY --from=build --chown=65532:65532 /build/state/ /var/lib/
USER 0:0
WORKDIR /agent
RUN --mount=type=bind,source=image,target=/mnt ["/usr/bin/python3", "/mnt/bytecode.py"]
ENV PYTHONDONTWRITEBYTECODE=1

USER 65532:65532
VOLUME /var/lib/coding-agent-exporter
EXPOSE 10464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 CMD ["/usr/bin/python3", "/app/healthcheck.py"]
ENTRYPOINT ["/usr/local/bin/coding-agent-exporter"]
CMD []

ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="coding-agent-exporter" \
      org.opencontainers.image.description="Prometheus exporter for coding agents: activity, context pressure, tokens and cost" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
