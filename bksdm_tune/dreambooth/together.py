"""Many subjects in one training run, each with the result that it would have alone.

The adapters are stacked (bksdm_tune.stacked); one loop trains them all, and every subject is left
the run folder that ``bksdm-tune dreambooth`` would have left.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from bksdm_tune.artifacts import MANIFEST, locked
from bksdm_tune.dreambooth.job import Job
from bksdm_tune.dreambooth.learner import Learner
from bksdm_tune.dreambooth.train import draw_preview, finish, load
from bksdm_tune.errors import UsageError
from bksdm_tune.loop import Event, LoopSettings, fit
from bksdm_tune.lora.fit import provenance
from bksdm_tune.optim import make_all
from bksdm_tune.precision import choose
from bksdm_tune.runs import claim, occupy, seconds_before
from bksdm_tune.stacked import StackedWeights, clip_each
from bksdm_tune.trainables import LoraWeights


def train_together(jobs: list[Job], folder: Path) -> None:
    """Train what is not finished; ``folder`` holds log and checkpoints of the common loop.

    Raises:
        UsageError: the jobs differ in more than their subjects, or are no LoRA jobs.
        DataError: a loss is not finite.
    """
    check_alike(jobs)
    steps = jobs[0].config.training.steps
    assert steps is not None
    with locked(folder):
        occupy(folder, {"runs": [job.key for job in jobs]}, "stack", "other runs")
        if all(finished(job) for job in jobs):
            return
        started = time.perf_counter() - seconds_before(folder)
        learner = load(jobs)
        optimise(jobs, learner, folder)
        seconds = (time.perf_counter() - started) / len(jobs)
        for number, job in enumerate(jobs):
            if not finished(job):
                leave(job, number, learner, folder, seconds, len(jobs))
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)


def check_alike(jobs: list[Job]) -> None:
    first = jobs[0].config
    training, output = first.training, first.output
    if training.optimiser != "adamw" or choose(training.precision, jobs[0].device) == "fp16":
        raise UsageError(
            "Subjects are trained together with --optimiser adamw, not in fp16: other optimisers "
            "and fp16's common scale would make each depend on the others."
        )
    if output.score_every:
        raise UsageError("Subjects trained together are not scored on the way; score each run.")
    for job in jobs:
        config = job.config
        if not config.model.lora or config.lora.dropout:
            raise UsageError("Subjects are trained together as LoRAs without dropout.")
        same = replace(config, who=first.who, prompts=first.prompts, output=first.output)
        if same != first or job.parts != jobs[0].parts:
            raise UsageError("Subjects trained together need the same backbone and settings.")
        if len({(job.folder) for job in jobs}) < len(jobs):
            raise UsageError("Subjects trained together need a run folder each.")


def finished(job: Job) -> bool:
    return (job.folder / MANIFEST).is_file()


def optimise(jobs: list[Job], learner: Learner, folder: Path) -> None:
    training, output = jobs[0].config.training, jobs[0].config.output
    assert isinstance(learner.trainable, StackedWeights)
    optimiser, schedule, ema = make_all(training, learner.trainable.parameter_groups())

    def preview(step: int) -> None:
        if step < (training.steps or 0):
            for number, job in enumerate(jobs):
                with learner.trainable.stack.alone(number):  # type: ignore[union-attr]
                    draw_preview(job, learner, step)

    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        claim(job.folder, job.facts, job.config, job.kind, training.steps or 0)
    fit(
        learner.objective, learner.trainable, learner.batches, optimiser, schedule,
        LoopSettings.of(training, output, jobs[0].device), folder, ema,
        (Event(output.preview_every, preview),), title=f"{len(jobs)} subjects", clip=clip_each,
        helper=learner.twin,
    )  # fmt: skip


def leave(
    job: Job, number: int, learner: Learner, folder: Path, seconds: float, together: int
) -> None:
    """The run folder of one subject."""
    stacked = learner.trainable
    assert isinstance(stacked, StackedWeights)
    with stacked.stack.alone(number):
        own = LoraWeights(
            learner.unet,
            learner.text_encoder,
            stacked.learning_rates,
            provenance(job.parts, job.trigger, job.key),
        )
        mine = replace(learner, trainable=own)
        draw_preview(job, mine, job.config.training.steps or 0)
        shutil.copyfile(folder / "log.jsonl", job.folder / "log.jsonl")
        finish(job, mine, seconds, together)
