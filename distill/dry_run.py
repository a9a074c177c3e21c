"""What a distillation would cost here: the largest batch that fits, time, memory and disk."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from bksdm_tune import processes
from bksdm_tune.artifacts import folder_bytes, free_disk
from bksdm_tune.errors import DataError
from bksdm_tune.memory import forget_peak, peak_memory_gb
from bksdm_tune.optim import make_all
from bksdm_tune.precision import choose
from bksdm_tune.runs import look
from bksdm_tune.trial import step_seconds
from distill.job import Job
from distill.learner import Learner, build

SHARE = 0.9  # of the free memory that a batch may need
LARGEST = 4096


def measure(job: Job) -> str:
    """Take real steps at growing batches and say what a run would cost; nothing is kept.

    Raises:
        DataError: not even a batch of 1 fits, or the loss of a first step is not finite.
    """
    look(job.folder, job.facts, "run", "another run")
    with tempfile.TemporaryDirectory() as scratch:
        elsewhere = replace(job.config.output, out=Path(scratch))  # for what reading data lists
        learner = build(replace(job, config=replace(job.config, output=elsewhere)))
        batches = learner.batches(0)
        latents, embeds = next(batches)  # workers start, models warm up
        started = time.perf_counter()
        for _ in range(2):
            latents, embeds = next(batches)
        reading = (time.perf_counter() - started) / (2 * len(latents))
    del batches
    training = job.config.training
    optimiser, _, ema = make_all(training, learner.trainable.parameter_groups())

    def step(size: int) -> float:
        batch = (latents[:1].expand(size, -1, -1, -1).clone(), embeds[:1].expand(size, -1, -1))
        precision = choose(training.precision, job.device)
        return step_seconds(learner.objective, batch, optimiser, ema, precision, job.device)

    # on a CPU more than was asked for gains nothing and takes long to try
    limit = training.batch_size if job.device == "cpu" else LARGEST
    peaks: dict[int, float] = {}
    batch = largest(lambda size: fits(job.device, size, step, peaks), limit)
    if not batch:
        raise DataError(
            "Not even a batch of 1 fits into memory. Try --gradient-checkpointing, "
            "--mixed-precision bf16, a smaller --resolution or --optimiser adafactor."
        )
    used = min(batch, training.batch_size)
    seconds = step(used) + reading * used
    return report(job, learner, batch, peaks[batch], used, seconds, reading)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest size up to ``limit`` that fits, to an eighth of it; 0 if not even 1 does."""
    low, high, size = 0, limit + 1, 1
    while high - low > max(1, low // 8):
        if fits(size):
            low = size
        else:
            high = size
        size = min(2 * low, limit) if high > limit else (low + high) // 2
    return low


def fits(device: str, size: int, step: Callable[[int], float], peaks: dict[int, float]) -> bool:
    """Whether a step of ``size`` can be taken; notes its peak memory in GB.

    On a CPU memory is not refused but swapped, so there the need is foreseen: it grows with the
    batch.
    """
    if device == "cpu" and peaks:
        before = max(peaks)
        used = psutil.Process().memory_info().rss
        if used * size / before > SHARE * (psutil.virtual_memory().available + used):
            return False
    forget_peak(device)
    try:
        step(size)
    except torch.OutOfMemoryError:
        return False
    peaks[size] = peak_memory_gb(device)
    return True


def report(
    job: Job, learner: Learner, batch: int, peak: float, used: int, seconds: float, reading: float
) -> str:
    """``seconds``: a micro-batch of ``used`` pictures; ``reading``: a picture's share before the
    U-Nets."""
    training, together = job.config.training, processes.count()
    rate = used * together / seconds
    pictures = job.facts["pictures a step"] * training.steps
    weights = sum(p.numel() for p in learner.student.parameters())
    copies = 3 + bool(training.ema)  # weights, two moments, average
    kept = job.config.output.keep + 1  # one more while they rotate
    disk = 4 * weights * copies * kept + 6 * weights + folder_bytes(job.parts.root)
    free = free_disk(job.folder)
    return (
        f"Dry run: the largest batch tried that fits is {batch} (peak memory {peak:.2f} GB). "
        f"At {used}, {seconds:.3f} s, of which {reading * used:.3f} s decoding and encoding, "
        f"{rate:.1f} pictures/s in {together} process(es), averaging gradients not counted: "
        f"{training.steps:,} steps of {job.facts['pictures a step']} pictures would take "
        f"{pictures / rate / 3600:.2f} h here; the run folder needs about {disk / 1e9:.2f} GB "
        f"({free / 1e9:.0f} GB are free). Nothing was trained."
    )
