"""From a job to what ``fit`` needs: models, objective, batches, trainable, pictures on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bksdm_tune import adapters
from bksdm_tune.artifacts import cached
from bksdm_tune.diffusion import (
    Noising,
    embed,
    latent_moments,
    to_pixels,
    tokenise,
    training_scheduler,
)
from bksdm_tune.dreambooth.ahead import Ahead, Moments, Predict, clean_batches, window
from bksdm_tune.dreambooth.job import Job
from bksdm_tune.dreambooth.objective import DreamBooth
from bksdm_tune.lora.fit import provenance
from bksdm_tune.pipeline import load_part
from bksdm_tune.pipeline_folder import scaling_factor
from bksdm_tune.precision import autocast, choose, frozen_dtype
from bksdm_tune.stacked import Stack, StackedWeights
from bksdm_tune.trainables import FullWeights, LoraWeights
from bksdm_tune.twin import SMALL, Twin, pays
from subjects.photos import open_photo


@dataclass(frozen=True)
class Learner:
    """Loaded models with their objective and data."""

    unet: Any
    text_encoder: Any | None
    """Only where it trains."""
    objective: DreamBooth
    batches: Ahead
    trainable: LoraWeights | FullWeights | StackedWeights
    embeds: dict[str, Tensor]
    """Prompt -> (1, tokens, width), from the untuned text encoder."""
    twin: Twin | None = None
    """Computes what ``batches`` leave to it."""

    @property
    def twins_memory_gb(self) -> float:
        return self.twin.memory_gb if self.twin else 0.0


def moments_of(job: Job, paths: list[Path], hashes: list[str]) -> Tensor:
    """Latent moments (N, 2, C, h, w) of pictures, computed once per VAE, picture and resolution."""
    resolution = job.config.training.resolution
    assert resolution is not None

    def encode(folder: Path) -> None:
        vae = load_part(job.parts, "vae").to(job.device)
        pixels = torch.stack([to_pixels(open_photo(path), resolution) for path in paths])
        save_file({"moments": latent_moments(vae, pixels)}, folder / "moments.safetensors")

    facts = {
        "vae": job.facts["backbone"]["vae"],
        "pictures": hashes,
        "resolution": resolution,
        "crop": "centre",
        "flip": False,
    }
    return load_file(cached("latents", facts, encode) / "moments.safetensors")["moments"]


def embed_prompts(job: Job, prompts: list[str]) -> dict[str, Tensor]:
    """Embeddings from the untuned text encoder, which then leaves memory."""
    tokenizer, encoder = load_part(job.parts, "tokenizer"), load_part(job.parts, "text_encoder")
    encoder.to(job.device)
    with torch.no_grad():
        return {
            text: embed(encoder, tokenise(tokenizer, [text])) for text in dict.fromkeys(prompts)
        }


ClassPictures = tuple[list[Path], list[str]]
"""Files of class images and their hashes; none unless the prior is made of them."""


def build(jobs: list[Job], class_pictures: list[ClassPictures], prompts: list[str]) -> Learner:
    """Load models and data of one job, or of many that differ in their subjects only, stacked.

    ``prompts``: what will be drawn, beside the training prompts.
    """
    job = jobs[0]  # stands for all where they are alike
    config = job.config
    assert config.prior.prior_weight is not None
    torch.manual_seed(config.training.seed)
    data = [moments(one, pictures) for one, pictures in zip(jobs, class_pictures, strict=True)]
    taught = [text for one in jobs for text in (one.instance_prompt, one.class_prompt)]
    embeds = embed_prompts(job, [*taught, *prompts])
    unet = load_unet(job)
    text_encoder = load_part(job.parts, "text_encoder").to(job.device) if trains_text(job) else None
    untuned = make_untuned(jobs, unet, embeds)
    alone = make_trainable(job, unet, text_encoder)
    trainable: LoraWeights | FullWeights | StackedWeights = alone
    models = [unet] if text_encoder is None else [unet, text_encoder]
    if len(jobs) > 1:
        trainable = StackedWeights(Stack(models, len(jobs)), alone.learning_rates)
    elif isinstance(alone, LoraWeights) and can_fold(job, models):
        trainable = alone.fold()
    enable_memory_savers(job, unet, text_encoder)
    scheduler = training_scheduler(dict(load_part(job.parts, "scheduler").config))
    noising = Noising(scheduler, config.training.offset_noise)
    of = 2 if has_twin(job, models) else 1
    batches = make_batches(job, data, noising, untuned, of)
    objective = DreamBooth(
        unet=unet,
        noising=noising,
        conditions=make_conditions(jobs, text_encoder, embeds),
        prior_weight=config.prior.prior_weight,
        min_snr_gamma=config.training.min_snr_gamma,
    )
    twin = None
    if of > 1:
        theirs = replace(batches, share=(1, of))
        twin = Twin(objective, theirs, config.training.seed, config.training.accumulation)
    return Learner(unet, text_encoder, objective, batches, trainable, embeds, twin)


def has_twin(job: Job, models: list[Any]) -> bool:
    """Each of two processes would run the whole text encoder, where it trains."""
    training = job.config.training
    rows = (training.batch_size or 1) * (1 if job.config.prior.prior == "none" else 2)
    single = choose(training.precision, job.device) == "no"
    return single and pays(job.device, weight_bytes(models), rows)


def can_fold(job: Job, models: list[Any]) -> bool:
    """Where single operations are so short that their number counts; an average of the weights
    would be of another tensor."""
    training = job.config.training
    plain = training.optimiser == "adamw" and not training.ema
    single = choose(training.precision, job.device) == "no"
    return plain and single and job.device == "cpu" and weight_bytes(models) <= SMALL


def weight_bytes(models: list[Any]) -> int:
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def moments(job: Job, others: ClassPictures) -> Moments:
    """Latent moments of a job's photos and of its class images."""
    photos = job.photos.photos
    instance = moments_of(job, [p.path for p in photos], [p.sha256 for p in photos])
    return instance, moments_of(job, *others) if others[0] else None


