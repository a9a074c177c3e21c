"""One process of a distillation on random latents in float64: ``ranks.py RANK WORLD FILE OUT BATCH
[DIE_AT]``.  The processes meet at a file; nothing touches the network beyond this machine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, distributed

from bksdm_tune import processes
from bksdm_tune.cli import complain
from bksdm_tune.diffusion import Noising, training_scheduler
from bksdm_tune.errors import DataError
from bksdm_tune.loop import LoopSettings, fit, shuffled
from bksdm_tune.optim import EMA, make_optimiser, make_schedule
from bksdm_tune.trainables import FullWeights
from bksdm_tune.unet_configs import PLANS
from distill.objective import Distillation
from distill.surgery import feature_pairs, inherit
from tiny import make_scheduler, make_unet, unet_config

STEPS, PICTURES = 20, 10


def run(folder: Path, batch: int, die_at: int | None) -> None:
    teacher = make_unet().double()
    student = inherit(teacher, PLANS["tiny"]).train()
    torch.manual_seed(5)
    latents = torch.randn(PICTURES, 4, 8, 8, dtype=torch.float64)
    embeds = torch.randn(PICTURES, 5, 16, dtype=torch.float64)
    scheduler = training_scheduler(dict(make_scheduler("epsilon").config))
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    pairs = feature_pairs(unet_config(), PLANS["tiny"])
    objective = Distillation(student, teacher, Noising(scheduler, offset_noise=0.1), pairs)
    first = processes.rank() * batch

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = shuffled(PICTURES, batch * processes.count(), 1)(start)
        for number, chosen in enumerate(order, start):
            if die_at is not None and processes.rank() == 1 and number == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            mine = chosen[first : first + batch]
            yield latents[mine], embeds[mine]

    trainable = FullWeights(student, None, (1e-3, 1e-3))
    optimiser = make_optimiser("adamw", trainable.parameter_groups())
    schedule = make_schedule("constant", optimiser, 0, STEPS)
    average = EMA(list(student.parameters()), 0.9)
    settings = LoopSettings(STEPS, accumulation=2, seed=3, checkpoint_every=8)
    fit(objective, trainable, batches, optimiser, schedule, settings, folder, average)


def main() -> int:
    rank, world, meeting, out, batch, *die_at = sys.argv[1:]
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    if int(world) > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(world)
        )
    folder = Path(out)
    folder.mkdir(exist_ok=True)
    try:
        run(folder, int(batch), int(die_at[0]) if die_at else None)
    except DataError as error:
        return complain(str(error), error.exit_code)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may wait for a peer that has gone
