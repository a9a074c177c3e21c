"""``bksdm-tune data list|fetch``: the published training pairs, captions and statistics.

The reference publishes no hashes, so a set is checked by what is known of it: the archive reads to
its end and its metadata names as many pictures as the paper says, each of them there.
"""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from zipfile import BadZipFile

import tyro

from bksdm_tune.artifacts import MANIFEST, cache_root, locked, write_manifest
from bksdm_tune.errors import DataError, UsageError
from subjects.archives import BROKEN, members, write
from subjects.download import Patience, download

HOST = "https://netspresso-research-code-release.s3.us-east-2.amazonaws.com/data"
METADATA = "metadata.csv"


@dataclass(frozen=True)
class DataSet:
    """``files``: addresses below HOST; one .tar.gz of pairs, or plain files."""

    name: str
    files: tuple[str, ...]
    rows: int
    gigabytes: float
    what: str

    @property
    def archive(self) -> bool:
        return self.files[0].endswith(".tar.gz")


# fmt: off
DATA_SETS = {row.name: row for row in (
    DataSet("laion-11k",   ("improved_aesthetics_6.5plus/preprocessed_11k.tar.gz",),      10_274,  1.7, "LAION-Aesthetics V2 6.5+ pairs"),  # noqa: E501
    DataSet("laion-212k",  ("improved_aesthetics_6.5plus/preprocessed_212k.tar.gz",),    212_776, 18.0, "LAION-Aesthetics V2 6.5+ pairs"),  # noqa: E501
    DataSet("laion-2256k", ("improved_aesthetics_6.25plus/preprocessed_2256k.tar.gz",), 2_256_472, 183.0, "LAION-Aesthetics V2 6.25+ pairs"),  # noqa: E501
    DataSet("coco-30k",    ("mscoco_val2014_30k/metadata.csv", "mscoco_val2014_41k_full/real_im256.npz"), 30_000, 0.04, "captions and statistics of real pictures"),  # noqa: E501
)}
# fmt: on


@dataclass(frozen=True)
class ListConfig:
    """Show the sets and which are on disk."""


@dataclass(frozen=True)
class FetchConfig:
    """Download a set; the same command goes on after a break."""

    name: tyro.conf.Positional[str]
    """laion-11k, laion-212k, laion-2256k or coco-30k."""
    source: Annotated[str | None, tyro.conf.arg(name="from", metavar="URL|DIR")] = None
    """Mirror with the same file names instead of the publisher's store."""
    out: Path | None = None
    """Folder to make; default: in the cache."""


Verb = (
    Annotated[ListConfig, tyro.conf.subcommand("list")]
    | Annotated[FetchConfig, tyro.conf.subcommand("fetch")]
)


def default_folder(name: str) -> Path:
    return cache_root() / "data" / name


def find(name: str) -> DataSet:
    """Raises UsageError: there is none of that name."""
    if name not in DATA_SETS:
        raise UsageError(f"There is no data set {name!r}; choose from {', '.join(DATA_SETS)}.")
    return DATA_SETS[name]


def fetch(
    name: str, source: str | None, out: Path | None, patience: Patience | None = None
) -> Path:
    """Put a set into ``out`` (None: the cache), whole or not at all; what is there already stays.

    Raises:
        UsageError: an unknown set, or a folder in use.
        DataError: the source is gone, or does not give the set.
    """
    row, folder = find(name), out or default_folder(name)
    if (folder / MANIFEST).is_file():
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty and holds no finished set; choose another --out.")
    staging = folder.with_name(f".{folder.name}.fetching")
    with locked(staging):
        got = [_get(file, source or HOST, staging, patience or Patience()) for file in row.files]
        made = _unpack(got[0], staging / "unpacked", row) if row.archive else staging / "files"
        if not row.archive:
            made.mkdir(exist_ok=True)
            for path in got:
                shutil.copyfile(path, made / path.name)
        check(made, row)
        write_manifest(made, "data", {"name": name, "source": source or HOST})
        if folder.is_dir():
            folder.rmdir()
        made.rename(folder)
    shutil.rmtree(staging)
    return folder


def _get(file: str, source: str, staging: Path, patience: Patience) -> Path:
    name = file.rpartition("/")[2]
    if not source.startswith(("http://", "https://")):
        found = [path for path in (Path(source) / file, Path(source) / name) if path.is_file()]
        if not found:
            raise DataError(f"There is no {name} in {source}.")
        return found[0]
    path = staging / name
    if not path.is_file():
        try:
            download(f"{source.rstrip('/')}/{file}", path, patience=patience)
        except DataError as error:
            raise DataError(
                f"{error}\nThe publisher may have taken it down. A mirror will do: bksdm-tune data "
                "fetch NAME --from URL|DIR"
            ) from None
    return path


def _unpack(archive: Path, folder: Path, row: DataSet) -> Path:
    """The folder of the archive that has the metadata; members cannot leave ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        for name, open_member in members(archive):
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise DataError(f"{archive} cannot be unpacked: {name} would lie outside.")
            write(open_member, folder / name)
    except BROKEN as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from None
    found = sorted(folder.rglob(METADATA))
    if not found:
        raise DataError(f"{archive} has no {METADATA}; it is not {row.name}.")
    return found[0].parent


def check(folder: Path, row: DataSet) -> None:
    """Raise DataError unless the metadata has the published number of rows, each with its file."""
    with open(folder / METADATA, newline="", encoding="utf-8") as file:
        names = [line.get("file_name") for line in csv.DictReader(file)]
    if len(names) != row.rows:
        raise DataError(f"{row.name} has {row.rows:,} rows; this one has {len(names):,}.")
    for name in row.files:
        if name.endswith(".npz"):
            check_statistics(folder / name.rpartition("/")[2])
    missing = [name for name in names if row.archive and not (folder / str(name)).is_file()]
    if missing:
        raise DataError(f"{len(missing)} pictures of {row.name} are missing, such as {missing[0]}.")


def main(argv: list[str]) -> int:
    config: Any = tyro.cli(
        Verb, args=argv, prog="bksdm-tune data", description="Published training pairs."
    )
    if isinstance(config, ListConfig):
        for row in DATA_SETS.values():
            there = default_folder(row.name)
            where = str(there) if (there / MANIFEST).is_file() else "not here"
            print(
                f"{row.name:<12} {row.rows:>9,} rows {row.gigabytes:>6.1f} GB  {row.what}; {where}"
            )
        return 0
    row = find(config.name)
    print(f"{row.name}: {row.rows:,} rows, about {row.gigabytes:g} GB to download.")
    folder = fetch(config.name, config.source, config.out)
    use = f"--data {folder}" if row.archive else f"--captions {folder / METADATA}"
    print(f"Wrote {folder}. Use it with {use}")
    return 0


def check_statistics(path: Path) -> None:
    """Raise DataError unless it holds a mean and a covariance, as pytorch-fid's files do."""
    import numpy as np

    try:
        with np.load(path) as file:
            shapes = file["mu"].shape, file["sigma"].shape
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{path.name} is no .npz with mu and sigma: {error}") from None
    if len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2:
        raise DataError(f"{path.name}: mu and sigma have the shapes {shapes}, not (d,), (d, d).")
