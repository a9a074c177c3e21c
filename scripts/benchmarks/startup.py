"""Seconds until something happens: the help text, a dry run, a first picture; whole processes.

``help``: ``bksdm-tune --help`` against diffusers' script's ``--help``.  ``dry_run``: ours alone,
for there is nothing like it.  ``first_picture``: ``bksdm-tune generate`` against a four-line script
of stock diffusers, the same backbone, prompt, steps and guidance scale.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

from bksdm_tune.resolve import resolve
from scripts.benchmarks.common import Facts, device, in_turns, medians, report, wall

STOCK = """
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(
    {folder!r}, safety_checker=None, torch_dtype={dtype!r}
)
pipe.to({device!r})
pipe("a dog on the beach", num_inference_steps=25).images[0].save("stock.png")
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--diffusers", type=Path, required=True, help="checkout of diffusers")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--backbone", default="pocket-base")


def measure(options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        stock = scratch / "stock.py"
        root = str(resolve(options.backbone).root)
        dtype = "float32" if device() == "cpu" else "float16"
        stock.write_text(STOCK.format(folder=root, device=device(), dtype=dtype))
        script = options.diffusers.resolve() / "examples/dreambooth/train_dreambooth_lora.py"
        tool = ["-m", "bksdm_tune"]
        photos = ["--photos", str(options.photos.resolve()), "--class-noun", "dog", "--lora"]
        picture = ["--prompt", "a dog on the beach", "--steps", "25", "--out", str(scratch)]
        commands = {
            "help, ours": [*tool, "--help"],
            "help, diffusers": [str(script), "--help"],
            "dry run, ours": [*tool, "dreambooth", *photos, "--backbone", root, "--dry-run"],
            "first picture, ours": [*tool, "generate", options.backbone, *picture],
            "first picture, diffusers": [str(stock)],
        }

        def seconds(words: list[str]) -> Facts:
            return {"seconds": wall(words, scratch, scratch / "cache")}

        sides = {name: functools.partial(seconds, words) for name, words in commands.items()}
        turns = in_turns(sides, options.repeats)
    report(options, {"medians": medians(turns), "turns": turns})
