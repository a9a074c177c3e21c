"""Which adapters fit which U-Net: a fingerprint of the architecture, and its name for people.

A LoRA names modules by position, and the positions of a compressed U-Net mean other layers than
the teacher's, so a file records the fingerprint of the U-Net that it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bksdm_tune.artifacts import content_key
from bksdm_tune.backbones import UNETS
from bksdm_tune.unet_configs import (
    DOWN_STAGE_FIELDS,
    SD_BLOCKS,
    TEACHER_UNETS,
    student_config,
)

# diffusers' defaults of the UNet2DConditionModel arguments that decide which modules there are and
# what goes through them.
DEFAULTS: dict[str, Any] = SD_BLOCKS | {
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "use_linear_projection": False,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "attention_type": "default",
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "class_embed_type": None,
    "addition_embed_type": None,
}
PER_STAGE = (*DOWN_STAGE_FIELDS, "layers_per_block")
NAMES = {"v1": "SD-v1", "v2": "SD-v2", "pocket": "pocket"}


def fingerprint(unet_config: Mapping[str, Any]) -> str:
    """16 hex digits, equal for two U-Nets exactly when a LoRA of one fits the other.

    A missing field counts as diffusers' default, one number as the same for every stage.
    """
    shape = {key: _plain(unet_config.get(key, default)) for key, default in DEFAULTS.items()}
    # diffusers reads attention_head_dim as the number of heads where that is not given.
    heads = shape.pop("attention_head_dim")
    shape["num_attention_heads"] = shape["num_attention_heads"] or heads
    stages = len(shape["down_block_types"])
    for key in PER_STAGE:
        if key in shape and not isinstance(shape[key], list):
            shape[key] = [shape[key]] * stages
    return content_key(shape)[:16]


def describe(unet_config: Mapping[str, Any]) -> str:
    """Such as "SD-v1 shape, base (579M)"; an unregistered shape is described by its numbers."""
    wanted = fingerprint(unet_config)
    for (unet, plan), facts in UNETS.items():
        if fingerprint(student_config(TEACHER_UNETS[unet], plan)) == wanted:
            return f"{NAMES[unet]} shape, {plan.name} ({_millions(facts.parameters)})"
    shape = {key: _plain(unet_config.get(key, default)) for key, default in DEFAULTS.items()}
    mid = "a" if shape["mid_block_type"] else "no"
    return (
        f"another shape: channels {tuple(shape['block_out_channels'])}, "
        f"{shape['layers_per_block']} layers a down stage, {mid} mid block, "
        f"text width {shape['cross_attention_dim']}"
    )


def _millions(count: int) -> str:
    millions = count / 1e6
    return f"{millions:.0f}M" if millions >= 100 else f"{millions:.1f}M"


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
