"""``bksdm-tune distill``: a compressed student learns from its teacher."""

from __future__ import annotations

from bksdm_tune.config import parse
from distill.config import Config


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "bksdm-tune distill")
    from accelerate import PartialState

    from bksdm_tune import processes

    state = PartialState()  # one process, or one of those that accelerate launch started
    from distill import dry_run, train
    from distill import job as jobs

    job = jobs.prepare(config, str(state.device))
    first = processes.rank() == 0
    if first:
        print(jobs.describe(job), flush=True)
    if config.output.dry_run:
        said = dry_run.measure(job)
        if first:
            print(said)
        return 0
    finished_now = train.train(job)
    if first and not finished_now:
        print("This run is finished already; nothing to do.")
    if first:
        print(f"Wrote {job.folder}: a diffusers pipeline, usable as --backbone {job.folder}.")
    return 0
