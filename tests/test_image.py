"""The image: what its Dockerfile promises, always; built for real, run and scraped, with `make image`.

IMAGE_TEST names a directory in which the bases are kept from one run to the next; with IMAGE_TEST=1 all is made anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bcrypt
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from agents_support import PiSession
from coding_agent_exporter.options import OPTIONS
from process_support import wait_for
from sidecar_support import EXPORTER_UID, Container, require_namespaces
from support import total
from web_support import Authority

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).parent.parent
STATE = "/var/lib/coding-agent-exporter"
COST = "coding_agent_cost_usd_total"
LIMIT = 90_000_000
"""Bytes of all files: what the image may weigh, unpacked and without gRPC."""


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in (TOP / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def of(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def project() -> dict[str, Any]:
    return tomllib.loads((TOP / "pyproject.toml").read_text())


def pins(name: str) -> dict[str, str]:
    """Package -> version of a file of requirements, each with at least one hash."""
    text = (TOP / "image" / name).read_text()
    found: dict[str, str] = {}
    for block in re.split(r"\n(?=\S)", text):
        if not block.startswith("#"):
            pin = re.match(r"([\w.-]+)==(\S+)", block)
            assert pin, f"{name}: not pinned: {block}"
            assert "--hash=sha256:" in block, f"{name}: no hash: {block}"
            found[canonicalize_name(pin[1])] = pin[2]
    return found


def test_bases_are_named_by_arguments_and_tags() -> None:
    """Whoever builds can pin a digest or use a mirror; nobody gets `latest`."""
    defaults = dict(rest.split("=", 1) for rest in of("ARG") if "=" in rest)
    bases = [re.fullmatch(r"\$\{(\w+)\}(?: AS \w+)?", rest) for rest in of("FROM")]
    assert len(bases) == 2
    for base in bases:
        assert base, "a base that is no argument"
        assert re.search(r":[\w.-]+$", defaults[base[1]])
        assert not defaults[base[1]].endswith(":latest")


def test_runs_as_a_number_without_a_shell() -> None:
    """Kubernetes' runAsNonRoot needs a number; an exec form needs no shell, and passes signals on."""
    last = [rest for word, rest in instructions() if word == "USER"][-1]
    assert last == f"{EXPORTER_UID}:{EXPORTER_UID}"
    final = instructions()[[word for word, _ in instructions()].index("FROM", 1 + next(
        number for number, (word, _) in enumerate(instructions()) if word == "FROM")):]
    for word, rest in final:
        if word in ("ENTRYPOINT", "CMD", "RUN", "HEALTHCHECK"):
            command = rest[rest.index("["):]
            assert isinstance(json.loads(command), list), f"{word} {rest}"
    assert of("ADD") == []
    assert of("STOPSIGNAL") == ["SIGTERM"]
    assert of("VOLUME") == [STATE]


def test_says_what_the_project_says() -> None:
    """Version, licence and port are those of pyproject.toml and of the options."""
    assert f"VERSION={project()['project']['version']}" in of("ARG")
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', of("LABEL")[0]))
    assert labels["licenses"] == project()["project"]["license"]
    assert labels["title"] == project()["project"]["name"]
    assert {"description", "version", "revision", "created"} <= labels.keys()
    port = next(option.default for option in OPTIONS if option.name == "web.listen-address").removeprefix(":")
    assert of("EXPOSE") == [port]


