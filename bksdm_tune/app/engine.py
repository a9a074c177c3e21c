"""Models in memory for drawing: loaded on first use, adapters swapped without loading them again.

One request draws at a time; the web server's queue decides whose.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bksdm_tune.app import forms, safety
from bksdm_tune.app.library import Library, Model
from bksdm_tune.artifacts import sha256_file
from bksdm_tune.attention import Maps, attention_maps
from bksdm_tune.config import check_range
from bksdm_tune.device import best_device
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.generate import fill_subject
from bksdm_tune.lora import fit
from bksdm_tune.pipeline import Shot, draw, expand, load_for_drawing, put_on
from bksdm_tune.resolve import INDEX, Parts, resolve, tuned_from

KEPT = 2  # pipelines in memory
LONGEST_PROMPT = 2000


Key = tuple[str, str, str]  # U-Net, the other parts, when they were written


class Cancelled(Exception):
    """The person who asked does not want it any more."""


@dataclass(frozen=True)
class Request:
    """What to draw, with a ``model`` of the library, its slug, or a ``backbone``, as --backbone."""

    prompt: str
    model: str | None = None
    backbone: str | None = None
    negative_prompt: str = ""
    n: int = 1
    seed: int = 0
    steps: int = 25
    guidance: float = 7.5
    strength: float = 1.0
    untuned: bool = False
    """Draw with what the model was tuned from."""

    def __post_init__(self) -> None:
        forms.check_types(self)
        if (self.model is None) == (self.backbone is None):
            raise UsageError("Choose a model to draw with.")
        if not self.prompt.strip():
            raise UsageError("Write a prompt: what should be in the picture?")
        for text in (self.prompt, self.negative_prompt):
            if len(text) > LONGEST_PROMPT or "\0" in text:
                raise UsageError(f"A prompt has at most {LONGEST_PROMPT} characters.")
        check_range("Pictures", self.n, 1, forms.MOST_PICTURES)
        check_range("Seed", self.seed, 0, 2**62)
        check_range("Steps", self.steps, 1, forms.MOST_DENOISING)
        check_range("Guidance", self.guidance, 0, forms.MOST_GUIDANCE)
        check_range("Strength", self.strength, 0, forms.MOST_STRENGTH)


@dataclass(frozen=True)
class Drawn:
    """Pictures with what made them."""

    pictures: list[Image.Image]
    shots: list[Shot]
    seconds: float
    """A picture."""
    withheld: int = 0
    """By the safety checker."""


class Engine:
    """Draws requests, a few pipelines being kept."""

    def __init__(self, library: Library, device: str | None = None) -> None:
        self.library, self.device = library, device or best_device()
        self.lock = threading.Lock()
        self.pipes: OrderedDict[Key, Any] = OrderedDict()
        self.worn: dict[Key, str] = {}
        """Pipeline -> hash of the adapter it carries."""
        self.checkers: dict[Path, safety.Safety] = {}

    def draw(self, request: Request, on_step: Callable[[float], None]) -> Drawn:
        """
        Raises:
            UsageError, DataError: what is wrong with the request or its model.
            Cancelled: from ``on_step``.
        """
        parts, shot, side = self.find(request)
        shots = expand(shot, request.n)
        with self.lock:
            pipe = self.dressed(parts, request.strength)
            started = time.perf_counter()
            size = 4 if (side or 512) > 128 else 16
            pictures = draw(pipe, shots, size, side, "drawing", on_step=on_step)
            allowed = self.allowed(parts.root, pictures)
            seconds = (time.perf_counter() - started) / len(shots)
        kept = list(itertools.compress(zip(pictures, shots, strict=True), allowed))
        return Drawn([p for p, _ in kept], [s for _, s in kept], seconds, allowed.count(False))

    def attention(self, request: Request, on_step: Callable[[float], None]) -> Maps:
        """As ``draw``, of one picture, with the share that each word had in each pixel."""
        parts, shot, side = self.find(request)
        with self.lock:
            pipe = self.dressed(parts, request.strength)
            maps = attention_maps(pipe, shot, side, on_step)
            if not all(self.allowed(parts.root, [maps.picture])):
                raise DataError("The safety checker withheld the picture.")
        return maps

    def allowed(self, root: Path, pictures: list[Image.Image]) -> list[bool]:
        """What the pipeline's own safety checker says, where it ships one."""
        if not safety.shipped(root):
            return [True] * len(pictures)
        if root not in self.checkers:
            self.checkers = {root: safety.Safety(root, self.device)}
        return self.checkers[root].allows(pictures)

    def find(self, request: Request) -> tuple[Parts, Shot, int | None]:
        """Parts, the first shot, side in pixels."""
        if request.backbone is not None:
            parts, trigger, side = resolve(request.backbone), None, None
        else:
            assert request.model is not None
            model: Model = self.library.get(request.model)
            parts, trigger = resolve(str(model.folder)), model.trigger or None
            side = model.manifest["config"].get("training", {}).get("resolution")
            if request.untuned:
                parts = tuned_from(model.folder) or parts
        prompt = fill_subject(request.prompt, trigger)
        settings = request.steps, request.guidance, request.negative_prompt
        return parts, Shot(prompt, request.seed, *settings), side

    def dressed(self, parts: Parts, strength: float) -> Any:
        """The backbone's pipeline, with the adapter on, or with none."""
        key = (str(parts.unet), str(parts.root), str(changed(parts.root)))
        pipe = self.pipes.pop(key, None)
        while len(self.pipes) >= KEPT:  # before another is loaded
            old, _ = self.pipes.popitem(last=False)
            self.worn.pop(old, None)
        if pipe is None:
            pipe = load_for_drawing(replace(parts, adapter=None), self.device)
            self.worn.pop(key, None)
        self.pipes[key] = pipe
        wanted = None if parts.adapter is None else sha256_file(parts.adapter)
        if self.worn.get(key) != wanted:
            if self.worn.pop(key, None) is not None:
                pipe.unload_lora_weights()
            if parts.adapter is not None and wanted is not None:
                whole = fit.check(parts.adapter, pipe.unet.config)
                put_on(pipe, whole, parts.adapter, parts.name)
                self.worn[key] = wanted
        if parts.adapter is not None:
            names = pipe.get_list_adapters()
            used = sorted({name for part in names.values() for name in part})
            pipe.set_adapters(used, [strength] * len(used))
        return pipe

    def release(self) -> None:
        """Give an accelerator's memory back, unless somebody is drawing."""
        if self.device == "cpu" or not self.lock.acquire(blocking=False):
            return
        try:
            self.pipes.clear()
            self.worn.clear()
            gc.collect()  # which otherwise looks seldom (cli.YOUNG)
            torch.cuda.empty_cache()
        finally:
            self.lock.release()

    def preload(self, ref: str) -> None:
        """Load a backbone before anybody asks."""
        with self.lock:
            self.dressed(resolve(ref), 1.0)


def changed(root: Path) -> int:
    """When a pipeline was written: a deleted run's folder may be another run's by now."""
    return (root / INDEX).stat().st_mtime_ns


def settings_of(path: Path) -> Request:
    """What a PNG of this program says it was drawn with; the model as it was named.

    Raises:
        UsageError: it asks for what no request may.
        DataError: it is no picture, or says nothing.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            said = json.loads(image.info.get("bksdm_tune", "null"))
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError):
        raise DataError("That is no PNG file.") from None
    if not isinstance(said, dict) or "prompt" not in said:
        raise DataError("That picture does not say how it was drawn; only this program's do.")
    names = {"guidance_scale": "guidance"}
    known = {field.name for field in fields(Request)} - {"n", "backbone", "untuned"}
    found = {names.get(name, name): value for name, value in said.items()}
    with contextlib.suppress(KeyError, ValueError, TypeError):
        found["strength"] = float(found["strength"])  # text, as all that is added to a picture
    return Request(**{"model": "unknown"} | {k: v for k, v in found.items() if k in known})
