"""What a distillation would cost here: the largest batch that fits, time, memory and disk."""

from __future__ import annotations

import contextlib
import time

import psutil
import torch

from bksdm_tune import precision
from bksdm_tune.artifacts import free_disk
from bksdm_tune.errors import DataError
from bksdm_tune.memory import peak_memory_gb
from bksdm_tune.optim import make_optimiser
from distill.job import Job
from distill.learner import Learner, build

SHARE = 0.9  # of the free memory that a batch may need


def measure(job: Job) -> str:
    """Take real steps at batches 1, 2, 4, ... and say what a run would cost; nothing is kept.

    Raises:
        DataError: not even the loss of a first step is finite.
    """
    learner = build(job)
    latents, embeds = next(learner.batches(0))
    optimiser = make_optimiser(job.config.training.optimiser, learner.trainable.parameter_groups())
    batch, seconds = 0, 0.0
    size = 1
    while size <= 4096 and fits_next(job.device, batch, size):
        try:
            seconds = step(job, learner, optimiser, latents[:1], embeds[:1], size)
        except torch.OutOfMemoryError:
            break
        batch, size = size, size * 2
        if job.device == "cpu" and batch >= job.config.training.batch_size:
            break  # more gains nothing there and takes long to try
    return report(job, learner, batch, seconds)


def fits_next(device: str, batch: int, size: int) -> bool:
    """On a CPU memory is not refused but swapped, so stop before: the need grows with the batch."""
    if device != "cpu" or batch == 0:
        return True
    used = psutil.Process().memory_info().rss
    return used * size / batch < SHARE * (psutil.virtual_memory().available + used)


def step(
    job: Job,
    learner: Learner,
    optimiser: torch.optim.Optimizer,
    latents: torch.Tensor,
    embeds: torch.Tensor,
    size: int,
) -> float:
    """Seconds of the second of two steps."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with precision.autocast(job.config.training.precision, job.device):
            loss = learner.objective(
                (latents.expand(size, -1, -1, -1).clone(), embeds.expand(size, -1, -1))
            )["loss"]
        if not loss.isfinite():
            raise DataError(f"The loss is {loss.item()} on the first step.")
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with contextlib.suppress(RuntimeError, AssertionError):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return seconds


def report(job: Job, learner: Learner, batch: int, seconds: float) -> str:
    training = job.config.training
    rate = batch / seconds
    pictures = job.facts["pictures a step"] * training.steps
    weights = sum(p.numel() for p in learner.student.parameters())
    copies = 3 + bool(training.ema)  # weights, two moments, average
    disk = 4 * weights * copies * job.config.output.keep
    free = free_disk(job.folder)
    peak, hours = peak_memory_gb(job.device), pictures / rate / 3600
    return (
        f"Dry run: the largest batch tried that fits is {batch} ({seconds:.3f} s, {rate:.1f} "
        f"pictures/s, peak memory {peak:.2f} GB). {training.steps:,} steps of "
        f"{job.facts['pictures a step']} pictures would take {hours:.2f} h here; checkpoints need "
        f"about {disk / 1e9:.2f} GB ({free / 1e9:.0f} GB are free). Nothing was trained."
    )
