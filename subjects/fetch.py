"""Bring the public DreamBooth photos to disk from GitHub, a mirror, a folder or an archive."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from bksdm_tune.artifacts import MANIFEST, content_key, locked, sha256_file, write_manifest
from bksdm_tune.errors import DataError, UsageError
from subjects.archives import SUFFIXES, unpack
from subjects.catalogue import SUBJECTS, Subject, get_subject
from subjects.download import Patience, download
from subjects.photos import LAYOUTS, check_photos, download_folder

SOURCE = "https://raw.githubusercontent.com/google/dreambooth/main/dataset"
CREDITS = "references_and_licenses.txt"
LICENCE = "CC-BY-4.0"

# (path in the dataset, where to put it, its hash or None); raises DataError
Get = Callable[[str, Path, str | None], None]


def fetch(
    names: Sequence[str] = (),
    source: str | None = None,
    out: Path | None = None,
    patience: Patience | None = None,
) -> Path:
    """Put the named subjects (none: all) into ``out/<name>`` and return ``out``.

    Every photo is compared with the published hash; a subject's folder appears whole or not at
    all, with a manifest.  What is whole already is left alone; the same call resumes.

    Args:
        source: base URL, folder, or archive (file or URL) laid out as the dataset; None: GitHub.
        out: None is the cache, where every command looks.

    Raises:
        UsageError: an unknown subject or source.
        DataError: the source does not give the published photos, or other photos lie in the way.
    """
    root = out or download_folder()
    subjects = [get_subject(name) for name in names] or list(SUBJECTS.values())
    missing = [subject for subject in subjects if not _is_whole(root / subject.name, subject)]
    if missing:
        _refuse_foreign_folders(root, missing)
        with locked(root):
            _fetch_missing(missing, source or SOURCE, root, patience or Patience())
    return root


def _is_whole(folder: Path, subject: Subject) -> bool:
    return folder.is_dir() and not check_photos(folder, subject)


def _refuse_foreign_folders(root: Path, subjects: Sequence[Subject]) -> None:
    foreign = [
        problem
        for folder, subject in ((root / subject.name, subject) for subject in subjects)
        if folder.is_dir() and not (folder / MANIFEST).is_file()
        for problem in check_photos(folder, subject)
    ]
    if foreign:
        raise DataError(
            "Folders in the way do not hold the published photos. Move them, or choose another "
            "place with --data-root:\n  " + "\n  ".join(foreign)
        )


def _fetch_missing(missing: Sequence[Subject], source: str, root: Path, patience: Patience) -> None:
    staging = root / ".fetching"
    staging.mkdir(exist_ok=True)
    wanted = {f"{subject.name}/{name}" for subject in missing for name, _ in subject.photos}
    try:
        get = open_source(source, wanted | {CREDITS}, staging, patience)
        with tqdm(desc="photos", total=len(wanted), unit="photo", disable=None) as bar:
            for subject in missing:
                for name, sha256 in subject.photos:
                    get(f"{subject.name}/{name}", staging / subject.name / name, sha256)
                    bar.update()
                _fetch_credits(get, root)
                _put_in_place(subject, source, staging / subject.name, root / subject.name)
    except DataError as error:
        raise DataError(
            f"{error}\nThe photos were sought in {source}. A mirror, a copy or an archive of the "
            "dataset will do: bksdm-tune subjects fetch --from URL|DIR|ARCHIVE"
        ) from None
    shutil.rmtree(staging)


def open_source(source: str, wanted: Collection[str], staging: Path, patience: Patience) -> Get:
    """How to get a file from ``source``; an archive is downloaded and unpacked here.

    Raises:
        UsageError: it is neither a URL nor a path that exists.
        DataError: the archive cannot be fetched or read.
    """
    is_url = source.startswith(("http://", "https://"))
    if is_url and not urlsplit(source).path.lower().endswith(SUFFIXES):
        return partial(_download, source.rstrip("/"), patience)
    if is_url:
        archive = staging / content_key(source)
        download(source, archive, patience=patience)
        return _open_archive(archive, wanted, staging)
    if Path(source).is_dir():
        return partial(_copy, Path(source))
    if Path(source).is_file():
        return _open_archive(Path(source), wanted, staging)
    raise UsageError(f"--from {source}: give an http(s) URL, or a folder or archive that exists.")


def _open_archive(archive: Path, wanted: Collection[str], staging: Path) -> Get:
    folder = staging / "unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    unpack(archive, wanted, folder)
    return partial(_copy, folder)


def _download(
    base: str, patience: Patience, relative: str, target: Path, sha256: str | None
) -> None:
    download(f"{base}/{relative}", target, sha256, patience)


def _copy(folder: Path, relative: str, target: Path, sha256: str | None) -> None:
    origins = [folder / layout / relative for layout in LAYOUTS]
    origin = next((path for path in origins if path.is_file()), None)
    if origin is None:
        raise DataError(f"There is no {relative}.")
    if sha256 and sha256_file(origin) != sha256:
        raise DataError(f"{relative} differs from the published photo.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(origin, target)


def _fetch_credits(get: Get, root: Path) -> None:
    """CC-BY asks that the credits stay with the photos; a mirror may lack them."""
    if not (root / CREDITS).is_file():
        with contextlib.suppress(DataError):
            get(CREDITS, root / CREDITS, None)


def _put_in_place(subject: Subject, source: str, staged: Path, folder: Path) -> None:
    write_manifest(
        staged, "photos", {"subject": subject.name, "source": source, "licence": LICENCE}
    )
    if folder.is_dir():
        shutil.rmtree(folder)  # it has our manifest, and is damaged
    staged.rename(folder)
