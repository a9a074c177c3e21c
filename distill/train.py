"""Run a distillation: loop, pictures of teacher and student side by side, delivery."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from bksdm_tune import architecture, precision, processes
from bksdm_tune.artifacts import locked, write_manifest
from bksdm_tune.contact_sheet import Row, contact_sheet
from bksdm_tune.loop import Event, LoopSettings, Tracker, fit
from bksdm_tune.memory import peak_memory_gb
from bksdm_tune.optim import EMA, make_all
from bksdm_tune.pipeline import Shot, assemble, draw, load_part
from bksdm_tune.pipeline_folder import copy_other_parts
from bksdm_tune.runs import claim
from distill.cache import LatentCache
from distill.card import card
from distill.job import KIND, Job
from distill.learner import Learner, build

PREVIEW_SEED = 0
LAST_STEPS = 100  # whose mean losses the card gives


def train(job: Job) -> bool:
    """Run or resume; False if the run was finished already.

    Raises:
        UsageError: another process or another run holds the folder.
        DataError: the loss is not finite, too many images are broken, another process ended.
    """
    if processes.rank():
        if processes.first_says(False):
            return False
        learn(job)
        return True
    with locked(job.folder):
        done = claim(job.folder, job.facts, job.config, KIND, job.config.training.steps)
        if processes.first_says(done):
            return False
        deliver(job, learn(job))
    return True


def learn(job: Job) -> Learner:
    training, output = job.config.training, job.config.output
    learner = build(job)
    optimiser, schedule, ema = make_all(training, learner.trainable.parameter_groups())
    events: tuple[Event, ...] = ()
    if output.preview_prompts:
        events = (Event(output.preview_every, previewer(job, learner, ema)),)
    settings = LoopSettings.of(training, output, job.device)
    fit(
        learner.objective, learner.trainable, learner.batches, optimiser, schedule, settings,
        job.folder, ema, events, job.folder.name, make_trackers(job),
    )  # fmt: skip
    return learner


def make_trackers(job: Job) -> tuple[Tracker, ...]:
    name = job.config.output.tracker
    if name == "none" or processes.rank():
        return ()
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    kind = TensorBoardTracker if name == "tensorboard" else WandBTracker
    where = {"logging_dir": job.folder / "tracker"} if name == "tensorboard" else {}
    tracker: Any = kind(job.folder.name, **where)
    tracker.start() if hasattr(tracker, "start") else None
    return (lambda step, values: tracker.log(values, step=step),)


def previewer(job: Job, learner: Learner, ema: EMA | None) -> Callable[[int], None]:
    """Draws teacher, student and averaged student at the same seeds, with models that are loaded.

    Every picture has its own generator, so drawing changes no later noise.
    """
    prompts = job.config.output.preview_prompts
    shots = [Shot(prompt, PREVIEW_SEED + i) for i, prompt in enumerate(prompts)]
    embeds = {text: learner.encoders.embeds([text]) for text in dict.fromkeys(("", *prompts))}
    scheduler = load_part(job.parts, "scheduler")

    def pictures(unet: Any) -> list[Image.Image]:
        pipe = assemble(unet, learner.encoders.vae, scheduler)
        training = unet.training
        unet.eval()
        with precision.autocast(job.config.training.precision, job.device):
            drawn = draw(pipe, shots, 4, job.resolution, "previews", embeds)
        unet.train(training)
        return drawn

    taught: list[Image.Image] = []

    def preview(step: int) -> None:
        path = job.folder / "samples" / f"step-{step:06d}.png"
        if path.exists():
            return
        if not taught:
            taught.extend(pictures(learner.teacher))
        rows = [
            Row("teacher", taught, tuple(prompts)),
            Row(f"student, step {step}", pictures(learner.student)),
        ]
        if ema is not None:
            with ema.swapped_in():
                rows.append(Row("student, averaged weights", pictures(learner.student)))
        path.parent.mkdir(exist_ok=True)
        contact_sheet(path, f"{job.parts.name} and its {job.config.models.size} student", rows)

    return preview


def learned(log: Path) -> dict[str, Any]:
    """Seconds of all steps, those before an interruption too; losses, mean of the last steps."""
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    last = lines[-LAST_STEPS:]
    names = lines[-1].keys() - {"step", "seconds", "lr"}
    return {
        "seconds": round(sum(line["seconds"] for line in lines), 2),
        "losses": {name: sum(line[name] for line in last) / len(last) for name in sorted(names)},
    }


def skipped(job: Job) -> int:
    """Rows that could not be used: broken pictures, empty captions."""
    if isinstance(job.data, LatentCache):
        return job.data.skipped
    lists = job.folder.glob("skipped*.jsonl")  # one a process
    return len({line for path in lists for line in path.read_text("utf-8").splitlines()})


def deliver(job: Job, learner: Learner) -> None:
    """A whole pipeline folder with the student in float32 and float16; the manifest last."""
    folder, student = job.folder, learner.student
    copy_other_parts(job.parts.root, folder)
    student.save_pretrained(folder / "unet", max_shard_size="100GB")
    config = dict(student.config)
    results = {
        "steps": job.config.training.steps,
        "pictures_a_step": job.facts["pictures a step"],
        "processes": processes.count(),
        "rows_skipped": skipped(job),
        "unet_parameters": student.num_parameters(),
        "shape": architecture.describe(config),
        **learned(job.folder / "log.jsonl"),
        "peak_memory_gb": round(peak_memory_gb(job.device), 3),
    }
    student.half().save_pretrained(folder / "unet", variant="fp16", max_shard_size="100GB")
    (folder / "README.md").write_text(card(job, results), "utf-8")
    plain = json.loads(json.dumps(asdict(job.config), default=str))
    parents = {
        "teacher": {"ref": job.parts.ref, "base": job.parts.base, **job.facts["teacher"]},
        "data": job.facts["data"],
    }
    write_manifest(folder, KIND, plain, parents, results)
