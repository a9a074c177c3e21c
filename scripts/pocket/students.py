"""Stage ``students``: base, small and tiny by surgery on the teacher and distillation from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from bksdm_tune.diffusion import Noising, training_scheduler
from bksdm_tune.unet_configs import PLANS, TEACHER_UNETS, student_config
from distill.objective import Distillation
from distill.surgery import feature_pairs, inherit
from scripts.pocket import unet
from scripts.pocket.common import restore, train

SIZES = ("base", "small", "tiny")
STEPS = 1_500


def run(work: Path) -> None:
    noising = Noising(training_scheduler(dict(unet.scheduler().config)))
    token_batches = unet.caption_batches(work, 13)
    for size in SIZES:
        teacher, text_encoder = unet.load(work)
        student = inherit(teacher, PLANS[size]).train()
        student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        pairs = feature_pairs(TEACHER_UNETS["pocket"], PLANS[size])
        objective = Distillation(student, teacher, noising, pairs)

        def batches(start: int, encoder: Any = text_encoder) -> Iterator[Any]:
            for images, tokens in token_batches(start):
                with torch.no_grad():
                    embeds = encoder(tokens)[0]
                yield images, embeds  # outside, or the loop would run without gradients

        train(
            work / f"student-{size}", objective, {"unet": student}, batches, STEPS, 5e-4,
            ema_decay=0.99,
        )  # fmt: skip


def load(work: Path, size: str) -> UNet2DConditionModel:
    student = UNet2DConditionModel(**student_config(TEACHER_UNETS["pocket"], PLANS[size]))
    restore(work / f"student-{size}", {"unet": student})
    return student.eval()
