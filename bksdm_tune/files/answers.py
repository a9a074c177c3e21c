"""What a model says to one fixed question, so that two ways of loading it can be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bksdm_tune.diffusion import tokenise

PROMPT = "a photo of a sks11df dog in the snow"
TIMESTEPS = (50, 700)
Answers = dict[str, Tensor]


@torch.inference_mode()
def ask(unet: Any, text_encoder: Any, tokenizer: Any, vae: Any = None) -> Answers:
    """Prompt embeddings, the U-Net's predictions for them at two timesteps, and, given a VAE, what
    it decodes, and what it makes of that; float32."""
    ids = tokenise(tokenizer, [PROMPT] * len(TIMESTEPS)).to(text_encoder.device)
    embeds = text_encoder(ids)[0]
    noisy, timesteps = question(unet.config, unet.device)
    said = unet(noisy.to(unet.dtype), timesteps, embeds.to(unet.dtype)).sample
    answers = {"text encoder": embeds.float().cpu(), "U-Net": said.float().cpu()}
    if vae is not None:
        pixels = vae.decode(latents(unet.config, vae.device).to(vae.dtype)).sample
        answers["VAE decoder"] = pixels.float().cpu()
        answers["VAE encoder"] = vae.encode(pixels).latent_dist.mean.float().cpu()
    return answers


def question(config: Any, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    """Noisy latents NCHW of the native size, timesteps."""
    generator = torch.Generator().manual_seed(0)
    side = config["sample_size"]
    shape = (len(TIMESTEPS), config["in_channels"], side, side)
    return torch.randn(shape, generator=generator).to(device), torch.tensor(TIMESTEPS).to(device)


def latents(config: Any, device: Any = "cpu") -> Tensor:
    """Latents NCHW to decode."""
    return question(config, device)[0]


def apart(a: Answers, b: Answers) -> dict[str, float]:
    """Largest difference of each answer that both give."""
    return {name: float((a[name] - b[name]).abs().max()) for name in a if name in b}
