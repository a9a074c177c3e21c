"""The flags of ``bksdm-tune evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from bksdm_tune.config import check_range


@dataclass(frozen=True)
class Config:
    """Score a backbone: draw one picture a caption, then FID, IS, CLIP score, KID and CMMD."""

    backbone: Positional[str]
    """Registry name, diffusers folder, Hub id or run folder."""
    captions: Path
    """metadata.csv (file_name, text), or a text file with a caption a line."""
    out: Path
    """Folder of pictures, features and results.json."""
    real: Path | None = None
    """Folder of real pictures, or statistics (.npz with mu and sigma, as pytorch-fid's)."""
    teacher: Path | None = None
    """Folder of another evaluation of the same protocol, the teacher's: measures the distance of
    pictures of the same caption and noise."""
    base: str | None = None
    """Where the other parts come from, if the backbone is a U-Net alone."""
    n: int = 30_000
    """Captions, the first ones; fewer if there are fewer."""
    steps: int = 25
    """Denoising steps of PNDM."""
    guidance: float = 7.5
    """Guidance scale."""
    seed: int = 1234
    """Picture i is drawn with seed + i."""
    batch_size: int = 8
    """Pictures at a time; it does not change them."""
    extractors: Literal["published", "pocket"] = "published"
    """published: Inception, open_clip ViT-g-14, and DINOv2 where --dino names it; pocket: the
    embedded encoders, which know the illustrated world only."""
    inception_weights: Path | None = None
    """Inception-v3 weights file; default: downloaded."""
    clip_model: str = "ViT-g-14"
    """open_clip architecture."""
    clip_weights: str = "laion2b_s34b_b88k"
    """open_clip tag, or a weights file."""
    dino: str | None = None
    """transformers folder or Hub id of DINOv2, for another Frechet distance."""

    def __post_init__(self) -> None:
        check_range("--n", self.n, 2)
        check_range("--steps", self.steps, 1, 1000)
        check_range("--guidance", self.guidance, 0)
        check_range("--seed", self.seed, 0, 2**62)
        check_range("--batch-size", self.batch_size, 1)
