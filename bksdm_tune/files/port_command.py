"""``bksdm-tune port``: a LoRA of Stable Diffusion onto a compressed student, or back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from bksdm_tune.config import check_range, parse
from bksdm_tune.errors import UsageError
from subjects.catalogue import prompts_of_class

if TYPE_CHECKING:
    from bksdm_tune.lora.adapter import Adapter


@dataclass(frozen=True)
class Config:
    """Move a LoRA to the layers of another U-Net of its family."""

    file: Positional[Path]
    """Adapter file of any layout, or a PEFT folder."""
    to: str
    """Where to: bk-base, bk-small, bk-tiny, sd-v1, their v2 and pocket names."""
    out: Path
    """File to write, in diffusers' layout; LoHa, LoKr and DoRA in LyCORIS'."""
    source: Annotated[str | None, arg(name="from")] = None
    """What it was made for; default: what its metadata or its layers say."""
    heal: bool = False
    """Then train it, without photos, until the student with it does as the teacher with the
    original; from a teacher to a student only."""
    subject: str | None = None
    """What the adapter means in a prompt, for --heal: "sks dog"; default: its trigger words."""
    teacher: str | None = None
    """Backbone that the original is for, for --heal; default: the one of that name."""
    student: str | None = None
    """Backbone to port to, for --heal; default: the one of that name."""
    heal_steps: int = 300
    """Optimiser steps of --heal."""

    def __post_init__(self) -> None:
        check_range("--heal-steps", self.heal_steps, 1)


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "bksdm-tune port")
    from bksdm_tune.files.adapter_command import architecture_of, provenance_of
    from bksdm_tune.files.port import port
    from bksdm_tune.files.write import check_free, write_adapter
    from bksdm_tune.lora import layouts

    check_free(config.out)
    adapter = layouts.read(config.file)
    target = known(config.to, "--to")
    source = known(config.source, "--from") if config.source else None
    source = source or architecture_of(config.file, adapter)
    moved, dropped = port(adapter, source, target)
    words = config.subject or adapter.trigger
    record = provenance_of(target, words, f"ported from {source}")

    def write(path: Path, whole: Adapter) -> None:
        write_adapter(path, whole, "diffusers" if whole.plain else "kohya", record)

    if config.heal:
        moved.check_plain("--heal")
        again = mend(config, source, target, words, lambda path: write(path, moved))
        write(config.out, again)
    else:
        write(config.out, moved)
    print(
        f"Wrote {config.out}: {len(moved.of('unet'))} U-Net layers from {source} to {target}, "
        f"{len(moved.of('text_encoder'))} of the text encoder."
    )
    if dropped:
        print(f"Dropped {len(dropped)} layers that {target} has not:")
        print("\n".join(f"  {path}" for path in dropped))
    if config.heal:
        print(f"Healed {config.out} in {config.heal_steps} steps.")
    return 0


def mend(
    config: Config,
    source: str,
    target: str,
    words: str | None,
    write_ported: Callable[[Path], None],
) -> Adapter:
    """The adapter after healing; until then all lies in a folder beside ``--out``, so that it can
    be interrupted and nothing half-made has the name.

    Raises:
        UsageError: nothing says what the adapter means.
    """
    if words is None:
        raise UsageError('--heal needs to know what the adapter means: --subject "sks dog".')
    from bksdm_tune.artifacts import locked
    from bksdm_tune.device import best_device
    from bksdm_tune.files.heal import Healing, heal
    from bksdm_tune.lora.fit import registered
    from bksdm_tune.resolve import hash_adapter, resolve
    from bksdm_tune.runs import occupy

    folder = config.out.with_suffix(".healing").absolute()
    ported = folder / "ported.safetensors"
    teacher = replace(resolve(config.teacher or registered(source)), adapter=config.file.resolve())
    student = replace(resolve(config.student or registered(target)), adapter=ported)
    healing = Healing(
        teacher, student, prompts_of(words), steps=config.heal_steps, device=best_device()
    )
    facts = {"file": hash_adapter(config.file), "from": source, "to": target, "words": words}
    with locked(folder):
        occupy(folder, facts | {"steps": config.heal_steps}, "healing", "another healing")
        write_ported(ported)
        result = heal(healing, folder)
    shutil.rmtree(folder)
    return result


def prompts_of(words: str) -> tuple[str, ...]:
    """The subject in every DreamBooth scene, and its class, to be left as the teacher leaves it."""
    noun = words.split(maxsplit=1)[-1]
    scenes = (template.replace("{0} {1}", words) for template in prompts_of_class(noun))
    return (*scenes, f"a {words}", f"a {noun}")


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
