"""Takes nothing, gives the dashboards and rules that come with the package, for `dashboards` and `rules`."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def files(kind: str) -> list[Path]:
    """The files of a kind, `dashboards` (JSON) or `rules` (YAML), by name."""
    home = Path(__file__).parent / "shipped" / kind
    if not home.is_dir():  # not built: a checkout that is run as it lies there
        home = Path(__file__).parents[2] / "grafana" / kind
    return sorted(file for file in home.iterdir() if file.suffix in {".json", ".yaml"})


def title(file: Path) -> str:
    """What a file is about, in a line."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        document = json.loads(text)
        return f"{document['title']}: {document['description']}"
    return text.partition("\n")[0].removeprefix("# ")


def write(chosen: Sequence[Path], directory: Path, *, force: bool = False) -> Iterator[Path]:
    """Copies files into a directory, which is made where it is missing; gives the path of each.

    Raises OSError; FileExistsError, before anything is written, where a file is there with another content, such as
    somebody's own budgets or thresholds, and `force` is not given.
    """
    targets = [(file.read_bytes(), directory / file.name) for file in chosen]
    for content, target in targets:
        if not force and target.exists() and target.read_bytes() != content:
            raise FileExistsError(errno.EEXIST, "differs from what is shipped (--force overwrites it)", str(target))
    directory.mkdir(parents=True, exist_ok=True)
    for content, target in targets:
        target.write_bytes(content)
        yield target
