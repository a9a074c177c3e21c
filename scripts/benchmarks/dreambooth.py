"""DreamBooth step against diffusers' scripts and the reference's, like for like.

Same backbone, photos, class images (made beforehand, so in nobody's seconds), captions, batch
1 + 1, resolution, precision, optimiser, learning rate, clipping, prior weight; LoRA: rank and alpha
4 on to_q, to_k, to_v, to_out.0; text encoder frozen.  ``step_seconds`` is the mean from the 17th
optimiser step to the last one of the same process; ``seconds`` is the whole process, loading and
saving included; no side draws pictures.  ``unet_alone`` is the limit at equal arithmetic: forward
and backward of the U-Net with that LoRA as ours runs it, on one batch in memory, nothing else.

With ``--end-to-end`` each side sees to its prior itself, in its own seconds: ours by prior
prediction, the others by class images.

What differs, because it is what is compared: the others encode photos (VAE) and captions (text
encoder) anew in every step, ours once; ``diffusers, captions once`` is their script with the flag
that spares the second.  The reference starts a loader process and a thread that watches the memory
in every epoch, which the class images make as long as the run.  Order and noise are each one's own.
On a GPU in bf16 diffusers' LoRA weights are bf16, ours float32.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bksdm_tune.adapters import fold_small, inject
from bksdm_tune.pipeline import load_part
from bksdm_tune.pipeline_folder import native_resolution
from bksdm_tune.precision import autocast, choose, frozen_dtype
from scripts.benchmarks.common import (
    Facts,
    add_model,
    child,
    device,
    in_turns,
    median_seconds,
    model,
    report_steps,
)
from scripts.benchmarks.reference import runnable
from subjects.photos import read_photos

RANK = 4
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
RATES = {"lora": "1e-4", "full": "5e-6"}
SCRIPTS = {"lora": "train_dreambooth_lora.py", "full": "train_dreambooth.py"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--diffusers", type=Path, required=True, help="checkout of diffusers")
    parser.add_argument("--reference", type=Path, help="checkout of BK-SDM, a third side")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--class-noun", default="dog")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    add_model(parser, "--backbone", "pocket-base")
    parser.add_argument("--class-images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=144)
    parser.add_argument(
        "--end-to-end",
        action="store_true",
        help="ours with prior prediction, the others with class images that they draw themselves",
    )


def ours(options: Any, place: Place) -> list[str]:
    lora = ["--lora", "--rank", str(RANK), "--alpha", str(RANK), "--targets", *TARGETS]
    images = ["--prior", "images", "--class-images", str(options.class_images)]
    return [
        "-m", "bksdm_tune", "dreambooth", "--photos", str(place.photos),
        "--class-noun", options.class_noun, "--backbone", str(place.backbone.root),
        *(lora if options.method == "lora" else []), "--train-text-encoder", "false",
        *(["--prior", "prediction"] if options.end_to_end else images), "--prior-weight", "1",
        "--batch-size", "1", "--steps", str(options.steps), "--lr-scheduler", "constant",
        "--learning-rate", RATES[options.method], "--resolution", str(place.resolution),
        "--precision", place.precision, "--preview-prompts", "--checkpoint-every", "1000000",
        "--out", str(place.scratch / "ours"),
    ]  # fmt: skip


def diffusers(options: Any, place: Place) -> list[str]:
    script = options.diffusers.resolve() / "examples/dreambooth" / SCRIPTS[options.method]
    rank = ["--rank", str(RANK)] if options.method == "lora" else []
    return [str(script), *rank, *shared(options, place, "diffusers")]


def captions_once(options: Any, place: Place) -> list[str]:
    return [*diffusers(options, place), "--pre_compute_text_embeddings"]


def reference(options: Any, place: Place) -> list[str]:
    targets = f"UNET_TARGET_MODULES = {list(TARGETS)!r}  #"
    same = ("UNET_TARGET_MODULES = [", f"{targets} [")
    script = runnable(options.reference.resolve(), "dreambooth_finetune.py", place.scratch, same)
    lora = ["--use_lora", "--lora_r", str(RANK), "--lora_alpha", str(RANK)]
    return [
        str(script), "--unet_path", str(place.backbone.root),
        *(lora if options.method == "lora" else []), *shared(options, place, "reference"),
    ]  # fmt: skip


def shared(options: Any, place: Place, name: str) -> list[str]:
    """What both other sides call the same."""
    return [
        "--pretrained_model_name_or_path", str(place.backbone.root),
        "--instance_data_dir", str(place.photos), "--class_data_dir", str(place.class_images),
        "--with_prior_preservation", "--prior_loss_weight", "1",
        "--num_class_images", str(options.class_images), "--center_crop",
        "--instance_prompt", f"a sks11df {options.class_noun}",
        "--class_prompt", f"a {options.class_noun}", "--train_batch_size", "1",
        "--max_train_steps", str(options.steps), "--learning_rate", RATES[options.method],
        "--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--seed", "1234",
        "--resolution", str(place.resolution), "--mixed_precision", place.precision,
        "--checkpointing_steps", "1000000", "--output_dir", str(place.scratch / name),
    ]  # fmt: skip


def clean_copy(photos: Path, target: Path) -> Path:
    """The photos alone: diffusers' scripts stop at any other file."""
    target.mkdir(parents=True)
    for photo in read_photos(photos, minimum_side=1).photos:
        shutil.copy(photo.path, target)
    return target


