"""What a LoRA of the teacher is worth on a compressed student: ported raw, healed, or made there.

    python scripts/port_table.py --out DIR [--student pocket-small] [--subjects dog can ...]

For every subject: a LoRA trained on the teacher; the same ported to the student by
``bksdm-tune port``; ported and healed (``--heal``, no photos); a LoRA trained on the student.
Each is scored on 25 prompts x 2.  Resumable; prints the table of docs/files.md: means over
subjects, 95 % intervals, and differences to the ported one by subject.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bksdm_tune.artifacts import read_manifest
from bksdm_tune.evaluate.results import SCORES, read_results
from bksdm_tune.evaluate.statistics import bootstrap_mean
from bksdm_tune.resolve import ADAPTER
from scripts.selection import SUBJECTS, run

TEACHER = "pocket-teacher"
ARMS = ("on the teacher", "ported", "ported and healed", "trained on the student")
METRICS = ("dino", "clip_i", "clip_t")


def measure(name: str, options: Any) -> None:
    folder = options.out / name
    runs = {"on the teacher": TEACHER, "trained on the student": options.student}
    for arm, backbone in runs.items():
        words = ["--subject", name, "--lora", "--backbone", backbone, "--preview-prompts"]
        run(["dreambooth", *words, "--out", str(folder / arm)])
    made = folder / "on the teacher"
    ported = {"ported": [], "ported and healed": ["--heal"]}
    for arm, more in ported.items():
        file = folder / f"{arm}.safetensors"
        if not file.exists():
            words = [str(made / ADAPTER), "--to", options.student, "--out", str(file)]
            run(["port", *words, *more])
    photos = read_manifest(made)["parents"]["photo_folder"]
    who = ["--photos", photos, "--class-noun", noun_of(made), "--identifier", "sks11df"]
    for arm in ARMS:
        out = folder / "scores" / arm
        if (out / SCORES).exists():
            continue
        what = [str(folder / arm)] if arm in runs else [str(folder / f"{arm}.safetensors"), *who]
        grid = ["--images", "2", "--class-images", "0", "--protocol", "pocket"]
        run(["score", *what, *grid, "--out", str(out)])


def noun_of(folder: Path) -> str:
    return str(read_manifest(folder)["results"]["trigger"]).partition(" ")[2]


def table(options: Any) -> str:
    found = {
        (arm, metric): np.array(
            [
                read_results(options.out / name / "scores" / arm)["metrics"][metric]["macro"]
                for name in options.subjects
            ]
        )
        for arm in ARMS
        for metric in METRICS
    }
    lines = [f"| | {' | '.join(METRICS)} |", "|---" * (len(METRICS) + 1) + "|"]
    for arm in ARMS:
        lines.append(f"| {arm} | " + " | ".join(said(found[arm, m]) for m in METRICS) + " |")
    for arm in ARMS[2:]:
        cells = [said(found[arm, m] - found["ported", m]) for m in METRICS]
        lines.append(f"| {arm} minus ported | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def said(values: Any) -> str:
    low, high = bootstrap_mean(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS))
    parser.add_argument("--student", default="pocket-small")
    options = parser.parse_args()
    for name in options.subjects:
        measure(name, options)
    text = table(options)
    (options.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
