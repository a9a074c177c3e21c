"""Pictures a second against stock diffusers, and the denoising loop against its arithmetic.

``ours`` draws as ``bksdm-tune generate`` does, ``diffusers`` is ``StableDiffusionPipeline`` with
``load_lora_weights`` as its documentation has it; both get the same prompts, seeds, steps, guidance
scale and batch, models loaded and warm.  ``diffusers, one by one`` is the same with its default of
one picture a call; ours draws four at a time unless told otherwise.  ``largest_difference`` is from
our pictures, in steps of 255.  ``loop`` is the U-Net alone, over the teacher and the students: how
much faster a student is, and how much less arithmetic it has.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

from bksdm_tune.generate import Config, Model, find_model
from bksdm_tune.pipeline import Shot, draw, expand, load_for_drawing, load_part
from bksdm_tune.precision import DTYPES
from bksdm_tune.resolve import resolve
from scripts.benchmarks.common import Facts, device, in_turns, median_seconds, medians, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pocket-base", help="as in bksdm-tune generate")
    parser.add_argument("--prompt", default="a dog on the beach")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument(
        "--family", nargs="+", help="teacher first; default: the pocket family",
        default=["pocket-teacher", "pocket-base", "pocket-small", "pocket-tiny"],
    )  # fmt: skip
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8, 32], help="of the loop")
    parser.add_argument("--rounds", type=int, default=12, help="of the loop, a turn")


def stock(model: Model) -> Any:
    dtype = torch.float32 if device() == "cpu" else torch.float16
    unet = {} if model.parts.unet == model.parts.root / "unet" else {
        "unet": load_part(model.parts, "unet", dtype)
    }  # fmt: skip
    pipe = StableDiffusionPipeline.from_pretrained(
        model.parts.root, torch_dtype=dtype, safety_checker=None, **unet
    ).to(device())
    if model.parts.adapter is not None:
        adapter = model.parts.adapter
        pipe.load_lora_weights(adapter.parent, weight_name=adapter.name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_stock(pipe: Any, shots: list[Shot], size: int, side: int | None) -> list[Any]:
    pictures: list[Any] = []
    for start in range(0, len(shots), size):
        batch = shots[start : start + size]
        pictures += pipe(
            [shot.prompt for shot in batch],
            num_inference_steps=batch[0].steps,
            guidance_scale=batch[0].guidance_scale,
            generator=[torch.Generator().manual_seed(shot.seed) for shot in batch],
            height=side,
            width=side,
        ).images
    return pictures


class Side:
    """Draws the same shots every turn; its last pictures are kept."""

    def __init__(self, pictures: Callable[[], list[Any]]) -> None:
        self.pictures, self.last = pictures, pictures()

    def __call__(self) -> Facts:
        started = time.perf_counter()
        self.last = self.pictures()
        return {"images_a_second": len(self.last) / (time.perf_counter() - started)}


def difference(a: list[Any], b: list[Any]) -> int:
    pairs = zip(a, b, strict=True)
    return max(int(np.abs(np.int16(x) - np.int16(y)).max()) for x, y in pairs)


@torch.inference_mode()
def loop(name: str, rows: int, rounds: int) -> Facts:
    """One denoising step of a backbone."""
    parts = resolve(name)
    dtype = DTYPES["no" if device() == "cpu" else "fp16"]
    unet = load_part(parts, "unet", dtype).to(device(), memory_format=torch.channels_last)
    tokens, config = load_part(parts, "tokenizer").model_max_length, unet.config
    shape = (rows, config["in_channels"], config["sample_size"], config["sample_size"])
    width = config["cross_attention_dim"]
    noisy = torch.randn(shape, device=device(), dtype=dtype)
    embeds = torch.randn(rows, tokens, width, device=device(), dtype=dtype)
    timestep = torch.tensor(500, device=device())
    with FlopCounterMode(display=False) as counter:
        unet(noisy, timestep, embeds)
    seconds = median_seconds(lambda: unet(noisy, timestep, embeds), rounds)
    return {"seconds": seconds, "gflops": counter.get_total_flops() / 1e9}


def loops(options: Any) -> Facts:
    """Rows -> backbone -> how much faster than the first, and how much less it computes."""
    found: Facts = {}
    for rows in options.rows:
        steps: dict[str, list[Facts]] = {name: [] for name in options.family}
        for _ in range(options.repeats):
            for name in options.family:
                steps[name].append(loop(name, rows, options.rounds))
        middle = {n: statistics.median(f["seconds"] for f in s) for n, s in steps.items()}
        flops = {name: facts[0]["gflops"] for name, facts in steps.items()}
        first = options.family[0]
        found[str(rows)] = {
            name: {
                "seconds": middle[name],
                "faster": middle[first] / middle[name],
                "less_arithmetic": flops[first] / flops[name],
            }
            for name in options.family
        }
    return found


def measure(options: Any) -> None:
    model = find_model(Config(options.model, ""))
    shots = expand(Shot(options.prompt, 0, options.steps), options.images)
    size, side = options.batch_size, model.side
    our_pipe, their_pipe = load_for_drawing(model.parts), stock(model)
    sides = {
        "ours": Side(lambda: draw(our_pipe, shots, size, side)),
        "diffusers": Side(lambda: by_stock(their_pipe, shots, size, side)),
        "diffusers, one by one": Side(lambda: by_stock(their_pipe, shots, 1, side)),
    }
    turns = in_turns(sides, options.repeats)
    rate = {name: facts["images_a_second"] for name, facts in medians(turns).items()}
    report(
        options,
        {
            "images_a_second": rate,
            "ours_over": {name: rate["ours"] / value for name, value in rate.items()},
            "largest_difference": {
                name: difference(sides["ours"].last, side.last) for name, side in sides.items()
            },
            "loop": loops(options),
            "turns": turns,
        },
    )
