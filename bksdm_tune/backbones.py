"""The registry of backbones: who made them, from what, how large they are.

Counts are stored so that listing them never loads torch; a test derives each one from the U-Net
config.  Sources: the BK-SDM paper and model cards (arXiv 2305.15798), the Stable Diffusion cards.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from bksdm_tune.errors import UsageError
from bksdm_tune.licences import OPENRAIL_LICENCE as OPENRAIL
from bksdm_tune.licences import POCKET_LICENCE as APACHE
from bksdm_tune.unet_configs import (
    BASE,
    PLANS,
    SMALL,
    TEACHER,
    TEACHER_UNETS,
    TINY,
    BlockPlan,
    student_config,
)

__all__ = [
    "BACKBONES",
    "BASE",
    "EMBEDDED",
    "OPENRAIL_PP_LICENCE",
    "PLANS",
    "SMALL",
    "TEACHER",
    "TINY",
    "Backbone",
    "BlockPlan",
    "by_source",
    "close_matches",
    "get_backbone",
]

EMBEDDED = "embedded"
OPENRAIL_PP_LICENCE = "CreativeML Open RAIL++-M"


@dataclass(frozen=True)
class UNetFacts:
    """Size of a U-Net, and the work of one forward pass at batch 1, 77 tokens, native size."""

    parameters: int
    gmacs: float
    """Multiply-accumulates, 1e9, of convolution, linear and norm modules; QK^T and AV left out."""


UNETS: dict[tuple[str, BlockPlan], UNetFacts] = {
    ("v1", TEACHER): UNetFacts(859_520_964, 338.75),
    ("v1", BASE): UNetFacts(579_384_964, 223.76),
    ("v1", SMALL): UNetFacts(482_346_884, 217.73),
    ("v1", TINY): UNetFacts(323_384_964, 205.04),
    ("v2", TEACHER): UNetFacts(865_910_724, 339.24),
    ("v2", BASE): UNetFacts(583_480_964, 224.07),
    ("v2", SMALL): UNetFacts(485_787_524, 217.99),
    ("v2", TINY): UNetFacts(326_825_604, 205.30),
    ("v2-768", TEACHER): UNetFacts(865_910_724, 760.80),
    ("pocket", TEACHER): UNetFacts(4_949_236, 0.1839),
    ("pocket", BASE): UNetFacts(3_313_460, 0.1202),
    ("pocket", SMALL): UNetFacts(2_837_292, 0.1171),
    ("pocket", TINY): UNetFacts(2_073_012, 0.1133),
}


@dataclass(frozen=True)
class Family:
    """The parts that a teacher and its students share."""

    text_encoder_parameters: int
    vae_parameters: int
    safety_checker_parameters: int
    vae_factor: int
    """Pixels per latent, along one side."""


FAMILIES = {
    "v1": Family(123_060_480, 83_653_863, 303_981_588, 8),
    "v2": Family(340_387_840, 83_653_863, 0, 8),
    "pocket": Family(345_216, 681_911, 0, 4),
}


@dataclass(frozen=True)
class Backbone:
    """A registered text-to-image model.  What follows from its U-Net's shape is a property."""

    name: str
    unet: str
    """Key into TEACHER_UNETS."""
    plan: BlockPlan
    teacher: str | None
    """Registry name of the model it was distilled from."""
    source: str
    """Hub id, or EMBEDDED for what the wheel carries."""
    licence: str
    precision: str
    """"fp16" or "fp32": how the published weights are stored."""
    prediction_type: str = "epsilon"

    @property
    def family(self) -> str:
        """One of FAMILIES."""
        return self.unet.partition("-")[0]

    @property
    def unet_config(self) -> dict[str, Any]:
        return student_config(TEACHER_UNETS[self.unet], self.plan)

    @property
    def unet_parameters(self) -> int:
        return UNETS[self.unet, self.plan].parameters

    @property
    def gmacs(self) -> float:
        """See UNetFacts.gmacs."""
        return UNETS[self.unet, self.plan].gmacs

    @property
    def text_encoder_parameters(self) -> int:
        return FAMILIES[self.family].text_encoder_parameters

    @property
    def vae_parameters(self) -> int:
        """Encoder and decoder."""
        return FAMILIES[self.family].vae_parameters

    @property
    def resolution(self) -> int:
        """Native side of a picture, in pixels."""
        return TEACHER_UNETS[self.unet]["sample_size"] * FAMILIES[self.family].vae_factor

    @property
    def disk_bytes(self) -> int:
        """Size of the whole pipeline as published, the safety checker of SD-v1 included."""
        family = FAMILIES[self.family]
        parameters = (
            self.unet_parameters
            + family.text_encoder_parameters
            + family.vae_parameters
            + family.safety_checker_parameters
        )
        return parameters * {"fp16": 2, "fp32": 4}[self.precision]


