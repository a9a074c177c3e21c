"""The folder of personalised models: what is there, renamed, deleted; names become slugs.

No path that came from a browser is joined to the disk: a model is looked up by its slug among the
folders that are there.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bksdm_tune.artifacts import MANIFEST, locked, read_manifest, write_text_atomic
from bksdm_tune.errors import DataError, UsageError

TITLES, PHOTOS = "titles.json", ".photos"
LONGEST = 60


def slug(name: str) -> str:
    """Lower-case letters, digits and dashes; never empty, never hidden.

    Raises:
        UsageError: nothing of the name is left.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    found = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:LONGEST].strip("-")
    if not found and any(character.isalnum() for character in name):
        return "model"  # of a script without Latin letters; the title keeps it
    if not found:
        raise UsageError("A name needs a letter or a digit.")
    return found


@dataclass(frozen=True)
class Model:
    """A finished run in the library."""

    slug: str
    title: str
    folder: Path
    manifest: dict[str, Any]

    @property
    def trigger(self) -> str:
        return str(self.manifest["results"].get("trigger", ""))

    @property
    def method(self) -> str:
        return str(self.manifest["kind"]).removeprefix("dreambooth-")

    @property
    def backbone(self) -> str:
        return str(self.manifest["parents"]["backbone"]["name"])

    @property
    def bytes(self) -> int:
        return sum(facts["bytes"] for facts in self.manifest["files"].values())

    @property
    def scores(self) -> dict[str, Any] | None:
        path = self.folder / "score" / "scores.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found


def written(model: Model) -> float:
    """When; 0 if it was deleted meanwhile."""
    try:
        return (model.folder / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0


def check_title(title: str) -> None:
    """Raises UsageError: it is empty or too long."""
    if not title.strip() or len(title) > LONGEST:
        raise UsageError(f"A title has 1 to {LONGEST} characters.")


class Library:
    """``root`` holds a folder a model; titles are kept beside, since folders keep their names."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.lock = threading.RLock()
        root.mkdir(parents=True, exist_ok=True)

    def models(self) -> list[Model]:
        """Finished ones, the newest first; folders that are something else are left alone."""
        titles, found = self._titles(), []
        for folder in self.root.iterdir():
            if folder.name.startswith(".") or not (folder / MANIFEST).is_file():
                continue
            try:
                manifest = read_manifest(folder)
            except DataError:
                continue
            if str(manifest["kind"]).startswith("dreambooth-"):
                title = titles.get(folder.name, folder.name)
                found.append(Model(folder.name, title, folder, manifest))
        return sorted(found, key=written, reverse=True)

    def get(self, name: str) -> Model:
        """
        Raises:
            UsageError: there is no such model.
        """
        for model in self.models():
            if model.slug == name:
                return model
        raise UsageError("There is no such model in the library; it may have been deleted.")

    def free_folder(self, name: str) -> Path:
        """A folder for a new run of that name, which is not there yet."""
        stem, number, found = slug(name), 1, slug(name)
        while (self.root / found).exists() or (self.root / PHOTOS / found).exists():
            number += 1
            found = f"{stem}-{number}"
        return self.root / found

    def rename(self, name: str, title: str) -> None:
        """Change what a model is called; its folder stays, so that nothing that uses it breaks."""
        self.name(self.get(name).slug, title)

    def name(self, folder: str, title: str | None) -> None:
        """Set the title of what lies in ``folder``; None takes it away.

        Raises:
            UsageError: the title is empty or too long.
        """
        if title is not None:
            check_title(title)
        with self.lock:
            titles = self._titles()
            titles.pop(folder, None)
            if title is not None:
                titles[folder] = " ".join(title.split())
            text = json.dumps(titles, indent=1, sort_keys=True)
            write_text_atomic(self.root / TITLES, text + "\n")

    def delete(self, name: str) -> None:
        """
        Raises:
            UsageError: there is no such model, or a run is writing there.
        """
        model = self.get(name)
        with locked(model.folder):
            gone = self.root / f".deleted-{model.slug}"
            shutil.rmtree(gone, ignore_errors=True)
            model.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        self.name(model.slug, None)

    def sweep(self, run: Path, photos: Path) -> None:
        """Remove what a training left that never finished."""
        if run.parent == self.root and not (run / MANIFEST).is_file():
            shutil.rmtree(run, ignore_errors=True)
            shutil.rmtree(photos, ignore_errors=True)
            self.name(run.name, None)

    def _titles(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads((self.root / TITLES).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found
