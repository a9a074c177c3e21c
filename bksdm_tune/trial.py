"""One real training step, timed: what ``--dry-run`` measures."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import torch

from bksdm_tune.errors import DataError
from bksdm_tune.loop import Helper, Objective, differentiate
from bksdm_tune.optim import EMA


def finish_queued() -> None:
    """Wait for what a GPU was told to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_seconds(
    objective: Objective,
    batch: Any,
    optimiser: torch.optim.Optimizer,
    ema: EMA | None,
    precision: str,
    device: str,
    helper: Helper | None = None,
) -> float:
    """Seconds of the second of two steps, which the first has warmed up; a helper, if any, runs.

    Raises:
        DataError: the loss is not finite.
    """
    seconds = 0.0
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    with contextlib.nullcontext() if helper is None else helper.running(parameters, 0):
        for _ in range(2):
            started = time.perf_counter()
            loss = differentiate(objective, batch, precision, device, helper)["loss"]
            if not math.isfinite(value := loss.item()):
                raise DataError(f"The loss is {value} on the first step.")
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update()
            finish_queued()
            seconds = time.perf_counter() - started
    return seconds
