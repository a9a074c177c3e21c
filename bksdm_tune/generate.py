"""``bksdm-tune generate``: draw pictures with a run, a backbone or an adapter file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tyro.conf import Positional

from bksdm_tune.artifacts import MANIFEST, read_manifest
from bksdm_tune.config import check_range, parse
from bksdm_tune.errors import UsageError
from bksdm_tune.resolve import Parts, resolve

SUBJECT = "{subject}"


@dataclass(frozen=True)
class Config:
    """Draw pictures with a run, a backbone or an adapter file."""

    model: Positional[str]
    """Run folder, adapter file (.safetensors), registry name, diffusers folder or Hub id."""
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


def find_parts(config: Config) -> tuple[Parts, str | None]:
    """The parts to draw with, and what {subject} stands for (None: nothing was learned).

    Raises:
        UsageError: the adapter does not say what it goes on and --backbone does not either.
    """
    path = Path(config.model)
    if path.suffix == ".safetensors" and path.is_file():
        return _adapter_file(path, config)
    parts = resolve(config.model, config.base)
    if (path / MANIFEST).is_file():
        return parts, read_manifest(path)["results"].get("trigger")
    return parts, None


def _adapter_file(path: Path, config: Config) -> tuple[Parts, str | None]:
    from bksdm_tune.adapters import read_provenance

    made_from = read_provenance(path)
    ref = config.backbone or (made_from.backbone if made_from else None)
    if ref is None:
        raise UsageError(f"{path} does not say what it goes on; name it with --backbone.")
    parts = replace(resolve(ref, config.base), adapter=path)
    return parts, made_from.trigger if made_from else None


def fill_subject(prompt: str, trigger: str | None) -> str:
    if SUBJECT in prompt and trigger is None:
        raise UsageError(
            f"{SUBJECT} means what a run has learned, and this model has learned nothing. "
            "Name a run folder, or leave it out of --prompt."
        )
    return prompt.replace(SUBJECT, trigger or "")


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "bksdm-tune generate")
    parts, trigger = find_parts(config)
    prompt = fill_subject(config.prompt, trigger)
    from bksdm_tune.pipeline import Shot, draw, expand, load_pipeline, save_png

    shot = Shot(prompt, config.seed, config.steps, config.guidance, config.negative_prompt)
    shots = expand(shot, config.n)
    pictures = draw(load_pipeline(parts), shots, config.batch_size)
    here = Path(config.model)
    out = config.out or (here if here.is_dir() else Path()) / "generated"
    out.mkdir(parents=True, exist_ok=True)
    slug = "".join(c if c.isalnum() else "-" for c in prompt)[:60].strip("-")
    for picture, shot in zip(pictures, shots, strict=True):
        path = out / f"{slug}-{shot.seed}.png"
        save_png(path, picture, shot, model=config.model)
        print(path)
    return 0
