"""Stage ``unet``: the teacher's U-Net and text encoder, trained together on the cached latents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from bksdm_tune.diffusion import Noising, training_scheduler
from bksdm_tune.loop import shuffled
from bksdm_tune.unet_configs import TEACHER_UNETS
from scripts.pocket import clip, vae
from scripts.pocket.common import pixels, restore, train
from scripts.pocket.data import CAPTIONS

STEPS, BATCH, NAMED, CAPTION_DROPOUT, MIN_SNR_GAMMA = 2_000, 32, 10, 0.1, 5.0


def scheduler() -> DPMSolverMultistepScheduler:
    """SD's noise schedule, DPM-Solver++ for sampling."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        steps_offset=1,
        timestep_spacing="leading",
    )


def make_text_encoder(work: Path) -> CLIPTextModel:
    config = clip.make(work).config.text_config
    return CLIPTextModel(CLIPTextConfig(**config.to_dict()))


def make() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**TEACHER_UNETS["pocket"])
    return unet.to(memory_format=torch.channels_last)


def empty_caption(work: Path) -> torch.Tensor:
    vocabulary = json.loads((work / "data/tokenizer/vocab.json").read_text())
    tokens = torch.full((clip.MAX_TOKENS,), vocabulary["<|endoftext|>"])
    tokens[0] = vocabulary["<|startoftext|>"]
    return tokens


@torch.inference_mode()
def cache_latents(work: Path, name: str = "train") -> np.ndarray:
    """Scaled latent means of the ``train`` or ``named`` pictures, float16 (N, 4, 16, 16)."""
    path = work / f"unet/{name}-latents.npy"
    if not path.exists():
        model = vae.load(work)
        images = np.load(work / f"data/{name}-images.npy", mmap_mode="r")
        parts = [
            model.encode(pixels(images[i : i + 64])).latent_dist.mean.half().numpy()
            for i in range(0, len(images), 64)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate(parts) * np.float16(model.config.scaling_factor))
    return np.load(path)


def caption_batches(work: Path, seed: int) -> Any:
    """Batches (latents, token ids), NAMED of BATCH from the looks that have a name; one caption in
    ten is empty, for guidance."""
    latents = [cache_latents(work, name) for name in ("train", "named")]
    tokens = [np.load(work / f"data/{name}-tokens.npy") for name in ("train", "named")]
    sizes = (BATCH - NAMED, NAMED)
    empty = empty_caption(work)

    def batches(start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        streams = [
            shuffled(len(pictures), size, seed + i)(start)
            for i, (pictures, size) in enumerate(zip(latents, sizes, strict=True))
        ]
        for number, chosen in enumerate(zip(*streams, strict=True), start):
            rng = np.random.default_rng((seed, number))
            pictures = np.concatenate([a[c] for a, c in zip(latents, chosen, strict=True)])
            words = np.concatenate(
                [
                    t[c, rng.integers(CAPTIONS, size=len(c))]
                    for t, c in zip(tokens, chosen, strict=True)
                ]
            )
            texts = torch.from_numpy(words.astype(np.int64))
            texts[torch.from_numpy(rng.random(BATCH) < CAPTION_DROPOUT)] = empty
            yield torch.from_numpy(pictures.astype(np.float32)), texts

    return batches


def run(work: Path) -> None:
    torch.manual_seed(4)
    unet, text_encoder = make(), make_text_encoder(work)
    noising = Noising(training_scheduler(dict(scheduler().config)))

    def objective(batch: Any) -> dict[str, torch.Tensor]:
        noisy, timesteps, target = noising(batch[0])
        predicted = unet(noisy, timesteps, text_encoder(batch[1])[0]).sample
        error = F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3))
        weights = noising.min_snr_weights(timesteps, MIN_SNR_GAMMA)
        return {"mse": error.mean(), "loss": (weights * error).mean()}

    train(
        work / "unet",
        objective,
        {"unet": unet, "text_encoder": text_encoder},
        caption_batches(work, 11),
        STEPS,
        {"unet": 1.2e-3, "text_encoder": 1e-3},
        ema_decay=0.999,
    )


def load(work: Path) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    unet, text_encoder = make(), make_text_encoder(work)
    restore(work / "unet", {"unet": unet, "text_encoder": text_encoder})
    return unet.eval(), text_encoder.eval()
