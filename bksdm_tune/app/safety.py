"""The safety checker of pipelines that ship one: pictures are withheld, and counted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

FOLDER = "safety_checker"


class Safety:
    """What looks at pictures of one pipeline."""

    def __init__(self, root: Path, device: str) -> None:
        from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        self.device = device
        self.prepare = CLIPImageProcessor.from_pretrained(root / "feature_extractor")
        self.model = StableDiffusionSafetyChecker.from_pretrained(root / FOLDER).eval().to(device)
        logging.getLogger(type(self.model).__module__).setLevel(logging.ERROR)

    @torch.inference_mode()
    def allows(self, pictures: list[Image.Image]) -> list[bool]:
        inputs: Any = self.prepare(pictures, return_tensors="pt").to(self.device)
        arrays = [np.asarray(picture, dtype=np.float32) / 255 for picture in pictures]
        _, found = self.model(images=arrays, clip_input=inputs.pixel_values)
        return [not bad for bad in found]


def shipped(root: Path) -> bool:
    """Whether the pipeline in ``root`` has a checker."""
    return (root / FOLDER / "config.json").is_file()
