"""The flags of ``bksdm-tune sweep``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bksdm_tune.config import check_range
from bksdm_tune.errors import UsageError
from bksdm_tune.evaluate.score_config import check_protocol

METHODS = ("lora", "full")


@dataclass(frozen=True)
class Config:
    """Train, draw and score subjects x backbones x methods x seeds; resumable, a cell at a time.

    More cells may be asked for in the same folder; its tables have them all.
    """

    out: Path
    """Folder of everything; the same command goes on there."""
    subjects: str = "all"
    """Names with commas; all: the 30; real: those whose photos are on disk."""
    backbones: str = "pocket-base"
    """With commas: registry names, folders or Hub ids."""
    methods: str = "lora"
    """lora, full, or both with a comma."""
    seeds: str = "1234"
    """Of the trainings, with commas."""
    data_root: Path | None = None
    """Where the DreamBooth photos lie; default $BKSDM_DATA, then the download cache."""
    steps: int | None = None
    """Optimiser steps; default: the recipe's."""
    prior: Literal["images", "prediction", "none"] | None = None
    """Prior preservation; default: the recipe's."""
    stack: int = 10
    """Subjects whose LoRAs are trained in one run, each as if alone; 1: one by one."""
    prompts: int = 25
    """Of each subject's DreamBooth list."""
    images: int = 4
    """A prompt."""
    class_images: int = 8
    """Of the plain class, for PRES."""
    protocol: Literal["dreambooth", "bksdm", "pocket", "custom"] | None = None
    """As in `bksdm-tune score`."""
    dino: str | None = None
    """As in `bksdm-tune score`."""
    clip: str | None = None
    """As in `bksdm-tune score`."""
    engine: Literal["local", "ray"] = "local"
    """local: worker processes on this machine; ray: a cluster that shares this disk."""
    workers: int | None = None
    """Worker processes; default: the number of GPUs, or 1."""

    def __post_init__(self) -> None:
        for flag, text in (("--subjects", self.subjects), ("--backbones", self.backbones)):
            if not split(text):
                raise UsageError(f"{flag} is empty.")
        unknown = [name for name in split(self.methods) if name not in METHODS]
        if unknown or not split(self.methods):
            raise UsageError(f"--methods is {self.methods!r}; write lora, full, or lora,full.")
        if not split(self.seeds) or not all(seed.isdecimal() for seed in split(self.seeds)):
            raise UsageError(f"--seeds is {self.seeds!r}; write whole numbers with commas: 1,2.")
        check_protocol(self.protocol, bool(self.dino or self.clip))
        check_range("--steps", self.steps, 1)
        check_range("--stack", self.stack, 1)
        check_range("--prompts", self.prompts, 1, 25)
        check_range("--images", self.images, 1)
        check_range("--class-images", self.class_images, 0)
        check_range("--workers", self.workers, 1)


def split(text: str) -> list[str]:
    """Words between commas, each once, in order."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
