"""``score --init``: a manifest for a folder of pictures that another tool drew.

``FOLDER/SUBJECT/PROMPT/*.png``: SUBJECT is one of the 30, or any name with --class-noun and
--photos; PROMPT is a number, the place in the subject's DreamBooth list from 0, or the prompt
itself, with or without the identifier, with spaces or underscores.
"""

from __future__ import annotations

from pathlib import Path

from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.evaluate.drawing import MANIFEST, link
from bksdm_tune.evaluate.manifest import Generated, Reference, Row, write_rows
from bksdm_tune.evaluate.results import SCORES
from subjects.catalogue import SUBJECTS, fill, group_of, prompts_of_class
from subjects.photos import find_photos, is_photo_name, natural_order, read_photos

PHOTOS = "references"


def init(folder: Path, photos: Path | None, class_noun: str | None, identifier: str | None) -> Path:
    """Write ``manifest.jsonl`` into ``folder``, with the subjects' photos beside it.

    Raises:
        UsageError: a subject is not of the 30 and no flags say what it is.
        DataError: no pictures, or a folder's name is no prompt.
    """
    if not folder.is_dir():
        raise DataError(f"--init {folder} is not a folder.")
    names = sorted(path.name for path in folder.iterdir() if is_subject(path))
    if len(names) > 1 and (photos or class_noun):
        raise UsageError(
            f"--photos and --class-noun are for one subject; {folder} has {', '.join(names)}."
        )
    rows: list[Row] = []
    for name in names:
        noun = class_noun or (SUBJECTS[name].class_noun if name in SUBJECTS else None)
        if noun is None:
            raise UsageError(
                f"{name} is none of the 30 subjects; say what it is: --class-noun dog."
            )
        rows += references(folder, name, photos)
        rows += generated(folder, name, noun, identifier or "")
    if not rows:
        raise DataError(f"{folder} has no SUBJECT/PROMPT/*.png below it.")
    write_rows(folder / MANIFEST, rows)
    return folder / MANIFEST


def is_subject(path: Path) -> bool:
    """No folder of photos or scores that an earlier call left."""
    return (
        path.is_dir()
        and path.name != PHOTOS
        and not path.name.startswith(".")
        and not (path / SCORES).exists()
        and not (path / "errors.txt").exists()
    )


def references(folder: Path, name: str, photos: Path | None) -> list[Row]:
    found = photos or find_photos(name, None)
    if found is None:
        raise UsageError(
            f"The photos of {name} are not on disk; say where they are with --photos DIR, or type "
            f"bksdm-tune subjects fetch {name}."
        )
    rows: list[Row] = []
    for photo in read_photos(found, minimum_side=1).photos:
        place = Path(PHOTOS) / name / photo.path.name
        link(photo.path, folder / place)
        rows.append(Reference(name, place.as_posix()))
    return rows


def generated(folder: Path, name: str, noun: str, identifier: str) -> list[Row]:
    group, templates = group_of(noun), prompts_of_class(noun)
    rows: list[Row] = []
    for place in sorted(p for p in (folder / name).iterdir() if p.is_dir()):
        number = which(place.name, templates, noun, identifier)
        if number is None:
            raise DataError(
                f"{place} is none of the {len(templates)} prompts of a {noun}, and no "
                f"number below {len(templates)}. Name it like: {fill(templates[0], '', noun)}"
            )
        files = sorted(
            (p for p in place.iterdir() if is_photo_name(p)), key=lambda p: natural_order(p.name)
        )
        for index, path in enumerate(files):
            relative = path.relative_to(folder).as_posix()
            rows.append(
                Generated(
                    name,
                    relative,
                    f"{number:02d}",
                    templates[number],
                    noun,
                    identifier,
                    group,
                    index,
                    index,
                )  # fmt: skip
            )
    return rows


def which(text: str, templates: tuple[str, ...], noun: str, identifier: str) -> int | None:
    """The place of a prompt in the list, by equality."""
    if text.isdecimal():
        return int(text) if int(text) < len(templates) else None
    words = " ".join(text.replace("_", " ").split()).lower()
    for number, template in enumerate(templates):
        known = {fill(template, word, noun).lower() for word in ("", identifier)}
        if words in known:
            return number
    return None