class Place:
    """Backbone, photos and class images of a comparison, and where it may write."""

    def __init__(self, options: Any, scratch: Path) -> None:
        self.scratch, self.cache = scratch, scratch / "cache"
        self.own_prior = options.end_to_end
        self.photos = clean_copy(options.photos, scratch / "photos")
        self.class_images = scratch / "class-images"
        self.precision = choose("auto", device())
        self.backbone = model(options, scratch)
        self.resolution = native_resolution(self.backbone)

    def run(self, words: list[str]) -> Facts:
        made = ["class-images"] if self.own_prior else []
        for name in ("ours", "diffusers", "reference", "cache/latents", *made):
            shutil.rmtree(self.scratch / name, ignore_errors=True)
        return child(words, self.scratch, self.cache)


def draw_class_images(options: Any, place: Place) -> None:
    """By ours, into our cache, and a copy for the others."""
    brief = argparse.Namespace(**vars(options) | {"steps": 1})
    place.run(ours(brief, place))
    pictures = sorted(place.cache.glob("class-images/*/*.png"))
    assert len(pictures) == options.class_images, pictures
    place.class_images.mkdir()
    for picture in pictures:
        shutil.copy(picture, place.class_images)


class Alone:
    """The arithmetic that both sides share."""

    def __init__(self, options: Any, place: Place) -> None:
        lora = options.method == "lora"
        self.precision = place.precision
        dtype = frozen_dtype(self.precision, device()) if lora else torch.float32
        unet = load_part(place.backbone, "unet", dtype).train()
        self.unet = unet.to(device(), memory_format=torch.channels_last)
        self.folded: list[Any] = []
        if lora:
            inject(self.unet, RANK, RANK, 0.0, TARGETS)
            if device() == "cpu":
                self.folded = fold_small(self.unet).parameters()
        config, tokens = self.unet.config, load_part(place.backbone, "tokenizer").model_max_length
        side = config["sample_size"]
        shape = (2, config["in_channels"], side, side)
        width = config["cross_attention_dim"]
        self.inputs = (
            torch.randn(shape, device=device(), dtype=dtype),
            torch.randint(0, 1000, (2,), device=device()),
            torch.randn(2, tokens, width, device=device(), dtype=dtype),
        )

    def step(self) -> None:
        with autocast(self.precision, device()):
            loss = self.unet(*self.inputs).sample.float().square().mean()
        loss.backward()
        self.unet.zero_grad(set_to_none=True)
        for parameter in self.folded:
            parameter.grad = None


SIDES = {
    "ours": ours,
    "diffusers": diffusers,
    "diffusers, captions once": captions_once,
    "reference": reference,
}


def measure(options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Place(options, Path(folder))
        asked = [name for name in SIDES if name != "reference" or options.reference]
        commands = {name: SIDES[name](options, place) for name in asked}
        if options.dry_run:
            print(json.dumps(commands, indent=1))
            return
        if not options.end_to_end:
            draw_class_images(options, place)
        alone = Alone(options, place)
        sides: dict[str, Callable[[], Facts]] = {
            name: functools.partial(place.run, words) for name, words in commands.items()
        }
        sides["unet_alone"] = lambda: {"step_seconds": median_seconds(alone.step, 20)}
        turns = in_turns(sides, options.repeats)
    report_steps(options, turns, alone.step)
