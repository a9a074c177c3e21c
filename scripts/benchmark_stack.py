"""Subjects trained together against one by one: seconds a step and subjects an hour, in one run.

    python scripts/benchmark_stack.py --out bench.json [--backbone pocket-base] \\
        [--sizes 1 5 10 30] [--steps 20] [--repeats 3]

The default LoRA recipe of the backbone; models and data are loaded before the clock starts, nothing
is drawn.  Sizes take turns; the medians make the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bksdm_tune.artifacts import versions
from bksdm_tune.device import best_device
from bksdm_tune.dreambooth.config import Config, Model, Output, Who
from bksdm_tune.dreambooth.job import Job, prepare
from bksdm_tune.dreambooth.train import load
from bksdm_tune.optim import make_all
from bksdm_tune.precision import autocast
from bksdm_tune.stacked import clip_each
from subjects.catalogue import SUBJECTS


def jobs(backbone: str, count: int) -> list[Job]:
    names = list(SUBJECTS)[:count]
    output = Output(Path("unused"), preview_prompts=())
    return [
        prepare(Config(Who(name), Model(backbone, lora=True), output=output), best_device())
        for name in names
    ]


class Stepper:
    """A loaded training that takes steps as the loop does."""

    def __init__(self, backbone: str, count: int) -> None:
        members = jobs(backbone, count)
        self.training, self.device = members[0].config.training, members[0].device
        self.learner = load(members)
        groups = self.learner.trainable.parameter_groups()
        self.optimiser, self.schedule, _ = make_all(self.training, groups)
        self.parameters = [p for group in groups for p in group["params"]]
        self.stream = self.learner.batches(0)
        self.clip = clip_each if count > 1 else torch.nn.utils.clip_grad_norm_

    def step(self) -> float:
        started = time.perf_counter()
        with autocast(self.training.precision, self.device):
            losses = self.learner.objective(next(self.stream))
        losses["loss"].backward()
        self.clip(self.parameters, self.training.max_grad_norm)
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)
        losses["loss"].item()
        return time.perf_counter() - started


def measure(options: Any) -> dict[int, float]:
    """Size -> median seconds a step."""
    steppers = {size: Stepper(options.backbone, size) for size in options.sizes}
    seconds: dict[int, list[float]] = {size: [] for size in options.sizes}
    for stepper in steppers.values():
        stepper.step()
    for _ in range(options.repeats):
        for size, stepper in steppers.items():
            seconds[size] += [stepper.step() for _ in range(options.steps)]
    return {size: statistics.median(values) for size, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbone", default="pocket-base")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 5, 10, 30])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    total = jobs(options.backbone, 1)[0].config.training.steps
    assert total is not None
    medians = measure(options)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "backbone": options.backbone,
        "steps_a_subject": total,
        "seconds_a_step": medians,
        "milliseconds_a_step_and_subject": {n: 1000 * s / n for n, s in medians.items()},
        "subjects_an_hour": {n: 3600 * n / (s * total) for n, s in medians.items()},
        "ratio_to_one_by_one": {n: n * medians[min(medians)] / s for n, s in medians.items()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
