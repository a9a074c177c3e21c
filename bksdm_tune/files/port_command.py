"""``bksdm-tune port``: a LoRA of Stable Diffusion onto a compressed student, or back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from bksdm_tune.config import parse
from bksdm_tune.errors import UsageError


@dataclass(frozen=True)
class Config:
    """Move a LoRA to the layers of another U-Net of its family."""

    file: Positional[Path]
    """Adapter file of any layout, or a PEFT folder."""
    to: str
    """Where to: bk-base, bk-small, bk-tiny, sd-v1, their v2 and pocket names."""
    out: Path
    """File to write, in diffusers' layout."""
    source: Annotated[str | None, arg(name="from")] = None
    """What it was made for; default: what its metadata or its layers say."""


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "bksdm-tune port")
    from bksdm_tune.files.adapter_command import architecture_of, provenance_of, trigger
    from bksdm_tune.files.port import port
    from bksdm_tune.files.write import write_adapter
    from bksdm_tune.lora import layouts

    adapter = layouts.read(config.file)
    target = known(config.to, "--to")
    source = known(config.source, "--from") if config.source else None
    source = source or architecture_of(config.file, adapter)
    moved, dropped = port(adapter, source, target)
    record = provenance_of(target, trigger(adapter.metadata), f"ported from {source}")
    write_adapter(config.out, moved, "diffusers", record)
    print(
        f"Wrote {config.out}: {len(moved.of('unet'))} U-Net layers from {source} to {target}, "
        f"{len(moved.of('text_encoder'))} of the text encoder."
    )
    if dropped:
        print(f"Dropped {len(dropped)} layers that {target} has not:")
        print("\n".join(f"  {path}" for path in dropped))
    return 0


def known(name: str, flag: str) -> str:
    """The architecture of that name, or of a registered backbone.

    Raises:
        UsageError: there is none.
    """
    from bksdm_tune.backbones import BACKBONES
    from bksdm_tune.lora.fit import ARCHITECTURES

    if name in ARCHITECTURES:
        return name
    if name in BACKBONES:
        row = BACKBONES[name]
        wanted = (row.family, row.plan.name)
        return next(arch for arch, facts in ARCHITECTURES.items() if facts == wanted)
    raise UsageError(f"{flag} {name} is none of {', '.join(ARCHITECTURES)}.")
