"""Make a ported adapter fit: train it so that student + adapter imitates teacher + adapter.

A trained student's layers have drifted from the teacher's that they were copied from.  No photo is
needed: the teacher with its adapter draws the pictures, and the distillation objective (BK-SDM,
section 3.2, without its task term) trains the LoRA alone.  The text encoder's part stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bksdm_tune.adapters import ADAPTER_NAME
from bksdm_tune.diffusion import (
    Noising,
    embed,
    latent_moments,
    to_pixels,
    tokenise,
    training_scheduler,
)
from bksdm_tune.errors import DataError
from bksdm_tune.loop import LoopSettings, fit, shuffled
from bksdm_tune.lora import layouts
from bksdm_tune.lora.adapter import TEXT, UNET, Adapter
from bksdm_tune.lora.fit import check
from bksdm_tune.optim import make_optimiser, make_schedule
from bksdm_tune.pipeline import Shot, draw, load_part, load_pipeline
from bksdm_tune.pipeline_folder import native_resolution
from bksdm_tune.provenance import Provenance
from bksdm_tune.resolve import Parts, unet_config
from bksdm_tune.trainables import LoraWeights
from bksdm_tune.unet_configs import recognise_plan
from distill.objective import Distillation
from distill.surgery import feature_pairs

SEED, MINIATURE = 5_000_000, 128
RATES = {True: 1e-3, False: 1e-4}  # of miniatures, of full-size backbones


@dataclass(frozen=True)
class Healing:
    """``teacher`` carries the original adapter, ``student`` the ported one."""

    teacher: Parts
    student: Parts
    prompts: tuple[str, ...]
    pictures: int = 2
    """A prompt."""
    steps: int = 300
    batch_size: int = 8
    learning_rate: float | None = None
    device: str = "cpu"


def heal(healing: Healing, folder: Path) -> Adapter:
    """The healed adapter; ``folder`` holds log and checkpoints, so that it can be interrupted.

    Raises:
        DataError: the adapters do not fit, or the loss is not finite.
    """
    plan = recognise_plan(unet_config(healing.student))
    if plan is None:
        raise DataError(f"{healing.student.name} is no Base, Small or Tiny student.")
    assert healing.student.adapter is not None
    check(healing.student.adapter, unet_config(healing.student))
    torch.manual_seed(SEED)
    teacher = load_pipeline(healing.teacher, healing.device)
    latents, embeds = drawn(healing, teacher)
    student = load_trainable(healing)
    scheduler = training_scheduler(dict(load_part(healing.teacher, "scheduler").config))
    pairs = feature_pairs(unet_config(healing.teacher), plan)
    objective = Distillation(student, teacher.unet, Noising(scheduler), pairs, lambda_task=0.0)
    small = native_resolution(healing.student) <= MINIATURE
    rate = healing.learning_rate or RATES[small]
    weights = LoraWeights(student, None, (rate, rate), _unsaid())
    optimiser = make_optimiser("adamw", weights.parameter_groups())
    schedule = make_schedule("cosine", optimiser, 0, healing.steps)

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in shuffled(len(latents), healing.batch_size, SEED)(start):
            yield latents[chosen], embeds[chosen // healing.pictures]

    settings = LoopSettings(healing.steps, seed=SEED, checkpoint_every=100, device=healing.device)
    fit(objective, weights, batches, optimiser, schedule, settings, folder, title="healing")
    weights.save(folder)
    return healed(healing, folder)


def drawn(healing: Healing, teacher: Any) -> tuple[Tensor, Tensor]:
    """Scaled latents of what the teacher draws, and the prompts' embeddings."""
    shots = [
        Shot(prompt, SEED + number)
        for prompt in healing.prompts
        for number in range(healing.pictures)
    ]
    pictures = draw(teacher, shots, healing.batch_size, title="pictures of the teacher")
    side = native_resolution(healing.teacher)
    pixels = torch.stack([to_pixels(picture, side) for picture in pictures])
    means = latent_moments(teacher.vae, pixels)[:, 0] * teacher.vae.config.scaling_factor
    with torch.no_grad():
        ids = tokenise(teacher.tokenizer, list(healing.prompts))
        embeds = embed(teacher.text_encoder, ids).float()
    return means.to(healing.device), embeds


def load_trainable(healing: Healing) -> Any:
    """The student's U-Net with the ported adapter, of which alone the factors train."""
    student = load_pipeline(replace(healing.student, adapter=None), healing.device)
    assert healing.student.adapter is not None
    path = healing.student.adapter
    student.load_lora_weights(path.parent, weight_name=path.name, adapter_name=ADAPTER_NAME)
    unet = student.unet.float().requires_grad_(False).train()
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return unet


def healed(healing: Healing, folder: Path) -> Adapter:
    assert healing.student.adapter is not None
    before = layouts.read(healing.student.adapter)
    after = layouts.read(folder / "pytorch_lora_weights.safetensors")
    text = {f"{TEXT}.{path}": update for path, update in before.of(TEXT).items()}
    unet = {f"{UNET}.{path}": update for path, update in after.of(UNET).items()}
    assert before.of(UNET).keys() == after.of(UNET).keys()
    return Adapter(dict(sorted((unet | text).items())), "diffusers")


def _unsaid() -> Provenance:
    return Provenance("", "", "", "", "")
