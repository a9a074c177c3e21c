"""The Objective protocol and ``fit``: the only training loop.

Randomness is a function of (seed, step, micro-batch): the global generator is seeded before every
micro-batch, so a resumed run, or one with other preview and checkpoint intervals, sees the same
noise.  The data position is a function of the step too.  Of several processes each takes its share
of the same batch and noise (processes.py); the first one writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from bksdm_tune import processes
from bksdm_tune.checkpoints import (
    STATE_FILE,
    drop_unfinished,
    list_checkpoints,
    load_tree,
    save_checkpoint,
)
from bksdm_tune.errors import DataError
from bksdm_tune.memory import keep_freed_pages
from bksdm_tune.optim import EMA, align_state
from bksdm_tune.precision import at_least_single, autocast, choose
from bksdm_tune.seeds import reseed, seed_for

Losses = dict[str, torch.Tensor]
Batches = Callable[[int], Iterator[Any]]
Tracker = Callable[[int, dict[str, float]], None]
Clip = Callable[[list[torch.nn.Parameter], float], torch.Tensor]
"""Scales gradients in place to a norm of at most so much; gives the norm before."""


class Objective(Protocol):
    """Maps a batch to named scalar losses, one of them ``"loss"``, which is minimised."""

    def __call__(self, batch: Any) -> Losses: ...


class Trainable(Protocol):
    """What trains, and how it is stored."""

    def parameter_groups(self) -> list[dict[str, Any]]: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Helper(Protocol):
    """Computes a share of every micro-batch beside the loop, which computes the rest
    (bksdm_tune.twin)."""

    def running(
        self, parameters: list[torch.Tensor], first: int
    ) -> contextlib.AbstractContextManager[None]: ...

    def resting(self) -> contextlib.AbstractContextManager[None]: ...

    def go(self) -> None: ...

    def join(self, losses: Losses) -> Losses:
        """Add the share's gradients to the parameters', its losses to these."""
        ...


@dataclass(frozen=True)
class Event:
    """Something done at step 0, every ``every`` steps, and at the end.  Never changes training, but
    may say that it was long enough."""

    every: int
    run: Callable[[int], object]
    """Given the step; True: enough."""

    def due(self, step: int, last: bool) -> bool:
        return last or step == 0 or (self.every > 0 and step % self.every == 0)


@dataclass(frozen=True)
class LoopSettings:
    """``steps`` optimiser steps of ``accumulation`` micro-batches each."""

    steps: int
    accumulation: int = 1
    max_grad_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 500
    keep: int | None = 1
    precision: str = "no"  # no, bf16, fp16
    device: str = "cpu"

    @staticmethod
    def of(training: Any, output: Any, device: str) -> LoopSettings:
        """As the training and output flags of a verb ask for it."""
        return LoopSettings(
            steps=training.steps,
            accumulation=training.accumulation,
            max_grad_norm=training.max_grad_norm,
            seed=training.seed,
            checkpoint_every=output.checkpoint_every,
            keep=output.keep,
            precision=choose(training.precision, device),
            device=device,
        )


def shuffled(size: int, batch_size: int, seed: int) -> Batches:
    """Index batches over ``range(size)``: every epoch its own permutation, resumable anywhere."""

    def batches(start: int) -> Iterator[np.ndarray]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        position = start * batch_size
        while True:
            batch = []
            for _ in range(batch_size):
                if position // size != epoch:
                    epoch = position // size
                    order = np.random.default_rng((seed, epoch)).permutation(size)
                batch.append(order[position % size])
                position += 1
            yield np.array(batch)

    return batches


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield ``interrupted()``; a first Ctrl-C or SIGTERM only sets it, a second one strikes."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: Any) -> None:
        seen.append(number)
        for s, handler in previous.items():
            signal.signal(s, handler)

    for s in previous:
        signal.signal(s, note)
    try:
        yield lambda: bool(seen)
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


class Log:
    """``log.jsonl``: one line a step, by the first process; on resume, lines past the checkpoint
    are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        if processes.rank():
            path = Path(os.devnull)
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        self.file = open(path, "a" if path.is_char_device() else "w", buffering=1)  # noqa: SIM115
        self.file.writelines(line + "\n" for line in kept)

    def write(self, **facts: Any) -> None:
        self.file.write(json.dumps(facts) + "\n")


def differentiate(
    objective: Objective,
    batch: Any,
    precision: str,
    device: str,
    helper: Helper | None = None,
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
) -> Losses:
    """Losses of a micro-batch; the gradients of ``scale(loss)`` are added to the parameters'."""
    if helper is not None:
        helper.go()
    with autocast(precision, device):
        losses = objective(batch)
    scale(losses["loss"]).backward()
    return losses if helper is None else helper.join(losses)


