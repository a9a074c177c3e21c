"""Which step of a run is delivered: scores on the way, the best kept, and when it is enough."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bksdm_tune.artifacts import atomic_folder, write_text_atomic
from bksdm_tune.checkpoints import list_checkpoints
from bksdm_tune.dreambooth import pictures
from bksdm_tune.dreambooth.job import Job, subject_name
from bksdm_tune.dreambooth.learner import Learner
from bksdm_tune.evaluate.drawing import Sitter
from bksdm_tune.evaluate.protocols import load_judges
from bksdm_tune.evaluate.report import write_curve
from bksdm_tune.evaluate.watch import ON_THE_WAY, Point, Watch, check_protocol, curve, read_points
from bksdm_tune.optim import EMA

CURVE = "scores.png"
SCORED = "checkpoint-scored-"


def sitter_of(job: Job) -> Sitter:
    """The subject with the photos it is held against: those held out, if any."""
    photos = job.held_out if job.held_out.photos else job.photos
    return Sitter(subject_name(job.config), job.class_noun, job.config.prompts.identifier, photos)


class Selection:
    """An event of the loop: draws the grid, scores it, notes it, keeps the weights that may yet
    be the best."""

    def __init__(self, job: Job, learner: Learner, ema: EMA | None) -> None:
        self.job, self.learner, self.ema = job, learner, ema
        judges = load_judges(None, None, None, job.device)
        self.watch = Watch(judges, sitter_of(job), job.device)
        self.points = read_points(job.folder / ON_THE_WAY)
        check_protocol(self.points, judges)

    def __call__(self, step: int) -> bool:
        output = self.job.config.output
        if step and all(point.step != step for point in self.points):
            averaged = contextlib.nullcontext() if self.ema is None else self.ema.swapped_in()
            with averaged:
                self.note(step)
        chosen = best([point for point in self.points if point.step <= step])
        since = [p for p in self.points if chosen and chosen.step < p.step <= step]
        return bool(output.patience) and len(since) >= output.patience

    def note(self, step: int) -> None:
        shots = [order.shot for order in self.watch.listed]
        unet, text, embeds = self.learner.unet, self.learner.text_encoder, self.learner.embeds
        drawn = pictures.draw_now(self.job, shots, unet, text, embeds, f"scoring step {step}")
        point = self.watch.score(step, drawn)
        if self.job.config.output.keep_best:
            shutil.rmtree(self.kept(point), ignore_errors=True)
            with atomic_folder(self.kept(point)) as scratch:
                self.learner.trainable.save(scratch)
        self.points.append(point)
        hopeful = front(self.points)
        self.forget([p for p in self.points if p not in hopeful])
        lines = "".join(json.dumps(asdict(point)) + "\n" for point in self.points)
        write_text_atomic(self.job.folder / ON_THE_WAY, lines)

    def deliver(self) -> None:
        """The best weights into the models, no others kept; the curve beside the card."""
        chosen = best(self.points)
        if self.job.config.output.keep_best and chosen is not None:
            self.learner.trainable.load(self.kept(chosen))
            self.forget([point for point in self.points if point is not chosen])
        write_curve(self.job.folder / CURVE, curve(self.points))

    def kept(self, point: Point) -> Path:
        return self.job.folder / f"{SCORED}{point.step}"

    def forget(self, points: list[Point]) -> None:
        for point in points:
            shutil.rmtree(self.kept(point), ignore_errors=True)


def best(points: list[Point]) -> Point | None:
    """The point most like the photos of those whose CLIP-T is not below the newest one's 95 %
    interval: fidelity gained over training to the end, without losing the words."""
    if not points:
        return None
    least = points[-1].clip_t_ci95[0]
    return max((p for p in points if p.clip_t >= least), key=lambda p: (p.dino, p.clip_t))


def front(points: list[Point]) -> list[Point]:
    """Those that no other equals in both and betters in one; a later best is new or among them."""
    return [
        p
        for p in points
        if not any(
            q.dino >= p.dino and q.clip_t >= p.clip_t and (q.dino, q.clip_t) != (p.dino, p.clip_t)
            for q in points
        )
    ]


def read_selection(job: Job) -> dict[str, Any] | None:
    """For the manifest: what was scored, what is delivered."""
    points = read_points(job.folder / ON_THE_WAY)
    chosen = best(points)
    if chosen is None:
        return None
    kept = chosen.step if job.config.output.keep_best else points[-1].step
    return {
        "scored": [point.step for point in points],
        "best": chosen.step,
        "delivered": kept,
        "taken": last_step(job),
    }


def last_step(job: Job) -> int:
    """Optimiser steps taken, fewer than asked for where --patience ended it."""
    return max((step for step, _ in list_checkpoints(job.folder)), default=0)
