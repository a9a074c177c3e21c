"""The registry: every stored count is what the model has, and listing never loads torch."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

from bksdm_tune import architecture, backbones_command
from bksdm_tune.architecture import describe, fingerprint
from bksdm_tune.backbones import BACKBONES, FAMILIES, UNETS, get_backbone
from bksdm_tune.backbones_command import find_local
from bksdm_tune.errors import UsageError
from bksdm_tune.unet_configs import PLANS, TEACHER_UNETS, recognise_plan, student_config
from macs import unet_macs

NAMES = """sd-v1-4 sd-v1-5 sd-v2-1-base sd-v2-1 bk-base bk-small bk-tiny bk-base-2m bk-small-2m
bk-tiny-2m bk-v2-base bk-v2-small bk-v2-tiny pocket-teacher pocket-base pocket-small
pocket-tiny""".split()

# protocols: parameters and GMACs as measured elsewhere (torch 2.15, diffusers 0.42.1).
PUBLISHED = {
    "sd-v1-4": (859_520_964, 338.75),
    "sd-v1-5": (859_520_964, 338.75),
    "bk-base": (579_384_964, 223.76),
    "bk-small": (482_346_884, 217.73),
    "bk-tiny": (323_384_964, 205.04),
    "sd-v2-1-base": (865_910_724, 339.24),
    "sd-v2-1": (865_910_724, 760.80),
    "bk-v2-base": (583_480_964, 224.07),
    "bk-v2-small": (485_787_524, 217.99),
    "bk-v2-tiny": (326_825_604, 205.30),
}

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
OPENCLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
SD_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def on_meta(make: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.device("meta"):
        return make(*args, **kwargs)


def pocket_folder(name: str) -> Path:
    return find_local(BACKBONES[name]) or Path("absent")


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_registry_holds_these_rows() -> None:
    assert list(BACKBONES) == NAMES and len(BACKBONES) == 17


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    row = BACKBONES[name]
    assert (row.unet_parameters, row.gmacs) == PUBLISHED[name]


@pytest.mark.parametrize("key", UNETS, ids=lambda key: f"{key[0]}-{key[1].name}")
def test_stored_counts_are_what_the_model_has(key: Any) -> None:
    config = student_config(TEACHER_UNETS[key[0]], key[1])
    unet = on_meta(UNet2DConditionModel, **config)
    assert count(unet) == UNETS[key].parameters
    assert unet_macs(unet) / 1e9 == pytest.approx(UNETS[key].gmacs, rel=0.002)


def test_every_unet_with_counts_is_some_row_s() -> None:
    assert len(UNETS) == 13
    assert {(row.unet, row.plan) for row in BACKBONES.values()} == set(UNETS)


@pytest.mark.parametrize(("family", "shape"), [("v1", CLIP_L), ("v2", OPENCLIP_H)])
def test_text_encoder_count(family: str, shape: dict[str, int]) -> None:
    config = CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **shape)
    assert count(on_meta(CLIPTextModel, config)) == FAMILIES[family].text_encoder_parameters


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_vae_count(family: str) -> None:
    assert count(on_meta(AutoencoderKL, **SD_VAE)) == FAMILIES[family].vae_parameters


def test_safety_checker_count() -> None:
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
    }
    config = CLIPConfig(vision_config=vision, text_config=CLIP_L, projection_dim=768)
    checker = on_meta(StableDiffusionSafetyChecker, config)
    assert count(checker) == FAMILIES["v1"].safety_checker_parameters


def test_pocket_counts_are_what_the_wheel_carries() -> None:
    folder = pocket_folder("pocket-teacher")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    row = BACKBONES["pocket-teacher"]
    assert count(text_encoder) == row.text_encoder_parameters
    assert count(vae) == row.vae_parameters
    assert FAMILIES["pocket"].vae_factor == 2 ** (len(vae.config.block_out_channels) - 1)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("pocket")])
def test_pocket_unets_have_the_registered_config(name: str) -> None:
    config = json.loads((pocket_folder(name) / "unet" / "config.json").read_text())
    assert fingerprint(config) == fingerprint(BACKBONES[name].unet_config)
    assert config["sample_size"] == 16


def test_bk_small_is_as_large_as_its_repository() -> None:
    # 1,987,834,232 bytes with tokenizer and configs, which come to under 3 MB.
    assert 0 < 1_987_834_232 - BACKBONES["bk-small"].disk_bytes < 3e6


def test_resolution_and_target() -> None:
    assert {row.name: row.resolution for row in BACKBONES.values() if row.resolution != 512} == {
        "sd-v2-1": 768,
        "pocket-teacher": 64,
        "pocket-base": 64,
        "pocket-small": 64,
        "pocket-tiny": 64,
    }
    velocity = [row.name for row in BACKBONES.values() if row.prediction_type != "epsilon"]
    assert velocity == ["sd-v2-1"]


def test_teachers_of_the_students() -> None:
    students = [row for row in BACKBONES.values() if row.plan.name != "teacher"]
    assert len(students) == 12
    for row in students:
        assert row.teacher is not None
        teacher = BACKBONES[row.teacher]
        assert (teacher.unet, teacher.plan.name) == (row.unet, "teacher")


def test_licences() -> None:
    by_licence: dict[str, set[str]] = {}
    for row in BACKBONES.values():
        by_licence.setdefault(row.licence, set()).add(row.name)
    assert by_licence["CreativeML Open RAIL++-M"] == {"sd-v2-1-base", "sd-v2-1"}
    assert by_licence["Apache-2.0"] == {name for name in NAMES if name.startswith("pocket")}
    assert len(by_licence["CreativeML OpenRAIL-M"]) == 11 and len(by_licence) == 3


def test_an_unknown_name_is_told_the_close_ones() -> None:
    with pytest.raises(UsageError, match="bk-tiny"):
        get_backbone("bk-tinny")


def test_fingerprints_tell_every_shape_apart() -> None:
    prints = {key: fingerprint(student_config(TEACHER_UNETS[key[0]], key[1])) for key in UNETS}
    # SD-v2 at 768 px differs from 512 px in size and precision only.
    assert prints["v2", PLANS["teacher"]] == prints["v2-768", PLANS["teacher"]]
    assert len(set(prints.values())) == 12


def test_fingerprint_ignores_what_does_not_move_a_module() -> None:
    config = TEACHER_UNETS["v1"]
    changed = config | {"sample_size": 8, "_name_or_path": "x", "_diffusers_version": "0.1"}
    assert fingerprint(changed) == fingerprint(config)
    assert fingerprint(config | {"attention_head_dim": (8, 8, 8, 8)}) == fingerprint(config)


def test_fingerprint_of_a_config_equals_that_of_the_loaded_model() -> None:
    for key, plan in UNETS:
        config = student_config(TEACHER_UNETS[key], plan)
        assert fingerprint(on_meta(UNet2DConditionModel, **config).config) == fingerprint(config)


@pytest.mark.parametrize(
    "change",
    [
        {"cross_attention_dim": 1024},
        {"use_linear_projection": True},
        {"attention_head_dim": [5, 10, 20, 20]},
        {"block_out_channels": [320, 640, 1280, 1281]},
        {"mid_block_type": None},
        {"layers_per_block": 1},
        {"in_channels": 9},
    ],
    ids=str,
)
def test_fingerprint_sees_what_moves_a_module(change: dict[str, Any]) -> None:
    assert fingerprint(TEACHER_UNETS["v1"] | change) != fingerprint(TEACHER_UNETS["v1"])


def test_fingerprint_defaults_are_those_of_diffusers() -> None:
    signature = inspect.signature(UNet2DConditionModel.__init__).parameters
    for key, default in architecture.DEFAULTS.items():
        theirs = signature[key].default
        assert default == (list(theirs) if isinstance(theirs, tuple) else theirs), key
    assert len(architecture.DEFAULTS) == 21


@pytest.mark.parametrize(
    ("unet", "plan", "expected"),
    [
        ("v1", "base", "SD-v1 shape, base (579M)"),
        ("v2", "tiny", "SD-v2 shape, tiny (327M)"),
        ("pocket", "small", "pocket shape, small (2.8M)"),
    ],
)
def test_describe_names_the_registered_shape(unet: str, plan: str, expected: str) -> None:
    assert describe(student_config(TEACHER_UNETS[unet], PLANS[plan])) == expected


def test_describe_gives_the_numbers_of_another_shape() -> None:
    text = describe(TEACHER_UNETS["v1"] | {"cross_attention_dim": 5, "mid_block_type": None})
    assert "(320, 640, 1280, 1280)" in text and "no mid block" in text and "width 5" in text


@pytest.mark.parametrize("plan", PLANS.values(), ids=lambda plan: plan.name)
def test_a_plan_is_recognised_from_its_config(plan: Any) -> None:
    for teacher in TEACHER_UNETS.values():
        assert recognise_plan(student_config(teacher, plan)) is plan
    assert recognise_plan({"layers_per_block": 3}) is None


def test_json_lists_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert backbones_command.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == NAMES
    bk_tiny = next(row for row in rows if row["name"] == "bk-tiny")
    expected = {
        "unet_parameters": 323_384_964,
        "gmacs": 205.04,
        "teacher": "sd-v1-4",
        "source": "nota-ai/bk-sdm-tiny",
        "licence": "CreativeML OpenRAIL-M",
        "prediction_type": "epsilon",
        "resolution": 512,
    }
    assert {key: bk_tiny[key] for key in expected} == expected
    assert all(Path(row["local"]).is_dir() for row in rows if row["source"] == "embedded")


def test_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert backbones_command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()[: len(NAMES) + 1]
    column = lines[0].index("licence")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)
    assert [line.split()[0] for line in lines[1:]] == NAMES


def test_listing_never_loads_torch() -> None:
    code = (
        "import sys; from bksdm_tune.backbones_command import main; main(['--json']);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 17
