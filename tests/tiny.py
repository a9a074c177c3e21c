"""A random Stable Diffusion pipeline small enough for any test: 4-stage U-Net, 32 px pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bksdm_tune.unet_configs import PLANS, student_config

TEXT_WIDTH = 16
LATENT_SIZE = 8
IMAGE_SIZE = 32
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def unet_config(v2: bool = False, size: str = "teacher", **changes: Any) -> dict[str, Any]:
    """A teacher's (or student's) U-Net config; ``changes`` are UNet2DConditionModel arguments."""
    config: dict[str, Any] = {
        "sample_size": LATENT_SIZE,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [4, 8, 12, 12],
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": [1, 2, 3, 3] if v2 else 2,
        "use_linear_projection": v2,
        **changes,
    }
    if size == "teacher":
        return config
    return student_config(config, PLANS[size])


def make_unet(seed: int = 0, **options: Any) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(**unet_config(**options)).eval()


def make_text_encoder() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=TEXT_WIDTH,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    ).eval()


def make_vae() -> AutoencoderKL:
    """Downsamples by 4."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[4, 8, 8],
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=0.3,
    ).eval()


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level vocabulary without merges: one token a letter."""
    letters = list(bytes_to_unicode().values())
    words = letters + [f"{letter}</w>" for letter in letters] + list(SPECIAL)
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def make_scheduler(prediction_type: str) -> PNDMScheduler:
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type=prediction_type,
        skip_prk_steps=True,
        steps_offset=1,
    )


def make_pipeline(
    folder: Path,
    *,
    seed: int = 0,
    v2: bool = False,
    v_prediction: bool = False,
    size: str = "teacher",
    **unet_changes: Any,
) -> Path:
    """Write a random pipeline into ``folder`` and return it.

    Args:
        v2: per-stage head counts and linear projections, as SD-v2 has them.
        v_prediction: the scheduler asks for velocity, as SD-v2.1 (768 px) does.
        size: "teacher", or a student's plan: "base", "small", "tiny".
        unet_changes: arguments of UNet2DConditionModel.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=make_vae(),
            text_encoder=make_text_encoder(),
            tokenizer=make_tokenizer(),
            unet=make_unet(seed, v2=v2, size=size, **unet_changes),
            scheduler=make_scheduler("v_prediction" if v_prediction else "epsilon"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)
