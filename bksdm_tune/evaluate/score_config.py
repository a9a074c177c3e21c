"""The flags of ``bksdm-tune score``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from bksdm_tune.config import check_range
from bksdm_tune.errors import UsageError


@dataclass(frozen=True)
class Config:
    """Score pictures of a subject: DINO, CLIP-I, CLIP-T, PRES and DIV, with intervals."""

    model: Positional[str | None] = None
    """Run folder or adapter file: its pictures are drawn first, 25 prompts x 4 and the class."""
    manifest: Path | None = None
    """Score these pictures: JSONL, a picture a line (docs/scores.md)."""
    init: Path | None = None
    """Write manifest.jsonl for a folder of another tool's pictures: SUBJECT/PROMPT/*.png."""
    out: Path | None = None
    """Folder for scores.json, images.parquet, report.html; default: score/ in the run folder, or
    scores/ beside the manifest."""
    protocol: Literal["dreambooth", "bksdm", "pocket", "custom"] | None = None
    """Default: dreambooth, and pocket where its encoders can neither be found nor downloaded;
    custom is what --dino and --clip make it."""
    dino: str | None = None
    """Another DINO: a transformers folder, dinov2-base, a Hub id. Makes the protocol custom."""
    clip: str | None = None
    """Another CLIP: a transformers folder, clip-vit-l-14, clip-vit-g-14. The same."""
    on_missing: Literal["error", "partial"] = "error"
    """partial: score what is there, list what is not, and exit with 4."""
    floor: Path | None = None
    """Scores of the untuned backbone's pictures; default for a model: drawn and scored."""
    photos: Path | None = None
    """The subject's photos, where the run's are gone, or for an adapter file or --init."""
    class_noun: str | None = None
    """What the subject is, for an adapter file that does not say, and for --init."""
    identifier: str | None = None
    """The word that means it, likewise."""
    backbone: str | None = None
    """What an adapter file goes on; default: what its metadata names."""
    base: str | None = None
    """Where the other parts come from, if the backbone is a U-Net alone."""
    prompts: int = 25
    """Of the subject's DreamBooth list, to draw."""
    images: int = 4
    """A prompt, to draw."""
    class_images: int = 8
    """Of the plain class, to draw, for PRES."""
    batch_size: int = 32
    """Pictures encoded at a time; it does not change the scores."""

    def __post_init__(self) -> None:
        given = [x for x in (self.model, self.manifest, self.init) if x is not None]
        if len(given) != 1:
            raise UsageError(
                "Say what to score: a run folder or adapter file, --manifest FILE.jsonl, or "
                "--init FOLDER to write a manifest."
            )
        check_protocol(self.protocol, bool(self.dino or self.clip))
        check_range("--prompts", self.prompts, 1, 25)
        check_range("--images", self.images, 1)
        check_range("--class-images", self.class_images, 0)
        check_range("--batch-size", self.batch_size, 1)


def check_protocol(name: str | None, own_encoders: bool) -> None:
    """Raises UsageError: a named protocol with other encoders than its own, or custom without."""
    if own_encoders and name not in (None, "custom"):
        raise UsageError("--dino and --clip make the protocol custom; leave out --protocol.")
    if name == "custom" and not own_encoders:
        raise UsageError("--protocol custom needs --dino or --clip, or both.")