def test_the_build_context_is_what_is_copied() -> None:
    """Everything is ignored but what a COPY or a mount takes: no tests, no history, no state file with its paths."""
    taken = {word for rest in of("COPY") if "--from" not in rest for word in rest.split()[:-1]}
    taken |= {found[1] for rest in of("RUN") if (found := re.search(r"type=bind,source=(\w+)", rest))}
    lines = [line for line in (TOP / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert {name.partition("/")[0] for name in let_in} == {name.partition("/")[0] for name in taken}
    for name in let_in:
        assert list(TOP.glob(name)), f"{name} does not exist"


@pytest.mark.parametrize(("name", "wanted"), [
    ("requirements.txt", lambda given: given["project"]["dependencies"]),
    ("requirements-grpc.txt",
     lambda given: given["project"]["dependencies"] + given["project"]["optional-dependencies"]["grpc"]),
    ("requirements-build.txt", lambda given: given["dependency-groups"]["build"]),
], ids=["plain", "grpc", "build"])
def test_pinned_versions_are_what_the_project_asks_for(name: str, wanted: Any) -> None:
    """Each has a version that pyproject.toml allows, and hashes; nothing says where it is to be had."""
    found = pins(name)
    for requirement in map(Requirement, wanted(project())):
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), str(requirement)
    assert "://" not in (TOP / "image" / name).read_text()


def test_both_images_have_the_same_versions() -> None:
    """gRPC adds packages, and changes none."""
    assert pins("requirements.txt").items() <= pins("requirements-grpc.txt").items()


# From here on: the image itself.


@dataclass(frozen=True)
class Image:
    root: Path
    config: dict[str, Any]

    @property
    def env(self) -> dict[str, str]:
        return dict(variable.split("=", 1) for variable in self.config["Env"])

    def container(self, at: Path, home: Path, state: Path, *arguments: str, uid: int = EXPORTER_UID,
                  entrypoint: tuple[str, ...] = ()) -> Container:
        """As an engine runs it with --read-only, --network none, and the volumes of the documentation."""
        return Container(
            at, [*(entrypoint or self.config["Entrypoint"]), *(arguments or self.config["Cmd"] or ())], env=self.env,
            uid=uid, root=str(self.root), cwd=self.config["WorkingDir"], network=False,
            shared=[(home, "/agent", True), (state, STATE, False)],
        )

    def healthcheck(self, container: Container) -> subprocess.CompletedProcess[str]:
        """What the image's HEALTHCHECK says, run as an engine runs it: in the container."""
        kind, *command = self.config["Healthcheck"]["Test"]
        assert kind == "CMD", "CMD-SHELL needs a shell"
        return subprocess.run(
            ["nsenter", f"--target={container.pid}", "--mount", "--pid", "--net", "--root", "--wd",
             f"--setuid={EXPORTER_UID}", f"--setgid={EXPORTER_UID}", *command],
            env=self.env, capture_output=True, text=True, check=False, timeout=60,
        )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The image, built by tests/image/build.sh. Skips with the script's reason; fails where REQUIRE_TOOLS=1."""
    wanted = os.environ.get("IMAGE_TEST", "")
    if not wanted:
        pytest.skip("building the image takes a minute: make image")
    target = tmp_path_factory.mktemp("image") if wanted == "1" else Path(wanted)
    require_namespaces(tmp_path_factory.mktemp("try"))
    began = time.monotonic()
    done = subprocess.run([TOP / "tests/image/build.sh", target], capture_output=True, text=True, check=False)
    if done.returncode == 77 and os.environ.get("REQUIRE_TOOLS") != "1":
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    print(f"built in {time.monotonic() - began:.0f} s")
    if wanted == "1":
        shutil.rmtree(target / "bases")
    return Image(target / "rootfs", json.loads((target / "config.json").read_text()))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An agent's home directory with one session of 2.5 USD in it."""
    home = tmp_path / "home"
    PiSession(home / ".pi/agent/sessions").message("anthropic", "opus", 5 * 10**11 * 5)
    return home


@pytest.fixture
def state(tmp_path: Path, image: Image) -> Path:
    """A volume as an engine fills it at first: with owner and mode of the directory in the image."""
    state, inside = tmp_path / "state", (image.root / STATE.lstrip("/")).stat()
    state.mkdir()
    os.chown(state, inside.st_uid, inside.st_gid)
    state.chmod(stat.S_IMODE(inside.st_mode))
    return state


def files(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    for path in root.rglob("*"):
        yield "/" + str(path.relative_to(root)), path.lstat()


def test_image_holds_what_it_needs(image: Image) -> None:
    """No shell, no package manager, no pip, no compiler; below 90 MB; nothing but the state is anybody's to write."""
    found = dict(files(image.root))
    size = sum(status.st_size for status in found.values() if stat.S_ISREG(status.st_mode))
    print(f"{size / 2**20:.1f} MiB in {len(found)} files")
    assert size < LIMIT
    programs = {name.rpartition("/")[2] for name in found if re.search(r"/s?bin/", name)}
    assert programs & {"sh", "bash", "dash", "busybox", "apt", "dpkg", "pip", "pip3", "gcc", "cc", "curl"} == set()
    assert not [name for name in found if re.search(r"/site-packages/pip|/tests?/conftest|/\.git|pip\.conf", name)]
    ours = [name for name, status in found.items()
            if status.st_uid == EXPORTER_UID or (status.st_mode & 0o002 and not stat.S_ISLNK(status.st_mode))]
    assert set(ours) <= {"/tmp", "/var/tmp", "/var/lock", "/run/lock", STATE}


def test_image_starts_from_bytecode(image: Image, home: Path, state: Path, tmp_path: Path) -> None:
    """All modules that serving needs have theirs, also the standard library's: it could not be written at run time."""
    program = """if True:
        import coding_agent_exporter.serve, coding_agent_exporter.inspection, bcrypt, yaml, os, sys
        specs = [module.__spec__ for module in list(sys.modules.values()) if module.__spec__]
        print([spec.name for spec in specs if spec.cached and not os.path.exists(spec.cached)], file=sys.stderr)
    """
    python = ("/usr/bin/python3", "-c", program)
    with image.container(tmp_path / "at", home, state, entrypoint=python) as container:
        assert container.wait() == 0
    assert container.log == "[]"


def test_image_serves_stops_and_goes_on(image: Image, home: Path, state: Path, tmp_path: Path) -> None:
    """Nothing configured: the agent's home at /agent is read, SIGTERM ends it with 0, the volume carries the totals."""
    with image.container(tmp_path / "one", home, state) as first:
        began = time.monotonic()
        first.listens()
        print(f"listens after {time.monotonic() - began:.2f} s")
        assert first.port == 10464
        first.scrape()
        assert total(first.scrape(), COST, root="pi", model="opus") == 2.5
        status = first.status()
        assert status["Uid"].split()[0] == str(EXPORTER_UID)
        assert int(status["CapEff"], 16) == 0
        first.signal()
        assert first.wait() == 0
    shutil.rmtree(home / ".pi")
    with image.container(tmp_path / "two", home, state) as second:
        second.listens().scrape()
        assert total(second.scrape(), COST, root="pi", model="opus") == 2.5
        second.signal()
        assert second.wait() == 0


def test_image_runs_as_any_user(image: Image, home: Path, state: Path, tmp_path: Path) -> None:
    """With --user, as whose files only their owner may read: the volume for the state lets that user in."""
    for path in (home, *home.rglob("*")):
        os.chown(path, 1234, 1234)
        path.chmod(0o700 if path.is_dir() else 0o600)
    with image.container(tmp_path / "at", home, state, uid=1234) as container:
        container.listens().scrape()
        assert total(container.scrape(), COST, model="opus") == 2.5


def test_image_health_is_whether_it_answers(image: Image, home: Path, state: Path, tmp_path: Path) -> None:
    """Healthy at any address that a flag gives; not while the process stands still."""
    with image.container(tmp_path / "at", home, state, "serve", "--web.listen-address", "127.0.0.1:9999") as container:
        container.listens()
        done = image.healthcheck(container)
        assert (done.returncode, done.stdout) == (0, "HTTP/1.1 200 OK\n"), done.stderr
        container.signal(signal.SIGSTOP)
        assert image.healthcheck(container).returncode == 1
        container.signal(signal.SIGCONT)
        wait_for(lambda: image.healthcheck(container).returncode == 0, "health to come back")


def test_image_is_healthy_behind_a_password(image: Image, home: Path, state: Path, tmp_path: Path) -> None:
    """The check has no password: being asked for one is an answer."""
    hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
    (home / "web.yml").write_text(f"basic_auth_users:\n  prometheus: {hashed}\n")
    with image.container(tmp_path / "at", home, state, "--web.config.file=/agent/web.yml") as container:
        done = image.healthcheck(container.listens())
        assert (done.returncode, done.stdout) == (0, "HTTP/1.1 401 Unauthorized\n"), done.stderr


def test_image_is_healthy_behind_tls(image: Image, home: Path, state: Path, tmp_path: Path) -> None:
    """Whoever hangs up on plain text is there, and the exporter's own log is not filled with it."""
    certificate, key = Authority(home, "ca").issue("server", "localhost")
    key.chmod(0o644)
    (home / "web.yml").write_text(f"tls_server_config:\n  cert_file: {certificate.name}\n  key_file: {key.name}\n")
    with image.container(tmp_path / "at", home, state, "--web.config.file=/agent/web.yml") as container:
        done = image.healthcheck(container.listens())
        assert done.returncode == 0, done.stderr
        container.signal()
        assert container.wait() == 0
    assert "level=error" not in container.log
