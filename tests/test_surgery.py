"""Surgery: configs, weights and feature pairs of the students, derived from plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from bksdm_tune.backbones import BACKBONES
from bksdm_tune.errors import UsageError
from bksdm_tune.unet_configs import PLANS, TEACHER, TEACHER_UNETS, BlockPlan, student_config
from distill.surgery import feature_pairs, inherit, weight_map
from tiny import TEXT_WIDTH, make_unet, unet_config

SIZES = ("base", "small", "tiny")
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
TINY_STAGES = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [CROSS_DOWN] * 3,
    "up_block_types": [CROSS_UP] * 3,
}
# What differs from the teacher's config, as the nine published students have it.
DIFFERENCES: dict[str, dict[str, Any]] = {
    "base": {"layers_per_block": 1},
    "small": {"layers_per_block": 1, "mid_block_type": None},
    "tiny": {"layers_per_block": 1, "mid_block_type": None} | TINY_STAGES,
}
STUDENTS = [
    *(f"bk-{size}{data}" for data in ("", "-2m") for size in SIZES),
    *(f"bk-v2-{size}" for size in SIZES),
]


@pytest.mark.parametrize("name", STUDENTS)
def test_published_student_configs(name: str) -> None:
    row = BACKBONES[name]
    assert row.teacher is not None
    teacher, student = BACKBONES[row.teacher].unet_config, row.unet_config
    expected = dict(DIFFERENCES[row.plan.name])
    if name == "bk-v2-tiny":
        expected["attention_head_dim"] = [5, 10, 20]
    assert student.keys() == teacher.keys()
    assert {key: student[key] for key in student if student[key] != teacher[key]} == expected


def test_there_are_nine_published_students() -> None:
    assert len(STUDENTS) == 9


def test_every_per_stage_list_is_trimmed() -> None:
    teacher = unet_config() | {
        "num_attention_heads": [1, 2, 3, 4],
        "only_cross_attention": (False, True, False, True),
        "cross_attention_dim": [5, 6, 7, 8],
        "transformer_layers_per_block": [1, 2, 3, 4],
        "reverse_transformer_layers_per_block": [4, 3, 2, 1],
        "_class_name": "UNet2DConditionModel",
    }
    student = student_config(teacher, PLANS["tiny"])
    assert student["num_attention_heads"] == [1, 2, 3]
    assert student["only_cross_attention"] == [False, True, False]
    assert student["cross_attention_dim"] == [5, 6, 7]
    assert student["transformer_layers_per_block"] == [1, 2, 3]
    assert student["reverse_transformer_layers_per_block"] == [3, 2, 1]
    assert student["block_out_channels"] == [4, 8, 12]
    assert "_class_name" not in student and teacher["num_attention_heads"] == [1, 2, 3, 4]


def test_a_plan_that_removes_nothing_changes_nothing() -> None:
    config = TEACHER_UNETS["v2-768"]
    assert student_config(config, TEACHER) == config
    names = weight_map(config, TEACHER)
    assert len(names) == 686 and all(key == source for key, source in names.items())


@pytest.mark.parametrize("unet", ["v1", "v2", "v2-768", "pocket"])
@pytest.mark.parametrize(
    ("size", "keys", "renamed"), [("base", 442, 126), ("small", 396, 126), ("tiny", 358, 232)]
)
def test_weight_map_counts(unet: str, size: str, keys: int, renamed: int) -> None:
    names = weight_map(TEACHER_UNETS[unet], PLANS[size])
    assert len(names) == keys == len(set(names.values()))
    assert sum(key != source for key, source in names.items()) == renamed


def stamped_teacher(v2: bool) -> tuple[UNet2DConditionModel, dict[str, float]]:
    """A teacher whose n-th tensor is filled with n, and the number of each tensor."""
    teacher = make_unet(v2=v2)
    stamps = {key: float(number) for number, key in enumerate(teacher.state_dict())}
    with torch.no_grad():
        for key, tensor in teacher.state_dict().items():
            tensor.fill_(stamps[key])
    return teacher, stamps


def published_source(key: str, size: str) -> str:
    """The teacher's name of a student's tensor, from the renames that BK-SDM lists."""
    parts = key.split(".")
    if parts[0] == "up_blocks":
        if parts[2] in ("resnets", "attentions") and parts[3] == "1":
            parts[3] = "2"
        if size == "tiny":
            parts[1] = {"0": "1", "1": "2", "2": "3"}[parts[1]]
    return ".".join(parts)


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(("size", "keys"), [("base", 442), ("small", 396), ("tiny", 358)])
def test_inherited_weights_by_value(v2: bool, size: str, keys: int) -> None:
    teacher, stamps = stamped_teacher(v2)
    weights = inherit(teacher, PLANS[size]).state_dict()
    assert len(weights) == keys
    for key, tensor in weights.items():
        assert (tensor == stamps[published_source(key, size)]).all(), key


def test_the_student_owns_its_weights() -> None:
    teacher = make_unet()
    student = inherit(teacher, PLANS["base"])
    with torch.no_grad():
        student.conv_in.weight.zero_()
    assert teacher.conv_in.weight.abs().sum() > 0
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_the_student_keeps_precision_and_mode() -> None:
    student = inherit(make_unet().half(), PLANS["tiny"])
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.float16}
    assert not student.training


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("size", SIZES)
def test_a_student_predicts(size: str, v2: bool) -> None:
    student = inherit(make_unet(v2=v2), PLANS[size])
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, TEXT_WIDTH)
    with torch.no_grad():
        assert student(latents, 10, text).sample.isfinite().all()


STAGES = [f"{side}_blocks.{stage}" for side in ("down", "up") for stage in range(4)]
SAME_NAMES = [(stage, stage) for stage in STAGES]
TINY_PAIRS = [
    ("down_blocks.0", "down_blocks.0"),
    ("down_blocks.1", "down_blocks.1"),
    ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
    ("up_blocks.1", "up_blocks.0"),
    ("up_blocks.2", "up_blocks.1"),
    ("up_blocks.3", "up_blocks.2"),
]


@pytest.mark.parametrize(
    ("size", "pairs"), [("base", SAME_NAMES), ("small", SAME_NAMES), ("tiny", TINY_PAIRS)]
)
def test_feature_pairs(size: str, pairs: list[tuple[str, str]]) -> None:
    for config in TEACHER_UNETS.values():
        assert feature_pairs(config, PLANS[size]) == pairs


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("size", SIZES)
def test_paired_features_have_one_shape(size: str, v2: bool) -> None:
    teacher = make_unet(v2=v2)
    student = inherit(teacher, PLANS[size])
    shapes: dict[str, list[Any]] = {"teacher": [], "student": []}

    def watch(unet: UNet2DConditionModel, path: str, shapes: list[Any]) -> None:
        def record(module: Any, inputs: Any, output: Any) -> None:
            shapes.append((output[0] if isinstance(output, tuple) else output).shape)

        unet.get_submodule(path).register_forward_hook(record)

    for ours, theirs in feature_pairs(teacher.config, PLANS[size]):
        watch(teacher, ours, shapes["teacher"])
        watch(student, theirs, shapes["student"])
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, TEXT_WIDTH)
    with torch.no_grad():
        teacher(latents, 10, text)
        student(latents, 10, text)
    assert len(shapes["student"]) == (6 if size == "tiny" else 8)
    assert shapes["teacher"] == shapes["student"]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (BlockPlan("odd", (0,), True, (0, 3)), "layers 0 to 2"),
        (BlockPlan("odd", (0,), True, (2, 0)), "in order"),
        (BlockPlan("odd", (), True, (0,)), "layers 0 to 1"),
        (BlockPlan("odd", (0,), True, (0, 1, 2)), "one layer more"),
        (BlockPlan("odd", (0,), True, (1, 2)), "does not fit"),
    ],
)
def test_a_wrong_plan_is_refused(plan: BlockPlan, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        weight_map(TEACHER_UNETS["v1"], plan)


@pytest.mark.parametrize("size", SIZES)
def test_a_student_is_no_teacher(size: str) -> None:
    with pytest.raises(UsageError, match="layers_per_block is 1, not 2"):
        student_config(unet_config(size=size), PLANS["tiny"])


def test_a_three_stage_teacher_is_refused() -> None:
    sdxl = {
        "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
    }
    with pytest.raises(UsageError, match="down_block_types is"):
        weight_map(sdxl, PLANS["base"])
