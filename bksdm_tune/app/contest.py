"""The same prompt and noise through several models, with seconds and scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bksdm_tune.app.engine import Drawn, Request
from bksdm_tune.app.library import Library, Model
from bksdm_tune.backbones import BACKBONES, get_backbone
from bksdm_tune.device import best_device
from bksdm_tune.errors import UsageError
from bksdm_tune.evaluate import encoders
from bksdm_tune.evaluate.encoders import Encoder, features
from bksdm_tune.evaluate.protocols import CLIP, DEFAULT, DINO, PROTOCOLS, Judges, load_judges
from bksdm_tune.evaluate.subject_scores import unit
from bksdm_tune.generate import SUBJECT
from subjects.photos import open_photo, read_photos

KINDS = ("before and after", "models", "backbones", "strengths")
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST = 8


@dataclass(frozen=True)
class Entry:
    """One contender: what stands above its picture, and what to draw."""

    label: str
    request: Request


def entries(library: Library, kind: str, request: Request, names: list[str]) -> list[Entry]:
    """``request`` names a model of the library; ``names``: the slugs or backbones to compare.

    Raises:
        UsageError: an unknown kind, nothing to compare, or too much.
    """
    if kind not in KINDS:
        raise UsageError(f"Compare one of: {', '.join(KINDS)}.")
    if kind == "backbones":
        chosen = names or family(library, request)
        found = [_backbone(library, request, name) for name in chosen]
    elif kind == "models":
        models = [library.get(name) for name in names]
        found = [
            Entry(f"{m.title} ({m.method}, {m.backbone})", replace(request, model=m.slug))
            for m in models
        ]
    else:
        model = library.get(request.model or "")
        plain = Entry(f"before: {model.backbone}", replace(request, untuned=True))
        found = [plain, Entry(f"after: {model.title}", request)]
        if kind == "strengths":
            if model.method != "lora":
                raise UsageError("Only a LoRA has a strength; this model is a full run.")
            found = [Entry(f"strength {s:g}", replace(request, strength=s)) for s in STRENGTHS]
    if not 2 <= len(found) <= MOST:
        raise UsageError(f"Choose 2 to {MOST} to compare.")
    return found


def family(library: Library, request: Request) -> list[str]:
    """Teacher, Base, Small and Tiny of the model's own family, else of the pocket one."""
    name = library.get(request.model).backbone if request.model else "pocket-base"
    unet = get_backbone(name).unet if name in BACKBONES else "pocket"
    rows = [row for row in BACKBONES.values() if row.unet == unet]
    by_plan: dict[Any, str] = {}
    for row in rows:
        by_plan.setdefault(row.plan, row.name)
    return list(by_plan.values())


def _backbone(library: Library, request: Request, name: str) -> Entry:
    prompt = request.prompt
    if request.model is not None:  # the same words for all, whatever they mean to them
        prompt = prompt.replace(SUBJECT, library.get(request.model).trigger)
    return Entry(
        get_backbone(name).name, replace(request, model=None, backbone=name, prompt=prompt)
    )


def protocol_here() -> str:
    """The published encoders only if they are on this disk: the app asks nobody for anything."""
    dino, clip = PROTOCOLS[DEFAULT]
    here = encoders.dino_here(DINO[dino]) and encoders.open_clip_here(*CLIP[clip])
    return DEFAULT if here else "pocket"


class Grader:
    """DINO against the photos and CLIP-T against the words, with encoders that are here."""

    def __init__(self) -> None:
        self.device = best_device()
        self.judges: Judges = load_judges(protocol_here(), None, None, self.device)
        self.photos: dict[str, Any] = {}

    def grade(self, drawn: Drawn, model: Model | None) -> tuple[float | None, float | None]:
        """DINO and CLIP-T; None without pictures, without photos."""
        if not drawn.pictures:
            return None, None
        photos = self.photos_of(model) if model else None
        dino = None
        if photos is not None:
            dino = float((self._encode(self.judges.dino, drawn.pictures) @ photos.T).mean())
        return dino, self.words(drawn, model)

    @property
    def note(self) -> str:
        dino, clip = self.judges.dino.name, self.judges.clip.name
        return f"DINO, likeness to the photos, by {dino}; CLIP-T, to the words, by {clip}."

    def words(self, drawn: Drawn, model: Model | None) -> float:
        """CLIP-T, the identifier left out of the prompt."""
        trigger = model.trigger if model else ""
        noun = trigger.partition(" ")[2]
        texts = [
            shot.prompt.replace(trigger, noun) if noun else shot.prompt for shot in drawn.shots
        ]
        assert self.judges.clip.texts is not None
        with torch.inference_mode():
            encoded = unit(self.judges.clip.texts(texts).float().cpu().numpy())
        return float((self._encode(self.judges.clip, drawn.pictures) * encoded).sum(1).mean())

    def photos_of(self, model: Model) -> Any:
        """Features of the photos, encoded once; None where they are gone."""
        folder = Path(model.manifest["parents"].get("photo_folder", ""))
        if not folder.name or not folder.is_dir():
            return None
        found = read_photos(folder, minimum_side=1).photos
        key = "".join(photo.sha256 for photo in found)
        if key not in self.photos:
            pictures = [open_photo(photo.path) for photo in found]
            self.photos[key] = self._encode(self.judges.dino, pictures)
        return self.photos[key]

    def _encode(self, encoder: Encoder, pictures: list[Image.Image]) -> np.ndarray[Any, Any]:
        return unit(features(encoder.images, encoder, pictures, self.device))
