"""``bksdm-tune generate``: draw pictures with a run, a backbone or an adapter file."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tyro.conf import Positional

from bksdm_tune.artifacts import MANIFEST, read_manifest
from bksdm_tune.config import check_range, parse
from bksdm_tune.errors import UsageError
from bksdm_tune.resolve import ADAPTER, Parts, is_adapter, resolve

SUBJECT = "{subject}"


@dataclass(frozen=True)
class Config:
    """Draw pictures with a run, a backbone or an adapter file."""

    model: Positional[str]
    """Run folder, adapter file (.safetensors), PEFT folder, registry name, diffusers folder or Hub
    id."""
    prompt: str
    """What to draw; {subject} stands for what the run learned."""
    n: int = 1
    """Pictures, with consecutive seeds."""
    seed: int = 0
    """Of the first picture."""
    steps: int = 25
    """Denoising steps."""
    guidance: float = 7.5
    """Guidance scale."""
    negative_prompt: str = ""
    """What not to draw."""
    backbone: str | None = None
    """What an adapter file goes on; default: what its metadata names."""
    base: str | None = None
    """Where the other parts come from, if the model is a U-Net alone."""
    batch_size: int = 4
    """Pictures at a time; it does not change them."""
    out: Path | None = None
    """Folder for the PNG files; default: generated/ in the run folder, else in this folder."""

    def __post_init__(self) -> None:
        check_range("--n", self.n, 1)
        check_range("--seed", self.seed, 0, 2**63 - 1)
        check_range("--steps", self.steps, 1, 1000)
        check_range("--guidance", self.guidance, 0)
        check_range("--batch-size", self.batch_size, 1)


class Model(NamedTuple):
    """What to draw with."""

    parts: Parts
    trigger: str | None = None
    """What {subject} stands for; None: nothing was learned."""
    side: int | None = None
    """Of the pictures in pixels; None: the backbone's own."""


def find_model(config: Config) -> Model:
    """
    Raises:
        UsageError: the adapter does not say what it goes on and --backbone does not either.
        DataError: the model lacks something.
    """
    path = Path(config.model)
    if is_adapter(path):
        return _adapter_file(path, config)
    if config.backbone is not None:
        raise UsageError(
            f"--backbone says what an adapter goes on; {config.model} is none and knows its own."
        )
    parts = resolve(config.model, config.base)
    if not (path / MANIFEST).is_file():
        return Model(parts)
    manifest = read_manifest(path)
    side = manifest["config"].get("training", {}).get("resolution")
    return Model(parts, manifest["results"].get("trigger"), side)


def _adapter_file(path: Path, config: Config) -> Model:
    from bksdm_tune.lora import layouts

    if config.backbone is None and path.name == ADAPTER and (path.parent / MANIFEST).is_file():
        return find_model(replace(config, model=str(path.parent)))  # the run knows where it lies
    adapter = layouts.read(path)
    ref = config.backbone or (adapter.made_from.backbone if adapter.made_from else None)
    if ref is None:
        raise UsageError(f"{path} does not say what it goes on; name it with --backbone.")
    try:
        parts = replace(resolve(ref, config.base), adapter=path)
    except UsageError:
        if config.backbone is not None:
            raise
        raise UsageError(
            f"{path} was made on {ref}, which is not here; name it with --backbone."
        ) from None
    return Model(parts, adapter.trigger)


def fill_subject(prompt: str, trigger: str | None) -> str:
    if SUBJECT in prompt and trigger is None:
        raise UsageError(
            f"{SUBJECT} means what a run has learned, and this model has learned nothing. "
            "Name a run folder, or leave it out of --prompt."
        )
    return prompt.replace(SUBJECT, trigger or "")


def free_name(out: Path, stem: str, settings: str) -> Path:
    """``stem.png``, or with a number if a picture of other settings has that name."""
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    paths = (out / f"{name}.png" for name in names)
    return next(path for path in paths if not path.exists() or settings_of(path) == settings)


def settings_of(path: Path) -> str | None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("bksdm_tune")
    except OSError:
        return None


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "bksdm-tune generate")
    model = find_model(config)
    prompt = fill_subject(config.prompt, model.trigger)
    here = Path(config.model)
    out = config.out or (here if here.is_dir() else Path()) / "generated"
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():  # said before hours of drawing
        raise UsageError(f"--out {out} cannot be a folder: {there} is a file.")
    from bksdm_tune.pipeline import Shot, draw, expand, load_for_drawing, save_png, settings_text

    shot = Shot(prompt, config.seed, config.steps, config.guidance, config.negative_prompt)
    shots = expand(shot, config.n)
    pictures = draw(load_for_drawing(model.parts), shots, config.batch_size, model.side)
    out.mkdir(parents=True, exist_ok=True)
    slug = "".join(c if c.isalnum() else "-" for c in prompt)[:60].strip("-")
    for picture, shot in zip(pictures, shots, strict=True):
        facts = {"model": config.model}
        path = free_name(out, f"{slug}-{shot.seed}", settings_text(shot, facts))
        save_png(path, picture, shot, **facts)
        print(path)
    return 0
