"""``bksdm-tune dreambooth``: photos in, a personalised backbone out."""

from __future__ import annotations

from bksdm_tune.config import parse
from bksdm_tune.dreambooth.config import Config


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "bksdm-tune dreambooth")
    from bksdm_tune.device import best_device
    from bksdm_tune.dreambooth import job as jobs
    from bksdm_tune.dreambooth import train
    from bksdm_tune.dreambooth.saving import settle

    job, saved = settle(jobs.prepare(config, best_device()))
    print(jobs.describe(job), flush=True)
    if saved:
        print(saved, flush=True)
    if config.output.dry_run:
        print(train.dry_run(job))
        return 0
    if not train.train(job):
        print("This run is finished already; nothing to do.")
    print(f"Look at {job.folder / 'contact-sheet.png'}")
    print(f'Then: bksdm-tune generate {job.folder} --prompt "a {{subject}} in the snow"')
    return 0
