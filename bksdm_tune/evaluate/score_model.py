"""A run or an adapter file: whose it is, its pictures, the untuned backbone's, the scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bksdm_tune.artifacts import MANIFEST, read_manifest
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.evaluate.drawing import Grid, Sitter, draw_floor, draw_for_score
from bksdm_tune.evaluate.protocols import Judges
from bksdm_tune.evaluate.results import fingerprint
from bksdm_tune.evaluate.score import score
from bksdm_tune.evaluate.score_config import Config
from bksdm_tune.evaluate.watch import ON_THE_WAY, curve, read_points
from bksdm_tune.generate import Config as Drawing
from bksdm_tune.generate import find_model
from bksdm_tune.lora import fit
from bksdm_tune.resolve import Parts, tuned_from, unet_config
from subjects.photos import read_photos

UNTUNED = "untuned"


def score_model(config: Config, out: Path, judges: Judges, device: str) -> dict[str, Any]:
    """Draw what is not drawn yet, the untuned backbone's pictures too, and score.

    Raises:
        UsageError, DataError: as ``subject_of``; ``out`` is for another model.
    """
    parts, sitter, side = subject_of(config)
    under = backbone_of(config, parts) if config.floor is None else None  # said before drawing
    if parts.adapter is not None:
        fit.check(parts.adapter, unet_config(parts))
    grid = Grid(config.prompts, config.images, config.class_images)
    manifest = draw_for_score(parts, sitter, grid, out, side, device)
    floor = config.floor
    if under is not None:
        floor = out / UNTUNED
        plain = draw_floor(under, sitter, grid, floor, side, device)
        score(plain, judges, floor, f"{under.name}, untuned", config.batch_size, device=device)
    assert config.model is not None
    points = read_points(Path(config.model) / ON_THE_WAY)
    steps = curve([p for p in points if p.fingerprint in ("", fingerprint(judges.facts))])
    name, size = config.model, config.batch_size
    return score(manifest, judges, out, name, size, floor=floor, device=device, steps=steps)


def subject_of(config: Config) -> tuple[Parts, Sitter, int | None]:
    """Parts of the model, whose pictures to draw, and the pictures' side.

    Raises:
        UsageError: an adapter file does not say what it learned.
        DataError: the photos are gone.
    """
    assert config.model is not None
    model = find_model(Drawing(config.model, "", backbone=config.backbone, base=config.base))
    path = Path(config.model)
    run = path if path.is_dir() else path.parent
    manifest = read_manifest(run) if (run / MANIFEST).is_file() else {"config": {}, "parents": {}}
    said, parents = manifest["config"], manifest["parents"]
    words = (model.trigger or "").split(maxsplit=1)
    identifier = config.identifier or said.get("prompts", {}).get("identifier") or _at(words, 0)
    noun = config.class_noun or _at(words, 1)
    folder = config.photos or (Path(parents["photo_folder"]) if "photo_folder" in parents else None)
    lacking = [
        flag
        for flag, value in (
            ("--identifier", identifier),
            ("--class-noun", noun),
            ("--photos", folder),
        )
        if not value
    ]
    if lacking:
        raise UsageError(f"{config.model} does not say what it learned: add {', '.join(lacking)}.")
    assert identifier and noun and folder
    if not folder.is_dir():
        raise DataError(f"The photos are no longer in {folder}; name their folder with --photos.")
    who = said.get("who", {})
    name = who.get("subject") or who.get("name") or folder.resolve().name
    photos = read_photos(folder, minimum_side=1)
    if parents.get("held_out"):  # nothing of what it was trained on, wherever the photos lie now
        learned = set(parents["photos"].values())
        own = tuple(photo for photo in photos.photos if photo.sha256 not in learned)
        if not own:
            raise DataError(f"{config.model} was trained on every photo in {folder}.")
        photos = replace(photos, photos=own)
    return model.parts, Sitter(slug(name), noun, identifier, photos), model.side


def _at(words: list[str], place: int) -> str | None:
    return words[place] if len(words) > place else None


def slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)


def backbone_of(config: Config, parts: Parts) -> Parts | None:
    """What was tuned: of a LoRA the parts without it, of a full run what its manifest names; None
    where nothing says."""
    if parts.adapter is not None:
        return replace(parts, adapter=None)
    return tuned_from(Path(config.model or ""))
