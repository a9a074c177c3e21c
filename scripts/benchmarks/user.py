"""From photos to an adapter as a user gets it: each side's own defaults, scores beside the seconds.

ours            ``bksdm-tune dreambooth --subject NAME --lora``: pictures before and after included
documented      diffusers' train_dreambooth_lora.py as its README has it: 500 steps, rank 4,
                learning rate 1e-4, batch 1, no prior preservation
with prior      the same with prior preservation as their README has it for full tuning: 200
                class images, 800 steps
with ours       with our recipe's settings, which nobody tells its user, and 200 class images

All from empty caches, class images included in the seconds; scored by ``bksdm-tune score`` on 25
prompts x 2 and 8 pictures of the class (PRES: how much the class looks like the subject).
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
from bksdm_tune.evaluate.results import SCORES, read_results
from bksdm_tune.pipeline_folder import native_resolution
from bksdm_tune.resolve import ADAPTER, resolve
from scripts.benchmarks.common import Facts, child, in_turns, report, wall
from scripts.benchmarks.dreambooth import clean_copy

METRICS = ("dino", "clip_t", "pres")
IDENTIFIER = "sks11df"
ARMS = ("documented", "with prior", "with ours")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--diffusers", type=Path, required=True, help="checkout of diffusers")
    parser.add_argument("--subjects", nargs="+", default=["dog", "backpack_dog", "vase", "cat"])
    parser.add_argument("--backbone", default="pocket-base")
    parser.set_defaults(repeats=1)


def ours(options: Any, name: str, scratch: Path) -> Facts:
    out = emptied(scratch / "ours")
    words = ["-m", "bksdm_tune", "dreambooth", "--subject", name, "--lora"]
    words += ["--backbone", options.backbone, "--out", str(out)]
    facts = child(words, scratch, emptied(scratch / "cache"))
    return facts | scores([str(out)], scratch)


def theirs(options: Any, arm: str, scratch: Path) -> Facts:
    """After ``ours``, whose photos it gets."""
    made = read_manifest(scratch / "ours")
    noun = made["results"]["trigger"].partition(" ")[2]
    photos = clean_copy(Path(made["parents"]["photo_folder"]), emptied(scratch / "photos"))
    out, parts = emptied(scratch / "theirs"), resolve(options.backbone)
    script = options.diffusers.resolve() / "examples/dreambooth/train_dreambooth_lora.py"
    words = [
        str(script), "--pretrained_model_name_or_path", str(parts.root),
        "--instance_data_dir", str(photos), "--instance_prompt", f"a {IDENTIFIER} {noun}",
        "--resolution", str(native_resolution(parts)), "--lr_warmup_steps", "0",
        "--seed", "1234", "--output_dir", str(out), *settings(arm, made["config"]),
    ]  # fmt: skip
    if arm != "documented":
        words += ["--with_prior_preservation", "--num_class_images", "200"]
        words += ["--class_data_dir", str(out / "class"), "--class_prompt", f"a {noun}"]
    facts = child(words, scratch)
    who = ["--photos", str(photos), "--class-noun", noun, "--identifier", IDENTIFIER]
    return facts | scores([str(out / ADAPTER), "--backbone", options.backbone, *who], scratch)


def settings(arm: str, config: dict[str, Any]) -> list[str]:
    """``config``: of our run."""
    if arm != "with ours":
        steps = "500" if arm == "documented" else "800"
        words = ["--train_batch_size", "1", "--learning_rate", "1e-4", "--lr_scheduler"]
        return [*words, "constant", "--max_train_steps", steps]
    training, text = config["training"], config["training"]["train_text_encoder"]
    return [
        "--train_batch_size", str(training["batch_size"]), "--rank", str(config["lora"]["rank"]),
        "--learning_rate", str(training["learning_rate"]),
        "--lr_scheduler", training["lr_scheduler"], "--max_train_steps", str(training["steps"]),
        "--prior_loss_weight", str(config["prior"]["prior_weight"]),
        *(["--train_text_encoder"] if text else []),
    ]  # fmt: skip


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def scores(what: list[str], scratch: Path) -> Facts:
    out = emptied(scratch / "scores")
    grid = ["--images", "2", "--class-images", "8", "--protocol", "pocket", "--out", str(out)]
    wall(["-m", "bksdm_tune", "score", *what, *grid], scratch)
    found = read_results(out / SCORES)["metrics"]
    return {name: found[name]["macro"] for name in METRICS}


def measure(options: Any) -> None:
    subjects: dict[str, dict[str, list[Facts]]] = {}
    for name in options.subjects:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            sides = {"ours": functools.partial(ours, options, name, scratch)}
            sides |= {arm: functools.partial(theirs, options, arm, scratch) for arm in ARMS}
            subjects[name] = in_turns(sides, options.repeats)
    means = {
        arm: {
            key: statistics.fmean(facts[key] for turns in subjects.values() for facts in turns[arm])
            for key in ("seconds", *METRICS)
        }
        for arm in ("ours", *ARMS)
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
