"""How fast this program is beside its peers; every subcommand measures both sides in one run.

    python scripts/benchmark.py dreambooth --diffusers CHECKOUT --photos DIR --out FILE.json
    python scripts/benchmark.py user       --diffusers CHECKOUT --out FILE.json
    python scripts/benchmark.py distill    --reference CHECKOUT --data DIR --out FILE.json
    python scripts/benchmark.py generate   --out FILE.json
    python scripts/benchmark.py stack      --out FILE.json
    python scripts/benchmark.py levers     --out FILE.json
    python scripts/benchmark.py startup    --diffusers CHECKOUT --photos DIR --out FILE.json

Sides take turns; figures are medians over the turns.  Checkouts of huggingface/diffusers and of
Nota-NetsPresso/BK-SDM are the reader's own.  ``SUBCOMMAND --help`` says what exactly is compared.

For a GPU ``dreambooth``, ``stack`` and ``distill`` take published shapes with random weights, and
with ``--dry-run`` only say what they would run (photos of ``stack``: $BKSDM_DATA, or fetched):

    python scripts/benchmark.py dreambooth --full-size bk-base --end-to-end --steps 800 ...
    python scripts/benchmark.py stack      --full-size bk-base --sizes 1 30 --out FILE.json
    python scripts/benchmark.py distill    --full-size sd-v1 --batch-size 64 ...
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SUBCOMMANDS = ("dreambooth", "user", "distill", "generate", "stack", "startup", "levers")


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = whole.add_subparsers(dest="what", required=True)
    for name in SUBCOMMANDS:
        module = importlib.import_module(f"scripts.benchmarks.{name}")
        part = parts.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawTextHelpFormatter
        )
        part.add_argument("--out", type=Path, required=True, help="JSON file")
        part.add_argument("--repeats", type=int, default=3, help="turns")
        module.add_arguments(part)
        part.set_defaults(measure=module.measure)
    return whole


if __name__ == "__main__":
    options = parser().parse_args()
    options.measure(options)