def trains_text(job: Job) -> bool:
    return bool(job.config.training.train_text_encoder)


def load_unet(job: Job) -> Any:
    """Frozen under a LoRA, so in half precision where mixed; float32 master weights otherwise."""
    half = frozen_dtype(job.config.training.precision, job.device)
    dtype = half if job.config.model.lora else torch.float32
    unet = load_part(job.parts, "unet", dtype).to(job.device, memory_format=torch.channels_last)
    if job.config.training.attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    return unet


def make_trainable(job: Job, unet: Any, text_encoder: Any | None) -> LoraWeights | FullWeights:
    training, lora = job.config.training, job.config.lora
    assert training.learning_rate is not None and training.text_encoder_lr is not None
    rates = (training.learning_rate, training.text_encoder_lr)
    if not job.config.model.lora:
        return FullWeights(unet, text_encoder, rates)
    assert lora.rank and lora.alpha and lora.targets
    adapters.inject(unet, lora.rank, lora.alpha, lora.dropout, lora.targets)
    if text_encoder is not None:
        assert lora.text_encoder_rank and lora.text_encoder_alpha and lora.text_encoder_targets
        adapters.inject(
            text_encoder,
            lora.text_encoder_rank,
            lora.text_encoder_alpha,
            lora.dropout,
            lora.text_encoder_targets,
        )
    return LoraWeights(unet, text_encoder, rates, provenance(job.parts, job.trigger, job.key))


def enable_memory_savers(job: Job, unet: Any, text_encoder: Any | None) -> None:
    """Train mode, without which diffusers ignores checkpointing; SD itself has no dropout."""
    unet.train()
    if text_encoder is not None:
        text_encoder.train()
    if job.config.training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        if text_encoder is not None:
            checkpoint_layers(text_encoder)


def checkpoint_layers(model: Any) -> None:
    """Gradient checkpointing by whichever name this transformers knows it."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def make_conditions(
    jobs: list[Job], text_encoder: Any | None, embeds: dict[str, Tensor]
) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    """Instance and class prompt embeddings of every job, from one pass of the text encoder."""
    if text_encoder is None:
        fixed = [(embeds[job.instance_prompt], embeds[job.class_prompt]) for job in jobs]
        return lambda: fixed
    prompts = [text for job in jobs for text in (job.instance_prompt, job.class_prompt)]
    ids = tokenise(load_part(jobs[0].parts, "tokenizer"), prompts)

    def encode() -> list[tuple[Tensor, Tensor]]:
        rows = embed(text_encoder, ids).split(1)
        return list(zip(rows[::2], rows[1::2], strict=True))

    return encode


def make_untuned(jobs: list[Job], unet: Any, embeds: dict[str, Tensor]) -> Predict | None:
    """eps_0 for prior prediction, from the U-Net as it is now; each job has an equal share of rows.

    Under a LoRA it has the same weights, which stay as they are; full tuning overwrites its own.
    """
    config, device = jobs[0].config, jobs[0].device
    if config.prior.prior != "prediction":
        return None
    precision = config.training.precision
    shared = {id(p): p for p in unet.parameters()} if config.model.lora else {}
    frozen = copy.deepcopy(unet, shared).requires_grad_(False)
    if not config.model.lora:
        frozen.to(frozen_dtype(precision, device))
    prompts = torch.cat([embeds[job.class_prompt] for job in jobs])

    @torch.no_grad()
    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        text = prompts.repeat_interleave(len(noisy) // len(prompts), 0)
        with autocast(precision, device):
            return frozen(noisy.to(frozen.dtype), timesteps, text.to(frozen.dtype)).sample

    return predict


def make_batches(
    job: Job, data: list[Moments], noising: Noising, untuned: Predict | None, of: int
) -> Ahead:
    """The first of ``of`` equal shares."""
    training = job.config.training
    assert training.batch_size is not None
    there = [(a.to(job.device), None if b is None else b.to(job.device)) for a, b in data]
    rows, side = len(data) * training.batch_size, there[0][0].shape[-1]
    return Ahead(
        clean=clean_batches(there, training.batch_size, training.seed),
        noising=noising,
        scaling_factor=scaling_factor(job.parts.root / "vae"),
        seed=training.seed,
        accumulation=training.accumulation,
        untuned=untuned,
        window=1 if untuned is None else window(job.device, -(-rows // of), side),
        share=(0, of),
    )
