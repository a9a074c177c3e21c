"""``bksdm-tune attention``: one prompt and noise through models, word by word."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from bksdm_tune.config import check_range, parse
from bksdm_tune.errors import UsageError


@dataclass(frozen=True)
class Config:
    """Show which words of a prompt drew which pixels, for one model or several."""

    models: Positional[tuple[str, ...]]
    """Run folders, registry names, diffusers folders or Hub ids; a row each."""
    prompt: str
    """What to draw; {subject} stands for what a run learned."""
    out: Path = Path("attention.png")
    """PNG file."""
    seed: int = 0
    """Of the noise, the same for all."""
    steps: int = 25
    """Denoising steps."""
    guidance: float = 7.5
    """Guidance scale, above 1."""

    def __post_init__(self) -> None:
        check_range("--seed", self.seed, 0, 2**63 - 1)
        check_range("--steps", self.steps, 1, 1000)
        check_range("--guidance", self.guidance, 1)
        if not self.models:
            raise UsageError("Name a model: bksdm-tune attention pocket-base --prompt 'a dog'.")


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "bksdm-tune attention")
    from bksdm_tune.attention import attention_maps
    from bksdm_tune.contact_sheet import Row, contact_sheet
    from bksdm_tune.generate import Config as Drawing
    from bksdm_tune.generate import fill_subject, find_model
    from bksdm_tune.pipeline import Shot, load_for_drawing

    found = [find_model(Drawing(name, config.prompt)) for name in config.models]
    prompts = [fill_subject(config.prompt, model.trigger) for model in found]  # before loading
    rows = []
    for name, model, prompt in zip(config.models, found, prompts, strict=True):
        shot = Shot(prompt, config.seed, config.steps, config.guidance)
        maps = attention_maps(load_for_drawing(model.parts), shot, model.side)
        overlays = [maps.overlay(i) for i in range(len(maps.words))]
        rows.append(Row(name, [maps.picture, *overlays], (prompt, *maps.words)))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(config.out, f"Which words drew which pixels: {config.prompt}", rows)
    print(config.out)
    return 0
