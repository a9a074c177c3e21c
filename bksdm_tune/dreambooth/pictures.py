"""Pictures that a run draws: class images for the prior, previews before, during and after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from bksdm_tune.artifacts import cached, read_manifest, verify_manifest
from bksdm_tune.contact_sheet import Row, contact_sheet
from bksdm_tune.dreambooth.job import Job
from bksdm_tune.errors import DataError
from bksdm_tune.pipeline import Shot, assemble, draw, expand, load_for_drawing, load_part, save_png
from bksdm_tune.precision import autocast
from subjects.photos import open_photo

PREVIEW_SEED = 0
CLASS_SEED = 1_000_000  # far from what people type, so that no preview is a class image


def batch_size(job: Job) -> int:
    side = job.config.training.resolution
    assert side is not None
    return 16 if side <= 128 else (8 if job.device != "cpu" else 1)


def class_images(job: Job) -> tuple[list[Path], list[str]]:
    """The backbone's own pictures of the class, drawn once and shared between subjects.

    The cache key holds all that decides them: backbone, prompt, sampler, steps, guidance, seeds,
    size.
    """
    count = job.config.prior.class_images
    assert count is not None
    shots = expand(Shot(job.class_prompt, CLASS_SEED), count)
    scheduler = json.loads((job.parts.root / "scheduler/scheduler_config.json").read_text())
    facts = {
        "backbone": job.facts["backbone"],
        "prompt": job.class_prompt,
        "scheduler": scheduler,
        "steps": shots[0].steps,
        "guidance_scale": shots[0].guidance_scale,
        "seeds": [CLASS_SEED, CLASS_SEED + count],
        "size": job.config.training.resolution,
    }

    def make(folder: Path) -> None:
        pipe = load_for_drawing(job.parts, job.device)
        size = job.config.training.resolution
        pictures = draw(pipe, shots, batch_size(job), size, "class images")
        for number, (picture, shot) in enumerate(zip(pictures, shots, strict=True)):
            save_png(folder / f"class-{number:04d}.png", picture, shot)

    folder = cached("class-images", facts, make)
    try:
        files = verify_manifest(folder)["files"]
    except DataError:  # somebody deleted or changed pictures there
        shutil.rmtree(folder)
        files = read_manifest(cached("class-images", facts, make))["files"]
    names = sorted(files)
    return [folder / name for name in names], [files[name]["sha256"] for name in names]


def preview_shots(job: Job) -> list[Shot]:
    """Every preview prompt with the same seeds."""
    return [
        shot
        for prompt in job.preview_prompts
        for shot in expand(
            Shot(prompt.replace("{subject}", job.trigger), PREVIEW_SEED),
            job.config.output.preview_images,
        )
    ]


def preview(
    job: Job, step: int, unet: Any, text_encoder: Any | None, embeds: dict[str, Tensor]
) -> None:
    """Draw the preview prompts into ``samples/`` with the models as they are."""
    folder = job.folder / "samples"
    folder.mkdir(exist_ok=True)
    shots = preview_shots(job)
    pictures = draw_now(job, shots, unet, text_encoder, embeds, f"previews at step {step}")
    for number, (picture, shot) in enumerate(zip(pictures, shots, strict=True)):
        save_png(
            sample_path(job, step, number), picture, shot, model=job.parts.name, step=str(step)
        )


def draw_now(
    job: Job,
    shots: list[Shot],
    unet: Any,
    text_encoder: Any | None,
    embeds: dict[str, Tensor],
    title: str,
) -> list[Image.Image]:
    """Pictures by the models as they are.

    VAE and, if it does not train, text encoder are loaded for this and leave memory again.
    """
    text = (None, None)
    if text_encoder is not None:
        text = (load_part(job.parts, "tokenizer"), text_encoder)
    vae = load_part(job.parts, "vae", unet.dtype).to(job.device)
    pipe = assemble(unet, vae, load_part(job.parts, "scheduler"), text)
    models = [model for model in (unet, text_encoder) if model is not None]
    for model in models:
        model.eval()
    known = None if text_encoder is not None else embeds
    size = job.config.training.resolution
    with autocast(job.config.training.precision, job.device):
        pictures = draw(pipe, shots, batch_size(job), size, title, known)
    for model in models:
        model.train()
    return pictures


def sample_path(job: Job, step: int, number: int) -> Path:
    return job.folder / "samples" / f"step-{step:06d}-{number:02d}.png"


def write_contact_sheet(job: Job) -> None:
    """Photos; then each prompt before and after tuning, at the same seeds."""
    photos = [open_photo(photo.path) for photo in job.photos.photos[:8]]
    rows = [Row(f"photos: {job.photo_source}", photos)]
    shots, steps = preview_shots(job), job.config.training.steps
    assert steps is not None
    for label, step in (("before tuning", 0), ("after tuning, the same seeds", steps)):
        paths = [sample_path(job, step, i) for i in range(len(shots))]
        if paths and all(path.is_file() for path in paths):  # they can be deleted meanwhile
            images = [Image.open(path).convert("RGB") for path in paths]
            rows.append(Row(label, images, tuple(shot.prompt for shot in shots)))
    title = f"{job.trigger}: {job.parts.name}, {job.method}, {steps} steps"
    contact_sheet(job.folder / "contact-sheet.png", title, rows)
