"""From a job to what ``fit`` needs: teacher, student, objective, batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from bksdm_tune import processes
from bksdm_tune.diffusion import Noising, training_scheduler
from bksdm_tune.loop import Batches, shuffled
from bksdm_tune.pipeline import load_part
from bksdm_tune.pipeline_folder import scaling_factor
from bksdm_tune.precision import frozen_dtype
from bksdm_tune.resolve import Parts
from bksdm_tune.trainables import FullWeights
from bksdm_tune.unet_configs import PLANS, student_config
from distill.cache import Encoders, LatentCache
from distill.data import Source, coin
from distill.job import Job
from distill.loading import FLIP, Pictures, Skipped, decode, training_items, without_gaps
from distill.objective import Distillation
from distill.surgery import inherit

DROP = 2  # names the coin, see distill.data.coin


@dataclass(frozen=True)
class Learner:
    """Loaded models with their objective and data."""

    teacher: UNet2DConditionModel
    student: UNet2DConditionModel
    objective: Distillation
    batches: Batches
    trainable: FullWeights
    encoders: Encoders


def build(job: Job) -> Learner:
    training, loss = job.config.training, job.config.loss
    torch.manual_seed(training.seed)
    teacher = load_part(job.parts, "unet").to(job.device)
    student = make_student(job, teacher).to(job.device, torch.float32).train()
    teacher.to(frozen_dtype(training.precision, job.device))
    for unet in (teacher, student):
        unet.to(memory_format=torch.channels_last)
    if training.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    scheduler = training_scheduler(dict(load_part(job.parts, "scheduler").config))
    objective = Distillation(
        student,
        teacher,
        Noising(scheduler, loss.offset_noise),
        job.pairs,
        loss.lambda_task,
        loss.lambda_out,
        loss.lambda_feat,
        loss.min_snr_gamma,
    )
    encoders = load_encoders(job.parts, job.device, text=True)
    trainable = FullWeights(student, None, (training.learning_rate, training.learning_rate))
    return Learner(teacher, student, objective, make_batches(job, encoders), trainable, encoders)


def make_student(job: Job, teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    plan = PLANS[job.config.models.size]
    if job.config.models.init == "inherit":
        return inherit(teacher, plan)
    return UNet2DConditionModel.from_config(student_config(teacher.config, plan))


def load_encoders(parts: Parts, device: str, text: bool) -> Encoders:
    """VAE and, if wanted, text encoder, frozen, in float32: SD's VAE overflows in float16, and what
    a cache holds must not depend on a run's precision."""
    vae = load_part(parts, "vae").to(device).requires_grad_(False)
    encoder = None
    if text:
        encoder = load_part(parts, "text_encoder").to(device)
        encoder.requires_grad_(False)
    tokenizer = load_part(parts, "tokenizer") if text else None
    return Encoders(vae, scaling_factor(parts.root / "vae"), tokenizer, encoder)


def make_batches(job: Job, encoders: Encoders) -> Batches:
    """Batches ``(latents, prompt_embeds)`` of this process, on the device."""
    if isinstance(job.data, LatentCache):
        return cached_batches(job, job.data, encoders)
    return decoded_batches(job, job.data, encoders)


def decoded_batches(job: Job, source: Source, encoders: Encoders) -> Batches:
    config = job.config
    size, seed = config.training.batch_size, config.training.seed
    name = f"skipped-{processes.rank()}.jsonl" if processes.count() > 1 else "skipped.jsonl"
    skipped = Skipped(job.folder / name, config.data.max_broken, source)

    def noted(stream: Iterator[Pictures]) -> Iterator[Pictures]:
        for pictures in stream:
            skipped.note(size, pictures.bad)
            yield pictures

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        items = training_items(source, size, seed, start, config.loss.flip)
        pin = job.device.startswith("cuda")
        stream = noted(decode(items, job.resolution, config.data.workers, pin))
        whole = without_gaps(stream, lambda pictures: pictures.places, size)
        for number, (pictures, order) in enumerate(whole, start):
            captions = drop(job, [pictures.captions[i] for i in order], number)
            pixels = pictures.pixels[order].to(job.device, non_blocking=True)
            yield encoders.latents(pixels), encoders.embeds(captions)

    return batches


def cached_batches(job: Job, cache: LatentCache, encoders: Encoders) -> Batches:
    """The same pictures in the same order as from their files, without touching them."""
    config = job.config
    size, seed = config.training.batch_size, config.training.seed
    together, first = size * processes.count(), size * processes.rank()
    empty = encoders.embeds([""])

    def rows(start: int) -> Iterator[list[tuple[int, bool]]]:
        for number, chosen in enumerate(shuffled(cache.size, together, seed)(start), start):
            base = number * together + first
            yield [
                (int(row), config.loss.flip and coin(seed, base + i, 0.5, FLIP))
                for i, row in enumerate(cache.rows[chosen[first : first + size]])
            ]

    def good(batch: list[tuple[int, bool]]) -> list[int]:
        return [place for place, (row, _) in enumerate(batch) if row >= 0]

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number, (batch, order) in enumerate(without_gaps(rows(start), good, size), start):
            there = good(batch)
            mine = np.array([batch[there[i]][0] for i in order])
            flips = [batch[there[i]][1] for i in order]
            captions = drop(job, [cache.captions[n] for n in mine], number)
            embeds = cache.embeds(mine)
            if embeds is None:
                embeds = encoders.embeds(captions)
            else:
                embeds = embeds.to(job.device)
                embeds[[not text for text in captions]] = empty
            yield cache.latents(mine, flips).to(job.device), embeds

    return batches


def drop(job: Job, captions: list[str], number: int) -> list[str]:
    """Replace some captions of micro-batch ``number`` by the empty one."""
    share, seed = job.config.loss.caption_dropout, job.config.training.seed
    if not share:
        return captions
    size = len(captions)
    base = (number * processes.count() + processes.rank()) * size
    return [
        "" if coin(seed, base + i, share, DROP) else caption for i, caption in enumerate(captions)
    ]
