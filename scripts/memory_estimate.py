"""What ``--memory auto`` counts beside what a run takes on a CPU (Linux), at any size.

    python scripts/memory_estimate.py --photos DIR --class-noun dog --backbone FOLDER --lora [FLAGS]

The flags are those of ``bksdm-tune dreambooth``; full-size folders with random weights are made by
``scripts/full_size.py``.  Two steps in this process.  Taken, beyond what the libraries hold before:
memory that the system cannot take back, and the weights read from their file; not the pages of that
file whose weights lie in memory once more, in another layout, which resident memory counts too.
"""

from __future__ import annotations

import json
import sys

import torch

from bksdm_tune.config import parse
from bksdm_tune.device import best_device
from bksdm_tune.dreambooth.config import Config
from bksdm_tune.dreambooth.job import prepare
from bksdm_tune.dreambooth.saving import need
from bksdm_tune.dreambooth.train import load
from bksdm_tune.memory import keep_freed_pages, peak_memory_gb
from bksdm_tune.optim import make_all
from bksdm_tune.precision import choose
from bksdm_tune.trial import step_seconds


def in_another_layout(unet: torch.nn.Module) -> float:
    """GB of weights that were copied from the pages of their file."""
    copied = (p for p in unet.parameters() if p.dim() == 4 and p.shape[2:] != (1, 1))
    return sum(p.numel() * p.element_size() for p in copied) / 1e9


def main() -> None:
    job = prepare(parse(Config, sys.argv[1:], "scripts/memory_estimate.py"), best_device())
    keep_freed_pages()
    training, before = job.config.training, peak_memory_gb("cpu")
    counted = need(job).bytes(bool(training.gradient_checkpointing), training.optimiser) / 1e9
    learner = load([job])
    optimiser, _, ema = make_all(training, learner.trainable.parameter_groups())
    batch, precision = next(learner.batches(0)), choose(training.precision, job.device)
    step_seconds(learner.objective, batch, optimiser, ema, precision, job.device)
    peak, twice = peak_memory_gb("cpu"), in_another_layout(learner.unet)
    facts = {
        "counted": counted,
        "taken": peak - before - twice,
        "before": before,
        "in_another_layout": twice,
        "resident_peak": peak,
    }
    print(json.dumps({name: round(value, 2) for name, value in facts.items()}, indent=1))


if __name__ == "__main__":
    main()
