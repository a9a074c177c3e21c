"""Folders that explain themselves: a manifest written last, content-addressed caches, locks.

A folder without ``manifest.json`` is not an artifact and nothing accepts it.  Everything here is
standard library, so listing verbs never load torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bksdm_tune.errors import DataError, UsageError

MANIFEST = "manifest.json"
IDENTITY = ".run.json"  # in a run folder from the first step on; the manifest only from the last
REPORTED_PACKAGES = ("bksdm-tune", "torch", "diffusers", "transformers", "peft", "accelerate")


def cache_root() -> Path:
    """Where downloads and caches live: ``$BKSDM_CACHE``, else the XDG cache folder."""
    if "BKSDM_CACHE" in os.environ:
        return Path(os.environ["BKSDM_CACHE"])
    xdg = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(xdg) / "bksdm-tune"


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(facts: Any) -> str:
    """Hash of anything JSON can hold; equal facts give equal keys."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    found = {}
    for name in REPORTED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_text_atomic(path: Path, text: str) -> None:
    """Write so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a scratch folder beside ``path``; on success it becomes ``path``, on failure it goes.

    A ``path`` that appears meanwhile wins: content-addressed writers produce the same bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    scratch.chmod(0o755)
    try:
        yield scratch
        try:
            os.rename(scratch, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def free_disk(folder: Path) -> int:
    """Bytes free where ``folder`` is, or will be."""
    folder = folder.absolute()
    return shutil.disk_usage(folder).free if folder.exists() else free_disk(folder.parent)


def folder_bytes(folder: Path) -> int:
    """Bytes of the files under ``folder``; links are not followed, so a blob counts once."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of every file under ``folder`` that makes the artifact: not the manifest,
    not hidden files, not checkpoints (whoever has the result may delete those)."""
    files = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        aside = any(part.startswith((".", "checkpoint-")) for part in relative.parts)
        if path.is_file() and relative.as_posix() != MANIFEST and not aside:
            files[relative.as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
    return files


def write_manifest(
    folder: Path,
    kind: str,
    config: dict[str, Any],
    parents: dict[str, Any] | None = None,
    results: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe a finished folder.  Call it last: its presence says that the folder is whole."""
    manifest = {
        "kind": kind,
        "config": config,
        "parents": parents or {},
        "results": results or {},
        "versions": versions(),
        "files": describe_files(folder),
    }
    write_text_atomic(folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return manifest


def read_manifest(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest of an artifact folder.

    Raises:
        DataError: there is none, it does not parse, or it describes another kind of artifact.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder} has no {MANIFEST}: it is not a finished folder. "
            "If a run was interrupted, type the same command again to resume it."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or "kind" not in manifest or "files" not in manifest:
        raise DataError(f"{folder / MANIFEST} is not a bksdm-tune manifest.")
    if kind is not None and manifest["kind"] != kind:
        raise DataError(f"{folder} holds a {manifest['kind']}; a {kind} is needed here.")
    return manifest


def verify_manifest(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """Read the manifest and compare size and hash of each file it names.

    Raises:
        DataError: naming every file that is missing or differs.
    """
    manifest = read_manifest(folder, kind)
    bad = []
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            bad.append(f"{name}: missing")
        elif path.stat().st_size != facts["bytes"] or sha256_file(path) != facts["sha256"]:
            bad.append(f"{name}: differs from what was written")
    if bad:
        raise DataError(f"{folder} is damaged:\n  " + "\n  ".join(bad))
    return manifest


def cached(kind: str, facts: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """Folder ``<cache>/<kind>/<hash of facts>``, made by ``make(folder)`` if it is not there yet.

    Safe under concurrent writers: each fills its own scratch folder and the first rename wins.
    """
    folder = cache_root() / kind / content_key(facts)[:32]
    # In this order: a writer's rename brings folder and manifest together, so only a folder that
    # somebody damaged is removed, never one that a concurrent writer has just finished.
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        shutil.rmtree(folder)
    if not folder.is_dir():
        with atomic_folder(folder) as scratch:
            make(scratch)
            write_manifest(scratch, kind, facts)
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against a second run.  The lock dies with the process that holds it.

    Raises:
        UsageError: another live process holds it, or the path cannot be a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{folder} cannot be a folder: a file is in its way.") from None
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"Another run is writing into {folder}. "
                "Wait for it to end, or choose another folder with --out."
            ) from None
        yield
