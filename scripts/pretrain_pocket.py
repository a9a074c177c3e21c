"""Pre-train the pocket family, stage by stage; type the same command again to resume.

    python scripts/pretrain_pocket.py all --photos DIR     (folders of the DreamBooth subjects)
    python scripts/pretrain_pocket.py data warm vae unet students pack --photos DIR
                                                           (on from the shipped weights)

State lies in ``work/pocket`` (git ignores it).  ``pack`` writes ``bksdm_tune/pocket``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STAGES = ("data", "vae", "unet", "students", "clip", "looks", "probe", "pack", "report")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stages", nargs="+", choices=("all", "warm", *STAGES))
    parser.add_argument("--work", type=Path, default=Path("work/pocket"))
    parser.add_argument("--photos", type=Path, help="real photos for the VAE (stage data)")
    options = parser.parse_args()
    for stage in STAGES if "all" in options.stages else options.stages:
        module = importlib.import_module(f"scripts.pocket.{stage}")
        arguments = (options.photos,) if stage == "data" else ()
        module.run(options.work, *arguments)


if __name__ == "__main__":
    main()
