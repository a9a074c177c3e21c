"""Distillation step against the BK-SDM reference script: same models, pictures, batch, in one run.

    python scripts/benchmark_distill.py --reference BK-SDM-CHECKOUT --teacher DIR --data FOLDER \\
        [--size small] [--batch-size 16] [--steps 12] [--repeats 3] --out bench.json

Both sides run as their users run them: the reference's ``src/kd_train_text_to_image.py`` from the
image folder, ours from a latent cache made first (its time is reported beside).  A side's step time
is the difference between a run of ``1 + steps`` and a run of 1 step, so loading does not count; the
sides take turns, and the medians make the ratio.  Neither side draws validation pictures, both keep
an EMA, accumulate nothing and train in float32 on a CPU, fp16 (theirs) or bf16 (ours) on a GPU.
``unets_alone`` is the limit at equal arithmetic: the teacher's forward, the student's forward and
backward, on one batch already in memory, nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bksdm_tune.artifacts import versions
from bksdm_tune.memory import peak_memory_gb
from bksdm_tune.pipeline import load_part
from bksdm_tune.precision import autocast, choose, frozen_dtype
from bksdm_tune.resolve import resolve, unet_config
from bksdm_tune.unet_configs import PLANS, student_config
from distill.surgery import inherit

ROOT = Path(__file__).resolve().parent.parent


def timed(command: list[str], folder: Path) -> float:
    """Seconds of a command; it must succeed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return time.perf_counter() - started


def runnable(checkout: Path, scratch: Path) -> Path:
    """The reference's script from a copy of its ``src``, with what accelerate now refuses mended.

    ``logging_dir`` went from ``Accelerator`` into its project configuration, and a tracker that is
    not there (wandb, never used) is an error.
    """
    source = shutil.copytree(checkout / "src", scratch / "src", dirs_exist_ok=True)
    script = source / "kd_train_text_to_image.py"
    text = script.read_text()
    mended = text.replace("        logging_dir=logging_dir,\n", "").replace(
        "ProjectConfiguration(total", "ProjectConfiguration(logging_dir=logging_dir, total"
    )
    mended = mended.replace('wandb_tracker = accelerator.get_tracker("wandb")', "")
    script.write_text(mended)
    return script


def reference(options: Any, scratch: Path, teacher: Path, steps: int) -> list[str]:
    configs = scratch / "unet_config" / f"bk_{options.size}"
    configs.mkdir(parents=True, exist_ok=True)
    config = student_config(unet_config(resolve(str(teacher))), PLANS[options.size])
    config["_class_name"] = "UNet2DConditionModel"
    (configs / "config.json").write_text(json.dumps(config))
    return [
        sys.executable, str(runnable(options.reference, scratch)),
        "--pretrained_model_name_or_path", str(teacher), "--train_data_dir", str(options.data),
        "--use_ema", "--resolution", str(options.resolution), "--center_crop", "--random_flip",
        "--train_batch_size", str(options.batch_size), "--gradient_accumulation_steps", "1",
        "--learning_rate", "5e-05", "--max_grad_norm", "1", "--lr_scheduler", "constant",
        "--max_train_steps", str(steps), "--seed", "1234", "--report_to", "tensorboard",
        "--checkpointing_steps", "1000000", "--valid_steps", "1000000",
        "--lambda_sd", "1.0", "--lambda_kd_output", "1.0", "--lambda_kd_feat", "1.0",
        "--use_copy_weight_from_teacher", "--unet_config_path", str(scratch / "unet_config"),
        "--unet_config_name", f"bk_{options.size}", "--output_dir", str(scratch / "reference"),
        *(["--mixed_precision", "fp16"] if torch.cuda.is_available() else []),
    ]  # fmt: skip


def ours(options: Any, scratch: Path, teacher: Path, steps: int) -> list[str]:
    return [
        sys.executable, "-m", "bksdm_tune", "distill", "--size", options.size,
        "--teacher", str(teacher), "--data", str(scratch / "cache"), "--out", str(scratch / "ours"),
        "--batch-size", str(options.batch_size), "--accumulation", "1", "--steps", str(steps),
        "--checkpoint-every", "1000000",
    ]  # fmt: skip


def step_seconds(make: Any, options: Any, scratch: Path, teacher: Path) -> float:
    seconds = []
    for steps in (1, 1 + options.steps):
        for name in ("ours", "reference"):
            shutil.rmtree(scratch / name, ignore_errors=True)
        seconds.append(timed(make(options, scratch, teacher, steps), scratch))
    return (seconds[1] - seconds[0]) / options.steps


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Unets:
    """The arithmetic that both sides share, as ours runs it: one batch, in memory."""

    def __init__(self, options: Any, teacher: Path) -> None:
        self.teacher = load_part(resolve(str(teacher)), "unet").to(device()).requires_grad_(False)
        self.student = inherit(self.teacher, PLANS[options.size]).to(device()).train()
        self.teacher.to(frozen_dtype("auto", device()))
        for unet in (self.teacher, self.student):
            unet.to(memory_format=torch.channels_last)
        size, config = options.batch_size, self.teacher.config
        side, width = config["sample_size"], config["cross_attention_dim"]
        noisy = torch.randn(size, config["in_channels"], side, side, device=device())
        timesteps = torch.randint(0, 1000, (size,), device=device())
        embeds = torch.randn(size, options.tokens, width, device=device())
        self.inputs = (noisy, timesteps, embeds)

    def step(self) -> None:
        with autocast("auto", device()):
            with torch.no_grad():
                wanted = self.teacher(*self.inputs).sample
            loss = (self.student(*self.inputs).sample - wanted).square().mean()
        loss.backward()
        self.student.zero_grad(set_to_none=True)

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.step()
        return int(counter.get_total_flops())


def median_seconds(work: Callable[[], Any], rounds: int = 8) -> float:
    seconds = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def matrix_rate() -> float:
    """FLOP/s of a square matrix product in the precision that training computes in."""
    side, precision = (2048, "no") if device() == "cpu" else (8192, choose("auto", device()))
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    left, right = torch.randn(2, side, side, device=device(), dtype=dtype)
    return 2 * side**3 / median_seconds(lambda: left @ right)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=("base", "small", "tiny"), default="small")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="the tokenizer's maximum length")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.data, options.reference = options.data.resolve(), options.reference.resolve()
    teacher = resolve(options.teacher).root
    unets = Unets(options, teacher)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        cache = [sys.executable, "-m", "bksdm_tune", "cache", "--teacher", str(teacher)]
        where = ["--data", str(options.data), "--out", str(scratch / "cache"), "--embeds"]
        cached = timed([*cache, *where, "--resolution", str(options.resolution)], scratch)
        turns = [
            {
                "ours": step_seconds(ours, options, scratch, teacher),
                "reference": step_seconds(reference, options, scratch, teacher),
                "unets_alone": median_seconds(unets.step),
            }
            for _ in range(options.repeats)
        ]
    medians = {side: statistics.median(turn[side] for turn in turns) for side in turns[0]}
    report = {
        "command": " ".join(["python", *sys.argv]),
        "seconds_a_step": medians,
        "turns": turns,
        "unets_alone_over_ours": medians["unets_alone"] / medians["ours"],
        "samples_a_second": options.batch_size / medians["ours"],
        "peak_memory_gb_of_the_unets": peak_memory_gb(device()),
        "share_of_matrix_rate": unets.flops() / medians["ours"] / matrix_rate(),
        "reference_over_ours": medians["reference"] / medians["ours"],
        "cache_seconds_once": cached,
        "batch_size": options.batch_size,
        "size": options.size,
        "device": torch.cuda.get_device_name() if device() == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
