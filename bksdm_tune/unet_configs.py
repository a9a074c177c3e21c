"""The teachers' U-Net configs as plain data, the block plans, and a student's config from both.

Keys are arguments of diffusers' ``UNet2DConditionModel``; the values of SD-v1, SD-v2-base and
SD-v2 (768 px) are those of the published ``unet/config.json`` files.  Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bksdm_tune.errors import UsageError

CROSS_DOWN, PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
CROSS_MID = "UNetMidBlock2DCrossAttn"

SD_BLOCKS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN],
    "mid_block_type": CROSS_MID,
    "up_block_types": [PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP],
}
# Those that a plan changes.
BLOCK_FIELDS = ("layers_per_block", "down_block_types", "mid_block_type", "up_block_types")
V2: dict[str, Any] = SD_BLOCKS | {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
TEACHER_UNETS: dict[str, dict[str, Any]] = {
    "v1": SD_BLOCKS
    | {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "v2": V2,
    "v2-768": V2 | {"sample_size": 96, "upcast_attention": True},
    "pocket": SD_BLOCKS
    | {
        "sample_size": 16,
        "block_out_channels": [32, 64, 88, 88],
        "attention_head_dim": [2, 4, 4, 4],
        "cross_attention_dim": 96,
        "norm_num_groups": 8,
    },
}

# Ordered from the outermost stage inwards, on the way down; diffusers reverses them for the way up.
DOWN_STAGE_FIELDS = (
    "block_out_channels",
    "down_block_types",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "only_cross_attention",
    "transformer_layers_per_block",
)
UP_STAGE_FIELDS = ("up_block_types", "reverse_transformer_layers_per_block")


@dataclass(frozen=True)
class BlockPlan:
    """What a size keeps of a teacher with 2 layers per down stage and 3 per up stage."""

    name: str
    down_layers: tuple[int, ...]
    """Teacher layers kept in every down stage."""
    mid: bool
    """Whether the mid block stays."""
    up_layers: tuple[int, ...]
    """Teacher layers kept in every up stage."""
    drop_innermost: bool = False
    """Whether the innermost down stage, the downsampler into it and the first up stage go."""


TEACHER = BlockPlan("teacher", (0, 1), True, (0, 1, 2))
BASE = BlockPlan("base", (0,), True, (0, 2))
SMALL = BlockPlan("small", (0,), False, (0, 2))
TINY = BlockPlan("tiny", (0,), False, (0, 2), drop_innermost=True)
PLANS = {plan.name: plan for plan in (TEACHER, BASE, SMALL, TINY)}


def check_teacher(config: Mapping[str, Any]) -> None:
    """Raise UsageError, naming each field, unless ``config`` has the blocks of SD-v1 and SD-v2."""
    wrong = [
        f"{key} is {config[key]!r}, not {SD_BLOCKS[key]!r}"
        for key in BLOCK_FIELDS
        if key in config and _plain(config[key]) != SD_BLOCKS[key]
    ]
    if wrong:
        raise UsageError(
            "The teacher is not an uncompressed Stable Diffusion v1 or v2 U-Net "
            "(4 stages, 2 layers each):\n  " + "\n  ".join(wrong) + "\n"
            "Name a teacher such as sd-v1-4 or pocket-teacher; `bksdm-tune backbones` lists them."
        )


def check_plan(plan: BlockPlan) -> None:
    """Raise UsageError unless the plan's layers exist in a teacher and fit each other."""
    for side, layers, available in (("down", plan.down_layers, 2), ("up", plan.up_layers, 3)):
        if not layers or list(layers) != sorted(set(layers) & set(range(available))):
            raise UsageError(
                f"Plan {plan.name!r} keeps {side} layers {layers}; a teacher stage has layers "
                f"0 to {available - 1}, each named once, in order."
            )
    if len(plan.up_layers) != len(plan.down_layers) + 1:
        raise UsageError(
            f"Plan {plan.name!r} keeps {len(plan.down_layers)} down and {len(plan.up_layers)} up "
            "layers a stage; an up stage has exactly one layer more than a down stage."
        )


def student_config(teacher_config: Mapping[str, Any], plan: BlockPlan) -> dict[str, Any]:
    """The config of ``teacher_config`` with the plan's blocks removed.

    Keys that diffusers adds for its own use (``_class_name`` and the like) are left out.

    Raises:
        UsageError: the teacher is not a 4-stage Stable Diffusion U-Net, or the plan is wrong.
    """
    check_teacher(teacher_config)
    check_plan(plan)
    config = {key: _plain(value) for key, value in teacher_config.items() if key[0] != "_"}
    config["layers_per_block"] = len(plan.down_layers)
    if not plan.mid:
        config["mid_block_type"] = None
    if plan.drop_innermost:
        for key in DOWN_STAGE_FIELDS:
            if isinstance(config.get(key), list):
                config[key] = config[key][:-1]
        for key in UP_STAGE_FIELDS:
            if isinstance(config.get(key), list):
                config[key] = config[key][1:]
    return config


def teacher_of(student: Mapping[str, Any], plan: BlockPlan) -> dict[str, Any]:
    """The teacher's config, from a student's that ``plan`` made; the innermost stage, where it is
    gone, as wide as the next one, as in every Stable Diffusion."""
    config = {key: _plain(value) for key, value in student.items() if key[0] != "_"}
    if plan.drop_innermost:
        for key in DOWN_STAGE_FIELDS:
            if isinstance(config.get(key), list):
                config[key] = [*config[key], config[key][-1]]
        for key in UP_STAGE_FIELDS:
            if isinstance(config.get(key), list):
                config[key] = [config[key][0], *config[key]]
    return config | {key: SD_BLOCKS[key] for key in BLOCK_FIELDS}


def recognise_plan(config: Mapping[str, Any]) -> BlockPlan | None:
    """The plan whose shape a U-Net config has, or None."""
    for plan in PLANS.values():
        planned = student_config(SD_BLOCKS, plan)
        if all(_plain(config.get(key, SD_BLOCKS[key])) == planned[key] for key in BLOCK_FIELDS):
            return plan
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
