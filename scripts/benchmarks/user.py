"""From photos to an adapter as a user gets it: each side's own defaults, scores beside the seconds.

ours        ``bksdm-tune dreambooth --subject NAME --lora``: pictures before and after included
documented  diffusers' train_dreambooth_lora.py as its documentation has it: 200 class images, 500
            steps, rank 4, learning rate 1e-4, batch 1
with ours   the same script given our recipe (rank 16, text encoder, learning rate, schedule, batch,
            steps, prior weight), which nobody tells its user, with its 200 class images

All from empty caches, class images included in the seconds; scored by ``bksdm-tune score`` on 25
prompts x 2.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bksdm_tune.artifacts import read_manifest
from bksdm_tune.dreambooth.recipes import recipe
from bksdm_tune.evaluate.results import SCORES, read_results
from bksdm_tune.pipeline_folder import native_resolution
from bksdm_tune.resolve import ADAPTER, resolve
from scripts.benchmarks.common import Facts, child, in_turns, report, wall

METRICS = ("dino", "clip_t")
IDENTIFIER = "sks11df"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--diffusers", type=Path, required=True, help="checkout of diffusers")
    parser.add_argument("--subjects", nargs="+", default=["dog", "backpack_dog", "vase", "cat"])
    parser.add_argument("--backbone", default="pocket-base")
    parser.set_defaults(repeats=1)


def ours(options: Any, name: str, scratch: Path) -> Facts:
    out = scratch / name / "ours"
    words = ["-m", "bksdm_tune", "dreambooth", "--subject", name, "--lora"]
    words += ["--backbone", options.backbone, "--out", str(out)]
    facts = child(words, scratch, scratch / name / "cache")
    return facts | scores(options, [str(out)], scratch)


def theirs(options: Any, name: str, scratch: Path, settings: list[str], arm: str) -> Facts:
    """After ``ours``, whose photos it gets."""
    parents = read_manifest(scratch / name / "ours")
    photos, noun = (
        parents["parents"]["photo_folder"],
        parents["results"]["trigger"].split(" ", 1)[1],
    )
    out, parts = scratch / name / arm, resolve(options.backbone)
    script = options.diffusers.resolve() / "examples/dreambooth/train_dreambooth_lora.py"
    words = [
        str(script), "--pretrained_model_name_or_path", str(parts.root),
        "--instance_data_dir", photos, "--class_data_dir", str(out / "class"),
        "--instance_prompt", f"a {IDENTIFIER} {noun}", "--class_prompt", f"a {noun}",
        "--with_prior_preservation", "--num_class_images", "200", "--lr_warmup_steps", "0",
        "--resolution", str(native_resolution(parts)), "--seed", "1234",
        "--output_dir", str(out), *settings,
    ]  # fmt: skip
    facts = child(words, scratch)
    who = ["--photos", photos, "--class-noun", noun, "--identifier", IDENTIFIER]
    what = [str(out / ADAPTER), "--backbone", options.backbone, *who]
    return facts | scores(options, what, scratch)


def documented(options: Any) -> list[str]:
    return [
        "--train_batch_size", "1", "--learning_rate", "1e-4", "--lr_scheduler", "constant",
        "--max_train_steps", "500",
    ]  # fmt: skip


def with_ours(options: Any) -> list[str]:
    row = recipe("miniature", "lora")
    return [
        "--train_batch_size", str(row["batch_size"]), "--rank", str(row["rank"]),
        "--learning_rate", str(row["learning_rate"]), "--lr_scheduler", row["lr_scheduler"],
        "--max_train_steps", str(row["steps"]), "--prior_loss_weight", str(row["prior_weight"]),
        "--train_text_encoder",
    ]  # fmt: skip


def scores(options: Any, what: list[str], scratch: Path) -> Facts:
    out = scratch / "scores"
    shutil.rmtree(out, ignore_errors=True)
    grid = ["--images", "2", "--class-images", "0", "--protocol", "pocket", "--out", str(out)]
    wall(["-m", "bksdm_tune", "score", *what, *grid], scratch)
    found = read_results(out / SCORES)["metrics"]
    return {name: found[name]["macro"] for name in METRICS}


def measure(options: Any) -> None:
    subjects: dict[str, dict[str, list[Facts]]] = {}
    for name in options.subjects:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            (scratch / name).mkdir()
            arms = {"documented": documented(options), "with ours": with_ours(options)}
            sides = {"ours": functools.partial(ours, options, name, scratch)} | {
                arm: functools.partial(theirs, options, name, scratch, settings, arm)
                for arm, settings in arms.items()
            }
            subjects[name] = in_turns(sides, options.repeats)
    means = {
        arm: {
            key: statistics.fmean(facts[key] for turns in subjects.values() for facts in turns[arm])
            for key in ("seconds", *METRICS)
        }
        for arm in ("ours", "documented", "with ours")
    }
    seconds = {arm: facts["seconds"] for arm, facts in means.items()}
    report(
        options,
        {
            "means": means,
            "seconds_over_ours": {arm: value / seconds["ours"] for arm, value in seconds.items()},
            "subjects": subjects,
        },
    )
