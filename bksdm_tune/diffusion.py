"""Latents, prompt embeddings, noise, targets: what every objective does to its batch.

Everything follows the model's own configs: the target the scheduler's ``prediction_type``, the
latent scale the VAE's ``scaling_factor``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from PIL import Image
from torch import Tensor

from bksdm_tune.errors import DataError
from bksdm_tune.processes import my_share


@dataclass(frozen=True)
class Noising:
    """Draw noise and timesteps from the global generator; give what the U-Net must predict.

    ``offset_noise``: weight of the per-channel constant added to the noise; 0 is none.
    """

    scheduler: DDPMScheduler
    offset_noise: float = 0.0

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled latents NCHW -> (noisy latents NCHW, timesteps (N,) int64, target NCHW)."""
        noise = gaussian_like(latents)
        if self.offset_noise:
            noise = noise + self.offset_noise * gaussian_like(latents[:, :, :1, :1])
        steps, device = self.scheduler.config.num_train_timesteps, latents.device
        timesteps = my_share(lambda n: torch.randint(0, steps, (n,), device=device), len(latents))
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        if self.scheduler.config.prediction_type == "epsilon":
            return noisy, timesteps, noise
        return noisy, timesteps, self.scheduler.get_velocity(latents, noise, timesteps)

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Per-sample loss weights (N,), Hang et al. 2023 equation 6: min(SNR, gamma) over SNR for
        epsilon, over SNR + 1 for velocity."""
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps].double()
        snr = alphas / (1 - alphas)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        return (snr.clamp(max=gamma) / (snr + 1 if velocity else snr)).float()


def gaussian_like(tensor: Tensor) -> Tensor:
    """Standard normal numbers in the shape of a batch, of whose rows this process holds a share."""
    shape, dtype, device = tensor.shape[1:], tensor.dtype, tensor.device
    return my_share(lambda n: torch.randn((n, *shape), dtype=dtype, device=device), len(tensor))


def training_scheduler(config: dict[str, Any]) -> DDPMScheduler:
    """The noise schedule of any Stable Diffusion scheduler config.

    Raises:
        DataError: the config asks for another target than epsilon or velocity.
    """
    scheduler = DDPMScheduler.from_config(config)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise DataError(
            f"The scheduler's prediction_type is {scheduler.config.prediction_type!r}; "
            "epsilon and v_prediction can be trained."
        )
    return scheduler


def crop(image: Image.Image, side: int) -> np.ndarray:
    """RGB picture -> short side ``side`` (bicubic), centre crop; uint8 HWC."""
    width, height = image.size
    scale = side / min(width, height)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.array(image.crop((left, top, left + side, top + side)))


def unit_range(pixels: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in -1..1."""
    return pixels.float() / 127.5 - 1


def to_pixels(image: Image.Image, resolution: int) -> Tensor:
    """As :func:`crop`; float32 CHW in -1..1."""
    return unit_range(torch.from_numpy(crop(image, resolution)).permute(2, 0, 1))


@torch.inference_mode()
def latent_moments(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pixels NCHW in -1..1 -> mean and std of the latent posterior, unscaled, (N, 2, C, h, w)."""
    moments = []
    for image in pixels:
        posterior = vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist
        moments.append(torch.stack([posterior.mean, posterior.std], 1).float().cpu())
    return torch.cat(moments)


def sample_latents(moments: Tensor, scaling_factor: float) -> Tensor:
    """Draw scaled latents NCHW from cached moments, with the global generator."""
    mean, std = moments[:, 0], moments[:, 1]
    return (mean + std * gaussian_like(mean)) * scaling_factor


def tokenise(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Token ids (N, model_max_length), padded and cut as the pipelines do."""
    tokens = tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    return tokens.input_ids


def embed(text_encoder: Any, token_ids: Tensor) -> Tensor:
    """Token ids (N, tokens) -> prompt embeddings (N, tokens, width), as the pipelines do."""
    return text_encoder(token_ids.to(text_encoder.device))[0]
