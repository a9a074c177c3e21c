"""``bksdm-tune build``: cut a student out of a teacher and write a whole pipeline around it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from bksdm_tune.artifacts import atomic_folder, write_manifest
from bksdm_tune.backbones import PLANS
from bksdm_tune.errors import UsageError
from bksdm_tune.pipeline_folder import copy_other_parts, licence_of
from bksdm_tune.resolve import Parts, hash_weights, resolve

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

CARD = """\
---
license: {licence_id}
library_name: diffusers
pipeline_tag: text-to-image
---
# {size} student of {teacher}: inherited, not yet distilled

The U-Net keeps the blocks that the BK-SDM {size} plan keeps (arXiv 2305.15798) and holds the
teacher's own weights in them, unchanged: {before:,} parameters became {after:,}. Nothing was
trained after the cut, so its pictures are poor until it is distilled. Every other part is a copy
of the teacher's.

Made by `bksdm-tune build --size {size} --teacher {teacher}`. Architecture removed, weights
unchanged: that is what was modified.

## Licence

Licence of {teacher}: {licence}.

{notice}
"""


@dataclass(frozen=True)
class Config:
    """Cut a student out of a teacher and write a whole diffusers pipeline around it."""

    size: Literal["base", "small", "tiny"]
    """Which blocks stay: base drops layers, small also the mid block, tiny also a stage."""
    teacher: str
    """Registry name, diffusers pipeline folder, Hub id, or a U-Net alone together with --base."""
    out: Path
    """Folder to write; it must not exist, or be empty."""
    base: str | None = None
    """Where the other parts come from, if the teacher is a U-Net alone."""


def build(config: Config) -> tuple[int, int]:
    """Write the student's pipeline folder; U-Net parameters before and after.

    Raises:
        UsageError: ``out`` is in use, or the teacher is not a whole Stable Diffusion U-Net.
        DataError: the teacher's files are incomplete or cannot be had.
    """
    check_free(config.out)
    parts = resolve(config.teacher, config.base)
    if parts.adapter is not None:
        raise UsageError(
            f"{config.teacher} is a LoRA run, which has no U-Net of its own to cut. "
            "Name the backbone that it was trained on, or a full run."
        )
    from distill.surgery import inherit  # loads torch, which a refusal need not wait for

    teacher = load_unet(parts.unet)
    student = inherit(teacher, PLANS[config.size])
    before, after = teacher.num_parameters(), student.num_parameters()
    with atomic_folder(config.out) as folder:
        copy_other_parts(parts.root, folder)
        student.save_pretrained(folder / "unet")
        (folder / "README.md").write_text(card(config.size, parts, before, after), "utf-8")
        write_manifest(
            folder,
            "backbone",
            {"size": config.size, "teacher": config.teacher, "base": config.base},
            {"teacher": {"ref": parts.ref, "base": parts.base, "unet": hash_weights(parts.unet)}},
            {"unet_parameters": after, "teacher_unet_parameters": before},
        )
    return before, after


def check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty. Choose another folder with --out.")


def load_unet(folder: Path) -> UNet2DConditionModel:
    """The U-Net in the precision that its weights are stored in."""
    from diffusers import UNet2DConditionModel
    from safetensors import safe_open

    first = sorted(folder.glob("*.safetensors"))[0]
    with safe_open(first, framework="pt") as file:
        dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)


def card(size: str, parts: Parts, before: int, after: int) -> str:
    """The README of a built folder; an unregistered teacher is taken to be Stable Diffusion's."""
    licence_id, stated, notice = licence_of(parts)
    return CARD.format(
        licence_id=licence_id,
        teacher=parts.name,
        size=size,
        before=before,
        after=after,
        notice=notice,
        licence=stated,
    )


def main(argv: list[str]) -> int:
    config = tyro.cli(Config, args=argv, prog="bksdm-tune build")
    before, after = build(config)
    kept = 100 * after / before
    print(f"U-Net parameters: {before:,} -> {after:,} ({kept:.1f} % kept)")
    print(f"Wrote {config.out}: inherited, not yet distilled.")
    return 0