def fit(
    objective: Objective,
    trainable: Trainable,
    batches: Batches,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    settings: LoopSettings,
    folder: Path,
    ema: EMA | None = None,
    events: tuple[Event, ...] = (),
    title: str = "training",
    trackers: tuple[Tracker, ...] = (),
    clip: Clip = torch.nn.utils.clip_grad_norm_,
    helper: Helper | None = None,
) -> None:
    """Train until ``settings.steps``, resuming from the newest checkpoint in ``folder``.

    ``batches(i)`` iterates over this process's micro-batches from number ``i`` on; gradients and
    losses are averaged over the processes once a step.  The last state is always checkpointed.
    An event may end it earlier (of one process).
    After the last step the EMA, if any, is copied into the parameters.  ``trackers`` get the step
    and what is logged, in the first process.

    Raises:
        DataError: a loss or gradient is not finite (fp16's scaler skips the latter's step); the
            last checkpoint stays.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the state of the current step was saved first.
    """
    keep_freed_pages()
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(
        settings.device.split(":")[0], enabled=settings.precision == "fp16"
    )
    stateful: dict[str, Any] = {"optimiser": optimiser, "schedule": schedule, "scaler": scaler}
    if ema is not None:
        stateful["ema"] = ema
    step = 0
    if found := list_checkpoints(folder):
        step, path = found[-1]
        trainable.load(path)
        state = load_tree(path / STATE_FILE)
        for name, part in stateful.items():
            part.load_state_dict(state[name])
        align_state(optimiser)

    assert step <= settings.steps, f"{folder} is past step {settings.steps}"

    def checkpoint() -> None:
        if processes.rank() == 0:
            state = {name: part.state_dict() for name, part in stateful.items()}
            save_checkpoint(folder, step, state, trainable.save, settings.keep)
        processes.wait()

    if processes.rank() == 0:
        drop_unfinished(folder)
    first, stream, stop = step, batches(step * settings.accumulation), 0.0
    log = Log(folder / "log.jsonl", step)
    quiet = True if processes.rank() else None  # None: quiet where there is no terminal
    bar = tqdm(total=settings.steps, initial=step, desc=title, unit="step", disable=quiet)
    help_: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if helper is not None:
        help_ = helper.running(parameters, first * settings.accumulation)
    with deferred_interrupt() as interrupted, contextlib.closing(log.file), bar, help_:
        while True:
            last = step == settings.steps
            if step > first and (last or stop or step % settings.checkpoint_every == 0):
                checkpoint()
            if stop:
                raise KeyboardInterrupt
            enough = False
            for event in events:
                if processes.rank() == 0 and event.due(step, last):
                    with helper.resting() if helper is not None else contextlib.nullcontext():
                        enough |= event.run(step) is True
            if enough and not last:
                checkpoint()
            if enough or last:
                break

            started, totals = time.perf_counter(), dict[str, torch.Tensor]()
            for micro in range(settings.accumulation):
                batch = next(stream)  # before seeding: a loader may draw numbers of its own
                reseed(seed_for(settings.seed, step, micro))
                losses = differentiate(
                    objective, batch, settings.precision, settings.device, helper,
                    lambda loss: scaler.scale(loss / settings.accumulation),
                )  # fmt: skip
                for name, value in losses.items():
                    share = at_least_single(value.detach()) / settings.accumulation
                    totals[name] = totals[name] + share if name in totals else share
            processes.average_gradients(parameters)
            scaler.unscale_(optimiser)
            norm = clip(parameters, settings.max_grad_norm)
            asked = norm.new_tensor(float(interrupted()))
            facts = processes.mean(torch.stack([*totals.values(), norm, asked]))
            *values, length, stop = facts.tolist()  # the only wait for the device in a step
            numbers = dict(zip(totals, values, strict=True))
            if not (
                math.isfinite(numbers["loss"]) and (scaler.is_enabled() or math.isfinite(length))
            ):
                checkpoint()
                raise DataError(
                    f"The loss became {numbers['loss']} and its gradient's norm {length} at step "
                    f"{step + 1}; training stopped before that step, and the last good state is "
                    f"kept in {folder / f'checkpoint-{step}'}. Try a lower learning rate in "
                    "another folder."
                )
            scaler.step(optimiser)
            scaler.update()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update()
            step += 1
            seconds = time.perf_counter() - started
            rate = schedule.get_last_lr()[0]
            log.write(step=step, seconds=round(seconds, 4), lr=rate, **numbers)
            for tracker in trackers if processes.rank() == 0 else ():
                tracker(step, numbers | {"lr": rate})
            bar.update()
            bar.set_postfix({k: f"{v:.4g}" for k, v in numbers.items()}, refresh=False)
    if ema is not None:
        ema.copy_to_parameters()
