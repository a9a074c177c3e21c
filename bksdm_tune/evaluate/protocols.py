"""Named scoring protocols: which encoders, by name.  A result's fingerprint covers all of it.

``dreambooth``  Ruiz et al. 2023, section 4.1: DINO ViT-S/16, CLIP ViT-B/32
``bksdm``       Kim et al. 2024, section 5: the same DINO, CLIP ViT-g/14
``pocket``      the embedded encoders, which know the illustrated world only
``custom``      what --dino and --clip name
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bksdm_tune.errors import DataError
from bksdm_tune.evaluate import encoders, perceptual
from bksdm_tune.evaluate.encoders import Encoder
from bksdm_tune.evaluate.results import POCKET_NOTE

# fmt: off
DINO = {
    "dino-vits16":   "facebook/dino-vits16@refs/pr/1",  # where its safetensors are
    "dinov2-base":   "facebook/dinov2-base",
}
CLIP = {
    "clip-vit-b-32": ("ViT-B-32-quickgelu", "openai"),
    "clip-vit-l-14": ("ViT-L-14-quickgelu", "openai"),
    "clip-vit-g-14": ("ViT-g-14",           "laion2b_s34b_b88k"),
}
PROTOCOLS = {
    #              DINO            CLIP
    "dreambooth": ("dino-vits16",  "clip-vit-b-32"),
    "bksdm":      ("dino-vits16",  "clip-vit-g-14"),
    "pocket":     ("pocket-looks", "pocket-clip"),
}
# fmt: on
DEFAULT = "dreambooth"
RULES = {
    "decoding": "whole file, EXIF orientation, alpha over white, 16-bit grey / 257, RGB",
    "averaging": "references, pictures of a prompt, prompts, subjects",
    "text": "template without the identifier, spaces collapsed",
    "features": "float32, cosine in float64",
}


@dataclass(frozen=True)
class Judges:
    """The encoders of one protocol, loaded."""

    protocol: str
    dino: Encoder
    clip: Encoder
    lpips: perceptual.Lpips | None
    no_lpips: str | None
    """Why there is none."""

    @property
    def facts(self) -> dict[str, Any]:
        """All that decides the figures, for the fingerprint."""
        return RULES | {
            "name": self.protocol,
            "dino": self.dino.facts,
            "clip": self.clip.facts,
            "lpips": self.lpips.weights if self.lpips else None,
        }


def load_judges(name: str | None, dino: str | None, clip: str | None, device: str) -> Judges:
    """The encoders of protocol ``name``; of folders, registry names or Hub ids where given.

    None stands for ``dreambooth`` where its weights can be had, and for ``pocket`` where they
    cannot, which is said on stderr.

    Raises:
        DataError: encoders that were asked for cannot be loaded.
    """
    if name is None and dino is None and clip is None:
        try:
            return load_judges(DEFAULT, None, None, device)
        except DataError as error:
            print(f"{error}\n{POCKET_NOTE}", file=sys.stderr)
            return load_judges("pocket", None, None, device)
    protocol = "custom" if dino or clip else name or DEFAULT
    own = PROTOCOLS.get(protocol, PROTOCOLS[DEFAULT])
    judges = load_dino(dino or own[0], device), load_clip(clip or own[1], device)
    return Judges(protocol, *judges, *perceptual.load(device))


def load_dino(name: str, device: str) -> Encoder:
    if name == "pocket-looks":
        return encoders.pocket_looks(device)
    return encoders.dino(DINO.get(name, name), device)


def load_clip(name: str, device: str) -> Encoder:
    if name == "pocket-clip":
        return encoders.pocket_clip(device)
    if name in CLIP:
        return encoders.open_clip_encoder(*CLIP[name], device)
    if not Path(name).is_dir():
        raise DataError(
            f"--clip {name} is no folder of a transformers CLIP, and none of {', '.join(CLIP)}."
        )
    return encoders.clip_folder(Path(name), device)
