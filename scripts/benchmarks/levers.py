"""What each lever of the DreamBooth step is worth: the step with all of them, and without one.

``as it is``            the default LoRA step of the backbone
``layer by layer``      each LoRA layer folds for itself, and has parameters of its own
``PEFT's forward``      LoRA layers as PEFT runs them
``side paths``          our forward, nothing folded
``eps_0 one by one``    no micro-batches ahead
``one process``         no twin for half of the rows; on a CPU
``contiguous``          the U-Net not channels last
``no prior``            a step without prior preservation, for comparison: less work

Models and data are loaded before the clock starts; every side takes its turn in one process.
``--full`` tunes all weights, where the LoRA's own do not apply.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext as nothing
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from bksdm_tune import adapted, adapters
from bksdm_tune.adapters import injected
from bksdm_tune.dreambooth.config import PriorPreservation
from bksdm_tune.folded import Folded
from bksdm_tune.memory import keep_freed_pages
from scripts.benchmarks.common import report
from scripts.benchmarks.stack import Stepper


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="pocket-base")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--steps", type=int, default=32, help="a turn")


def as_pefts(stepper: Stepper) -> None:
    for model in (stepper.learner.unet, stepper.learner.text_encoder):
        for layer in [] if model is None else injected(model):
            del layer.forward


def one_by_one(stepper: Stepper) -> None:
    change(stepper, window=1)


def contiguous(stepper: Stepper) -> None:
    stepper.learner.unet.to(memory_format=torch.contiguous_format)


def one_process(stepper: Stepper) -> None:
    stepper.learner = replace(stepper.learner, twin=None)
    change(stepper, share=(0, 1))


def change(stepper: Stepper, **parts: Any) -> None:
    learner, twin = stepper.learner, stepper.learner.twin
    if twin is not None:
        twin.batches = replace(twin.batches, **parts)
    stepper.learner = replace(learner, batches=replace(learner.batches, **parts))


def unchanged(_: Stepper) -> None:
    pass


def nothing_folded(model: Any) -> Folded:
    return Folded(model, [], adapters.ADAPTER_NAME)


def measure(options: Any) -> None:
    keep_freed_pages()
    lora = not options.full
    changes: dict[str, Callable[[Stepper], None]] = {"as it is": unchanged}
    if lora:
        changes |= {"layer by layer": unchanged, "PEFT's forward": as_pefts}
        changes |= {"side paths": unchanged}
    changes |= {"eps_0 one by one": one_by_one, "contiguous": contiguous}
    changes |= {"one process": one_process}
    steppers = {}
    for name, change_ in changes.items():
        folded = name not in ("layer by layer", "PEFT's forward", "side paths")
        with nothing() if folded else mock.patch.object(adapters, "fold_small", nothing_folded):
            steppers[name] = Stepper(options.backbone, 1, lora)
        change_(steppers[name])
    steppers["no prior"] = Stepper(options.backbone, 1, lora, PriorPreservation("none"))
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(options.repeats + 1):
        for name, stepper in steppers.items():
            fold = 0 if name == "side paths" else adapted.FOLD_UP_TO
            with mock.patch.object(adapted, "FOLD_UP_TO", fold):
                mean = stepper.turn(options.steps)
            if turn:  # the first warms up
                seconds[name].append(mean)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    report(
        options,
        {
            "seconds_a_step": middle,
            "over_as_it_is": {n: value / middle["as it is"] for n, value in middle.items()},
            "turns": seconds,
        },
    )
