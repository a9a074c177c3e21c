"""``bksdm-tune adapter info|check|merge|resize``: what adapter files hold, new ones from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from bksdm_tune.config import check_range
from bksdm_tune.errors import DataError, UsageError


@dataclass(frozen=True)
class Info:
    """Say rank, alpha, targets, base architecture and trigger words of adapter files."""

    files: Positional[tuple[Path, ...]]
    """Of any layout: diffusers, PEFT folder, kohya, LyCORIS."""
    json: bool = False
    """Print a list of objects."""


@dataclass(frozen=True)
class Check:
    """Whether adapter files fit a backbone; if not, what to type."""

    files: Positional[tuple[Path, ...]]
    """Adapter files."""
    backbone: str
    """Registry name, folder or Hub id."""
    base: str | None = None
    """Where the other parts come from, if the backbone is a U-Net alone."""


@dataclass(frozen=True)
class Merge:
    """The weighted sum of LoRAs as one, exact, at the sum of their ranks."""

    files: Positional[tuple[Path, ...]]
    """Two or more LoRAs of one architecture."""
    out: Path
    """File to write, in diffusers' layout."""
    weights: tuple[float, ...] | None = None
    """One a file; default: 1 each."""


@dataclass(frozen=True)
class Resize:
    """The nearest LoRA of another rank, by singular values."""

    file: Positional[Path]
    """An adapter that is no DoRA."""
    rank: int
    """Of the new one."""
    out: Path
    """File to write, in diffusers' layout."""

    def __post_init__(self) -> None:
        check_range("--rank", self.rank, 1)


Verb = (
    Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Resize, tyro.conf.subcommand("resize")]
)


def main(argv: list[str]) -> int:
    config: Any = tyro.cli(
        Verb,
        args=argv,
        prog="bksdm-tune adapter",
        description="What adapter files hold, and new ones from them.",
    )
    verbs: dict[type, Callable[[Any], None]] = {
        Info: info,
        Check: check,
        Merge: merge,
        Resize: resize,
    }
    verbs[type(config)](config)
    return 0


def info(config: Info) -> None:
    told = [describe(path) for path in config.files]
    if config.json:
        print(json.dumps(told, indent=2))
        return
    for facts in told:
        print(facts.pop("file"))
        for name, value in facts.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"  {name.replace('_', ' ')}: {'unknown' if value is None else text}")


def describe(path: Path) -> dict[str, Any]:
    """All that ``info`` says of a file."""
    from bksdm_tune.lora import fit, layouts
    from bksdm_tune.lora.adapter import facts

    adapter = layouts.read(path)
    stated = fit.said(adapter)
    return (
        {"file": str(path)}
        | facts(adapter)
        | {
            "made_for": [stated] if stated else fit.inferred(adapter),
            "known_from": "its metadata" if stated else "its layers",
            "trigger": adapter.trigger,
        }
    )


def check(config: Check) -> None:
    from bksdm_tune.lora import fit
    from bksdm_tune.resolve import resolve, unet_config

    parts = resolve(config.backbone, config.base)
    problems = []
    for path in config.files:
        try:
            fit.check(path, unet_config(parts))
            print(f"{path}: fits {parts.name}")
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def merge(config: Merge) -> None:
    from bksdm_tune.files.write import check_free, write_adapter
    from bksdm_tune.lora import adapter as adapters
    from bksdm_tune.lora import layouts

    check_free(config.out)
    weights = config.weights or (1.0,) * len(config.files)
    if len(config.files) < 2 or len(weights) != len(config.files):
        raise UsageError(
            f"merge takes two files or more and a weight for each; you gave {len(config.files)} "
            f"files and {len(weights)} weights."
        )
    given = [layouts.read(path) for path in config.files]
    names = {architecture_of(path, one) for path, one in zip(config.files, given, strict=True)}
    if len(names) > 1:
        raise UsageError(
            f"These are for different architectures ({', '.join(sorted(names))}); port one first: "
            "bksdm-tune port FILE --to NAME --out NEW."
        )
    whole = adapters.merge(given, list(weights))
    write_adapter(config.out, whole, "diffusers", provenance_of(names.pop(), None, "merge"))
    print(f"Wrote {config.out}: rank {max(u.rank for u in whole.updates.values())}.")


def architecture_of(path: Path, adapter: Any) -> str:
    from bksdm_tune.lora import fit

    try:
        return fit.architecture(adapter)
    except DataError as error:
        raise DataError(f"{path} {error}.") from None


def provenance_of(name: str, made_from: str | None, how: str) -> Any:
    """Our record for a file that was made from others."""
    from bksdm_tune.lora.fit import config_of, made_on, registered

    return made_on(config_of(name), registered(name), made_from or "", how)


def resize(config: Resize) -> None:
    from bksdm_tune.files.write import check_free, write_adapter
    from bksdm_tune.lora import adapter as adapters
    from bksdm_tune.lora import layouts

    check_free(config.out)
    given = layouts.read(config.file)
    made_from = None
    if given.of("unet"):  # nothing else says which U-Net it is for
        name = architecture_of(config.file, given)
        made_from = provenance_of(name, given.trigger, f"rank {config.rank}")
    smaller, energy = adapters.resize(given, config.rank)
    write_adapter(config.out, smaller, "diffusers", made_from)
    print(f"Wrote {config.out}: rank {config.rank} keeps {100 * energy:.2f} % of the change.")