# fmt: off
ROWS = (
    Backbone("sd-v1-4", "v1", TEACHER, None, "CompVis/stable-diffusion-v1-4", OPENRAIL, "fp32"),
    Backbone("sd-v1-5", "v1", TEACHER, None, "stable-diffusion-v1-5/stable-diffusion-v1-5", OPENRAIL, "fp32"),  # noqa: E501
    Backbone("sd-v2-1-base", "v2", TEACHER, None, "stabilityai/stable-diffusion-2-1-base", OPENRAIL_PP_LICENCE, "fp32"),  # noqa: E501
    Backbone("sd-v2-1", "v2-768", TEACHER, None, "stabilityai/stable-diffusion-2-1", OPENRAIL_PP_LICENCE, "fp32", "v_prediction"),  # noqa: E501
    Backbone("bk-base", "v1", BASE, "sd-v1-4", "nota-ai/bk-sdm-base", OPENRAIL, "fp16"),
    Backbone("bk-small", "v1", SMALL, "sd-v1-4", "nota-ai/bk-sdm-small", OPENRAIL, "fp16"),
    Backbone("bk-tiny", "v1", TINY, "sd-v1-4", "nota-ai/bk-sdm-tiny", OPENRAIL, "fp16"),
    Backbone("bk-base-2m", "v1", BASE, "sd-v1-4", "nota-ai/bk-sdm-base-2m", OPENRAIL, "fp16"),
    Backbone("bk-small-2m", "v1", SMALL, "sd-v1-4", "nota-ai/bk-sdm-small-2m", OPENRAIL, "fp16"),
    Backbone("bk-tiny-2m", "v1", TINY, "sd-v1-4", "nota-ai/bk-sdm-tiny-2m", OPENRAIL, "fp16"),
    Backbone("bk-v2-base", "v2", BASE, "sd-v2-1-base", "nota-ai/bk-sdm-v2-base", OPENRAIL, "fp16"),
    Backbone("bk-v2-small", "v2", SMALL, "sd-v2-1-base", "nota-ai/bk-sdm-v2-small", OPENRAIL, "fp16"),  # noqa: E501
    Backbone("bk-v2-tiny", "v2", TINY, "sd-v2-1-base", "nota-ai/bk-sdm-v2-tiny", OPENRAIL, "fp16"),
    Backbone("pocket-teacher", "pocket", TEACHER, None, EMBEDDED, APACHE, "fp16"),
    Backbone("pocket-base", "pocket", BASE, "pocket-teacher", EMBEDDED, APACHE, "fp16"),
    Backbone("pocket-small", "pocket", SMALL, "pocket-teacher", EMBEDDED, APACHE, "fp16"),
    Backbone("pocket-tiny", "pocket", TINY, "pocket-teacher", EMBEDDED, APACHE, "fp16"),
)
# fmt: on
BACKBONES: dict[str, Backbone] = {row.name: row for row in ROWS}


def by_source(hub_id: str) -> Backbone | None:
    """The row published under a Hub id."""
    return next((row for row in ROWS if row.source == hub_id), None)


def close_matches(name: str) -> str:
    """A sentence naming the registry rows that ``name`` may have meant."""
    near = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else "`bksdm-tune backbones` lists them."


def get_backbone(name: str) -> Backbone:
    """The registry row of that name.

    Raises:
        UsageError: there is none; the message names close ones.
    """
    if name not in BACKBONES:
        raise UsageError(f"No backbone is called {name!r}. {close_matches(name)}")
    return BACKBONES[name]
