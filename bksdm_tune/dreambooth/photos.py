"""Which photos a run learns from: one's own, the real ones, or the illustrated twin."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from bksdm_tune.artifacts import cached
from bksdm_tune.dreambooth.config import Config
from bksdm_tune.dreambooth.recipes import recipe_name
from subjects.catalogue import get_subject
from subjects.photos import find_photos


def photo_folder(config: Config, resolution: int) -> tuple[Path, str]:
    """Where the photos lie and what they are, in words.

    Real photos are used where they are on disk.  Without them a miniature takes the illustrated
    twin, which has its size, and a full-size backbone fetches the real ones.
    """
    who = config.who
    if who.photos is not None:
        return who.photos, f"your photos in {who.photos}"
    assert who.subject is not None
    get_subject(who.subject)
    found = find_photos(who.subject, who.data_root)
    if found is not None:
        return found, f"the real DreamBooth photos in {found}"
    if recipe_name("default", resolution) == "miniature":
        return illustrated(who.subject), "the illustrated twin (no real photos on disk)"
    from subjects.fetch import fetch

    print(f"Fetching the DreamBooth photos of {who.subject} (hashes are verified).", flush=True)
    root = fetch([who.subject])
    return root / who.subject, f"the real DreamBooth photos, fetched to {root / who.subject}"


def illustrated(name: str) -> Path:
    """The twin's pictures as PNG files, drawn once."""
    from subjects.illustrated.twins import TWINS, twin_photos

    def draw(folder: Path) -> None:
        for number, photo in enumerate(twin_photos(name)):
            photo.save(folder / f"{number:02d}.png")

    return cached("illustrated", {"subject": name, "look": asdict(TWINS[name])}, draw)
