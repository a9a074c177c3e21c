"""From a job to what ``fit`` needs: models, objective, batches, trainable, pictures on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bksdm_tune import adapters, architecture
from bksdm_tune.artifacts import cached
from bksdm_tune.diffusion import (
    Noising,
    embed,
    latent_moments,
    to_pixels,
    tokenise,
    training_scheduler,
)
from bksdm_tune.dreambooth.job import Job
from bksdm_tune.dreambooth.objective import Batch, DreamBooth, Predict
from bksdm_tune.loop import Batches, shuffled
from bksdm_tune.pipeline import load_part
from bksdm_tune.pipeline_folder import scaling_factor
from bksdm_tune.precision import frozen_dtype
from bksdm_tune.resolve import unet_config
from bksdm_tune.trainables import FullWeights, LoraWeights
from subjects.photos import open_photo


@dataclass(frozen=True)
class Learner:
    """Loaded models with their objective and data."""

    unet: Any
    text_encoder: Any | None
    """Only where it trains."""
    objective: DreamBooth
    batches: Batches
    trainable: LoraWeights | FullWeights
    embeds: dict[str, Tensor]
    """Prompt -> (1, tokens, width), from the untuned text encoder."""


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


def build(
    job: Job, class_paths: list[Path], class_hashes: list[str], prompts: list[str]
) -> Learner:
    """Load models and data.  ``prompts``: what will be drawn, beside the two training prompts."""
    config = job.config
    assert config.prior.prior_weight is not None
    torch.manual_seed(config.training.seed)
    photos = job.photos.photos
    instance = moments_of(job, [p.path for p in photos], [p.sha256 for p in photos])
    others = moments_of(job, class_paths, class_hashes) if class_paths else None
    embeds = embed_prompts(job, [job.instance_prompt, job.class_prompt, *prompts])
    unet = load_unet(job)
    text_encoder = load_part(job.parts, "text_encoder").to(job.device) if trains_text(job) else None
    before = copy.deepcopy(unet) if needs_copy(job) else unet
    trainable = make_trainable(job, unet, text_encoder)
    enable_memory_savers(job, unet, text_encoder)
    scheduler = training_scheduler(dict(load_part(job.parts, "scheduler").config))
    objective = DreamBooth(
        unet=unet,
        noising=Noising(scheduler, config.training.offset_noise),
        scaling_factor=scaling_factor(job.parts.root / "vae"),
        conditions=make_conditions(job, text_encoder, embeds),
        untuned=make_untuned(job, before, embeds) if config.prior.prior == "prediction" else None,
        prior_weight=config.prior.prior_weight,
        min_snr_gamma=config.training.min_snr_gamma,
    )
    batches = make_batches(job, instance, others)
    return Learner(unet, text_encoder, objective, batches, trainable, embeds)


def trains_text(job: Job) -> bool:
    return bool(job.config.training.train_text_encoder)


def needs_copy(job: Job) -> bool:
    """Full tuning overwrites eps_0's weights; a LoRA is switched off instead."""
    return job.config.prior.prior == "prediction" and not job.config.model.lora


def load_unet(job: Job) -> Any:
    """Frozen under a LoRA, so in half precision where mixed; float32 master weights otherwise."""
    half = frozen_dtype(job.config.training.precision, job.device)
    dtype = half if job.config.model.lora else torch.float32
    unet = load_part(job.parts, "unet", dtype).to(job.device)
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
    return LoraWeights(unet, text_encoder, rates, provenance(job))


def provenance(job: Job) -> adapters.Provenance:
    config = unet_config(job.parts)
    return adapters.Provenance(
        backbone=job.parts.name,
        architecture=architecture.fingerprint(config),
        shape=architecture.describe(config),
        trigger=job.trigger,
        run=job.key,
    )


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
    job: Job, text_encoder: Any | None, embeds: dict[str, Tensor]
) -> Callable[[], tuple[Tensor, Tensor]]:
    if text_encoder is None:
        fixed = embeds[job.instance_prompt], embeds[job.class_prompt]
        return lambda: fixed
    ids = tokenise(load_part(job.parts, "tokenizer"), [job.instance_prompt, job.class_prompt])

    def encode() -> tuple[Tensor, Tensor]:
        both = embed(text_encoder, ids)
        return both[:1], both[1:]

    return encode


def make_untuned(job: Job, unet: Any, embeds: dict[str, Tensor]) -> Predict:
    """eps_0: the frozen copy, or the U-Net with its adapter switched off."""
    unet_is_copy = needs_copy(job)
    if unet_is_copy:
        unet.to(frozen_dtype(job.config.training.precision, job.device)).requires_grad_(False)
    own = embeds[job.class_prompt]

    @torch.no_grad()
    def predict(noisy: Tensor, timesteps: Tensor, _: Tensor) -> Tensor:
        prompts = own.expand(len(noisy), -1, -1)
        if unet_is_copy:
            dtype = unet.dtype
            return unet(noisy.to(dtype), timesteps, prompts.to(dtype)).sample
        with adapters.switched_off(unet):
            return unet(noisy, timesteps, prompts).sample

    return predict


def make_batches(job: Job, instance: Tensor, others: Tensor | None) -> Batches:
    size, seed = job.config.training.batch_size, job.config.training.seed
    assert size is not None
    instance = instance.to(job.device)
    others = None if others is None else others.to(job.device)

    def batches(start: int) -> Iterator[Batch]:
        mine = shuffled(len(instance), size, seed)(start)
        theirs = shuffled(1 if others is None else len(others), size, seed + 1)(start)
        for a, b in zip(mine, theirs, strict=True):
            yield instance[a], None if others is None else others[b]

    return batches
