"""The pictures that a model is scored on: every prompt with the same seeds, and the plain class."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bksdm_tune.artifacts import cached, locked, write_text_atomic
from bksdm_tune.evaluate.manifest import ClassPrior, Generated, Reference, Row, write_rows
from bksdm_tune.pipeline import Shot, draw, load_for_drawing, save_png
from bksdm_tune.pipeline_folder import native_resolution
from bksdm_tune.resolve import Parts, hash_model, hash_parts
from bksdm_tune.runs import occupy
from subjects.catalogue import fill, group_of, prompts_of_class
from subjects.photos import PhotoSet

CHUNK = 8  # pictures between two saves; drawing goes on after an interruption
MANIFEST, SPEED = "manifest.jsonl", "drawing.json"
NO_IDENTIFIER = ""


@dataclass(frozen=True)
class Grid:
    """What is drawn for a subject.  The defaults are the benchmark's (DreamBooth, section 4.1;
    sampling as BK-SDM: the same noises for every prompt)."""

    prompts: int = 25
    """Of the subject's list, the first ones."""
    images: int = 4
    """A prompt."""
    class_images: int = 8
    """Of the plain class."""
    seed: int = 1234
    steps: int = 25
    guidance_scale: float = 7.5

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.images)


@dataclass(frozen=True)
class Sitter:
    """Whose pictures are drawn."""

    subject_id: str
    class_noun: str
    identifier: str
    photos: PhotoSet

    @property
    def group(self) -> str:
        return group_of(self.class_noun)

    def templates(self, grid: Grid) -> tuple[str, ...]:
        return prompts_of_class(self.class_noun)[: grid.prompts]


@dataclass(frozen=True)
class Order:
    """A picture to draw, and its row."""

    shot: Shot
    row: Generated | ClassPrior


def orders(sitter: Sitter, grid: Grid, identifier: str) -> Iterator[Order]:
    """``identifier`` '' draws what the backbone makes of the class alone."""
    noun, name = sitter.class_noun, sitter.subject_id
    for number, text in enumerate(sitter.templates(grid)):
        for index, seed in enumerate(grid.seeds):
            path = f"pictures/{name}/{number:02d}-{seed}.png"
            row = Generated(
                name, path, f"{number:02d}", text, noun, identifier, sitter.group, seed, index
            )
            yield Order(_shot(fill(text, identifier, noun), seed, grid), row)
    for seed in range(grid.seed, grid.seed + grid.class_images):
        row_of_class = ClassPrior(name, f"class/{name}/{seed}.png", noun, seed)
        yield Order(_shot(fill("a {0} {1}", "", noun), seed, grid), row_of_class)


def _shot(prompt: str, seed: int, grid: Grid) -> Shot:
    return Shot(prompt, seed, grid.steps, grid.guidance_scale)


def draw_for_score(
    parts: Parts, sitter: Sitter, grid: Grid, out: Path, side: int | None, device: str
) -> Path:
    """The manifest of a model's pictures and the subject's photos, in ``out``; goes on where it was
    interrupted.

    Raises:
        UsageError: ``out`` is for another model or grid.
    """
    facts = facts_of(parts, sitter, grid, side)
    with locked(out):
        occupy(out, facts, "score", "pictures of another model or other settings")
        listed = list(orders(sitter, grid, sitter.identifier))
        draw_missing(parts, listed, out, side, device)
        write_manifest(out, sitter, listed)
    return out / MANIFEST


def facts_of(parts: Parts, sitter: Sitter, grid: Grid, side: int | None) -> dict[str, Any]:
    return {
        "model": hash_model(parts),
        "subject": [sitter.subject_id, sitter.class_noun, sitter.identifier],
        "photos": [photo.sha256 for photo in sitter.photos.photos],
        "grid": asdict(grid),
        "side": side,
    }


def draw_missing(
    parts: Parts, listed: list[Order], out: Path, side: int | None, device: str
) -> None:
    absent = [order for order in listed if not (out / order.row.path).is_file()]
    if not absent:
        return
    pipe = load_for_drawing(parts, device)
    size = CHUNK if (side or native_resolution(parts)) > 128 else 2 * CHUNK
    for start in range(0, len(absent), 4 * size):
        part = absent[start : start + 4 * size]
        title = f"pictures {start + 1} to {start + len(part)} of {len(absent)}"
        started = time.perf_counter()
        pictures = draw(pipe, [order.shot for order in part], size, side, title)
        note_speed(out / SPEED, len(part), time.perf_counter() - started)
        for picture, order in zip(pictures, part, strict=True):
            path = out / order.row.path
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(path, picture, order.shot, model=parts.name)


def note_speed(path: Path, pictures: int, seconds: float) -> None:
    """Add to what was drawn here, in how long."""
    before = json.loads(path.read_text()) if path.is_file() else {"pictures": 0, "seconds": 0.0}
    now = {"pictures": before["pictures"] + pictures, "seconds": before["seconds"] + seconds}
    write_text_atomic(path, json.dumps(now))


def write_manifest(out: Path, sitter: Sitter, listed: list[Order]) -> None:
    rows: list[Row] = []
    for photo in sitter.photos.photos:
        place = Path("references") / sitter.subject_id / photo.path.name
        link(photo.path, out / place)
        rows.append(Reference(sitter.subject_id, place.as_posix()))
    write_rows(out / MANIFEST, rows + [order.row for order in listed])


def link(source: Path, target: Path) -> None:
    """A hard link where the disk allows it, else a copy."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def draw_floor(
    parts: Parts, sitter: Sitter, grid: Grid, out: Path, side: int | None, device: str
) -> Path:
    """The manifest of what the untuned backbone draws for the prompts without the identifier.

    Drawn once for all subjects of a class, in the cache.
    """
    plain, grid = replace(parts, adapter=None), replace(grid, class_images=0)
    listed = list(orders(sitter, grid, NO_IDENTIFIER))
    facts = {
        "backbone": hash_parts(plain),
        "class_noun": sitter.class_noun,
        "grid": asdict(grid),
        "side": side,
    }
    common = replace(sitter, subject_id="any")

    def make(folder: Path) -> None:
        draw_missing(plain, list(orders(common, grid, NO_IDENTIFIER)), folder, side, device)

    folder = cached("floor", facts, make)
    for order in listed:
        link(
            folder / order.row.path.replace(f"/{sitter.subject_id}/", "/any/"), out / order.row.path
        )
    write_manifest(out, sitter, listed)
    return out / MANIFEST
