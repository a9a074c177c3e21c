"""What a sweep consists of: cells, and tasks, which are cells that one worker does in one go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bksdm_tune.errors import UsageError
from bksdm_tune.sweep.config import Config, split
from subjects.catalogue import SUBJECTS, get_subject
from subjects.photos import find_photos

RESULT, FAILURE = "cell.json", "failure.txt"


@dataclass(frozen=True)
class Cell:
    """One subject learned once."""

    subject: str
    backbone: str
    method: str
    seed: int

    @property
    def arm(self) -> str:
        """Cells of an arm differ in subject and seed."""
        return f"{short_name(self.backbone)}-{self.method}"

    @property
    def name(self) -> str:
        return f"{self.subject}-{self.arm}-seed{self.seed}"

    def folder(self, out: Path) -> Path:
        return out / "cells" / self.name

    def done(self, out: Path) -> bool:
        return (self.folder(out) / RESULT).is_file()

    def clash(self, other: Cell) -> bool:
        """Another backbone under the same name."""
        return self.arm == other.arm and self.backbone != other.backbone


Task = tuple[Cell, ...]


def lasting(backbone: str) -> str:
    """As it can be typed from anywhere."""
    path = Path(backbone)
    return str(path.resolve()) if path.is_dir() else backbone


def subject_names(config: Config) -> list[str]:
    """
    Raises:
        UsageError: no such subject, or none whose photos are there.
    """
    if config.subjects == "all":
        return list(SUBJECTS)
    if config.subjects == "real":
        found = [name for name in SUBJECTS if find_photos(name, config.data_root)]
        if not found:
            raise UsageError(
                "--subjects real: no photos are on disk. Say where with --data-root DIR, or type "
                "bksdm-tune subjects fetch."
            )
        return found
    return [get_subject(name).name for name in split(config.subjects)]


def short_name(backbone: str) -> str:
    """Of a folder its last part, of a Hub id all of it."""
    path = Path(backbone)
    return path.resolve().name if path.is_dir() else backbone.replace("/", "-")


def cells(config: Config) -> list[Cell]:
    """
    Raises:
        UsageError: two backbones of one name, or what ``subject_names`` raises.
    """
    names = [short_name(backbone) for backbone in split(config.backbones)]
    if len(set(names)) < len(names):
        raise UsageError(
            f"--backbones has two folders of one name ({', '.join(names)}); rename one."
        )
    return [
        Cell(subject, lasting(backbone), method, int(seed))
        for backbone in split(config.backbones)
        for method in split(config.methods)
        for seed in split(config.seeds)
        for subject in subject_names(config)
    ]


def tasks(wanted: list[Cell], stack: int) -> Iterator[Task]:
    """LoRAs of an arm and seed in stacks, full tunings one by one."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in wanted:
        groups.setdefault((cell.arm, cell.seed), []).append(cell)
    for group in groups.values():
        size = stack if group[0].method == "lora" else 1
        for start in range(0, len(group), size):
            yield tuple(group[start : start + size])
