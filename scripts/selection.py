"""Is the step that ``--keep-best`` delivers at least as good as the last one?  Measured on pocket.

    python scripts/selection.py --out DIR [--subjects dog can ...] [--every 100]

Every subject is trained once with scores on the way; the chosen and the last step are then scored
on the whole benchmark grid, whose noises the choice never saw, and compared (bksdm-tune compare);
and again on those prompts alone that the choice never saw.  Resumable.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bksdm_tune.artifacts import read_manifest
from bksdm_tune.cli import main as command
from bksdm_tune.evaluate.compare import compare
from bksdm_tune.evaluate.results import SCORES, read_results
from bksdm_tune.evaluate.score import summarise, write
from bksdm_tune.evaluate.watch import EVERY_THIRD
from bksdm_tune.resolve import ADAPTER
from bksdm_tune.sweep.table import rows_of

SUBJECTS = (
    "backpack", "bear_plushie", "can", "cat", "clock", "dog", "duck_toy", "fancy_boot", "teapot",
    "vase",
)  # fmt: skip


def run(words: list[str]) -> None:
    code = command(words)
    if code:
        raise SystemExit(code)


def measure(name: str, options: Any) -> None:
    """Train with selection, score the delivered and the last step."""
    folder = options.out / name
    training = ["--subject", name, "--lora", "--backbone", options.backbone, "--keep-best"]
    every = ["--score-every", str(options.every), "--preview-prompts"]
    run(["dreambooth", *training, *every, "--out", str(folder / "best")])
    last = folder / "last"
    if not last.exists():
        scratch = folder / "last.tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(folder / "best", scratch, ignore=shutil.ignore_patterns("score"))
        steps = read_manifest(scratch)["results"]["steps"]
        shutil.copy(scratch / f"checkpoint-{steps}" / ADAPTER, scratch / ADAPTER)
        scratch.rename(last)
    for arm in ("best", "last"):
        if not (folder / arm / "score" / SCORES).exists():
            run(["score", str(folder / arm), "--protocol", "pocket"])


def gather(options: Any, arm: str, unseen: bool) -> Path:
    """One result over all subjects; ``unseen``: without the prompts that the choice went by."""
    rows = []
    for name in options.subjects:
        rows += rows_of(options.out / name / arm / "score", options.out, 0)
    if unseen:
        rows = [row for row in rows if not row["prompt_id"] or int(row["prompt_id"]) % EVERY_THIRD]
    first = read_results(options.out / options.subjects[0] / arm / "score")
    result = summarise(rows, first["protocol"], arm, [], None, first["metrics"]["div"]["reason"])
    folder = options.out / "arms" / f"{arm}{'-unseen' if unseen else ''}"
    write(folder, rows, result, options.out)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS))
    parser.add_argument("--backbone", default="pocket-base")
    parser.add_argument("--every", type=int, default=100)
    options = parser.parse_args()
    delivered = {}
    for name in options.subjects:
        measure(name, options)
        selection = read_manifest(options.out / name / "best")["results"]["selection"]
        delivered[name] = selection["delivered"]
    summary: dict[str, Any] = {"delivered_step": delivered}
    for name, unseen in (("best_minus_last", False), ("on_prompts_never_seen", True)):
        arms = (gather(options, arm, unseen) for arm in ("last", "best"))
        summary[name] = compare(*arms)
    (options.out / "selection.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
