"""``bksdm-tune subjects list|fetch|check``: the catalogue and its photos on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bksdm_tune.errors import DataError
from subjects.catalogue import SUBJECTS, Subject, get_subject
from subjects.photos import check_photos, find_photos

ALL = "all"
ILLUSTRATED = "illustrated"


@dataclass(frozen=True)
class ListConfig:
    """Show the 30 subjects and which photos would be used."""

    json: bool = False
    """Print a list of objects instead of a table."""

    data_root: Path | None = None
    """Folder that holds the subjects' folders; then $BKSDM_DATA and the cache are searched."""


@dataclass(frozen=True)
class FetchConfig:
    """Download the public photos (CC-BY 4.0) and compare them with the published hashes."""

    names: tyro.conf.Positional[tuple[str, ...]] = (ALL,)
    """Subjects to fetch."""

    source: Annotated[str | None, tyro.conf.arg(name="from", metavar="URL|DIR|ARCHIVE")] = None
    """Mirror of the dataset instead of GitHub: base URL, folder, or zip/tar archive."""

    data_root: Path | None = None
    """Where to put them instead of the cache; pass it to later commands too."""


@dataclass(frozen=True)
class CheckConfig:
    """Compare photos on disk with the published hashes."""

    names: tyro.conf.Positional[tuple[str, ...]] = (ALL,)
    """Subjects to check."""

    data_root: Path | None = None
    """Folder that holds the subjects' folders; then $BKSDM_DATA and the cache are searched."""


@dataclass(frozen=True)
class Row:
    """One line of ``subjects list``; ``found`` is a folder or ``illustrated``."""

    name: str
    class_noun: str
    live: bool
    photos: int
    found: str


Verb = (
    Annotated[ListConfig, tyro.conf.subcommand("list")]
    | Annotated[FetchConfig, tyro.conf.subcommand("fetch")]
    | Annotated[CheckConfig, tyro.conf.subcommand("check")]
)


def main(argv: list[str]) -> int:
    """Run the verb; what the user got wrong is raised as UsageError or DataError."""
    config: ListConfig | FetchConfig | CheckConfig = tyro.cli(
        Verb,
        args=argv,
        prog="bksdm-tune subjects",
        description="The 30 DreamBooth subjects: names, classes, photos.",
    )
    if isinstance(config, ListConfig):
        show(config)
    elif isinstance(config, FetchConfig):
        bring(config)
    else:
        check(config)
    return 0


def rows(data_root: Path | None) -> list[Row]:
    """The catalogue and where each subject's photos lie."""
    found = {name: find_photos(name, data_root) for name in SUBJECTS}
    return [
        Row(s.name, s.class_noun, s.live, len(s.photos), str(found[s.name] or ILLUSTRATED))
        for s in SUBJECTS.values()
    ]


def show(config: ListConfig) -> None:
    table = rows(config.data_root)
    if config.json:
        print(json.dumps([asdict(row) for row in table], indent=2))
        return
    print(f"{'name':<20}{'class noun':<16}{'kind':<8}{'photos':<8}found in")
    for row in table:
        kind = "live" if row.live else "object"
        print(f"{row.name:<20}{row.class_noun:<16}{kind:<8}{row.photos:<8}{row.found}")


def bring(config: FetchConfig) -> None:
    from subjects.fetch import fetch  # listing should not wait for an HTTP library

    names = [subject.name for subject in _chosen(config.names)]
    root = fetch(names, config.source, config.data_root)
    print(f"{len(names)} subjects are in {root}, hashes verified.")


def check(config: CheckConfig) -> None:
    """Report every chosen subject.

    Raises:
        DataError: naming every photo that is missing, changed or extra.
    """
    problems = []
    for subject in _chosen(config.names):
        folder = find_photos(subject.name, config.data_root)
        found = check_photos(folder, subject) if folder else []
        state = f"{len(found)} problems" if found else "good" if folder else "not on disk"
        print(f"{subject.name:<20}{state:<14}{folder or ''}".rstrip())
        problems += found
    if problems:
        report = "\n  ".join(problems)
        raise DataError(f"{len(problems)} problems with the published photos:\n  {report}")


def _chosen(names: Sequence[str]) -> list[Subject]:
    if ALL in names:
        return list(SUBJECTS.values())
    return [get_subject(name) for name in names]
