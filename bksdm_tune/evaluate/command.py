"""``bksdm-tune evaluate``: how good a backbone is, with the protocol and the uncertainty."""

from __future__ import annotations

from datetime import timedelta

from bksdm_tune.config import parse
from bksdm_tune.evaluate.config import Config


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "bksdm-tune evaluate")
    from accelerate import PartialState

    state = PartialState(timeout=timedelta(days=1))  # the first encodes while the others wait
    from bksdm_tune.evaluate.backbone import evaluate
    from bksdm_tune.evaluate.results import read_results, table

    path = evaluate(config, str(state.device))
    if path is not None:
        result = read_results(path)
        if config.extractors == "pocket":
            print("Pocket encoders: these figures compare with no published ones.")
        print(table(result["metrics"]))
        print(f"Wrote {path}")
    return 0
