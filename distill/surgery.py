"""Block removal: a student's config, weights and distilled features, all derived from a plan.

BK-SDM (arXiv 2305.15798) section 3.2.  Nothing here knows a size by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from bksdm_tune.errors import UsageError
from bksdm_tune.unet_configs import BlockPlan, student_config

LAYER = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)")
UP_STAGE = re.compile(r"up_blocks\.(\d+)\.(.+)")


def weight_map(teacher_config: Mapping[str, Any], plan: BlockPlan) -> dict[str, str]:
    """For each tensor of the student's state dict, the teacher tensor that it inherits.

    Raises:
        UsageError: the teacher is not a 4-stage Stable Diffusion U-Net, or the plan asks for a
            tensor that the teacher has not, or has in another shape.
    """
    student = _on_meta(student_config(teacher_config, plan)).state_dict()
    teacher = _on_meta(teacher_config).state_dict()
    names = {key: _teacher_key(key, plan) for key in student}
    wrong = [
        f"{key} {tuple(tensor.shape)} from {names[key]} "
        f"{tuple(teacher[names[key]].shape) if names[key] in teacher else '(missing)'}"
        for key, tensor in student.items()
        if names[key] not in teacher or teacher[names[key]].shape != tensor.shape
    ]
    if wrong:
        raise UsageError(
            f"Plan {plan.name!r} does not fit this teacher: {len(wrong)} of {len(names)} tensors "
            "have no source of their shape:\n  " + "\n  ".join(wrong[:5])
        )
    return names


def feature_pairs(teacher_config: Mapping[str, Any], plan: BlockPlan) -> list[tuple[str, str]]:
    """Module paths (teacher, student) whose outputs are distilled; of a tuple output the first.

    The student's innermost down stage may lack the teacher's downsampler; then the projection of
    its last attention stands for the stage, which is the last point of equal size.
    """
    config = student_config(teacher_config, plan)
    stages, shift = len(config["down_block_types"]), int(plan.drop_innermost)
    whole = stages - shift
    down = [(f"down_blocks.{stage}", f"down_blocks.{stage}") for stage in range(whole)]
    last = "down_blocks.{}.attentions.{}.proj_out"
    for stage in range(whole, stages):
        teacher_layer = teacher_config.get("layers_per_block", 2) - 1
        student_layer = config["layers_per_block"] - 1
        down.append((last.format(stage, teacher_layer), last.format(stage, student_layer)))
    up = [(f"up_blocks.{stage + shift}", f"up_blocks.{stage}") for stage in range(stages)]
    return down + up


def inherit(teacher: UNet2DConditionModel, plan: BlockPlan) -> UNet2DConditionModel:
    """A student holding copies of the teacher's weights, in its dtype and mode, on its device.

    Raises:
        UsageError: as ``weight_map``.
    """
    student = _on_meta(student_config(teacher.config, plan))
    weights = teacher.state_dict()
    names = weight_map(teacher.config, plan)
    student.load_state_dict(
        {key: weights[source].clone() for key, source in names.items()}, assign=True
    )
    return student.train(teacher.training)


def _on_meta(config: Mapping[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def _teacher_key(key: str, plan: BlockPlan) -> str:
    layer = LAYER.fullmatch(key)
    if layer:
        side, stage, kind, index, rest = layer.groups()
        kept = plan.down_layers if side == "down" else plan.up_layers
        key = f"{side}_blocks.{stage}.{kind}.{kept[int(index)]}.{rest}"
    up = UP_STAGE.fullmatch(key)
    if up and plan.drop_innermost:
        key = f"up_blocks.{int(up[1]) + 1}.{up[2]}"
    return key
