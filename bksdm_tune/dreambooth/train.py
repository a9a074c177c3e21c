"""Run a job: prior, caches, loop, pictures, card; the manifest last."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

from bksdm_tune import architecture
from bksdm_tune.artifacts import MANIFEST, folder_bytes, free_disk, locked, write_manifest
from bksdm_tune.dreambooth import pictures
from bksdm_tune.dreambooth.ahead import Noised
from bksdm_tune.dreambooth.card import card
from bksdm_tune.dreambooth.job import Job
from bksdm_tune.dreambooth.learner import Learner, build
from bksdm_tune.dreambooth.selection import Selection, read_selection, sitter_of
from bksdm_tune.errors import DataError
from bksdm_tune.evaluate.watch import watched
from bksdm_tune.loop import Event, LoopSettings, fit
from bksdm_tune.memory import peak_memory_gb
from bksdm_tune.optim import make_all
from bksdm_tune.pipeline_folder import copy_other_parts
from bksdm_tune.precision import choose
from bksdm_tune.resolve import unet_config
from bksdm_tune.runs import claim, look, seconds_before
from bksdm_tune.trainables import FullWeights, LoraWeights
from bksdm_tune.trial import finish_queued, step_seconds


def train(job: Job) -> bool:
    """Run or resume; False if the run was finished already.

    Raises:
        UsageError: another process or another run holds the folder.
        DataError: the loss is not finite.
    """
    with locked(job.folder):
        steps = job.config.training.steps
        assert steps is not None
        if claim(job.folder, job.facts, job.config, job.kind, steps):
            return False
        started = time.perf_counter() - seconds_before(job.folder)
        learner = load([job])
        optimise(job, learner)
        finish(job, learner, time.perf_counter() - started)
    return True


def load(jobs: list[Job]) -> Learner:
    """Models and data, with class images where the prior is made of them."""
    images = jobs[0].config.prior.prior == "images"
    prior = [pictures.class_images(job) if images else ([], []) for job in jobs]
    return build(jobs, prior, shown(jobs))


def shown(jobs: list[Job]) -> list[str]:
    texts = ["", *(shot.prompt for job in jobs for shot in pictures.preview_shots(job))]
    if jobs[0].config.output.score_every:
        texts += [order.shot.prompt for job in jobs for order in watched(sitter_of(job))]
    return texts


def optimise(job: Job, learner: Learner) -> None:
    training, output, steps = job.config.training, job.config.output, job.config.training.steps
    assert steps and output.checkpoint_every
    optimiser, schedule, ema = make_all(training, learner.trainable.parameter_groups())
    if isinstance(learner.trainable, LoraWeights):
        learner.trainable.store_apart(optimiser)
    selection = Selection(job, learner, ema) if output.score_every else None

    def preview(step: int) -> None:
        if step < steps:
            draw_preview(job, learner, step)

    events = [Event(output.preview_every, preview)]
    if selection is not None:
        events.append(Event(output.score_every, selection))

    fit(
        learner.objective,
        learner.trainable,
        learner.batches,
        optimiser,
        schedule,
        LoopSettings.of(training, output, job.device),
        job.folder,
        ema,
        tuple(events),
        title=job.folder.name,
        helper=learner.twin,
    )
    if selection is not None:
        selection.deliver()
    draw_preview(job, learner, steps)  # only now are the delivered weights in the models


def draw_preview(job: Job, learner: Learner, step: int) -> None:
    count = len(pictures.preview_shots(job))
    if (
        count == 0
        or step == 0
        and all(pictures.sample_path(job, 0, i).is_file() for i in range(count))
    ):
        return
    pictures.preview(job, step, learner.unet, learner.text_encoder, learner.embeds)


def finish(job: Job, learner: Learner, seconds: float, together: int = 1) -> None:
    """Write what diffusers loads, the pictures and the card; the manifest last.

    ``seconds``: this subject's share, where ``together`` subjects were trained at once.
    """
    folder = job.folder
    save_result(job, learner)
    trained = sum(p.numel() for g in learner.trainable.parameter_groups() for p in g["params"])
    config = unet_config(job.parts)
    results: dict[str, Any] = {
        "steps": job.config.training.steps,
        "run": job.key,
        "trigger": job.trigger,
        "shape": architecture.describe(config),
        "trained_parameters": trained,
        "seconds": round(seconds, 2),
        "trained_together": together,
        "selection": read_selection(job),
        "peak_memory_gb": round(peak_memory_gb(job.device) + learner.twins_memory_gb, 3),
    }
    pictures.write_contact_sheet(job)
    (folder / "README.md").write_text(card(job, results), "utf-8")
    backbone = {
        "ref": job.parts.ref,
        "base": job.parts.base,
        "name": job.parts.name,
        "architecture": architecture.fingerprint(config),
        **job.facts["backbone"],
    }
    parents = {
        "backbone": backbone,
        "photos": {photo.path.name: photo.sha256 for photo in job.photos.photos},
        "held_out": {photo.path.name: photo.sha256 for photo in job.held_out.photos},
        "photo_source": job.photo_source,
        "photo_folder": str(job.photos.folder.absolute()),
    }
    plain = json.loads(json.dumps(asdict(job.config), default=str))
    write_manifest(folder, job.kind, plain, parents, results)
    assert (folder / MANIFEST).is_file()


def save_result(job: Job, learner: Learner) -> None:
    if not isinstance(learner.trainable, FullWeights):
        learner.trainable.save(job.folder)
        return
    own = tuple(learner.trainable.parts())
    copy_other_parts(job.parts.root, job.folder, own)
    learner.trainable.save(job.folder)


def timed_batch(learner: Learner) -> tuple[list[Noised], float]:
    """A micro-batch, and what one costs in seconds, the forward of eps_0 shared out."""
    stream, window = learner.batches(0), learner.batches.window
    for _ in range(window):
        batch = next(stream)  # warms up
    finish_queued()
    started = time.perf_counter()
    batch = next(stream)  # the first of a window does the work for all of it
    finish_queued()
    return batch, (time.perf_counter() - started) / window


def dry_run(job: Job) -> str:
    """Load everything, take two real steps, and say time, memory and disk; leaves no run folder.

    The photos stand in for class images, which take long to draw and cost a step the same.

    Raises:
        UsageError: another process or another run holds the folder.
        DataError: the loss is not finite, or the disk is too small.
    """
    training, output = job.config.training, job.config.output
    assert training.steps
    look(job.folder, job.facts, "run", "another run")
    photos = job.photos.photos if job.config.prior.prior == "images" else ()
    stand_in = [p.path for p in photos], [p.sha256 for p in photos]
    learner = build([job], [stand_in], shown([job]))
    groups = learner.trainable.parameter_groups()
    optimiser, _, ema = make_all(training, groups)
    precision, (batch, loading) = choose(training.precision, job.device), timed_batch(learner)
    once = step_seconds(
        learner.objective, batch, optimiser, ema, precision, job.device, learner.twin
    )
    memory = peak_memory_gb(job.device) + learner.twins_memory_gb
    step = (once + loading) * training.accumulation
    weights = sum(p.numel() for g in groups for p in g["params"])
    copies = 3 + bool(training.ema)  # in a checkpoint, float32: weights, two moments, average
    disk = 4 * weights * (1 + copies * (output.keep + 1))  # one more while they rotate
    if not job.config.model.lora:
        disk += folder_bytes(job.parts.root)
    free = free_disk(job.folder)
    if disk > free:
        raise DataError(
            f"The run needs about {disk / 1e9:.2f} GB at {job.folder}; {free / 1e9:.2f} GB are "
            "free. Free some space, or choose another folder with --out."
        )
    return (
        f"Dry run: {step:.3f} s a step, {training.steps} steps in {step * training.steps / 60:.1f} "
        f"min (pictures come on top); peak memory {memory:.2f} GB; "
        f"{weights:,} parameters train; the run folder needs about {disk / 1e9:.2f} GB "
        f"({free / 1e9:.0f} GB are free). Nothing was written into {job.folder}."
    )
