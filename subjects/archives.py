"""Read chosen members of a zip or tar archive; nothing else in it touches the disk."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from bksdm_tune.errors import DataError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError)


def unpack(archive: Path, wanted: Collection[str], folder: Path) -> None:
    """Write each member whose path ends in one of ``wanted`` to ``folder/<that path>``.

    The names written are those asked for, never the archive's own, so a hostile member cannot
    leave ``folder``.  Of several members with one ending the first counts; absent ones are
    left out.  One pass, as a compressed tar cannot seek.

    Raises:
        DataError: the file is not an archive, is damaged, or the disk takes no more.
    """
    try:
        for name, open_member in members(archive):
            path = _wanted_path(name, wanted)
            if path and not (folder / path).exists():
                write(open_member, folder / path)
    except BROKEN as error:
        raise DataError(f"{archive} cannot be unpacked as zip or tar: {error}") from None


def write(open_member: Callable[[], IO[bytes] | None], path: Path) -> None:
    """A member that ``members`` gave."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = open_member()
    assert stream is not None  # only regular members are listed
    with stream, open(path, "wb") as file:
        shutil.copyfileobj(stream, file)


def members(archive: Path) -> Iterator[tuple[str, Callable[[], IO[bytes] | None]]]:
    """Name of every regular file of a zip or tar, and how to open it; links are left out."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                yield info.filename, partial(zipped.open, info)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile():
                yield member.name, partial(tar.extractfile, member)


def _wanted_path(name: str, wanted: Collection[str]) -> str | None:
    """Whole components are compared: ``backpack_dog/00.jpg`` does not end in ``dog/00.jpg``."""
    parts = PurePosixPath(name).parts
    endings = ("/".join(parts[-length:]) for length in (2, 1))
    return next((ending for ending in endings if ending in wanted), None)
