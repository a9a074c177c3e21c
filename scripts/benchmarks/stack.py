"""Subjects trained together against one by one: seconds a step, subjects an hour.

The default LoRA recipe of the backbone; models and data are loaded before the clock starts, nothing
is drawn.  A step includes its share of what is made ahead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bksdm_tune.device import best_device
from bksdm_tune.dreambooth.config import Config, Model, Output, PriorPreservation, Who
from bksdm_tune.dreambooth.job import Job, prepare
from bksdm_tune.dreambooth.train import load
from bksdm_tune.loop import differentiate
from bksdm_tune.memory import keep_freed_pages
from bksdm_tune.optim import make_all
from bksdm_tune.stacked import clip_each
from scripts.benchmarks.common import add_model, model, report
from subjects.catalogue import SUBJECTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "--backbone", "pocket-base")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 5, 10, 30])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument(
        "--give-back", action="store_true", help="freed memory to the system, as by default"
    )


def jobs(
    backbone: str, count: int, lora: bool = True, prior: PriorPreservation | None = None
) -> list[Job]:
    names = list(SUBJECTS)[:count]
    output = Output(Path("unused"), preview_prompts=())
    return [
        prepare(
            Config(
                Who(name),
                Model(backbone, lora=lora),
                prior=prior or PriorPreservation(),
                output=output,
            ),
            best_device(),
        )
        for name in names
    ]


class Stepper:
    """A loaded training that takes steps as the loop does."""

    def __init__(
        self,
        backbone: str,
        count: int,
        lora: bool = True,
        prior: PriorPreservation | None = None,
    ) -> None:
        members = jobs(backbone, count, lora, prior)
        self.training, self.device = members[0].config.training, members[0].device
        self.learner = load(members)
        groups = self.learner.trainable.parameter_groups()
        self.optimiser, self.schedule, _ = make_all(self.training, groups)
        self.parameters = [p for group in groups for p in group["params"]]
        self.clip = clip_each if count > 1 else torch.nn.utils.clip_grad_norm_

    def turn(self, steps: int) -> float:
        """Mean seconds of a step, after a window that warms up."""
        stream, twin = self.learner.batches(0), self.learner.twin
        with twin.running(self.parameters, 0) if twin else contextlib.nullcontext():
            for _ in range(self.learner.batches.window):
                self.step(stream)
            return statistics.fmean(self.step(stream) for _ in range(steps))

    def step(self, stream: Iterator[Any]) -> float:
        started, twin, batch = time.perf_counter(), self.learner.twin, next(stream)
        precision, objective = self.training.precision, self.learner.objective
        losses = differentiate(objective, batch, precision, self.device, twin)
        self.clip(self.parameters, self.training.max_grad_norm)
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)
        losses["loss"].item()
        return time.perf_counter() - started


def seconds_a_step(options: Any, backbone: str) -> dict[int, float]:
    """Size -> seconds, the median over the turns of a turn's mean."""
    steppers = {size: Stepper(backbone, size) for size in options.sizes}
    seconds: dict[int, list[float]] = {size: [] for size in options.sizes}
    for _ in range(options.repeats):
        for size, stepper in steppers.items():
            seconds[size].append(stepper.turn(options.steps))
    return {size: statistics.median(values) for size, values in seconds.items()}


def measure(options: Any) -> None:
    if not options.give_back:
        keep_freed_pages()
    with tempfile.TemporaryDirectory() as folder:
        made = model(options, Path(folder))
        backbone = str(made.root) if options.full_size else options.model
        training = jobs(backbone, 1)[0].config.training
        if options.dry_run:
            recipe = {"sizes": options.sizes, "turns": options.repeats} | asdict(training)
            print(json.dumps(recipe, indent=1, default=str))
            return
        middle = seconds_a_step(options, backbone)
    total = training.steps
    assert total is not None
    smallest = min(middle)
    first = middle[smallest] / smallest
    report(
        options,
        {
            "steps_a_subject": total,
            "seconds_a_step": middle,
            "milliseconds_a_step_and_subject": {n: 1000 * s / n for n, s in middle.items()},
            "subjects_an_hour": {n: 3600 * n / (s * total) for n, s in middle.items()},
            "ratio_to_one_by_one": {n: n * first / s for n, s in middle.items()},
        },
    )
