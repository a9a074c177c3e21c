"""Distillation step against the reference's script: same models, pictures, batch.

Both sides run as their users run them: the reference's ``src/kd_train_text_to_image.py`` from the
image folder, ours from a latent cache made first (its time is reported beside).  Neither side draws
validation pictures, both keep an EMA, accumulate nothing and train in float32 on a CPU, fp16
(theirs) or bf16 (ours) on a GPU.  ``unets_alone`` is the limit at equal arithmetic: the teacher's
forward, the student's forward and backward, on one batch in memory, nothing else.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bksdm_tune.pipeline import load_part
from bksdm_tune.pipeline_folder import native_resolution
from bksdm_tune.precision import autocast, frozen_dtype
from bksdm_tune.resolve import Parts, unet_config
from bksdm_tune.unet_configs import PLANS, student_config
from distill.surgery import inherit
from scripts.benchmarks.common import (
    Facts,
    add_model,
    child,
    device,
    in_turns,
    median_seconds,
    medians,
    model,
    report_steps,
)
from scripts.benchmarks.reference import runnable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", type=Path, required=True, help="checkout of BK-SDM")
    add_model(parser, "--teacher", "pocket-teacher")
    parser.add_argument("--data", type=Path, required=True, help="image folder with captions")
    parser.add_argument("--size", choices=("base", "small", "tiny"), default="small")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=80)


def reference(options: Any, scratch: Path, teacher: Parts, steps: int) -> list[str]:
    configs = scratch / "unet_config" / f"bk_{options.size}"
    configs.mkdir(parents=True, exist_ok=True)
    config = student_config(unet_config(teacher), PLANS[options.size])
    config["_class_name"] = "UNet2DConditionModel"
    (configs / "config.json").write_text(json.dumps(config))
    return [
        str(runnable(options.reference.resolve(), "kd_train_text_to_image.py", scratch)),
        "--pretrained_model_name_or_path", str(teacher.root),
        "--train_data_dir", str(options.data.resolve()),
        "--use_ema", "--resolution", str(native_resolution(teacher)),
        "--center_crop", "--random_flip",
        "--train_batch_size", str(options.batch_size), "--gradient_accumulation_steps", "1",
        "--learning_rate", "5e-05", "--max_grad_norm", "1", "--lr_scheduler", "constant",
        "--max_train_steps", str(steps), "--seed", "1234", "--report_to", "tensorboard",
        "--checkpointing_steps", "1000000", "--valid_steps", "1000000",
        "--lambda_sd", "1.0", "--lambda_kd_output", "1.0", "--lambda_kd_feat", "1.0",
        "--use_copy_weight_from_teacher", "--unet_config_path", str(scratch / "unet_config"),
        "--unet_config_name", f"bk_{options.size}", "--output_dir", str(scratch / "reference"),
        *(["--mixed_precision", "fp16"] if torch.cuda.is_available() else []),
    ]  # fmt: skip


def ours(options: Any, scratch: Path, teacher: Parts, steps: int) -> list[str]:
    return [
        "-m", "bksdm_tune", "distill", "--size", options.size,
        "--teacher", str(teacher.root), "--data", str(scratch / "cache"),
        "--out", str(scratch / "ours"),
        "--batch-size", str(options.batch_size), "--accumulation", "1", "--steps", str(steps),
        "--checkpoint-every", "1000000",
    ]  # fmt: skip


def run(words: list[str], scratch: Path) -> Facts:
    for name in ("ours", "reference"):
        shutil.rmtree(scratch / name, ignore_errors=True)
    return child(words, scratch)


class Unets:
    """The arithmetic that both sides share, as ours runs it: one batch, in memory."""

    def __init__(self, options: Any, teacher: Parts) -> None:
        self.teacher = load_part(teacher, "unet").to(device()).requires_grad_(False)
        self.student = inherit(self.teacher, PLANS[options.size]).to(device()).train()
        self.teacher.to(frozen_dtype("auto", device()))
        for unet in (self.teacher, self.student):
            unet.to(memory_format=torch.channels_last)
        size, config = options.batch_size, self.teacher.config
        side, width = config["sample_size"], config["cross_attention_dim"]
        noisy = torch.randn(size, config["in_channels"], side, side, device=device())
        timesteps = torch.randint(0, 1000, (size,), device=device())
        tokens = load_part(teacher, "tokenizer").model_max_length
        embeds = torch.randn(size, tokens, width, device=device())
        self.inputs = (noisy, timesteps, embeds)

    def step(self) -> None:
        with autocast("auto", device()):
            with torch.no_grad():
                wanted = self.teacher(*self.inputs).sample
            loss = (self.student(*self.inputs).sample - wanted).square().mean()
        loss.backward()
        self.student.zero_grad(set_to_none=True)


def measure(options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        teacher = model(options, scratch)
        data = ["--data", str(options.data.resolve()), "--out", str(scratch / "cache"), "--embeds"]
        cache = ["-m", "bksdm_tune", "cache", "--teacher", str(teacher.root), *data]
        cache += ["--resolution", str(native_resolution(teacher))]
        commands = {
            "ours": ours(options, scratch, teacher, options.steps),
            "reference": reference(options, scratch, teacher, options.steps),
        }
        if options.dry_run:
            print(json.dumps({"first": cache} | commands, indent=1))
            return
        unets = Unets(options, teacher)
        cached = child(cache, scratch)["seconds"]
        sides: dict[str, Callable[[], Facts]] = {
            name: functools.partial(run, words, scratch) for name, words in commands.items()
        }
        sides["unets_alone"] = lambda: {"step_seconds": median_seconds(unets.step)}
        turns = in_turns(sides, options.repeats)
    rate = options.batch_size / medians(turns)["ours"]["step_seconds"]
    report_steps(options, turns, unets.step, samples_a_second=rate, cache_seconds_once=cached)
